"""The divergence of a guide from a prior, where it has a closed form."""

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    StudentT,
    kl_divergence,
)

from ppvae.programs.nodes import base_of, is_point

_CORRELATED = (MultivariateNormal, LowRankMultivariateNormal)


def by_coordinate(guide: Any, prior: Any) -> tuple[Any, Any] | None:
    """Both distributions as those of single coordinates, so that the divergence splits, or None."""
    q, p = base_of(guide), base_of(prior)
    whole = len(guide.event_shape) == len(prior.event_shape)
    return (q, p) if whole and not (q.event_shape or p.event_shape) else None


def closed_kl(guide: Any, prior: Any) -> Tensor | None:
    r"""KL(guide || prior) in nats by batch element where it has a closed form, else None.

    Besides the pairs that PyTorch and Pyro know: to a Gaussian prior with independent coordinates
    any guide with known entropy, mean and variance has
    `KL = -H(q) + sum log(sigma sqrt(2 pi)) + (var + (mean - mu)^2) / (2 sigma^2)`.
    """
    if is_point(guide):
        return None
    base, normal = base_of(guide), base_of(prior)
    if isinstance(normal, MultivariateNormal) and isinstance(base, _CORRELATED):
        inner = len(guide.event_shape) - 1  # dims of the batch that are of one event
        if len(prior.event_shape) - 1 == inner:
            kl = _kl_of_gaussians(base, normal)
            return kl.sum(list(range(-inner, 0))) if inner else kl
    with suppress(NotImplementedError):
        return kl_divergence(guide, prior)
    if not isinstance(normal, Normal):
        return None
    try:
        entropy = guide.entropy()
        mean, variance = _moments(guide)
        second = (variance + (mean - normal.loc) ** 2) / (2 * normal.scale**2)
    except NotImplementedError:
        return None
    cross = second + normal.scale.log() + 0.5 * math.log(2 * math.pi)
    depth = len(prior.event_shape)
    return cross.sum(list(range(-depth, 0))) - entropy if depth else cross - entropy


def _kl_of_gaussians(guide: Any, prior: Any) -> Tensor:
    """The divergence from a Gaussian with correlations, which is a graph for batches of any size.

    PyTorch's own asks for sizes as numbers. The trace of a product of matrices is the square of
    what is left of a root of the guide's covariance when that of the prior's is taken off it.
    """
    size, tril = prior.event_shape[0], prior.scale_tril
    wide = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if isinstance(guide, MultivariateNormal):
        roots = [guide.scale_tril]
        narrow = guide.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        roots = [guide.cov_factor, guide.cov_diag.sqrt().diag_embed()]
        narrow = guide.entropy() - size * (1 + math.log(2 * math.pi)) / 2
    columns = [*roots, (guide.loc - prior.loc)[..., None]]
    left = (torch.linalg.solve_triangular(tril, each, upper=False) for each in columns)
    squares = [each.square().sum((-2, -1)) for each in left]
    return wide - narrow + (sum(squares[1:], squares[0]) - size) / 2


def _moments(fn: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance, without the selection by value of a StudentT's, which has no graph."""
    base = base_of(fn)
    if not isinstance(base, StudentT):
        return fn.mean, fn.variance
    finite = base.df > 2
    df = torch.where(finite, base.df, 3.0)
    variance = torch.where(finite, base.scale**2 * df / (df - 2), math.inf)
    mean = torch.where(base.df > 1, base.loc, math.nan)
    return mean, torch.where(base.df > 1, variance, math.nan)
