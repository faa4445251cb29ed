"""What is observed, drawn for new arguments of a model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from pyro import poutine

from ppvae._checks import expect
from ppvae._scopes import random_state
from ppvae.data.adapters import Form, items_of, prepared
from ppvae.export.sites import Sites, front
from ppvae.programs.nodes import is_data, latent_nodes
from ppvae.programs.plates import is_inside
from ppvae.programs.runs import Runs
from ppvae.programs.simulation import Uncondition
from ppvae.programs.tracing import Args, run_trace


class New(NamedTuple):
    """New arguments of a model.

    Attributes:
        args: all of them, those by keyword last.
        given: the positional ones as they came.
    """

    args: Args
    given: Args

    @classmethod
    def of(cls, predictions: Any, runs: Runs, form: Form, kwargs: Mapping[str, Any]) -> "New":
        """Reads what was given: a tensor or a tuple, or a mapping from keywords.

        Args:
            predictions: what was given.
            runs: the pair.
            form: of the data that the pair takes.
            kwargs: its keyword arguments.

        Raises:
            ValueError: there are too few of them, too many, or one of an unknown name.
        """
        words = dict(kwargs)
        given: Args = ()
        if isinstance(predictions, Mapping):
            unknown = [name for name in predictions if name not in words]
            expect(not unknown, "predictions", f"keyword arguments among {list(words)}", unknown)
            words |= predictions
        else:
            given = items_of(predictions)
            count = len(runs.args) - len(words)
            expect(len(given) == count, "predictions", f"{count} arguments", len(given))
        return cls((*prepared(given, form), *prepared(tuple(words.values()))), given)


def predicted(
    runs: Runs, sites: Sites, known: Any, new: Args, draws: Any = None
) -> dict[str, np.ndarray]:
    """The observed sites for new arguments, given the global latents in a trace of the model.

    The latents of new data are drawn from the model.

    Args:
        runs: the pair.
        sites: the variables.
        known: the trace.
        new: the new arguments.
        draws: the plate of draws, or None.
    """
    kept = poutine.Trace()  # of latents alone, as the plates have other rows
    for node in latent_nodes(known):
        if not is_inside(node, runs.plate):
            kept.add_node(node["name"], **node)
    try:
        trace = run_trace(poutine.replay(Uncondition()(runs.model), trace=kept), new, draws)
    except Exception as error:
        error.add_note(
            "from_pyro_svi: in a run for `predictions`, whose groups must be those known"
        )
        raise
    nodes = [trace.nodes[node["name"]] for node in sites.nodes if is_data(node)]
    frames = [frame for node in nodes for frame in node["cond_indep_stack"]]
    plate = next((f for f in frames if runs.plate and f.name == runs.plate.name), None)
    events = sites.events
    return {n["name"]: front(n, n["value"], plate, draws, events[n["name"]]) for n in nodes}


def rows_of_new(runs: Runs, sites: Sites, new: Args) -> int | None:
    """How many data the new arguments are, by a run without random numbers; None without a plate.

    Args:
        runs: the pair.
        sites: the variables.
        new: the new arguments.
    """
    with random_state(None, keep=True):
        drawn = predicted(runs, sites, sites.trace, new)
    inside = [node["name"] for node in sites.nodes if is_inside(node, runs.plate)]
    return next((len(drawn[name][0]) for name in inside if name in drawn), None)
