"""Joint Gaussians that know the density of their own draws from the noise that made them.

At any other value the density solves for that noise, and where the factor of a covariance is
ill-conditioned the solution is rounding: in single precision an ELBO of 1e28 was seen. At a draw
there is nothing to solve.
"""

import math
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.utils import _standard_normal

from ppvae.families.half import InHalf, dtype_in_half, widened

_SHAPE = torch.Size()


class _ByNoise(dist.MultivariateNormal):
    """A Gaussian of which own draws are scored by their noise."""

    _draw: tuple[Tensor, Tensor] | None = None

    def rsample(self, sample_shape: Any = _SHAPE) -> Tensor:
        """Draws `loc + scale_tril @ noise`, and remembers the noise."""
        shape = self._extended_shape(sample_shape)
        noise = _standard_normal(shape, dtype=self.loc.dtype, device=self.loc.device)
        value = self.loc + (self._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        self._draw = value, noise
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density; of the last draw, the very tensor, by its noise."""
        if self._draw is None or value is not self._draw[0]:
            return super().log_prob(value)
        log_det = self._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return _standard(self._draw[1]) - log_det

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same distribution with more batch dims, and no draw yet."""
        new = self._get_checked_instance(type(self), _instance)
        new._draw = None
        return super().expand(batch_shape, new)


class MultivariateNormal(InHalf, _ByNoise):
    """`pyro.distributions.MultivariateNormal`, of which own draws are scored by their noise."""

    def __init__(self, loc: Tensor, *args: Any, **kwargs: Any) -> None:
        self.narrow = dtype_in_half(loc)
        named = {name: widened(value) for name, value in kwargs.items()}
        super().__init__(widened(loc), *map(widened, args), **named)


class _LowRankByNoise(dist.LowRankMultivariateNormal):
    """A Gaussian of low rank of which own draws are scored by their noise.

    With `A = cov_factor / sqrt(cov_diag)` and `C C' = 1 + A' A`, the squared Mahalanobis length of
    the draw from noises e (of the factor) and d (of the diagonal) is `|e|^2 + |d|^2 - |C^-1 (A' d -
    e)|^2`. The factor C comes from a QR decomposition, so that no square of A is formed.
    """

    _draw: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(
        self, loc: Tensor, cov_factor: Tensor, cov_diag: Tensor, validate_args: Any = None
    ) -> None:
        size, rank = cov_factor.shape[-2:]
        narrow = torch.zeros_like(cov_factor)  # with a capacitance that has a Cholesky factor
        super().__init__(loc, narrow, cov_diag, validate_args=validate_args)
        self._unbroadcasted_cov_factor = cov_factor
        self.cov_factor = cov_factor.expand(*self.loc.shape, rank)
        scaled = cov_factor / cov_diag.sqrt().unsqueeze(-1)
        one = torch.eye(rank, dtype=loc.dtype, device=loc.device).expand(*scaled.shape[:-2], -1, -1)
        triangle = torch.linalg.qr(torch.cat([scaled, one], -2)).R.mT
        signs = triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        self._scaled, self._capacitance_tril = scaled, triangle * signs

    def rsample(self, sample_shape: Any = _SHAPE) -> Tensor:
        """Draws `loc + cov_factor @ e + sqrt(cov_diag) d`, and remembers the noises."""
        shape = self._extended_shape(sample_shape)
        like: dict[str, Any] = {"dtype": self.loc.dtype, "device": self.loc.device}
        e = _standard_normal(shape[:-1] + self.cov_factor.shape[-1:], **like)
        d = _standard_normal(shape, **like)
        value = self.loc + (self._unbroadcasted_cov_factor @ e.unsqueeze(-1)).squeeze(-1)
        value = value + self._unbroadcasted_cov_diag.sqrt() * d
        self._draw = value, e, d
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density; of the last draw, the very tensor, by its noise."""
        if self._draw is None or value is not self._draw[0]:
            return super().log_prob(value)
        _, e, d = self._draw
        seen = (self._scaled.mT @ d.unsqueeze(-1)).squeeze(-1) - e
        left = torch.linalg.solve_triangular(
            self._capacitance_tril, seen.unsqueeze(-1), upper=False
        ).squeeze(-1)
        log_det = self._capacitance_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_det = log_det + 0.5 * self._unbroadcasted_cov_diag.log().sum(-1)
        density = _standard(d) - 0.5 * (e.square().sum(-1) - left.square().sum(-1))
        return density - log_det

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same distribution with more batch dims, and no draw yet."""
        new = self._get_checked_instance(type(self), _instance)
        new._scaled, new._draw = self._scaled, None
        return super().expand(batch_shape, new)


class LowRankMultivariateNormal(InHalf, _LowRankByNoise):
    """`pyro.distributions.LowRankMultivariateNormal`, own draws of which are scored by noise."""

    def __init__(
        self, loc: Tensor, cov_factor: Tensor, cov_diag: Tensor, validate_args: Any = None
    ) -> None:
        self.narrow = dtype_in_half(loc)
        super().__init__(widened(loc), widened(cov_factor), widened(cov_diag), validate_args)


def _standard(noise: Tensor) -> Tensor:
    """Log density of standard normal vectors."""
    return -0.5 * (noise.square().sum(-1) + noise.shape[-1] * math.log(2 * math.pi))
