"""Linear regression as a Pyro program: the twin of the autoencoder, with global latents."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution

from ppvae._checks import check_count, check_number, expect
from ppvae._scopes import UniquelyNamed
from ppvae.priors import moved
from ppvae.programs.nodes import base_of
from ppvae.regression.priors import read_positive


class Horseshoe:
    r"""A prior for few large weights: `w_j ~ Normal(0, tau lambda_j)`, both scales half-Cauchy.

    Adds the latent sites `global_scale` (tau) and `local_scale` (lambda, one per column).

    Args:
        scale: scale of the half-Cauchy prior of tau, positive.

    Raises:
        ValueError: `scale` is not positive.

    Carvalho, Polson, Scott, The horseshoe estimator for sparse signals, 2010.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = check_number("scale", scale, positive=True)

    def __repr__(self) -> str:
        return f"Horseshoe(scale={self.scale})"

    def __call__(self, like: Tensor) -> TorchDistributionMixin:
        """Samples the two scales and returns the distribution of the weights given them.

        Args:
            like: zeros of shape `(columns,)`.
        """
        tau = pyro.sample("global_scale", dist.HalfCauchy(like.new_tensor(self.scale)))
        lam = pyro.sample("local_scale", dist.HalfCauchy(torch.ones_like(like)).to_event(1))
        # inside a plate of draws tau has its dim and lambda one event dim more
        return dist.Normal(like, (tau[..., None] if tau.dim() else tau) * lam).to_event(1)


class LinearRegression(UniquelyNamed):
    r"""The model `y ~ Normal(X w, noise)` with priors on `w` and, where it is unknown, the noise.

    Sites `weight` (shape `(columns,)`), `noise` (where it is unknown) and `y`, in the plate `data`.
    `FamilyGuide(model, family)` without an encoder guides it: the channels are free parameters.

    Args:
        columns: number of columns of X, at least 1.
        weight: prior of the weights: a univariate distribution with scalar or per-column
            arguments (`dist.Normal(0.0, 1.0)`, `dist.Laplace(...)`, `dist.StudentT(...)`), a
            `Horseshoe`, or None for a flat prior.
        noise: standard deviation (scale) of the noise: a positive number where it is known, a
            distribution on the positive reals, or None for a flat prior on it.
        likelihood: makes the distribution of y from its location and scale; by default Normal.
            For heavy tails `functools.partial(dist.StudentT, 4.0)`.
        errors: the former name of `likelihood`.

    Raises:
        TypeError: `weight`, `noise` or `likelihood` is of another kind.
        ValueError: `columns` is below 1, a known noise or a prior scale is not positive, a prior
            has the wrong shape or support, or, in a call, X and y do not fit.
    """

    #: every operation keeps leading dims, so that many draws can be made in one run
    vectorized = True

    def __init__(
        self,
        columns: int,
        *,
        weight: Distribution | Horseshoe | None = dist.Normal(0.0, 1.0),  # noqa: B008 (immutable)
        noise: float | Tensor | Distribution | None = dist.HalfNormal(1.0),  # noqa: B008
        likelihood: Callable[..., TorchDistributionMixin] = dist.Normal,
        errors: Callable[..., TorchDistributionMixin] | None = None,
    ) -> None:
        super().__init__()
        if errors is not None:
            warnings.warn("errors: is now called likelihood", DeprecationWarning, stacklevel=2)
            likelihood = errors
        self.columns = check_count("columns", columns)
        known = read_positive(noise, "noise")
        self.noise_prior = known if isinstance(known, float) else noise
        as_it_is = weight is None or isinstance(weight, Horseshoe)
        self.weight_prior = weight if as_it_is else _univariate(weight, self.columns)
        fits = not isinstance(noise, Distribution) or isinstance(noise, TorchDistributionMixin)
        expect(fits, "noise", "a distribution of pyro.distributions", repr(noise), TypeError)
        kind = "a function from location and scale to a distribution"
        expect(callable(likelihood), "likelihood", kind, repr(likelihood), TypeError)
        self.likelihood = likelihood

    def __repr__(self) -> str:
        priors = f"weight={self.weight_prior}, noise={self.noise_prior}"
        return f"LinearRegression({self.columns}, {priors})"

    def check_data(self, X: Tensor, y: Tensor | None = None) -> None:
        """Checks that all the data together, not just one batch, make the posterior proper.

        Raises:
            ValueError: the prior of the weights is flat and X has not the rank of its columns.
        """
        if self.weight_prior is None and X.dim() == 2:
            unit = nn.functional.normalize(X, dim=0, eps=torch.finfo(X.dtype).tiny)
            rank = int(torch.linalg.matrix_rank(unit))
            expected = f"a proper prior where X has rank {rank} and {X.shape[1]} columns"
            got = "a flat one: the posterior is improper"
            expect(rank == X.shape[1], "weight", expected, got)

    def forward(self, X: Tensor, y: Tensor | None = None) -> Tensor:
        """Runs the program.

        Args:
            X: shape `(rows, columns)`.
            y: shape `(rows,)`, to condition on; None draws it.

        Returns:
            y, of shape `(rows,)`.
        """
        given: dict[str, Any] = {"X": X} if y is None else {"X": X, "y": y}
        for name, value in given.items():
            real = isinstance(value, Tensor) and value.dtype != torch.bool
            real = real and (value.is_floating_point() or name == "y" and not value.is_complex())
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            expect(real, name, "a tensor of real numbers, floating in X", got, TypeError)
        fits = X.dim() == 2 and X.shape[1] == self.columns
        expect(fits, "X", f"shape (rows, {self.columns})", tuple(X.shape))
        if y is not None:
            fits = y.shape == X.shape[:1]
            expect(fits, "y", f"shape ({len(X)},), one for each row of X", tuple(y.shape))
        weight = pyro.sample("weight", self._weight_prior(X.new_zeros(self.columns)))
        noise = self._noise(X)
        # weights drawn in a plate of draws have the shape (draws, 1, columns)
        try:
            loc = X @ weight if weight.dim() == 1 else weight.squeeze(-2) @ X.T
        except RuntimeError as error:
            wanted = f"{weight.dtype}, as the weights, of which {self.columns} were drawn"
            raise ValueError(f"X: expected {wanted}, got {X.dtype}: {error}") from error
        with pyro.plate("data", len(X), dim=-1):
            return pyro.sample("y", self.likelihood(loc, noise), obs=y)

    def _weight_prior(self, like: Tensor) -> TorchDistributionMixin:
        prior = self.weight_prior
        if isinstance(prior, Horseshoe):
            return prior(like)
        if prior is None:
            return dist.ImproperUniform(constraints.real_vector, (), like.shape)
        prior = moved(prior, lambda tensor: tensor.to(like))
        return prior.expand(like.shape).to_event(1)

    def _noise(self, X: Tensor) -> Tensor:
        prior = self.noise_prior
        if isinstance(prior, float):
            return X.new_tensor(prior)
        if prior is None:
            return pyro.sample("noise", dist.ImproperUniform(constraints.positive, (), ()))
        return pyro.sample("noise", moved(prior, lambda tensor: tensor.to(X)))


def _univariate(prior: Any, columns: int) -> Distribution:
    """Checks the prior of single weights, and returns it without event dims."""
    kinds, kind = "a distribution of pyro.distributions, a Horseshoe or None", type(prior).__name__
    expect(isinstance(prior, TorchDistributionMixin), "weight", kinds, kind, TypeError)
    prior = base_of(prior)
    expect(not prior.support.is_discrete, "weight", "a continuous prior", prior)
    shape = tuple(prior.shape())
    fits = not prior.event_shape and shape in ((), (1,), (columns,))
    expect(fits, "weight", f"a univariate prior of shape () or ({columns},)", shape)
    scale = torch.as_tensor(getattr(prior, "scale", 1.0))
    positive = (torch.isfinite(scale) & (scale > 0)).all()
    expect(positive, "weight", "a positive, finite scale", scale)
    return prior
