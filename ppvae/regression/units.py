"""The units of data: priors that are meant for standardised data, in the units of these."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
from numpy.typing import NDArray
from pyro.distributions import transforms
from torch.distributions import Distribution

from ppvae._checks import expect
from ppvae.regression.factors import Factor
from ppvae.regression.priors import Array, NormalPrior, weight_prior

#: About standardised data: all that sets the strength of the regularisation is unknown.
PRIORS = {
    "weight": dist.Normal(0.0, 1.0),
    "noise": dist.HalfNormal(1.0),
    "scale": dist.HalfNormal(1.0),
}

# Of the sd of y.
_LEAST_NOISE = 1e-6


class Units(NamedTuple):
    """Where columns lie and how far they spread; a column that does not vary has a spread of one.

    Attributes:
        center: shape `(columns,)`; zeros where there is no intercept to take it.
        spread: sds about the center, shape `(columns,)`.
        varies: whether each column does, shape `(columns,)`.
    """

    center: Array
    spread: Array
    varies: NDArray[np.bool_]

    @staticmethod
    def of(values: Array, counts: Array | None = None, *, centered: bool = True) -> Units:
        """The means and sds of columns `(rows, columns)`, each row as often as `counts` says."""
        center = np.average(values, 0, counts) if centered else np.zeros(values.shape[1])
        spread = np.sqrt(np.average((values - center) ** 2, 0, counts))
        return Units._of_spread(center, spread)

    @staticmethod
    def of_factor(factor: Factor) -> Units:
        """The same of the columns of a factor and of y, last, without that of its intercept.

        Raises:
            ValueError: no row counts.
        """
        expect(factor.counted != 0, "counts", "a row that counts", "zeros")
        first = int(factor.intercept)
        columns = factor.triangle[:, first:]
        center = np.zeros(columns.shape[1])
        if first and len(columns) and factor.triangle[0, 0] > 0:
            center = columns[0] / factor.triangle[0, 0]
        return Units._of_spread(center, factor.spreads[first:])

    @staticmethod
    def _of_spread(center: Array, spread: Array) -> Units:
        varies = spread > 1e-12 * np.abs(center)  # and what is left of a constant is rounding
        return Units(center, np.where(varies, spread, 1.0), varies)

    def require_target(self) -> float:
        """The spread of y, the last column.

        Raises:
            ValueError: y does not vary.
        """
        expect(self.varies[-1], "y", 'values that vary, for scale="data"', "none that do")
        return float(self.spread[-1])

    def of_weights(self, *, relative: bool, response: bool = True) -> tuple[Array, Array]:
        """What the mean and the sd of the prior of a standardised weight are multiplied by.

        Both by `sd(y) / sd(x_j)`; but a prior in units of the noise has the unit of y from that.

        Args:
            relative: whether the prior is in units of the noise.
            response: whether y is in the units of the predictor; else its sd is taken as one.
        """
        sd = self.spread[-1] if response else 1.0
        return sd / self.spread[:-1], (1.0 if relative else sd) / self.spread[:-1]

    @property
    def columns(self) -> Units:
        """Those without the last one, y."""
        return Units(self.center[:-1], self.spread[:-1], self.varies[:-1])

    def standardize(self, values: Array) -> Array:
        """The columns in units of their spread, about their centers."""
        return (values - self.center) / self.spread


def rescaled_weight(prior: Any, units: Units) -> Any:
    """A prior of standardised weights times `sd(y) / sd(x_j)`; y is the last of the columns."""
    if prior is None:
        return None
    columns = len(units.spread) - 1
    read = prior if isinstance(prior, NormalPrior) else weight_prior(prior, columns)
    return read.scaled(*units.of_weights(relative=read.relative))


def rescaled_noise(
    prior: float | Distribution | None, spread: float
) -> float | Distribution | None:
    """A prior of the noise sd times the sd of y; a known one, and a flat prior, stay as they are.

    A prior is moved up by a millionth, so that where y is an exact function of the columns the
    noise does not go to zero.
    """
    if not isinstance(prior, Distribution):
        return prior
    scaled = transforms.AffineTransform(_LEAST_NOISE * spread, spread)
    return dist.TransformedDistribution(prior, [scaled])
