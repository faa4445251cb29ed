"""What a fit is worth, per datum and in total, in nats."""

from __future__ import annotations

import math
import warnings

import numpy as np
from arviz_stats.base import array_stats

_FEWEST = 25  # draws, below which the tail has too few for a Pareto fit


def khat(log_weights: np.ndarray) -> np.ndarray:
    """Pareto shape of the upper tail of importance weights of shape `(data, draws)`, per datum.

    It is 0 where the weights are equal up to rounding, and NaN with fewer than 25 draws.
    """
    result = np.full(len(log_weights), math.nan)
    finite = np.isfinite(log_weights).all(1)
    spread = np.where(finite, np.ptp(np.where(finite[:, None], log_weights, 0.0), axis=1), 1.0)
    equal = finite & (spread < 1e-5 * (1 + abs(log_weights[:, 0])))
    result[equal] = 0.0
    rest = finite & ~equal
    if log_weights.shape[1] >= _FEWEST and rest.any():
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            for row in np.flatnonzero(rest):
                try:
                    result[row] = array_stats.psislw(-log_weights[row])[1]
                except ValueError:  # all values in the tail are the same
                    result[row] = 0.0
    return result
