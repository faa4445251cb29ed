"""The share of one process in each minibatch.

The loss of a minibatch, in nats per datum, is the average of the losses of its parts, each weighted
with its number of data, and so are the gradients. That holds for a model whose data are independent
given what is global, as those of a plate are; a layer that looks at all the data of a minibatch, as
batch normalisation does, breaks it. So it is tried: before a training on the first minibatch, and
at the steps 1, 2, 4, 8, ... again. Numbers that NumPy draws are not those of one process.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import TROUBLE
from ppvae._scopes import kept_buffers, random_state, stacklevel, unchecked
from ppvae.data.batches import Batches
from ppvae.staging.program import Program
from ppvae.staging.shared_draws import Draw, Part, SharedDraws, draws_of
from ppvae.staging.staged import one_line
from ppvae.training.processes import Processes

_LATE = 1_000_003  # steps, by which an objective that warms up is what it is to be


class Share:
    """What this process computes of each minibatch; `share_of` makes it.

    Attributes:
        processes: those that train together.
        program: the loss, in the mode in which it is to run.
        batches: the data.
        size: the number of data in all, where it is another than that of the training.
        draws: those of a minibatch.
        why_not: why each process computes all of a minibatch; empty where it is divided.
    """

    def __init__(
        self, processes: Processes, program: Program, batches: Batches, size: int | None = None
    ) -> None:
        self.processes, self.program = processes, program
        self.batches, self.size = batches, size
        self.draws: list[Draw] = []
        self.why_not = ""
        self._looked = 0  # the last step at which it was seen that minibatches can be divided

    @contextmanager
    def of(self, batch: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """Gives the part of a minibatch; inside, it draws as it would in the whole."""
        part = self.part(batch)
        if part is None:
            yield batch
            return
        with SharedDraws(self.draws, part, partial(self._gathered, part)):
            yield self.cut(batch)

    def cut(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """The part of a minibatch."""
        part = self.part(batch)
        return batch if part is None else self.batches.rows_of(batch, part.slice)

    def part(self, batch: tuple[Any, ...]) -> Part | None:
        """Which rows of a minibatch are this process's; None if all processes compute all."""
        whole, (rank, count) = self.batches.rows(batch), (self.processes.rank, self.processes.count)
        if self.why_not or whole < count:
            return None
        start, end = (whole * each // count for each in (rank, rank + 1))
        return Part(start, end - start, whole)

    def weight(self, batch: tuple[Any, ...]) -> float:
        """The weight of this process in a minibatch."""
        part = self.part(batch)
        return 1 / self.processes.count if part is None else part.rows / part.whole

    def look(self, batch: tuple[Any, ...], step: int) -> None:
        """Looks, at the steps 1, 2, 4, 8, ..., whether a minibatch can still be divided.

        Warns:
            UserWarning: it cannot, and from here on every process computes all of each.
        """
        part = self.part(batch)
        if part is None or step & (step - 1) or step == self._looked:
            return
        self.why_not = self._differs(batch, part, (step,))
        if self.why_not:
            since = f"since step {step}, as was not yet so in step {self._looked}, {self.why_not}"
            self.warn(f"{since}; an objective that says why it is `indivisible` has it from step 0")
        self._looked = step

    def warn(self, why: str) -> None:
        """Warns that minibatches are not divided."""
        so = f"each of {self.processes.count} processes computes all of every minibatch"
        words = f"fit: {so}, so that they are no faster than one; {why} ({TROUBLE})"
        warnings.warn(words, stacklevel=stacklevel())

    def try_on(self, batch: tuple[Any, ...]) -> None:
        """Finds out, on a first minibatch, how those that follow can be shared."""
        part = self.part(batch)
        self.why_not = getattr(self.program.objective, "indivisible", "")
        if not self.batches.given:
            self.why_not = "the data are the model's own"
        elif part is None:
            self.why_not = "there are fewer data in it than processes"
        elif not self.why_not:
            self.why_not = self._differs(batch, part, (0, _LATE), first=True)

    def _gathered(self, part: Part, value: Tensor, dim: int) -> Tensor:
        """What all processes have of the numbers that a draw is made from."""
        shape = [*value.shape]
        shape[dim] = part.whole
        whole = value.new_zeros(shape)
        whole.narrow(dim, part.start, part.rows).copy_(value)
        return self.processes.sums(whole)

    def _differs(
        self, batch: tuple[Any, ...], part: Part, steps: Iterable[int], *, first: bool = False
    ) -> str:
        """Why the loss of a minibatch is not the mean of those of its parts; empty if it is.

        All processes come to the same answer.
        """
        processes, all_rows = self.processes, Part(0, part.whole, part.whole)
        error, own, whole = "", _Outcome(), _Outcome()
        try:
            fewer = self.cut(batch)
            if first:
                self.draws = self._draws(batch, fewer, part)
            for step in steps:
                with SharedDraws(self.draws, part):
                    own.add(self.program, fewer, step, self.size)
                with SharedDraws(self.draws, all_rows):
                    whole.add(self.program, batch, step, self.size)
        except Exception as failure:  # a model may fail in ways of its own on fewer data
            error = one_line(failure) or type(failure).__name__
        error = next(filter(None, processes.all_of(error)), "")
        if error:
            return error
        means = [processes.sums(self.weight(batch) * value) for value in own.means]
        near = max(map(_precision, [*self.program.parameters(), *self.program.buffers(), *means]))
        if not all(processes.all_of(_alike(means, whole.means, near))):
            return (
                "its loss or gradient is not the mean of those of its parts, as with batch "
                "normalisation"
            )
        if not all(processes.all_of(_alike(own.moves, whole.moves, near))):
            return "where it leads a buffer depends on its data"
        return ""

    def _draws(self, batch: tuple[Any, ...], fewer: tuple[Any, ...], part: Part) -> list[Draw]:
        with torch.no_grad(), kept_buffers(self.program), unchecked():
            return draws_of(
                lambda data: self.program.loss(data, 0, size=self.size),
                (batch, part.whole),
                (fewer, part.rows),
            )


class _Outcome:
    """What comes of a program: of runs that leave nothing behind.

    Attributes:
        means: losses and their gradients.
        moves: how far each buffer was moved.
    """

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.moves: list[Tensor] = []

    def add(self, program: Program, batch: tuple[Any, ...], step: int, size: int | None) -> None:
        """Runs a program on a minibatch."""
        leaves = [parameter for parameter in program.parameters() if parameter.requires_grad]
        before = [buffer.to(torch.float64, copy=True) for buffer in program.buffers()]
        with random_state(0), kept_buffers(program), unchecked(), torch.enable_grad():
            loss = program.loss(batch, step, size=size)
            slopes = [torch.zeros_like(leaf) for leaf in leaves]
            if loss.requires_grad:
                slopes = [*torch.autograd.grad(loss, leaves, materialize_grads=True)]
            after = [buffer.to(torch.float64, copy=True) for buffer in program.buffers()]
        self.means += [loss.detach(), *(s.to_dense() if s.is_sparse else s for s in slopes)]
        self.moves += [b - a for a, b in zip(before, after, strict=True)]


def _precision(value: Tensor) -> float:
    """How far two numbers of this kind may be apart, relatively, to be called the same."""
    exact = not (value.is_floating_point() or value.is_complex())
    return 0.0 if exact else torch.finfo(value.dtype).eps ** 0.5


def _alike(some: Sequence[Tensor], others: Sequence[Tensor], near: float) -> bool:
    """Whether numbers are the same, but for what another order of sums does to them."""
    largest = [
        other.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if other.numel() else 0.0
        for other in others
    ]
    for one, other, size in zip(some, others, largest, strict=True):
        atol = near * (size + 0.01 * max(largest))  # a slope of zero is a sum of others that cancel
        if not torch.allclose(one, other, rtol=0.0, atol=atol, equal_nan=True):
            return False
    return True


def share_of(
    processes: Processes,
    program: Program,
    batches: Batches,
    batch: tuple[Any, ...],
    size: int | None = None,
) -> Share:
    """Finds out how minibatches can be shared, by some runs of a program on the first one.

    Args:
        processes: those that train together.
        program: the loss, in the mode in which it is to run.
        batches: the data.
        batch: the first minibatch.
        size: the number of data in all, where it is another than that of the training.

    Warns:
        UserWarning: they cannot, and every process will compute all of each.
    """
    share = Share(processes, program, batches, size)
    share.try_on(batch)
    if share.why_not and size is None:  # of validation it would be no news
        share.warn(share.why_not)
    return share
