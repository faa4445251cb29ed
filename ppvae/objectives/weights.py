"""Importance weights of draws: log p(x), its standard error, and whether the two can be trusted.

All take log weights log p(x, z) - log q(z) with the draws in front, `(draws, *)`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ppvae._scopes import without_warnings

TRUSTED = 0.7  # k-hat above it: the mean of the weights converges too slowly to be of use
_FEWEST = 30  # draws: a tail of six, the fewest that every version of ArviZ fits


def log_mean_weight(log_weight: Tensor) -> Tensor:
    """The log of the mean weight: log p(x) from below, in expectation, in nats."""
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """The number of equally weighted draws that are worth as much, from 1 to `draws` (Kish)."""
    return 1 / torch.softmax(log_weight, 0).square().sum(0)


def log_mean_weight_se(log_weight: Tensor) -> Tensor:
    """Standard error of `log_mean_weight`, by the delta method.

    It is the relative error of the mean weight, `sqrt(1/ess - 1/draws)`.
    """
    share = 1 / effective_sample_size(log_weight) - 1 / len(log_weight)
    return share.clamp_min(0).sqrt()


def estimates(log_weight: Tensor) -> dict[str, Tensor]:
    """All of these: `log_likelihood` with `log_likelihood_se`, `ess` and `khat`, in float64."""
    log_weight = log_weight.double()
    return {
        "log_likelihood": log_mean_weight(log_weight),
        "log_likelihood_se": log_mean_weight_se(log_weight),
        "ess": effective_sample_size(log_weight),
        "khat": khat(log_weight),
    }


def khat(log_weight: Tensor) -> Tensor:
    """Pareto shape of the upper tail of the weights, `(draws, *)` to `(*)`, in float64.

    Above 0.7 neither `log_mean_weight` nor the effective sample size can be trusted. It is 0 where
    the weights are equal up to rounding, and NaN with fewer than 30 draws.

    Vehtari et al., Pareto smoothed importance sampling, 2024.
    """
    from arviz_stats.base import array_stats  # takes half a second to import

    rows = log_weight.double().reshape(len(log_weight), -1).T.cpu().numpy()
    result = np.full(len(rows), math.nan)
    with without_warnings(), np.errstate(all="ignore"):
        equal = np.ptp(rows, axis=1) < 1e-5 * (1 + abs(rows[:, 0]))  # never, if one is infinite
        result[equal] = 0.0
        fitted = np.isfinite(rows).all(1) & ~equal & (rows.shape[1] >= _FEWEST)
        for row in np.flatnonzero(fitted):
            try:
                result[row] = array_stats.psislw(-rows[row])[1]
            except ValueError:  # all values in the tail are the same
                result[row] = 0.0
    return torch.from_numpy(result).reshape(log_weight.shape[1:])
