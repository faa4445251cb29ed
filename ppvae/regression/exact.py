r"""The exact posterior of a linear regression with Gaussian noise.

Given the noise the weights are Gaussian, so that one decomposition of the data and a quadrature
over the noise (and over the prior scale of the weights, where that is unknown too) give every
moment, quantile and the evidence without Monte Carlo error.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyro.distributions as dist
from numpy.typing import ArrayLike
from scipy import linalg
from torch.distributions import Distribution

from ppvae._checks import check_array, check_count, check_flag, check_names, check_real, expect
from ppvae.regression.factors import Data, Factor, Values, read, read_block
from ppvae.regression.hyper import HyperPosterior, Problem, make_problem, mixture_quantiles
from ppvae.regression.linear_algebra import pieces
from ppvae.regression.loo import LeaveOneOut, log_predictive
from ppvae.regression.priors import Array, Given, read_positive, weight_prior

if TYPE_CHECKING:
    import xarray as xr

Seed = int | np.random.Generator | None

# So many numbers are printed each by itself.
_PRINTED = 30


def exact_posterior(
    X: Data,
    y: Values | None = None,
    *,
    weight: Distribution | None = dist.Normal(0.0, 10.0),  # noqa: B008 (immutable)
    noise: float | Distribution | None = dist.HalfNormal(10.0),  # noqa: B008
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
            only one is held at a time, or a `Factor` of rows that may be on many machines.
        y: array of shape `(rows,)`.
        weight: prior of the weights, a Normal with scalar or per-column `loc` and `scale`, or None
            for a flat prior.
        noise: the known noise sd; or its prior, a distribution on the positive reals; or None for
            the flat prior p(s) = 1.
        scale: the factor t of the prior sds: a number, or a prior on the positive reals for
            a hierarchical model; 1 by default.
        intercept: add a weight with a flat prior, first in order, for a column of ones; a `Factor`
            has been told.

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

        The same of rows that are in two places:

        >>> from ppvae.regression import combine, factorize
        >>> here, there = factorize([[1.0]], [1.0]), factorize([[2.0]], [3.0])
        >>> exact_posterior(combine([here, there]), weight=None, noise=1.0).mean.round(6)
        array([1.4])
    """
    factor, data = read(X, y, intercept=intercept)
    problem = problem_of(factor, weight, noise, scale)
    return ExactPosterior(problem, problem.integrate(), data)


def problem_of(factor: Factor, weight: Distribution | None, noise: Given, scale: Given) -> Problem:
    """Reads the priors of `exact_posterior` and checks them against the data.

    Raises:
        TypeError: a prior is of a wrong kind.
        ValueError: a value is out of its range, shapes do not fit, or the posterior is improper.
    """
    expect(weight is not None or scale is None, "scale", "None with weight=None (flat)", scale)
    given = {"noise": noise, "scale": 1.0 if scale is None else scale}
    numbers = {name: read_positive(value, name) for name, value in given.items()}
    return make_problem(factor, weight_prior(weight, factor.columns - factor.intercept), numbers)


@dataclass(frozen=True, eq=False, repr=False)
class ExactPosterior:
    r"""A posterior of weights, noise and scale: a mixture of Gaussians over points of these two.

    Arrays are in the order of `names`. Moments that do not exist are `inf`, or `nan` for means.
    `exact_posterior` makes it.

    Args:
        problem: the data and the priors.
        hyper: the posterior of noise and scale.
        data: copies of X (with the column of ones) and of y; None if they came in blocks.
    """

    problem: Problem
    hyper: HyperPosterior
    data: tuple[Array, Array] | None = None

    def __repr__(self) -> str:
        names, rows = self.names, self.problem.factor.rows
        head = f"ExactPosterior of {len(names)} numbers given {rows} rows"
        head += f", log evidence {self.log_evidence:.4f} nats"
        if len(names) > _PRINTED:
            return head
        low, high = self.quantile([0.05, 0.95])
        columns = {"mean": self.mean, "sd": self.sd, "5 %": low, "95 %": high}
        width = max(map(len, names))
        lines = [" " * width + "".join(f"{name:>12s}" for name in columns)]
        for name, *values in zip(names, *columns.values(), strict=True):
            lines.append(f"{name:{width}s}" + "".join(f"{value:12.4g}" for value in values))
        return "\n".join([head, *lines])

    @property
    def names(self) -> list[str]:
        """Names of the results, in their order."""
        factor = self.problem.factor
        weights = (f"weight[{j}]" for j in range(factor.columns - factor.intercept))
        return [*["intercept"] * factor.intercept, *weights, *self.problem.unknown]

    @property
    def log_normalizer(self) -> float:
        """Log of the integral of likelihood times prior densities, in nats; a flat one is 1."""
        return self.hyper.log_total

    @property
    def log_evidence(self) -> float:
        """Log of p(y), in nats; nan where a flat prior leaves it undefined."""
        return self.log_normalizer if self.problem.proper else float("nan")

    @cached_property
    def mean(self) -> Array:
        """Posterior means, shape `(names,)`."""
        values = self._loc + self._basis @ (self.hyper.shares @ self._mixture[0])
        missing = self._without_moment(1)
        is_weight = np.arange(len(values)) < self.problem.factor.columns
        return np.where(missing, np.where(is_weight, np.nan, np.inf), values)

    @cached_property
    def covariance(self) -> Array:
        """Posterior covariance, shape `(names, names)`."""
        shares, (means, variances) = self.hyper.shares, self._mixture
        away = means - shares @ means
        inner = (away.T * shares) @ away + np.diag(shares @ variances)
        covariance = self._basis @ inner @ self._basis.T
        covariance = (covariance + covariance.T) / 2
        missing = self._without_moment(2)
        covariance[missing] = covariance[:, missing] = np.nan
        covariance[missing, missing] = np.inf
        return covariance

    @cached_property
    def sd(self) -> Array:
        """Posterior standard deviations, shape `(names,)`."""
        return np.sqrt(np.diag(self.covariance))

    @property
    def _loc(self) -> Array:
        return np.append(self.problem.gaussian.loc, np.zeros(len(self.problem.unknown)))

    @cached_property
    def _basis(self) -> Array:
        """Takes the coordinates of the weights, and noise and scale, to the results."""
        unknown = np.eye(len(self.problem.unknown))
        return linalg.block_diag(self.problem.gaussian.basis, unknown)

    @cached_property
    def _mixture(self) -> tuple[Array, Array]:
        return self._components(self.hyper.log_numbers)

    def _components(self, logs: dict[str, Array]) -> tuple[Array, Array]:
        """Means and variances of the results, given noise and scale, before `_basis` turns them."""
        means, variances = self.problem.gaussian.coordinates(logs["noise"], logs["scale"])
        known = [np.exp(logs[name]) for name in self.problem.unknown]
        zeros = np.zeros((len(means), len(known)))
        return np.column_stack([means, *known]), np.hstack([variances, zeros])

    def _without_moment(self, order: int) -> Array:
        """Which results have tails so heavy that their moment of this order does not exist."""
        gaussian, along = self.problem.gaussian, np.abs(self._basis)
        lacks = {name: not self.problem.has_moment(name, order) for name in self.problem.unknown}
        heavy = np.append(np.zeros(len(gaussian.loc), dtype=bool), list(lacks.values()))
        # the flat weights spread with the noise, and those that no data see with the scale
        heavy[: gaussian.flat] = lacks.get("noise", False)
        heavy[gaussian.rank : len(gaussian.loc)] = lacks.get("scale", False)
        return along[:, heavy > 0].sum(1) > 1e-12 * along.sum(1)

    def quantile(self, q: ArrayLike) -> Array:
        r"""Quantiles of each result by itself.

        Args:
            q: probabilities between 0 and 1, a number or shape `(k,)`.

        Returns:
            Shape `(names,)` for a number, `(k, names)` for several.

        Raises:
            TypeError: there are others than numbers among the probabilities.
            ValueError: one is not between 0 and 1.
        """
        given = check_real("q", q)
        levels = check_array("q", given, ("k",)[: given.dim()]).reshape(-1)
        inside = ((levels > 0) & (levels < 1)).all()
        expect(inside, "q", "probabilities between 0 and 1", repr(q))
        shares, (means, variances) = self.hyper.shares, self._mixture
        weights = np.empty((len(levels), self.problem.factor.columns))
        for part in pieces(weights.shape[1], len(shares) * len(levels)):
            basis = self._basis[: weights.shape[1]][part].T
            sds = np.sqrt(variances @ basis**2)
            weights[:, part] = mixture_quantiles(shares, means @ basis, sds, levels)
        table = self._loc + np.hstack([weights, self.hyper.quantiles(levels)])
        return table if given.dim() else table[0]

    def sample(
        self, num_samples: int | None = None, seed: Seed = None, *, n: int | None = None
    ) -> Array:
        """Independent draws, shape `(num_samples, names)`.

        Args:
            num_samples: number of draws, at least 0.
            seed: a seed or a NumPy generator; no global random state is used.
            n: the former name of `num_samples`.

        Raises:
            ValueError: `num_samples` is no whole number of at least 0.
            TypeError, ValueError: `seed` is neither a seed nor a generator.
        """
        if n is not None:
            warnings.warn("n: is now called num_samples", DeprecationWarning, stacklevel=2)
            num_samples = n
        size = check_count("num_samples", num_samples, 0)
        try:
            generator = np.random.default_rng(seed)
        except (TypeError, ValueError) as error:
            wanted = "a whole number of at least 0, or a NumPy generator"
            raise type(error)(f"seed: expected {wanted}, got {seed!r}") from error
        means, variances = self._components(self.hyper.sample(size, generator))
        drawn = means + np.sqrt(variances) * generator.standard_normal(means.shape)
        return self._loc + drawn @ self._basis.T

    def loo(
        self,
        X: Values | None = None,
        y: Values | None = None,
        *,
        others: Factor | None = None,
        pointwise: bool = True,
    ) -> LeaveOneOut:
        r"""Predicts each datum from all others, exactly and without refitting.

        Given noise s and scale, with residual e and leverage h of a datum,

        .. math:: p(y_i | y_{-i}, s) = N(e_i; 0, s^2 / (1 - h_i)) (1 - h_i)^{-1},

        as a density of e_i / (1 - h_i); with unknown noise or scale, over the posterior of both,

        .. math:: p(y_i | y_{-i}) = 1 / E[1 / p(y_i | y_{-i}, s)],

        by a sum over its points. Where that has lost digits, the others are fitted anew.

        Data that came in blocks are given again, block by block and anywhere, as this object is
        small; `LeaveOneOut.combine` adds up what it returns for each.

        Args:
            X: one block of the rows that this posterior was made of, shape `(rows, columns)`, or
                nothing for all of them, if they were given as arrays.
            y: shape `(rows,)`.
            others: the factor of all rows but the block's (`combine` of those of the other blocks).
                It is used only where a datum decides so much that the others are fitted anew, and
                is asked for there.
            pointwise: return the density of each datum, too, and not just the sums.

        Raises:
            TypeError, ValueError: the block is not as the data are (see `factorize`).
            ValueError: the data came in blocks, and none is given; too few remain for a proper
                posterior; the block cannot be one of these data, or the others are not the rest; or
                others are needed and not given.

        Reference:
            Vehtari et al., *Bayesian leave-one-out cross-validation approximations for Gaussian
            latent variable models*, 2016.
        """
        pointwise = check_flag("pointwise", pointwise)
        expect((X is None) == (y is None), "X, y", "both of a block, or neither", "one of them")
        if X is None or y is None:
            if self.data is None:
                got = "none of blocks, which are not kept: give each to loo(X, y)"
                raise ValueError(f"X, y: expected the data, got {got}")
            data = self.data
        else:
            data = read_block(X, y, self.problem.factor)
        found = LeaveOneOut.of(log_predictive(self.problem, self.hyper, *data, others))
        return found if pointwise else found._replace(pointwise=np.empty(0))

    def to_datatree(
        self, num_samples: int = 1000, seed: Seed = None, *, features: Sequence[str] | None = None
    ) -> xr.DataTree:
        r"""Lays out independent draws as ArviZ has them.

        Groups: `posterior` (`weight` with dim `feature`, and where they are unknown `intercept`,
        `noise`, `scale`); unless the data came in blocks also `log_likelihood` and `observed_data`
        (`y` with dim `datum`). Dims `chain` (one) and `draw`.

        Args:
            num_samples: number of draws, at least 1.
            seed: see `sample`.
            features: names of the columns of X; by default those of its factor, if it has any.

        Raises:
            ValueError: there are fewer than one draw, or `features` are not one for each column.
        """
        import arviz_base

        factor, first = self.problem.factor, int(self.problem.factor.intercept)
        draws = self.sample(check_count("num_samples", num_samples), seed)[None]
        count = factor.columns - first
        features = factor.names if features is None else check_names("features", features, count)
        weights = range(first, factor.columns)
        posterior = {n: draws[..., i] for i, n in enumerate(self.names) if i not in weights}
        noise = np.asarray(posterior.get("noise", self.problem.numbers["noise"]))[..., None]
        groups = {"posterior": {"weight": draws[..., weights], **posterior}}
        if self.data is not None:
            X, y = self.data
            away = (y - draws[..., : factor.columns] @ X.T) / noise
            logs = -(away**2) / 2 - np.log(noise) - np.log(2 * np.pi) / 2
            groups |= {"log_likelihood": {"y": logs}, "observed_data": {"y": y}}
        return arviz_base.from_dict(
            groups,
            coords={} if features is None else {"feature": list(features)},
            dims={"weight": ["feature"], "y": ["datum"]},
            attrs={"/": {"inference_library": "ppvae", "sampling": "independent, exact"}},
        )
