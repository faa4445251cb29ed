"""The parts of the training loop: steps, parameters, checks, and the way back."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae._checks import check_count, check_number
from ppvae._scopes import eval_mode, kept_buffers, random_state, unchecked
from ppvae.data.batches import Batches
from ppvae.objectives.elbo import negative_elbo
from ppvae.objectives.trace_terms import terms
from ppvae.programs.nodes import data_plate
from ppvae.programs.runs import trace_pair
from ppvae.staging.gradients import Gradients
from ppvae.staging.staged import NotStageable, Staged, stage
from ppvae.training.snapshots import Diverged, Kept


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
    """The default optimizer: Adam, all parameters in one kernel."""
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


def check_options(
    num_epochs: Any, learning_rate: Any, optimizer: Any, objective: Any, precision: Any
) -> None:
    """Raises, if an option of `fit` is not what it should be."""
    check_count("num_epochs", num_epochs)
    check_number("learning_rate", learning_rate, positive=True)
    if optimizer is not None and not callable(optimizer):
        raise TypeError(f"optimizer: expected a class or function, got {type(optimizer).__name__}")
    if objective is not None and (not callable(objective) or inspect.isclass(objective)):
        raise TypeError(f"objective: expected a function, such as ELBO(), got {objective!r}")
    if precision not in (None, "highest", "high", "medium"):
        raise ValueError(f'precision: expected "highest", "high" or "medium", got {precision!r}')


def _check_rows(trace: Any, rows: int) -> None:
    frame = data_plate(trace)
    if frame is not None and rows not in (frame.size, frame.full_size):
        raise ValueError(
            f"data: expected {frame.size} rows, the size of the plate {frame.name!r} of the model; "
            f"got {rows}"
        )


def check_support_of(model: Any, batches: Batches) -> None:
    """Raises a ValueError unless every datum lies in the support of its likelihood."""
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


# Steps after which it has paid to stage a loss, and to compile it: it takes 0.4 s and 5 s or so,
# and saves 0.9 and 0.7 ms of each step of a small network, the same of each step of a large one
# (`examples/benchmark.py` measures all four).
STAGE, COMPILE = 1_000, 10_000


def how_to_run(compile: Any, steps: int, rows: int) -> str:
    """How to run the loss: "eager", "staged" or "compiled"; see `compile` of `fit`.

    Raises:
        ValueError: `compile` is none of its values.
    """
    if not isinstance(compile, bool) and compile != "auto":
        raise ValueError(f'compile: expected "auto", True or False, got {compile!r}')
    if compile is False or rows < 2:
        return "eager"
    if compile is True or steps >= COMPILE:
        return "compiled"
    return "staged" if steps >= STAGE else "eager"


class Runner:
    """Computes the loss of a batch, and its gradients where that takes no autograd.

    What cannot be staged runs eagerly and what cannot be compiled runs staged, with one line that
    says why.

    Attributes:
        how: "eager", "staged" or "compiled".
        parameters: what is trained; of plain `pyro.param` statements with the same memory.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        objective: Any,
        batches: Batches,
        parameters: list[Tensor],
        how: str,
    ) -> None:
        self.model, self.guide, self.objective = model, guide, objective
        self.size, self.how, self.parameters = batches.size, how, parameters
        self._staged: Staged | None = None
        if how == "eager":
            return
        try:
            told = {"objective": objective, "size": batches.size}
            self._staged = stage(model, guide, *batches.example(), **told)
        except NotStageable as error:
            self.how = "eager"
            warnings.warn(f"fit: runs eagerly; {error}", stacklevel=3)
            return
        self.parameters = [p for p in self._staged.parameters() if p.requires_grad]
        if how == "compiled":
            self._gradients = Gradients(self._staged, compiled=True)

    def __call__(self, batch: tuple[Tensor, ...], step: int) -> tuple[Tensor, list[Any] | None]:
        """The loss, and pairs of a parameter and its gradient; None if `backward` gives them."""
        staged = self._staged
        if staged is None:
            return self.eager(batch, step), None
        if self.how == "staged" or not staged.covers(*batch):
            with unchecked():
                return staged(*batch, step=step), None
        state = staged.state()
        data = staged.data(batch, staged.program.setting(step))
        loss, slopes = self._gradients(state, data)
        self.how = self._gradients.execution
        return loss, list(zip([state[at] for at in self._gradients.trained], slopes, strict=True))

    def eager(self, batch: tuple[Tensor, ...], step: int, *, checked: bool = False) -> Tensor:
        """The loss by way of the program; with the caller's checks of arguments, if asked for."""
        told = {"size": self.size, "step": step}
        if checked:
            return self.objective(self.model, self.guide, *batch, **told)
        with unchecked():
            return self.objective(self.model, self.guide, *batch, **told)
