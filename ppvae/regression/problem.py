r"""A linear regression, read from what the user gives and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ppvae.regression.decomposition import Decomposition
from ppvae.regression.factor import Factor, factorize
from ppvae.regression.hyperposterior import HyperPosterior, LogJoint, Unknown, hyper_posterior
from ppvae.regression.priors import known_number, positive_prior, weight_prior
from ppvae.regression.quadrature import LIMIT

# The reference of the decomposition is moved where the posterior is further away than this (log).
_FAR = 7.0


@dataclass(frozen=True)
class Problem:
    """Data, priors, and the decomposition that they share.

    Attributes:
        factor: the data.
        prior: location and sd of the weights; None where they are flat.
        flat: number of weights with a flat prior; they come first.
        noise: the noise sd.
        scale: the factor of the prior sds.
        decomposition: of the data and the prior.
        intercept: the first column is the ones of an intercept.
    """

    factor: Factor
    prior: tuple[np.ndarray, np.ndarray] | None
    flat: int
    noise: Unknown
    scale: Unknown
    decomposition: Decomposition
    intercept: bool

    @property
    def noise_falls(self) -> float:
        """The power of the noise by which the posterior density of its log falls."""
        assert self.noise.prior is not None
        return self.noise.prior.falls - (self.factor.rows - self.flat)

    @property
    def scale_falls(self) -> float:
        """The power of the prior scale by which the posterior density of its log falls."""
        assert self.scale.prior is not None
        seen = self.factor.columns - self.flat - int((self.decomposition.cos2 == 0).sum())
        return self.scale.prior.falls - seen

    @property
    def proper(self) -> bool:
        """Whether all priors have an integral, so that there is a log evidence."""
        priors = [u.prior for u in (self.noise, self.scale) if u.prior is not None]
        return self.flat == 0 and all(prior.proper for prior in priors)

    def log_joint(self, log_noise: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
        """Log density of data, log noise and log scale, less a constant, shape `(k, 1)`."""
        total = self.decomposition.log_evidence(log_noise, log_scale)
        if self.noise.prior is not None:
            total = total + self.noise.prior.log_density(log_noise)
        if self.scale.prior is not None:
            total = total + self.scale.prior.log_density(log_scale)
        return total[:, None]

    def integrate(self, log_joint: LogJoint | None = None) -> HyperPosterior:
        """The posterior of noise and scale; by default resolved for second moments too."""
        powers = [
            (not self.noise.known and self.noise_falls < -2, 0),
            (not self.scale.known and self.scale_falls < -2, 1),
        ]

        def with_moments(log_noise: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
            density = self.log_joint(log_noise, log_scale)
            extra = [2 * (log_noise, log_scale)[i][:, None] for finite, i in powers if finite]
            return np.hstack([density, *(density + power for power in extra)])

        unknowns = (self.noise, self.scale)
        heavy = any(not unknowns[i].known and not finite for finite, i in powers)
        drop = 75.0 if heavy else 45.0
        return hyper_posterior(log_joint or with_moments, self.noise, self.scale, drop=drop)

    def log_normalizer(self) -> float:
        """Log of the integral of likelihood times prior densities, flat ones counting as 1."""
        return float(self.integrate().log_totals[0]) + self.decomposition.constant

    def with_factor(self, factor: Factor) -> Problem:
        """The same priors with other data.

        Raises:
            ValueError: the posterior is improper.
        """
        other = _problem(
            factor, self.prior, self.flat, self.noise, self.scale, intercept=self.intercept
        )
        _check_noise(other)
        return other

    def moved(self, log_noise: float, log_scale: float) -> Problem:
        """The same with another reference for the decomposition, where this one is too far off."""
        here = self.decomposition
        far = max(abs(log_noise - here.reference), abs(log_scale - here.scale_reference))
        if far <= _FAR:
            return self
        return _problem(
            self.factor,
            self.prior,
            self.flat,
            self.noise,
            self.scale,
            intercept=self.intercept,
            reference=(np.exp(log_noise), np.exp(log_scale)),
        )


def read_problem(
    X: Any, y: Any, weight: Any, noise: Any, scale: Any, *, intercept: bool
) -> Problem:
    """Reads and checks the arguments of `exact_posterior`.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: a value is out of its range, shapes do not fit, or the posterior is improper.
    """
    unknown_noise = _unknown(noise, "noise")
    unknown_scale = _unknown(1.0 if scale is None else scale, "scale")
    if weight is None and scale is not None:
        raise ValueError("scale: a flat prior of the weights (weight=None) has no scale")
    factor = factorize(X, y, intercept=intercept)
    prior = weight_prior(weight, factor.columns - intercept)
    flat = factor.columns if prior is None else int(intercept)
    problem = _problem(factor, prior, flat, unknown_noise, unknown_scale, intercept=intercept)
    _check_noise(problem)
    return problem


def _unknown(value: Any, name: str) -> Unknown:
    number = known_number(value, name)
    return Unknown(np.log(number), None) if number else Unknown(0.0, positive_prior(value, name))


def _problem(
    factor: Factor,
    prior: tuple[np.ndarray, np.ndarray] | None,
    flat: int,
    noise: Unknown,
    scale: Unknown,
    *,
    intercept: bool,
    reference: tuple[float, float] | None = None,
) -> Problem:
    known = np.exp(noise.value) if noise.known else None
    reference_noise, reference_scale = reference or (known, np.exp(scale.value))
    found = Decomposition(factor, prior, flat, noise=reference_noise, scale=reference_scale)
    if not noise.known:
        noise = noise._replace(value=found.reference)
    if not scale.known:
        scale = scale._replace(value=found.scale_reference)
    return Problem(factor, prior, flat, noise, scale, found, intercept)


def _check_noise(problem: Problem) -> None:
    """Refuses noise priors under which the posterior has no integral."""
    rows = problem.factor.rows
    if problem.noise.prior is None:
        return
    if abs(problem.decomposition.reference) > LIMIT - 50:
        raise ValueError("y: expected values of ordinary size, got residuals out of 1e-108..1e108")
    if problem.noise_falls >= -1e-9:
        raise ValueError(
            f"noise: the posterior is improper: with this prior of the noise and {problem.flat} "
            f"weights under a flat prior, {rows} rows are too few; a flat prior on the noise needs "
            f"at least {problem.flat + 2}"
        )
    spare = rows - problem.decomposition.rank
    if problem.decomposition.exact_fit and problem.noise.prior.rises - spare <= 1e-9:
        raise ValueError(
            "noise: the posterior is improper: y is an exact linear function of the columns of X, "
            "so that its density grows without bound as the noise goes to zero; give a known "
            "noise, or a prior that keeps away from zero (an inverse gamma on the variance)"
        )
