r"""The exact posterior of a linear regression with Gaussian noise.

Given the noise the weights are Gaussian, so that one decomposition of the data and a quadrature
over the noise (and over the prior scale of the weights, where that is unknown too) give every
moment, quantile and the evidence without Monte Carlo error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import arviz_base
import numpy as np
import pyro.distributions as dist
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributions import Distribution

from ppvae.regression.leave_one_out import LeaveOneOut, leave_one_out
from ppvae.regression.problem import Problem, read_problem
from ppvae.regression.roots import mixture_quantiles

_WEIGHT = dist.Normal(0.0, 10.0)
_NOISE = dist.HalfNormal(10.0)
# Numbers of the largest array in one step of a computation that can be cut into steps.
_BUDGET = 4_000_000


def exact_posterior(
    X: ArrayLike | Tensor | Iterable[tuple[Any, Any]],
    y: ArrayLike | Tensor | None = None,
    *,
    weight: Distribution | None = _WEIGHT,
    noise: float | Distribution | None = _NOISE,
    scale: float | Distribution | None = None,
    intercept: bool = False,
) -> ExactPosterior:
    r"""Computes the posterior of a linear regression, exactly.

    .. math:: y \sim N(Xw, s^2 I), \qquad w_j \sim N(m_j, t^2 d_j^2), \qquad s \sim p(s),
        \quad t \sim p(t)

    The results are in the order: intercept (with `intercept=True`), weights, noise (if unknown),
    scale (if unknown). All is computed in float64. The cost is one QR pass over the data and then
    of the order of `columns^3`, which with many thousands of columns is a long time.

    Args:
        X: array of shape `(rows, columns)`, wide or tall, where zero rows give the prior; or,
            without y, an iterable of pairs of blocks, `(rows, columns)` and `(rows,)`, of which
            only one is held at a time.
        y: array of shape `(rows,)`.
        weight: prior of the weights, a Normal with scalar or per-column `loc` and `scale`, or None
            for a flat prior.
        noise: the known noise sd; or its prior, a distribution on the positive reals; or None for
            the flat prior p(s) = 1.
        scale: the factor t of the prior sds: a number, or a prior on the positive reals for
            a hierarchical model; 1 by default.
        intercept: add a weight with a flat prior, first in order, for a column of ones.

    Returns:
        The posterior.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: shapes do not fit, values are not finite, a noise or scale is not positive, or
            the posterior is improper.

    Reference:
        Gelman et al., *Bayesian Data Analysis*, 2013, chapter 14.

    Example:
        >>> import pyro.distributions as dist
        >>> posterior = exact_posterior([[1.0], [2.0]], [1.0, 3.0], weight=None, noise=1.0)
        >>> posterior.mean.round(6), posterior.sd.round(6)
        (array([1.4]), array([0.447214]))
    """
    return ExactPosterior(read_problem(X, y, weight, noise, scale, intercept=intercept))


class ExactPosterior:
    r"""A posterior of weights, noise and scale: a mixture of Gaussians over quadrature nodes.

    Arrays are in the order of `names`. Moments that do not exist are `inf`, or `nan` for means.

    Args:
        problem: the regression; see `exact_posterior`.
    """

    def __init__(self, problem: Problem) -> None:
        hyper = problem.integrate()
        center = (float(np.exp(hyper.log_weights) @ v) for v in (hyper.log_noise, hyper.log_scale))
        moved = problem.moved(*center)
        if moved is not problem:
            problem, hyper = moved, moved.integrate()
        self._problem, self._hyper = problem, hyper
        kept = hyper.log_weights > -60.0
        self._log_noise, self._log_scale = hyper.log_noise[kept], hyper.log_scale[kept]
        weights = np.exp(hyper.log_weights[kept])
        self._weights = weights / weights.sum()
        self._coordinates = problem.decomposition.coordinates(self._log_noise, self._log_scale)

    @property
    def names(self) -> list[str]:
        """Names of the results, in their order."""
        intercept = ["intercept"] if self._problem.intercept else []
        count = self._problem.factor.columns - len(intercept)
        return [*intercept, *(f"weight[{j}]" for j in range(count)), *self._positive]

    @property
    def _positive(self) -> dict[str, np.ndarray]:
        """The unknown ones of noise and scale, by name: logs at the nodes."""
        pairs = {"noise": self._log_noise, "scale": self._log_scale}
        unknown = {"noise": self._problem.noise, "scale": self._problem.scale}
        return {name: logs for name, logs in pairs.items() if not unknown[name].known}

    @property
    def log_normalizer(self) -> float:
        """Log of the integral of likelihood times prior densities, in nats; a flat one is 1."""
        return float(self._hyper.log_totals[0]) + self._problem.decomposition.constant

    @property
    def log_evidence(self) -> float:
        """Log of p(y), in nats; nan where a flat prior leaves it undefined."""
        return self.log_normalizer if self._problem.proper else float("nan")

    @cached_property
    def mean(self) -> np.ndarray:
        """Posterior means, shape `(names,)`."""
        basis, loc = self._problem.decomposition.basis, self._problem.decomposition.loc
        weights = loc + basis @ (self._weights @ self._coordinates[0])
        positive = [self._weights @ np.exp(logs) for logs in self._positive.values()]
        values = np.concatenate([weights, positive])
        missing = self._without_moment(1)
        values[missing] = np.where(np.arange(len(values))[missing] < len(weights), np.nan, np.inf)
        return values

    @cached_property
    def covariance(self) -> np.ndarray:
        """Posterior covariance, shape `(names, names)`."""
        basis = self._problem.decomposition.basis
        means, variances = self._coordinates
        away = means - self._weights @ means
        positive = [np.exp(logs) - self._weights @ np.exp(logs) for logs in self._positive.values()]
        away = np.column_stack([away, *positive])
        inner = (away.T * self._weights) @ away
        size = len(basis)
        inner[np.arange(size), np.arange(size)] += self._weights @ variances
        turn = np.eye(len(inner))
        turn[:size, :size] = basis
        covariance = turn @ inner @ turn.T
        covariance = (covariance + covariance.T) / 2
        missing = np.flatnonzero(self._without_moment(2))
        covariance[missing] = covariance[:, missing] = np.nan
        covariance[missing, missing] = np.inf
        return covariance

    @cached_property
    def sd(self) -> np.ndarray:
        """Posterior standard deviations, shape `(names,)`."""
        return np.sqrt(np.diag(self.covariance))

    def _without_moment(self, order: int) -> np.ndarray:
        """Which results have tails so heavy that their moment of this order does not exist."""
        problem, found = self._problem, self._problem.decomposition
        missing = np.zeros(len(self.names), dtype=bool)
        for name in self._positive:
            falls = problem.noise_falls if name == "noise" else problem.scale_falls
            if falls + order < -1e-9:
                continue
            blind = found.sin2 == 0 if name == "noise" else found.cos2 == 0
            along = np.abs(found.basis[:, blind]).sum(1)
            missing[: found.size] |= along > 1e-12 * np.abs(found.basis).sum(1)
            missing[self.names.index(name)] = True
        return missing

    def quantile(self, q: ArrayLike) -> np.ndarray:
        r"""Quantiles of each result by itself.

        Args:
            q: probabilities between 0 and 1, a number or shape `(k,)`.

        Returns:
            Shape `(names,)` for a number, `(k, names)` for several.

        Raises:
            ValueError: a probability is not between 0 and 1.
        """
        levels = np.atleast_1d(np.asarray(q, dtype=float))
        if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all():
            raise ValueError(f"q: expected probabilities between 0 and 1, got {q!r}")
        columns = [self._weight_quantiles(levels)]
        for name in self._positive:
            of = self._hyper.noise_quantile if name == "noise" else self._hyper.scale_quantile
            columns.append(of(levels)[:, None])
        table = np.hstack(columns)
        return table[0] if np.ndim(q) == 0 else table

    def _weight_quantiles(self, levels: np.ndarray) -> np.ndarray:
        found = self._problem.decomposition
        means, variances = self._coordinates
        table = np.empty((len(levels), found.size))
        step = max(1, _BUDGET // (len(self._weights) * len(levels)))
        for start in range(0, found.size, step):
            rows = found.basis[start : start + step]
            sds = np.sqrt(variances @ (rows**2).T)
            table[:, start : start + step] = mixture_quantiles(
                self._weights, means @ rows.T, sds, levels
            )
        return table + found.loc

    def sample(self, n: int, seed: int | np.random.Generator | None = None) -> np.ndarray:
        """Independent draws, shape `(n, names)`.

        Args:
            n: number of draws.
            seed: a seed or a NumPy generator; no global random state is used.

        Raises:
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"n: expected a number of draws that is not negative, got {n}")
        generator = np.random.default_rng(seed)
        found = self._problem.decomposition
        log_noise, log_scale = self._hyper.sample(n, generator)
        means, variances = found.coordinates(log_noise, log_scale)
        coordinates = means + np.sqrt(variances) * generator.standard_normal(means.shape)
        drawn = {"noise": log_noise, "scale": log_scale}
        positive = [np.exp(drawn[name]) for name in self._positive]
        return np.column_stack([found.loc + coordinates @ found.basis.T, *positive])

    def loo(self) -> LeaveOneOut:
        """Exact leave-one-out log predictive densities; see `leave_one_out`.

        Raises:
            ValueError: the data came in blocks, or too few remain for a proper posterior.
        """
        return leave_one_out(self._problem, self._hyper)

    def to_datatree(
        self,
        num_samples: int = 1000,
        seed: int | np.random.Generator | None = None,
        *,
        features: Sequence[str] | None = None,
    ) -> xr.DataTree:
        r"""Lays out independent draws as ArviZ has them.

        Groups: `posterior` (`weight` with dim `feature`, and where they are unknown `intercept`,
        `noise`, `scale`); unless the data came in blocks also `log_likelihood` and `observed_data`
        (`y` with dim `datum`). Dims `chain` (one) and `draw`.

        Args:
            num_samples: number of draws, at least 1.
            seed: see `sample`.
            features: names of the columns of X.

        Raises:
            ValueError: there are fewer than one draw, or `features` are not one for each column.
        """
        problem, size = self._problem, self._problem.factor.columns
        shift = int(problem.intercept)
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        if features is not None and len(features) != size - shift:
            raise ValueError(f"features: expected {size - shift} names, got {len(features)}")
        draws = self.sample(num_samples, seed)
        posterior = {"intercept": draws[None, :, 0]} if shift else {}
        posterior["weight"] = draws[None, :, shift:size]
        for position, name in enumerate(self._positive):
            posterior[name] = draws[None, :, size + position]
        groups = {"posterior": posterior}
        if problem.factor.design is not None and problem.factor.target is not None:
            target = problem.factor.target
            noise = posterior.get("noise", np.exp(self._log_noise[:1]))[..., None]
            away = (target - draws[None, :, :size] @ problem.factor.design.T) / noise
            logs = -(away**2) / 2 - np.log(noise) - np.log(2 * np.pi) / 2
            groups |= {"log_likelihood": {"y": logs}, "observed_data": {"y": target}}
        return arviz_base.from_dict(
            groups,
            coords={} if features is None else {"feature": list(features)},
            dims={"weight": ["feature"], "y": ["datum"]},
            attrs={"/": {"inference_library": "ppvae", "sampling": "independent, exact"}},
        )
