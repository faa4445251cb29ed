"""Strides: many steps of Adam that one compiled graph takes at a call."""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae._scopes import random_state
from ppvae.staging.staged import NotStageable, Staged
from ppvae.staging.stride import PICKED, SAME, STACKED, Moved, Stride, Taken, rates_of
from ppvae.training.task import Task

_MEANS = "exp_avg", "exp_avg_sq"  # as PyTorch calls them
_SECONDS, _MOST = 0.1, 64  # a stride takes no longer than that, and no more steps


class Walked(NamedTuple):
    """A stride: the steps of the training before it, those of Adam, and all that it is made of."""

    before: int
    done: int
    start: Moved
    taken: Taken
    minibatches: list[Any]


class Strides:
    """Takes the steps of a training in strides.

    A stride starts from the parameters and Adam's state as they are, and writes both back, so that
    between two strides all is as after single steps. It has as many steps as take a tenth of a
    second, at most 64; how many there are does not change their numbers.

    A minibatch is here the numbers of its data, where the data are tensors, of which the graph
    picks them.

    Attributes:
        walked: the last two strides.

    Args:
        task: what is trained.
        staged: its loss.
        optimizer: Adam, without weight decay and other options.
        clip: the largest norm of a gradient, or None.

    Raises:
        NotStageable: steps can only be taken one by one.
    """

    def __init__(self, task: Task, staged: Staged, optimizer: Any, clip: float | None) -> None:
        self.task, self.staged, self.optimizer = task, staged, optimizer
        self.group = _group_of(optimizer)
        self._minibatches: list[Any] = []
        self._drawn: list[list[Tensor]] = []
        self.walked: deque[Walked] = deque(maxlen=2)
        self._most = 1  # of the steps in a stride, until it is known how long they take
        with random_state(None, keep=True):
            first = next(self.minibatches())
            for _ in range(2):
                self.add(first, 0)
            self.kinds = self._kinds()
            example, self._minibatches, self._drawn = self._taken(), [], []
        self.stride = Stride(
            staged,
            self.kinds,
            betas=self.group["betas"],
            eps=self.group["eps"],
            clip=clip,
            example=example,
        )

    def minibatches(self) -> Iterator[Any]:
        """Goes once through the data."""
        batches = self.task.batches
        return batches.numbers() if batches.numbered else iter(batches)

    def batch(self, minibatch: Any) -> tuple[Any, ...]:
        """The arguments of model and guide."""
        return self.task.batches.picked(minibatch) if isinstance(minibatch, Tensor) else minibatch

    def check(self, minibatch: Any) -> None:
        """Runs the programs on a minibatch with all checks."""
        self.task.check(self.batch(minibatch))

    def rows(self, minibatch: Any) -> int:
        """The number of data in a minibatch."""
        is_numbers = isinstance(minibatch, Tensor)
        return len(minibatch) if is_numbers else self.task.batches.rows(minibatch)

    def fits(self, minibatch: Any) -> bool:
        """Whether the graph covers a minibatch."""
        return self.staged.covers(*self._sized(minibatch))

    def continues(self, minibatch: Any) -> bool:
        """Whether a minibatch can be taken in the stride that was begun."""
        if not self._minibatches:
            return True
        shapes = [
            [value.shape for value in self._sized(each) if isinstance(value, Tensor)]
            for each in (self._minibatches[0], minibatch)
        ]
        return shapes[0] == shapes[1]

    def add(self, minibatch: Any, step: int) -> None:
        """Adds a step to a stride; draws its noise."""
        settings = self.task.program.settings(step)
        given = [v for v in self._sized(minibatch) if isinstance(v, Tensor)]
        self._minibatches.append(minibatch)
        self._drawn.append([*settings, *self.staged.noise(*given, *settings)])

    @property
    def is_full(self) -> bool:
        """Whether the stride that was begun has as many steps as it is to have."""
        return len(self._minibatches) >= self._most

    @property
    def begun(self) -> int:
        """How many steps the stride has that was begun."""
        return len(self._minibatches)

    def go(self, before: int) -> list[float]:
        """Computes the steps that were added, and moves nothing; returns the losses before each.

        Args:
            before: the number of steps so far.
        """
        start = time.perf_counter()
        steps, minibatches = self.begun, self._minibatches
        taken, moved = self._taken(), self._now()
        self._minibatches, self._drawn = [], []
        self.walked.append(Walked(before, self._done, moved, taken, minibatches))
        losses, self._after = self.stride(moved, taken, steps)
        values = losses.tolist()
        pace = (time.perf_counter() - start) / steps
        self._most = max(1, min(_MOST, 2 * self._most, int(_SECONDS / pace)))
        return values

    def keep(self) -> None:
        """Moves everything to where the last stride has led."""
        walked = self.walked[-1]
        self._put(self._after, walked.done + len(walked.minibatches))

    def go_to(self, number: int) -> int:
        """Goes to where a training was after that number of steps, as far as is known.

        Returns:
            The number of steps: that, or of the first step of the last two strides.
        """
        known = [each for each in self.walked if each.before <= number]
        walked = known[-1] if known else self.walked[0]
        steps = max(number - walked.before, 0)
        moved = self.stride(walked.start, walked.taken, steps)[1] if steps else walked.start
        self._put(moved, walked.done + steps)
        return walked.before + steps

    def _sized(self, minibatch: Any) -> tuple[Any, ...]:
        """Arguments of the sizes of a minibatch, for what depends on nothing else."""
        if isinstance(minibatch, Tensor):
            return self.task.batches.picked(slice(len(minibatch)))
        return minibatch

    def _kinds(self) -> list[str]:
        """How each of the data of a step is to be had; see `Stride`."""
        batches, example = self.task.batches, self.task.example
        kinds = []
        for at, value in enumerate(example):
            if isinstance(value, Tensor):
                further = at - (len(example) - len(batches.extra))
                same = (
                    batches.whole
                    or not batches.given
                    or (further >= 0 and not batches.cut[further])
                )
                kinds.append(SAME if same else PICKED if batches.numbered else STACKED)
        return [*kinds, *[STACKED] * len(self._drawn[0])]

    def _taken(self) -> Taken:
        """What the steps that were added are computed from."""
        minibatches, batches, group = self._minibatches, self.task.batches, self.group
        if batches.numbered:
            rows, held = torch.stack(minibatches), [[*batches.tensors, *batches.extra]]
        else:
            sizes = len(minibatches), self.rows(minibatches[0])  # what the graph takes for the same
            rows, held = torch.zeros(sizes, dtype=torch.int64), minibatches
        steps = [
            [*(v for v in held[at % len(held)] if isinstance(v, Tensor)), *drawn]
            for at, drawn in enumerate(self._drawn)
        ]
        columns = zip(*steps, strict=True)
        data = [
            torch.stack(column) if kind == STACKED else column[0].contiguous()
            for column, kind in zip(columns, self.kinds, strict=True)
        ]
        rates = rates_of(group["betas"], float(group["lr"]), self._done, len(minibatches))
        return Taken(rates.to(group["params"][0].dtype), rows, data)

    @property
    def _done(self) -> int:
        """How many steps Adam has taken."""
        states = [self.optimizer.state.get(each) for each in self.group["params"]]
        return max((int(state["step"]) for state in states if state), default=0)

    def _now(self) -> Moved:
        """What is moved, as it is."""
        means = []
        for name in _MEANS:
            states = [self.optimizer.state.get(each) for each in self.stride.parameters()]
            means.append([state[name] for state in states] if all(states) else None)
        return self.stride.moved(*means)

    def _put(self, moved: Moved, done: int) -> None:
        """Gives parameters, buffers and Adam other values."""
        stride, parameters = self.stride, self.stride.parameters()
        with torch.no_grad():
            torch._foreach_copy_(parameters, stride.parts(moved.values))
            for value, new in zip(stride.buffers_now(), moved.buffers, strict=True):
                value.copy_(new)
            parts = zip(
                parameters, stride.parts(moved.mean), stride.parts(moved.square), strict=True
            )
            for parameter, mean, square in parts:
                parameter.grad = None
                state = self.optimizer.state[parameter]
                if not state:
                    like = torch.zeros_like(parameter)
                    state |= {
                        "step": torch.tensor(0.0),
                        "exp_avg": like,
                        "exp_avg_sq": like.clone(),
                    }
                state["step"].fill_(done)
                for name, value in zip(_MEANS, (mean, square), strict=True):
                    state[name].copy_(value)
        self.optimizer._opt_called = True  # for schedulers, which ask whether there was a step


def _group_of(optimizer: Any) -> dict[str, Any]:
    """Parameters and settings of Adam; raises NotStageable where it does more than is done here."""
    groups = optimizer.param_groups
    group = groups[0]
    plain = type(optimizer) is torch.optim.Adam and len(groups) == 1
    others = ("weight_decay", "amsgrad", "maximize", "differentiable", "capturable")
    plain = plain and not any(group.get(name) for name in others)
    hooks = [value for name, value in vars(optimizer).items() if name.endswith("_hooks") and value]
    if not plain or hooks:
        raise NotStageable("the optimizer is not plain Adam")
    return group
