"""Minibatches, from whatever the data came as."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

__all__ = ["Batches", "as_tensors", "length_of", "slices"]


class Batches:
    """Minibatches of positional arguments, from whatever the data came as."""

    def __init__(self, name: str, data: Any, batch_size: int | None, *, shuffle: bool) -> None:
        self.loader: DataLoader | None = None
        self.tensors: tuple[Tensor, ...] = ()
        self.shuffle, self.device, self.dtype = shuffle, torch.device("cpu"), None
        if isinstance(data, TensorDataset):
            data = data.tensors
        if isinstance(data, DataLoader):
            if batch_size is not None and shuffle:
                raise ValueError(f"batch_size: expected None with a DataLoader, got {batch_size}")
            self.loader, self.size, self.batch_size = data, length_of(data), data.batch_size
        elif isinstance(data, Dataset):
            self.size = length_of(data)
            self.batch_size = self._checked(name, batch_size)
            self.loader = DataLoader(data, self.batch_size, shuffle=shuffle)
        else:
            self.tensors = as_tensors(name, data)
            self.size = len(self.tensors[0])
            self.batch_size = self._checked(name, batch_size)

    def _checked(self, name: str, batch_size: int | None) -> int:
        if self.size == 0:
            raise ValueError(f"{name}: expected at least one datum, got none")
        if batch_size is None:
            return self.size if self.size <= 1024 else 128
        if not 1 <= batch_size <= self.size:
            raise ValueError(
                f"batch_size: expected 1 to {self.size}, the number of data; got {batch_size}"
            )
        return batch_size

    @property
    def whole(self) -> bool:
        """Whether one batch is all the data."""
        return self.loader is None and self.batch_size == self.size

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


def as_tensors(name: str, data: Any, *, equal: bool = True) -> tuple[Tensor, ...]:
    """A tuple of finite tensors, with equal first dimensions unless told otherwise."""
    items = tuple(data) if isinstance(data, (tuple, list)) else (data,)
    tensors = []
    for item in items:
        if isinstance(item, np.ndarray):
            item = torch.from_numpy(item)
            if item.is_floating_point():
                item = item.to(torch.get_default_dtype())
        if not isinstance(item, Tensor):
            raise TypeError(
                f"{name}: expected tensors, arrays, a Dataset or a DataLoader, got "
                f"{type(item).__name__}"
            )
        if item.is_floating_point() and not torch.isfinite(item).all():
            bad = int((~torch.isfinite(item)).sum())
            raise ValueError(f"{name}: expected finite numbers, got {bad} that are NaN or infinite")
        tensors.append(item)
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if equal and len(lengths) != 1:
        raise ValueError(f"{name}: expected equal first dimensions, got {sorted(lengths)}")
    return tuple(tensors)


def length_of(data: Any) -> int:
    """Number of data in what `Batches` takes."""
    if isinstance(data, DataLoader):
        data = data.dataset
    return len(data[0]) if isinstance(data, (tuple, list)) else len(data)


def slices(args: tuple[Any, ...], rows: int, batch_size: int) -> Iterator[tuple[Any, ...]]:
    """The arguments in minibatches: every tensor of that many rows is cut, the others stay."""
    for start in range(0, rows, batch_size):
        yield tuple(
            a[start : start + batch_size]
            if isinstance(a, Tensor) and a.dim() and len(a) == rows
            else a
            for a in args
        )
