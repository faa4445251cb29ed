"""Linear regression as a Pyro program: the twin of the autoencoder, with global latents."""

import warnings
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution

from ppvae._checks import check_array, expect
from ppvae.regression.conjugate import ConjugateNormal
from ppvae.regression.counted import observed
from ppvae.regression.predictor import (
    POSITIVE,
    WEIGHT,
    LinearPredictor,
    in_units_of,
    number_of,
    read_number,
)
from ppvae.regression.weights import Horseshoe


class LinearRegression(LinearPredictor):
    r"""The model `y ~ Normal(X w, noise)` with priors on `w` and, where it is unknown, the noise.

    .. math:: y_i \sim N(x_i w + b + o_i,\ s^2 / k_i), \qquad w_j \sim N(m_j, t^2 d_j^2), \qquad
        s \sim p(s), \quad t \sim p(t)

    It is the program of what `exact_posterior` computes, with the same arguments, and takes other
    priors and likelihoods too. Sites: `scale` (where it is unknown), `intercept`
    (where there is one), `weight` (shape `(columns,)`), `noise` (where it is unknown) and `y`, in
    the plate `data`.
    `FamilyGuide(model, family)` without an encoder guides it: the channels are free parameters.

    Args:
        columns: number of columns of X, at least 1.
        weight: prior of the weights: a univariate distribution with scalar or per-column
            arguments (`dist.Normal(0.0, 1.0)`, `dist.Laplace(...)`, `dist.HalfNormal(...)`), a
            `dist.MultivariateNormal` over the columns, a `ConjugateNormal` or `g_prior` in units of
            the noise, which is then drawn first, a `Horseshoe`, or None for a flat prior.
        noise: standard deviation (scale) of the noise: a positive number where it is known, or one
            for each row; a distribution on the positive reals; or None for a flat prior on it.
        scale: the factor t of the prior scales of the weights: a number, or a prior on the positive
            reals for a hierarchical model; 1 by default. `LinearRegression.of` takes "data", too.
        intercept: True adds an intercept with a flat prior, a Normal is its prior; t is no factor
            of that.
        likelihood: makes the distribution of y from its location and scale; by default Normal.
            For heavy tails `functools.partial(dist.StudentT, 4.0)`.
        errors: the former name of `likelihood`.

    Raises:
        TypeError: `weight`, `noise`, `scale`, `intercept` or `likelihood` is of another kind, or
            the prior of the weights has no scale that `scale` could be a factor of.
        ValueError: `columns` is below 1, a known noise or a prior scale is not positive, a prior
            has the wrong shape or support, or, in a call, the rows do not fit.

    Example:
        >>> from ppvae import FamilyGuide, families, fit
        >>> X, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 3.0])
        >>> model = LinearRegression(1, weight=None, noise=1.0)
        >>> guide = FamilyGuide(model, families.full_rank)
        >>> fit(model, guide, (X, y), progress=False).converged
        True
        >>> round(guide.heads["weight"](None).mean.item(), 4)
        1.4
    """

    def __init__(
        self,
        columns: int,
        *,
        weight: Distribution | ConjugateNormal | Horseshoe | None = WEIGHT,
        noise: float | Tensor | Distribution | None = POSITIVE,
        scale: float | Distribution | None = None,
        intercept: bool | Distribution = False,
        likelihood: Callable[..., TorchDistributionMixin] = dist.Normal,
        errors: Callable[..., TorchDistributionMixin] | None = None,
    ) -> None:
        if errors is not None:
            warnings.warn("errors: is now called likelihood", DeprecationWarning, stacklevel=2)
            likelihood = errors
        super().__init__(columns, weight=weight, intercept=intercept, scale=scale)
        self.noise_prior = _read_noise(noise)
        kind = "a function from location and scale to a distribution"
        expect(callable(likelihood), "likelihood", kind, repr(likelihood), TypeError)
        self.likelihood = likelihood

    @classmethod
    def of(
        cls,
        X: Any,
        y: Any,
        *,
        weights: Any = None,
        offset: Any = None,
        counts: Any = None,
        **arguments: Any,
    ) -> Self:
        """A model for some data, whose priors may be in their units.

        Args:
            X: shape `(rows, columns)`.
            y: shape `(rows,)`.
            weights: of the rows, as a call will have them.
            offset: of the rows.
            counts: of the rows.
            **arguments: those of the class. With `scale="data"` the priors of the weights and of an
                unknown noise are meant for columns and y of standard deviation one: the weight's is
                multiplied by sd(y) / sd(x_j), and that of the noise by sd(y); the deviations are
                about the means with an intercept, and about zero without.

        Raises:
            TypeError, ValueError: as the class, and if the data are no finite numbers, or, with
                `scale="data"`, y does not vary. (A column that does not is left in its own units.)

        Example:
            >>> X, y = [[1.0], [3.0]], [0.0, 20.0]
            >>> model = LinearRegression.of(X, y, scale="data", intercept=True)
            >>> model.weight_prior.scale.item(), model.noise_prior.scale.item()
            (100.0, 100.0)
        """
        sides = {"weights": weights, "offset": offset, "counts": counts}
        columns, arguments = in_units_of(X, y, sides, arguments, response=True)
        return cls(columns, **arguments)

    def __repr__(self) -> str:
        noise = self.noise_prior
        several = isinstance(noise, Tensor)
        return f"LinearRegression({self.words()}, noise={'one per row' if several else noise})"

    def forward(
        self,
        X: Tensor,
        y: Tensor | None = None,
        weights: Tensor | None = None,
        offset: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Runs the program.

        Args:
            X: shape `(rows, columns)`.
            y: shape `(rows,)`, to condition on; None draws it.
            weights: shape `(rows,)`: the variance of the noise of a row is divided by its weight.
            offset: shape `(rows,)`, added to `X w`.
            counts: shape `(rows,)`, at least 0: how often a row counts, by which its log density
                is multiplied; need not be whole. Where y is drawn it has no effect.

        Returns:
            y, of shape `(rows,)`.
        """
        self.check_rows(X, y, weights, offset, counts)
        scale, intercept = self.scale(X), self.intercept(X)
        conjugate = isinstance(self.weight_prior, ConjugateNormal)
        noise = self._noise(X) if conjugate else None
        loc = self.line(X, scale, self._unit(noise))
        noise = self._noise(X) if noise is None else noise
        loc = loc if intercept is None else loc + intercept
        loc = loc if offset is None else loc + offset
        noise = noise if weights is None else noise / weights.sqrt()
        with pyro.plate("data", len(X), dim=-1):
            return pyro.sample("y", observed(self.likelihood(loc, noise), y, counts), obs=y)

    def _unit(self, noise: Tensor | None) -> Tensor | None:
        """The noise of a row of weight one, which is 1 where each row has its own."""
        return None if isinstance(self.noise_prior, Tensor) else noise

    def _noise(self, X: Tensor) -> Tensor:
        prior = self.noise_prior
        if not isinstance(prior, Tensor):
            return number_of("noise", prior, X)
        wanted = f"{len(prior)} rows, as many as there are sds of the noise"
        instead = "for minibatches: noise=1.0 and weights of the rows, 1 / sd^2"
        expect(len(X) == len(prior), "X", wanted, f"{len(X)} ({instead})")
        return prior.to(X)


def _read_noise(noise: Any) -> Any:
    """A number, one for each row as a tensor, a prior, or None for the flat one."""
    if isinstance(noise, Tensor | np.ndarray | list) and np.prod(np.shape(noise)) > 1:
        sds = check_array("noise", noise, ("rows",))
        expect((sds > 0).all(), "noise", "positive numbers", sds.min())
        return torch.from_numpy(sds)
    return read_number("noise", noise)
