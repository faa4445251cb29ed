"""Gaussians with a banded precision: for chains of latents, each of which sees the near ones."""

import math
from dataclasses import dataclass
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.utils import _standard_normal

from ppvae._checks import check_count
from ppvae.families.base import GuideFamily, check_head
from ppvae.families.half import InHalf, dtype_in_half, widened
from ppvae.families.heads import Argument

_SHAPE = torch.Size()


@dataclass(frozen=True)
class Banded(GuideFamily):
    r"""A joint Gaussian with a banded precision: `P = L L'`, and `L` is a lower band.

    It has `bandwidth + 1` numbers for each coordinate in place of the `size / 2` of `full_rank`,
    and contains the posterior of every linear-Gaussian state-space model with D states, whose
    precision is block tridiagonal: for latents of shape `(steps, D)`, or sites z_0, z_1, ... in
    that order, `bandwidth = 2 D - 1`.

    Args:
        bandwidth: number of diagonals below the main one; 0 is `mean_scale` up to its parameters.

    Raises:
        ValueError: `bandwidth` is negative.

    Archer et al., Black box variational inference for state space models, 2015.

    Example:
        >>> import torch
        >>> fn = Banded(1).head(None, torch.Size([4]))(None)
        >>> (fn.precision_matrix.triu(2) == 0).all()
        tensor(True)
    """

    bandwidth: int = 1

    channels = ("loc", "diagonal", "band")
    joint = True
    support = constraints.real

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidth", check_count("bandwidth", self.bandwidth, 0))

    def head(self, features: int | None, shape: torch.Size) -> nn.Module:
        """Builds the head; arguments and result as those of `Family.head`."""
        features, shape = check_head(self, features, shape)
        return BandedHead(min(self.bandwidth, shape[0] - 1), features, shape)


class BandedHead(nn.Module):
    """Makes the location and the band of the factor; the head of `families.Banded`."""

    def __init__(self, bandwidth: int, features: int | None, shape: torch.Size) -> None:
        super().__init__()
        (size,) = shape
        start = 10.0 if features is None else None  # an sd of 0.1, as that of other families
        self.loc = Argument(constraints.real, shape, features)
        self.diagonal = Argument(constraints.positive, shape, features, start)
        rows = [torch.arange(offset, size) for offset in range(1, bandwidth + 1)]
        places = [row * size + row - offset for offset, row in enumerate(rows, 1)]
        place = torch.cat([torch.arange(size) * (size + 1), *places])
        self.register_buffer("place", place, persistent=False)
        count = len(place) - size
        self.band = Argument(constraints.real, torch.Size([count]), features) if count else None

    def forward(self, features: Tensor | None = None) -> Any:
        """The distribution over `(*, size)`."""
        loc, parts = self.loc(features), [self.diagonal(features)]
        if self.band is not None:  # in units of the diagonal, so that one scale serves both
            parts.append(self.band(features) * parts[0].mean(-1, keepdim=True))
        values, size = torch.cat(parts, -1), loc.shape[-1]
        flat = values.new_zeros(*values.shape[:-1], size * size)
        place: Any = self.place
        factor = flat.scatter(-1, place.expand(values.shape), values)
        return PrecisionNormal(loc, factor.reshape(*values.shape[:-1], size, size))


class _PrecisionNormal(dist.TorchDistribution):
    """A Gaussian with the precision `L L'`; a draw is `loc + L'^-1 noise`.

    Args:
        loc: shape `(*batch, size)`.
        factor: L, lower triangular with a positive diagonal, shape `(*batch, size, size)`.
    """

    arg_constraints = {"loc": constraints.real_vector, "factor": constraints.lower_cholesky}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, factor: Tensor, validate_args: Any = None) -> None:
        batch = torch.broadcast_shapes(loc.shape[:-1], factor.shape[:-2])
        self.loc, self.factor = loc.expand(*batch, -1), factor.expand(*batch, -1, -1)
        self._draw: tuple[Tensor, Tensor] | None = None
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same distribution with more batch dims."""
        new = self._get_checked_instance(type(self), _instance)
        batch = torch.Size(batch_shape)
        new.loc, new.factor = self.loc.expand(*batch, -1), self.factor.expand(*batch, -1, -1)
        new._draw = None
        super(_PrecisionNormal, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = _SHAPE) -> Tensor:
        """A draw, of which the noise is remembered."""
        shape = self._extended_shape(sample_shape)
        noise = _standard_normal(shape, dtype=self.loc.dtype, device=self.loc.device)
        upper = self.factor.mT.expand(*shape[:-1], -1, -1)
        moved = torch.linalg.solve_triangular(upper, noise.unsqueeze(-1), upper=True)
        value = self.loc + moved.squeeze(-1)
        self._draw = value, noise
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density; of the last draw, the very tensor, by its noise."""
        if self._draw is not None and value is self._draw[0]:
            noise = self._draw[1]
        else:
            noise = (self.factor.mT @ (value - self.loc).unsqueeze(-1)).squeeze(-1)
        square = noise.square().sum(-1) + noise.shape[-1] * math.log(2 * math.pi)
        return self._log_det() - 0.5 * square

    def entropy(self) -> Tensor:
        """In nats."""
        return 0.5 * self.event_shape[0] * (1 + math.log(2 * math.pi)) - self._log_det()

    def _log_det(self) -> Tensor:
        return self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def precision_matrix(self) -> Tensor:
        """Shape `(*batch, size, size)`."""
        return self.factor @ self.factor.mT

    @property
    def covariance_matrix(self) -> Tensor:
        """Shape `(*batch, size, size)`."""
        return torch.cholesky_inverse(self.factor)

    @property
    def mean(self) -> Tensor:
        """Shape `(*batch, size)`."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Shape `(*batch, size)`."""
        one = torch.eye(self.event_shape[0], dtype=self.loc.dtype, device=self.loc.device)
        inverse = torch.linalg.solve_triangular(
            self.factor, one.expand_as(self.factor), upper=False
        )
        return inverse.square().sum(-2)


class PrecisionNormal(InHalf, _PrecisionNormal):
    """The same, also of latents of half precision."""

    def __init__(self, loc: Tensor, factor: Tensor, validate_args: Any = None) -> None:
        self.narrow = dtype_in_half(loc)
        super().__init__(widened(loc), widened(factor), validate_args)
