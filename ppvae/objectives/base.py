r"""The terms of the objective, read from the traces, and the losses made of them.

Everything here is in nats. `terms` is the one place that turns a pair of traces into numbers;
training, evaluation and export all use it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.nodes import is_point
from ppvae.programs.runs import check_sites, draws_plate, given, is_vectorized, run_trace


def check_reparametrized(parts: Terms, guide_trace: Any) -> None:
    """Raises a ValueError if the guide has parameters that no gradient reaches through a draw."""
    for name, value in parts.log_guide.items():
        fn = guide_trace.nodes[name]["fn"]
        if value.requires_grad and not fn.has_rsample:
            raise ValueError(
                f"guide: expected reparametrized draws; {name!r} is drawn from {fn}, for which "
                "pyro.infer.SVI with TraceGraph_ELBO can train this guide"
            )


class Cut(Messenger):
    """Cuts the graph at every draw of a guide, so that what follows sees a leaf in its place.

    Attributes:
        draws: pairs of a draw, with the graph that leads back to the guide's parameters, and the
            leaf of the same value; in the order of drawing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[tuple[Tensor, Tensor]] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        hidden = site_is_subsample(msg) or msg["is_observed"] or is_point(msg["fn"])
        if hidden or not msg["value"].requires_grad:
            return
        leaf = msg["value"].detach().requires_grad_()
        self.draws.append((msg["value"], leaf))
        msg["value"] = leaf


def runs(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    num_samples: int,
    cuts: list[Cut] | None = None,
) -> list[tuple[Any, Any]]:
    """Traces of model and guide: of one run, if the model is vectorized, else one for each draw.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their arguments.
        num_samples: number of draws; all are for the same data, if a plate subsamples.
        cuts: a list that gets a `Cut` for each run; None leaves the graph whole.

    Raises:
        ValueError: the sites of model and guide do not match.
    """
    draws, count = None, num_samples
    if num_samples > 1 and is_vectorized(model):
        draws, count = draws_plate(model, *args, draws=num_samples), 1
    pairs: list[tuple[Any, Any]] = []
    for _ in range(count):
        program = given(guide, pairs[0][1], {}) if pairs else guide
        cut = None if cuts is None else Cut()
        with cut or nullcontext():  # outside the trace, which then records the leaves
            guide_trace = run_trace(program, args, draws)
        model_trace = run_trace(poutine.replay(model, trace=guide_trace), args, draws)
        check_sites(model_trace, guide_trace)
        pairs.append((model_trace, guide_trace))
        if cuts is not None and cut is not None:
            cuts.append(cut)
    return pairs


def read_terms(pairs: list[Any], plate: str | None) -> list[Terms]:
    """The terms of each pair of traces, every draw of which must be reparametrized."""
    parts = []
    for model_trace, guide_trace in pairs:
        parts.append(terms(model_trace, guide_trace, plate))
        check_reparametrized(parts[-1], guide_trace)
    return parts
