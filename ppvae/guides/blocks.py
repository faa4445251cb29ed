"""How a family shares out the latent sites of a model among its heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae._scopes import random_state
from ppvae.guides.sites import Site
from ppvae.programs.nodes import is_real, same_support


class Part(NamedTuple):
    """One head and the sites that it serves; several sites, or odd plates, go by a flat draw."""

    key: str
    shape: torch.Size
    sites: tuple[Site, ...]
    flat: bool


def divide(family: Any, sites: list[Site]) -> list[Part]:
    """Assigns the sites to heads: one for all, or, for an elementwise family, one for each.

    Args:
        family: a guide family.
        sites: the latent sites, in the order of the model.

    Raises:
        ValueError: the family cannot represent one of them.
    """
    size = sum(site.size for site in sites)
    own = [site for site in sites if not _is_over_reals(family, site, size)]
    if family.joint:
        first = sites[0]
        shape = first.event_shape if own else first.space
        if len(sites) == 1 and len(shape) == 1 and not first.left + first.right:
            return [Part(_key(first), shape, (first,), flat=False)]
        if own:
            raise ValueError(_misfit(family, own[0]))
        return [Part("joint", torch.Size([size]), tuple(sites), flat=True)]
    parts = []
    for site in sites:
        if site.left and site in own:
            raise ValueError(_misfit(family, site) + ", beside a plate to the left of the data")
        shape = site.right + (site.event_shape if site in own else site.space)
        if site.left:
            shape = torch.Size([site.size])
        parts.append(Part(_key(site), shape, (site,), flat=bool(site.left)))
    return parts


def _is_over_reals(family: Any, site: Site, joint_size: int) -> bool:
    """Whether the family lives on the reals, and reaches the site through a bijection."""
    shape = torch.Size([joint_size]) if family.joint else site.right + site.space
    try:
        with torch.no_grad(), random_state(None, keep=True):
            fn = family.head(None, shape)(None)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{_misfit(family, site)}; {error}") from error
    if isinstance(fn, (Tensor, dist.Delta)) or is_real(fn.support):
        if site.support.is_discrete:
            raise ValueError(_misfit(family, site))
        return True
    if not same_support(fn.support, site.support):
        raise ValueError(_misfit(family, site))
    return False


def _misfit(family: Any, site: Site) -> str:
    return (
        f"family: {family.name} cannot represent the latent site {site.name!r}, whose "
        f"support is {site.support} with event shape {tuple(site.event_shape)}"
    )


def _key(site: Site) -> str:
    """A name for the head that `ModuleDict` takes: no dots, and none of its own attributes."""
    key = site.name.replace(".", "_")
    return f"{key}_" if hasattr(nn.ModuleDict, key) else key
