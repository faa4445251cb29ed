"""Runs of a guide, or of a model, on latents that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._divergence import has_density, is_point
from ppvae.objective import counts, log_prob, per_datum

__all__ = ["drawn_nodes", "given", "log_density", "run_trace"]


def drawn_nodes(trace: Any) -> dict[str, Any]:
    """The latent sites of a trace that carry a density, auxiliary ones among them.

    All other latents (points, and the pieces of a joint draw) follow from these.
    """
    return {
        name: node
        for name, node in trace.iter_stochastic_nodes()
        if not (site_is_subsample(node) or is_point(node["fn"]))
    }


def given(program: Callable[..., Any], trace: Any, values: Mapping[str, Tensor]) -> Any:
    """A program that takes the given values at its latent sites instead of drawing them.

    Args:
        program: a model or a guide.
        trace: a trace of the program, which tells its sites and the rows that its plates drew.
        values: site -> value; sites of the trace that are not here are run anew, so that what
            follows from the values follows from the new ones.
    """
    kept = poutine.Trace()
    for name, node in trace.iter_stochastic_nodes():
        if site_is_subsample(node):
            kept.add_node(name, **node)
        elif name in values:
            kept.add_node(name, **{**node, "value": values[name]})
    return poutine.replay(program, trace=kept)


def run_trace(program: Callable[..., Any], args: tuple[Any, ...], draws: Any = None) -> Any:
    """A trace of a program, inside a plate of draws where there is one."""
    with draws if draws is not None else nullcontext():
        return poutine.trace(program).get_trace(*args)


def log_density(trace: Any, frame: Any) -> Tensor:
    """Log q of all latents of a guide's trace, in nats, per datum (and draw) where `frame` says."""
    total = torch.zeros(())
    for node in trace.nodes.values():
        if node["type"] == "sample" and counts(node) and has_density(node, trace):
            inside = any(f.name == frame.name for f in node["cond_indep_stack"])
            total = total + per_datum(log_prob(node), node, frame if inside else None)
    return total
