r"""The exact posterior of a linear regression with Gaussian noise.

Given the noise the weights are Gaussian, so that one decomposition of the data and a quadrature
over the noise (and over the prior scale of the weights, where that is unknown too) give every
moment, quantile and the evidence without Monte Carlo error.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.distributions as dist
from numpy.typing import ArrayLike
from scipy import linalg
from torch.distributions import Distribution

from ppvae._checks import (
    MOST,
    check_array,
    check_count,
    check_flag,
    check_real,
    expect,
)
from ppvae.regression.arguments import problem_of
from ppvae.regression.combinations import Combinations
from ppvae.regression.conflict import warn_of_conflict
from ppvae.regression.conjugate import ConjugateNormal
from ppvae.regression.factors import Factor, Given, check_factor, combine, read, read_block
from ppvae.regression.hyper import HyperPosterior, Problem, make_problem
from ppvae.regression.loo import LeaveOneOut, log_predictive, words_of
from ppvae.regression.prediction import Prediction
from ppvae.regression.priors import Array, NormalPrior, Seed
from ppvae.regression.quantiles import check_levels
from ppvae.regression.rows import Rows, Values, is_vector
from ppvae.regression.sampling import draw, generator_of
from ppvae.regression.tree import tree_of

if TYPE_CHECKING:
    import xarray as xr

# So many numbers are printed each by itself, and so many densities worked out for it at most.
_PRINTED, _QUICK = 30, 10_000_000


def exact_posterior(
    X: Given,
    y: Values | None = None,
    *,
    weight: Distribution | ConjugateNormal | ExactPosterior | None = dist.Normal(0.0, 10.0),  # noqa: B008 (immutable)
    noise: float | Values | Distribution | None = dist.HalfNormal(10.0),  # noqa: B008
    scale: float | str | Distribution | None = None,
    intercept: bool | Distribution = False,
    weights: Values | None = None,
    offset: Values | None = None,
    counts: Values | None = None,
) -> ExactPosterior:
    r"""Computes the posterior of a linear regression, exactly.

    .. math:: y_i \sim N(o_i + x_i w, s^2 / k_i), \qquad w_j \sim N(m_j, t^2 d_j^2),
        \qquad s \sim p(s), \quad t \sim p(t)

    The results are in the order: intercept (if there is one), weights, noise (if unknown), scale
    (if unknown). All is computed in float64. The cost is one QR pass over the data and then of the
    order of `columns min(rows, columns)^2`.

    A prior that the data contradict is warned of: a weight several prior sds from its prior mean,
    much more evidence with wider priors, or a noise or a scale that its prior makes most improbable
    (of a scale with a prior the first two are asked where its posterior is). Give
    `scale="data"`, standardise, or add an intercept.

    Of tables and columns of pandas, and arrays of xarray, the rows have labels: those of y and of
    all else that there is for each row must be those of X, in its order, here and wherever rows are
    given. Arrays, lists and tensors have none, and go by position.

    Args:
        X: array of shape `(rows, columns)`, wide or tall, where zero rows give the prior; or,
            without y, an iterable of pairs of blocks, `(rows, columns)` and `(rows,)`, of which
            only one is held at a time, or a `Factor` of rows that may be on many machines.
        y: array of shape `(rows,)`, or `(rows, 1)`.
        weight: prior of the weights: a Normal with scalar or per-column `loc` and `scale`, a
            MultivariateNormal, a `ConjugateNormal` (as `g_prior` makes one), the posterior of other
            data with known noise, or None for a flat prior.
        noise: the known noise sd, or that of each row, shape `(rows,)`; or its prior, a
            distribution on the positive reals; or None for the flat prior p(s) = 1.
        scale: the factor t of the prior sds: a number, or a prior on the positive reals for
            a hierarchical model; 1 by default. Or `"data"`: the priors are for standardised data,
            so that that of a weight is multiplied by `sd(y) / sd(x_j)` (by `sd(y)` for a column
            that does not vary) and that of an unknown noise by `sd(y)`. The sds are about the
            means with an intercept and about zero without, each row by its weight.
        intercept: add a weight, first in order, for a column of ones: True for a flat prior, or a
            Normal, which `scale` does not touch. A `Factor` has been told of the column.
        weights: of the rows, k, positive numbers, shape `(rows,)`; 1 by default.
        offset: what is known of the mean of each row, o, shape `(rows,)`; 0 by default.
        counts: how many times each row counts, shape `(rows,)`, which need not be whole numbers:
            row i stands for so many equal ones.

    Returns:
        The posterior.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: shapes or labels of rows do not fit, values are not finite, a noise, scale or
            weight is not positive, or the posterior is improper.

    Reference:
        Gelman et al., *Bayesian Data Analysis*, 2013, chapter 14; of priors in the scale of the
        data: Gabry, Goodrich, *Prior distributions for rstanarm models*, 2020.

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
    per_row: Any = noise if is_vector(noise) else None
    sides = {"weights": weights, "offset": offset, "counts": counts, "noise": per_row}
    ones = isinstance(intercept, Distribution) or intercept
    factor, rows = read(X, y, intercept=ones, **sides)
    given = _of_other_data(weight, factor, scale) if isinstance(weight, ExactPosterior) else weight
    one = noise if per_row is None else 1.0
    problem = problem_of(factor, given, one, scale, intercept=intercept)
    posterior = ExactPosterior(problem, problem.integrate(), rows, per_row is not None)
    warn_of_conflict(problem, posterior.hyper, posterior.names, posterior.mean)
    return posterior


def _of_other_data(posterior: ExactPosterior, factor: Factor, scale: Any) -> NormalPrior:
    """The posterior of all the weights given other data, as a prior."""
    known = not posterior.problem.unknown
    told = "a posterior whose noise and scale are known; of others, update(X, y) adds data exactly"
    expect(known, "weight", told, f"unknown {', '.join(posterior.problem.unknown)}")
    expect(scale is None, "scale", "None with a posterior as the prior", scale)
    before = posterior.problem.factor
    fits = before.columns == factor.columns and before.intercept == factor.intercept
    expect(fits, "weight", f"a posterior of {factor.columns} columns", before)
    check_factor("X", factor, before)
    return NormalPrior(posterior.mean, linalg.cholesky(posterior.covariance, lower=True))


@dataclass(frozen=True, eq=False, repr=False)
class ExactPosterior:
    r"""A posterior of weights, noise and scale: a mixture of Gaussians over points of these two.

    Arrays are in the order of `names`. Moments that do not exist are `inf`, or `nan` for means.
    `exact_posterior` makes it.

    Args:
        problem: the data and the priors.
        hyper: the posterior of noise and scale.
        rows: a copy of the data; None if they came in blocks.
        noises: whether the noise sd of each row was given, so that of new ones it is asked for.
    """

    problem: Problem
    hyper: HyperPosterior
    rows: Rows | None = None
    noises: bool = False

    def __repr__(self) -> str:
        names, factor = self.names, self.problem.factor
        evidence = (
            f"{self.log_evidence:.4f} nats" if self.problem.proper else "undefined (flat prior)"
        )
        head = f"ExactPosterior of {len(names)} numbers given {factor.rows} rows"
        head += f", log evidence {evidence}"
        more = [f"R2 {self.r2:.4f}"] if self._fits else []
        few = factor.rows * len(self.hyper.shares) * factor.columns <= _QUICK
        if self.rows is not None and self.rows.counts is None and few and self._predicts:
            more.append(f"leave-one-out {words_of(self.loo())}")
        head += f"\n{', '.join(more)}" if more else ""
        if len(names) > _PRINTED:
            return head
        low, high = self.quantile([0.05, 0.95])
        columns = {"mean": self.mean, "sd": self.sd, "5 %": low, "95 %": high}
        width = max(map(len, names))
        lines = [" " * width + "".join(f"{name:>12s}" for name in columns)]
        for name, *values in zip(names, *columns.values(), strict=True):
            lines.append(f"{name:{width}s}" + "".join(f"{value:12.4g}" for value in values))
        for word in ("mean", "sd"):
            if not np.isfinite(columns[word]).all():
                lines.append(
                    f"tails are too heavy for a {word} that is finite; quantiles are exact"
                )
                break
        return "\n".join([head, *lines])

    @property
    def names(self) -> list[str]:
        """Names of the results, in their order: `weight[bmi]` where the columns have names."""
        factor = self.problem.factor
        columns = factor.names or range(factor.columns - factor.intercept)
        weights = (f"weight[{column}]" for column in columns)
        return [*["intercept"] * factor.intercept, *weights, *self.problem.unknown]

    @property
    def log_normalizer(self) -> float:
        """Log of the integral of likelihood times prior densities, in nats; a flat one is 1."""
        return self.hyper.log_total

    @property
    def log_evidence(self) -> float:
        """Log of p(y), in nats; nan where a flat prior leaves it undefined."""
        return self.log_normalizer if self.problem.proper else float("nan")

    @property
    def r2(self) -> float:
        """Share of the variation of y that the mean weights explain.

        About the mean of y where there is an intercept, else about zero.
        """
        triangle, size = self.problem.factor.triangle, self.problem.factor.columns
        left = triangle[:, -1] - triangle[:, :-1] @ self.mean[:size]
        about = triangle[int(self.problem.factor.intercept) :, -1]
        return 1.0 - float(left @ left) / float(about @ about) if about.any() else float("nan")

    @property
    def _fits(self) -> bool:
        return bool(self.problem.factor.rows and np.isfinite(self.mean).all())

    @property
    def _predicts(self) -> bool:
        """Whether one datum less leaves a proper posterior."""
        known = "noise" not in self.problem.unknown
        return self.problem.factor.rows > 1 and (known or self.problem.has_moment("noise", 1))

    @cached_property
    def _weights(self) -> Combinations:
        return Combinations.of_weights(self.problem, self.hyper)

    @property
    def _known(self) -> Array:
        """Noise and scale at the points, where they are unknown, `(points, unknown)`."""
        logs = self.hyper.log_numbers
        table = [np.exp(logs[name]) for name in self.problem.unknown]
        return np.array(table).T.reshape(len(self.hyper.shares), len(table))

    def _of_unknown(self, order: int, values: Array) -> Array:
        """A moment of noise and scale, inf where it does not exist."""
        exists = [self.problem.has_moment(name, order) for name in self.problem.unknown]
        return np.where(np.array(exists, dtype=bool), values, np.inf)

    @cached_property
    def mean(self) -> Array:
        """Posterior means, shape `(names,)`."""
        unknown = self._of_unknown(1, self.hyper.shares @ self._known)
        return np.append(self._weights.mean, unknown)

    @cached_property
    def sd(self) -> Array:
        """Posterior standard deviations, shape `(names,)`."""
        shares, known = self.hyper.shares, self._known
        variances = self._of_unknown(2, shares @ (known - shares @ known) ** 2)
        return np.sqrt(np.append(self._weights.variance, variances))

    @cached_property
    def covariance(self) -> Array:
        """Posterior covariance, shape `(names, names)`."""
        gaussian, shares, logs = self.problem.gaussian, self.hyper.shares, self.hyper.log_numbers
        means, variances = gaussian.coordinates(logs["noise"], logs["scale"])
        known = self._known
        means = np.hstack([means, known])
        variances = np.hstack([variances, np.zeros_like(known)])
        basis = linalg.block_diag(gaussian.basis, np.eye(known.shape[1]))
        away = means - shares @ means
        inner = (away.T * shares) @ away + np.diag(shares @ variances)
        covariance = basis @ inner @ basis.T
        if not gaussian.whole:
            size = len(gaussian.loc)
            unseen = gaussian.unseen(np.eye(size))
            spread = shares @ np.exp(2 * gaussian.log_prior(logs["noise"], logs["scale"]))
            covariance[:size, :size] += spread * (unseen @ unseen.T)
        covariance = (covariance + covariance.T) / 2
        missing = np.isinf(self.sd)
        covariance[missing] = covariance[:, missing] = np.nan
        covariance[missing, missing] = np.inf
        return covariance

    def quantile(self, q: ArrayLike) -> Array:
        r"""Quantiles of each result by itself.

        Args:
            q: probabilities between 0 and 1, a number or shape `(k,)`; they are met to some 1e-15.

        Returns:
            Shape `(names,)` for a number, `(k, names)` for several.

        Raises:
            TypeError: there are others than numbers among the probabilities.
            ValueError: one is not between 0 and 1.
        """
        levels, several = check_levels(q)
        table = np.hstack([self._weights.quantile(levels), self.hyper.quantiles(levels)])
        return table if several else table[0]

    def cdf(self, values: ArrayLike) -> Array:
        r"""How probable it is that each result is below a value, shape `(names,)`, to some 1e-15.

        Args:
            values: a number for all, or shape `(names,)`.

        Raises:
            TypeError, ValueError: they are no finite numbers of such a shape.
        """
        size, several = len(self.names), check_real("values", values).dim()
        given = check_array("values", values, (size,) if several else ())
        places = np.broadcast_to(given, (size,))
        weights, unknown = np.split(places, [self.problem.factor.columns])
        below = [self._weights.cdf(weights), self.hyper.cdf(unknown[None])[0]]
        return np.concatenate(below)

    @property
    def prob_positive(self) -> Array:
        """How probable it is that each result is above zero, shape `(names,)`, to some 1e-15."""
        above = self._weights.negative().cdf(np.zeros(self.problem.factor.columns))
        return np.append(above, np.ones(len(self.problem.unknown)))

    def predict(
        self,
        X: Values,
        *,
        weights: Values | None = None,
        offset: Values | None = None,
        noise: Values | None = None,
    ) -> Prediction:
        """Predicts new data, exactly.

        Args:
            X: shape `(rows, columns)`, without a column of ones.
            weights: of the rows, shape `(rows,)`: the noise variance is divided by them.
            offset: what is known of the mean of each row, shape `(rows,)`.
            noise: the noise sd of each row, shape `(rows,)`, where that of the data was given so.

        Returns:
            Means, sds, intervals, densities and draws of the new data.

        Raises:
            TypeError, ValueError: X has not the columns of the data, labels of rows do not fit, or
                there are others than finite numbers.

        Example:
            >>> posterior = exact_posterior([[1.0], [2.0]], [1.0, 3.0], weight=None, noise=1.0)
            >>> new = posterior.predict([[2.0]])
            >>> new.mean.round(6), new.epistemic_sd.round(6), new.noise_sd
            (array([2.8]), array([0.894427]), array([1.]))
        """
        self._expect_noise(noise, weights)
        sides = {"weights": weights, "offset": offset, "noise": noise}
        rows = read_block(X, None, self.problem.factor, **sides)
        plain = np.ones(len(rows)) if rows.sds is None else rows.sds
        start = np.zeros(len(rows)) if rows.offset is None else rows.offset
        size = np.abs(rows.X).max(initial=0.0)
        expect(size <= MOST, "X", f"numbers of a size of {MOST} at most", size)
        return Prediction(self.problem, self.hyper, rows.X, start, plain, rows.labels)

    def update(
        self,
        X: Given,
        y: Values | None = None,
        *,
        weights: Values | None = None,
        offset: Values | None = None,
        noise: Values | None = None,
        counts: Values | None = None,
    ) -> ExactPosterior:
        """The posterior given more data, too, with the same priors: that of all data at once.

        It warns as `exact_posterior` does. Priors that were in units of the data, by
        `scale="data"`, stay in those of the first ones.

        Args:
            X: see `exact_posterior`.
            y: see `exact_posterior`.
            weights: of the new rows.
            offset: of the new rows.
            noise: the noise sd of each new row, where that of the data was given so.
            counts: of the new rows.

        Raises:
            TypeError, ValueError: the data have not the columns of those before, or as for
                `exact_posterior`.

        Example:
            >>> first = exact_posterior([[1.0]], [1.0], weight=None, noise=1.0)
            >>> first.update([[2.0]], [3.0]).mean.round(6)
            array([1.4])
        """
        sides = {"weights": weights, "offset": offset, "noise": noise, "counts": counts}
        before = self.problem.factor
        if not isinstance(X, Factor):
            self._expect_noise(noise, weights)
        ones = before.intercept and not isinstance(X, Factor)
        factor, rows = read(X, y, intercept=ones, **sides)
        factor = combine([before, check_factor("X", factor, before)])
        kept = None if rows is None or self.rows is None else self.rows.followed_by(rows)
        problem = make_problem(factor, self.problem.weight, self.problem.numbers)
        posterior = replace(self, problem=problem, hyper=problem.integrate(), rows=kept)
        warn_of_conflict(problem, posterior.hyper, posterior.names, posterior.mean)
        return posterior

    def _expect_noise(self, noise: Values | None, weights: Values | None) -> None:
        """Raises a ValueError unless rows have a noise sd if, and only if, the data have."""
        given = noise is not None or weights is not None or not self.noises
        expect(given, "noise", "the noise sd of each row, as it was given of the data's", None)
        one = self.problem.numbers["noise"]
        told = "none where all rows have the same (weights of rows are relative to it)"
        expect(noise is None or one == 1.0, "noise", told, "some")

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
        drawn = draw(self.problem, self.hyper, size, generator_of(seed))
        return np.column_stack([drawn["weight"], *(drawn[name] for name in self.problem.unknown)])

    def loo(
        self,
        X: Values | None = None,
        y: Values | None = None,
        *,
        weights: Values | None = None,
        offset: Values | None = None,
        noise: Values | None = None,
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
            weights: of the block's rows, as they were given.
            offset: of the block's rows.
            noise: the noise sd of each of the block's rows, where it was given so.
            others: the factor of all rows but the block's (`combine` of those of the other blocks).
                It is used only where a datum decides so much that the others are fitted anew, and
                is asked for there.
            pointwise: return the density of each datum, too, and not just the sums.

        Raises:
            TypeError, ValueError: the block is not as the data are (see `factorize`).
            ValueError: rows count several times; the data came in blocks, and none is given; too
                few remain for a proper posterior; the block cannot be one of these data, or the
                others are not the rest; or others are needed and not given.

        Reference:
            Vehtari et al., *Bayesian leave-one-out cross-validation approximations for Gaussian
            latent variable models*, 2016.
        """
        pointwise = check_flag("pointwise", pointwise)
        expect((X is None) == (y is None), "X, y", "both of a block, or neither", "one of them")
        if X is None or y is None:
            if self.rows is None:
                got = "none of blocks, which are not kept: give each to loo(X, y)"
                raise ValueError(f"X, y: expected the data, got {got}")
            rows = self.rows
        else:
            self._expect_noise(noise, weights)
            sides = {"weights": weights, "offset": offset, "noise": noise}
            rows = read_block(X, y, self.problem.factor, **sides)
        counted = "rows of which each counts once", "counts: one of several equal rows is no datum"
        expect(self.problem.factor.counted is None, "loo", *counted)
        found = LeaveOneOut.of(log_predictive(self.problem, self.hyper, rows, others))
        return found if pointwise else found._replace(pointwise=np.empty(0))

    def to_datatree(
        self, num_samples: int = 1000, seed: Seed = None, *, features: Sequence[str] | None = None
    ) -> xr.DataTree:
        r"""Lays out independent draws as ArviZ has them.

        Groups: `posterior` (`weight` with dim `feature`, and where they are unknown `intercept`,
        `noise`, `scale`); unless the data came in blocks also `posterior_predictive`,
        `log_likelihood` and `observed_data` (`y` with dim `datum`) and `constant_data` (`X`, and
        where they were given `offset`, `counts` and, as `noise_sd`, the noise sds of the rows
        relative to that of a row of weight one). Dims `chain` (one) and `draw`.

        Args:
            num_samples: number of draws, at least 1.
            seed: see `sample`.
            features: names of the columns of X; by default those of its factor, if it has any.

        Raises:
            ValueError: there are fewer than one draw, or `features` are not one for each column.
        """
        given: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "features": features}
        return tree_of(self.problem, self.hyper, self.rows, **given)
