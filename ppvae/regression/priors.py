r"""Reads the priors of an exact posterior: numbers and log densities, all in float64."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import block_diag
from torch import Tensor
from torch.distributions import (
    Distribution,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)

from ppvae._checks import LEAST, MOST, check_size, expect
from ppvae.priors import moved
from ppvae.programs.nodes import base_of
from ppvae.regression.conjugate import ConjugateNormal

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Seed = int | np.random.Generator | None
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
        unit: what the number is a multiple of, by the prior.
    """

    distribution: Any
    lower: float = 0.0
    upper: float = np.inf
    rises: float = 1.0
    falls: float = 1.0
    center: float = 0.0
    unit: float = 1.0

    def in_units(self, unit: float) -> "Unknown":
        """The prior of a number that is so many times as large."""
        ends = unit * self.lower, unit * self.upper
        return self._replace(lower=ends[0], upper=ends[1], unit=unit * self.unit)

    def log_prob(self, numbers: Array) -> Array:
        """Log prior densities of numbers."""
        if self.distribution is None:
            return np.zeros(len(numbers))
        # rounding must not put a number on the ends, where the density is zero or infinite
        lower, upper = self.lower / self.unit, self.upper / self.unit
        inside = np.nextafter(lower, np.inf), np.nextafter(upper, 0.0)
        logs = _log_prob(self.distribution, np.clip(numbers / self.unit, *inside))
        return logs - np.log(self.unit)

    def place(self, numbers: Array) -> Array:
        """Where on the line numbers are; infinite outside the support."""
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.log(np.maximum(numbers - self.lower, 0.0))
            if np.isfinite(self.upper):
                x = x - np.log(np.maximum(self.upper - numbers, 0.0))
        return 2 * np.arcsinh((x - self.center) / 2)

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
        log_slope += self.log_prob(np.exp(log_number))
        return log_number, np.where(within, log_slope, -np.inf)


# what a user gives for a positive number: its value, its prior, or None for the flat prior
Given = float | Distribution | None
Number = float | Unknown
# `noise`, the sd, and `scale`, the factor of the prior sds
Numbers = dict[str, Number]


class NormalPrior(NamedTuple):
    """A Normal prior of weights, at a scale of one.

    Attributes:
        loc: mean, shape `(weights,)`.
        root: the sds, shape `(weights,)`, or D of the covariance `D D'`, shape
            `(weights, weights)`.
        relative: whether the sds are in units of the noise sd.
    """

    loc: Array
    root: Array
    relative: bool = False

    @property
    def variances(self) -> Array:
        """Of the weights, at a scale of one."""
        return self.root**2 if self.root.ndim == 1 else (self.root**2).sum(1)

    def times(self, rows: Array) -> Array:
        """Rows, `(k, weights)`, times D."""
        return rows * self.root if self.root.ndim == 1 else rows @ self.root

    def turned(self, columns: Array) -> Array:
        """D times columns, `(weights, k)`."""
        return self.root[:, None] * columns if self.root.ndim == 1 else self.root @ columns

    def longest(self, lengths: Array) -> Array:
        """Bounds of the lengths of columns times D, from those of the columns."""
        return lengths * self.root if self.root.ndim == 1 else lengths @ np.abs(self.root)

    def scaled(self, loc: Array, root: Array) -> "NormalPrior":
        """The prior of weights whose mean and D are so many times as large, each `(weights,)`."""
        if not len(self.loc):  # flat
            return self
        factors = root if self.root.ndim == 1 else root[:, None]
        return self._replace(loc=loc * self.loc, root=factors * self.root)

    def after(self, loc: float, sd: float) -> "NormalPrior":
        """With one more weight, first and independent of the others."""
        one = np.array([sd])
        root = np.append(one, self.root) if self.root.ndim == 1 else block_diag(one, self.root)
        return self._replace(loc=np.append(loc, self.loc), root=root)


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
    """Reads a Normal prior of weights; of none of them for a flat prior.

    Raises:
        TypeError: the prior is neither None nor Normal.
        ValueError: the shape does not fit the columns, or a scale is not positive and finite.
    """
    if weight is None:
        return NormalPrior(np.zeros(0), np.zeros(0))
    relative = isinstance(weight, ConjugateNormal)
    loc, root = _loc_and_root(weight.prior if relative else weight)
    expected = f"a Normal with one loc and scale, or one for each of the {columns} columns"
    fits = loc.shape in {(), (1,), (columns,)} and root.shape in {loc.shape, (columns, columns)}
    expect(fits, "weight", expected, f"shape {loc.shape}")
    sds = root if root.ndim < 2 else np.abs(np.diag(root))
    fine = np.isfinite(loc).all() and np.isfinite(root).all() and (sds > 0).all()
    expect(fine, "weight", "a finite loc and a positive, finite scale", f"{loc} and {sds}")
    fine = (abs(loc) <= MOST).all() and ((sds >= LEAST).all() and (abs(root) <= MOST).all())
    expect(fine, "weight", f"numbers of a size from {LEAST} to {MOST}", f"{loc} and {sds}")
    root = np.broadcast_to(root, columns) if root.ndim < 2 else root
    return NormalPrior(np.broadcast_to(loc, columns).copy(), root.copy(), relative)


def _loc_and_root(weight: Any) -> tuple[Array, Array]:
    """Mean, and sds or a root of the covariance, of a Normal distribution."""
    base = base_of(weight)
    if isinstance(base, MultivariateNormal):
        loc = _double(base.loc).numpy()
        # a covariance that was given is read as what it stands for, and its root from that
        given = base.__dict__.get("covariance_matrix")
        if given is None:
            return loc, _double(base._unbroadcasted_scale_tril).numpy()
        return loc, np.linalg.cholesky(_double(given).numpy())
    kinds = "a Normal, a MultivariateNormal, a ConjugateNormal or None here (other priors: "
    kinds += "LinearRegression with a guide)"
    expect(isinstance(base, Normal), "weight", kinds, f"{base!r:.60}", TypeError)
    return _double(base.loc).numpy(), _double(base.scale).numpy()


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
