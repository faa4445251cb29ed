"""The parameters of many replicates in one stack, and a step that moves all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ppvae._scopes import kept_buffers, random_state, unchecked
from ppvae.data.batches import Batches
from ppvae.objectives.elbo import ELBO
from ppvae.staging.gradients import Gradients
from ppvae.staging.program import Program, setting
from ppvae.staging.staged import NotStageable, Staged, one_line
from ppvae.training.snapshots import Diverged, Kept


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
        ValueError: not the same parameters are frozen in all.
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
        example = batches.example()
        rows = len(example[0])
        whole = batches.loader is not None and batches.loader.drop_last
        if rows < 2 or (batches.size % rows == 1 and not whole):
            raise NotStageable("data: a batch of one datum is a case of its own")
        self.programs = [
            Program(*pair, goal, example, size=batches.size)
            for pair, goal in zip(pairs, objectives, strict=True)
        ]
        self.programs[0].varies = _differ(objectives)
        self.staged = Staged(self.programs[0], example)
        states = [self.staged.state(program) for program in self.programs]
        for number, state in enumerate(states):
            if any(
                a.requires_grad != b.requires_grad for a, b in zip(states[0], state, strict=True)
            ):
                raise ValueError(
                    f"pairs: expected models and guides of the same make; other parameters are "
                    f"frozen in pair {number} than in pair 0"
                )
        self._check(example, states)
        self.trained = self.staged.trained()
        if not self.trained:
            raise NotStageable("pairs: the loss depends on no parameter")
        self.state = [torch.stack(values).detach() for values in zip(*states, strict=True)]
        for at in self.trained:
            self.state[at] = nn.Parameter(self.state[at])
        self.parameters = [self.state[at] for at in self.trained]
        self.kept = Kept(self.parameters)
        self.streams = [_Stream(seed) for seed in seeds]
        self.gradients = Gradients(self.staged, compiled=compiled, replicated=True)
        self.optimizer: Any = None
        self.number = 0
        self._try(example)

    def epoch(self) -> Iterator[tuple[list[float], int]]:
        """Takes the steps of one pass through the data; yields losses and number of data."""
        passes = [iter(self.batches) for _ in self.streams]
        for _ in range(self.batches.count):
            yield self.step(passes)

    def step(self, passes: Sequence[Iterator[tuple[Tensor, ...]]]) -> tuple[list[float], int]:
        """Takes a step on the next minibatch of each replicate.

        Returns:
            The losses before it, and the number of data in a minibatch.
        """
        drawn = []
        for stream, batches, goal in zip(self.streams, passes, self.objectives, strict=True):
            with stream:
                drawn.append(self.staged.data(next(batches), setting(goal, self.number)))
        data = [_stack(values) for values in zip(*drawn, strict=True)]
        for parameter in self.parameters:
            parameter.grad = None
        losses, slopes = self.gradients(self.state, data)
        values = losses.tolist()
        for replicate, value in enumerate(values):
            if not math.isfinite(value):
                self._diverged(f"the loss of replicate {replicate} is {value}")
        self.kept.keep(self.number)
        for parameter, slope in zip(self.parameters, slopes, strict=True):
            parameter.grad = slope
        self.optimizer.step()
        self.number += 1
        return values, data[0].shape[1]

    def check(self) -> None:
        """Raises if the last step led out of the finite numbers."""
        for replicate in range(len(self.programs)):
            if not all(torch.isfinite(p[replicate]).all() for p in self.parameters):
                self._diverged(f"a parameter of replicate {replicate} is not finite")

    def write_back(self) -> None:
        """Gives each pair its values."""
        with torch.no_grad():
            for replicate, program in enumerate(self.programs):
                for value, new in zip(self.staged.state(program), self.state, strict=True):
                    value.copy_(new[replicate])

    def _try(self, example: tuple[Tensor, ...]) -> None:
        """Makes the graph of a step, without taking it; raises if there is none."""
        with random_state(None, keep=True):
            drawn = [self.staged.data(example, setting(goal, 0)) for goal in self.objectives]
            stack = _stack if self.batches.whole else torch.stack
            data = [stack(values) for values in zip(*drawn, strict=True)]
            state = [v if v.requires_grad else v.clone() for v in self.state]  # buffers may move
            try:
                self.gradients(state, data)
            except Exception as error:  # whatever `torch.vmap` may not know
                raise NotStageable(f"pairs: cannot be stacked: {one_line(error)}") from error

    def _diverged(self, what: str) -> NoReturn:
        said = self.kept.back()
        self.write_back()
        raise Diverged(f"{what} at step {self.number}; {said}")

    def _check(self, example: tuple[Tensor, ...], states: list[list[Tensor]]) -> None:
        """Raises unless the one graph gives the loss of every pair, with the caller's checks."""
        for number, (program, state) in enumerate(zip(self.programs, states, strict=True)):
            knob = setting(self.objectives[number], 0)
            with torch.no_grad(), kept_buffers(program):
                with random_state(0):
                    told = program(*example, knob)
                with random_state(0), unchecked():
                    (found,) = self.staged.rest(*state, *self.staged.data(example, knob))
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
