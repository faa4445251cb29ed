"""A regression with its priors, and the posterior of its noise and prior scale."""

import math
from typing import NamedTuple

import numpy as np
from scipy import special

from ppvae._checks import expect
from ppvae.regression.factors import Factor
from ppvae.regression.lattice import FINER, integrate, inverse_cdf
from ppvae.regression.linear_algebra import GaussianPosterior, decompose, pieces
from ppvae.regression.priors import Array, Integers, NormalPrior, Numbers, Unknown

#: Share of a sum over the points of a lattice that these may miss.
TOLERANCE = 1e-9
# The reference noise is moved where the posterior is further away than this, in logs.
_FAR = 7.0


class Problem(NamedTuple):
    """Data, priors, and the posterior of the weights for any noise and scale.

    Attributes:
        factor: the data.
        weight: the prior of the weights that have one; those that have none come first.
        numbers: `noise`, the sd, and `scale`, the factor of the prior sds; each known or a prior.
        gaussian: the posterior of the weights for any noise and scale.
    """

    factor: Factor
    weight: NormalPrior
    numbers: Numbers
    gaussian: GaussianPosterior

    @property
    def unknown(self) -> dict[str, Unknown]:
        """The priors of the noise and of the scale, where they are unknown."""
        return {name: u for name, u in self.numbers.items() if isinstance(u, Unknown)}

    @property
    def proper(self) -> bool:
        """Whether all priors have an integral, so that there is a log evidence."""
        return self.gaussian.flat == 0 and all(u.distribution for u in self.unknown.values())

    def has_moment(self, name: str, order: int) -> bool:
        """Whether the posterior of the noise or of the scale has a moment of this order.

        The density of the log of the number falls as a power far up. The exponent is the sum of
        that of its prior and one for each row (of the noise) or each coordinate that the data see
        (of the scale), less one for each flat weight.
        """
        gaussian = self.gaussian
        seen = gaussian.rank if name == "scale" else gaussian.rows
        return self.unknown[name].falls - (seen - gaussian.flat) + order < -1e-9

    def integrate(self) -> "HyperPosterior":
        """Computes the posterior of the noise and of the scale; their moments are exact too.

        Raises:
            ValueError: the density is zero wherever it was computed.
        """
        gaussian, start = self.gaussian, self.gaussian.log_reference
        # the highest of the first two moments that exist
        orders = {n: sum(self.has_moment(n, order) for order in (1, 2)) for n in self.unknown}
        centers = {"noise": math.exp(start), "scale": 1.0}
        around = {name: u.around(centers[name]) for name, u in self.unknown.items()}
        numbers: Numbers = {**self.numbers, **around}

        def log_integrands(places: Array) -> Array:
            logs, log_joint = _on_lines(numbers, places)
            log_joint = log_joint + gaussian.log_evidence(logs["noise"], logs["scale"])
            moments = (log_joint + order * logs[name] for name, order in orders.items())
            return np.column_stack([log_joint, *moments])

        indices, steps, logs = integrate(log_integrands, len(around))
        top = logs.max()
        values = np.exp(logs - top)
        log_total = top + np.log(values.sum()) + np.log(steps).sum() + gaussian.log_constant
        hyper = HyperPosterior(numbers, indices, steps, values / values.sum(), float(log_total))
        center = float(hyper.shares @ hyper.log_numbers["noise"])
        if abs(center - start) > _FAR:  # near its reference the density keeps its digits
            return self._replace(gaussian=gaussian._replace(log_reference=center)).integrate()
        return hyper


class HyperPosterior(NamedTuple):
    r"""The posterior of noise and scale as weighted points; that of the weights is then a mixture.

    Attributes:
        numbers: the noise and the scale, each known or a prior.
        indices: the points in steps of the lattice, shape `(points, axes)`, with one axis for each
            unknown number.
        steps: spacing of the lattice, shape `(axes,)`.
        shares: probabilities of the points, shape `(points,)`.
        log_total: log integral of the likelihood times the priors.
    """

    numbers: Numbers
    indices: Integers
    steps: Array
    shares: Array
    log_total: float

    @property
    def log_numbers(self) -> dict[str, Array]:
        """Logs of the noise and of the scale at the points, each of shape `(points,)`."""
        return _on_lines(self.numbers, self.indices * self.steps)[0]

    def thinned(self) -> "HyperPosterior":
        """Every third point of the lattice along each axis.

        Sums over every second are those over all but for 1e-12, and as their error falls
        exponentially with the spacing, those over every third are within some 1e-5 of them.
        """
        kept = (self.indices % 3 == 0).all(1)
        shares = self.shares[kept] / self.shares[kept].sum()
        return self._replace(indices=self.indices[kept], shares=shares)

    def checks(self) -> Array:
        """Weights of three sums over the points, shape `(points, 3)`.

        Of a function whose first sum is its integral the others are nearly zero: that over points
        where the posterior has died out, and the difference of one half of the points and the
        other.
        """
        if not len(self.steps):
            return np.array([[1.0, 0.0, 0.0]])
        far, signs = self.shares < 1e-16 * self.shares.max(), 1 - 2 * (self.indices % 2)
        return np.column_stack([np.ones(len(far)), far, signs])

    def quantiles(self, levels: Array) -> Array:
        """Quantiles of each unknown number, shape `(levels, axes)`."""
        columns = np.empty((len(levels), len(self.steps)))
        unknown = [number for number in self.numbers.values() if isinstance(number, Unknown)]
        for axis, number in enumerate(unknown):
            first, shares = self._marginal(axis)
            place = inverse_cdf(shares[None], levels)
            for _ in range(3):  # Newton steps on the series itself
                away = place[:, None] - np.arange(len(shares))
                below = (special.sici(np.pi * away)[0] / np.pi + 0.5) @ shares
                step = (below - levels) / (np.sinc(away) @ shares)
                place = place - np.clip(step, -1 / FINER, 1 / FINER)
            columns[:, axis] = np.exp(number.on_line((first + place) * self.steps[axis])[0])
        return columns

    def cdf(self, numbers: Array) -> Array:
        """How probable it is that an unknown number is below, `(k, axes)` for such numbers."""
        below = np.empty(numbers.shape)
        unknown = [number for number in self.numbers.values() if isinstance(number, Unknown)]
        for axis, number in enumerate(unknown):
            first, shares = self._marginal(axis)
            place = number.place(numbers[:, axis]) / self.steps[axis] - first
            away = np.clip(place, -1e9, 1e9)[:, None] - np.arange(len(shares))
            inner = (special.sici(np.pi * away)[0] / np.pi + 0.5) @ shares
            below[:, axis] = np.where(np.isinf(place), place > 0, np.clip(inner, 0.0, 1.0))
        return below

    def sample(self, size: int, generator: np.random.Generator) -> dict[str, Array]:
        """Draws the logs of noise and scale by inverting their distribution functions."""
        places = np.zeros((size, len(self.steps)))
        if len(self.steps):
            uniforms = generator.random((2, size))
            first, table = self._table()
            shares = table.sum(0) if table.ndim == 2 else table
            places[:, -1] = inverse_cdf(shares[None], uniforms[0])
            for part in pieces(size, FINER * len(table)) if table.ndim == 2 else ():
                # the series across the lattice, at the scales that were drawn
                across = np.sinc(places[part, 1:] - np.arange(len(shares)))
                places[part, 0] = inverse_cdf(across @ table.T, uniforms[1, part])
            places = (first + places) * self.steps
        return _on_lines(self.numbers, places)[0]

    def _marginal(self, axis: int) -> tuple[int, Array]:
        """The index of the first point along an axis, and the probabilities along it."""
        first, table = self._table()
        return int(first[axis]), table.sum(1 - axis) if table.ndim == 2 else table

    def _table(self) -> tuple[Integers, Array]:
        """The index of the first point along each axis, and the probabilities as an array."""
        first = self.indices.min(0)
        table = np.zeros(self.indices.max(0) - first + 1)
        table[tuple((self.indices - first).T)] = self.shares
        return first, table


def make_problem(factor: Factor, weight: NormalPrior, numbers: Numbers) -> Problem:
    """Decomposes the data and checks that the posterior is proper.

    Raises:
        ValueError: the posterior is improper.
    """
    gaussian, noise = decompose(factor, weight), numbers["noise"]
    if not isinstance(noise, Unknown):
        gaussian = gaussian._replace(log_reference=math.log(noise))
        return Problem(factor, weight, numbers, gaussian)
    problem = Problem(factor, weight, numbers, gaussian)
    size = math.exp(gaussian.log_reference)
    expect(1e-108 < size < 1e108, "y", "residuals of a size in 1e-108..1e108", size)
    improper = f"an improper posterior: {gaussian.rows} rows, {gaussian.flat} flat weights"
    more = f"a steeper prior, or at least {gaussian.flat + 2} rows where it is flat"
    expect(problem.has_moment("noise", 0), "noise", more, improper)
    bounded = noise.rises > gaussian.exact_fit + 1e-9
    away = "a known one, or a prior that keeps away from zero (an inverse gamma on the variance)"
    fit = "an improper posterior: y is an exact linear function of the columns of X"
    expect(bounded, "noise", away, fit)
    return problem


def _on_lines(numbers: Numbers, places: Array) -> tuple[dict[str, Array], Array]:
    """Logs of noise and scale at places `(k, axes)`, and the log prior density of the places."""
    logs, log_prior, axes = {}, np.zeros(len(places)), iter(places.T)
    for name, number in numbers.items():
        if isinstance(number, Unknown):
            logs[name], log_density = number.on_line(next(axes))
            log_prior = log_prior + log_density
        else:
            logs[name] = np.full(len(places), np.log(number))
    return logs, log_prior
