"""Draws the latent sites of a block, inside the plates of one call of a guide."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from ppvae.families.carried import Carried
from ppvae.families.rules import support_of
from ppvae.guides.blocks import Drawn
from ppvae.guides.plates import Plates
from ppvae.programs.masks import common_mask
from ppvae.programs.supports import is_real


def draw(
    fn: Any,
    block: Drawn,
    plates: dict[str, Any],
    layout: Plates,
    name: str,
    present: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Samples the sites of a block.

    What does not count is drawn, too, and has no density.

    Args:
        fn: what the head returned: a distribution, or a tensor, which is a point.
        block: the block.
        plates: the plates of this call, by name.
        layout: says where the data are in a flat draw.
        name: names the auxiliary site of a flat draw.
        present: site -> which of its members count, where that are not all.

    Returns:
        The values by the names of the sites.

    Raises:
        ValueError: sites of a flat draw do not count alike.
    """
    if isinstance(fn, Tensor):
        fn = dist.Delta(fn, event_dim=int(block.family.joint))
    if block.flat:
        return _draw_flat(fn, block, plates, layout, name, present)
    return _draw_site(fn, block, plates, present)


def _draw_site(
    fn: Any, block: Drawn, plates: dict[str, Any], present: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Samples the one site of a block from its own distribution."""
    (site,) = block.sites
    fn = on_support(fn, block)
    with _inside(plates, (frame.name for frame in site.frames), present.get(site.name)):
        return {site.name: pyro.sample(site.name, fn)}


def on_support(fn: Any, block: Drawn) -> Any:
    """The distribution of the one site of a block, on its support, from what the head returned."""
    (site,) = block.sites
    if isinstance(fn, Tensor):
        fn = dist.Delta(fn, event_dim=int(block.family.joint))
    if isinstance(fn, dist.Delta):
        value = fn.v if site.transform is None else site.transform(fn.v)
        return dist.Delta(value, event_dim=len(site.event_shape))
    through = site.transform is not None and is_real(support_of(fn))
    if not block.family.joint:
        fn = fn.to_event(len(site.space if through else site.event_shape))
    return Carried(fn, [site.transform]) if through else fn


def _draw_flat(
    fn: Any,
    block: Drawn,
    plates: dict[str, Any],
    layout: Plates,
    name: str,
    present: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Samples all coordinates at once and hands each site its piece, as `AutoContinuous` does."""
    joint = fn if block.family.joint else fn.to_event(1)
    masks = {site: present.get(site) for site in block.names}
    mask = common_mask(masks, joint.batch_shape) if present else None
    with _inside(plates, [] if block.frame is None else [block.frame.name], mask):
        flat = pyro.sample(name, joint, infer={"is_auxiliary": True})
    draws = {}
    pieces = flat.split([site.size for site in block.sites], dim=-1)
    for site, piece in zip(block.sites, pieces, strict=True):
        with _inside(plates, (frame.name for frame in site.frames), mask):
            value = unconstrained = layout.shape(piece, site, block.frame, plates)
            if site.transform is not None:
                value = site.transform(unconstrained)
                if not isinstance(fn, dist.Delta) and am_i_wrapped():
                    # a factor, and not Delta's log_density, which analytic KL would forget
                    slope = site.transform.log_abs_det_jacobian(unconstrained, value)
                    pyro.factor(f"{name}_{site.name}_log_det", -slope, has_rsample=True)
            fn_site = dist.Delta(value, event_dim=len(site.event_shape))
            infer: Any = {"is_piece": True}
            draws[site.name] = pyro.sample(site.name, fn_site, infer=infer)
    return draws


@contextmanager
def _inside(plates: dict[str, Any], names: Iterable[str], mask: Any) -> Iterator[None]:
    """Inside of some plates, where draws count as far as a mask says."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(plates[name])
        if mask is not None:
            stack.enter_context(poutine.mask(mask=mask))
        yield
