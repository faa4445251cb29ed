"""Where the locations of a guide start: at values that the user chooses for the latents."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae._scopes import random_state
from ppvae.families.heads import Argument
from ppvae.families.rules import support_of
from ppvae.guides.blocks import Drawn
from ppvae.guides.sites import Site
from ppvae.programs.nodes import latent_nodes, prototype

Init = Callable[[dict[str, Any]], Tensor]


def starting_values(init: Init, model: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """The values that a function of Pyro's `initialization` kind chooses, by site.

    Raises:
        TypeError: it returns something else than a tensor.
        ValueError: a value is outside of the support of its site.
    """

    def checked(site: dict[str, Any]) -> Tensor:
        value, name, support = init(site), site["name"], support_of(site["fn"])
        wanted = f"a tensor for {name!r}"
        expect(isinstance(value, Tensor), "init_loc_fn", wanted, repr(value), TypeError)
        shape = site["fn"].shape()
        fits = value.shape == shape
        expect(fits, "init_loc_fn", f"shape {tuple(shape)} for {name!r}", tuple(value.shape))
        inside = bool(support.check(value).all())
        expect(inside, "init_loc_fn", f"a value in the support of {name!r}, {support}", value)
        return value

    with random_state(None, keep=True):
        trace = prototype(model, args, kwargs, checked)
    return {node["name"]: node["value"] for node in latent_nodes(trace)}


def start_at(head: nn.Module, block: Drawn, values: Mapping[str, Tensor]) -> None:
    """Moves the location of a head to values of its sites.

    A head that has no location of its own, as one that an encoder feeds, stays as it is.

    Args:
        head: the head of the block.
        block: what it draws.
        values: site -> a value of shape `(*plates, *event)`.

    Raises:
        ValueError: the location is bounded, and a value beyond.
    """
    argument = getattr(head, "loc", getattr(head, "v", None))
    if not isinstance(argument, Argument) or argument.raw is None:
        return
    if block.given or block.prior or not block.over_reals:
        return
    pieces = [_free(site, values[site.name], block).flatten() for site in block.sites]
    value = torch.cat(pieces).reshape(argument.shape)
    reached = bool(argument.constraint.check(value).all())
    wanted = f"values of {[*block.names]} that a location of {block.family.name} reaches"
    expect(reached, "init_loc_fn", wanted, value.flatten().tolist())
    with torch.no_grad():
        argument.raw.copy_(argument.raw_at(value).to(argument.raw))


def _free(site: Site, value: Tensor, block: Drawn) -> Tensor:
    """An unconstrained value for every member of the plates whose parameters a block has.

    Members that are not in the subsample at hand, and those that share one parameter, get the mean
    of the others.
    """
    free = value if site.transform is None else site.transform.inv(value)
    events = len(site.space)
    batch = [1] * (site.rank + events - free.dim()) + [*free.shape[: free.dim() - events]]
    free = free.reshape([*batch, *site.space])
    for dim, _ in site.thinned:
        free = free.mean(dim, keepdim=True)
    if block.frame is not None:
        free = free.mean(block.frame.dim - events, keepdim=True)
        return free.expand(*site.left, *[1] * (not site.left), *site.right, *site.space)
    return free.expand(site.right + site.space)
