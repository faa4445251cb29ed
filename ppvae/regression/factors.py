r"""The data of a linear regression, reduced to a small triangle block by block.

`X'X` is never formed. Factors of blocks are combined in any order and on any machine, and what a
posterior computes from them is that of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ppvae._checks import MOST, check_array, check_flag, check_names, expect
from ppvae.data.labels import Names, check_columns
from ppvae.regression.priors import Array
from ppvae.regression.rows import Rows, Values, read_rows

# an array of rows, or pairs (X, y) of blocks of rows
Data = Values | Iterable[tuple[Values, Values]]

# Rows that are factorized at a time: enough to keep the cores busy, and little memory.
_ROWS = 8192


class Factor(NamedTuple):
    r"""The triangular factor of rows, `Q' [X, y] = R`, which is all that a posterior needs of them.

    Plain data of `(columns + 1)^2` numbers at most: pickle it, send it, `torch.save` it (and load
    it with `weights_only=False`). `factorize` makes it.

    Attributes:
        triangle: R, shape `(min(rows, columns + 1), columns + 1)`, with no number on its diagonal
            below zero; the last column is y's.
        rows: number of rows of X.
        intercept: whether the first column is one of ones.
        names: of the columns of X, or None where they have none.
        log_sds: the sum over all rows of the logs of their noise sds, relative to that of a row of
            weight one, by which the rows are divided.
        counted: the sum of the counts of the rows, or None where each counts once.
    """

    triangle: Array
    rows: int
    intercept: bool = False
    names: Names = None
    log_sds: float = 0.0
    counted: float | None = None

    def __repr__(self) -> str:
        ones = " (the first of ones)" if self.intercept else ""
        return f"Factor of {self.rows} rows, {self.columns} columns{ones}"

    @property
    def columns(self) -> int:
        """The number of columns of X, including the column of ones of an intercept."""
        return self.triangle.shape[1] - 1

    @property
    def total(self) -> float:
        """How many rows there are, as often as they count."""
        return self.rows if self.counted is None else self.counted

    @property
    def spreads(self) -> Array:
        """Sds of the columns of X and of y, last, shape `(columns + 1,)`.

        About the means where there is an intercept, whose own is zero, else about zero.
        """
        largest = np.abs(self.triangle).max(0, initial=0.0)  # whose square may be no number
        largest = np.where(largest > 0, largest, 1.0)
        away = self.triangle[int(self.intercept) :] / largest
        sizes: Array = np.linalg.norm(away, axis=0)
        return sizes / math.sqrt(self.total or 1.0) * largest

    def followed_by(self, row: Array, log_sd: float) -> Factor:
        """With one more row of X and y, shape `(1, columns + 1)`, divided by its noise sd."""
        counted = None if self.counted is None else self.counted + 1
        triangle, log_sds = triangle_of(self.triangle, row), self.log_sds + log_sd
        rows = self.rows + 1
        return self._replace(triangle=triangle, rows=rows, log_sds=log_sds, counted=counted)


# what a posterior is made of
Given = Data | Factor


def factorize(
    X: Data,
    y: Values | None = None,
    *,
    intercept: bool = False,
    names: Sequence[str] | None = None,
    weights: Values | None = None,
    offset: Values | None = None,
    counts: Values | None = None,
) -> Factor:
    r"""Reduces rows to their triangular factor, in float64, by Householder QR.

    Blocks are combined as `QR([R; block])`, which is as stable as one QR of all rows and never
    squares the condition number.

    Args:
        X: array of shape `(rows, columns)`; or, without y, an iterable of pairs of blocks,
            `(rows, columns)` and `(rows,)`, of which only one is held at a time.
        y: array of shape `(rows,)`.
        intercept: put a column of ones before the columns of X.
        names: of the columns of X; those of a table by default.
        weights: of the rows, shape `(rows,)`: the noise variance of row i is `s^2 / weights_i`.
        offset: what is known of the mean of each row, shape `(rows,)`.
        counts: how many times each row counts, shape `(rows,)`, which need not be whole numbers.

    Raises:
        TypeError: X is neither an array nor an iterable of pairs, or there are others than real
            numbers, or `intercept` is no bool.
        ValueError: shapes or labels of rows do not fit, there are no rows or columns, a value is
            not finite, a weight is not positive or a count negative, or there are such numbers
            beside blocks.

    Reference:
        Golub, Van Loan, *Matrix Computations*, 2013, section 5.2; Demmel et al., *Communication-
        optimal parallel and sequential QR and LU factorizations*, 2012.

    Example:
        >>> factorize([[1.0], [2.0], [2.0]], [1.0, 2.0, 2.0])
        Factor of 3 rows, 1 columns
    """
    expect(not isinstance(X, Factor), "X", "rows", "a Factor", TypeError)
    sides = {"weights": weights, "offset": offset, "counts": counts}
    factor, _ = read(X, y, intercept=intercept, **sides)
    expect(factor.rows, "X", "at least one row", "none: such a block adds nothing, leave it out")
    if names is None:
        return factor
    return factor._replace(names=tuple(check_names("names", names, factor.columns - intercept)))


def combine(factors: Iterable[Factor]) -> Factor:
    r"""Makes one factor of those of blocks of rows: the factor of all of them.

    In any order and grouping (`combine([combine(some), combine(others)])`) the triangle is the same
    but for rounding. What that does to a posterior grows with the condition number of the columns,
    each scaled to length one: means and sds are equal to about `1e-15` times it. Of columns that
    are nearly equal the poorly known difference of the weights moves, and by little of its sd.

    Args:
        factors: at least one, of the same columns.

    Raises:
        TypeError: one is no `Factor`, or its triangle is not in float64.
        ValueError: there are none, or they differ in their columns, their names or whether they
            have an intercept, or a number is not finite.

    Reference:
        Demmel et al., *Communication-optimal parallel and sequential QR and LU factorizations*,
        2012.

    Example:
        >>> a, b = factorize([[1.0], [2.0]], [1.0, 3.0]), factorize([[3.0]], [2.0])
        >>> combine([a, b])
        Factor of 3 rows, 1 columns
    """
    stack, kept = _Stack(), []
    first: Factor | None = None
    for number, factor in enumerate(each_of("factors", factors, Factor)):
        check_factor(f"factors[{number}]", factor, first)
        first = factor if first is None else first._replace(names=first.names or factor.names)
        stack.add(factor.triangle)
        kept.append((factor.rows, factor.log_sds, factor.counted))
    if first is None:
        raise ValueError("factors: expected at least one, got none")
    return first._replace(triangle=stack.triangle(), **_sums(kept))


def each_of(name: str, values: Any, kind: type) -> Iterator[Any]:
    """Goes through a list, or what is like one, of objects of a kind.

    Raises:
        TypeError: it is one of them, or nothing to go through.
    """
    given: Any = None if isinstance(values, kind) else values
    try:
        return iter(given)
    except TypeError:
        got = type(values).__name__
        raise TypeError(f"{name}: expected a list of them, got {got}") from None


def check_factor(name: str, value: Any, like: Factor | None = None) -> Factor:
    """A factor that is whole, and of the same columns as another.

    Raises:
        TypeError: it is no `Factor`, or its triangle is not in float64.
        ValueError: its triangle is not one of so many rows, is not finite, or its columns differ.
    """
    expect(isinstance(value, Factor), name, "a Factor", type(value).__name__, TypeError)
    kind = getattr(value.triangle, "dtype", type(value.triangle).__name__)
    expect(kind == np.float64, name, "a triangle in float64", kind, TypeError)
    shape = value.triangle.shape
    fits = len(shape) == 2 and shape[1] > 1 and shape[0] == min(value.rows, shape[1])
    expect(fits, name, f"a triangle of {value.rows} rows", f"shape {shape}")
    expect(np.isfinite(value.triangle).all(), name, "finite numbers", "NaN or infinity")
    if like is not None:
        expect(
            value.intercept == like.intercept,
            name,
            "an intercept in all factors or in none",
            f"{value.intercept} after {like.intercept}",
        )
        count = like.columns - like.intercept
        fits = value.columns == like.columns
        expect(fits, name, f"{count} columns, as the others", value.columns - value.intercept)
        check_columns(name, value.names, like.names)
    return value


def read(
    X: Given, y: Values | None, *, intercept: bool, **sides: Values | None
) -> tuple[Factor, Rows | None]:
    """Reduces data to their factor, if they are not one already.

    Args:
        X: see `factorize`, or a factor.
        y: see `factorize`.
        intercept: see `factorize`.
        sides: what a row has beside X and y; see `read_rows`.

    Returns:
        The factor, and a copy of the rows; None if they came in blocks.

    Raises:
        TypeError, ValueError: see `factorize`.
    """
    intercept = check_flag("intercept", intercept)
    if isinstance(X, Factor):
        given = [*["y"] * (y is not None), *(name for name in sides if sides[name] is not None)]
        kind, wanted = "beside a Factor", "nothing beside a Factor, which has it"
        for name in given:
            got = type(y if name == "y" else sides[name]).__name__
            expect(not given, name, wanted, f"{got} {kind}", TypeError)
        told = "nothing where the factor was made without: factorize(X, y, intercept=True)"
        expect(not intercept or X.intercept, "intercept", told, intercept)
        return check_factor("X", X), None
    pairs = y is not None or (isinstance(X, Iterable) and not hasattr(X, "shape"))
    expected = "the target values, or X to be an iterable of pairs (X, y) of blocks"
    expect(pairs, "y", expected, type(X).__name__, TypeError)
    stack, kept = _Stack(), []
    names: Names = None
    for block in read_rows(X, y, intercept=intercept, **sides):
        check_columns("X", block.names, names)
        names = names or block.names
        for start in range(0, len(block) or 1, _ROWS):
            stack.add(block.even(slice(start, start + _ROWS)))
        kept.append((len(block), float(block.log_sds.sum()), block.counted))
    expect(kept, "X", "at least one block", "none")
    factor = Factor(stack.triangle(), intercept=intercept, names=names, **_sums(kept))
    return factor, None if y is None else block


def _sums(kept: list[tuple[int, float, float | None]]) -> dict[str, Any]:
    """What is added up over blocks: rows, logs of their sds, and counts, where there are any."""
    rows, log_sds, counted = zip(*kept, strict=True)
    total = sum(row if count is None else count for row, _, count in kept)
    any_counted = any(count is not None for count in counted)
    return {"rows": sum(rows), "log_sds": sum(log_sds), "counted": total if any_counted else None}


def read_block(X: Values, y: Values | None, like: Factor, **sides: Values | None) -> Rows:
    """A copy of rows that have the columns of a factor and are finite.

    Args:
        X: shape `(rows, columns)`.
        y: shape `(rows,)`; None where there is none, which is as if there were zeros.
        like: the factor.
        sides: see `read_rows`.

    Raises:
        TypeError, ValueError: see `factorize`.
    """
    if y is None:
        y = np.zeros(len(check_array("X", X, ("rows", "columns"))))
    rows = next(read_rows(X, y, intercept=like.intercept, **sides))
    count, got = like.columns - like.intercept, rows.X.shape[1] - like.intercept
    expect(got == count, "X", f"{count} columns, as the factor has", got)
    check_columns("X", rows.names, like.names)
    return rows


class _Stack:
    """The triangle of all rows so far, and the rows that follow and wait to be folded into it."""

    def __init__(self) -> None:
        self.waiting: list[Array] = []
        self.count = 0

    def add(self, block: Array) -> None:
        self.waiting.append(block)
        self.count += len(block)
        if self.count >= max(_ROWS, 16 * block.shape[1]):
            self.waiting, self.count = [_fold(self.waiting)], block.shape[1]

    def triangle(self) -> Array:
        triangle = _fold(self.waiting)
        # R is unique once its diagonal is positive, and so are draws for any split of the rows
        triangle *= np.where(np.diag(triangle) < 0, -1.0, 1.0)[:, None]
        return triangle


def triangle_of(*blocks: Array) -> Array:
    """The triangle of all rows of some blocks, or triangles."""
    stack = _Stack()
    for block in blocks:
        stack.add(block)
    return stack.triangle()


def _fold(waiting: list[Array]) -> Array:
    """Computes the triangular factor of all the rows that wait."""
    triangle = torch.linalg.qr(torch.from_numpy(np.vstack(waiting)), mode="r")[1].numpy()
    finite: Any = np.isfinite(triangle).all(0)
    name = "y" if finite[:-1].all() else "X"
    expect(finite.all(), name, f"numbers of a size of {MOST} at most", "an overflow")
    return triangle
