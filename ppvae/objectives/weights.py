"""Importance weights of draws: log p(x), its standard error, and whether the two can be trusted.

All take log weights log p(x, z) - log q(z) with the draws in front, `(draws, *)`.
"""

import math

import numpy as np
import torch
from scipy import special
from torch import Tensor

TRUSTED = 0.7  # k-hat above it: the mean of the weights converges too slowly to be of use
_FEWEST = 30  # draws: a tail of six


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
    rows = log_weight.double().reshape(len(log_weight), -1).T.cpu().numpy()
    result = np.full(len(rows), math.nan)
    with np.errstate(all="ignore"):
        equal = np.ptp(rows, axis=1) < 1e-5 * (1 + abs(rows[:, 0]))  # never, if one is infinite
        result[equal] = 0.0
        fitted = np.isfinite(rows).all(1) & ~equal & (rows.shape[1] >= _FEWEST)
        if fitted.any():
            result[fitted] = _shapes(np.sort(rows[fitted], axis=1))
    return torch.from_numpy(result).reshape(log_weight.shape[1:])


def _shapes(rows: np.ndarray) -> np.ndarray:
    """The shape of a generalized Pareto distribution of the upper tail of each sorted row of logs.

    With b the shape by the negative scale, the shape is the mean of `log(1 - b x)` at the mean of b
    under its profile likelihood, on a grid (Zhang and Stephens, A new and efficient estimation
    method for the generalized Pareto distribution, 2009). Ten observations of a shape of 0.5 keep
    that of a short tail from running away (Vehtari et al.). All rows are fitted at once.
    """
    size = rows.shape[1]
    number = int(3 * size**0.5) if size > 225 else size // 5
    weights = np.exp(rows[:, -number - 1 :] - rows[:, -1:])
    tail, points = weights[:, 1:] - weights[:, :1], 30 + int(number**0.5)
    grid = (1 - np.sqrt(points / (np.arange(1, points + 1) - 0.5)))[:, None]
    grid = grid / (3 * tail[:, int(number / 4 + 0.5) - 1]) + 1 / tail[:, -1]
    shape = np.stack([np.log1p(-b[:, None] * tail).mean(1) for b in grid])
    share = special.softmax(number * (np.log(-grid / shape) - shape), 0)
    kept = share >= 10 * np.finfo(float).eps
    share = np.where(kept, share, 0.0)
    mean = (np.where(kept, grid, 0.0) * share).sum(0) / np.maximum(share.sum(0), 0.5)
    found = (number * np.log1p(-mean[:, None] * tail).mean(1) + 10 * 0.5) / (number + 10)
    return np.where(rows[:, -1] - rows[:, -number] < np.finfo(float).tiny, 0.0, found)
