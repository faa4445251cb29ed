"""The sites of a model that are variables of a tree, and their values as arrays."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae.families.rules import support_of
from ppvae.programs.layout import Place
from ppvae.programs.masks import counted_entries
from ppvae.programs.nodes import Node, is_data, latent_nodes
from ppvae.programs.plates import depth_of, plates_of
from ppvae.programs.supports import from_reals, is_real, space_of


@dataclass(frozen=True)
class Sites:
    """The sites that are variables.

    Attributes:
        trace: of the model on all data, with all its latents.
        plate: the data plate, or None.
        local: whether all latents are those of a datum.
    """

    trace: Any
    plate: Any
    local: bool

    @cached_property
    def nodes(self) -> list[Node]:
        """Their nodes."""
        return shown(self.trace)

    @cached_property
    def events(self) -> dict[str, int]:
        """Site -> number of its event dims."""
        return {node["name"]: _event_dims(node) for node in self.nodes}

    @property
    def size(self) -> int | None:
        """Number of data."""
        return None if self.plate is None else self.plate.size

    def values(self, trace: Any, draws: Any, *, data: bool) -> dict[str, np.ndarray]:
        """Site -> values as `(draws, datum, *other plates, *event)`, of data or of all else.

        Args:
            trace: of the model.
            draws: the plate of draws, or None.
            data: whether to take the observed sites, and not the others.
        """
        arrays = {}
        for node in shown(trace):
            if is_data(node) == data:
                value = node["value"]
                value = with_gaps(node, value) if node["is_observed"] and data else value
                arrays[node["name"]] = self.front(node, value, draws)
        return arrays

    def on_the_reals(self, trace: Any, draws: Any) -> dict[str, np.ndarray]:
        """Latent -> values where the model has it on the reals; none if all are there already.

        Args:
            trace: of the model.
            draws: the plate of draws, or None.
        """
        nodes = [node for node in latent_nodes(trace) if not node["fn"].support.is_discrete]
        if all(is_real(support_of(node["fn"])) for node in nodes):
            return {}
        free = {}
        for node in nodes:
            try:
                transform = from_reals(support_of(node["fn"]))
            except NotImplementedError:
                continue
            value = transform.inv(node["value"])
            count = len(space_of(transform, node["fn"].batch_shape, node["fn"].event_shape))
            free[node["name"]] = front(node, value, self.plate, draws, count)
        return free

    def front(self, node: Node, value: Tensor, draws: Any) -> np.ndarray:
        """A value of a site as `(draws, datum, *other plates, *event)`; see `front`."""
        return front(node, value, self.plate, draws, self.events[node["name"]])


def shown(trace: Any) -> list[Node]:
    """The sample sites of a trace that are variables: no subsamples and no factors."""
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
    return [n for n in nodes if not (site_is_subsample(n) or isinstance(n["fn"], dist.Unit))]


def front(node: Node, value: Tensor, plate: Any, draws: Any, events: int) -> np.ndarray:
    """A value as an array `(draws, datum, *other plates, *event)`.

    Args:
        node: the site that it belongs to.
        value: of that site.
        plate: the data plate, or None.
        draws: the plate of draws, or None.
        events: number of event dims of the value.
    """
    while value.dim() > events + depth_of(node) and len(value) == 1:  # a dim of no plate
        value = value[0]
    place = Place.of({**node, "value": value}, plate, draws, events=events)
    sizes = [place.batch[dim] for dim in (place.datum, *place.plates) if dim is not None]
    return as_array(place.front(value).reshape(place.batch[0], *sizes, *place.event))


def as_array(value: Tensor) -> np.ndarray:
    """A tensor as an array, in single precision where NumPy has not its dtype."""
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()


def with_gaps(node: Node, value: Tensor) -> Tensor:
    """Numbers of a site's shape, NaN where its own are missing or masked."""
    entries = counted_entries(node)
    return value if entries is None else torch.where(entries, value, math.nan)


def _event_dims(node: Node) -> int:
    """Number of event dims of a site.

    A deterministic one may say nothing of them. They are then what is right of its plates, where
    they have the sizes of its plates.
    """
    shape, events = node["value"].shape, len(node["fn"].event_shape)
    if not node["infer"].get("_deterministic") or events < len(shape):
        return events
    most = max(len(shape) - depth_of(node), 0)
    stack = plates_of(node).values()
    for events in range(most, -1, -1):
        batch = shape[: len(shape) - events]
        if all(batch[plate.dim :][:1] == (plate.size,) for plate in stack):
            return events
    return most
