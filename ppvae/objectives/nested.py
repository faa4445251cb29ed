"""The latents of each datum, drawn anew for draws of the global ones that are held."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.nodes import drawn_nodes
from ppvae.programs.plates import is_inside, values_outside
from ppvae.programs.runs import Runs
from ppvae.programs.tracing import given, run_model, run_trace


class Inner(NamedTuple):
    """A run of a pair with the globals held.

    Attributes:
        model_trace: the trace of the model.
        terms: of the pair.
        log_weight: of the latents of each datum given the globals, `(*draws, datum)`, in doubles.
    """

    model_trace: Any
    terms: Terms
    log_weight: Tensor


def inner_run(runs: Runs, trace: Any, frame: Any, draws: Any = None) -> Inner:
    """Draws the latents in the data plate anew.

    Args:
        runs: the pair, whose arguments are those of all data.
        trace: of the guide, which has the values of the globals.
        frame: the frame of the data plate.
        draws: the plate of draws.
    """
    guide = given(runs.guide, trace, values_outside(frame, trace))
    guide_trace = run_trace(guide, runs.args, draws)
    model_trace = run_model(runs.model, guide_trace, runs.args, draws)
    parts = terms(model_trace, guide_trace, frame.name)
    return Inner(model_trace, parts, parts.part(local=True).log_weight.double())


def draws_locals(runs: Runs, frame: Any) -> bool:
    """Whether the guide draws latents of each datum by themselves, on which no other term depends.

    Only then does the likelihood of the globals split into one of each datum.
    """
    if not any(is_inside(node, frame) for node in drawn_nodes(runs.traces[1]).values()):
        return False
    _, trace = runs.pair(runs.args)
    both = [inner_run(runs, trace, frame).terms for _ in range(2)]
    first, second = (p.part(local=False).log_weight.double().reshape(()) for p in both)
    return bool(torch.allclose(first, second, rtol=1e-6, equal_nan=True))


def can_integrate(runs: Runs, parts: Terms) -> bool:
    """Whether the latents of each datum can be integrated out of its likelihood by weights.

    They cannot where the guide is a point, or a `poutine.scale` makes the terms no densities.

    Args:
        runs: the pair.
        parts: its terms.
    """
    scaled = any(bool((torch.as_tensor(parts.scales[n]) != 1).any()) for n in parts.local)
    if runs.plate is None or scaled:
        return False
    if not parts.log_prior:
        return parts.is_local
    if not (parts.is_dense and parts.log_guide):
        return False
    return parts.is_local or draws_locals(runs, parts.plate)
