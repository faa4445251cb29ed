"""From what users have, arrays, tensors and tables, to tensors of numbers, or NaN for none.

Arrays, lists and tables take the dtype of the parameters of the programs that they are for, or the
default one. A tensor has a dtype by choice: another than that of the parameters is cast with a
warning. Whole numbers and bools stay what they are, except where a model says by its `example()`
that it wants real ones.
"""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ppvae._checks import check_real, expect
from ppvae._scopes import stacklevel
from ppvae.data.labels import check_aligned, with_numbers
from ppvae.data.sparse import SparseMatrix, as_dense, is_sparse


class Schema(NamedTuple):
    """The columns of a table and its categories.

    Attributes:
        columns: the names of the columns in their order; None of a column by itself.
        categories: column -> its categories in the order of their codes; "" is one by itself.
    """

    columns: tuple[str, ...] | None
    categories: dict[str, list[Any]]


_BLOCK = 2**22  # numbers that are looked at at a time
_SCHEMAS: WeakKeyDictionary[Any, dict[int, Schema]] = WeakKeyDictionary()  # model -> by argument


def schema_of(item: Any) -> Schema | None:
    """The schema of a table, or of a column of categories; None of anything else."""
    if _is_frame(item):
        columns = {str(key): item[key] for key in item.columns}
        coded = {k: list(c.cat.categories) for k, c in columns.items() if hasattr(c, "cat")}
        return Schema(tuple(columns), coded)
    return Schema(None, {"": list(item.cat.categories)}) if hasattr(item, "cat") else None


@dataclass(frozen=True)
class Form:
    """What programs take; made by `form_of`.

    Attributes:
        dtype: that of the floating parameters; None where there are none.
        device: where they are, likewise.
        programs: model and guide.
        warns: whether a tensor that is cast gets a word.
    """

    dtype: torch.dtype | None = None
    device: torch.device | None = None
    programs: tuple[Any, ...] = field(default=(), repr=False)
    warns: bool = True

    def is_real(self, position: int) -> bool:
        """Whether the argument at a position is real numbers, as far as a model tells."""
        value = self._example[position] if position < len(self._example) else None
        return isinstance(value, Tensor) and value.is_floating_point()

    @cached_property
    def _example(self) -> tuple[Any, ...]:
        """The arguments that a model offers, which it may have to run its networks for."""
        known = (getattr(program, "example", None) for program in self.programs)
        return next((made() for made in known if callable(made)), ())

    def schema(self, position: int) -> Schema | None:
        """The columns and categories of an argument, as far as they are known.

        A model says those of its data by an attribute `schema`; else they are those of the table
        that it was trained on first, as long as the process lives.
        """
        model = self.programs[0] if self.programs else None
        own = getattr(model, "schema", None) if position == 0 else None
        if isinstance(own, Schema):
            return own
        try:
            return _SCHEMAS.get(model, {}).get(position)
        except TypeError:  # a model without a hash or weak references
            return None

    def remember(self, data: Any) -> None:
        """Keeps the schemas of what a model is trained on, where it has none yet."""
        for position, item in enumerate(items_of(data)):
            found = schema_of(item)
            if found is not None and self.programs:
                with suppress(TypeError):
                    _SCHEMAS.setdefault(self.programs[0], {}).setdefault(position, found)


def form_of(*programs: Any) -> Form:
    """What programs take; those that are plain functions say nothing."""
    modules = [program for program in programs if isinstance(program, nn.Module)]
    parameters = (p for module in modules for p in module.parameters() if p.is_floating_point())
    first = next(parameters, None)
    if first is None:
        return Form(programs=programs)
    return Form(first.dtype, first.device, programs)


def as_tensors(
    name: str, data: Any, form: Form | None = None, *, missing: bool = False, sparse: bool = False
) -> tuple[Any, ...]:
    """Turns data, or several with equal first dimensions, into a tuple of tensors.

    They share memory with what came where they can, but want no gradient: the data are the
    caller's. What is missing is NaN: what was, and what is masked or NA.

    Args:
        name: of the argument, for the messages.
        data: a tensor, array, nested list of numbers, or a table or column of pandas or xarray; or
            a tuple or list of tensors, arrays and tables.
        form: what the programs take that they are for.
        missing: whether entries may be.
        sparse: whether sparse matrices stay what they are, as `SparseMatrix`.

    Raises:
        TypeError: there is something else among them, such as text or a sparse tensor.
        ValueError: there is none, a number is not finite, or the first dimensions or the labels of
            rows differ.
    """
    items = items_of(data)
    expect(items, name, "at least one tensor or array", "none")
    check_aligned(**with_numbers(name, items))
    form = form or Form()
    dtype = form.dtype or torch.get_default_dtype()
    tensors = tuple(
        SparseMatrix(name, item, dtype)
        if sparse and is_sparse(item)
        else _as_tensor(name, item, form, position, missing=missing)
        for position, item in enumerate(items)
    )
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    expect(len(lengths) == 1, name, "equal first dimensions", sorted(lengths))
    return tensors


def items_of(data: Any) -> tuple[Any, ...]:
    """The arguments that data are: those of a tuple or a list, unless it is one of numbers."""
    several = isinstance(data, (tuple, list)) and not _is_nested(data)
    return tuple(data) if several else (data,)


def _is_nested(data: Any) -> bool:
    """Whether a list is one of numbers, or of such lists, and not one of arrays and tables."""
    return len(data) > 0 and all(
        isinstance(each, (int, float, np.number))
        or (isinstance(each, (tuple, list)) and _is_nested(each))
        for each in data
    )


def real_numbers(
    name: str,
    values: Any,
    *,
    missing: bool = True,
    schema: Schema | None = None,
) -> Tensor:
    """Real numbers as a tensor, NaN where an entry is missing; see `check_real`.

    A table of pandas may have columns of categories, which become their codes.

    Args:
        name: of the argument, for the messages.
        values: an array, a list, or a table or column.
        missing: whether entries may be.
        schema: the columns and categories that are known; a table may have them in another order.

    Raises:
        TypeError: there is something else among them.
        ValueError: entries are masked that may not be missing, a column or a category is not known,
            or a sparse matrix is too large to be made dense.
    """
    known = {} if schema is None else schema.categories
    if is_sparse(values):
        values = as_dense(name, values)
    elif _is_frame(values):
        keys = {str(key): key for key in values.columns}
        names = [*map(str, values.columns)]
        expect(len(keys) == len(names), name, "columns of names that differ", names)
        if schema is not None and schema.columns is not None:
            wanted = f"the columns {list(schema.columns)}, as in training"
            same = len(keys) == len(values.columns) and {*keys} == {*schema.columns}
            expect(same, name, wanted, list(keys))
            keys = {column: keys[column] for column in schema.columns}
        columns = [
            _column(name, f" in column {key!r}", values[key], known.get(word))
            for word, key in keys.items()
        ]
        values = np.column_stack(columns) if columns else np.empty((len(values), 0))
    elif hasattr(values, "cat") or type(values).__name__ == "Series":
        values = _column(name, "", values, known.get(""))
    # of an array that can only be read, such as a map, which may be larger than the memory
    return check_real(name, values, writable=False, missing=missing)


def _is_frame(item: Any) -> bool:
    """Whether something is a table of pandas, which is not imported for it."""
    return type(item).__module__.split(".")[0] == "pandas" and hasattr(item, "columns")


def _column(name: str, where: str, column: Any, known: Sequence[Any] | None = None) -> Any:
    """A column of a table as floating numbers; `known` are its categories by their codes."""
    if hasattr(column, "cat"):
        if known is not None:
            new = (~column.isin(list(known)) & column.notna()).to_numpy()
            got = f"{column[new].iloc[0]!r} in row {new.argmax()}" if new.any() else ""
            expect(not new.any(), name, f"categories of {list(known)}{where}", got)
            column = column.cat.set_categories(list(known))
        codes = column.cat.codes.to_numpy()
        return np.where(codes < 0, np.nan, codes)
    wanted = f"numbers, categories by astype('category') or astype('boolean'),{where}".rstrip(",")
    expect(getattr(column.dtype, "kind", "O") in "biuf", name, wanted, column.dtype, TypeError)
    return column.to_numpy(dtype=float, na_value=np.nan)


def _as_tensor(name: str, item: Any, form: Form, position: int, *, missing: bool) -> Tensor:
    kinds = "tensors, arrays of numbers, tables of pandas, a Dataset or a DataLoader"
    numbers = not isinstance(item, np.ndarray) or item.dtype.kind in "biufO"
    listed = isinstance(item, (tuple, list)) and _is_nested(item)
    known = isinstance(item, Tensor) or hasattr(item, "__array__") or _is_frame(item) or listed
    known = known or is_sparse(item)
    got = f"{getattr(item, 'dtype', '')} {type(item).__name__}"
    expect(known and numbers, name, kinds, got, TypeError)
    chosen = isinstance(item, Tensor)  # its dtype
    if not chosen:
        item = real_numbers(name, item, missing=missing, schema=form.schema(position))
    elif not item.is_complex():  # which a model may take, but not observe
        check_real(name, item)
    if not (item.is_floating_point() or item.is_complex()):
        if not form.is_real(position):
            return item
        item, chosen = item.to(form.dtype or torch.get_default_dtype()), False
    _check_finite(name, item, missing=missing)
    if not item.is_complex():
        cast = _cast(item, form, chosen=chosen)
        wanted = f"numbers that {cast.dtype} can hold"
        lost = 0
        if cast is not item:
            pairs = zip(_blocks(cast), _blocks(item), strict=True)
            lost = sum(int((torch.isinf(c) & ~torch.isinf(i)).sum()) for c, i in pairs)
        expect(not lost, name, wanted, f"{lost} that it cannot")
        if chosen and cast is not item and form.warns:
            words = f"{name}: {item.dtype} is cast to {cast.dtype}, that of the parameters"
            warnings.warn(words, stacklevel=stacklevel())
        item = cast
    return item.detach() if item.requires_grad else item


def _cast(item: Tensor, form: Form, *, chosen: bool) -> Tensor:
    """Floating numbers in the dtype of the parameters; without any, only those of no choice."""
    if form.dtype is None:
        return item if chosen else item.to(torch.get_default_dtype())
    return item.to(form.dtype)


def _check_finite(name: str, item: Tensor, *, missing: bool) -> None:
    """Raises a ValueError if a number is infinite, or NaN where it may not be."""
    open_to = missing and not item.is_complex()
    bad = sum(
        int((torch.isinf(block) if open_to else ~torch.isfinite(block)).sum())
        for block in _blocks(item)
    )
    wanted = "finite numbers, or NaN" if open_to else "finite numbers"
    kind = "infinite" if open_to else "NaN or infinite"
    expect(not bad, name, wanted, f"{bad} that are {kind}")


def _blocks(values: Tensor) -> Sequence[Tensor]:
    """Blocks of rows: what is asked of each number of a memory map must not fill the memory."""
    rows = _BLOCK * max(len(values), 1) // max(values.numel(), 1) if values.dim() else 0
    return values.split(max(rows, 1)) if values.dim() else [values]


def has_missing(values: Iterable[Any]) -> bool:
    """Whether a number among some arguments of a program is NaN."""
    values = list(values)
    tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    known = (v for v in tensors if not v.is_meta)
    found = any(bool(torch.isnan(block).any()) for v in known for block in _blocks(v))
    return found or any(v.missing for v in values if isinstance(v, SparseMatrix))


def prepared(
    args: tuple[Any, ...], form: Form | None = None, *, missing: bool = True
) -> tuple[Any, ...]:
    """Turns arrays, tensors and tables among the arguments of a call into non-empty tensors.

    They are moved to the device of the parameters. What is missing, where entries may be, is NaN.
    Arguments of other kinds are returned as they are.

    Args:
        args: the arguments.
        form: what the programs take that they are for.
        missing: whether entries may be.

    Raises:
        TypeError: an array or a table holds something else, or a tensor is not dense.
        ValueError: a number is infinite, or missing where it may not be, a first dimension is zero,
            or tables of as many rows have other labels.
    """
    check_aligned(**with_numbers("args", args))
    form = form or Form()
    ready = []
    for position, arg in enumerate(args):
        array = (hasattr(arg, "__array__") or is_sparse(arg)) and getattr(arg, "ndim", 0) > 0
        listed = isinstance(arg, list) and _is_nested(arg) and form.is_real(position)
        if array or listed:
            arg = _as_tensor("args", arg, form, position, missing=missing)
            expect(len(arg), "args", "at least one datum", "none")
            arg = arg if form.device is None else arg.to(form.device)
        ready.append(arg)
    return tuple(ready)
