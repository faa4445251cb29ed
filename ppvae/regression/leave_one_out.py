r"""Exact leave-one-out prediction for the Gaussian linear model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ppvae._checks import expect
from ppvae.regression.hyper import HyperPosterior, Problem, make_problem
from ppvae.regression.linear_algebra import factorize, pieces
from ppvae.regression.priors import Array

# Below this share of a datum's own variance the closed form loses digits.
_LEAST_SHARE = 1e-6
# Of the mass of a posterior without a datum, that the points of the lattice may miss.
_TOLERANCE = 1e-9


class LeaveOneOut(NamedTuple):
    """Leave-one-out log predictive densities, in nats.

    Attributes:
        pointwise: log p(y_i | all other data), shape `(rows,)`; nan where the posterior without
            datum i is improper.
        total: their sum, the expected log predictive density of ArviZ's `elpd_loo`.
        standard_error: of the total as an estimate, `sqrt(rows) * sd(pointwise)`.
    """

    pointwise: Array
    total: float
    standard_error: float


def leave_one_out(problem: Problem, hyper: HyperPosterior) -> LeaveOneOut:
    r"""Predicts each datum from all others, without refitting.

    Given noise s and scale, with residual e and leverage h of a datum,

    .. math:: p(y_i | y_{-i}, s) = N(e_i; 0, s^2 / (1 - h_i)) (1 - h_i)^{-1},

    as a density of e_i / (1 - h_i); with unknown noise or scale, over the posterior of both,

    .. math:: p(y_i | y_{-i}) = 1 / E[1 / p(y_i | y_{-i}, s)],

    by a sum over its points. Where that has lost digits, the datum is left out and the rest fitted.

    Args:
        problem: the regression.
        hyper: its posterior of noise and scale.

    Raises:
        ValueError: the data came in blocks, or too few remain for a proper posterior.

    Reference:
        Vehtari et al., *Bayesian leave-one-out cross-validation approximations for Gaussian latent
        variable models*, 2016.
    """
    factor, gaussian = problem.factor, problem.gaussian
    if factor.data is None:
        raise ValueError("loo: expected X and y as arrays, got blocks, which are not kept")
    X, y = factor.data
    proper = "noise" not in problem.unknown or problem.has_moment("noise", 1)
    expect(proper, "loo", "more rows", "an improper posterior where one of them is left out")
    rows, away = X @ gaussian.basis, y - X @ gaussian.loc
    pointwise, exact = np.empty(factor.rows), np.empty(factor.rows, dtype=bool)
    for part in pieces(factor.rows, len(hyper.shares)):
        pointwise[part], exact[part] = _by_points(problem, hyper, rows[part], away[part])
    if "noise" in problem.unknown and factor.rows - 1 <= gaussian.rank:
        # without a datum the others can be fitted exactly, and the noise may go to zero, where the
        # difference of densities is lost in their rounding
        exact[:] = False
    for i in np.flatnonzero(~exact):
        others = factorize(np.delete(X, i, 0), np.delete(y, i))
        try:
            rest = make_problem(others, problem.weight, problem.numbers)
            pointwise[i] = hyper.log_total - rest.integrate().log_total
        except ValueError:  # the posterior without the datum is improper
            pointwise[i] = np.nan
    spread = float(np.sqrt(factor.rows) * pointwise.std()) if factor.rows else 0.0
    return LeaveOneOut(pointwise, float(pointwise.sum()), spread)


def _by_points(
    problem: Problem, hyper: HyperPosterior, rows: Array, away: Array
) -> tuple[Array, Array]:
    """Log predictive densities of data, and whether these have kept their digits.

    Args:
        problem: the regression.
        hyper: its posterior of noise and scale.
        rows: rows of X in the coordinates of the posterior, shape `(k, weights)`.
        away: y less what the prior means predict, shape `(k,)`.
    """
    log_noise, log_scale = hyper.log_numbers.values()
    means, variances = problem.gaussian.coordinates(log_noise, log_scale)
    residual = away[:, None] - rows @ means.T
    share = 1 - rows**2 @ (variances * np.exp(-2 * log_noise)[:, None]).T
    center = share @ hyper.shares
    share = np.maximum(share, 1e-300)
    with np.errstate(over="ignore", divide="ignore"):
        misfit = (residual * np.exp(-log_noise)) ** 2 / share
        logs = (np.log(share) - np.log(2 * np.pi) - misfit) / 2 - log_noise
        inverse = np.log(hyper.shares) - logs
    top = inverse.max(1)
    # the posterior without the datum must have died out where the other is small, and half of the
    # points must give the same sum
    far, signs = hyper.shares < 1e-16 * hyper.shares.max(), 1 - 2 * (hyper.indices % 2)
    weights = np.column_stack([np.ones(len(far)), far, signs])
    sums = np.exp(inverse - top[:, None]) @ weights
    error = np.abs(sums[:, 1:]).max(1) / sums[:, 0]
    return -top - np.log(sums[:, 0]), (error < _TOLERANCE) & (center > _LEAST_SHARE)
