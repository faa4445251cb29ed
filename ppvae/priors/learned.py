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

    `Learned(8)` is a diagonal normal distribution, `Learned(8, "full_rank")` one with correlations,
    `Learned(8, "student_t")` has heavier tails, and `Learned(8, families.Flow(layers=4))` has any
    shape: a normalizing flow.

    Args:
        latent: length of the latent.
        family: a guide family over the reals with a density, or its name in the ladder.

    Raises:
        TypeError: `family` is none.
        ValueError: `latent` is no whole number of at least 1, or the family has no density of its
            own, or not over the reals.

    Chen et al., Variational lossy autoencoder, 2017 (a flow as the prior).

    Example:
        >>> Learned(2)().event_shape
        torch.Size([2])
    """

    def __init__(self, latent: int, family: Any = "mean_scale") -> None:
        super().__init__()
        shape = torch.Size([check_count("latent", latent)])
        self.family = as_family(family)
        wanted = "a family with a density of its own, over the reals"
        own = not getattr(self.family, "from_model", False)
        expect(own, "family", wanted, self.family.name)
        self.head = self.family.head(None, shape)
        with torch.no_grad():
            for name in ("scale", "scale_tril", "cov_diag"):
                argument = getattr(self.head, name, None)
                if isinstance(argument, Argument) and argument.raw is not None:
                    argument.raw.copy_(_unit(argument))
        point = isinstance(self.head(None), (Tensor, dist.Delta))
        expect(not point and _over_reals(self.forward()), "family", wanted, self.family.name)

    def forward(self) -> Any:
        """The distribution over one latent."""
        fn = self.head(None)
        return fn.to_event(1 - len(fn.event_shape))


def _over_reals(fn: Any) -> bool:
    """Whether all vectors are values of a distribution."""
    return bool(fn.support.check(torch.tensor([[-1e3], [1e3]]).expand(2, *fn.event_shape)).all())


def _unit(argument: Argument) -> Tensor:
    """What a scale, or a triangular matrix of scales, is before its transform, where it is one."""
    transform: Any = transform_to(argument.constraint)
    if not argument.triangular:
        return transform.inv(torch.ones(argument.shape))
    size = argument.shape[-1]
    rows, columns = torch.tril_indices(size, size)
    return transform.inv(torch.eye(size))[rows, columns]


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
