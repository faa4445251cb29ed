r"""One decomposition of a linear regression that serves every noise and every prior scale."""

from __future__ import annotations

import numpy as np
from scipy import linalg

from ppvae.regression.factor import Factor

_EPSILON = np.finfo(float).eps
_LOG_TWO_PI = np.log(2 * np.pi)


class Decomposition:
    r"""The Gaussian posterior of the weights for any noise sd `s` and prior scale `t`.

    With R the triangular factor of X and D the prior sds, the precision of the weights is
    `X'X / s^2 + D^-2 / t^2`. At a reference noise and scale it is `T'T`, from the QR decomposition
    of the rows `R / s_ref` and `D^-1 / t_ref`; a cosine-sine decomposition of the two parts of its
    orthogonal factor turns the weights into coordinates `z = basis^-1 (w - loc)` that are
    independent in the posterior for *every* s and t, with precision

    .. math:: f = (s_{ref}/s)^2 \cos^2 + (t_{ref}/t)^2 \sin^2, \qquad \cos^2 + \sin^2 = 1.

    That is the generalized singular value decomposition (Golub, Van Loan, *Matrix Computations*,
    2013, section 6.1.6). X'X is never formed, scales of the columns do not matter, and a flat prior
    is a missing row (cos = 1), as a direction that the data do not see is sin = 1.

    Args:
        factor: the data.
        prior: location and sd of the weights that have a prior; None where all are flat.
        flat: how many weights, the first ones, have a flat prior.
        noise: reference for the noise sd; None takes it from the residuals.
        scale: reference for the prior scale.

    Attributes:
        basis: shape `(weights, weights)`; takes coordinates to weights.
        loc: prior mean, zero for a flat prior, shape `(weights,)`.
        cos2: what the data know of each coordinate at the reference, shape `(weights,)`.
        sin2: what the prior knows.
        rank: number of coordinates that the data see.
        exact_fit: y is a linear function of X, up to rounding, with rows to spare.

    Raises:
        ValueError: the flat prior is not made proper by the data.
    """

    def __init__(
        self,
        factor: Factor,
        prior: tuple[np.ndarray, np.ndarray] | None,
        flat: int,
        *,
        noise: float | None = None,
        scale: float = 1.0,
    ) -> None:
        size = factor.columns
        _check_proper(factor, flat)
        self.rows, self.flat, self.size = factor.rows, flat, size
        self.loc = np.zeros(size)
        sds = np.ones(0)
        if prior is not None:
            self.loc[flat:], sds = prior
        triangle = factor.triangle[:size, :size]
        target = factor.triangle[:size, size] - triangle @ self.loc
        spare = factor.triangle[size:, size]
        self.reference = np.log(noise or _typical_noise(spare, target, factor.rows, size))
        self.scale_reference = np.log(scale)
        s = np.exp(self.reference)
        rows = np.zeros((len(sds), size))
        rows[:, flat:] = np.diag(1 / (sds * scale))
        orthogonal, root = np.linalg.qr(np.vstack([triangle / s, rows]))
        turn, self.cos2, self.sin2, gain = _cosine_sine(orthogonal, len(triangle), target / s)
        self.basis = linalg.solve_triangular(root, turn)
        self._pull, self._explained, unexplained = gain
        self._residual = unexplained + float(spare @ spare) / s**2
        self.rank = int((self.cos2 > 1e-28).sum())
        length = float(target @ target + spare @ spare) / s**2
        rounding = (10 * _EPSILON) ** 2 * max(factor.rows, 1) * length
        # what lies along coordinates that the data do not see cannot be fitted either
        missed = self._residual + float(self._explained[self.cos2 <= 1e-28].sum())
        self.exact_fit = factor.rows > self.rank and missed <= rounding
        self._constant = (
            -factor.rows * (_LOG_TWO_PI / 2 + self.reference)
            + flat * _LOG_TWO_PI / 2
            - np.log(sds * scale).sum()
            - np.log(np.abs(np.diag(root))).sum()
            - self._residual / 2
        )

    def log_evidence(self, log_noise: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
        r"""Log of p(y | s, t), flat densities counting as one, less `constant`.

        Args:
            log_noise: logs of the noise sd, shape `(k,)`.
            log_scale: logs of the prior scale, shape `(k,)`.
        """
        data, prior, precision = self._precision(log_noise, log_scale)
        with np.errstate(over="ignore"):
            misfit = (data * (prior / precision) * self._explained).sum(-1)
            away = np.expm1(2 * (self.reference - log_noise)) * self._residual
            shrink = (self.size - self.flat) * (log_scale - self.scale_reference)
            return (
                -self.rows * (log_noise - self.reference)
                - shrink
                - np.log(precision).sum(-1) / 2
                - (misfit + away) / 2
            )

    @property
    def constant(self) -> float:
        """What `log_evidence` leaves out, so that differences keep their digits."""
        return float(self._constant)

    def coordinates(
        self, log_noise: np.ndarray, log_scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior means and variances of the coordinates, each of shape `(k, weights)`."""
        data, _, precision = self._precision(log_noise, log_scale)
        return data / precision * self._pull, 1 / precision

    def _precision(
        self, log_noise: np.ndarray, log_scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        data = np.exp(2 * (self.reference - np.asarray(log_noise)))[..., None]
        prior = np.exp(2 * (self.scale_reference - np.asarray(log_scale)))[..., None] * self.sin2
        return data, prior, data * self.cos2 + prior


def _typical_noise(spare: np.ndarray, target: np.ndarray, rows: int, size: int) -> float:
    """A noise sd of the order of the residuals, and not below what is rounding."""
    whole = np.sqrt(float(target @ target + spare @ spare) / max(rows, 1))
    left = np.sqrt(float(spare @ spare) / max(rows - size, 1)) if rows > size else whole
    return max(left, 1e-8 * whole) or 1.0


def _check_proper(factor: Factor, flat: int) -> None:
    if flat == 0:
        return
    block = factor.triangle[:flat, :flat]
    norms = np.linalg.norm(block, axis=0)
    rank = 0
    if len(block) and (norms > 0).any():
        scaled = block / np.where(norms > 0, norms, 1.0)
        pivots = np.abs(np.diag(linalg.qr(scaled, mode="r", pivoting=True)[0]))
        least = 10 * _EPSILON * np.sqrt(max(factor.rows, flat))
        rank = int((pivots > least * pivots[0]).sum())
    if rank < flat:
        raise ValueError(
            f"weight: the posterior is improper: a flat prior on {flat} weights (an intercept "
            f"counts as one) needs as many independent columns, but X has {factor.rows} rows and "
            f"only {rank} of the columns are independent; give the weights a Normal prior, or "
            "leave out columns that repeat others (a constant column repeats an intercept)"
        )


def _cosine_sine(
    orthogonal: np.ndarray, rows: int, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, float]]:
    """Splits a matrix with orthonormal columns; each half is turned where it is the smaller one.

    Returns the rotation, the squared cosines and sines, and of the target: its products with the
    turned columns, its squared components along them, and its squared distance from them.
    """
    upper, lower = orthogonal[:rows], orthogonal[rows:]
    size = orthogonal.shape[1]
    turn = np.eye(size)
    sines = np.zeros(size)
    if len(lower):
        _, singular, turn = np.linalg.svd(lower, full_matrices=True)
        turn = turn.T
        sines[: len(singular)] = singular
    seen = sines < np.sqrt(0.5)
    count = int(seen.sum())
    frame = np.linalg.qr(upper @ turn[:, seen], mode="complete")[0]
    new, _, again = np.linalg.svd(frame[:, count:].T @ upper @ turn[:, ~seen])
    turn[:, ~seen] = turn[:, ~seen] @ again.T
    frame[:, count:] = frame[:, count:] @ new
    products = upper @ turn
    cos2, sin2 = (products**2).sum(0), ((lower @ turn) ** 2).sum(0)
    order = np.concatenate([np.flatnonzero(seen), np.flatnonzero(~seen)])
    sin2[len(lower) :] = 0.0
    cos2[order[rows:]] = 0.0
    cos2[cos2 < 1e-30] = 0.0
    parts = frame.T @ target
    along = np.zeros(size)
    along[order[:rows]] = parts[:size] ** 2
    # A coordinate that the data hardly see gets a pull that vanishes with the cosine, not rounding.
    pull = products.T @ target
    pull[order[count:]] = 0.0
    pull[order[count:rows]] = np.sqrt(cos2[order[count:rows]]) * parts[count:size]
    return turn, cos2, sin2, (pull, along, float(parts[size:] @ parts[size:]))
