"""Latents whose true values are known: their coordinates, and what a guide says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuideList, AutoNormal
from torch import Tensor
from torch.distributions import biject_to

from ppvae._context import eval_mode, random_state
from ppvae._replay import drawn_nodes, given, run_trace
from ppvae.guides import FamilyGuide
from ppvae.objective import Terms, data_plate, terms, trace_pair
from ppvae.sites import latent_nodes, prototype

__all__ = ["Layout", "needs_training", "terms_at"]


class Layout:
    """The coordinates of a model's latents, and the simulations that they belong to.

    Attributes:
        frame: the data plate; its members are the simulations where `local` is true.
        plate: the name that the user gave.
        local: whether each datum is a simulation, and not the whole data set.
        outside: names of the sites outside the data plate.
        names: labels of the coordinates.
    """

    def __init__(self, model: Any, args: Any, plate: str | None, *, local: bool) -> None:
        with torch.no_grad(), eval_mode(model), random_state(None, keep=True):
            trace = prototype(model, args, {})
        self.plate, self.local, self.nodes = plate, local, latent_nodes(trace)
        if not self.nodes:
            raise ValueError("model: expected latent sites, got none")
        self.frame = data_plate(trace, plate)
        name = None if self.frame is None else self.frame.name
        nodes = self.nodes + [node for node in trace.nodes.values() if _is_data(node)]
        stacks = {node["name"]: node["cond_indep_stack"] for node in nodes}
        self.outside = [n for n, stack in stacks.items() if name not in {f.name for f in stack}]
        if not (local and self.outside):
            self.names = [label for node in self.nodes for label in self._labels(node)]

    def _labels(self, node: dict[str, Any]) -> list[str]:
        shape, events = node["value"].shape, len(node["fn"].event_shape)
        plates = {f.dim for f in node["cond_indep_stack"]}
        plates -= {self.frame.dim} if self.local else set()
        kept = [shape[dim - events] for dim in range(events - len(shape), 0) if dim in plates]
        places = np.ndindex(*kept, *node["fn"].event_shape)
        return [f"{node['name']}[{','.join(map(str, p))}]" if p else node["name"] for p in places]

    def rows(
        self, values: Mapping[str, Tensor], like: Mapping[str, Tensor], draws: Any = None
    ) -> Tensor:
        """Values of the latent sites as `(draws, simulations, coordinates)`.

        Args:
            values: site -> value.
            like: site -> value of one draw, for the shapes.
            draws: the plate of draws that the values were made in; None for one draw.
        """
        pieces = []
        for node in self.nodes:
            name, events = node["name"], len(node["fn"].event_shape)
            value, shape = values[name], tuple(like[name].shape)
            if draws is None:
                value = value.expand(shape)[None]
            else:  # it stands to the left of all plates of the model, also of those not around here
                ones = (1,) * (events - draws.dim - 1 - len(shape))
                value = value.expand(draws.size, *ones, *shape).reshape(draws.size, *shape)
            value = value.movedim(self.frame.dim - events, 1) if self.local else value[:, None]
            pieces.append(value.reshape(*value.shape[:2], -1))
        return torch.cat(pieces, -1)

    def total(self, parts: Terms, kind: str, size: tuple[int, int]) -> Tensor:
        """Terms of one kind summed over sites, and over the data of a set.

        Args:
            parts: the terms.
            kind: `log_likelihood`, `log_prior` or `log_guide`.
            size: `(draws, simulations)`, the shape of the result.
        """
        device = self.nodes[0]["value"].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for name, value in getattr(parts, kind).items():
            if not self.local:
                value = (value.sum(-1) if name in parts.local else value)[..., None]
            total = total + value
        return total.expand(size)

    def log_weight(self, parts: Terms, size: tuple[int, int]) -> Tensor:
        """Log p(x, z) - log q(z | x), of that size."""
        log_p = self.total(parts, "log_likelihood", size) + self.total(parts, "log_prior", size)
        return log_p - self.total(parts, "log_guide", size)


def _is_data(node: Any) -> bool:
    seen = node["type"] == "sample" and node["is_observed"]
    deterministic = seen and node["infer"].get("_deterministic")
    return seen and not (deterministic or isinstance(node["fn"], dist.Unit))


def needs_training(guide: Any, layout: Layout) -> str:
    """Why a guide must be trained on data before it can answer for them; empty if it need not."""
    if layout.frame is None:
        return "the model has no plate over its data"
    if layout.outside:
        return f"the sites {layout.outside} are outside the plate {layout.frame.name!r}"
    if not _is_amortized(guide):
        return "the parameters of a guide without encoder are those of one data set"
    return ""


def _is_amortized(guide: Any) -> bool:
    """Whether a guide can answer for data that it was not trained on, as far as one can tell."""
    if isinstance(guide, AutoGuideList):
        return all(_is_amortized(part) for part in guide)
    if isinstance(guide, FamilyGuide):
        return guide.encoder is not None or not guide.family.channels
    return not isinstance(guide, (AutoContinuous, AutoDelta, AutoNormal))


def terms_at(
    model: Any, guide: Any, args: tuple[Any, ...], latents: Mapping[str, Tensor], plate: str | None
) -> Terms | None:
    """The terms of the objective at given values of the latents; None where they are not found.

    A guide that draws a latent through an auxiliary site (joint families, Pyro's autoguides) has
    its density there. If the unconstrained coordinates of the latents are those of the auxiliary
    sites in another order, the map between them is a permutation, and its inverse its transpose:
    one gradient. Whether this was so is seen by running the guide on the values found.
    """
    model_trace, guide_trace = trace_pair(model, guide, *args)
    drawn = drawn_nodes(guide_trace)
    values = {name: latents[name] for name in drawn if name in latents}
    hidden = {name: node["value"] for name, node in drawn.items() if name not in latents}
    model_trace = run_trace(given(model, model_trace, latents), args)
    if hidden:
        transforms = {
            name: biject_to(model_trace.nodes[name]["fn"].support)
            for name in latents
            if name not in values
        }
        with torch.enable_grad():
            zeros = {n: torch.zeros_like(v).requires_grad_() for n, v in hidden.items()}
            trace = run_trace(given(guide, guide_trace, {**values, **zeros}), args)
            product: Any = 0.0
            for name, transform in transforms.items():
                free = transform.inv(trace.nodes[name]["value"])
                product = product + (free * transform.inv(latents[name])).sum()
            found = torch.autograd.grad(
                product, list(zeros.values()), allow_unused=True, materialize_grads=True
            )
        values |= dict(zip(zeros, found, strict=True))
    guide_trace = run_trace(given(guide, guide_trace, values), args)
    for name, value in latents.items():
        again = guide_trace.nodes[name]["value"]
        if not torch.allclose(again, value.expand(again.shape), rtol=1e-3, atol=1e-4):
            return None
    return terms(model_trace, guide_trace, plate)
