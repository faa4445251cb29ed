"""Minibatches, from whatever the data came as."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from ppvae._checks import check_count, expect
from ppvae._scopes import random_state
from ppvae.data.adapters import Form, as_tensors, has_missing
from ppvae.data.sparse import SparseMatrix


@dataclass
class Batches:
    """Minibatches of positional arguments; made by `batches_of`.

    Attributes:
        name: of the argument that they came as, for the messages.
        size: number of data in all.
        batch_size: data in a minibatch; None if a loader of the user's does not say.
        tensors: the data, if no loader has them.
        loader: what gives the data; None if they are tensors.
        extra: further arguments of every call, behind the data.
        cut: for each of `extra`, whether its rows are those of the data.
        form: what the programs take that a loader gives data for.
        shuffle: whether each pass goes through the tensors in an order of its own.
        device: where minibatches are moved to.
        check: is called with each minibatch of a loader, until it has given all once.
    """

    name: str
    size: int
    batch_size: int | None
    tensors: tuple[Tensor | SparseMatrix, ...] = ()
    loader: DataLoader[Any] | None = None
    extra: tuple[Any, ...] = ()
    cut: tuple[bool, ...] = ()
    form: Form | None = None
    shuffle: bool = False
    device: torch.device = torch.device("cpu")
    check: Callable[[tuple[Any, ...]], None] | None = None

    @property
    def whole(self) -> bool:
        """Whether one batch is all the data."""
        return self.loader is None and self.batch_size == self.size

    @property
    def numbered(self) -> bool:
        """Whether minibatches are picked from dense tensors by the numbers of their data."""
        dense = self.loader is None and all(isinstance(t, Tensor) for t in self.tensors)
        return dense and not self.whole

    @cached_property
    def missing(self) -> bool:
        """Whether there are missing entries, which are NaN; of a loader's data it is not known."""
        return self.loader is not None or has_missing((*self.tensors, *self.extra))

    @property
    def count(self) -> int:
        """Number of batches in a pass through the data."""
        endless = self.loader is None or isinstance(self.loader.dataset, IterableDataset)
        if self.loader is not None and not endless:
            return len(self.loader)
        return math.ceil(self.size / (self.batch_size or self.size))

    @property
    def given(self) -> bool:
        """Whether there are data, and not just a program that has its own."""
        return bool(self.tensors) or self.loader is not None

    def rows(self, batch: tuple[Any, ...]) -> int:
        """Number of data in a minibatch."""
        return len(batch[0]) if self.given else self.size

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators of a loader of the user's own, which are moved by a pass."""
        sampler = getattr(getattr(self.loader, "batch_sampler", None), "sampler", None)
        owners = (self.loader, getattr(self.loader, "sampler", None), sampler)
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(each): each for each in found if each is not None}.values())

    def example(self) -> tuple[Any, ...]:
        """The first batch of a pass, which uses up no random numbers."""
        before = [generator.get_state() for generator in self.generators]
        with random_state(None, keep=True):
            first = next(iter(self))
        for generator, state in zip(self.generators, before, strict=True):
            generator.set_state(state)
        return first

    def to(self, device: torch.device) -> None:
        """Moves the data, and every batch that is to come, to a device."""
        self.device = device
        self.tensors = tuple(tensor.to(device) for tensor in self.tensors)
        self.extra = tuple(v.to(device) if isinstance(v, Tensor) else v for v in self.extra)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self.loader is not None:
            item = None
            for item in self.loader:
                tensors = as_tensors(self.name, item, self.form, missing=True)
                if self.form is not None and self.form.warns:  # a word is enough
                    self.form = replace(self.form, warns=False)
                batch = (*(tensor.to(self.device) for tensor in tensors), *self.extra)
                if self.check is not None:
                    self.check(batch)
                yield batch
            self.check = None
            expect(item is not None, self.name, "a DataLoader with at least one batch", "none")
        elif self.whole:
            dense = (t[:] if isinstance(t, SparseMatrix) else t for t in self.tensors)
            yield (*dense, *self.extra)
        else:
            yield from map(self.picked, self.numbers())

    def numbers(self) -> Iterator[Tensor]:
        """The numbers of the data in each minibatch of a pass through tensors."""
        order = torch.randperm(self.size) if self.shuffle else torch.arange(self.size)
        yield from order.to(self.device).split(self.batch_size or self.size)

    def picked(self, rows: Any) -> tuple[Any, ...]:
        """The minibatch of the data of those numbers, or of a slice of them."""
        return self.rows_of((*self.tensors, *self.extra), rows)

    def rows_of(self, batch: tuple[Any, ...], rows: Any) -> tuple[Any, ...]:
        """Some rows of the data in a minibatch, by their numbers or as a slice."""
        cut = (*[True] * (len(batch) - len(self.extra)), *self.cut)
        return tuple(v[rows] if c else v for v, c in zip(batch, cut, strict=True))


def batches_of(
    name: str,
    data: Any,
    batch_size: int | None = None,
    form: Form | None = None,
    *,
    training: bool,
    extra: tuple[Any, ...] = (),
    whole: bool = False,
    size: int | None = None,
) -> Batches:
    """Minibatches of data.

    Args:
        name: of the argument, for the messages.
        data: a tensor, array, table or sparse matrix, or a tuple of them; a `Dataset`; or a
            `DataLoader`. An empty tuple is for programs that have their own, and counts as one.
        batch_size: data in a minibatch, or at most so many of those that are not for training; by
            default all the data, or 128 of more than 1024.
        form: what the programs take that the data are for.
        training: whether they are trained on: each pass then has an order of its own, and tensors
            of `extra` with as many rows are cut with the data.
        extra: further arguments, behind the data.
        whole: make one batch of all data, however many, where no size is given.
        size: the number of data in an `IterableDataset`, where it has no length.

    Raises:
        TypeError: the data are of another kind.
        ValueError: they are empty, not finite, or of different lengths; `batch_size` does not fit;
            or `extra` has as many rows as data that are no tensors, whose order is not known.
    """
    data = data.tensors if isinstance(data, TensorDataset) else data
    if form is not None and training:
        form.remember(data)
    held = isinstance(data, (Dataset, DataLoader))
    expect(held or size is None, "size", "none beside data that tell their number", size)
    if isinstance(data, tuple) and not data:
        return Batches(name, 1, 1, extra=extra, cut=(False,) * len(extra), form=form)
    tensors = () if held else as_tensors(name, data, form, missing=True, sparse=True)
    size = _length(name, data, size) if held else len(tensors[0]) if tensors[0].dim() else 0
    expect(size, name, "at least one datum", "none")
    cut = tuple(training and isinstance(v, Tensor) and v.shape[:1] == (size,) for v in extra)
    expect(not (held and any(cut)), "kwargs", "no tensor with as many rows as a Dataset", "one")
    if isinstance(data, DataLoader):
        alone = batch_size is None or not training
        expect(alone, "batch_size", "None with a DataLoader", batch_size)
        return Batches(name, size, data.batch_size, (), data, extra, cut, form=form)
    if batch_size is None:
        batch_size = size if whole or size <= 1024 else 128
    elif training:
        batch_size = check_count("batch_size", batch_size)
        expect(batch_size <= size, "batch_size", f"at most {size}, the number of data", batch_size)
    batch_size = min(batch_size, size)
    shuffled = training and not isinstance(data, IterableDataset)
    loader = DataLoader(data, batch_size, shuffle=shuffled) if held else None
    return Batches(name, size, batch_size, tensors, loader, extra, cut, form=form, shuffle=training)


def _length(name: str, data: Any, size: int | None) -> int:
    """The number of data that pass through training: those of the sampler of a loader."""
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset):
        if size is None and hasattr(dataset, "__len__"):
            return len(dataset)
        wanted = "the number of data beside an IterableDataset, which does not tell"
        expect(size is not None, "size", wanted, "none")
        return check_count("size", size)
    expect(size is None, "size", f"none beside {name} that tell their number", size)
    if not isinstance(data, DataLoader):
        return len(dataset)
    batches = data.batch_sampler
    sampler: Any = getattr(batches, "sampler", data.sampler)
    if getattr(batches, "drop_last", False) and isinstance(sampler, SequentialSampler):
        return len(data) * (data.batch_size or 1)  # the same data are left out of every pass
    return len(sampler)
