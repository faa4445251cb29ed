"""A Pyro model, its guide and an objective as one module, and the graph of a call of it."""

from __future__ import annotations

import builtins
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.nn.modules.module import register_module_forward_pre_hook

from ppvae._context import kept_buffers, private_modules, random_state, unchecked
from ppvae.objective import draws_plate, is_vectorized, trace_pair
from ppvae.objectives import ELBO, IWAE

__all__ = ["Program", "export", "setting"]


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


def export(program: Program, args: tuple[Any, ...]) -> Any:
    """The exported program of a call; the first dimension of tensors may vary where it can."""
    shapes = tuple(
        {0: torch.export.Dim.AUTO} if isinstance(arg, Tensor) and arg.dim() else None
        for arg in args
    )
    with own_store(), unchecked(), random_state(None, keep=True), torch.enable_grad():
        _load()
        with _symbolic_lengths(), _unsampled(), _silent():
            return torch.export.export(program, args, dynamic_shapes={"args": shapes}, strict=False)


# Operations of which PyTorch does not say the shape of the result, so that it cannot trace them.
_SHAPED: dict[str, Any] = {
    "aten::_standard_gamma_grad": lambda concentration, value: torch.empty_like(value),
    "aten::_sample_dirichlet": lambda concentration, generator=None: concentration.new_empty(
        concentration.shape
    ),
    "aten::_dirichlet_grad": lambda value, concentration, total: torch.empty_like(value),
}


@cache
def _load() -> None:
    """Loads, once in a process, the modules that tracing loads late, before `len` is replaced."""
    import torch._dynamo

    for name, shaped in _SHAPED.items():
        with suppress(RuntimeError):  # PyTorch has come to know it
            torch.library.register_fake(name)(shaped)
    torch.export.export(nn.Identity(), (torch.zeros(2),), strict=False)


@contextmanager
def own_store() -> Iterator[None]:
    """Pyro's param store as it is inside, and as it was outside, whatever is traced."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        yield
    dict(store.items())  # reading a parameter restores the weak reference that get_state takes off


@contextmanager
def _symbolic_lengths() -> Iterator[None]:
    """Makes `len(x)` of a tensor its first size, which may be a symbol, as `x.shape[0]` is.

    Python itself asks for a number, which would fix the batch that is traced. For tensors that are
    not being traced nothing changes.
    """
    before = builtins.len

    def length(value: Any, /) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.dim() else before(value)

    builtins.len = length  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.len = before


@contextmanager
def _unsampled() -> Iterator[None]:
    """Turns off the checks of values of distributions that were made before, with checks."""
    kind: Any = torch.distributions.Distribution
    before = kind._validate_sample
    kind._validate_sample = lambda self, value: None
    try:
        yield
    finally:
        kind._validate_sample = before


@contextmanager
def _silent() -> Iterator[None]:
    """Without PyTorch's own reports on what it cannot trace: the caller gets an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
