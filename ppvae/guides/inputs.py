"""What goes into a head: features of the data, and values of sites that are drawn before."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ppvae.guides.blocks import Drawn
from ppvae.guides.sites import Site


def inputs_of(
    block: Drawn,
    features: Tensor | None,
    values: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    present: Mapping[str, Tensor],
) -> Tensor | None:
    """The input of a head; None where all that it has are free parameters.

    Args:
        block: what is drawn.
        features: of the data in the plate, `(batch, features)` or `(batch, steps, features)`; None
            without an encoder.
        values: site -> value, of the sites that are drawn so far.
        sites: all latent sites by name.
        present: site -> which of its members count, where that are not all. Zeros go in for the
            values of the others, and for all where what is drawn does not count, so that nothing
            runs away there.

    Returns:
        Features of shape `(*batch, features)`, where the batch dims are those of the plates, but
        for the ones that the head makes itself.
    """
    made = _made(block)
    parts = [] if features is None else [_aligned(features, block, made)]
    for name in block.given:
        value = values[name]
        if name in present:
            value = _counted(value, sites[name], present[name])
        parts.append(_seen(value, sites[name], block, made))
    if not parts:
        return torch.zeros(block.padding) if block.padding else None
    if block.padding:
        parts.append(parts[0].new_zeros(block.padding))
    into = parts[0] if len(parts) == 1 else _joined(parts)
    own = present.get(block.sites[0].name)
    return into if own is None else _kept(into, own, made)


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts of the input of a head, side by side."""
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    dtype = parts[0].dtype
    return torch.cat([part.to(dtype).expand(*batch, part.shape[-1]) for part in parts], -1)


def _kept(into: Tensor, present: Tensor, made: int) -> Tensor:
    """The input of a head, with zeros for members of which nothing that is drawn counts."""
    for _ in range(min(made, present.dim())):
        present = present.any(-1)
    batch = into.shape[:-1]
    if len(present.shape) > len(batch) or torch.broadcast_shapes(present.shape, batch) != batch:
        return into  # one row for several members
    return torch.where(present.unsqueeze(-1), into, 0.0)


def _made(block: Drawn) -> int:
    """How many of the last batch dims come from the head, and are not those of its input."""
    if block.flat or not block.sites[0].right or block.per_member:
        return 0
    return len(block.sites[0].right) if block.frame is None else -block.frame.dim - 1


def _aligned(features: Tensor, block: Drawn, made: int) -> Tensor:
    """Puts the batch where the plate is."""
    if block.per_member:
        return features
    if block.step is not None:
        features = features[:, block.step]
    ones = -block.frame.dim - 1 - made
    return features.reshape(len(features), *[1] * ones, features.shape[-1])


def _counted(value: Tensor, site: Site, present: Tensor) -> Tensor:
    """The value of a site, and zero in unconstrained space where a member does not count."""
    zero = value.new_zeros(site.space)
    zero = zero if site.transform is None else site.transform(zero)
    return torch.where(present.reshape(present.shape + (1,) * len(site.event_shape)), value, zero)


def _seen(value: Tensor, site: Site, block: Drawn, made: int) -> Tensor:
    """What a member of the block's plate sees of a site: all of it, or its own, as one vector.

    The dims of draws in front stay where they are.
    """
    free = value if site.transform is None else site.transform.inv(value)
    batch = free.dim() - len(site.space)
    lead = max(batch - site.rank, 0)
    names = [frame.name for frame in site.frames]
    own = None
    if block.frame is not None and block.frame.name in names:
        own = batch + block.frame.dim
    others = [dim for dim in range(lead, free.dim()) if dim != own]
    front = [*range(lead), *([] if own is None else [own])]
    flat = free.permute(*front, *others).flatten(len(front)) if others else free.unsqueeze(-1)
    shape = [*free.shape[:lead], *[1] * (batch - lead)]
    if own is not None:
        shape[own] = free.shape[own]
    shape = shape[: len(shape) - made] if made else shape
    if not lead:  # else the draws in front are to the left of all plates
        depth = block.sites[0].rank - made
        if block.flat:
            depth = 0 if block.frame is None else -block.frame.dim
        shape = shape[max(len(shape) - depth, 0) :]
    return flat.reshape(*shape, flat.shape[-1])
