r"""A regression with its priors, and the posterior of its noise and prior scale.

Integrals over the logs of these two are sums over the points of a lattice: for an analytic density
that dies out at both ends the error of this trapezoidal rule falls exponentially as the spacing
does (Trefethen, Weideman, *The exponentially convergent trapezoidal rule*, 2014), and so does that
of the Fourier series between the points.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage, special

from ppvae._checks import expect
from ppvae.regression.factors import Factor
from ppvae.regression.linear_algebra import GaussianPosterior, decompose, pieces
from ppvae.regression.priors import Array, Integers, NormalPrior, Numbers, Unknown

# Logs of functions `(k, functions)` at places `(k, axes)`.
Logs = Callable[[Array], Array]

# Functions are followed from their modes down to `exp(-_DROP)` of their highest value.
_DROP = 45.0
# Share of a sum over the points of a lattice that these may miss.
TOLERANCE = 1e-9
_TOLERANCE = 1e-12
_MOST_POINTS = 1 << 16
_MOST_ROUNDS = 80
# The first lattice: its spacing, and points that are in all blocks of the whole line.
_COARSE, _REACH = 0.25, range(-56, 56, 8)
# Points of a block along each axis, by the number of axes: a lattice grows by blocks.
_BLOCK = {1: 64, 2: 8}
# Points of a tabulated Fourier series for each point of its lattice.
_FINER = 8
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

        indices, steps, logs = _integrate(log_integrands, len(around))
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
            place = _inverse_cdf(shares[None], levels)
            for _ in range(3):  # Newton steps on the series itself
                away = place[:, None] - np.arange(len(shares))
                below = (special.sici(np.pi * away)[0] / np.pi + 0.5) @ shares
                step = (below - levels) / (np.sinc(away) @ shares)
                place = place - np.clip(step, -1 / _FINER, 1 / _FINER)
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
            places[:, -1] = _inverse_cdf(shares[None], uniforms[0])
            for part in pieces(size, _FINER * len(table)) if table.ndim == 2 else ():
                # the series across the lattice, at the scales that were drawn
                across = np.sinc(places[part, 1:] - np.arange(len(shares)))
                places[part, 0] = _inverse_cdf(across @ table.T, uniforms[1, part])
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


def _integrate(log_integrands: Logs, axes: int) -> tuple[Integers, Array, Array]:
    """Builds a lattice on which the sums of all functions have converged.

    Along each axis the spacing is refined until it resolves the modes of the first function and
    half of the points give the same sums.

    Returns the points that count, the spacings, and the logs of the first function at the points.
    """
    if not axes:
        point = np.zeros((1, 0), dtype=int)
        return point, np.ones(0), log_integrands(point)[:, 0]
    steps = np.full(axes, _COARSE)
    seeds = np.array(list(itertools.product(_REACH, repeat=axes)))
    while True:
        indices, logs = _fill(log_integrands, np.rint(seeds).astype(int), steps)
        tops = logs.max(0)
        seen = "one that is zero wherever it was looked at"
        expect(np.isfinite(tops).all(), "noise, scale", "a density of the posterior", seen)
        modes, heights, falls = _modes(indices, logs[:, 0])
        # between the points a parabola rises by an eighth of its fall at most
        open_modes = heights + falls.sum(1) / 4 > tops[0] - _DROP
        steep = "one that is all rounding: are the data far from what the priors allow?"
        counts = (logs > tops - _DROP).any(1)
        expect(
            counts.any() and open_modes.any(), "noise, scale", "a density of the posterior", steep
        )
        rounding = 20 * np.finfo(float).eps * (1 + np.abs(tops).max())
        finer = 3 * np.sqrt(np.maximum(falls[open_modes].max(0) - 4 * rounding, 0))
        values = np.exp(logs[counts] - tops)
        # what half of the points miss of a sum falls as exp(-constant / spacing)
        missed = np.abs((1 - 2 * (indices[counts] % 2)).T @ values / values.sum(0)).max(1)
        needed = np.log(_TOLERANCE / 10) / np.log(np.clip(missed, 1e-30, 0.5))
        rough = missed > max(_TOLERANCE, rounding)
        finer = np.where(rough, np.maximum(finer, np.clip(needed, 1.2, 3)), finer)
        if (finer < 1.2).all() or len(values) > _MOST_POINTS:
            if missed.max() > 1e-6:
                words = f"the posterior is known to {missed.max():.0e} only: its density jumps"
                warnings.warn(words, RuntimeWarning, stacklevel=2)
            return indices[counts], steps, logs[counts, 0]
        finer = np.where(finer < 1.2, 1, np.minimum(finer, 8))
        seeds = np.concatenate([indices[counts], modes[open_modes]]) * finer
        steps = steps / finer


def _fill(log_integrands: Logs, seeds: Integers, steps: Array) -> tuple[Integers, Array]:
    """Evaluates a lattice from the seeds outwards, block by block, to where nothing counts.

    Returns the points, `(k, axes)`, and the logs there, `(k, functions)`.
    """
    axes = len(steps)
    cells = np.array(list(itertools.product(range(_BLOCK[axes]), repeat=axes)))
    around = np.array(list(itertools.product((-1, 0, 1), repeat=axes)))
    new = set(map(tuple, (seeds // _BLOCK[axes]).tolist()))
    done: set[tuple[int, ...]] = set()
    tops = np.array(-np.inf)
    indices, logs = [], []
    while new:
        done |= new
        blocks = np.array(sorted(new))
        indices.append((blocks[:, None] * _BLOCK[axes] + cells).reshape(-1, axes))
        logs.append(log_integrands(indices[-1] * steps))
        tops = np.maximum(tops, logs[-1].max(0))
        counts = (logs[-1] > tops - _DROP).reshape(len(blocks), -1).any(1)
        new = set(map(tuple, (blocks[counts, None] + around).reshape(-1, axes).tolist())) - done
    return np.concatenate(indices), np.concatenate(logs)


def _modes(indices: Integers, logs: Array) -> tuple[Integers, Array, Array]:
    """Finds the points that are as high as all their neighbours.

    Returns them, their heights, and the falls beside them, `(modes, axes)`. These are minus the
    second differences: the squared ratio of the spacing to the sd of a Gaussian so curved.
    """
    low = indices.min(0) - 1
    table = np.full(indices.max(0) - low + 2, -np.inf)
    table[tuple((indices - low).T)] = logs
    modes = np.argwhere(np.isfinite(table) & (table >= ndimage.maximum_filter(table, 3)))
    heights, units = table[tuple(modes.T)], np.eye(table.ndim, dtype=int)
    sides = np.array([[table[tuple((modes + e).T)] for e in (-unit, unit)] for unit in units])
    sides = np.where(np.isfinite(sides), sides, sides[:, ::-1])  # one side may be a jump
    return modes + low, heights, 2 * heights[:, None] - sides.sum(1).T


def _inverse_cdf(densities: Array, levels: Array) -> Array:
    """Finds the places below which densities have given probabilities, in steps of the lattice.

    The density between the points is its Fourier series, whose integral is tabulated on a finer
    lattice and inverted there by cubic polynomials.

    Args:
        densities: values on a lattice, shape `(k, points)`, or `(1, points)` for all levels.
        levels: probabilities, shape `(k,)`.
    """
    size = _FINER * densities.shape[1]
    series = np.fft.rfft(densities / densities.sum(1, keepdims=True))
    slope = np.fft.irfft(series, size) * _FINER
    series[:, 1:] /= 2j * np.pi / densities.shape[1] * np.arange(1, series.shape[1])
    series[:, 0] = 0.0
    below = np.fft.irfft(series, size) * _FINER + np.arange(size) / size
    below -= below[:, :1]
    one = len(densities) == 1
    right = np.searchsorted(below[0], levels) if one else (below < levels[:, None]).sum(1)
    right, rows = right.clip(1, size - 1), np.arange(len(levels)) % len(densities)
    low, high = below[rows, right - 1], below[rows, right]
    rise = np.maximum(high - low, 1e-300)
    t = np.clip((levels - low) / rise, 0.0, 1.0)
    with np.errstate(divide="ignore"):
        slopes = [rise * _FINER / slope[rows, right - side] for side in (1, 0)]
    start, end = (np.clip(each, 0.0, 3.0) for each in slopes)  # which keeps it monotone
    cubic = t**2 * (3 - 2 * t) + t * (1 - t) * (start * (1 - t) - end * t)
    return (right - 1 + cubic) / _FINER


def mixture_quantiles(
    weights: Array, means: Array, sds: Array, levels: Array, start: Array | None = None
) -> Array:
    """Computes quantiles of Gaussian mixtures, by Newton steps inside a bracket that is bisected.

    Args:
        weights: shares of the components, shape `(components,)`.
        means: shape `(components, columns)`.
        sds: shape `(components, columns)`.
        levels: probabilities, shape `(levels,)`.
        start: numbers near the quantiles, shape `(levels, columns)`, which spare steps.

    Returns:
        Shape `(levels, columns)`.
    """
    # the quantile is center + width sinh(x): far out, where the tails may be heavy, steps are wide
    center, width = means[weights.argmax()], sds[weights.argmax()]
    ends = (means + sds * special.ndtri(levels)[:, None, None] - center) / width
    low, high = np.arcsinh(ends.min(1)), np.arcsinh(ends.max(1))
    x = (low + high) / 2
    if start is not None:
        x = np.clip(np.arcsinh((start - center) / width), low, high)
    for _ in range(_MOST_ROUNDS):
        away = (center + width * np.sinh(x)[:, None] - means) / sds
        # in units of the level, so that small probabilities are as exact as others
        excess = np.einsum("k,qkj->qj", weights, special.ndtr(away)) / levels[:, None] - 1
        slope = np.einsum("k,qkj->qj", weights, np.exp(-(away**2) / 2) / sds) / levels[:, None]
        low, high = np.where(excess < 0, x, low), np.where(excess < 0, high, x)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            step = x - excess * np.sqrt(2 * np.pi) / (slope * width * np.cosh(x))
        inside = (step >= low) & (step <= high)
        previous, x = x, np.where(inside, step, (low + high) / 2)
        if np.all((np.abs(excess) < 1e-13) | (np.abs(x - previous) <= 4e-16 * np.abs(x))):
            break
    return center + width * np.sinh(x)
