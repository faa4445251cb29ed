r"""Bayesian regression and classification with scikit-learn's manners.

They are in this file alone, which is imported when one of them is first used: the library does
without scikit-learn (`pip install ppvae[sklearn]` brings it).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch.distributions import Distribution

from ppvae._checks import check_choice, check_count, check_flag, expect
from ppvae.data.labels import check_aligned
from ppvae.families import Family, full_rank
from ppvae.guides import FamilyGuide
from ppvae.likelihoods import Bernoulli, Categorical
from ppvae.regression._drawing import draw_latents
from ppvae.regression.conjugate import ConjugateNormal
from ppvae.regression.exact import ExactPosterior, exact_posterior
from ppvae.regression.generalized import GeneralizedLinear
from ppvae.regression.prediction import Prediction
from ppvae.regression.priors import Array
from ppvae.regression.rows import is_vector
from ppvae.regression.units import PRIORS, Units, rescaled_noise, rescaled_weight
from ppvae.regression.weights import Horseshoe
from ppvae.training import fit as train

__all__ = ["BayesianClassifier", "BayesianRegressor"]


# What "auto" stands for; scikit-learn asks that the defaults of arguments be plain values.
_WEIGHT = {"weight": dist.Normal(0.0, 2.5)}


def _chosen(name: str, prior: Any, known: Mapping[str, Distribution]) -> Any:
    """A copy of a prior, or what "auto" stands for; of "data", which is about units, None."""
    if isinstance(prior, str):
        words = ["auto", "data"] if name == "scale" else ["auto"]
        check_choice(name, prior, words)
        prior = known[name] if prior == "auto" else None
    return copy.deepcopy(prior)


class BayesianRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    r"""Linear regression by its exact posterior, as a scikit-learn regressor.

    .. math:: y \sim N(b + Xw, s^2), \quad w_j \sim N(m_j, t^2 d_j^2), \quad s \sim p(s),
        \quad t \sim p(t)

    Nothing has to be tuned: by default the factor t of the prior sds, which sets the strength of
    the regularisation, and the noise s are unknown, and integrated over. Predictions carry all of
    that uncertainty. It is exact, has no random numbers, and takes of the order of `columns^3`.

    The arguments are those of `exact_posterior`, and mean the same; the intercept's is scikit-
    learn's `fit_intercept`. Data may be in any units: with `standardize=True` the priors are about
    standardised data, and all that is returned is in the units of the data. That is apart from
    `scale`, so that both can be had: of the two it is the unknown factor that predictions need most
    where columns are many.

    Args:
        weight: prior of the weights, one that `exact_posterior` takes; "auto" is `Normal(0, 1)`.
            None is a flat one: least squares.
        noise: prior of the noise sd, "auto" is `HalfNormal(1)`; or its known value, in the units of
            y; or None for a flat one.
        scale: prior of the factor t of the prior sds, "auto" is `HalfNormal(1)`; or a number; None
            is 1, and so is "data", which standardizes, too, as it does for `exact_posterior`.
        standardize: the priors are about data of sd one: the weight's is multiplied by
            `sd(y) / sd(x_j)` and that of the noise by `sd(y)`, about the means with an intercept,
            and about zero without. An unknown noise is then at least a millionth of `sd(y)`, so
            that there is a posterior where y is an exact function of the columns.
        fit_intercept: add an intercept, with a flat prior.

    Attributes:
        posterior_: the `ExactPosterior`, in the units of the data.
        coef_: posterior means of the weights, shape `(columns,)`.
        intercept_: that of the intercept, 0.0 without one.
        n_features_in_: number of columns.
        feature_names_in_: their names, of a table.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> regressor = BayesianRegressor().fit(X[:342], y[:342])
        >>> mean, sd = regressor.predict(X[342:], return_std=True)
        >>> low, high = regressor.predict_interval(X[342:], level=0.9)
        >>> print(f"{((low < y[342:]) & (y[342:] < high)).mean():.2f} inside")
        0.89 inside
    """

    def __init__(
        self,
        *,
        weight: Distribution | ConjugateNormal | str | None = "auto",
        noise: float | Distribution | str | None = "auto",
        scale: float | Distribution | str | None = "auto",
        standardize: bool = True,
        fit_intercept: bool = True,
    ) -> None:
        self.weight = weight
        self.noise = noise
        self.scale = scale
        self.standardize = standardize
        self.fit_intercept = fit_intercept

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> BayesianRegressor:
        """Computes the posterior.

        Args:
            X: shape `(rows, columns)`, an array or a table.
            y: shape `(rows,)`.
            sample_weight: how often each row counts, shape `(rows,)`; need not be whole.

        Raises:
            TypeError, ValueError: as `exact_posterior`, also where rows have labels, or as scikit-
                learn's checks of data.
        """
        intercept = check_flag("fit_intercept", self.fit_intercept)
        check_aligned(X=X, y=y, sample_weight=sample_weight)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        y = np.asarray(y, dtype=np.float64)
        counts = _counts(sample_weight, X)
        if counts is not None:
            X, y, counts = X[counts > 0], y[counts > 0], counts[counts > 0]
        given = {"weight": self.weight, "noise": self.noise, "scale": self.scale}
        weight, noise, scale = (_chosen(name, prior, PRIORS) for name, prior in given.items())
        if weight is None and isinstance(self.scale, str):
            scale = None  # which a flat prior has none of
        of_data = isinstance(self.scale, str) and self.scale == "data"
        if check_flag("standardize", self.standardize) or of_data:
            units = Units.of(np.column_stack([X, y]), counts, centered=intercept)
            weight = rescaled_weight(weight, units)
            noise = rescaled_noise(noise, float(units.spread[-1]))
        expect(not is_vector(noise), "noise", "one number, a prior, or None", "one for each row")
        names = getattr(self, "feature_names_in_", None)
        table = X if names is None else pd.DataFrame(X, columns=names)
        self.posterior_: ExactPosterior = exact_posterior(
            table, y, weight=weight, noise=noise, scale=scale, intercept=intercept, counts=counts
        )
        mean, first = self.posterior_.mean, int(intercept)
        self.coef_ = mean[first : first + X.shape[1]]
        self.intercept_ = float(mean[0]) if intercept else 0.0
        return self

    def predictive(self, X: Any) -> Prediction:
        """The predictive distribution of new rows: mean, sd, intervals, densities; see there."""
        check_is_fitted(self)
        return self.posterior_.predict(validate_data(self, X, dtype=np.float64, reset=False))

    def predict(self, X: Any, return_std: bool = False) -> Any:  # noqa: FBT001, FBT002 (theirs)
        """Predictive means, shape `(rows,)`; with `return_std` also the sds of new data.

        The sds have the noise and what is unknown of the line, as those of `BayesianRidge`.
        """
        prediction = self.predictive(X)
        return (prediction.mean, prediction.sd) if return_std else prediction.mean

    def predict_interval(self, X: Any, level: float = 0.9) -> tuple[Array, Array]:
        """Ends of the central interval that has a new datum with probability `level`.

        Returns:
            Lower and upper ends, each of shape `(rows,)`.

        Raises:
            ValueError: `level` is not between 0 and 1.
        """
        return self.predictive(X).interval(level)

    def log_prob(self, X: Any, y: Any) -> Array:
        """Log predictive density of data, in nats, shape `(rows,)`; the mean scores a model."""
        check_is_fitted(self)
        check_aligned(X=X, y=y)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, reset=False)
        return self.posterior_.predict(X).log_prob(np.asarray(y, dtype=np.float64))


def _counts(sample_weight: Any, X: Array) -> Array | None:
    """How often rows count, None for once each."""
    if sample_weight is None:
        return None
    counts = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    expect((counts > 0).any(), "sample_weight", "a row that counts", "zeros")
    return counts


class BayesianClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    r"""Logistic regression by a variational posterior, as a scikit-learn classifier.

    .. math:: p(y = k) \propto \exp(b_k + x w_k), \qquad w_{jk} \sim p(w)

    It is the posterior of a `GeneralizedLinear`. Of two classes the first has the logit 0; of more
    each has weights of its own, which the proper prior identifies. The guide is of a family of Pyro
    guides, fitted by `ppvae.fit` to its optimum, without settings; probabilities are averaged over
    it, so that they are less sure far from the data than those at a point.

    Not for thousands of weights, of which the full covariance has the square: give
    `families.mean_scale` there.

    Args:
        weight: prior of the weights of a class, one that `GeneralizedLinear` takes; "auto" is
            `Normal(0, 2.5)`, which rstanarm has.
        scale: a factor of the prior scales of the weights, or a prior of such a factor; None is 1.
        family: of the guide: `families.mean_scale` (mean field), `families.deterministic` (the
            point of penalised maximum likelihood), or another; None is `families.full_rank`.
        standardize: the priors are about columns of sd one.
        fit_intercept: add an intercept to each class, with the prior `Normal(0, 10)` at the means.
        num_samples: draws of the guide that predictions are averaged over.
        random_state: of the draws; the same number gives the same result.

    Attributes:
        classes_: the labels.
        coef_: posterior means of the weights, shape `(1, columns)` for two classes, else
            `(classes, columns)`, in the units of the data.
        intercept_: of the intercepts, shape `(1,)` or `(classes,)`.
        posterior_: draws of both, `{"weight": (draws, ...), "intercept": (draws, ...)}`, and of
            what else is unknown of the priors, such as `scale`.
        verdict_: what `fit` says of the optimum, and of how well the family fits.
        n_features_in_: number of columns.
        feature_names_in_: their names, of a table.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> classifier = BayesianClassifier().fit(X[50:, 2:], y[50:])
        >>> classifier.predict_proba([[4.9, 1.7]]).shape
        (1, 2)
    """

    def __init__(
        self,
        *,
        weight: Distribution | Horseshoe | str | None = "auto",
        scale: float | Distribution | None = None,
        family: Family | None = None,
        standardize: bool = True,
        fit_intercept: bool = True,
        num_samples: int = 1000,
        random_state: Any = 0,
    ) -> None:
        self.weight = weight
        self.scale = scale
        self.family = family
        self.standardize = standardize
        self.fit_intercept = fit_intercept
        self.num_samples = num_samples
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> BayesianClassifier:
        """Fits the guide to its optimum.

        Args:
            X: shape `(rows, columns)`, an array or a table.
            y: labels, shape `(rows,)`.
            sample_weight: how often each row counts, shape `(rows,)`; need not be whole.

        Raises:
            TypeError, ValueError: a prior is none that `GeneralizedLinear` takes; there is one
                class only; rows of the arguments have different labels; or as scikit-learn's checks
                of data.

        Warns:
            NotConverged, NarrowFamily: see `ppvae.fit`.
        """
        intercept = check_flag("fit_intercept", self.fit_intercept)
        draws = check_count("num_samples", self.num_samples)
        check_aligned(X=X, y=y, sample_weight=sample_weight)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        counts = _counts(sample_weight, X)
        if counts is None:
            counts = np.ones(len(X))
        X, y, counts = X[counts > 0], y[counts > 0], counts[counts > 0]
        self.classes_, labels = np.unique(y, return_inverse=True)
        expect(len(self.classes_) > 1, "y", "at least two classes", "1 class")
        columns = X.shape[1]
        center, spread = np.zeros(columns), np.ones(columns)
        if check_flag("standardize", self.standardize):
            center, spread, _ = Units.of(X, counts, centered=intercept)
        seed = int(check_random_state(self.random_state).randint(2**31))
        model = self._model(columns)
        guide = FamilyGuide(model, full_rank if self.family is None else self.family)
        arrays = (X - center) / spread, labels.astype(np.float64), counts
        *data, often = map(torch.from_numpy, arrays)
        told: dict[str, Any] = {"kwargs": {"counts": often}, "seed": seed, "progress": False}
        self.verdict_ = train(model, guide, tuple(data), **told).verdict
        drawn = draw_latents(guide, tuple(data), draws, seed)
        weight = drawn["weight"].reshape(draws, -1, columns) / spread
        level = drawn.get("intercept", np.zeros(draws)).reshape(draws, -1) - weight @ center
        self.posterior_ = drawn | {"weight": weight, "intercept": level}
        self.coef_, self.intercept_ = weight.mean(0), level.mean(0)
        return self

    def _model(self, columns: int) -> GeneralizedLinear:
        """The program of standardised columns."""
        classes = len(self.classes_)
        return GeneralizedLinear(
            columns,
            Bernoulli() if classes == 2 else Categorical(classes),
            weight=_chosen("weight", self.weight, _WEIGHT),
            scale=copy.deepcopy(self.scale),
            intercept=dist.Normal(0.0, 10.0) if self.fit_intercept else False,
        )

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of the classes, averaged over the posterior, shape `(rows, classes)`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        weight, level = (self.posterior_[name] for name in ("weight", "intercept"))
        total = np.zeros((len(X), len(self.classes_)))
        for w, b in zip(weight, level, strict=True):
            logits = X @ w.T + b
            if len(self.classes_) == 2:
                logits = np.column_stack([np.zeros(len(X)), logits])
            odds = np.exp(logits - logits.max(1, keepdims=True))
            total += odds / odds.sum(1, keepdims=True)
        return total / len(weight)

    def predict(self, X: Any) -> Any:
        """The most probable labels, shape `(rows,)`."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]
