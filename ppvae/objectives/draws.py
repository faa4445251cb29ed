"""The draws that an objective averages over: runs of model and guide, and their terms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pyro import poutine

from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.runs import check_sites, draws_plate, given, is_vectorized, run_trace

#: The traces of model and guide of one run.
Pair = tuple[poutine.Trace, poutine.Trace]


def traced_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    num_samples: int,
    around_guide: AbstractContextManager[Any] | None = None,
) -> list[Pair]:
    """Runs model and guide for some draws: once, if the model is vectorized, else for each draw.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their arguments.
        num_samples: number of draws; all are for the same data, if a plate subsamples.
        around_guide: a handler that every run of the guide goes through.

    Raises:
        ValueError: the sites of model and guide do not match.
    """
    draws, count = None, num_samples
    if num_samples > 1 and is_vectorized(model):
        draws, count = draws_plate(model, *args, draws=num_samples), 1
    pairs: list[Pair] = []
    for _ in range(count):
        program = given(guide, pairs[0][1], {}) if pairs else guide  # with the rows of the first
        with around_guide or nullcontext():  # outside the trace, which records what it makes
            guide_trace = run_trace(program, args, draws)
        model_trace = run_trace(poutine.replay(model, trace=guide_trace), args, draws)
        check_sites(model_trace, guide_trace)
        pairs.append((model_trace, guide_trace))
    return pairs


def terms_of_draws(pairs: list[Pair], plate: str | None) -> list[Terms]:
    """The terms of each run.

    Raises:
        ValueError: the guide has parameters that no gradient reaches, as its draws are not
            reparametrized.
    """
    found = [terms(model_trace, guide_trace, plate) for model_trace, guide_trace in pairs]
    for run, (_, guide_trace) in zip(found, pairs, strict=True):
        for name, value in run.log_guide.items():
            fn: Any = guide_trace.nodes[name]["fn"]
            if value.requires_grad and not fn.has_rsample:
                raise ValueError(
                    f"guide: expected reparametrized draws; {name!r} is drawn from {fn}, for which "
                    "pyro.infer.SVI with TraceGraph_ELBO can train this guide"
                )
    return found
