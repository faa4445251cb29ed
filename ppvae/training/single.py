"""The losses and gradients of one model and its guide: by the programs, or by their graph."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import TROUBLE, expect
from ppvae._scopes import kept_buffers, random_state, stacklevel, unchecked
from ppvae.staging.gradients import Gradients
from ppvae.staging.staged import NotStageable, Staged, record
from ppvae.training.steps import Engine
from ppvae.training.task import Task

# Steps after which it has paid to stage a loss, and to compile it: it takes 0.4 s and 5 s or so,
# and saves 0.9 and 0.7 ms of each step of a small network, the same of each step of a large one
# (`examples/benchmark.py` measures all four).
STAGE, COMPILE = 1_000, 10_000


def how_to_run(compile: Any, steps: int, rows: int) -> str:
    """How to run the loss: "eager", "staged" or "compiled"; see `compile` of `fit`.

    Args:
        compile: as `fit` takes it.
        steps: how many steps there will be.
        rows: number of data in a minibatch; a minibatch of one datum always runs eagerly.

    Raises:
        ValueError: `compile` is none of its values.
    """
    known = isinstance(compile, bool) or isinstance(compile, str) and compile == "auto"
    expect(known, "compile", '"auto", True or False', repr(compile))
    if compile is False or rows < 2:
        return "eager"
    if compile is True or steps >= COMPILE:
        return "compiled"
    return "staged" if steps >= STAGE else "eager"


class Single(Engine):
    """The engine for one model and its guide; made by `single`.

    Attributes:
        task: what is trained.
        staged: its graph; None runs the programs.
        gradients: the compiled graph of loss and gradients; None leaves these to autograd.
    """

    def __init__(
        self, task: Task, staged: Staged | None = None, gradients: Gradients | None = None
    ) -> None:
        self.task, self.staged, self.gradients = task, staged, gradients
        self.tasks, self.objectives, self.modules = [task], [task.program.objective], [task.program]
        self.parameters = task.parameters
        self.execution = gradients.execution if gradients else "staged" if staged else "eager"

    def values(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the program."""
        program = self.task.program
        return dict(program.named_parameters()) | dict(program.named_buffers())

    def minibatches(self) -> Iterable[tuple[Any, ...]]:
        """Goes once through the data."""
        return self.task.batches

    def data(self, minibatch: tuple[Any, ...], step: int) -> tuple[tuple[Any, ...], int]:
        """The minibatch, and its number of data."""
        return minibatch, self.task.batches.rows(minibatch)

    def losses(self, data: tuple[Any, ...], step: int) -> Tensor:
        """The loss in nats per datum; leaves the gradients in the parameters."""
        staged, gradients = self.staged, self.gradients
        if staged and gradients and self.execution == "compiled" and staged.covers(*data):
            state = staged.state()
            loss, slopes = gradients(state, staged.data(data, staged.program.settings(step)))
            for at, slope in zip(gradients.trained, slopes, strict=True):
                state[at].grad = slope
            self.execution = gradients.execution  # the compiler runs, or fails, in the first call
        else:
            with unchecked():
                loss = staged(*data, step=step) if staged else self.task.program.loss(data, step)
            if loss.requires_grad:
                loss.backward()
        loss = loss.detach()
        if step == 0 and math.isfinite(loss):
            program = self.task.program  # once with the checks of Pyro and PyTorch, if they are on
            with random_state(None, keep=True), torch.no_grad(), kept_buffers(program):
                program.loss(data, 0)
        return loss

    def replicate(self, number: int, data: tuple[Any, ...]) -> tuple[Task, tuple[Any, ...]]:
        """The task, and the minibatch."""
        return self.task, data


def single(task: Task, how: str) -> Single:
    """Makes an engine for a task; where there is no graph it runs eagerly, and a warning says why.

    Args:
        task: what is trained.
        how: "eager", "staged" or "compiled".
    """
    if how == "eager":
        return Single(task)
    try:
        staged = record(task.program, task.example)
    except NotStageable as error:
        warnings.warn(f"fit: runs eagerly; {error} ({TROUBLE})", stacklevel=stacklevel())
        return Single(task)
    if how == "staged":
        return Single(task, staged)
    gradients = Gradients(staged, compiled=True)
    if staged.covers(*task.example):  # made for the first minibatch, wherever training goes on
        with random_state(None, keep=True):
            data = staged.data(task.example, task.program.settings(0))
        gradients.make(staged.state(), data)
    return Single(task, staged, gradients)
