"""What a guide has to know of a model: its latent sites, their plates and their supports."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.distributions import biject_to

from ppvae.programs.nodes import is_real


class Site(NamedTuple):
    """A latent site of a model.

    Attributes:
        name: the name of its sample statement.
        support: the constraint on its values.
        frames: the plates around it, outermost first.
        event_shape: shape of one event.
        left: its batch dims to the left of the data plate; empty if they all are one.
        right: its batch dims to the right of the data plate, or all, where there is none.
    """

    name: str
    support: Any
    frames: tuple[Any, ...]
    event_shape: torch.Size
    left: torch.Size
    right: torch.Size

    @property
    def transform(self) -> Any:
        """From the reals to the support."""
        return biject_to(self.support)

    @property
    def space(self) -> torch.Size:
        """Shape of the event in unconstrained space."""
        if self.support.is_discrete or is_real(self.support):
            return self.event_shape
        return torch.Size(self.transform.inverse_shape(self.event_shape))

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates (per datum, where there is a data plate)."""
        return (self.left + self.right + self.space).numel()


def read_site(node: dict[str, Any], frame: Any | None) -> Site:
    """Reads a latent site off its node in a trace.

    Args:
        node: the node.
        frame: the data plate, or None.

    Raises:
        ValueError: the support has no bijection from the reals, or the site needs an encoder.
    """
    fn, frames = node["fn"], node["cond_indep_stack"]
    batch = fn.batch_shape
    left, right = torch.Size(), batch
    if frame is not None:
        left, right = batch[: frame.dim], batch[len(batch) + frame.dim + 1 :]
        left = left if left.numel() > 1 else torch.Size()
        right = right if right.numel() > 1 else torch.Size()
    elif any(f.full_size not in (None, f.size) for f in frames):
        raise ValueError(
            f"encoder: expected an encoder, since the latent site {node['name']!r} lives in a "
            "subsampled plate; got None"
        )
    if any(f.dim is None for f in frames):
        raise ValueError(f"model: site {node['name']!r} lives in a sequential plate; vectorize it")
    if not fn.support.is_discrete and not is_real(fn.support):
        try:
            biject_to(fn.support)
        except NotImplementedError:
            raise ValueError(
                f"model: no bijection from the reals reaches {fn.support}, the support of the "
                f"latent site {node['name']!r}"
            ) from None
    return Site(node["name"], fn.support, frames, fn.event_shape, left, right)


def data_frame(nodes: list[dict[str, Any]], length: int, plate: str | None) -> Any:
    """The plate that an encoder's batch runs along.

    Args:
        nodes: the latent sites.
        length: length of the encoder's batch.
        plate: name of the plate; by default `data`, or else the only one that all sites share, or
            of several the only one of that length.

    Raises:
        ValueError: there is no such plate, more than one, or its length is another.
    """
    stacks = [node["cond_indep_stack"] for node in nodes]
    shared = {f.name: f for f in stacks[0] if all(f in stack for stack in stacks)}
    if not shared:
        where = ", ".join(
            f"{n['name']!r} in {[f.name for f in n['cond_indep_stack']]}" for n in nodes
        )
        raise ValueError(
            f"encoder: expected all latent sites in one plate, got {where}; give global latents "
            "a guide without encoder and combine the two by AutoGuideList"
        )
    if plate is None and "data" in shared:
        plate = "data"
    if plate is None:
        fits = [
            f.name for f in shared.values() if len(shared) == 1 or length in (f.size, f.full_size)
        ]
        plate = fits[0] if len(fits) == 1 else None
    if plate not in shared:
        raise ValueError(f"plate: expected one of {list(shared)}, got {plate!r}")
    frame = shared[plate]
    if length not in (frame.size, frame.full_size):
        raise ValueError(
            f"encoder: expected features of shape ({frame.size}, features), the first as the plate "
            f"{frame.name!r}; got {length} rows"
        )
    return frame
