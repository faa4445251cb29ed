"""The parts of the training loop: steps, parameters, checks, and the way back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae._batches import Batches
from ppvae._compiled import Runner
from ppvae._context import eval_mode, kept_buffers, random_state, unchecked
from ppvae.objective import data_plate, negative_elbo, terms, trace_pair

__all__ = [
    "Diverged",
    "Kept",
    "Stepper",
    "adam",
    "check_options",
    "check_support_of",
    "is_count",
    "mean_loss",
    "parameters_of",
    "restore",
    "undone_by_errors",
]


class Diverged(ArithmeticError):
    """The loss stopped being finite; parameters of at most ten steps before are in place."""


class Kept:
    """Parameters of some steps back, with a finite loss: the way back from a step into nowhere.

    To keep those of every step would cost a tenth of it.
    """

    EVERY = 10

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters, self.step = parameters, 0
        self.copies = [p.detach().clone() for p in parameters]

    def keep(self, step: int) -> None:
        """Keeps the parameters as they are, if it is time again."""
        if step % self.EVERY == 0 and self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.parameters)
            self.step = step

    def back(self) -> str:
        """Puts the parameters back and says to where."""
        restore(self.parameters, self.copies)
        return f"the parameters are back at those of step {self.step}"


class Stepper:
    """One step of the optimizer, and the way back from a step into nowhere."""

    def __init__(self, runner: Runner, optimizer: Any) -> None:
        self.runner, self.optimizer, self.parameters = runner, optimizer, runner.parameters
        self.kept = Kept(self.parameters)
        self.number = 0

    def step(self, batch: tuple[Tensor, ...]) -> float:
        """Takes a step and returns the loss before it."""
        losses: list[float] = []

        def closure() -> Tensor:
            if self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)
            loss, slopes = self.runner(batch, self.number)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                self._diverged(f"the loss is {losses[-1]}", self._blame(batch))
            self.kept.keep(self.number)
            for parameter, slope in slopes or ():
                parameter.grad = slope
            if slopes is None and loss.requires_grad:
                loss.backward()
            if self.number == 0:  # once more with the caller's checks, which look at shapes
                programs = self.runner.model, self.runner.guide
                with random_state(None, keep=True), torch.no_grad(), kept_buffers(*programs):
                    self.runner.eager(batch, 0, checked=True)
            return loss.detach()

        if self.optimizer is None:
            closure()
        else:
            self.optimizer.step(closure)
        self.number += 1
        return losses[0]

    def check(self) -> None:
        """Raises if the last step led out of the finite numbers."""
        if not all(torch.isfinite(p).all() for p in self.parameters):
            self._diverged("a parameter is not finite", "its gradient")

    def _diverged(self, what: str, blame: str) -> NoReturn:
        raise Diverged(f"{what} at step {self.number}, from {blame}; {self.kept.back()}")

    def _blame(self, batch: tuple[Tensor, ...]) -> str:
        """Names the terms that are not finite."""
        with torch.no_grad(), unchecked():
            parts = terms(*trace_pair(self.runner.model, self.runner.guide, *batch))
        named = {
            "log_likelihood": parts.log_likelihood,
            "kl": parts.kl,
            "log_prior": parts.log_prior,
            "log_guide": parts.log_guide,
        }
        bad = [
            f"{term} of {site!r}"
            for term, values in named.items()
            for site, value in values.items()
            if not torch.isfinite(value).all()
        ]
        return ", ".join(bad) or "their sum"


def adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def parameters_of(model: Any, guide: Any, batches: Batches) -> list[Tensor]:
    """All parameters of model and guide, after a first call has made those that are made late."""
    modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
    near = next((p for module in modules for p in module.parameters()), None)
    if near is not None:
        batches.to(near.device)
        _check_dtype(near, batches)
    with torch.no_grad(), random_state(None, keep=True), eval_mode(model, guide), unchecked():
        batch = batches.example()
        with poutine.trace(param_only=True) as capture:
            pair = trace_pair(model, guide, *batch)
    _check_rows(pair[0], len(batch[0]))
    nodes: Any = capture.trace.nodes
    sites = [node["value"].unconstrained() for node in nodes.values()]
    found = [p for module in modules for p in module.parameters()] + sites
    return list({id(p): p for p in found if p.requires_grad}.values())


def _check_dtype(near: Tensor, batches: Batches) -> None:
    for tensor in batches.tensors:
        if tensor.is_floating_point() and tensor.dtype != near.dtype:
            raise ValueError(f"data: expected {near.dtype}, as the parameters, got {tensor.dtype}")


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_options(
    num_epochs: Any, learning_rate: Any, optimizer: Any, objective: Any, precision: Any
) -> None:
    """Raises, if an option of `fit` is not what it should be."""
    if not is_count(num_epochs):
        raise ValueError(f"num_epochs: expected a whole number of at least 1, got {num_epochs}")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate}")
    if optimizer is not None and not callable(optimizer):
        raise TypeError(f"optimizer: expected a class or function, got {type(optimizer).__name__}")
    if objective is not None and (not callable(objective) or inspect.isclass(objective)):
        raise TypeError(f"objective: expected a function, such as ELBO(), got {objective!r}")
    if precision not in (None, "highest", "high", "medium"):
        raise ValueError(f'precision: expected "highest", "high" or "medium", got {precision!r}')


@contextmanager
def undone_by_errors(parameters: list[Tensor]) -> Iterator[None]:
    """Puts the parameters back if an error ends the training, unless that has done so itself."""
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    except Diverged:
        raise
    except Exception:
        restore(parameters, before)
        raise


def _check_rows(trace: Any, rows: int) -> None:
    frame = data_plate(trace)
    if frame is not None and rows not in (frame.size, frame.full_size):
        raise ValueError(
            f"data: expected {frame.size} rows, the size of the plate {frame.name!r} of the model; "
            f"got {rows}"
        )


def check_support_of(model: Any, batches: Batches) -> None:
    with torch.no_grad(), random_state(None, keep=True), eval_mode(model):
        for batch in batches:
            trace = poutine.trace(model).get_trace(*batch)
            for name in trace.observation_nodes:
                node = trace.nodes[name]
                ok = node["fn"].support.check(node["value"])
                if not ok.all():
                    raise ValueError(
                        f"data: expected values in the support of {name!r}, {node['fn'].support}; "
                        f"{int((~ok).sum())} of {ok.numel()} data are outside"
                    )


def mean_loss(model: Any, guide: Any, batches: Batches) -> float:
    """The negative ELBO of held-out data, with the same random numbers every time."""
    batches.to(next(iter(_devices(model, guide)), batches.device))
    total = count = 0.0
    with torch.no_grad(), random_state(0), eval_mode(model, guide), unchecked():
        for batch in batches:
            rows = len(batch[0])
            total += negative_elbo(model, guide, *batch, size=batches.size).item() * rows
            count += rows
    return total / count


def _devices(*programs: Any) -> Iterator[torch.device]:
    for program in programs:
        if isinstance(program, nn.Module):
            yield from (p.device for p in program.parameters())


def restore(parameters: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
