r"""What the exact posterior reads off the priors: numbers and densities in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.distributions.transforms import Transform

from ppvae.regression.quadrature import LIMIT


class PositivePrior(NamedTuple):
    """A prior of a positive number, by its log.

    Attributes:
        log_density: log density of the log of the number, elementwise.
        lower: lower end of the log of the number.
        upper: upper end.
        rises: slope of the log density of the log, far down.
        falls: slope far up; minus infinity where the density falls faster than a power.
        proper: the density has an integral.
    """

    log_density: Callable[[np.ndarray], np.ndarray]
    lower: float
    upper: float
    rises: float
    falls: float
    proper: bool


def weight_prior(weight: Any, columns: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Location and scale of a Normal prior, by column; None for a flat one.

    Raises:
        TypeError: the prior is neither None nor a Normal.
        ValueError: the shape does not fit the columns, or a scale is not positive and finite.
    """
    if weight is None:
        return None
    while isinstance(weight, Independent):
        weight = weight.base_dist
    if not isinstance(weight, Normal):
        raise TypeError(f"weight: expected a Normal or None, got {_words(weight)}")
    loc, scale = (_double(t).numpy() for t in (weight.loc, weight.scale))
    if loc.shape not in {(), (1,), (columns,)}:
        raise ValueError(
            f"weight: expected a Normal with one loc and scale, or one for each of the {columns} "
            f"columns, got shape {loc.shape}"
        )
    if not (np.isfinite(scale).all() and (scale > 0).all() and np.isfinite(loc).all()):
        raise ValueError(
            f"weight: expected a finite loc and a positive, finite scale, got {loc} and {scale}"
        )
    return np.broadcast_to(loc, columns).copy(), np.broadcast_to(scale, columns).copy()


def known_number(value: Any, name: str) -> float | None:
    """The value of a known positive number, or None where it is not a number.

    Raises:
        ValueError: the number is not positive and finite.
    """
    if isinstance(value, bool) or not isinstance(
        value, int | float | np.number | np.ndarray | Tensor
    ):
        return None
    array = _double(torch.as_tensor(value)).numpy()
    if array.size != 1 or not np.isfinite(array).all() or not (array > 0).all():
        raise ValueError(f"{name}: expected a positive, finite number, got {value}")
    return float(array.reshape(()))


def positive_prior(value: Any, name: str) -> PositivePrior:
    """Reads a prior on the positive reals; None is the flat density.

    Raises:
        TypeError: the value is no distribution.
        ValueError: it is not univariate, is discrete, or reaches below zero.
    """
    if value is None:
        return PositivePrior(lambda u: u, -LIMIT, LIMIT, 1.0, 1.0, proper=False)
    if not isinstance(value, Distribution):
        raise TypeError(
            f"{name}: expected a positive number, a distribution on the positive reals or None, "
            f"got {_words(value)}"
        )
    prior = _double(value)
    if prior.batch_shape.numel() * prior.event_shape.numel() != 1:
        raise ValueError(f"{name}: expected a univariate distribution, got {_words(value)}")
    if prior.support.is_discrete or _reaches_below_zero(prior):
        raise ValueError(f"{name}: expected a density on the positive reals, got {_words(value)}")

    def log_density(u: np.ndarray) -> np.ndarray:
        return _log_prob(prior, np.exp(u)) + u

    lower, upper = _ends(prior)
    ends = log_density(np.array([-LIMIT + 40, -LIMIT + 50, LIMIT - 50, LIMIT - 40]))
    with np.errstate(invalid="ignore"):
        rises, falls = (ends[1] - ends[0]) / 10, (ends[3] - ends[2]) / 10
    rises = rises if np.isfinite(rises) else np.inf
    falls = falls if np.isfinite(falls) else -np.inf
    return PositivePrior(log_density, lower, upper, rises, falls, proper=True)


def _reaches_below_zero(prior: Distribution) -> bool:
    points = np.array([-1.0, -1e-6])
    support: Any = prior.support
    inside = support.check(torch.from_numpy(points).reshape(-1, 1)).numpy().reshape(-1)
    return bool((inside & np.isfinite(_log_prob(prior, points))).any())


def _ends(prior: Distribution) -> tuple[float, float]:
    """The logs of the ends of the support."""
    low = float(getattr(prior.support, "lower_bound", 0.0))
    high = float(getattr(prior.support, "upper_bound", np.inf))
    lower = np.log(low) if low > 0 else -LIMIT
    return max(lower, -LIMIT), min(np.log(high), LIMIT)


def _log_prob(prior: Distribution, values: np.ndarray) -> np.ndarray:
    points = torch.from_numpy(values).reshape(-1, *prior.batch_shape, *prior.event_shape)
    with torch.no_grad():
        logs = prior.log_prob(points).numpy().reshape(-1)
    return np.where(np.isnan(logs) | np.isposinf(logs), -np.inf, logs)


def _double(value: Any) -> Any:
    """A copy of a distribution or transform that computes in float64 and checks no arguments.

    A float32 argument is read as the shortest decimal that it stands for: `Normal(0.0, 0.1)` means
    0.1, and not 0.1 rounded to eight digits.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.float32:
            return value.detach().cpu().double() if value.is_floating_point() else value
        digits = value.detach().cpu().numpy().astype(str).astype(np.float64)
        return torch.from_numpy(np.asarray(digits))
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_double(v) for v in value)
    if isinstance(value, Distribution | Transform):
        value = copy.copy(value)
        for key, attribute in list(vars(value).items()):
            value.__dict__[key] = _double(attribute)
        if isinstance(value, Distribution):
            value._validate_args = False
    return value


def _words(value: Any) -> str:
    if isinstance(value, Distribution):
        return f"{value} on {getattr(value, 'support', 'an unknown support')}"
    return f"{type(value).__name__} ({value!r:.60})"
