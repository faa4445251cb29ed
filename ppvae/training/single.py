"""The losses and gradients of one model and its guide: by the programs, or by their graph."""

import math
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from ppvae._checks import TROUBLE
from ppvae._reach import watched
from ppvae._scopes import random_state, stacklevel, unchecked
from ppvae.staging.gradients import Gradients
from ppvae.staging.staged import NotStageable, Staged, record
from ppvae.training.execution import LEAVE_TWO, Execution
from ppvae.training.share import Share
from ppvae.training.steps import Engine
from ppvae.training.strides import Strides
from ppvae.training.task import Task

#: What is said of a minibatch that the graph does not cover, if it is of one datum, and if not.
_UNCOVERED = {
    True: ("minibatches of one datum run eagerly", LEAVE_TWO),
    False: ("minibatches that are unlike the first one run eagerly", "make them alike"),
}
_SHARED = "processes exchange gradients in each step"  # and so a step is all that can be compiled


class Single(Engine):
    """The engine for one model and its guide; made by `single`.

    Attributes:
        task: what is trained.
        staged: its graph; None runs the programs.
        gradients: the compiled graph of loss and gradients; None leaves these to autograd.
        share: what this process computes of each minibatch; None is all, in the only process.
    """

    def __init__(
        self,
        task: Task,
        execution: Execution,
        share: Share | None = None,
        staged: Staged | None = None,
    ) -> None:
        self.task, self.share, self.staged, self.execution = task, share, staged, execution
        self.gradients: Gradients | None = None
        # then numbers are drawn that depend on others, which are those of all processes
        self._draws = share is not None and staged is not None and staged.draws_late
        if self._draws and execution.how in ("compiled", "looped"):
            execution.instead("staged", "processes share draws that depend on numbers", None)
        self._strides: Strides | None = None
        self.tasks, self.objectives, self.modules = [task], [task.program.objective], [task.program]
        self.parameters = task.parameters
        self._owned, self._warned = {*map(id, self.parameters)}, False

    def values(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the program."""
        program = self.task.program
        return dict(program.named_parameters()) | dict(program.named_buffers())

    def strides(self, optimizer: Any, clip: float | None) -> Strides | None:
        """What takes many steps at a call, where the loss is to run so and can."""
        if self.staged is None or self.execution.how != "looped":
            return None
        try:
            if self.share is not None:
                raise NotStageable(_SHARED, None)
            self._strides = Strides(self.task, self.staged, optimizer, clip)
        except NotStageable as error:
            self.execution.instead("compiled", error)
            self.compile()
        return self._strides

    def compile(self) -> None:
        """Compiles loss and gradients, which leaves the steps to PyTorch's optimizer."""
        task, staged = self.task, self.staged
        if staged is None:
            return
        self.gradients = Gradients(staged, compiled=True)
        example = task.example if self.share is None else self.share.cut(task.example)
        if staged.covers(*example):  # made for the first minibatch, wherever training goes on
            with random_state(None, keep=True):
                data = staged.data(example, task.program.settings(0))
            self.gradients.make(staged.state(), data)
        self.execution.of(self.gradients)

    def minibatches(self) -> Iterable[Any]:
        """Goes once through the data."""
        return self.task.batches if self._strides is None else self._strides.minibatches()

    def data(self, minibatch: Any, step: int) -> tuple[tuple[Any, ...], int]:
        """The minibatch, and its number of data."""
        batch = minibatch if self._strides is None else self._strides.batch(minibatch)
        return batch, self.task.batches.rows(batch)

    def losses(self, data: tuple[Any, ...], step: int) -> Tensor:
        """The loss in nats per datum; leaves the gradients in the parameters."""
        if self.share is not None:
            self.share.look(data, step)
        loss = self._loss(data, step).detach()
        if self.share is not None:
            processes, weight = self.share.processes, self.share.weight(data)
            loss = processes.mean(loss, self.parameters, weight)
        if step == 0 and math.isfinite(loss):
            self.task.check(data)
        return loss

    def _loss(self, data: tuple[Any, ...], step: int) -> Tensor:
        """The loss of this process's share of a minibatch; leaves its gradients."""
        staged, gradients, inputs = self.staged, self.gradients, None
        with self._part(data) as batch:
            if staged and not self._draws and staged.covers(*batch):
                inputs = staged.data(batch, staged.program.settings(step))
            else:
                if staged and not self._draws:
                    self.execution.but(*_UNCOVERED[self.task.batches.rows(batch) < 2])
                with unchecked(), nullcontext() if staged else watched(self._look_at):
                    program = self.task.program
                    loss = staged(*batch, step=step) if staged else program.loss(batch, step)
        if staged and inputs is not None:  # nothing is drawn any more
            state = staged.state()
            if gradients and self.execution.how == "compiled":
                loss, slopes = gradients(state, inputs)
                for at, slope in zip(gradients.trained, slopes, strict=True):
                    state[at].grad = slope
                self.execution.of(gradients)  # the compiler runs, or fails, in the first call
                return loss
            loss = staged.rest(*state, *inputs)[0]
        if loss.requires_grad:
            loss.backward()
        return loss

    def _look_at(self, module: nn.Module) -> None:
        """Warns, once, of a module that the first run of the programs did not call."""
        own = (value for value in module._parameters.values() if value is not None)
        late = any(
            parameter.requires_grad and id(parameter) not in self._owned for parameter in own
        )
        if late and not self._warned:
            self._warned = True
            so = "a module is called that was not in the first run, and is not trained"
            todo = "call it in every run, or let the model have it as its own"
            words = f"fit: {so}: {module!r:.80}; {todo} ({TROUBLE})"
            warnings.warn(words, stacklevel=stacklevel())

    def _part(self, data: tuple[Any, ...]) -> AbstractContextManager[tuple[Any, ...]]:
        """This process's share of a minibatch; inside, its draws are those of the whole."""
        return nullcontext(data) if self.share is None else self.share.of(data)

    @property
    def interrupted(self) -> bool:
        """Whether the training is to end behind this step: as all processes say."""
        return super().interrupted if self.share is None else self.share.processes.interrupted

    def in_any(self, said: object) -> bool:
        """Whether this is said here, or in another process that trains the same."""
        if self.share is None:
            return bool(said)
        own = 1 + len(self.task.batches.generators)  # those of GPUs are each process's own
        return self.share.processes.in_any(said, self.random_numbers()[:own])

    def replicate(self, number: int, data: tuple[Any, ...]) -> tuple[Task, tuple[Any, ...]]:
        """The task, and the minibatch."""
        return self.task, data


def single(task: Task, execution: Execution, share: Share | None = None) -> Single:
    """Makes an engine for a task; where there is no graph it runs eagerly, and says why.

    Args:
        task: what is trained.
        execution: how it is to run.
        share: what this process computes of each minibatch, where there are others.
    """
    if execution.how == "eager":
        return Single(task, execution, share)
    try:
        staged = record(task.program, task.example)
    except NotStageable as error:
        execution.instead("eager", error)
        return Single(task, execution, share)
    engine = Single(task, execution, share, staged)
    if engine.execution.how == "compiled":
        engine.compile()
    return engine
