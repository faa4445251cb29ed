"""Runs of many draws for an evaluation: of the programs, or of their compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppvae._scopes import random_state, unchecked, without_warnings
from ppvae.programs.runs import draws_plate
from ppvae.staging.program import Program
from ppvae.staging.staged import NotStageable, Staged

# Runs, each of as much as fits in memory, that take longer than the compiler: it needs 4 to 8 s and
# saves 18 of the 37 ms of a run (784-400-20 on two cores).
_COMPILE = 400


Read = Callable[..., tuple[Tensor, ...]]


class ManyDraws:
    """What a function reads from runs of a model and its guide in a plate of draws.

    Args:
        model: a Pyro model.
        guide: its guide.
        read: a function `(args, draws) -> tensors` that runs both in a plate of draws.
        batches: number of minibatches that are to come.
    """

    def __init__(self, model: Any, guide: Any, read: Read, batches: int) -> None:
        self.model, self.guide, self.read, self.batches = model, guide, read, batches
        self._count = 0  # draws of the run that was compiled; 0: none was
        self._tried = False

    def plan(self, args: tuple[Any, ...], count: int, total: int) -> None:
        """Compiles runs of so many draws, if so many draws in all are work enough."""
        if self._tried or total // count * self.batches < _COMPILE:
            return
        self._tried = True

        def program(model: Any, guide: Any, *args: Any, **_: Any) -> tuple[Tensor, ...]:
            return self.read(args, draws_plate(model, *args, draws=count))

        try:
            self._staged = _Runs(Program(self.model, self.guide, program, args), args)
            options: Any = {"fallback_random": True}
            with unchecked(), random_state(None, keep=True), without_warnings():
                self._function = torch.compile(self._staged.rest, fullgraph=True, options=options)
                data = self._staged.data(args, self._staged.program.setting(0))
                for value in data:
                    if isinstance(value, Tensor) and value.dim():
                        torch._dynamo.maybe_mark_dynamic(value, _rows(value, args))
                self._function(*self._staged.state(), *data)
            self._count = count
        except Exception:  # not to be staged, or no compiler: it only takes longer
            self._count = 0

    def __call__(self, args: tuple[Any, ...], count: int, draws: Any) -> tuple[Tensor, ...]:
        """What is read from a run of so many draws, in the plate `draws`."""
        if count != self._count or not self._staged.covers(*args):
            return self.read(args, draws)
        knob = self._staged.program.setting(0)
        return self._function(*self._staged.state(), *self._staged.data(args, knob))


class _Runs(Staged):
    """The graph of what is read from a run."""

    def _check(self, args: tuple[Any, ...]) -> None:
        knob = self.program.setting(0)
        with random_state(0):
            told = self.program(*args, knob)
        with random_state(0):
            found = self.rest(*self.state(), *self.data(args, knob))
        for one, other in zip(told, found, strict=True):
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True):
                raise NotStageable("model, guide: the graph gives other numbers")


def _rows(value: Tensor, args: tuple[Any, ...]) -> int:
    """The dimension of a value that the data are along: the first of their length."""
    rows = next(len(arg) for arg in args if isinstance(arg, Tensor) and arg.dim())
    return value.shape.index(rows) if rows in value.shape else 0
