"""Quantiles of mixtures of Gaussians."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from ppvae._checks import check_array, check_real, expect
from ppvae.regression.priors import Array

_MOST_ROUNDS = 80


def check_levels(q: ArrayLike) -> tuple[Array, bool]:
    """Probabilities, shape `(k,)`, and whether they are given as several.

    Raises:
        TypeError: there are others than numbers.
        ValueError: one is not between 0 and 1.
    """
    given = check_real("q", q)
    levels = check_array("q", given, ("k",)[: given.dim()]).reshape(-1)
    inside = ((levels > 0) & (levels < 1)).all()
    expect(inside, "q", "probabilities between 0 and 1", repr(q))
    return levels, given.dim() > 0


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
