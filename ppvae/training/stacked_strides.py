"""Strides of replicates, which all take their steps by one call."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ppvae.staging.staged import Staged
from ppvae.staging.stride import SAME, Replicas
from ppvae.training.streams import Stream
from ppvae.training.strides import Strides
from ppvae.training.task import Task


class StackedStrides(Strides):
    """Strides of replicates, each with minibatches and noise from its own random numbers.

    A minibatch is here a matrix with the numbers of the data of each replicate in a row, or a list
    of the minibatches of all.

    Args:
        tasks: what is trained.
        staged: the loss of each.
        optimizer: see `Strides`.
        clip: see `Strides`.
        replicas: the losses of all.
        streams: the random numbers of each.
        passes: goes once through the data of all.

    Raises:
        NotStageable: see `Strides`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        staged: Staged,
        optimizer: Any,
        clip: float | None,
        *,
        replicas: Replicas,
        streams: Sequence[Stream],
        passes: Callable[[], Iterator[Any]],
    ) -> None:
        self.tasks, self.replicas, self.streams, self._passes = tasks, replicas, streams, passes
        self._programs = [task.program for task in tasks]
        before = [stream.states for stream in streams]
        super().__init__(tasks[0], staged, optimizer, clip)
        for stream, states in zip(streams, before, strict=True):  # an example was drawn
            stream.states = states

    def batch(self, minibatch: Any) -> tuple[Any, ...]:
        """The arguments of the first model and guide."""
        return super().batch(minibatch[0])

    def check(self, minibatch: Any) -> None:
        """Runs the programs of each on its minibatch with all checks."""
        for task, own in zip(self.tasks, minibatch, strict=True):
            task.check(super().batch(own))

    def rows(self, minibatch: Any) -> int:
        """The number of data in the minibatch of each."""
        return super().rows(minibatch[0])

    def _pass(self) -> Iterator[Any]:
        return self._passes()

    def _example(self) -> Any:
        first = super()._example()
        many = [first] * len(self.tasks)
        return torch.stack(many) if isinstance(first, Tensor) else many

    def _noise(self, minibatch: Any) -> list[Tensor]:
        return self._of_each(lambda: super(StackedStrides, self)._noise(minibatch), 0)

    def _joint(self, draw: Callable[[int], list[Tensor]], steps: int) -> list[Tensor]:
        return self._of_each(lambda: draw(steps), 1)

    def _of_each(self, draw: Callable[[], list[Tensor]], dim: int) -> list[Tensor]:
        """What each draws from its own random numbers, stacked."""
        drawn = []
        for stream in self.streams:
            with stream:
                drawn.append(draw())
        return [torch.stack(values, dim) for values in zip(*drawn, strict=True)]

    def _in_columns(self, minibatches: list[Any]) -> list[Tensor]:
        alone = zip(*minibatches, strict=True)
        each = [super(StackedStrides, self)._in_columns([*own]) for own in alone]
        pairs = zip(zip(*each, strict=True), self.kinds, strict=False)
        return [values[0] if kind == SAME else torch.stack(values, 1) for values, kind in pairs]

    def _settings_of(self, before: int, steps: int) -> list[Tensor]:
        numbers = range(before, before + steps)
        drawn = ([p.settings(number) for number in numbers] for p in self._programs)
        each = [[torch.stack(column) for column in zip(*own, strict=True)] for own in drawn]
        return [torch.stack(values, 1) for values in zip(*each, strict=True)]
