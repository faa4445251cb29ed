"""From what users have, arrays and tensors, to finite tensors."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppvae._checks import check_real, expect


def as_tensors(name: str, data: Any) -> tuple[Tensor, ...]:
    """Turns one tensor or array, or several with equal first dimensions, into a tuple of tensors.

    They share memory with what came, but want no gradient: the data are the caller's.

    Args:
        name: of the argument, for the messages.
        data: a tensor or array, or a tuple or list of them. Floating arrays take the default dtype.

    Raises:
        TypeError: there is something else among them, such as text or a sparse tensor.
        ValueError: there is none, a number is not finite or is masked, or the first dimensions
            differ.
    """
    items = tuple(data) if isinstance(data, (tuple, list)) else (data,)
    expect(items, name, "at least one tensor or array", "none")
    tensors = tuple(_as_tensor(name, item) for item in items)
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    expect(len(lengths) == 1, name, "equal first dimensions", sorted(lengths))
    return tensors


def _as_tensor(name: str, item: Any) -> Tensor:
    kinds = "tensors, arrays of numbers, a Dataset or a DataLoader"
    numbers = not isinstance(item, np.ndarray) or item.dtype.kind in "biufO"
    got = f"{getattr(item, 'dtype', '')} {type(item).__name__}"
    expect(isinstance(item, (np.ndarray, Tensor)) and numbers, name, kinds, got, TypeError)
    if isinstance(item, np.ndarray):
        item = check_real(name, item, writable=False)  # a map may be larger than the memory
        item = item.to(torch.get_default_dtype()) if item.is_floating_point() else item
    elif not item.is_complex():  # which a model may take, but not observe
        check_real(name, item)
    inexact = item.is_floating_point() or item.is_complex()
    bad = int((~torch.isfinite(item)).sum()) if inexact else 0
    expect(not bad, name, "finite numbers", f"{bad} that are NaN or infinite")
    return item.detach() if item.requires_grad else item


def check_dtype(name: str, values: Iterable[Any], *programs: Any) -> None:
    """Raises a ValueError if a floating tensor has another dtype than the parameters of modules."""
    modules = [program for program in programs if isinstance(program, nn.Module)]
    dtype = next((p.dtype for module in modules for p in module.parameters()), None)
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            same = dtype in (None, value.dtype)
            expect(same, name, f"{dtype}, as the parameters", value.dtype)


def prepared(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Turns the arrays and tensors among the arguments of a call into finite, non-empty tensors.

    Arguments of other kinds are returned as they are.

    Raises:
        TypeError: an array holds something else, a tensor is not dense, or there is a table.
        ValueError: a number is not finite or is masked, or a first dimension is zero.
    """
    tables = [hasattr(arg, "__array__") and getattr(arg, "ndim", 0) > 0 for arg in args]
    ready = [_as_tensor("args", a) if table else a for a, table in zip(args, tables, strict=True)]
    for arg in ready:
        if isinstance(arg, Tensor) and arg.dim():
            expect(len(arg), "args", "at least one datum", "none")
    return tuple(ready)
