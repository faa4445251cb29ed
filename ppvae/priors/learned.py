"""Priors of one distribution whose arguments are learned."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import transform_to

from ppvae._checks import check_count, expect
from ppvae.families.heads import Argument
from ppvae.families.ladder import as_family


class Learned(nn.Module):
    """A learned prior of the shape of any guide family; it starts near the standard normal.

    With a context, it does so where that is zero.

    `Learned(8)` is a diagonal normal distribution, `Learned(8, "full_rank")` one with correlations,
    `Learned(8, "student_t")` has heavier tails, and `Learned(8, families.Flow(layers=4))` has any
    shape: a normalizing flow. `Learned(8, context=10)` depends on the context of a model, by linear
    functions or, with `network=`, by those of what a network makes of it.

    Args:
        latent: length of the latent.
        family: a guide family over the reals with a density, or its name in the ladder.
        context: how many numbers it depends on; by default on none.
        network: a module `(batch, context) -> (batch, features)`.

    Raises:
        TypeError: `family` is none, or `network` no module.
        ValueError: a number is no whole one of at least 1, the family has no density of its own, or
            not over the reals, or the network takes another context.

    Chen et al., Variational lossy autoencoder, 2017 (a flow as the prior); Sohn et al., Learning
    structured output representation using deep conditional generative models, 2015 (a context).

    Example:
        >>> Learned(2)().event_shape
        torch.Size([2])
        >>> Learned(2, context=3)(torch.zeros(5, 3)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        latent: int,
        family: Any = "mean_scale",
        *,
        context: int | None = None,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        shape = torch.Size([check_count("latent", latent)])
        self.family = as_family(family)
        self.context = None if context is None else check_count("context", context)
        known = network is None or isinstance(network, nn.Module)
        expect(known, "network", "a torch.nn.Module", repr(network), TypeError)
        needed = network is None or context is not None
        expect(needed, "network", "none, without a context", "one")
        self.network = network
        wanted = "a family with a density of its own, over the reals"
        own = not getattr(self.family, "from_model", False)
        expect(own, "family", wanted, self.family.name)
        zeros = None if self.context is None else torch.zeros(1, self.context)
        width = None if zeros is None else self._features(zeros).shape[-1]
        self.head = self.family.head(width, shape)
        with torch.no_grad():
            for name in ("scale", "scale_tril", "cov_diag"):
                argument = getattr(self.head, name, None)
                if isinstance(argument, Argument):
                    _set_to_one(argument)
        features = None if zeros is None else self._features(zeros)
        point = isinstance(self.head(features), (Tensor, dist.Delta))
        expect(not point and _over_reals(self.forward(zeros)), "family", wanted, self.family.name)

    def _features(self, context: Tensor) -> Tensor:
        if self.network is None:
            return context
        try:
            features: Tensor = self.network(context)
        except RuntimeError as error:
            wanted, shape = "expected a module that takes shape", tuple(context.shape)
            raise ValueError(
                f"network: {wanted} {shape}, got one that does not: {error}"
            ) from error
        return features

    def forward(self, context: Tensor | None = None) -> Any:
        """The distribution over one latent, or over one for each row of a context.

        Raises:
            ValueError: there is a context where the prior has none, or none, or one of another
                width.
        """
        width = None if context is None else context.shape[-1]
        wanted = "none" if self.context is None else f"shape (batch, {self.context})"
        got = "none" if context is None else tuple(context.shape)
        expect(width == self.context, "context", wanted, got)
        fn = self.head(None if context is None else self._features(context))
        return fn.to_event(1 - len(fn.event_shape))


def _over_reals(fn: Any) -> bool:
    """Whether all vectors are values of a distribution."""
    ends = torch.tensor([-1e3, 1e3]).reshape(2, *[1] * len(fn.shape()))
    return bool(fn.support.check(ends.expand(2, *fn.shape())).all())


def _set_to_one(argument: Argument) -> None:
    """Lets a scale, or a triangular matrix of scales, start at one."""
    transform: Any = transform_to(argument.constraint)
    if argument.triangular:
        size = argument.shape[-1]
        rows, columns = torch.tril_indices(size, size)
        start = transform.inv(torch.eye(size))[rows, columns]
    else:
        start = transform.inv(torch.ones(argument.shape))
    raw: Any = argument.raw if argument.linear is None else argument.linear.bias
    raw.copy_(start.reshape(raw.shape))


class ARD(nn.Module):
    """A normal prior of mean zero with a learned scale for each latent.

    That is automatic relevance determination, its scales at their maximum likelihood. They say
    which latents are used as far as the decoder cannot take the units of the latents over: its
    weights should be penalised, as by `torch.optim.AdamW`.

    Args:
        latent: length of the latent.

    Attributes:
        log_scale: of shape `(latent,)`.

    Raises:
        ValueError: `latent` is no whole number of at least 1.

    MacKay, Bayesian non-linear modeling for the prediction competition, 1994.
    """

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(check_count("latent", latent)))

    def forward(self) -> Any:
        """The distribution over one latent."""
        return dist.Normal(torch.zeros_like(self.log_scale), self.log_scale.exp()).to_event(1)
