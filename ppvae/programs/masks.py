"""Masks: what of a node counts, and its density without the rest."""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.programs.nodes import Node


def log_prob(node: Node) -> Tensor:
    """Log density of a node's value by batch element; zero where it is masked."""
    return masked(node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"]), node)


def mask_of(node: Node) -> Any:
    """The mask of a node, by handlers around it or by its distribution; None if there is none."""
    mask, fn = node["mask"], node["fn"]
    while isinstance(fn, dist.MaskedDistribution):
        mask, fn = fn._mask if mask is None else mask & fn._mask, fn.base_dist
    return mask


def common_mask(masks: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """The one mask of latents that are cut from a joint draw; None if none is masked.

    Args:
        masks: site -> its mask, or None.
        shape: of the log density of the draw.

    Raises:
        ValueError: they are masked differently, so that the density of a part would be wanted.
    """
    hidden = {name: mask for name, mask in masks.items() if mask is not None}
    if not hidden:
        return None
    known = [torch.as_tensor(mask) for mask in hidden.values()]
    first, *others = known
    alike = len(known) == len(masks)
    alike = alike and all(mask is first or torch.equal(mask, first) for mask in others)
    if alike and torch.broadcast_shapes(first.shape, shape) == shape:
        return first
    if all(bool(mask.all()) for mask in known):
        return None
    wanted = "latents drawn one by one where the model masks some, as mean_scale draws them"
    raise ValueError(f"guide: expected {wanted}; got a joint draw of {[*hidden]} and others")


def counted_entries(node: Node) -> Tensor | None:
    """Which numbers of a node's value count, of its shape: those that no mask leaves out.

    None, if all do. What is missing among data is masked, too.
    """
    found = _masks_in(node["fn"])
    if node["mask"] is not None:
        found = [*found, (node["mask"], len(node["fn"].event_shape))]
    if not found:
        return None
    value = node["value"]
    seen = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    for mask, events in found:
        part = torch.as_tensor(mask, device=value.device)
        seen = seen & part.reshape(part.shape + (1,) * events)
    return seen


def _masks_in(fn: Any) -> list[tuple[Any, int]]:
    """The masks in a distribution, and how many event dims are to the right of each."""
    found = []
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            found.append((fn._mask, len(fn.event_shape)))
        fn = fn.base_dist
    return found


def masked(value: Tensor, node: Node) -> Tensor:
    """A value by batch element, made zero where the node's mask is false."""
    mask = mask_of(node)
    if mask is None:
        return value
    return torch.where(torch.as_tensor(mask, device=value.device), value, torch.zeros_like(value))
