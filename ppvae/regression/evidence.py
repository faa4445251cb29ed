r"""The evidence as a function of the prior scale, and its maximum (empirical Bayes)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
from numpy.typing import ArrayLike
from scipy import optimize
from torch import Tensor
from torch.distributions import Distribution

from ppvae.regression.exact import ExactPosterior
from ppvae.regression.hyperposterior import Unknown, hyper_posterior
from ppvae.regression.problem import Problem, read_problem

_WEIGHT = dist.Normal(0.0, 1.0)
# Natural logs of the scale, relative to the prior's own, between which the maximum is looked for.
_RANGE = 35.0

Data = ArrayLike | Tensor | Iterable[tuple[Any, Any]]


class EvidenceMaximum(NamedTuple):
    """The prior scale that makes the data most probable.

    Attributes:
        scale: factor of the prior sds.
        noise: the maximizing noise sd, the known one, or nan where it is integrated over.
        log_evidence: at the maximum, in nats; a flat prior counts as one.
        posterior: the posterior of the weights (and of the noise) with that scale.
    """

    scale: float
    noise: float
    log_evidence: float
    posterior: ExactPosterior


def log_evidence_curve(
    X: Data,
    y: ArrayLike | Tensor | None = None,
    *,
    scales: ArrayLike,
    weight: Distribution = _WEIGHT,
    noise: float | Distribution | None,
    intercept: bool = False,
) -> np.ndarray:
    r"""Computes log p(y | t) for a grid of factors t of the prior sds, from one decomposition.

    Args:
        X: see `exact_posterior`.
        y: see `exact_posterior`.
        scales: positive factors, shape `(k,)`.
        weight: Normal prior of the weights at t = 1.
        noise: known sd, or a prior that is integrated over; see `exact_posterior`.
        intercept: see `exact_posterior`.

    Returns:
        Nats, shape `(k,)`; a flat prior (intercept, noise) counts as one, so that differences along
        the curve are meaningful and its height is not.

    Raises:
        ValueError: a scale is not positive, or as for `exact_posterior`.
    """
    grid = np.atleast_1d(np.asarray(scales, dtype=float))
    if grid.ndim != 1 or not (np.isfinite(grid) & (grid > 0)).all():
        raise ValueError(f"scales: expected positive, finite numbers, got {scales!r}")
    problem = read_problem(X, y, weight, noise, 1.0, intercept=intercept)
    return _curve(problem, np.log(grid))


def evidence_maximum(
    X: Data,
    y: ArrayLike | Tensor | None = None,
    *,
    weight: Distribution = _WEIGHT,
    noise: float | Distribution | None = None,
    maximize_noise: bool = False,
    intercept: bool = False,
) -> EvidenceMaximum:
    r"""Finds the prior scale of the weights that maximizes the evidence (empirical Bayes).

    .. math:: \hat t = \arg\max_t \log p(y | t), \qquad w_j \sim N(m_j, t^2 d_j^2)

    The uncertainty of t is dropped: give `exact_posterior` a prior for `scale` to keep it.

    Args:
        X: see `exact_posterior`.
        y: see `exact_posterior`.
        weight: Normal prior of the weights at t = 1.
        noise: known sd, or a prior that is integrated over (None: flat).
        maximize_noise: maximize over the noise too instead of integrating, as scikit-learn's
            `BayesianRidge` does; then `noise` must be left out.
        intercept: see `exact_posterior`.

    Raises:
        ValueError: the evidence has no maximum at a positive, finite scale (data that the prior
            mean explains best drive it to zero), or as for `exact_posterior`.

    Reference:
        MacKay, *Bayesian interpolation*, 1992.
    """
    if maximize_noise and noise is not None:
        raise ValueError(f"noise: expected nothing with maximize_noise=True, got {noise}")
    if weight is None:
        raise ValueError("weight: expected a Normal, got None: a flat prior has no scale")
    problem = read_problem(X, y, weight, noise, 1.0, intercept=intercept)
    if maximize_noise:
        log_noise, log_scale = _both(problem)
        problem = replace(problem, noise=Unknown(log_noise, None))
    else:
        log_scale = _highest(lambda v: _curve(problem, v), _RANGE)
        log_noise = problem.noise.value if problem.noise.known else np.nan
    posterior = ExactPosterior(replace(problem, scale=Unknown(log_scale, None)))
    return EvidenceMaximum(
        float(np.exp(log_scale)), float(np.exp(log_noise)), posterior.log_normalizer, posterior
    )


def _curve(problem: Problem, log_scales: np.ndarray) -> np.ndarray:
    if problem.noise.known:
        noise = np.full(len(log_scales), problem.noise.value)
        values = problem.log_joint(noise, log_scales)[:, 0]
    else:
        totals = [
            hyper_posterior(problem.log_joint, problem.noise, Unknown(v, None)).log_totals[0]
            for v in log_scales.tolist()
        ]
        values = np.array(totals)
    return values + problem.decomposition.constant


def _highest(function: Any, reach: float) -> float:
    """Where a smooth function is highest; it must not be at the ends."""
    grid = np.linspace(-reach, reach, 141)
    values = function(grid)
    best = int(np.argmax(values))
    if values[best] - max(values[0], values[-1]) < 1e-9:
        raise ValueError(
            "weight: the evidence has no maximum at a positive, finite prior scale: it is highest "
            f"{'at zero' if values[0] > values[-1] else 'as the scale grows without bound'}"
        )
    found = optimize.minimize_scalar(
        lambda v: -function(np.array([v]))[0],
        bounds=(grid[best - 1], grid[best + 1]),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return float(found.x)


def _both(problem: Problem) -> tuple[float, float]:
    """The noise and the scale that maximize the evidence together, as logs."""

    def over_noise(log_scale: float, first: float) -> tuple[float, float]:
        grid = first + np.linspace(-12, 12, 97)
        for _ in range(9):
            values = problem.decomposition.log_evidence(grid, np.full(len(grid), log_scale))
            best = int(np.argmax(values))
            low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
            grid = np.linspace(low, high, 33)
        return float(values[best]), float(grid[16])

    reference = problem.decomposition.reference

    def profile(log_scales: np.ndarray) -> np.ndarray:
        return np.array([over_noise(v, reference)[0] for v in log_scales.tolist()])

    log_scale = _highest(profile, _RANGE)
    return over_noise(log_scale, reference)[1], log_scale
