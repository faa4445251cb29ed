"""Strides: many steps of Adam that one compiled graph takes at a call."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae._scopes import random_state
from ppvae.staging.noise import joint_noise
from ppvae.staging.staged import NotStageable, Staged
from ppvae.staging.stride import PICKED, SAME, STACKED, Moved, Replicas, Stride, Taken, rates_of
from ppvae.training.task import Task

_MEANS = "exp_avg", "exp_avg_sq"  # as PyTorch calls them
_SECONDS, _MOST = 0.1, 64  # a stride takes no longer than that, and no more steps
_PLAIN = "torch.optim.Adam without weight decay, groups or hooks is, with `scheduler` and `clip`"


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
        is_as_made: whether the steps are still those of its Adam, as a pass through the data finds.

    Args:
        task: what is trained.
        staged: its loss.
        optimizer: Adam, without weight decay and other options.
        clip: the largest norm of a gradient, or None.

    Raises:
        NotStageable: steps can only be taken one by one.
    """

    replicas: Replicas | None = None  # of replicates

    def __init__(self, task: Task, staged: Staged, optimizer: Any, clip: float | None) -> None:
        self.task, self.staged, self.optimizer = task, staged, optimizer
        if not _is_plain(optimizer):
            raise NotStageable("the optimizer is not plain Adam", _PLAIN)
        self.walked: deque[Walked] = deque(maxlen=2)
        self._begun: list[Any] = []  # minibatches of the stride that was begun
        self._drawn: list[list[Tensor]] = []  # their noise, where it is not drawn at once
        self._most = 1  # of the steps in a stride, until it is known how long they take
        self.is_as_made = True
        self._known: dict[int, tuple[bool, Any]] = {}
        self._settings = task.program.settings(0)
        held = (*task.batches.tensors, *task.batches.extra)
        self._held = [v.contiguous() for v in held if isinstance(v, Tensor)]
        with random_state(None, keep=True):
            first = self._example()
            noise = staged.noise(*self._given(first))
            self.kinds = self._kinds(len(noise))
            for _ in range(2):
                self.add(first)
            example = self._taken(0)
            self._begun, self._drawn = [], []
        self.stride = Stride(staged, self.kinds, clip=clip, example=example, replicas=self.replicas)

    @property
    def group(self) -> dict[str, Any]:
        """The parameters and settings of Adam, which are others once it has loaded its state."""
        group: dict[str, Any] = self.optimizer.param_groups[0]
        return group

    def minibatches(self) -> Iterator[Any]:
        """Goes once through the data."""
        # schedulers and callbacks change settings, between two passes
        same = self.stride.trained == self.staged.trained()
        self.is_as_made = same and _is_plain(self.optimizer)
        return self._pass()

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
        """Whether the graph covers a minibatch, and the steps are still those of its Adam."""
        return self.is_as_made and bool(self._of(minibatch)[0])

    def continues(self, minibatch: Any) -> bool:
        """Whether a minibatch can be taken in the stride that was begun."""
        if not self._begun:
            return True
        first = self._begun[0]
        if isinstance(minibatch, Tensor):
            return minibatch.shape == first.shape
        pairs = zip(self.batch(first), self.batch(minibatch), strict=True)
        return all(v.shape == w.shape for v, w in pairs if isinstance(v, Tensor))

    def add(self, minibatch: Any) -> None:
        """Adds a step to a stride."""
        self._begun.append(minibatch)
        if self._of(minibatch)[1] is None:  # in the order in which single steps draw
            self._drawn.append(self._noise(minibatch))

    @property
    def is_full(self) -> bool:
        """Whether the stride that was begun has as many steps as it is to have."""
        return len(self._begun) >= self._most

    @property
    def begun(self) -> int:
        """How many steps the stride has that was begun."""
        return len(self._begun)

    def go(self, before: int) -> list[list[float]]:
        """Computes the steps that were added, and moves nothing; returns the losses before each.

        Args:
            before: the number of steps so far.
        """
        start = time.perf_counter()
        steps, minibatches = self.begun, self._begun
        taken, moved = self._taken(before), self._now()
        self._begun, self._drawn = [], []
        self.walked.append(Walked(before, self._done, moved, taken, minibatches))
        losses, self._after = self.stride(moved, taken, steps)
        values: list[list[float]] = losses.reshape(steps, -1).tolist()
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

    def _pass(self) -> Iterator[Any]:
        batches = self.task.batches
        return batches.numbers() if batches.numbered else iter(batches)

    def _example(self) -> Any:
        """A first minibatch; another one of a loader would move what it is drawn from."""
        batches = self.task.batches
        return next(batches.numbers()) if batches.numbered else self.task.example

    def _noise(self, minibatch: Any) -> list[Tensor]:
        """The noise of a step."""
        return [*self.staged.noise(*self._given(minibatch))]

    def _joint(self, draw: Callable[[int], list[Tensor]], steps: int) -> list[Tensor]:
        """The noise of many steps."""
        return draw(steps)

    def _sized(self, minibatch: Any) -> tuple[Any, ...]:
        """Arguments of the sizes of a minibatch, for what depends on nothing else."""
        if isinstance(minibatch, Tensor):
            return self.task.batches.picked(slice(minibatch.shape[-1]))
        return self.batch(minibatch)

    def _given(self, minibatch: Any) -> list[Tensor]:
        """What the noise of a step is drawn for."""
        tensors = (value for value in self._sized(minibatch) if isinstance(value, Tensor))
        return [*tensors, *self._settings]

    def _of(self, minibatch: Any) -> tuple[bool, Any]:
        """Whether the graph covers a minibatch, and what draws the noise of many such at once."""
        if not isinstance(minibatch, Tensor):  # one of a loader, which may draw in between
            return self.staged.covers(*self.batch(minibatch)), None
        rows = minibatch.shape[-1]
        if rows not in self._known:
            fits = self.staged.covers(*self._sized(minibatch))
            joint = joint_noise(self.staged, self._given(minibatch)) if fits else None
            self._known[rows] = fits, joint
        return self._known[rows]

    def _kinds(self, noise: int) -> list[str]:
        """How each of the data of a step is to be had; see `Stride`."""
        batches, example = self.task.batches, self.task.example
        kinds = []
        for at, value in enumerate(example):
            if isinstance(value, Tensor):
                further = at - (len(example) - len(batches.extra))
                same = batches.whole or (further >= 0 and not batches.cut[further])
                kinds.append(SAME if same else PICKED if batches.numbered else STACKED)
        return [*kinds, *[STACKED] * (len(self._settings) + noise)]

    def _taken(self, before: int) -> Taken:
        """What the steps that were added are computed from, of which the first has that number."""
        minibatches, batches, group = self._begun, self.task.batches, self.group
        steps = len(minibatches)
        if batches.numbered:
            rows = torch.stack(minibatches)
            given = self._held
        else:
            lead = () if self.replicas is None else self.replicas.state[0].shape[:1]
            sizes = steps, *lead, self.rows(minibatches[0])  # what the graph takes for the same
            rows, given = torch.zeros(sizes, dtype=torch.int64), self._in_columns(minibatches)
        joint = self._of(minibatches[0])[1]
        apart = map(torch.stack, zip(*self._drawn, strict=True))
        noise = self._joint(joint, steps) if joint else apart
        data = [*(v.contiguous() for v in given), *self._settings_of(before, steps), *noise]
        told = float(group["lr"]), float(group["eps"])
        rates = rates_of(group["betas"], *told, self._done, steps)
        dtype = group["params"][0].dtype
        return Taken(rates.to(dtype), rows, data)

    def _in_columns(self, minibatches: list[Any]) -> list[Tensor]:
        """The data of minibatches that are no numbers, each of its kind."""
        columns = zip(*minibatches, strict=True)
        places = [column for column in columns if isinstance(column[0], Tensor)]
        return [
            torch.stack(column) if kind == STACKED else column[0]
            for column, kind in zip(places, self.kinds, strict=False)
        ]

    def _settings_of(self, before: int, steps: int) -> list[Tensor]:
        """The settings of some steps, each as one tensor."""
        program, numbers = self.task.program, range(before, before + steps)
        if not program.moving:  # then there is the number of the step alone
            return [torch.arange(before, before + steps)]
        columns = zip(*(program.settings(number) for number in numbers), strict=True)
        return [torch.stack(column) for column in columns]

    @property
    def _done(self) -> int:
        """How many steps Adam has taken."""
        states = [self.optimizer.state.get(each) for each in self.group["params"]]
        return max((int(state["step"]) for state in states if state), default=0)

    @property
    def _step_dtype(self) -> torch.dtype:
        """That of Adam's numbers of steps, as PyTorch chooses it."""
        double = torch.get_default_dtype() == torch.float64 and not self.group.get("fused")
        return torch.float64 if double else torch.float32

    def _now(self) -> Moved:
        """What is moved, as it is."""
        parameters, state = self.stride.parameters(), self.optimizer.state
        # Adam knows none of a parameter that had no gradient in a step of its own
        means = [
            [state[p][name] if state.get(p) else torch.zeros_like(p) for p in parameters]
            for name in _MEANS
        ]
        return self.stride.moved(*means)

    def _put(self, moved: Moved, done: int) -> None:
        """Gives parameters, buffers and Adam other values."""
        stride, parameters = self.stride, self.stride.parameters()
        with torch.no_grad():
            torch._foreach_copy_(parameters, stride.parts(moved.values))
            for value, new in zip(stride.buffers_now(), moved.buffers, strict=True):
                value.copy_(new)
            means = [stride.parts(vector) for vector in (moved.mean, moved.square)]
            for parameter, mean, square in zip(parameters, *means, strict=True):
                parameter.grad = None
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0, dtype=self._step_dtype)
                    state |= {name: torch.zeros_like(parameter) for name in _MEANS}
                state["step"].fill_(done)
                for name, value in zip(_MEANS, (mean, square), strict=True):
                    state[name].copy_(value)
        self.optimizer._opt_called = True  # for schedulers, which ask whether there was a step


def _is_plain(optimizer: Any) -> bool:
    """Whether an optimizer is Adam, and does no more than is done here."""
    groups = optimizer.param_groups
    others = ("weight_decay", "amsgrad", "maximize", "differentiable", "capturable")
    plain = type(optimizer) is torch.optim.Adam and len(groups) == 1
    hooks = [value for name, value in vars(optimizer).items() if name.endswith("_hooks") and value]
    return plain and not hooks and not any(groups[0].get(name) for name in others)
