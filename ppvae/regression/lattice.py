r"""Sums over the points of a lattice in place of integrals.

For an analytic density that dies out at both ends the error of this trapezoidal rule falls
exponentially as the spacing does (Trefethen, Weideman, *The exponentially convergent trapezoidal
rule*, 2014), and so does that of the Fourier series between the points.
"""

import itertools
import warnings
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from ppvae._checks import expect
from ppvae.regression.priors import Array, Integers

# Logs of functions `(k, functions)` at places `(k, axes)`.
Logs = Callable[[Array], Array]

#: Points of a tabulated Fourier series for each point of its lattice.
FINER = 8
# Functions are followed from their modes down to `exp(-_DROP)` of their highest value.
_DROP = 45.0
_TOLERANCE = 1e-12
_MOST_POINTS = 1 << 16
# The first lattice: its spacing, and points that are in all blocks of the whole line.
_COARSE, _REACH = 0.25, range(-56, 56, 8)
# Points of a block along each axis, by the number of axes: a lattice grows by blocks.
_BLOCK = {1: 64, 2: 8}


def integrate(log_integrands: Logs, axes: int) -> tuple[Integers, Array, Array]:
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


def inverse_cdf(densities: Array, levels: Array) -> Array:
    """Finds the places below which densities have given probabilities, in steps of the lattice.

    The density between the points is its Fourier series, whose integral is tabulated on a finer
    lattice and inverted there by cubic polynomials.

    Args:
        densities: values on a lattice, shape `(k, points)`, or `(1, points)` for all levels.
        levels: probabilities, shape `(k,)`.
    """
    size = FINER * densities.shape[1]
    series = np.fft.rfft(densities / densities.sum(1, keepdims=True))
    slope = np.fft.irfft(series, size) * FINER
    series[:, 1:] /= 2j * np.pi / densities.shape[1] * np.arange(1, series.shape[1])
    series[:, 0] = 0.0
    below = np.fft.irfft(series, size) * FINER + np.arange(size) / size
    below -= below[:, :1]
    one = len(densities) == 1
    right = np.searchsorted(below[0], levels) if one else (below < levels[:, None]).sum(1)
    right, rows = right.clip(1, size - 1), np.arange(len(levels)) % len(densities)
    low, high = below[rows, right - 1], below[rows, right]
    rise = np.maximum(high - low, 1e-300)
    t = np.clip((levels - low) / rise, 0.0, 1.0)
    with np.errstate(divide="ignore"):
        slopes = [rise * FINER / slope[rows, right - side] for side in (1, 0)]
    start, end = (np.clip(each, 0.0, 3.0) for each in slopes)  # which keeps it monotone
    cubic = t**2 * (3 - 2 * t) + t * (1 - t) * (start * (1 - t) - end * t)
    return (right - 1 + cubic) / FINER


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
