"""Minibatches, from whatever the data came as."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ppvae._context import random_state
from ppvae.objective import data_plate, draws_plate, trace_pair
from ppvae.sites import draws_its_rows, prototype

__all__ = ["Batches", "as_tensors", "draw_runs", "length_of", "minibatches", "prepared"]

# Numbers of the largest tensor in one vectorized run: the draws are cut to keep below it.
BUDGET = 4_000_000


class Batches:
    """Minibatches of positional arguments, from whatever the data came as."""

    def __init__(self, name: str, data: Any, batch_size: int | None, *, shuffle: bool) -> None:
        self.loader: DataLoader | None = None
        self.tensors: tuple[Tensor, ...] = ()
        self.shuffle, self.device = shuffle, torch.device("cpu")
        if isinstance(data, TensorDataset):
            data = data.tensors
        if isinstance(data, DataLoader):
            if batch_size is not None and shuffle:
                raise ValueError(f"batch_size: expected None with a DataLoader, got {batch_size}")
            self.loader, self.size, self.batch_size = data, length_of(data), data.batch_size
            _check_some(name, self.size)
        elif isinstance(data, Dataset):
            self.size = length_of(data)
            self.batch_size = self._checked(name, batch_size)
            self.loader = DataLoader(data, self.batch_size, shuffle=shuffle)
        else:
            self.tensors = as_tensors(name, data)
            self.size = len(self.tensors[0])
            self.batch_size = self._checked(name, batch_size)

    def _checked(self, name: str, batch_size: int | None) -> int:
        _check_some(name, self.size)
        if batch_size is None:
            return self.size if self.size <= 1024 else 128
        whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
        if not (whole and 1 <= batch_size <= self.size):
            raise ValueError(
                f"batch_size: expected 1 to {self.size}, the number of data; got {batch_size}"
            )
        return batch_size

    @property
    def whole(self) -> bool:
        """Whether one batch is all the data."""
        return self.loader is None and self.batch_size == self.size

    @property
    def count(self) -> int:
        """Number of batches in a pass through the data."""
        if self.loader is not None:
            return len(self.loader)
        return math.ceil(self.size / (self.batch_size or self.size))

    def example(self) -> tuple[Tensor, ...]:
        """The first batch of a pass, which uses up no random numbers."""
        with random_state(None, keep=True):
            batch = next(iter(self), None)
        if batch is None:
            raise ValueError("data: expected a DataLoader with at least one batch, got none")
        return batch

    def to(self, device: torch.device) -> None:
        self.device = device
        self.tensors = tuple(tensor.to(device) for tensor in self.tensors)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.loader is not None:
            for item in self.loader:
                tensors = as_tensors("data", item)
                yield tuple(tensor.to(self.device) for tensor in tensors)
            return
        if self.whole:
            yield self.tensors
            return
        order = torch.randperm(self.size) if self.shuffle else torch.arange(self.size)
        for rows in order.to(self.device).split(self.batch_size):
            yield tuple(tensor[rows] for tensor in self.tensors)


def as_tensors(name: str, data: Any) -> tuple[Tensor, ...]:
    """A tuple of finite tensors with equal first dimensions."""
    items = tuple(data) if isinstance(data, (tuple, list)) else (data,)
    if not items:
        raise ValueError(f"{name}: expected at least one tensor or array, got none")
    tensors = []
    for item in items:
        if isinstance(item, np.ndarray) and item.dtype.kind in "bifu":
            item = torch.from_numpy(np.ascontiguousarray(item))
            if item.is_floating_point():
                item = item.to(torch.get_default_dtype())
        if not isinstance(item, Tensor):
            raise TypeError(
                f"{name}: expected tensors, arrays of numbers, a Dataset or a DataLoader, got "
                f"{getattr(item, 'dtype', '')} {type(item).__name__}"
            )
        if item.is_floating_point() and not torch.isfinite(item).all():
            bad = int((~torch.isfinite(item)).sum())
            raise ValueError(f"{name}: expected finite numbers, got {bad} that are NaN or infinite")
        tensors.append(item)
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(lengths) != 1:
        raise ValueError(f"{name}: expected equal first dimensions, got {sorted(lengths)}")
    return tuple(tensors)


def length_of(data: Any) -> int:
    """Number of data in what `Batches` takes."""
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, IterableDataset):
        raise TypeError("data: expected a Dataset with a length, got an IterableDataset")
    return len(data[0]) if isinstance(data, (tuple, list)) else len(data)


def minibatches(
    model: Any, guide: Any, args: tuple[Any, ...], frame: Any, size: int, plate: str | None
) -> list[tuple[Any, ...]]:
    """The arguments cut into minibatches, or whole, where the model's plate does not follow.

    Every tensor with as many rows as the plate `frame` is cut.

    Raises:
        ValueError: the plate draws a subsample of its own.
    """
    if frame.full_size not in (None, frame.size):
        if draws_its_rows(prototype(model, args, {}).nodes[frame.name]):
            raise ValueError(
                f"model: the plate {frame.name!r} draws a subsample of {frame.size} in each run; "
                "expected a model that takes all its data, or is told its rows"
            )
    rows = frame.size
    if rows <= size:
        return [args]
    cut = [
        tuple(
            a[start : start + size] if isinstance(a, Tensor) and a.dim() and len(a) == rows else a
            for a in args
        )
        for start in range(0, rows, size)
    ]
    try:
        found = data_plate(trace_pair(model, guide, *cut[0])[0], plate)
    except Exception:  # whatever a model may raise that was written for one number of data
        return [args]
    return cut if found is not None and found.size == size else [args]


def draw_runs(
    model: Any, args: tuple[Any, ...], draws: int, widest: int | None
) -> Iterator[tuple[int, Any]]:
    """Cuts draws into runs that fit in memory; yields how many, and the plate for so many.

    `widest` is the size of the largest tensor for one draw; None asks for single draws without a
    plate, for models that are not vectorized.
    """
    at_once = 1 if widest is None else max(1, min(draws, BUDGET // widest))
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        yield count, None if widest is None else draws_plate(model, *args, draws=count)


def prepared(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call, arrays made tensors, numbers checked to be finite and some."""
    ready = []
    for arg in args:
        if isinstance(arg, (np.ndarray, Tensor)):
            (arg,) = as_tensors("args", arg)
            if arg.dim():
                _check_some("args", len(arg))
        ready.append(arg)
    return tuple(ready)


def _check_some(name: str, size: int) -> None:
    if size == 0:
        raise ValueError(f"{name}: expected at least one datum, got none")
