"""The draws that an objective averages over: runs of a model and its guide, and their terms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from pyro import poutine

from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.runs import check_sites, draws_plate, given, is_vectorized, run_trace


class Run(NamedTuple):
    """One run of a model and its guide: of many draws, if the model is vectorized, else of one."""

    terms: Terms
    model_trace: Any
    guide_trace: Any


def runs_of(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    plate: str | None,
    num_samples: int,
    around_guide: AbstractContextManager[Any] | None = None,
) -> list[Run]:
    """Runs model and guide for some draws: once, if the model is vectorized, else for each draw.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their arguments.
        plate: name of the data plate, see `data_plate`.
        num_samples: number of draws; all are for the same data, if a plate subsamples.
        around_guide: a handler that every run of the guide goes through.

    Raises:
        ValueError: the sites of model and guide do not match, or the guide has parameters that no
            gradient reaches, since its draws are not reparametrized.
    """
    draws, count = None, num_samples
    if num_samples > 1 and is_vectorized(model):
        draws, count = draws_plate(model, *args, draws=num_samples), 1
    runs: list[Run] = []
    for _ in range(count):
        program = (
            given(guide, runs[0].guide_trace, {}) if runs else guide
        )  # on the rows of the first
        with around_guide or nullcontext():  # outside the trace, which records what it makes
            guide_trace = run_trace(program, args, draws)
        model_trace = run_trace(poutine.replay(model, trace=guide_trace), args, draws)
        check_sites(model_trace, guide_trace)
        run = Run(terms(model_trace, guide_trace, plate), model_trace, guide_trace)
        for name, value in run.terms.log_guide.items():
            fn = guide_trace.nodes[name]["fn"]
            if value.requires_grad and not fn.has_rsample:
                raise ValueError(
                    f"guide: expected reparametrized draws; {name!r} is drawn from {fn}, for which "
                    "pyro.infer.SVI with TraceGraph_ELBO can train this guide"
                )
        runs.append(run)
    return runs
