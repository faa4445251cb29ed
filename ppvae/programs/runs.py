r"""The terms of the objective, read from the traces, and the losses made of them.

Everything here is in nats. `terms` is the one place that turns a pair of traces into numbers;
training, evaluation and export all use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import pyro
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._scopes import eval_mode, random_state
from ppvae.programs.nodes import data_plate, draws_its_rows, latent_nodes, prototype

_leftmost: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # dim of a model's leftmost plate


def trace_pair(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, draws: Any = None
) -> tuple[Any, Any]:
    """Runs the guide, then the model on its draws.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments.
        draws: a plate made by `draws_plate`, for many draws in one vectorized run.

    Returns:
        The traces of model and guide.

    Raises:
        ValueError: the guide misses a latent site of the model, or has one that the model lacks.
    """
    with draws if draws is not None else nullcontext():
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    check_sites(model_trace, guide_trace)
    return model_trace, guide_trace


def draws_plate(model: Callable[..., Any], *args: Any, draws: int) -> Any:
    """A plate of draws to the left of all plates of a model, which is looked at once."""
    if model not in _leftmost:
        with random_state(None, keep=True), eval_mode(model):
            trace = prototype(model, args, {})
        nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
        dims = [f.dim for node in nodes for f in node["cond_indep_stack"] if f.dim is not None]
        _leftmost[model] = min(dims, default=0)
    return pyro.plate("_draws", draws, dim=_leftmost[model] - 1)


def check_sites(model_trace: Any, guide_trace: Any) -> None:
    """Raises a ValueError unless model and guide have the same latent sites."""
    latent = {node["name"] for node in latent_nodes(model_trace)}
    drawn = {
        node["name"] for node in latent_nodes(guide_trace) if not node["infer"].get("is_auxiliary")
    }
    if latent - drawn:
        raise ValueError(f"guide: expected every latent site; it misses {sorted(latent - drawn)}")
    if drawn - latent:
        raise ValueError(
            f"guide: expected only latent sites of the model; it has {sorted(drawn - latent)}, of "
            f"which the model has none (its latent sites: {sorted(latent)})"
        )


def is_vectorized(model: Any) -> bool:
    """Whether a model says that it can run inside further plates to the left of its own."""
    return bool(getattr(model, "vectorized", False))


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


# Numbers of the largest tensor in one vectorized run: the draws are cut to keep below it.
BUDGET = 4_000_000


def minibatches(
    model: Any, guide: Any, args: tuple[Any, ...], frame: Any, size: int, plate: str | None
) -> list[tuple[Any, ...]]:
    """The arguments cut into minibatches, or whole, where the model's plate does not follow.

    Every tensor with as many rows as the plate `frame` is cut.

    Raises:
        ValueError: the plate draws a subsample of its own.
    """
    if frame.full_size not in (None, frame.size):
        if draws_its_rows(prototype(model, args, {}).nodes[frame.name]):
            raise ValueError(
                f"model: the plate {frame.name!r} draws a subsample of {frame.size} in each run; "
                "expected a model that takes all its data, or is told its rows"
            )
    rows = frame.size
    if rows <= size:
        return [args]
    cut = [
        tuple(
            a[start : start + size] if isinstance(a, Tensor) and a.dim() and len(a) == rows else a
            for a in args
        )
        for start in range(0, rows, size)
    ]
    try:
        found = data_plate(trace_pair(model, guide, *cut[0])[0], plate)
    except Exception:  # whatever a model may raise that was written for one number of data
        return [args]
    return cut if found is not None and found.size == size else [args]


def draw_runs(
    model: Any, args: tuple[Any, ...], draws: int, widest: int | None
) -> Iterator[tuple[int, Any]]:
    """Cuts draws into runs that fit in memory; yields how many, and the plate for so many.

    `widest` is the size of the largest tensor for one draw; None asks for single draws without a
    plate, for models that are not vectorized.
    """
    at_once = 1 if widest is None else max(1, min(draws, BUDGET // widest))
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        yield count, None if widest is None else draws_plate(model, *args, draws=count)
