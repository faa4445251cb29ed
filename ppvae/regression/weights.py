"""Priors of weights, as a Pyro program draws them."""

import copy
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from ppvae._checks import check_number, expect
from ppvae.priors import moved
from ppvae.programs.nodes import base_of
from ppvae.regression.conjugate import ConjugateNormal

# the distributions whose `scale` is one: a multiple of a draw is of the same kind
_WITH_SCALE = (
    torch.distributions.Normal,
    torch.distributions.Laplace,
    torch.distributions.StudentT,
    torch.distributions.Cauchy,
    torch.distributions.HalfNormal,
    torch.distributions.HalfCauchy,
    torch.distributions.MultivariateNormal,
)


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
            like: zeros of the shape of the weights, such as `(columns,)`.
        """
        events = like.dim()
        tau = pyro.sample("global_scale", dist.HalfCauchy(like.new_tensor(self.scale)))
        lam = pyro.sample("local_scale", dist.HalfCauchy(torch.ones_like(like)).to_event(events))
        return dist.Normal(like, beside(tau, like) * lam).to_event(events)


def beside(number: Tensor, like: Tensor) -> Tensor:
    """A number, or one per draw, with the dims of an event on the right."""
    return number.reshape(*number.shape, *[1] * like.dim())


def read_weight(prior: Any, columns: int) -> Any:
    """Checks a prior of the weights, and returns it without event dims that it need not have.

    Raises:
        TypeError: it is of another kind.
        ValueError: it is discrete, of another shape, or its scale is not positive and finite.
    """
    if prior is None or isinstance(prior, Horseshoe):
        return prior
    if isinstance(prior, ConjugateNormal):
        read_weight(prior.prior, columns)
        return prior
    kinds, kind = "a distribution of pyro.distributions, a Horseshoe or None", type(prior).__name__
    expect(isinstance(prior, TorchDistributionMixin), "weight", kinds, kind, TypeError)
    prior = base_of(prior)
    expect(not prior.support.is_discrete, "weight", "a continuous prior", prior)
    shape = tuple(prior.shape())
    if isinstance(prior, torch.distributions.MultivariateNormal):
        expect(shape == (columns,), "weight", f"a prior of shape ({columns},)", shape)
        return prior
    fits = not prior.event_shape and shape in ((), (1,), (columns,))
    expect(fits, "weight", f"a univariate prior of shape () or ({columns},)", shape)
    scale = torch.as_tensor(getattr(prior, "scale", 1.0))
    positive = (torch.isfinite(scale) & (scale > 0)).all()
    expect(positive, "weight", "a positive, finite scale", scale)
    return prior


def check_scaled(prior: Any) -> None:
    """Raises an error unless a prior of the weights can be multiplied by a factor.

    Raises:
        ValueError: it is flat.
        TypeError: it is none of those with a scale.
    """
    expect(prior is not None, "scale", "None with weight=None (flat)", "another")
    names = ", ".join(kind.__name__ for kind in _WITH_SCALE)
    fits = isinstance(prior, (*_WITH_SCALE, ConjugateNormal))
    expect(fits, "scale", f"None for a prior that is none of {names}", repr(prior), TypeError)


def rescaled(prior: Any, factor: Tensor, *, loc: Tensor | None) -> Any:
    """A prior whose scale is multiplied by a factor, and its location by another.

    Args:
        prior: one with a scale, see `check_scaled`.
        factor: positive numbers, which broadcast to the weights.
        loc: the factor of the location, or None where that stays.
    """
    if isinstance(prior, ConjugateNormal):
        made = copy.copy(prior)
        made.prior = rescaled(prior.prior, factor, loc=loc)
        return made
    if isinstance(prior, torch.distributions.MultivariateNormal):
        mean = prior.loc if loc is None else loc * prior.loc
        return dist.MultivariateNormal(mean, scale_tril=factor.unsqueeze(-1) * prior.scale_tril)
    given = {name: getattr(prior, name) for name in type(prior).arg_constraints}
    given |= {"scale": factor * given["scale"]}
    if loc is not None and "loc" in given:
        given |= {"loc": loc * given["loc"]}
    return type(prior)(**given)


def positive_times(prior: Any, factor: Tensor) -> Any:
    """The distribution of a positive number, multiplied by a factor."""
    if isinstance(prior, _WITH_SCALE):
        return rescaled(prior, factor, loc=factor)
    exp = transforms.ExpTransform()
    steps = [exp.inv, transforms.AffineTransform(factor.log(), 1.0), exp]
    return dist.TransformedDistribution(prior, steps)


def weight_of(
    prior: Any, like: Tensor, scale: Tensor | None, noise: Tensor | None = None
) -> TorchDistributionMixin:
    """The distribution of the weights in a program.

    Args:
        prior: as `read_weight` returns it.
        like: zeros of the shape of the weights.
        scale: the factor of the prior's own scale, or one per draw; None for one.
        noise: the sd of the noise, of which a `ConjugateNormal` is told.
    """
    if isinstance(prior, ConjugateNormal):
        noise = like.new_ones(()) if noise is None else noise
        given = prior.given(noise if scale is None else noise * scale, len(like))
        return cast(TorchDistributionMixin, given)
    if prior is None:
        reals = constraints.independent(constraints.real, like.dim())
        return dist.ImproperUniform(reals, (), like.shape)
    if isinstance(prior, Horseshoe):
        return prior(like)
    prior = moved(prior, lambda tensor: tensor.to(like))
    if scale is not None:
        prior = rescaled(prior, beside(scale, like), loc=None)
    own = like.shape[: like.dim() - len(prior.event_shape)]
    return prior.expand(torch.broadcast_shapes(prior.batch_shape, own)).to_event(len(own))
