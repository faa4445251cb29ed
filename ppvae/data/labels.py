"""The labels that rows and columns bring along, by which what does not fit together is refused."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from ppvae._checks import expect

Names = tuple[str | int, ...] | None


def check_aligned(of: str = "", labels: Any = None, /, **given: Any) -> Any:
    """Checks that all that came with labels of its rows has the same ones, in the same order.

    Nothing is put into another order, and of two things with labels none is taken by position.
    Arrays, lists and tensors have no labels, and go by position.

    Args:
        of: words after the names, where there are several things of each.
        labels: those of X, where they are known already.
        **given: arrays and tables with one entry for each row, by name, or None.

    Returns:
        The labels, an `Index` of pandas, or None where nothing has any.

    Raises:
        ValueError: the labels differ.
    """
    first = "X"
    for name, values in given.items():
        own = _labels_of(values, 0)
        if labels is None:
            first, labels = name, own
        # what has another length is refused for that
        elif own is not None and len(own) == len(labels) and not own.equals(labels):
            row = _first_other(own, labels)
            kind = "these in another order" if {*own} == {*labels} else "others"
            got = f"{kind}: row {row} is {own[row]!r:.60} here and {labels[row]!r:.60} there"
            wanted = f"the row labels of {first}{of}, in this order, or an array, which has none"
            raise ValueError(f"{name}{of}: expected {wanted}, got {got}")
    return labels


def with_numbers(name: str, items: Iterable[Any]) -> dict[str, Any]:
    """Things without names of their own, as `check_aligned` takes them: `data[0]`, `data[1]`."""
    return {f"{name}[{number}]": item for number, item in enumerate(items)}


def _first_other(own: Any, labels: Any) -> int:
    """The place of the first label that differs, where one does."""
    ends = range(1, len(own) + 1)
    return bisect_left(ends, 1, key=lambda end: not own[:end].equals(labels[:end]))


def names_of(X: Any) -> Names:
    """The names of the columns of a table, or None where there are none."""
    labels = _labels_of(X, 1)
    names = getattr(X, "columns", ()) if labels is None else labels
    return tuple(name if isinstance(name, str | int) else f"{name}" for name in names) or None


def check_columns(name: str, names: Names, others: Names) -> None:
    """Raises a ValueError unless columns are these others, in this order.

    Columns without names go by position, and so do those that are just numbered beside named ones.
    """
    if names is None or others is None or names == others:
        return
    numbered = any(each == tuple(range(len(each))) for each in (names, others))
    by_position = numbered and {*names} != {*others}
    expect(by_position, name, f"the columns {others}, in this order", names)


def _labels_of(values: Any, axis: int) -> Any:
    """The labels along an axis of what is of pandas or an array of xarray; None without any."""
    if hasattr(values, "iloc"):
        return values.axes[axis] if axis < values.ndim else None
    dims = getattr(values, "dims", None)
    if isinstance(dims, tuple) and axis < len(dims) and hasattr(values, "indexes"):
        return values.indexes.get(dims[axis])
    return None
