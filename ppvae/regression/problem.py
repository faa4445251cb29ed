r"""A linear regression, read from what the user gives and checked."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ppvae._checks import expect
from ppvae.regression.hyper import HyperPosterior, hyper_posterior
from ppvae.regression.linear_algebra import Factor, GaussianPosterior, decompose, factorize
from ppvae.regression.priors import Array, NormalPrior, Number, Unknown, read_positive, weight_prior

# The reference noise is moved where the posterior is further away than this, in logs.
_FAR = 7.0


class Problem(NamedTuple):
    """Data, priors, and the posterior of the weights for any noise and scale.

    Attributes:
        factor: the data.
        weight: location and sd of the weights that have a prior; those that have none come first.
        noise: the noise sd, or its prior.
        scale: the factor of the prior sds, or its prior.
        gaussian: the posterior of the weights for any noise and scale.
    """

    factor: Factor
    weight: NormalPrior
    noise: Number
    scale: Number
    gaussian: GaussianPosterior

    @property
    def unknown(self) -> dict[str, Unknown]:
        """The priors of the noise and of the scale, where they are unknown."""
        both = {"noise": self.noise, "scale": self.scale}
        return {name: u for name, u in both.items() if isinstance(u, Unknown)}

    @property
    def proper(self) -> bool:
        """Whether all priors have an integral, so that there is a log evidence."""
        return self.gaussian.flat == 0 and all(u.distribution for u in self.unknown.values())

    def has_moment(self, name: str, order: int) -> bool:
        """Whether the posterior of the noise or of the scale has a moment of this order.

        Far up, the density of its log falls by a power: its prior's, and one for each row that is
        not used up by flat weights, or for each weight that the data see.
        """
        gaussian = self.gaussian
        seen = gaussian.rank if name == "scale" else gaussian.rows
        return self.unknown[name].falls - (seen - gaussian.flat) + order < -1e-9

    def integrate(self) -> HyperPosterior:
        """The posterior of the noise and the scale; their moments are exact, where they exist."""
        gaussian = self.gaussian
        # the highest of the first two moments that exist
        orders = {n: sum(self.has_moment(n, order) for order in (1, 2)) for n in self.unknown}

        def log_functions(log_noise: Array, log_scale: Array) -> Array:
            logs = {"noise": log_noise, "scale": log_scale}
            likelihood = gaussian.log_evidence(log_noise, log_scale)
            moments = (likelihood + order * logs[name] for name, order in orders.items())
            return np.column_stack([likelihood, *moments])

        while True:
            start = gaussian.log_reference
            noise, scale = (
                number.around(first) if isinstance(number, Unknown) else number
                for number, first in ((self.noise, math.exp(start)), (self.scale, 1.0))
            )
            hyper = hyper_posterior((noise, scale), log_functions)
            center = float(hyper.shares @ hyper.log_numbers[0])
            if not abs(center - start) > _FAR:
                return hyper._replace(log_total=hyper.log_total + gaussian.log_constant)
            gaussian = gaussian._replace(log_reference=center)


def read_problem(
    X: Any, y: Any, weight: Any, noise: Any, scale: Any, *, intercept: bool
) -> Problem:
    """Reads and checks the arguments of `exact_posterior`.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: a value is out of its range, shapes do not fit, or the posterior is improper.
    """
    known_noise = read_positive(noise, "noise")
    known_scale = read_positive(1.0 if scale is None else scale, "scale")
    expect(weight is not None or scale is None, "scale", "None with weight=None (flat)", scale)
    factor = factorize(X, y, intercept=intercept)
    prior = weight_prior(weight, factor.columns - intercept)
    return make_problem(factor, prior, known_noise, known_scale)


def make_problem(factor: Factor, weight: NormalPrior, noise: Number, scale: Number) -> Problem:
    """Decomposes the data.

    Raises:
        ValueError: the posterior is improper.
    """
    gaussian = decompose(factor, weight)
    if not isinstance(noise, Unknown):
        gaussian = gaussian._replace(log_reference=math.log(noise))
        return Problem(factor, weight, noise, scale, gaussian)
    problem = Problem(factor, weight, noise, scale, gaussian)
    size = math.exp(gaussian.log_reference)
    expect(1e-108 < size < 1e108, "y", "residuals of a size in 1e-108..1e108", size)
    improper = f"an improper posterior: {gaussian.rows} rows, {gaussian.flat} flat weights"
    more = f"a steeper prior, or at least {gaussian.flat + 2} rows where it is flat"
    expect(problem.has_moment("noise", 0), "noise", more, improper)
    bounded = not gaussian.exact_fit or noise.rises > gaussian.rows - gaussian.rank + 1e-9
    away = "a known one, or a prior that keeps away from zero (an inverse gamma on the variance)"
    fit = "an improper posterior: y is an exact linear function of the columns of X"
    expect(bounded, "noise", away, fit)
    return problem
