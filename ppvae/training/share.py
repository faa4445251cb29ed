"""The share of one process in each minibatch.

The loss of a minibatch, in nats per datum, is the average of the losses of its parts, each weighted
with its number of data, and so are the gradients. That holds for a model whose data are independent
given what is global, as those of a plate are; a layer that looks at all the data of a minibatch, as
batch normalisation does, breaks it. So it is tried, before a training, on the first minibatch.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import TROUBLE
from ppvae._scopes import kept_buffers, random_state, stacklevel, unchecked
from ppvae.data.batches import Batches
from ppvae.staging.program import Program
from ppvae.staging.staged import alike, one_line
from ppvae.training.processes import Processes
from ppvae.training.shared_draws import Part, SharedDraws, dims_of_draws

_LATE = 1_000_003  # steps, by which an objective that warms up is what it is to be


class Share:
    """What this process computes of each minibatch; `share_of` makes it.

    Attributes:
        processes: those that train together.
        batches: the data.
        dims: for each draw its dimension of data, or None.
        why_not: why each process computes all of a minibatch; empty where it is divided.
    """

    def __init__(self, processes: Processes, batches: Batches) -> None:
        self.processes, self.batches = processes, batches
        self.dims: list[int | None] = []
        self.why_not = ""

    @contextmanager
    def of(self, batch: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """Gives the part of a minibatch; inside, it draws as it would in the whole."""
        part = self.part(batch)
        if part is None:
            yield batch
            return
        with SharedDraws(self.dims, part, partial(self._gathered, part)):
            yield self.batches.rows_of(batch, part.slice)

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

    def _gathered(self, part: Part, value: Tensor, dim: int) -> Tensor:
        """What all processes have of the numbers that a draw is made from."""
        shape = [*value.shape]
        shape[dim] = part.whole
        whole = value.new_zeros(shape)
        whole.narrow(dim, part.start, part.rows).copy_(value)
        return self.processes.sums(whole)


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
    share = Share(processes, batches)
    part = share.part(batch)
    share.why_not = getattr(program.objective, "indivisible", "")
    if not batches.given:
        share.why_not = "the data are the model's own"
    elif part is not None and not share.why_not:
        share.why_not = _why_not(share, program, batch, part, size)
    if share.why_not:
        so = f"each of {processes.count} processes computes all of every minibatch"
        words = f"fit: {so}, so that they are no faster than one; {share.why_not} ({TROUBLE})"
        warnings.warn(words, stacklevel=stacklevel())
    return share


def _why_not(
    share: Share, program: Program, batch: tuple[Any, ...], part: Part, size: int | None
) -> str:
    """Why a minibatch cannot be shared; empty if it can. It tells the share how.

    All processes come to the same answer.
    """
    processes, all_rows = share.processes, Part(0, part.whole, part.whole)
    error, own, whole = "", [], []
    try:
        fewer = share.batches.rows_of(batch, part.slice)
        with torch.no_grad(), kept_buffers(program), unchecked():
            share.dims = dims_of_draws(
                lambda data: program.loss(data, 0, size=size),
                (batch, part.whole),
                (fewer, part.rows),
            )
        for step in (0, _LATE):
            with SharedDraws(share.dims, part):
                own += _outcome(program, fewer, step, size)
            with SharedDraws(share.dims, all_rows):
                whole += _outcome(program, batch, step, size)
    except Exception as failure:  # a model may fail in ways of its own on fewer data
        error = one_line(failure) or type(failure).__name__
    error = next(filter(None, processes.all_of(error)), "")
    if error:
        return error
    summed = [processes.sums(share.weight(batch) * value) for value in own]
    if all(processes.all_of(alike(summed, whole))):
        return ""
    return "its loss or gradient is not the mean of those of its parts, as with batch normalisation"


def _outcome(program: Program, batch: tuple[Any, ...], step: int, size: int | None) -> list[Tensor]:
    """The loss of a minibatch, its gradients, and where it leads the buffers."""
    leaves = [parameter for parameter in program.parameters() if parameter.requires_grad]
    with random_state(0), kept_buffers(program), unchecked(), torch.enable_grad():
        loss = program.loss(batch, step, size=size)
        slopes = [torch.zeros_like(leaf) for leaf in leaves]
        if loss.requires_grad:
            slopes = [*torch.autograd.grad(loss, leaves, materialize_grads=True)]
        buffers = [buffer.to(loss.dtype) for buffer in program.buffers()]
    return [loss.detach(), *slopes, *(buffer.clone() for buffer in buffers)]
