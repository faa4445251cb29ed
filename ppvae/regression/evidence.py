r"""The evidence as a function of the prior scale, and its maximum (empirical Bayes)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
from torch.distributions import Distribution

from ppvae._checks import check_array, check_flag, check_real, expect
from ppvae.regression.arguments import problem_of
from ppvae.regression.exact import ExactPosterior
from ppvae.regression.factors import Given, read
from ppvae.regression.hyper import Problem
from ppvae.regression.priors import Array, Unknown
from ppvae.regression.rows import Values

# The maximum is searched where the log of the scale, or of scale over noise, is within this.
_RANGE = 35.0


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

    def __repr__(self) -> str:
        at = f"scale {self.scale:.6g} and noise {self.noise:.6g}"
        return f"EvidenceMaximum at {at}: log evidence {self.log_evidence:.4f} nats"


def log_evidence_curve(
    X: Given,
    y: Values | None = None,
    *,
    scales: Values,
    weight: Distribution = dist.Normal(0.0, 1.0),  # noqa: B008 (immutable)
    noise: float | Distribution | None,
    intercept: bool = False,
) -> Array:
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
    given = check_real("scales", scales)
    expect(weight is not None, "weight", "a Normal", "None: a flat prior has no scale")
    grid = check_array("scales", given, ("k",)[: given.dim()]).reshape(-1)
    expect((grid > 0).all(), "scales", "positive, finite numbers", repr(scales))
    factor, _ = read(X, y, intercept=intercept)
    return _curve(problem_of(factor, weight, noise, 1.0), np.log(grid))


def evidence_maximum(
    X: Given,
    y: Values | None = None,
    *,
    weight: Distribution = dist.Normal(0.0, 1.0),  # noqa: B008 (immutable)
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
    maximize_noise = check_flag("maximize_noise", maximize_noise)
    expect(not maximize_noise or noise is None, "noise", "nothing with maximize_noise=True", noise)
    expect(weight is not None, "weight", "a Normal", "None: a flat prior has no scale")
    factor, rows = read(X, y, intercept=intercept)
    problem = problem_of(factor, weight, noise, 1.0)
    noise_sd, best_noise = problem.numbers["noise"], problem.gaussian.best_noise
    if maximize_noise:
        ratio = _highest(lambda log_ratios: best_noise(log_ratios)[1])
        noise_sd = math.exp(best_noise(np.array([ratio]))[0][0])
        at = np.array([ratio])
        scale = math.exp(problem.gaussian.log_scale(best_noise(at)[0], at)[0])
    else:
        scale = math.exp(_highest(lambda log_scales: _curve(problem, log_scales)))
    problem = problem._replace(numbers={"noise": noise_sd, "scale": scale})
    posterior = ExactPosterior(problem, problem.integrate(), rows)
    known_noise = np.nan if isinstance(noise_sd, Unknown) else noise_sd
    return EvidenceMaximum(scale, known_noise, posterior.log_normalizer, posterior)


def _curve(problem: Problem, log_scales: Array) -> Array:
    """Computes the log evidence at scales, with the noise known or integrated over."""
    noise, gaussian = problem.numbers["noise"], problem.gaussian
    if not isinstance(noise, Unknown):
        log_noise = np.full(len(log_scales), math.log(noise))
        return gaussian.log_evidence(log_noise, log_scales) + gaussian.log_constant
    numbers = ({"noise": noise, "scale": scale} for scale in np.exp(log_scales).tolist())
    return np.array([problem._replace(numbers=each).integrate().log_total for each in numbers])


def _highest(function: Callable[[Array], Array]) -> float:
    """Finds where a smooth function of a log is highest, which must be inside the range."""
    from scipy import optimize

    grid = np.linspace(-_RANGE, _RANGE, 71)
    values = function(grid)
    best = int(np.argmax(values))
    inside = values[best] - max(values[0], values[-1]) > 1e-9
    got = "the maximum at zero" if values[0] > values[-1] else "growth without bound"
    expect(inside, "weight", "evidence with a maximum at a positive, finite scale", got)
    bounds = grid[best - 1], grid[best + 1]
    top = optimize.minimize_scalar(
        lambda place: -function(np.array([place]))[0], bounds=bounds, options={"xatol": 1e-10}
    )
    return float(top.x)
