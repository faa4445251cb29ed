"""A Pyro model, its guide and an objective as one module, and the graph of a call of it."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.nn.modules.module import register_module_forward_pre_hook

from ppvae._scopes import kept_buffers, private_modules, random_state, unchecked
from ppvae.objectives.elbo import ELBO
from ppvae.objectives.iwae import IWAE
from ppvae.programs.runs import draws_plate, is_vectorized, trace_pair


class Program(nn.Module):
    """The loss of a model and its guide as a module that holds all that they are made of.

    Besides the two, where they are modules, it holds the modules that plain functions call and the
    values of their `pyro.param` statements, which share their memory with Pyro's param store.

    Args:
        model: a Pyro model.
        guide: its guide.
        objective: the loss, see `fit`.
        args: arguments of a call, which is made once.
        size: number of data in all.
        plate: name of the data plate.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        objective: Any,
        args: tuple[Any, ...],
        *,
        size: int | None = None,
        plate: str | None = None,
    ) -> None:
        super().__init__()
        self.model, self.guide, self.objective = model, guide, objective
        self.told: dict[str, Any] = {"size": size}
        self.told |= {} if plate is None else {"plate": plate}
        called: list[nn.Module] = []
        hook = register_module_forward_pre_hook(lambda module, _: called.append(module))
        try:
            with random_state(None, keep=True), kept_buffers(self), torch.no_grad(), unchecked():
                with private_modules(), poutine.trace(param_only=True) as capture:
                    trace_pair(model, guide, *args)
                    if is_vectorized(model):
                        draws_plate(model, *args, draws=1)  # looks at the model, once for all
                    nodes: Any = capture.trace.nodes
                    found = {
                        name: (node["value"].unconstrained(), node["kwargs"]["constraint"])
                        for name, node in nodes.items()
                    }
        finally:
            hook.remove()
        known = set(self.modules())
        self.called = nn.ModuleList()
        for module in called:
            if module not in known:
                self.called.append(module)
                known |= set(module.modules())
        owned = {id(parameter) for parameter in self.parameters()}
        self.params = nn.ParameterList()
        self.places: dict[str, tuple[int, Any]] = {}
        for name, (value, constraint) in found.items():
            if id(value) not in owned:
                self.places[name] = len(self.params), constraint
                self.params.append(nn.Parameter(value.detach(), value.requires_grad))

    def forward(self, *args: Any) -> Tensor:
        """The loss; the last argument is the setting of this step, see `setting`."""
        *batch, knob = args
        objective, step = self.objective, knob
        if isinstance(objective, ELBO) and (callable(objective.beta) or self.varies):
            objective, step = replace(objective, beta=knob), 0
        with private_modules(), _Given(self):
            return objective(self.model, self.guide, *batch, **self.told, step=step)

    #: whether beta comes from outside although it is a number: replicates differ in it
    varies = False

    def setting(self, step: int) -> Tensor:
        """What the loss depends on beside the data: the weight at a step, or else the step."""
        return setting(self.objective, step)


def setting(objective: Any, step: int) -> Tensor:
    """The weight `beta` of an objective at a step, if it has one, or else the step."""
    if isinstance(objective, ELBO):
        beta = objective.beta(step) if callable(objective.beta) else objective.beta
        return torch.as_tensor(beta, dtype=torch.float64)
    return torch.tensor(0 if isinstance(objective, IWAE) else step)


class _Given(Messenger):
    """Gives `pyro.param` statements the parameters of a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.program.places:
            index, constraint = self.program.places[msg["name"]]
            raw = self.program.params[index]
            value = transform_to(constraint)(raw)
            value.unconstrained = weakref.ref(raw)  # type: ignore[attr-defined]
            msg["value"], msg["done"] = value, True
