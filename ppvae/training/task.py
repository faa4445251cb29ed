"""What is to be trained: a model, its guide, an objective and data, looked at once before."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae._checks import check_choice, check_count, check_number, expect
from ppvae._scopes import eval_mode, kept_buffers, random_state, unchecked
from ppvae.data.batches import Batches
from ppvae.objectives.base import takes_plate
from ppvae.objectives.elbo import ELBO, negative_elbo
from ppvae.objectives.trace_terms import terms
from ppvae.programs.nodes import data_plate, observed_nodes, plates_of
from ppvae.programs.runs import trace_pair
from ppvae.staging.program import called_modules


@dataclass(frozen=True)
class Task:
    """A model, its guide, an objective and data; made by `task_of`.

    Attributes:
        model: a Pyro model.
        guide: its guide.
        objective: the loss.
        batches: the data to train on.
        plate: name of the data plate, where the rule that finds it could find another in another
            minibatch; else None.
        options: keyword arguments of the objective.
        parameters: all that model and guide have and that want a gradient.
        modules: model and guide, and the modules that they call, if they are functions.
    """

    model: Any
    guide: Any
    objective: Any
    batches: Batches
    plate: str | None
    options: dict[str, Any]
    parameters: list[Tensor]
    modules: list[nn.Module]

    def loss(self, batch: tuple[Any, ...], step: int) -> Tensor:
        """The objective in nats per datum, by way of the programs."""
        return self.objective(self.model, self.guide, *batch, **self.options, step=step)

    def check_loss(self, batch: tuple[Any, ...]) -> None:
        """Computes it with the caller's checks on, those of Pyro and PyTorch; moves nothing."""
        with random_state(None, keep=True), torch.no_grad(), kept_buffers(*self.modules):
            self.loss(batch, 0)

    def held_out_loss(self, held_out: Batches) -> float:
        """The negative ELBO of other data, with the same random numbers every time."""
        held_out.to(self.batches.device)
        total = count = 0.0
        programs = self.model, self.guide
        with torch.no_grad(), random_state(0), eval_mode(*programs), unchecked():
            for batch in held_out:
                loss = negative_elbo(*programs, *batch, size=held_out.size, plate=self.plate)
                total += loss.item() * len(batch[0])
                count += len(batch[0])
        return total / count

    def blame(self, batch: tuple[Any, ...]) -> str:
        """Names the terms of the objective that are not finite."""
        with torch.no_grad(), unchecked():
            found = terms(*trace_pair(self.model, self.guide, *batch), self.plate)
        bad = [
            f"{kind} of {site!r}"
            for kind in ("log_likelihood", "kl", "log_prior", "log_guide")
            for site, value in getattr(found, kind).items()
            if not torch.isfinite(value).all()
        ]
        return ", ".join(bad) or "their sum"

    def check_support(self, *data: Batches) -> None:
        """Raises a ValueError unless every datum lies in the support of its likelihood."""
        with torch.no_grad(), random_state(None, keep=True), eval_mode(self.model):
            for batch in (batch for batches in data for batch in batches):
                trace = poutine.trace(self.model).get_trace(*batch)
                for name in trace.observation_nodes:
                    node = trace.nodes[name]
                    ok = node["fn"].support.check(node["value"])
                    wanted = f"values in the support of {name!r}, {node['fn'].support}"
                    got = f"{int((~ok).sum())} of {ok.numel()} data outside"
                    expect(ok.all(), "data", wanted, got)


def task_of(
    model: Any, guide: Any, objective: Any, batches: Batches, plate: str | None = None
) -> Task:
    """Makes a task, by a run of the model and its guide that leaves no trace but late parameters.

    Args:
        model: a Pyro model.
        guide: its guide.
        objective: the loss; None is the negative ELBO.
        batches: the data, which are moved to the device of the parameters.
        plate: name of the data plate; by default the one that `data_plate` finds.

    Raises:
        ValueError: model and guide do not fit, nothing is observed, or the data are of another
            dtype than the parameters, or not as many as the data plate has.
    """
    objective = ELBO() if objective is None else objective
    programs = [m for m in (model, guide) if isinstance(m, nn.Module)]
    near = next((p for module in programs for p in module.parameters()), None)
    if near is not None:
        batches.to(near.device)
        for tensor in batches.tensors:
            same = not tensor.is_floating_point() or tensor.dtype == near.dtype
            expect(same, "data", f"{near.dtype}, as the parameters", tensor.dtype)
    with torch.no_grad(), random_state(None, keep=True), eval_mode(model, guide), unchecked():
        batch = batches.example()
        with called_modules() as called, poutine.trace(param_only=True) as capture:
            trace, _ = trace_pair(model, guide, *batch)
    name = _plate_name(trace, plate, len(batch[0]))
    options: dict[str, Any] = {"size": batches.size}
    if plate is not None or (name is not None and takes_plate(objective)):
        options["plate"] = name
    nodes: Any = capture.trace.nodes
    found: list[Tensor] = [p for module in programs for p in module.parameters()]
    found += [node["value"].unconstrained() for node in nodes.values()]
    parameters = list({id(p): p for p in found if p.requires_grad}.values())
    return Task(model, guide, objective, batches, name, options, parameters, programs + called)


def _plate_name(trace: Any, plate: str | None, rows: int) -> str | None:
    """The name of the data plate, if it was given or a shorter minibatch could have another.

    Raises:
        ValueError: nothing is observed, or the plate is not as long as the data.
    """
    observed = observed_nodes(trace)
    expect(observed, "model", "observed sites", "none")
    frame = data_plate(trace, plate)
    if frame is None:
        return None
    fits = rows in (frame.size, frame.full_size)
    wanted = f"{frame.size} rows, the size of the plate {frame.name!r} of the model"
    expect(fits, "data", wanted, rows)
    others = {name for node in observed for name in plates_of(node)} - {frame.name}
    return frame.name if plate or (others and frame.name != "data") else None


def check_options(num_epochs: Any, learning_rate: Any, optimizer: Any, precision: Any) -> int:
    """Checks options of `fit`, and returns the number of epochs as an `int`.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: an argument is out of its range.
    """
    check_number("learning_rate", learning_rate, positive=True)
    fits = optimizer is None or callable(optimizer)
    expect(fits, "optimizer", "a class or function", type(optimizer).__name__, TypeError)
    check_choice("precision", precision, ("highest", "high", "medium", None))
    wanted = "a call outside of torch.inference_mode, in which nothing can be trained"
    expect(not torch.is_inference_mode_enabled(), "fit", wanted, "one inside")
    return check_count("num_epochs", num_epochs)


def check_objective(objective: Any) -> None:
    """Raises a TypeError unless this is an objective, or None."""
    fits = objective is None or (callable(objective) and not inspect.isclass(objective))
    expect(fits, "objective", "a function, such as ELBO()", repr(objective), TypeError)


def adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """The default optimizer: Adam, all parameters in one kernel."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)
