"""Ridge regression along a path of penalties, from one decomposition, and how one is chosen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ppvae.regression.priors import Array, Integers
from ppvae.regression.units import Units

# Penalties are so many for each row of standardised data, in decades, and so many in each of these.
_LEAST, _MOST, _EACH = -5, 3, 8


class Ridge(NamedTuple):
    r"""The ridge regressions of standardised data, with an intercept, for every penalty.

    .. math:: \hat w = \arg\min_w \|y - X w\|^2 + \lambda \|w\|^2 = V \frac{S c}{S^2 + \lambda}

    Attributes:
        units: of the columns and of y, the last.
        left: U of `X = U S V'`, shape `(rows, rank)`.
        singular: S, shape `(rank,)`.
        right: V, shape `(columns, rank)`.
        along: c = U'y, shape `(rank,)`.
        target: y, standardised, shape `(rows,)`.
    """

    units: Units
    left: Array
    singular: Array
    right: Array
    along: Array
    target: Array

    @staticmethod
    def of(X: Array, y: Array) -> Ridge:
        """Standardises data `(rows, columns)` and `(rows,)` by their own means and sds."""
        units = Units.of(np.column_stack([X, y]))
        block = units.standardize(np.column_stack([X, y]))
        left, singular, right = np.linalg.svd(block[:, :-1], full_matrices=False)
        seen = singular > 1e-12 * singular.max(initial=0.0) * np.sqrt(max(X.shape))
        left, singular, right = left[:, seen], singular[seen], right[seen].T
        return Ridge(units, left, singular, right, block[:, -1] @ left, block[:, -1])

    @property
    def penalties(self) -> Array:
        """A grid of them, shape `(k,)`."""
        return len(self.target) * np.logspace(_LEAST, _MOST, (_MOST - _LEAST) * _EACH + 1)

    def weights(self, penalties: Array) -> Array:
        """Of standardised data, shape `(k, columns)`; a penalty of zero is least squares."""
        shrunk = self.singular * self.along / (self.singular**2 + penalties[:, None])
        return shrunk @ self.right.T

    def predict(self, X: Array, penalties: Array) -> Array:
        """Predictions in the units of y, shape `(k, rows)`."""
        columns = self.units.columns.standardize(X)
        standard = self.weights(penalties) @ columns.T
        return self.units.center[-1] + self.units.spread[-1] * standard

    def spread(self, X: Array, penalty: float) -> Array:
        """Posterior variance of the line over that of the noise, for weights `N(0, s^2 / penalty)`.

        Of a positive penalty; with the flat prior of the intercept, shape `(rows,)`.
        """
        columns = self.units.columns.standardize(X)
        seen = columns @ self.right
        unseen = np.maximum((columns**2).sum(1) - (seen**2).sum(1), 0.0)
        within = (seen**2 / (self.singular**2 + penalty)).sum(1)
        return 1 / len(self.target) + within + unseen / penalty

    def errors(self, penalties: Array) -> tuple[Array, Array]:
        """Of the data themselves, and of each by all others, in the units of y, `(k, rows)`.

        A datum left out is `e / (1 - h)` away, with its residual e and leverage h: exactly, at the
        same penalty and in the same units (Allen, *The relationship between variable selection and
        data augmentation and a method for prediction*, 1974).
        """
        kept = self.singular**2 / (self.singular**2 + penalties[:, None])
        residual = self.target - kept * self.along @ self.left.T
        leverage = kept @ (self.left**2).T + 1 / len(self.target)
        scale = self.units.spread[-1]
        return scale * residual, scale * residual / np.maximum(1 - leverage, 1e-12)

    def evidence(self, penalties: Array) -> tuple[Array, Array]:
        r"""Log evidence of standardised y in nats, and the noise in the units of y, each `(k,)`.

        The weights are `N(0, s^2 / penalty)`, the noise s is the one of highest evidence, and the
        flat prior of the intercept counts as one.
        """
        rows = len(self.target)
        growth = 1 + self.singular**2 / penalties[:, None]
        apart = self.target @ self.target - self.along @ self.along
        misfit = np.maximum(apart, 0.0) + (self.along**2 / growth).sum(1)
        variance = np.maximum(misfit / (rows - 1), 1e-300)
        log_evidence = -(rows - 1) / 2 * (np.log(2 * np.pi * variance) + 1)
        log_evidence += -np.log(growth).sum(1) / 2 - np.log(rows) / 2
        return log_evidence, self.units.spread[-1] * np.sqrt(variance)


def squared_errors(X: Array, y: Array, penalties: Array, parts: list[Integers]) -> Array:
    """Mean squared error of each part of the rows predicted from the others, shape `(k,)`."""
    total = np.zeros(len(penalties))
    for part in parts:
        rest = np.delete(np.arange(len(y)), part)
        away = y[part] - Ridge.of(X[rest], y[rest]).predict(X[part], penalties)
        total += (away**2).sum(1)
    return total / len(y)
