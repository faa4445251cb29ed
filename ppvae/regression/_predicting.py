"""Predictions of an exact posterior: for each row a mixture of Normals, without Monte Carlo."""

from typing import NamedTuple

import numpy as np
from scipy import special

from ppvae.regression.exact import ExactPosterior
from ppvae.regression.hyper import mixture_quantiles
from ppvae.regression.linear_algebra import pieces
from ppvae.regression.priors import Array

# Points of the posterior of noise and scale that together have less than this are left out.
_NEGLIGIBLE = 1e-15


class Prediction(NamedTuple):
    """The predictive distribution of each row, a mixture over the posterior of noise and scale.

    Attributes:
        shares: probabilities of the components, shape `(components,)`.
        means: shape `(components, rows)`.
        variances: of new data given a component, shape `(components, rows)`.
    """

    shares: Array
    means: Array
    variances: Array

    @property
    def mean(self) -> Array:
        """Shape `(rows,)`."""
        return self.shares @ self.means

    @property
    def sd(self) -> Array:
        """Of new data, shape `(rows,)`."""
        return np.sqrt(self.shares @ (self.variances + (self.means - self.mean) ** 2))

    def interval(self, level: float = 0.9) -> tuple[Array, Array]:
        """Ends of the central interval, each of shape `(rows,)`."""
        levels = np.array([1 - level, 1 + level]) / 2
        low, high = mixture_quantiles(self.shares, self.means, np.sqrt(self.variances), levels)
        return low, high

    def cdf(self, y: Array) -> Array:
        """Probability of less than y, shape `(rows,)`."""
        return self.shares @ special.ndtr((y - self.means) / np.sqrt(self.variances))

    def log_prob(self, y: Array) -> Array:
        """Log density of y, in nats, shape `(rows,)`."""
        logs = -(((y - self.means) ** 2) / self.variances + np.log(2 * np.pi * self.variances)) / 2
        return special.logsumexp(logs, 0, b=self.shares[:, None])


def predict_rows(posterior: ExactPosterior, X: Array) -> Prediction:
    """Predicts rows of shape `(rows, columns)`, without the column of ones."""
    problem, hyper = posterior.problem, posterior.hyper
    gaussian = problem.gaussian
    design = np.column_stack([*[np.ones(len(X))] * problem.factor.intercept, X])
    order = np.argsort(hyper.shares)
    kept = np.sort(order[np.cumsum(hyper.shares[order]) > _NEGLIGIBLE])
    shares = hyper.shares[kept] / hyper.shares[kept].sum()
    log_noise, log_scale = (hyper.log_numbers[name][kept] for name in ("noise", "scale"))
    means = np.empty((len(kept), len(X)))
    variances, coordinates = np.empty_like(means), gaussian.coordinates(log_noise, log_scale)
    for part in pieces(len(X), len(gaussian.loc)):
        rows = design[part] @ gaussian.basis
        means[:, part] = design[part] @ gaussian.loc + coordinates[0] @ rows.T
        variances[:, part] = coordinates[1] @ (rows**2).T + np.exp(2 * log_noise)[:, None]
    return Prediction(shares, means, variances)
