r"""The triangular factor of the data, from arrays or from a stream of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

# Rows that are factorized at a time: enough to keep the cores busy, and little memory.
_ROWS = 8192


class Factor(NamedTuple):
    r"""What a linear regression needs of its data: `Q' [X, y] = R`, with no need of Q.

    Attributes:
        triangle: R, shape `(min(rows, columns + 1), columns + 1)`; the last column is y's.
        rows: number of rows of X.
        design: X, with a column of ones first if there is an intercept; None for a stream.
        target: y; None for a stream.
    """

    triangle: np.ndarray
    rows: int
    design: np.ndarray | None
    target: np.ndarray | None

    @property
    def columns(self) -> int:
        """The number of columns of X, a column of ones among them."""
        return self.triangle.shape[1] - 1


def factorize(X: Any, y: Any, *, intercept: bool = False) -> Factor:
    r"""Reduces data to their triangular factor, in float64, by Householder QR.

    Blocks are combined as `QR([R; block])`, which is as stable as one QR of all rows and never
    squares the condition number (Golub, Van Loan, *Matrix Computations*, 2013, section 5.2).

    Args:
        X: array of shape `(rows, columns)`, or with `y=None` an iterable of pairs of blocks.
        y: array of shape `(rows,)`.
        intercept: put a column of ones before the columns of X.

    Raises:
        ValueError: shapes do not fit, there are no columns, or a value is not finite.
        TypeError: X is neither an array nor an iterable of pairs.
    """
    if y is not None:
        design, target = _block(X, y, "X, y")
        if intercept:
            design = np.column_stack([np.ones(len(target)), design])
        triangle, rows = _reduce(iter([(design, target)]), intercept=False)
        return Factor(triangle, rows, design, target)
    if hasattr(X, "shape") or not isinstance(X, Iterable):
        raise TypeError(
            "y: expected the target values; it may be left out only where X is an iterable of "
            f"pairs (X, y) of blocks, got {type(X).__name__}"
        )
    return Factor(*_reduce(_blocks(X), intercept=intercept), None, None)


def _blocks(pairs: Iterable[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for number, pair in enumerate(pairs):
        try:
            X, y = pair
        except (TypeError, ValueError):
            raise TypeError(
                f"X: expected pairs (X, y) of blocks, got {type(pair).__name__} as block {number}"
            ) from None
        yield _block(X, y, f"X, y of block {number}")


def _block(X: Any, y: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    design, target = _array(X, name), _array(y, name)
    if design.ndim != 2 or target.ndim != 1 or len(design) != len(target):
        raise ValueError(
            f"{name}: expected shapes (rows, columns) and (rows,), got {design.shape} and "
            f"{target.shape}"
        )
    return design, target


def _array(values: Any, name: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected numbers, got {type(values).__name__}: {error}") from None


def _reduce(
    blocks: Iterator[tuple[np.ndarray, np.ndarray]], *, intercept: bool
) -> tuple[np.ndarray, int]:
    """Folds the rows into a triangle; the buffer holds it above the rows that are to come."""
    buffer = np.zeros((0, 0))
    size = rows = filled = 0
    for number, (design, target) in enumerate(blocks):
        if number == 0:
            size = design.shape[1] + intercept + 1
            if size == 1:
                raise ValueError("X: expected at least one column, got none")
            buffer = np.empty((size + max(_ROWS, 16 * size), size))
        elif design.shape[1] + intercept + 1 != size:
            raise ValueError(
                f"X: expected {size - 1 - intercept} columns in every block, as in the first, got "
                f"{design.shape[1]} in block {number}"
            )
        start = 0
        while start < len(target):
            count = min(len(target) - start, len(buffer) - filled)
            rows_here = buffer[filled : filled + count]
            rows_here[:, 0] = 1.0
            rows_here[:, intercept:-1] = design[start : start + count]
            rows_here[:, -1] = target[start : start + count]
            filled, start = filled + count, start + count
            if filled == len(buffer):
                filled = _fold(buffer, filled)
        rows += len(target)
    if size == 0:
        raise ValueError("X: expected at least one block, got none")
    filled = _fold(buffer, filled)
    return buffer[:filled].copy(), rows


def _fold(buffer: np.ndarray, filled: int) -> int:
    """Puts the triangle of the filled rows in their place."""
    triangle = torch.linalg.qr(torch.from_numpy(buffer[:filled]), mode="r")[1].numpy()
    finite = np.isfinite(triangle).all(0)  # a NaN or infinity in a row comes through
    if not finite.all():
        name = "X" if not finite[:-1].all() else "y"
        raise ValueError(f"{name}: expected finite values, got NaN, infinity or an overflow")
    buffer[: len(triangle)] = triangle
    return len(triangle)
