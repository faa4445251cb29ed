"""Minibatches, from whatever the data came as."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


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
