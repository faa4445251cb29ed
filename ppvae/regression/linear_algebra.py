r"""From the factor of the data to coordinates that are independent in the posterior.

One singular value decomposition of the triangle serves every noise and every prior scale.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import linalg

from ppvae._checks import LEAST, MOST, expect
from ppvae.regression.factors import Factor
from ppvae.regression.priors import Array, NormalPrior

_EPSILON = float(np.finfo(float).eps)
_LOG_TWO_PI = math.log(2 * math.pi)
# Numbers in the largest array of a computation that can be cut into pieces.
_BUDGET = 4_000_000
# Share of a square below which a difference has lost digits.
_DIGITS = 1e-4


def pieces(length: int, width: int) -> Iterator[slice]:
    """Cuts `length` rows of `width` numbers into slices whose arrays fit into memory."""
    step = max(1, _BUDGET // max(width, 1))
    return (slice(start, start + step) for start in range(0, length, step))


class GaussianPosterior(NamedTuple):
    r"""The Gaussian posterior of the weights for any noise sd `s` and prior scale `t`.

    The weights are `w = loc + basis z + rest`. Given s and t the coordinates z are independent in
    the posterior, and their order is: those of the flat prior, with precision `1 / s^2`; those that
    the data see, with precision `S^2 / s^2 + 1 / t^2` for the singular value S. The rest is what
    the data do not see, and as in the prior (`unseen`). Where the prior is relative to the noise,
    its scale is `s t` instead of t.

    No matrix is larger than `(weights, rank)`, so that more columns than rows cost little.

    Attributes:
        basis: shape `(weights, rank)`; takes coordinates to weights.
        loc: prior mean, zero for a flat prior, shape `(weights,)`.
        prior: of the weights that have one; they come last.
        cross: what those of the flat prior lose with each of the others, `(flat, others)`.
        right: orthonormal directions that the data see of the others, in units of their prior,
            shape `(others, seen)`.
        log_singular: logs of the singular values, shape `(seen,)`.
        target: y along the coordinates of the flat prior and those seen, shape `(rank,)`.
        residual: squared distance of y from all of these.
        rows: number of rows of the data that count.
        log_volume: log determinant of the columns of the flat prior, and of the rows' noise sds.
        exact_fit: by what power of the noise its density rises towards zero, as y is a linear
            function of X up to rounding, with rows to spare; minus infinity where y is none.
        log_reference: log of a noise sd; what belongs to the density of y there is kept apart, so
            that the densities near it keep their digits.
    """

    basis: Array
    loc: Array
    prior: NormalPrior
    cross: Array
    right: Array
    log_singular: Array
    target: Array
    residual: float
    rows: float
    log_volume: float
    exact_fit: float
    log_reference: float

    @property
    def flat(self) -> int:
        """Number of coordinates with a flat prior."""
        return len(self.cross)

    @property
    def rank(self) -> int:
        """Number of coordinates that the data see."""
        return len(self.target)

    @property
    def whole(self) -> bool:
        """Whether the data see all directions of the weights."""
        return self.rank == len(self.loc)

    @property
    def log_constant(self) -> float:
        """The constant that `log_evidence` leaves out, in nats."""
        size = (self.flat - self.rows) * (_LOG_TWO_PI / 2 + self.log_reference)
        return size - self.log_volume - self.residual * math.exp(-2 * self.log_reference) / 2

    def log_ratio(self, log_noise: Array, log_scale: Array) -> Array:
        """The log of the sd of the prior over that of the noise."""
        return log_scale if self.prior.relative else log_scale - log_noise

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
            log_volume, misfit = self._of_ratio(self.log_ratio(log_noise[part], log_scale[part]))
            power = np.minimum(-2 * away, 700.0)
            with np.errstate(over="ignore"):
                misfit = np.exp(power) * misfit + np.expm1(power) * self.residual
            total[part] = (self.flat - self.rows) * away - log_volume - unit * misfit / 2
        return total

    def best_noise(self, log_ratio: Array) -> tuple[Array, Array]:
        """Finds the noise that makes y most probable, for given logs of prior over noise.

        Returns its logs and the values of `log_evidence`. With the ratio fixed, log p(y) is
        `-(N - F) log s - q / (2 s^2)`: highest at `s^2 = q / (N - F)`.
        """
        misfit = self._of_ratio(log_ratio)[1] + self.residual
        log_noise = np.log(misfit / (self.rows - self.flat)) / 2
        return log_noise, self.log_evidence(log_noise, self.log_scale(log_noise, log_ratio))

    def log_scale(self, log_noise: Array, log_ratio: Array) -> Array:
        """The log of the prior scale, of that of prior over noise."""
        return log_ratio if self.prior.relative else log_ratio + log_noise

    def _of_ratio(self, log_ratio: Array) -> tuple[Array, Array]:
        """Computes the two sums over j of `log_evidence`."""
        shrink = np.logaddexp(0, 2 * (self.log_singular + log_ratio[:, None]))
        return shrink.sum(-1) / 2, np.exp(-shrink) @ self.target[self.flat :] ** 2

    def prior_share(self, log_noise: Array, log_scale: Array) -> Array:
        """What the prior has of the posterior precision of each that is seen, `(k, seen)`."""
        v = self.log_ratio(log_noise, log_scale)[:, None]
        return np.exp(-np.logaddexp(0, 2 * (self.log_singular + v)))

    def coordinates(self, log_noise: Array, log_scale: Array) -> tuple[Array, Array]:
        """Computes posterior means and variances of the coordinates, each `(k, rank)`."""
        u, v = log_noise[:, None], self.log_ratio(log_noise, log_scale)[:, None]
        shrink = np.logaddexp(0, 2 * (self.log_singular + v))
        along = self.target[self.flat :] * np.exp(self.log_singular + 2 * v - shrink)
        means = [0 * u + self.target[: self.flat], along]
        variances = [np.exp(2 * u) * np.ones(self.flat), np.exp(2 * (u + v) - shrink)]
        return np.hstack(means), np.hstack(variances)

    def log_prior(self, log_noise: Array, log_scale: Array) -> Array:
        """The log of the sd, in the units of the prior, of the directions that are unseen."""
        return log_scale + log_noise if self.prior.relative else log_scale

    def in_prior(self, rows: Array) -> Array:
        """What rows, `(k, weights)`, say of the weights with a prior in its units, `(k, others)`.

        Those of the flat prior follow the others as the data ask.
        """
        return self.prior.times(rows[:, self.flat :] - rows[:, : self.flat] @ self.cross)

    def unseen(self, rows: Array) -> Array:
        """The part of rows `(k, weights)` that no data see, in the prior's units, `(k, others)`."""
        inner = self.in_prior(rows)
        return inner - (inner @ self.right) @ self.right.T

    def unseen_draws(self, normals: Array) -> Array:
        """Draws `(k, weights)` along what no data see, from normals `(k, others)`."""
        inner = normals - (normals @ self.right) @ self.right.T
        others = self.prior.turned(inner.T).T
        return np.hstack([-others @ self.cross.T, others])

    def unseen_squares(self, rows: Array) -> Array:
        """Squared lengths of the unseen part of each row, shape `(k,)`."""
        if self.whole:
            return np.zeros(len(rows))
        parts = (self.unseen(rows[part]) for part in pieces(len(rows), len(self.right)))
        return np.concatenate([(part**2).sum(1) for part in parts])

    def unseen_weights(self) -> Array:
        """Squared lengths of the unseen part of each weight, in the prior's units, `(weights,)`.

        It is all less what is seen, but where that leaves few digits.
        """
        if self.whole:
            return np.zeros(len(self.loc))
        squares = np.append((self.prior.times(-self.cross) ** 2).sum(1), self.prior.variances)
        left = squares - (self.basis[:, self.flat :] ** 2).sum(1)
        few = np.flatnonzero(left < _DIGITS * squares)
        for part in pieces(len(few), len(self.loc)):
            rows = np.zeros((len(few[part]), len(self.loc)))
            rows[np.arange(len(rows)), few[part]] = 1.0
            left[few[part]] = self.unseen_squares(rows)
        return left


def decompose(factor: Factor, prior: NormalPrior) -> GaussianPosterior:
    r"""Finds the coordinates in which the posterior of the weights is independent.

    With the triangular factor `[R11, R12; 0, R22]` of the columns, those of the flat prior first,
    and the prior covariance `D D'` of the others, this is one singular value decomposition
    `R22 D = U S V'`. A QR with pivoting before it makes small singular values of badly scaled
    columns accurate, not just relative to the largest (Drmac, Veselic, *New fast and accurate
    Jacobi SVD algorithm*, 2008), and tells how many are not rounding.

    Args:
        factor: the data.
        prior: of the weights that have one: the last ones.

    Raises:
        ValueError: the flat prior is not made proper by the data, or numbers are so large or small
            that their squares are none.
    """
    size, rows = factor.columns, factor.rows
    flat = size - len(prior.loc)
    loc = np.append(np.zeros(flat), prior.loc)
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
    cross = inverse @ triangle[:flat, flat:]
    longest = prior.longest(lengths[flat:]) * rounding
    left, singular, right = _singular(prior.times(triangle[flat:, flat:]), longest)
    turned = prior.turned(right)
    along = left.T @ target[flat:]
    away = np.concatenate([target[flat:] - left @ along, spare])
    # nothing is left beside as many coordinates as rows, but rounding
    residual = float(away @ away) if rows > flat + len(singular) else 0.0
    length = float(target @ target + spare @ spare)
    free = factor.total - flat - len(singular)
    # of the order of the residuals, and not below what is rounding
    most = length / max(factor.total, 1)
    variance = max(residual / free, 1e-16 * most) if free > 0 else most
    fits, power = free > 0 and residual <= (10 * _EPSILON) ** 2 * rows * length, free
    if prior.relative:  # which shrinks the weights by the same factor at any noise
        fits = fits and bool(along @ along <= (10 * _EPSILON) ** 2 * rows * length)
        power = factor.total - flat
    return GaussianPosterior(
        basis=np.block([[inverse, -cross @ turned], [np.zeros((size - flat, flat)), turned]]),
        loc=loc,
        prior=prior,
        cross=cross,
        right=right,
        log_singular=np.log(singular),
        target=np.concatenate([target[:flat], along]),
        residual=residual,
        rows=factor.total,
        log_volume=float(np.log(np.abs(np.diag(triangle)[:flat])).sum()) + factor.log_sds,
        exact_fit=power if fits else -math.inf,
        log_reference=math.log(variance or 1.0) / 2,
    )


def _singular(columns: Array, rounding: Array) -> tuple[Array, Array, Array]:
    """Computes the singular values that are not rounding, with their left and right vectors.

    Their number is that of the columns whose part independent of the others exceeds their rounding.
    """
    if not columns.size:
        return np.zeros((len(columns), 0)), np.zeros(0), np.zeros((columns.shape[1], 0))
    left, root, order = linalg.qr(columns, mode="economic", pivoting=True)
    count = int((np.abs(np.diag(root)) > rounding[order[: len(root)]]).sum())
    vectors, singular, turn = np.linalg.svd(root.T, full_matrices=False)
    right = np.empty_like(vectors)
    right[order] = vectors
    return left @ turn[:count].T, singular[:count], right[:, :count]
