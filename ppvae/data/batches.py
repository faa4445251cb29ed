"""Minibatches, from whatever the data came as."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ppvae._scopes import random_state
from ppvae.data.adapters import _check_some, as_tensors, length_of


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
        """Moves the data, and every batch that is to come, to a device."""
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
