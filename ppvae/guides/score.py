"""Latents whose true values are known: their coordinates, and what a guide says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuideList, AutoNormal
from torch import Tensor
from torch.distributions import biject_to

from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.layout import Layout
from ppvae.programs.nodes import drawn_nodes
from ppvae.programs.runs import given, run_trace, trace_pair


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
