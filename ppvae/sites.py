"""What a guide has to know of a model: its latent sites, their plates and their supports."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

__all__ = [
    "Site",
    "data_frame",
    "draws_its_rows",
    "dtype_of",
    "is_real",
    "latent_nodes",
    "prototype",
    "read_site",
    "same_support",
]


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


def latent_nodes(trace: Any) -> list[dict[str, Any]]:
    """The latent sample statements of a trace, without those that draw subsamples."""
    return [node for _, node in trace.iter_stochastic_nodes() if not site_is_subsample(node)]


def draws_its_rows(node: Any) -> bool:
    """Whether a node is that of a plate that draws a subsample; one told its rows has no size."""
    return site_is_subsample(node) and node["fn"].subsample_size not in (None, node["fn"].size)


def dtype_of(*values: Any) -> torch.dtype:
    """The widest floating dtype among some tensors; the default one, where there is none."""
    found = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return reduce(torch.promote_types, found) if found else torch.get_default_dtype()


def prototype(model: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A trace of the model, where an improper prior, which nothing can be drawn from, starts at 0.

    Zero means zero in unconstrained space. Nothing outside sees the run.
    """

    def start(site: dict[str, Any]) -> Tensor:
        fn = site["fn"]
        try:
            return fn.sample().detach()
        except NotImplementedError:
            transform = biject_to(fn.support)
            zeros = torch.zeros(transform.inverse_shape(fn.shape()), dtype=dtype_of(*args))
            return transform(zeros)

    with poutine.block(), torch.no_grad():
        return poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)


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


def is_real(support: Any) -> bool:
    """Whether a support is all of the reals, in any number of dimensions."""
    return isinstance(_bare(support), type(constraints.real))  # a deep copy has one of its own


def same_support(one: Any, other: Any) -> bool:
    """Whether two supports are the same set, up to the number of event dimensions."""
    one, other = _bare(one), _bare(other)
    bounds = [
        {name: float(v) for name, v in vars(s).items() if isinstance(v, (int, float, Tensor))}
        for s in (one, other)
    ]
    return type(one) is type(other) and bounds[0] == bounds[1]


def _bare(support: Any) -> Any:
    """A support without its event dims, and a mixture's as that of its components."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support
