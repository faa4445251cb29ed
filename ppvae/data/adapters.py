"""From what users have, arrays, tensors and tables, to tensors of numbers, or NaN for none."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppvae._checks import check_real, expect


def as_tensors(name: str, data: Any, *, missing: bool = False) -> tuple[Tensor, ...]:
    """Turns one tensor or array, or several with equal first dimensions, into a tuple of tensors.

    They share memory with what came, but want no gradient: the data are the caller's.

    What is missing is NaN: what was, and what is masked or NA.

    Args:
        name: of the argument, for the messages.
        data: a tensor, array or table of pandas, or a tuple or list of them. Floating arrays take
            the default dtype.
        missing: whether entries may be.

    Raises:
        TypeError: there is something else among them, such as text or a sparse tensor.
        ValueError: there is none, a number is not finite, or the first dimensions differ.
    """
    items = tuple(data) if isinstance(data, (tuple, list)) else (data,)
    expect(items, name, "at least one tensor or array", "none")
    tensors = tuple(_as_tensor(name, item, missing=missing) for item in items)
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    expect(len(lengths) == 1, name, "equal first dimensions", sorted(lengths))
    return tensors


def real_numbers(name: str, values: Any) -> Tensor:
    """Real numbers as a tensor, NaN where an entry is missing; see `check_real`.

    A table of pandas may have columns of categories, which become their codes.

    Raises:
        TypeError: there is something else among them.
    """
    if _is_frame(values):
        values = np.column_stack([_column(name, str(key), values[key]) for key in values.columns])
    return check_real(name, values, writable=False, missing=True)


def _is_frame(item: Any) -> bool:
    """Whether something is a table of pandas, which is not imported for it."""
    return type(item).__module__.split(".")[0] == "pandas" and hasattr(item, "columns")


def _column(name: str, key: str, column: Any) -> Any:
    """A column of a table as floating numbers, of its dtype where that is one."""
    if hasattr(column, "cat"):
        codes = column.cat.codes.to_numpy()
        return np.where(codes < 0, np.nan, codes)
    wanted = f"numbers, or categories by astype('category'), in column {key!r}"
    expect(getattr(column.dtype, "kind", "O") in "biuf", name, wanted, column.dtype, TypeError)
    return column.to_numpy(dtype=float, na_value=np.nan)


def _as_tensor(name: str, item: Any, *, missing: bool = False) -> Tensor:
    kinds = "tensors, arrays of numbers, tables of pandas, a Dataset or a DataLoader"
    numbers = not isinstance(item, np.ndarray) or item.dtype.kind in "biufO"
    got = f"{getattr(item, 'dtype', '')} {type(item).__name__}"
    known = isinstance(item, (np.ndarray, Tensor)) or _is_frame(item)
    expect(known and numbers, name, kinds, got, TypeError)
    if not isinstance(item, Tensor):
        hidden = None if missing or not np.ma.is_masked(item) else item
        item = real_numbers(name, item) if hidden is None else check_real(name, hidden)
        # of an array that can only be read, such as a map, which may be larger than the memory
        item = item.to(torch.get_default_dtype()) if item.is_floating_point() else item
    elif not item.is_complex():  # which a model may take, but not observe
        check_real(name, item)
    if item.is_floating_point() or item.is_complex():
        bad = torch.isinf(item) if missing and not item.is_complex() else ~torch.isfinite(item)
        kind, wanted = (
            ("infinite", "finite numbers, or NaN")
            if missing
            else ("NaN or infinite", "finite numbers")
        )
        expect(not bad.any(), name, wanted, f"{int(bad.sum())} that are {kind}")
    return item.detach() if item.requires_grad else item


def has_missing(values: Iterable[Any]) -> bool:
    """Whether a number among some arguments of a program is NaN."""
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return any(bool(torch.isnan(v).any()) for v in tensors if not v.is_meta)


def check_dtype(name: str, values: Iterable[Any], *programs: Any) -> None:
    """Raises a ValueError if a floating tensor has another dtype than the parameters of modules."""
    modules = [program for program in programs if isinstance(program, nn.Module)]
    dtype = next((p.dtype for module in modules for p in module.parameters()), None)
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            same = dtype in (None, value.dtype)
            expect(same, name, f"{dtype}, as the parameters", value.dtype)


def prepared(args: tuple[Any, ...], *, missing: bool = True) -> tuple[Any, ...]:
    """Turns arrays, tensors and tables among the arguments of a call into non-empty tensors.

    What is missing, where entries may be, is NaN. Arguments of other kinds are returned as they
    are.

    Raises:
        TypeError: an array or a table holds something else, or a tensor is not dense.
        ValueError: a number is infinite, or missing where it may not be, or a first dimension is
            zero.
    """
    tables = [hasattr(arg, "__array__") and getattr(arg, "ndim", 0) > 0 for arg in args]
    pairs = zip(args, tables, strict=True)
    ready = [_as_tensor("args", arg, missing=missing) if table else arg for arg, table in pairs]
    for arg in ready:
        if isinstance(arg, Tensor) and arg.dim():
            expect(len(arg), "args", "at least one datum", "none")
    return tuple(ready)
