"""How a family shares out the latent sites of a model among its heads."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae._scopes import random_state, stacklevel
from ppvae.guides.sites import Site, read_site
from ppvae.programs.nodes import is_real, same_support

#: What draws a block: a head that an encoder feeds, a head of free parameters, or the model itself.
Source = Literal["encoder", "free", "model"]


class Block(NamedTuple):
    """Latent sites that are drawn together, and what draws them.

    Attributes:
        key: the name of the head.
        shape: shape of the latent that the head draws.
        sites: the sites; none where the model draws its own latents.
        flat: whether all coordinates come from one auxiliary draw, a vector that is cut into the
            sites' pieces; needed for several sites, and for plates to the left of the data.
        family: the family of the head.
        source: where the channels are filled from.
        over_reals: whether the head draws in unconstrained space.
    """

    key: str
    shape: torch.Size
    sites: tuple[Site, ...]
    flat: bool
    family: Any
    source: Source
    over_reals: bool = True


def source_of(family: Any, encoder: nn.Module | None) -> Source:
    """What fills the channels of a family in a guide with this encoder, or without one."""
    if getattr(family, "from_model", False):
        return "model"
    return "free" if encoder is None else "encoder"


def divide(family: Any, nodes: list[Any], data: Any, source: Source) -> list[Block]:
    """Assigns the sites to heads: one for all, or, for an elementwise family, one for each.

    Args:
        family: a guide family.
        nodes: the latent nodes in a trace of the model, in their order.
        data: the data plate, or None.
        source: what fills the channels.

    Raises:
        ValueError: the family cannot represent one of the sites.
    """
    if source == "model":
        return [Block("", torch.Size(), (), flat=False, family=family, source=source)]
    sites = [read_site(node, data) for node in nodes]
    blocks = []
    for group in [sites] if family.joint else [[site] for site in sites]:
        first, size = group[0], sum(site.size for site in group)
        own = [site for site in group if not _is_over_reals(family, site, size)]
        shape = first.event_shape if own else first.space
        vector = len(shape) == 1 and not first.right
        shape = shape if family.joint else first.right + shape
        flat = len(group) > 1 or bool(first.left) or (family.joint and not vector)
        if flat and own:
            raise ValueError(_misfit(family, own[0]) + ", in these plates or beside other sites")
        key = "joint" if flat and family.joint else _key(first)
        shape = torch.Size([size]) if flat else shape
        blocks.append(Block(key, shape, tuple(group), flat, family, source, not own))
    return blocks


@contextmanager
def representing(family: Any, site: Site) -> Iterator[None]:
    """Where a head is built or tried for a site: an error names family and site."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{_misfit(family, site)}; {error}") from error


class HeavyTails(UserWarning):
    """A family has heavier tails than the map to the support of a latent site can bear."""


def check_tails(fn: Any, block: Block) -> None:
    """Warns if draws from a head have tails that some exponential map makes too heavy.

    A quadratic log density, as of a Gaussian, bears the map to a positive number. Of one that falls
    along a line, as Laplace's does, or more slowly, the image has no mean if its scale is above
    one, or ever; then the ELBO has none, and draws overflow.

    Args:
        fn: what the head returned: a distribution in unconstrained space, or a point.
        block: the sites that it is for.
    """
    if not block.over_reals or isinstance(fn, (Tensor, dist.Delta)):
        return
    steep = [site.name for site in block.sites if _grows_exponentially(site)]
    if steep and _is_heavy(fn):
        what = f"family: the tails of {block.family.name} are too heavy for the exponential map to"
        warnings.warn(
            f"{what} the support of {steep}: their draws may have no mean, nor the ELBO; a family "
            "with Gaussian tails, as mean_scale, bears it",
            HeavyTails,
            stacklevel=stacklevel(),
        )


def _grows_exponentially(site: Site) -> bool:
    """Whether the map to the support of a site grows like exp."""
    if is_real(site.support) or site.support.is_discrete:
        return False
    return bool(site.transform(torch.full(site.space, 60.0)).abs().max() > 1e20)


def _is_heavy(fn: Any) -> bool:
    """Whether minus the log density grows more slowly than a square, far out on either side."""
    like = fn.sample()
    tails = [[fn.log_prob(torch.full_like(like, s * at)) for at in (1e4, 1e8)] for s in (-1, 1)]
    return any(bool((far / near < 1e6).any()) for near, far in tails)


def _is_over_reals(family: Any, site: Site, joint_size: int) -> bool:
    """Whether the family lives on the reals, and reaches the site through a bijection."""
    support = getattr(family, "support", None)
    if support is None:  # only a head can tell
        with representing(family, site), torch.no_grad(), random_state(None, keep=True):
            shape = torch.Size([joint_size]) if family.joint else site.right + site.space
            fn = family.head(None, shape)(None)
            point = isinstance(fn, (Tensor, dist.Delta))
            support = constraints.real if point else fn.support
    real = is_real(support)
    fits = not site.support.is_discrete if real else same_support(support, site.support)
    if not fits:
        raise ValueError(_misfit(family, site))
    return real


def _misfit(family: Any, site: Site) -> str:
    return (
        f"family: {family.name} cannot represent the latent site {site.name!r}, whose "
        f"support is {site.support} with event shape {tuple(site.event_shape)}"
    )


def _key(site: Site) -> str:
    """A name for the head that `ModuleDict` takes: no dots, and none of its own attributes."""
    key = site.name.replace(".", "_")
    return f"{key}_" if hasattr(nn.ModuleDict, key) else key
