r"""Reads the priors of an exact posterior: numbers and log densities, all in float64."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution, Normal, TransformedDistribution

from ppvae._checks import LEAST, MOST, check_size, expect
from ppvae.priors import moved
from ppvae.programs.nodes import base_of

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
# Logs of positive numbers are kept within this, so that their squares are floats.
_LIMIT = 300.0


class Unknown(NamedTuple):
    """A positive number with a prior, and a line on which to integrate over it.

    Attributes:
        distribution: the prior, or None for the density 1 on all positive numbers.
        lower: lower end of its support.
        upper: upper end.
        rises: slope of the log density of the log number, far down; infinity below the support.
        falls: slope far up; minus infinity where the density falls faster than a power.
        center: where on the reals the line is finest.
    """

    distribution: Any
    lower: float = 0.0
    upper: float = np.inf
    rises: float = 1.0
    falls: float = 1.0
    center: float = 0.0

    def around(self, number: float) -> "Unknown":
        """Moves the finest part of the line to a number, if that is inside the support."""
        if not self.lower < number < self.upper:
            return self
        above = np.log(self.upper - number) if np.isfinite(self.upper) else 0.0
        return self._replace(center=np.log(number - self.lower) - above)

    def on_line(self, place: Array) -> tuple[Array, Array]:
        """Maps places on the line to logs of the number, and to log prior densities of the places.

        With `x = center + 2 sinh(place / 2)`, which makes exponential tails short, the number is
        `lower + exp(x)`, or `lower + (upper - lower) sigmoid(x)` where it is bounded (Takahasi,
        Mori, *Double exponential formulas for numerical integration*, 1974).
        """
        x = self.center + 2 * np.sinh(place / 2)
        within = np.abs(x) < _LIMIT
        x = np.where(within, x, 0.0)
        log_part, log_slope = x, x + np.log(np.cosh(place / 2))
        if np.isfinite(self.upper):
            log_part = np.log(self.upper - self.lower) - np.logaddexp(0, -x)
            log_slope += log_part - x - np.logaddexp(0, x)
        with np.errstate(divide="ignore"):
            log_number = np.logaddexp(np.log(self.lower), log_part)
        if self.distribution is not None:
            # rounding must not put a number on the ends, where the density is zero or infinite
            inside = np.nextafter(self.lower, np.inf), np.nextafter(self.upper, 0.0)
            log_slope += _log_prob(self.distribution, np.clip(np.exp(log_number), *inside))
        return log_number, np.where(within, log_slope, -np.inf)


# what a user gives for a positive number: its value, its prior, or None for the flat prior
Given = float | Distribution | None
Number = float | Unknown
# `noise`, the sd, and `scale`, the factor of the prior sds
Numbers = dict[str, Number]
NormalPrior = tuple[Array, Array]


def read_positive(value: Any, name: str) -> Number:
    """Reads a positive number that is known, or the prior of one that is not.

    Args:
        value: a number, a distribution on the positive reals, or None for the flat density.
        name: of the argument, for errors.

    Raises:
        TypeError: the value is neither.
        ValueError: the number is not positive and finite; or the distribution is not univariate, is
            discrete, or reaches below zero.
    """
    if value is None:
        return Unknown(None)
    if isinstance(value, np.floating | np.ndarray | Tensor) and not isinstance(value, float):
        value = _double(torch.as_tensor(value)).squeeze().tolist()
    if isinstance(value, int | float | np.integer | list):
        return check_size(name, value)
    kinds = "a positive number, a distribution on the positive reals or None"
    expect(isinstance(value, Distribution), name, kinds, f"{value!r:.60}", TypeError)
    prior = moved(value, _double, _validate_args=False)
    univariate = prior.batch_shape.numel() * prior.event_shape.numel() == 1
    fits = univariate and not prior.support.is_discrete and not _reaches_below_zero(prior)
    expect(fits, name, "a univariate density on the positive reals", f"{value!r:.60}")
    lower, upper = _ends(prior)
    far = np.array([40.0, 50.0]) - _LIMIT
    with np.errstate(invalid="ignore"):
        rise, fall = (np.diff(_log_prob(prior, np.exp(u)) + u)[0] / 10 for u in (far, -far[::-1]))
    rise, fall = rise if np.isfinite(rise) else np.inf, fall if np.isfinite(fall) else -np.inf
    return Unknown(prior, max(lower, 0.0), upper, rise, fall)


def weight_prior(weight: Any, columns: int) -> NormalPrior:
    """Reads the location and scale of a Normal prior, by column; none for a flat prior.

    Raises:
        TypeError: the prior is neither None nor a Normal.
        ValueError: the shape does not fit the columns, or a scale is not positive and finite.
    """
    if weight is None:
        return np.zeros(0), np.zeros(0)
    weight = base_of(weight)
    expect(isinstance(weight, Normal), "weight", "a Normal or None", f"{weight!r:.60}", TypeError)
    loc, scale = (_double(t).numpy() for t in (weight.loc, weight.scale))
    expected = f"a Normal with one loc and scale, or one for each of the {columns} columns"
    expect(loc.shape in {(), (1,), (columns,)}, "weight", expected, f"shape {loc.shape}")
    fits = np.isfinite(loc).all() and (np.isfinite(scale) & (scale > 0)).all()
    expect(fits, "weight", "a finite loc and a positive, finite scale", f"{loc} and {scale}")
    fits = (abs(loc) <= MOST).all() and ((scale >= LEAST) & (scale <= MOST)).all()
    expect(fits, "weight", f"numbers of a size from {LEAST} to {MOST}", f"{loc} and {scale}")
    return np.broadcast_to(loc, columns).copy(), np.broadcast_to(scale, columns).copy()


def _reaches_below_zero(prior: Any) -> bool:
    points = np.array([-1.0, -1e-6])
    inside = prior.support.check(torch.from_numpy(points).reshape(-1, 1)).numpy().reshape(-1)
    return bool((inside & np.isfinite(_log_prob(prior, points))).any())


def _ends(prior: Any) -> tuple[float, float]:
    """Computes the ends of the support, through one-to-one transforms if there are any."""
    prior = base_of(prior)
    low = float(getattr(prior.support, "lower_bound", -np.inf))
    high = float(getattr(prior.support, "upper_bound", np.inf))
    if isinstance(prior, TransformedDistribution) and all(t.bijective for t in prior.transforms):
        ends = torch.tensor(_ends(prior.base_dist), dtype=torch.float64)
        for transform in prior.transforms:
            ends = transform(ends)
        low, high = max(low, float(ends.min())), min(high, float(ends.max()))
    return low, high


def _log_prob(prior: Distribution, values: Array) -> Array:
    points = torch.from_numpy(values).reshape(-1, *prior.batch_shape, *prior.event_shape)
    with torch.no_grad():
        logs = prior.log_prob(points).numpy().reshape(-1)
    return np.where(np.isnan(logs) | np.isposinf(logs), -np.inf, logs)


def _double(tensor: Tensor) -> Tensor:
    """A copy of a tensor in float64; whole numbers stay as they are.

    A float32 number is read as the shortest decimal that it stands for: `Normal(0.0, 0.1)` means
    0.1, and not 0.1 rounded to eight digits.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.float32:
        return torch.from_numpy(np.asarray(tensor.numpy().astype(str).astype(np.float64)))
    return tensor.double().clone() if tensor.is_floating_point() else tensor
