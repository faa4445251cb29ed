r"""Exact leave-one-out prediction for the Gaussian linear model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import special

from ppvae.regression.factor import factorize
from ppvae.regression.hyperposterior import HyperPosterior
from ppvae.regression.problem import Problem

_BUDGET = 4_000_000
# Below this share of a datum's own variance the closed form loses digits, and one refits instead.
_LEAST_SHARE = 1e-6


class LeaveOneOut(NamedTuple):
    """Leave-one-out log predictive densities, in nats.

    Attributes:
        pointwise: log p(y_i | all other data), shape `(rows,)`; nan where the posterior without
            datum i is improper.
        total: their sum, the expected log predictive density of ArviZ's `elpd_loo`.
        standard_error: of the total as an estimate, `sqrt(rows) * sd(pointwise)`.
    """

    pointwise: np.ndarray
    total: float
    standard_error: float


def leave_one_out(problem: Problem, hyper: HyperPosterior) -> LeaveOneOut:
    r"""Predicts each datum from all others, without refitting.

    Given noise s and scale, with residual e and leverage h of a datum,

    .. math:: p(y_i | y_{-i}, s) = N(e_i; 0, s^2 / (1 - h_i)) (1 - h_i)^{-1},

    as a density of e_i / (1 - h_i); with unknown noise or scale, over the posterior of both,

    .. math:: p(y_i | y_{-i}) = 1 / E[1 / p(y_i | y_{-i}, s)],

    by a quadrature that resolves the posteriors without the most and the least surprising datum.

    Args:
        problem: the regression.
        hyper: its posterior of noise and scale.

    Raises:
        ValueError: the data came in blocks, or too few remain for a proper posterior.

    Reference:
        Vehtari et al., *Bayesian leave-one-out cross-validation approximations for Gaussian latent
        variable models*, 2016.
    """
    design, target = problem.factor.design, problem.factor.target
    if design is None or target is None:
        raise ValueError("loo: the data came in blocks and are not held; give X and y as arrays")
    if not problem.noise.known and problem.noise_falls + 1 >= -1e-9:
        raise ValueError(
            "loo: the posterior without a datum is improper: too few rows for these flat priors"
        )
    if not len(target):
        return LeaveOneOut(np.zeros(0), 0.0, 0.0)
    found = problem.decomposition
    rows, away = design @ found.basis, target - design @ found.loc
    center = np.exp(hyper.log_weights) @ np.column_stack([hyper.log_noise, hyper.log_scale])
    log_noise, log_scale = center[:1], center[1:]
    residual, share = (v[:, 0] for v in _fit(problem, rows, away, log_noise, log_scale))
    steep = share < _LEAST_SHARE
    if not problem.noise.known and len(target) - 1 <= found.rank:
        # without a datum the others can be fitted exactly, and the noise may go to zero, where the
        # difference of densities is lost in their rounding
        steep[:] = True
    elif not (problem.noise.known and problem.scale.known):
        surprise = np.argsort(np.where(steep, -1.0, residual**2 / np.maximum(share, 1e-300)))
        chosen = np.unique([*surprise[-3:], surprise[0], np.argmin(np.where(steep, 1.0, share))])

        def log_joint(u: np.ndarray, v: np.ndarray) -> np.ndarray:
            density = problem.log_joint(u, v)
            logs = _log_predictive(problem, rows[chosen], away[chosen], u, v)
            return np.hstack([density, density - logs.T])

        hyper = problem.integrate(log_joint)
    pointwise = np.empty(len(target))
    step = max(1, _BUDGET // len(hyper.log_weights))
    for start in range(0, 0 if steep.all() else len(target), step):
        part = slice(start, start + step)
        logs = _log_predictive(problem, rows[part], away[part], hyper.log_noise, hyper.log_scale)
        pointwise[part] = -special.logsumexp(hyper.log_weights - logs, axis=1)
    for i in np.flatnonzero(steep):
        pointwise[i] = _by_refit(problem, int(i))
    spread = float(np.sqrt(len(target)) * pointwise.std())
    return LeaveOneOut(pointwise, float(pointwise.sum()), spread)


def _fit(
    problem: Problem, rows: np.ndarray, away: np.ndarray, u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Residuals e and shares 1 - h, each of shape `(rows, nodes)`."""
    means, variances = problem.decomposition.coordinates(u, v)
    share = 1 - rows**2 @ (variances * np.exp(-2 * u)[:, None]).T
    return away[:, None] - rows @ means.T, share


def _log_predictive(
    problem: Problem, rows: np.ndarray, away: np.ndarray, u: np.ndarray, v: np.ndarray
) -> np.ndarray:
    residual, share = _fit(problem, rows, away, u, v)
    share = np.maximum(share, 1e-300)
    with np.errstate(over="ignore"):
        misfit = (residual * np.exp(-u)) ** 2 / share
    return (np.log(share) - np.log(2 * np.pi) - misfit) / 2 - u


def _by_refit(problem: Problem, i: int) -> float:
    """The same for one datum as the difference of two log evidences."""
    design, target = problem.factor.design, problem.factor.target
    assert design is not None and target is not None
    others = factorize(np.delete(design, i, 0), np.delete(target, i))
    try:
        without = problem.with_factor(others)
    except ValueError:
        return float("nan")
    return problem.log_normalizer() - without.log_normalizer()
