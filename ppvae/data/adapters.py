"""From what users have, arrays and tensors, to finite tensors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae._checks import expect


def as_tensors(name: str, data: Any) -> tuple[Tensor, ...]:
    """Turns one tensor or array, or several with equal first dimensions, into a tuple of tensors.

    Args:
        name: of the argument, for the messages.
        data: a tensor or array, or a tuple or list of them. Floating arrays take the default dtype.

    Raises:
        TypeError: there is something else among them.
        ValueError: there is none, a number is not finite, or the first dimensions differ.
    """
    items = tuple(data) if isinstance(data, (tuple, list)) else (data,)
    expect(items, name, "at least one tensor or array", "none")
    tensors = tuple(_as_tensor(name, item) for item in items)
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    expect(len(lengths) == 1, name, "equal first dimensions", sorted(lengths))
    return tensors


def _as_tensor(name: str, item: Any) -> Tensor:
    if isinstance(item, np.ndarray) and item.dtype.kind in "bifu":
        item = torch.from_numpy(np.ascontiguousarray(item))
        item = item.to(torch.get_default_dtype()) if item.is_floating_point() else item
    kinds = "tensors, arrays of numbers, a Dataset or a DataLoader"
    got = f"{getattr(item, 'dtype', '')} {type(item).__name__}"
    expect(isinstance(item, Tensor), name, kinds, got, TypeError)
    bad = int((~torch.isfinite(item)).sum()) if item.is_floating_point() else 0
    expect(not bad, name, "finite numbers", f"{bad} that are NaN or infinite")
    return item


def prepared(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Turns the arrays and tensors among the arguments of a call into finite, non-empty tensors.

    Arguments of other kinds are returned as they are.

    Raises:
        ValueError: a number is not finite, or a first dimension is zero.
    """
    ready = [_as_tensor("args", a) if isinstance(a, (np.ndarray, Tensor)) else a for a in args]
    for arg in ready:
        if isinstance(arg, Tensor) and arg.dim():
            expect(len(arg), "args", "at least one datum", "none")
    return tuple(ready)
