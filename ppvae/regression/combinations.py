"""Linear combinations of the weights: each a mixture of Gaussians over the noise and the scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import special

from ppvae.regression.hyper import TOLERANCE, HyperPosterior, Problem
from ppvae.regression.linear_algebra import pieces
from ppvae.regression.priors import Array
from ppvae.regression.quantiles import mixture_quantiles

_LOG_TWO_PI = float(np.log(2 * np.pi))


@dataclass(frozen=True, eq=False)
class Combinations:
    """Numbers that are linear in the weights, with or without noise.

    Args:
        problem: the data and the priors.
        hyper: the posterior of noise and scale.
        center: what each is at the prior mean, shape `(k,)`.
        along: how it changes with the coordinates of the weights, shape `(k, rank)`.
        unseen: its squared length along what no data see, in the prior's units, shape `(k,)`.
        noise: what multiplies the noise sd in it, shape `(k,)`; zeros for none.
    """

    problem: Problem
    hyper: HyperPosterior
    center: Array
    along: Array
    unseen: Array
    noise: Array

    @staticmethod
    def of_weights(problem: Problem, hyper: HyperPosterior) -> Combinations:
        """The weights themselves."""
        gaussian = problem.gaussian
        none = np.zeros(len(gaussian.loc))
        unseen = gaussian.unseen_weights()
        return Combinations(problem, hyper, gaussian.loc, gaussian.basis, unseen, none)

    @staticmethod
    def of_rows(problem: Problem, hyper: HyperPosterior, rows: Array, noise: Array) -> Combinations:
        """Rows of shape `(k, weights)` times the weights."""
        gaussian = problem.gaussian
        center, along = rows @ gaussian.loc, rows @ gaussian.basis
        return Combinations(problem, hyper, center, along, gaussian.unseen_squares(rows), noise)

    def negative(self) -> Combinations:
        """The same numbers with the other sign."""
        return replace(self, center=-self.center, along=-self.along)

    @cached_property
    def _points(self) -> tuple[Array, Array, Array, Array]:
        """Means and variances of coordinates, of what is unseen and of the noise, at the points."""
        logs = self.hyper.log_numbers
        gaussian, pair = self.problem.gaussian, (logs["noise"], logs["scale"])
        means, variances = gaussian.coordinates(*pair)
        return means, variances, np.exp(2 * gaussian.log_prior(*pair)), np.exp(2 * logs["noise"])

    def components(self, part: slice = slice(None)) -> tuple[Array, Array]:
        """Means and sds of the Gaussians at the points, each `(points, k)`."""
        means, variances, unseen, noise = self._points
        along = self.along[part].T
        spread = variances @ along**2 + np.outer(unseen, self.unseen[part])
        spread += np.outer(noise, self.noise[part] ** 2)
        return self.center[part] + means @ along, np.sqrt(spread)

    def lacks(self, order: int) -> NDArray[np.bool_]:
        """Which have tails so heavy that their moment of this order does not exist."""
        problem, gaussian = self.problem, self.problem.gaussian
        missing = {name: not problem.has_moment(name, order) for name in problem.unknown}
        by_noise, by_scale = missing.get("noise", False), missing.get("scale", False)
        heavy = np.full(gaussian.rank, by_noise)  # the flat weights spread with the noise
        if not gaussian.prior.relative:
            heavy[gaussian.flat :] = False
        along = np.abs(self.along)
        # and what no data see with the scale
        far = by_scale or by_noise and gaussian.prior.relative
        return np.logical_or.reduce(
            [
                along[:, heavy].sum(1) > 1e-12 * along.sum(1),
                (self.unseen > 1e-24 * (along**2).sum(1)) & far,
                (self.noise > 0) & by_noise,
            ]
        )

    @property
    def mean(self) -> Array:
        """Means, shape `(k,)`; nan where there is none."""
        values = self.center + self.along @ (self.hyper.shares @ self._points[0])
        return np.where(self.lacks(1), np.nan, values)

    @property
    def variance(self) -> Array:
        """Variances, shape `(k,)`; inf where there is none."""
        means, variances, unseen, noise = self._points
        shares = self.hyper.shares
        away = means - shares @ means
        inner = (away.T * shares) @ away + np.diag(shares @ variances)
        values = ((self.along @ inner) * self.along).sum(1) + self.unseen * (shares @ unseen)
        values = values + self.noise**2 * (shares @ noise)
        return np.where(self.lacks(2), np.inf, values)

    def quantile(self, levels: Array) -> Array:
        """Quantiles at probabilities `(levels,)`, shape `(levels, k)`."""
        table = np.empty((len(levels), len(self.center)))
        few = replace(self, hyper=self.hyper.thinned())
        for part in self._pieces(len(levels)):
            near = mixture_quantiles(few.hyper.shares, *few.components(part), levels)
            table[:, part] = mixture_quantiles(
                self.hyper.shares, *self.components(part), levels, near
            )
        return table

    def cdf(self, values: Array) -> Array:
        """How probable it is that each is below a value, both of shape `(k,)`."""
        below = np.empty(len(self.center))
        for part in self._pieces():
            means, sds = self.components(part)
            below[part] = self.hyper.shares @ special.ndtr((values[part] - means) / sds)
        return below

    def log_prob(self, values: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Log densities at values, both of shape `(k,)`, in nats; and whether they are exact.

        Far out a density may be that of a noise of which no point is left.
        """
        logs, exact = np.empty(len(self.center)), np.empty(len(self.center), dtype=bool)
        shares = self.hyper.shares
        with np.errstate(divide="ignore"):
            log_shares = np.log(shares)[:, None]
        weights = self.hyper.checks()
        for part in self._pieces():
            means, sds = self.components(part)
            inner = -(((values[part] - means) / sds) ** 2) / 2 - np.log(sds) + log_shares
            top = inner.max(0)
            sums = np.exp(inner - top).T @ weights
            logs[part] = top + np.log(sums[:, 0]) - _LOG_TWO_PI / 2
            exact[part] = np.abs(sums[:, 1:]).max(1) < TOLERANCE * sums[:, 0]
        return logs, exact

    def _pieces(self, levels: int = 1) -> list[slice]:
        return list(pieces(len(self.center), len(self.hyper.shares) * levels))
