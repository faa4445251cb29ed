r"""Roots of increasing functions, and the quantiles that they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special

_ROUNDS = 80


def increasing_root(
    function: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    """Roots of increasing functions, elementwise: Newton steps, and bisection where they leave.

    Args:
        function: maps points to values, of the order of one away from the roots, and to slopes.
        low: points below the roots.
        high: points above them.
    """
    x = (low + high) / 2
    for _ in range(_ROUNDS):
        value, slope = function(x)
        low, high = np.where(value < 0, x, low), np.where(value < 0, high, x)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            step = x - value / slope
        inside = (step >= low) & (step <= high)
        previous, x = x, np.where(inside, step, (low + high) / 2)
        if np.all((np.abs(value) < 1e-13) | (np.abs(x - previous) <= 4e-16 * np.abs(x))):
            break
    return x


def mixture_quantiles(
    weights: np.ndarray, means: np.ndarray, sds: np.ndarray, levels: np.ndarray
) -> np.ndarray:
    """Quantiles of mixtures of Gaussians, shape `(levels, columns)`.

    Args:
        weights: shares of the components, shape `(nodes,)`.
        means: shape `(nodes, columns)`.
        sds: shape `(nodes, columns)`.
        levels: probabilities, shape `(levels,)`.
    """
    standard = special.ndtri(levels)[:, None, None]
    ends = means + sds * standard
    low, high = ends.min(1), ends.max(1)

    def residual(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        away = (x[:, None, :] - means) / sds
        value = np.einsum("k,qkj->qj", weights, special.ndtr(away)) / levels[:, None] - 1
        density = np.einsum("k,qkj->qj", weights, np.exp(-(away**2) / 2) / sds)
        return value, density / (np.sqrt(2 * np.pi) * levels[:, None])

    return increasing_root(residual, low, high)
