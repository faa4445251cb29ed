r"""From the data of a linear regression to coordinates that are independent in the posterior.

The data are reduced to a triangular factor, and that to one singular value decomposition, which
serves every noise and every prior scale. `X'X` is never formed.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import linalg
from torch import Tensor

from ppvae._checks import LEAST, MOST, as_doubles, check_real, expect
from ppvae.regression.priors import Array, NormalPrior

Values = ArrayLike | Tensor
# an array of rows, or pairs (X, y) of blocks of rows
Data = Values | Iterable[tuple[Values, Values]]

_EPSILON = float(np.finfo(float).eps)
_LOG_TWO_PI = math.log(2 * math.pi)
# Rows that are factorized at a time: enough to keep the cores busy, and little memory.
_ROWS = 8192
# Numbers in the largest array of a computation that can be cut into pieces.
_BUDGET = 4_000_000


def pieces(length: int, width: int) -> Iterator[slice]:
    """Cuts `length` rows of `width` numbers into slices whose arrays fit into memory."""
    step = max(1, _BUDGET // max(width, 1))
    return (slice(start, start + step) for start in range(0, length, step))


class Factor(NamedTuple):
    r"""The triangular factor of the data, `Q' [X, y] = R`, which is all that a posterior needs.

    Attributes:
        triangle: R, shape `(min(rows, columns + 1), columns + 1)`; the last column is y's.
        rows: number of rows of X.
        intercept: whether the first column is one of ones.
        data: copies of X (with the column of ones) and of y; None if they came in blocks.
    """

    triangle: Array
    rows: int
    intercept: bool
    data: tuple[Array, Array] | None

    @property
    def columns(self) -> int:
        """The number of columns of X, including the column of ones of an intercept."""
        return self.triangle.shape[1] - 1


def factorize(X: Data, y: Values | None, *, intercept: bool = False) -> Factor:
    r"""Reduces data to their triangular factor, in float64, by Householder QR.

    Blocks are combined as `QR([R; block])`, which is as stable as one QR of all rows and never
    squares the condition number (Golub, Van Loan, *Matrix Computations*, 2013, section 5.2).

    Args:
        X: array of shape `(rows, columns)`, or with `y=None` an iterable of pairs of blocks.
        y: array of shape `(rows,)`.
        intercept: put a column of ones before the columns of X.

    Raises:
        ValueError: shapes do not fit, there are no columns, or a value is not finite.
        TypeError: X is neither an array nor an iterable of pairs, or there are others than real
            numbers, or `intercept` is no bool.
    """
    expect(isinstance(intercept, bool), "intercept", "True or False", repr(intercept), TypeError)
    pairs = y is not None or (isinstance(X, Iterable) and not hasattr(X, "shape"))
    expected = "the target values, or X to be an iterable of pairs (X, y) of blocks"
    expect(pairs, "y", expected, type(X).__name__, TypeError)
    waiting: list[Array] = []  # the triangle of all rows so far, and the rows that follow
    rows = count = 0
    for block in _blocks(X, y, intercept=intercept):
        for start in range(0, len(block) or 1, _ROWS):
            waiting.append(block[start : start + _ROWS])
            count += len(waiting[-1])
            if count >= max(_ROWS, 16 * block.shape[1]):
                waiting, count = [_fold(waiting)], block.shape[1]
        rows += len(block)
    expect(waiting, "X", "at least one block", "none")
    data = None if y is None else (block[:, :-1], block[:, -1])
    return Factor(_fold(waiting), rows, intercept, data)


def _blocks(X: Any, y: Values | None, *, intercept: bool) -> Iterator[Array]:
    """Checks the data and yields new arrays with the columns (ones), X, y, block by block."""
    columns = 0
    for number, pair in enumerate(X if y is None else [(X, y)]):
        name = f"X, y of block {number}" if y is None else "X, y"
        arrays = tuple(pair) if isinstance(pair, Iterable) else ()
        got = f"{type(pair).__name__} as block {number}"
        expect(len(arrays) == 2, "X", "pairs (X, y) of blocks", got, TypeError)
        named = zip(arrays, ("X", "y"), strict=True)
        design, target = (as_doubles(check_real(name, values)) for values, name in named)
        fits = design.ndim == 2 and target.ndim == 1 and len(design) == len(target)
        shapes = f"{design.shape} and {target.shape}"
        expect(fits, name, "shapes (rows, columns) and (rows,)", shapes)
        columns = columns if number else design.shape[1]
        expect(columns + intercept, "X", "at least one column", "none")
        expected = f"{columns} columns in every block, as in the first"
        expect(design.shape[1] == columns, "X", expected, f"{design.shape[1]} in block {number}")
        yield np.column_stack([*[np.ones(len(target))] * intercept, design, target])


def _fold(waiting: list[Array]) -> Array:
    """Computes the triangular factor of all the rows that wait."""
    triangle = torch.linalg.qr(torch.from_numpy(np.vstack(waiting)), mode="r")[1].numpy()
    finite = np.isfinite(triangle).all(0)  # a NaN or infinity in a row comes through
    name = "y" if finite[:-1].all() else "X"
    expect(finite.all(), name, "finite values", "NaN, infinity or an overflow")
    return triangle


class GaussianPosterior(NamedTuple):
    r"""The Gaussian posterior of the weights for any noise sd `s` and prior scale `t`.

    The weights are `w = loc + basis z`. Given s and t the coordinates z are independent in the
    posterior, and their order is: those of the flat prior, with precision `1 / s^2`; those that the
    data see, with precision `S^2 / s^2 + 1 / t^2` for the singular value S; the others, with their
    prior's `1 / t^2`.

    Attributes:
        basis: shape `(weights, weights)`; takes coordinates to weights.
        loc: prior mean, zero for a flat prior, shape `(weights,)`.
        flat: number of coordinates with a flat prior.
        log_singular: logs of the singular values, shape `(seen,)`.
        target: y along the coordinates of the flat prior and those seen, shape `(flat + seen,)`.
        residual: squared distance of y from all of these.
        rows: number of rows of the data.
        log_volume: log determinant of the columns of the flat prior.
        exact_fit: whether y is a linear function of X, up to rounding, with rows to spare.
        log_reference: log of a noise sd; what belongs to the density of y there is kept apart, so
            that the densities near it keep their digits.
    """

    basis: Array
    loc: Array
    flat: int
    log_singular: Array
    target: Array
    residual: float
    rows: int
    log_volume: float
    exact_fit: bool
    log_reference: float

    @property
    def rank(self) -> int:
        """Number of coordinates that the data see."""
        return len(self.target)

    @property
    def log_constant(self) -> float:
        """The constant that `log_evidence` leaves out, in nats."""
        size = (self.flat - self.rows) * (_LOG_TWO_PI / 2 + self.log_reference)
        return size - self.log_volume - self.residual * math.exp(-2 * self.log_reference) / 2

    def log_evidence(self, log_noise: Array, log_scale: Array) -> Array:
        r"""Computes log p(y | s, t) less `log_constant`, in nats; a flat density counts as one.

        .. math:: -(N - F) \log s - \tfrac12 \sum_j \log(1 + S_j^2 t^2 / s^2)
            - \tfrac1{2 s^2} \Big(r^2 + \sum_j \frac{c_j^2}{1 + S_j^2 t^2 / s^2}\Big)

        with N rows, F flat weights, c the target along the coordinates and r its distance.

        Args:
            log_noise: logs of the noise sd, shape `(k,)`.
            log_scale: logs of the prior scale, shape `(k,)`.
        """
        total = np.empty(len(log_noise))
        unit = np.exp(-2 * self.log_reference)
        for part in pieces(len(total), len(self.log_singular)):
            away = log_noise[part] - self.log_reference
            log_volume, misfit = self._of_ratio(log_scale[part] - log_noise[part])
            power = np.minimum(-2 * away, 700.0)
            with np.errstate(over="ignore"):
                misfit = np.exp(power) * misfit + np.expm1(power) * self.residual
            total[part] = (self.flat - self.rows) * away - log_volume - unit * misfit / 2
        return total

    def best_noise(self, log_ratio: Array) -> tuple[Array, Array]:
        """Finds the noise that makes y most probable, for given logs of `t / s`.

        Returns its logs and the values of `log_evidence`. With the ratio fixed, log p(y) is
        `-(N - F) log s - q / (2 s^2)`: highest at `s^2 = q / (N - F)`.
        """
        misfit = self._of_ratio(log_ratio)[1] + self.residual
        log_noise = np.log(misfit / (self.rows - self.flat)) / 2
        return log_noise, self.log_evidence(log_noise, log_noise + log_ratio)

    def _of_ratio(self, log_ratio: Array) -> tuple[Array, Array]:
        """Computes the two sums over j of `log_evidence`."""
        shrink = np.logaddexp(0, 2 * (self.log_singular + log_ratio[:, None]))
        return shrink.sum(-1) / 2, np.exp(-shrink) @ self.target[self.flat :] ** 2

    def coordinates(self, log_noise: Array, log_scale: Array) -> tuple[Array, Array]:
        """Computes posterior means and variances of the coordinates, each `(k, weights)`."""
        u, v = log_noise[:, None], log_scale[:, None]
        flat, unseen = np.ones(self.flat), np.ones(len(self.loc) - self.rank)
        shrink = np.logaddexp(0, 2 * (self.log_singular + v - u))
        along = self.target[self.flat :] * np.exp(self.log_singular + 2 * (v - u) - shrink)
        means = [0 * u + self.target[: self.flat], along, 0 * v * unseen]
        variances = [np.exp(2 * u) * flat, np.exp(2 * v - shrink), np.exp(2 * v) * unseen]
        return np.hstack(means), np.hstack(variances)


def decompose(factor: Factor, prior: NormalPrior) -> GaussianPosterior:
    r"""Finds the coordinates in which the posterior of the weights is independent.

    With the triangular factor `[R11, R12; 0, R22]` of the columns, those of the flat prior first,
    and the prior sds D of the others, this is one singular value decomposition `R22 D = U S V'`.
    A QR with pivoting before it makes small singular values of badly scaled columns accurate, not
    just relative to the largest (Drmac, Veselic, *New fast and accurate Jacobi SVD algorithm*,
    2008), and tells how many are not rounding.

    Args:
        factor: the data.
        prior: location and sd of the weights that have a prior: the last ones.

    Raises:
        ValueError: the flat prior is not made proper by the data, or numbers are so large or small
            that their squares are none.
    """
    size, rows, sds = factor.columns, factor.rows, prior[1]
    flat = size - len(sds)
    loc = np.append(np.zeros(flat), prior[0])
    sizes = np.abs(factor.triangle).max(0, initial=0.0)
    name = "X" if (sizes[:size] > MOST).any() else "y"
    expect((sizes <= MOST).all(), name, f"numbers of a size of {MOST} at most", sizes.max())
    seen = sizes[:flat][sizes[:flat] > 0].min(initial=1.0)
    expect(
        seen >= LEAST, "X", f"columns of a size of {LEAST} at least where the prior is flat", seen
    )
    triangle, spare = factor.triangle[:size, :size], factor.triangle[size:, size]
    target = factor.triangle[:size, size] - triangle @ loc
    far = np.abs(target).max(initial=0.0)
    expect(far <= MOST, "y", f"a distance from the prior mean of {MOST} at most", far)
    rounding = 10 * _EPSILON * math.sqrt(max(rows, size))
    lengths = np.maximum(np.linalg.norm(triangle, axis=0), 1e-300)
    rank = np.linalg.matrix_rank(triangle[:, :flat] / lengths[:flat], rounding)
    expected = f"a Normal prior, or {flat} independent columns (an intercept counts as one)"
    got = f"an improper posterior: only {rank} in {rows} rows (constants repeat an intercept)"
    expect(rank == flat, "weight", expected, got)
    inverse = linalg.solve_triangular(triangle[:flat, :flat], np.eye(flat))
    left, singular, right = _singular(triangle[flat:, flat:] * sds, lengths[flat:] * sds * rounding)
    right *= sds[:, None]
    across = -inverse @ (triangle[:flat, flat:] @ right)
    along = left.T @ target[flat:]
    away = np.concatenate([target[flat:] - left @ along, spare])
    residual, length = float(away @ away), float(target @ target + spare @ spare)
    free = rows - flat - len(singular)
    # of the order of the residuals, and not below what is rounding
    most = length / max(rows, 1)
    variance = max(residual / free, 1e-16 * most) if free else most
    return GaussianPosterior(
        basis=np.block([[inverse, across], [np.zeros((size - flat, flat)), right]]),
        loc=loc,
        flat=flat,
        log_singular=np.log(singular),
        target=np.concatenate([target[:flat], along]),
        residual=residual,
        rows=rows,
        log_volume=float(np.log(np.abs(np.diag(triangle)[:flat])).sum()),
        exact_fit=free > 0 and residual <= (10 * _EPSILON) ** 2 * rows * length,
        log_reference=math.log(variance or 1.0) / 2,
    )


def _singular(columns: Array, rounding: Array) -> tuple[Array, Array, Array]:
    """Computes the singular values that are not rounding, with their left vectors.

    Their number is that of the columns whose part independent of the others exceeds their rounding.
    All right vectors are returned, those of these singular values first.
    """
    if not columns.size:
        return np.zeros((len(columns), 0)), np.zeros(0), np.eye(columns.shape[1])
    left, root, order = linalg.qr(columns, mode="economic", pivoting=True)
    count = int((np.abs(np.diag(root)) > rounding[order[: len(root)]]).sum())
    vectors, singular, turn = np.linalg.svd(root.T)
    right = np.empty_like(vectors)
    right[order] = vectors
    return left @ turn[:count].T, singular[:count], right
