"""The parameters of many replicates in one stack, and a step that moves all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ppvae._batches import Batches
from ppvae._compiled import Gradients
from ppvae._context import kept_buffers, random_state, unchecked
from ppvae._tracing import Program, setting
from ppvae._training import Diverged, restore
from ppvae.objectives import ELBO
from ppvae.staging import NotStageable, Staged

__all__ = ["Stacked"]


class Stacked:
    """Replicates whose parameters, buffers and data have a first dimension in common.

    The pairs keep their values until `write_back`.

    Args:
        pairs: models and guides, alike but for their values.
        objectives: the loss of each.
        batches: the data.
        seeds: the seed of each.
        compiled: whether to compile the step.

    Raises:
        NotStageable: the loss is no graph, or not the same for all.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Any, Any]],
        objectives: Sequence[Any],
        batches: Batches,
        seeds: Sequence[int],
        *,
        compiled: bool,
    ) -> None:
        self.batches, self.objectives = batches, objectives
        with random_state(None, keep=True):
            example = next(iter(batches))
        rows = len(example[0])
        if rows < 2 or batches.size % rows == 1:
            raise NotStageable("data: a batch of one datum is a case of its own")
        self.programs = [
            Program(*pair, goal, example, size=batches.size)
            for pair, goal in zip(pairs, objectives, strict=True)
        ]
        self.programs[0].varies = _differ(objectives)
        self.staged = Staged(self.programs[0], example)
        states = [self.staged.state(program) for program in self.programs]
        self._check(example, states)
        self.trained = self.staged.trained()
        self.state = [torch.stack(values).detach() for values in zip(*states, strict=True)]
        for at in self.trained:
            self.state[at] = nn.Parameter(self.state[at])
        self.parameters = [self.state[at] for at in self.trained]
        self.good = [parameter.detach().clone() for parameter in self.parameters]
        self.streams = [_Stream(seed) for seed in seeds]
        self.gradients = Gradients(self.staged, compiled=compiled, replicated=True)
        self.optimizer: Any = None
        self.number = 0

    def epoch(self) -> Iterator[tuple[list[float], int]]:
        """Takes the steps of one pass through the data; yields losses and number of data."""
        passes = [iter(self.batches) for _ in self.streams]
        for _ in range(self.batches.count):
            drawn = []
            for stream, batches, goal in zip(self.streams, passes, self.objectives, strict=True):
                with stream:
                    knob = setting(goal, self.number)
                    drawn.append(self.staged.data(next(batches), knob))
            data = [_stack(values) for values in zip(*drawn, strict=True)]
            yield self.step(data), data[0].shape[1]

    def step(self, data: list[Tensor]) -> list[float]:
        """Takes a step and returns the losses before it."""
        for parameter in self.parameters:
            parameter.grad = None
        losses, slopes = self.gradients(self.state, data)
        values = losses.tolist()
        for replicate, value in enumerate(values):
            if not math.isfinite(value):
                self._diverged(f"the loss of replicate {replicate} is {value}")
        with torch.no_grad():
            torch._foreach_copy_(self.good, self.parameters)
        for parameter, slope in zip(self.parameters, slopes, strict=True):
            parameter.grad = slope
        self.optimizer.step()
        self.number += 1
        return values

    def check(self) -> None:
        """Raises if the last step led out of the finite numbers."""
        if not all(torch.isfinite(p).all() for p in self.parameters):
            self._diverged("a parameter is not finite")

    def write_back(self) -> None:
        """Gives each pair its values."""
        with torch.no_grad():
            for replicate, program in enumerate(self.programs):
                for value, new in zip(self.staged.state(program), self.state, strict=True):
                    value.copy_(new[replicate])

    def _diverged(self, what: str) -> NoReturn:
        restore(self.parameters, self.good)
        self.write_back()
        raise Diverged(
            f"{what} at step {self.number}; the parameters are those of the last finite losses"
        )

    def _check(self, example: tuple[Tensor, ...], states: list[list[Tensor]]) -> None:
        """Raises unless the one graph gives the loss of every pair, with the caller's checks."""
        for number, (program, state) in enumerate(zip(self.programs, states, strict=True)):
            knob = setting(self.objectives[number], 0)
            with torch.no_grad(), kept_buffers(program):
                with random_state(0):
                    told = program(*example, knob)
                with random_state(0), unchecked():
                    found = self.staged.rest(*state, *self.staged.data(example, knob))
            if not torch.allclose(told, found, rtol=1e-4, atol=1e-6, equal_nan=True):
                raise NotStageable(
                    f"pairs: expected models and guides of the same make; the graph of the first "
                    f"gives pair {number} a loss of {found:.6g}, its own program {told:.6g}"
                )


class _Stream:
    """The random numbers of one replicate: inside, those that `fit` would draw with its seed."""

    def __init__(self, seed: int) -> None:
        with random_state(seed):
            self.state = self._now()

    def __enter__(self) -> None:
        self.outside = self._now()
        self._set(self.state)

    def __exit__(self, *_: object) -> None:
        self.state = self._now()
        self._set(self.outside)

    def _now(self) -> tuple[Tensor, list[Tensor]]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return torch.get_rng_state(), cuda

    def _set(self, state: tuple[Tensor, list[Tensor]]) -> None:
        torch.set_rng_state(state[0])
        if state[1]:
            torch.cuda.set_rng_state_all(state[1])


def _stack(values: tuple[Tensor, ...]) -> Tensor:
    """Stacks values; one that is the same for all takes no more memory."""
    first = values[0]
    if all(value is first for value in values):
        return first.expand(len(values), *first.shape)
    return torch.stack(values)


def _differ(objectives: Sequence[Any]) -> bool:
    """Whether objectives differ, in the weights of ELBOs.

    Raises:
        NotStageable: they differ in something else.
    """
    first = objectives[0]
    if all(goal is first or goal == first for goal in objectives):
        return False
    if all(isinstance(goal, ELBO) for goal in objectives):
        plain = [replace(goal, beta=1.0) for goal in objectives]
        if all(goal == plain[0] for goal in plain):
            return True
    raise NotStageable("objective: they differ in more than the beta of an ELBO")
