"""The rows of a linear regression as they are given: checked, and copied to double precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ppvae._checks import LEAST, MOST, check_array, check_real, expect
from ppvae.data.labels import Names, check_aligned, names_of
from ppvae.regression.priors import Array

Values = ArrayLike | Tensor
# what a row has beside X and y
SIDES = "sds", "offset", "counts"
# the least that each may be as it is given
_LEAST = {"weights": LEAST, "noise": LEAST, "offset": -MOST, "counts": 0.0}


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a regression.

    Args:
        block: the columns of X, after one of ones for an intercept, and y, last.
        names: of the columns of X, or None where they have none.
        sds: the noise sd of each row relative to that of a row of weight one, or None.
        offset: of the linear predictor of each row, or None.
        counts: how many times each row counts, or None.
        labels: of the rows, or None where they came without.
    """

    block: Array
    names: Names = None
    sds: Array | None = None
    offset: Array | None = None
    counts: Array | None = None
    labels: Any = None

    def __len__(self) -> int:
        return len(self.block)

    @property
    def X(self) -> Array:  # noqa: N802
        """The columns, with that of ones, shape `(rows, columns)`."""
        return self.block[:, :-1]

    @property
    def y(self) -> Array:
        """The target, shape `(rows,)`."""
        return self.block[:, -1]

    @property
    def counted(self) -> float | None:
        """The sum of the counts."""
        return None if self.counts is None else math.fsum(self.counts)

    @property
    def log_sds(self) -> Array:
        """Logs of the relative noise sds of the rows, as often as these count, shape `(rows,)`."""
        logs = np.zeros(len(self)) if self.sds is None else np.log(self.sds)
        return logs if self.counts is None else logs * self.counts

    def even(self, part: slice = slice(None)) -> Array:
        """Rows of X and y, last, of one noise sd and without an offset, each of which counts once.

        A row that counts twice is one that is longer by the square root of two.
        """
        block = self.block[part]
        if self.offset is not None:
            block = np.column_stack([block[:, :-1], block[:, -1] - self.offset[part]])
        if self.sds is not None:
            block = block / self.sds[part, None]
        return block if self.counts is None else block * np.sqrt(self.counts[part, None])

    def sides(self) -> dict[str, Array]:
        """What was given beside X and y, by name."""
        given = {"noise_sd": self.sds, "offset": self.offset, "counts": self.counts}
        return {name: side for name, side in given.items() if side is not None}

    def followed_by(self, other: Rows) -> Rows:
        """These rows and then others."""
        sides: dict[str, Array] = {}
        for name in SIDES:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None or theirs is not None:
                plain = 0.0 if name == "offset" else 1.0
                mine = np.full(len(self), plain) if mine is None else mine
                theirs = np.full(len(other), plain) if theirs is None else theirs
                sides[name] = np.concatenate([mine, theirs])
        block = np.vstack([self.block, other.block])
        return Rows(block, self.names or other.names, **sides)


def read_rows(
    X: Any, y: Values | None, *, intercept: bool, **sides: Values | None
) -> Iterator[Rows]:
    """Checks rows, or blocks of them, and yields copies one by one.

    Args:
        X: shape `(rows, columns)`; or, without y, pairs (X, y) of blocks.
        y: shape `(rows,)`, or `(rows, 1)`.
        intercept: put a column of ones before X.
        sides: `weights`, `offset`, `counts` of the rows, and `noise`, their sds, where these are
            known; each of shape `(rows,)` or None. Of blocks they are not asked for.

    Raises:
        TypeError, ValueError: see `factorize`.
    """
    given = {name: side for name, side in sides.items() if side is not None}
    if y is None:
        got = f"{', '.join(given)} beside blocks: factorize each block with its own, and combine"
        expect(not given, "X", "one array of rows and y", got)
    columns = 0
    for number, pair in enumerate(X if y is None else [(X, y)]):
        of = f" of block {number}" if y is None else ""
        kind = type(pair).__name__
        arrays = tuple(pair) if isinstance(pair, Iterable) and kind != "Factor" else ()
        got = f"{kind} as block {number}{' (combine makes one)' * (kind == 'Factor')}"
        expect(len(arrays) == 2, "X", "pairs (X, y) of blocks", got, TypeError)
        labels = check_aligned(of, X=arrays[0], y=arrays[1], **given)
        design = check_array(f"X{of}", arrays[0], ("rows", "columns"))
        given_y = check_real(f"y{of}", arrays[1])
        column = given_y.dim() == 2 and given_y.shape[1] == 1
        target = check_array(f"y{of}", given_y[:, 0] if column else given_y, (len(design),))
        columns = columns if number else design.shape[1]
        expect(columns + intercept, "X", "at least one column", "none")
        expected = f"{columns} columns in every block, as in the first"
        expect(design.shape[1] == columns, "X", expected, f"{design.shape[1]} in block {number}")
        block = np.column_stack([*[np.ones(len(target))] * intercept, design, target])
        yield Rows(block, names_of(arrays[0]), labels=labels, **_sides(len(block), given))


def is_vector(values: Any) -> bool:
    """Whether something is one number for each of several rows."""
    if isinstance(values, Tensor):
        return values.dim() == 1 and len(values) > 1
    if not (isinstance(values, list | tuple) or hasattr(values, "__array__")):
        return False
    try:
        return np.ndim(values) == 1 and len(values) > 1
    except TypeError:  # of what is none although it says so, as a Dataset of xarray
        return False


def _sides(rows: int, given: dict[str, Any]) -> dict[str, Array]:
    """The relative sds, offsets and counts of rows.

    Raises:
        TypeError, ValueError: they are not one number for each row, or one is out of its range.
    """
    sides = {name: check_array(name, values, (rows,)) for name, values in given.items()}
    for name, values in sides.items():
        least = _LEAST[name]
        bad = np.flatnonzero(~((values >= least) & (values <= MOST)))
        wanted = f"a {'positive ' * (least > 0)}number from {least:g} to {MOST:g} for each row"
        got = f"{values[bad[0]]:g} in row {bad[0]}" if len(bad) else ""
        expect(not len(bad), name, wanted, got)
    expect(
        "weights" not in sides or "noise" not in sides,
        "weights",
        "nothing beside the noise sd of each row, which they are made of",
        "both",
    )
    if "weights" in sides:
        sides["sds"] = sides.pop("weights") ** -0.5
    if "noise" in sides:
        sides["sds"] = sides.pop("noise")
    return sides
