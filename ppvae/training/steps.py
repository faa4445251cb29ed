"""Steps of an optimizer, and what computes the losses that it is to lower."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppvae._process import interrupted
from ppvae._scopes import random_numbers, set_random_numbers
from ppvae.data.batches import Batches
from ppvae.objectives.base import at_step
from ppvae.training.blame import blame
from ppvae.training.execution import Execution
from ppvae.training.options import Named, Options, clip_gradients
from ppvae.training.share import Share
from ppvae.training.snapshots import Diverged, Snapshot
from ppvae.training.strides import Strides
from ppvae.training.task import Task

_EVERY = 10  # steps between two snapshots: to take one in every step would cost a tenth of it
_CHANGED = "change no more than its rate, as by a `scheduler`"


class Engine(ABC):
    """What computes losses and gradients: for one model and its guide, or for several at once.

    Attributes:
        tasks: what is trained.
        objectives: the loss of each replicate.
        parameters: what the optimizer moves; the first dimension is that of replicates, if there
            are several.
        modules: what holds the buffers that a call moves.
        execution: how it runs, and why not faster.
    """

    tasks: Sequence[Task]
    objectives: list[Any]
    parameters: list[Tensor]
    modules: list[nn.Module]
    execution: Execution

    @abstractmethod
    def values(self) -> dict[str, Tensor]:
        """Everything that a loss depends on beside the data, by name: also what is not trained."""

    @property
    def named(self) -> Named:
        """The parameters with their names."""
        names = {id(value): name for name, value in self.values().items()}
        return [(names[id(parameter)], parameter) for parameter in self.parameters]

    @abstractmethod
    def minibatches(self) -> Iterable[Any]:
        """Goes once through the data."""

    @abstractmethod
    def data(self, minibatch: Any, step: int) -> tuple[Any, int]:
        """What the losses of a step are computed from, and the number of data in it."""

    @abstractmethod
    def losses(self, data: Any, step: int) -> Tensor:
        """The losses in nats per datum; leaves the gradients in the parameters."""

    @abstractmethod
    def replicate(self, number: int, data: Any) -> tuple[Task, tuple[Any, ...]]:
        """The task of one of `objectives`, with its parameters of now, and its minibatch."""

    def strides(self, optimizer: Any, clip: float | None) -> Strides | None:
        """What takes many steps of an optimizer at a call; None where they go one by one."""
        return None

    @property
    def interrupted(self) -> bool:
        """Whether the training is to end behind this step."""
        return interrupted()

    def in_any(self, said: object) -> bool:
        """Whether this is said here, or in another process that trains the same."""
        return bool(said)

    def write_back(self) -> None:
        """Gives models and guides the values of the parameters, where those are copies."""
        return

    def first_losses(self) -> list[float]:
        """The loss of each replicate on the first minibatch, by the same random numbers always."""
        self.write_back()
        return [task.first_loss() for task in self.tasks]

    def held_out_losses(
        self, held_out: Batches, step: int, share: Share | None = None
    ) -> list[float]:
        """The objective of each replicate on other data; see `Task.held_out_loss`."""
        self.write_back()
        return [task.held_out_loss(held_out, step, share) for task in self.tasks]

    def random_numbers(self) -> list[Tensor]:
        """Where all the random numbers stand that a training draws."""
        generators = self.tasks[0].batches.generators
        return [*(each.get_state() for each in generators), *random_numbers()]

    def set_random_numbers(self, states: Sequence[Tensor]) -> None:
        """Moves them to where they stood."""
        generators = self.tasks[0].batches.generators
        for generator, state in zip(generators, states, strict=False):
            generator.set_state(state)
        set_random_numbers(states[len(generators) :])


class Steps:
    """Steps of an optimizer on the losses of an engine.

    Attributes:
        number: how many were taken.
        optimizer: None if there is nothing to move.
        scheduler: of its learning rate, or None.
        snapshot: parameters and buffers of before the training, of one of the last ten steps, or of
            the start of the last stride.
        strides: what takes many steps at a call; None takes them one by one.
        ended: replicates that are moved with the others, and of which nothing is asked any more.
    """

    def __init__(self, engine: Engine, options: Options) -> None:
        self.engine, self.options, self.number = engine, options, 0
        self.ended: set[int] = set()
        self.optimizer: Any = None
        self.scheduler: Any = None
        if engine.parameters:
            self.optimizer, self.scheduler = options.descent(engine.named)
        self._last: Any = None  # the data of the last step
        self.snapshot = Snapshot(engine.parameters, engine.modules)
        self.strides: Strides | None = None
        if self.optimizer is not None:
            self.strides = engine.strides(self.optimizer, options.clip)
        elif engine.execution.how in ("compiled", "looped"):
            engine.execution.instead("staged", "there is nothing to train", None)

    def through(self, minibatches: Iterable[Any]) -> Iterator[tuple[list[list[float]], list[int]]]:
        """Takes a step for each minibatch, one by one or in strides.

        Yields:
            For each of one or several steps the losses before it, and the number of data.

        Raises:
            Diverged: as `take` does.
        """
        strides = self.strides
        if strides and not strides.is_as_made:
            self.engine.execution.but("Adam was changed on the way, or what it moves", _CHANGED)
        losses: list[list[float]] = []
        rows: list[int] = []
        for minibatch in minibatches:
            fits = strides is not None and strides.fits(minibatch)
            if strides and strides.begun and not (fits and strides.continues(minibatch)):
                losses += self._stride(strides)
            if strides and fits:
                strides.add(minibatch)
                rows.append(strides.rows(minibatch))
                if strides.is_full:
                    losses += self._stride(strides)
            else:
                values, count = self.take(minibatch)
                losses.append(values)
                rows.append(count)
            if len(losses) == len(rows):
                yield losses, rows
                losses, rows = [], []
        if strides and strides.begun:
            yield [*losses, *self._stride(strides)], rows

    def _stride(self, strides: Strides) -> list[list[float]]:
        """Takes the steps of a stride; returns the loss before each."""
        first = self.number
        self.snapshot.take(first)
        try:
            values = strides.go(first)
        except RuntimeError:  # compiled code tells of a label that is out of range in its own words
            for minibatch in strides.walked[-1].minibatches:
                strides.check(minibatch)
            raise
        for at, losses in enumerate(values):
            bad = self._first_bad(losses)
            if bad is not None:
                self._step_back(strides, first + at)
                self.number = first + at
                self._last = self.engine.data(strides.walked[-1].minibatches[at], self.number)[0]
                self._diverge("the loss", bad, f"is {losses[bad]}")
        if first == 0:
            strides.check(strides.walked[-1].minibatches[0])
        strides.keep()
        self.number += len(values)
        return values

    def _step_back(self, strides: Strides, number: int) -> None:
        """Takes a snapshot of before the last step whose loss was finite; stays where it is."""
        self.snapshot.take(strides.go_to(number - 1))
        strides.go_to(number)

    def take(self, minibatch: Any) -> tuple[list[float], int]:
        """Takes a step; returns the losses before it, and the number of data in the minibatch.

        Raises:
            Diverged: a loss is not finite; parameters and buffers are those of the snapshot.
        """
        engine = self.engine
        data, rows = engine.data(minibatch, self.number)
        self._last = data
        if self.strides:
            self.strides.walked.clear()  # from which nothing leads here any more
        values: list[list[float]] = []

        def evaluate() -> Tensor:
            for parameter in engine.parameters:
                parameter.grad = None
            losses = engine.losses(data, self.number)
            values.append(losses.reshape(-1).tolist())
            bad = self._first_bad(values[-1])
            if bad is not None:
                self._diverge("the loss", bad, f"is {values[-1][bad]}")
            if self.number % _EVERY == 0:
                self.snapshot.take(self.number)
            if self.options.clip is not None:
                clip_gradients(engine.parameters, self.options.clip, len(engine.objectives))
            return losses

        if self.optimizer is not None and len(engine.objectives) == 1:
            self.optimizer.step(evaluate)
        else:  # replicates have no loss in common, by which a step of one could be judged
            evaluate()
            if self.optimizer is not None:
                self.optimizer.step()
        self.number += 1
        return values[0], rows

    def _first_bad(self, losses: list[float]) -> int | None:
        """The first replicate whose loss is not finite, of those that go on."""
        every = (k for k, loss in enumerate(losses) if not math.isfinite(loss))
        return next((number for number in every if number not in self.ended), None)

    def goals(self, step: int) -> list[Any]:
        """The objectives of a step, without what moves in them."""
        return [at_step(objective, step) for objective in self.engine.objectives]

    def slow_down(self, factor: float) -> None:
        """Multiplies the learning rate."""
        if factor != 1.0:
            for group in self.optimizer.param_groups:
                group["lr"] *= factor

    def check(self) -> None:
        """Raises Diverged, if the last step led out of the finite numbers."""
        for parameter in self.engine.parameters:
            rows = parameter.reshape(len(self.engine.objectives), -1)
            finite = torch.isfinite(rows).all(1).tolist()
            finite = [each or number in self.ended for number, each in enumerate(finite)]
            if not all(finite):
                if self.strides and self.strides.walked:
                    last = self.strides.walked[-1].minibatches[-1]
                    self._last = self.engine.data(last, self.number)[0]
                    self._step_back(self.strides, self.number)
                replicate = finite.index(False)
                self._diverge("a parameter", replicate, "is not finite")

    def put_back(self) -> None:
        """Goes back to the snapshot."""
        self.snapshot.put_back()
        self.engine.write_back()

    def _diverge(self, what: str, replicate: int, how: str) -> None:
        task, batch = self.engine.replicate(replicate, self._last)
        why = blame(task, batch, self.number, self.put_back)
        which = f" of replicate {replicate}" if len(self.engine.objectives) > 1 else ""
        raise Diverged(
            f"{what}{which} {how} at step {self.number}: {why}; parameters and buffers are back at "
            f"those of step {self.snapshot.step}"
        )
