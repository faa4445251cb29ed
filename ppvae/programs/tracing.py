"""One run of a Pyro model and its guide: the traces of both, of one draw or of many."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._checks import check_flag, expect
from ppvae._process import safe_point
from ppvae._scopes import eval_mode, random_state
from ppvae.programs.enumeration import draw_discrete, enumerated_trace, summed_out
from ppvae.programs.keywords import bare, check_programs, has_keywords
from ppvae.programs.nodes import (
    DRAWS,
    is_data,
    latent_nodes,
    observed_nodes,
    prototype,
    summed_nodes,
    trace_of,
)
from ppvae.programs.plates import leftmost_plate

Program = Callable[..., Any]  # a Pyro model or guide
Args = tuple[Any, ...]  # the arguments of a program


class Look(NamedTuple):
    """What is known of a model: the dim of its leftmost plate, and its finite discrete latents."""

    leftmost: int
    discrete: frozenset[str]


_looks: WeakKeyDictionary[Any, Look] = WeakKeyDictionary()


def trace_pair(model: Program, guide: Program, *args: Any, draws: Any = None) -> tuple[Any, Any]:
    """Runs the guide, then the model on its draws.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments.
        draws: a plate made by `draws_plate`, for many draws in one vectorized run.

    Returns:
        The traces of model and guide.

    Raises:
        TypeError: model or guide cannot be called.
        ValueError: the guide misses a latent site of the model, or has one that the model lacks.
    """
    check_programs(model, guide)
    try:
        guide_trace = run_trace(guide, args, draws)
    except (TypeError, ValueError):
        check_call(model, args)  # which may know better what is wrong with the arguments
        raise
    model_trace = run_model(model, guide_trace, args, draws)
    check_sites(model_trace, guide_trace)
    return model_trace, guide_trace


def check_call(model: Program, args: Args) -> None:
    """Lets a model check the arguments of a call, if it has a method for that."""
    check = getattr(bare(model), "check_call", None)
    if callable(check) and not has_keywords(model):
        check(*args)


def with_discrete(
    model: Program, traces: tuple[Any, Any], args: Args, draws: Any = None
) -> tuple[Any, Any]:
    """Draws the discrete latents that were summed out of a pair of traces, given all the rest.

    Args:
        model: the model.
        traces: of the model and its guide.
        args: their arguments.
        draws: the plate of draws that they were made in, or None.

    Returns:
        A trace of the model with all its latents, and the values to replay it on: the traces
        themselves, if nothing was summed out.
    """
    nodes = draw_discrete(*traces)
    if not nodes:
        return traces
    known = traces[1].copy()
    for name, node in nodes.items():
        known.add_node(name, **node)
    return run_trace(poutine.replay(model, trace=known), args, draws), known


def draws_plate(model: Program, *args: Any, draws: int) -> pyro.plate:
    """A plate of draws to the left of all plates of a model, which is looked at once."""
    return pyro.plate(DRAWS, draws, dim=look(model, args).leftmost - 1)


def look(model: Program, args: Args) -> Look:
    """What is known of a model, which is looked at once."""
    found = _looked(model)
    if found is None:
        with random_state(None, keep=True), eval_mode(model), poutine.block():
            found = _look_at(model, prototype(model, args, {}))
    return found


def _looked(model: Program) -> Look | None:
    with suppress(TypeError):  # of a model without weak references or a hash nothing is kept
        return _looks.get(model)
    return None


def forget(model: Program) -> None:
    """Lets a model be looked at anew."""
    with suppress(TypeError):
        _looks.pop(model, None)


def _look_at(model: Program, trace: Any) -> Look:
    """Reads off a plain trace of a model what is kept for later calls."""
    discrete = frozenset(node["name"] for node in summed_nodes(trace))
    found = Look(leftmost_plate(trace), discrete)
    with suppress(TypeError):
        _looks[model] = found
    return found


def run_model(model: Program, known: Any, args: Args, draws: Any = None) -> Any:
    """A trace of a model at known values of its latents, its finite discrete ones summed out.

    Args:
        model: a Pyro model.
        known: a trace with the values of the latents, of a guide, or `given` ones; discrete latents
            among them are taken as they are.
        args: the arguments of the model.
        draws: the plate of draws that the values stand in, or None.
    """
    found = _looked(model)
    if found is not None and any(name not in known for name in found.discrete):
        try:
            trace = enumerated_trace(model, known, args, draws, found.leftmost)
            if leftmost_plate(trace) >= found.leftmost:
                return summed_out(trace)
        except ValueError:  # perhaps since it has more plates than before: one more look tells
            pass
    before = torch.get_rng_state()
    trace = run_trace(poutine.replay(model, trace=known), args, draws)
    if not summed_nodes(trace):
        return trace
    torch.set_rng_state(before)  # a model that is known to have them draws none of them
    found = _look_at(model, trace)
    return summed_out(enumerated_trace(model, known, args, draws, found.leftmost))


def check_sites(model_trace: Any, guide_trace: Any) -> None:
    """Raises a ValueError unless model and guide have the same latents, and one of them data."""
    data = [
        {n["name"] for n in observed_nodes(t) if is_data(n)} for t in (model_trace, guide_trace)
    ]
    both = sorted(data[0] & data[1])
    expect(not both, "guide", "no site that observes data (is it a model?)", both)
    latent = {node["name"] for node in latent_nodes(model_trace)}
    nodes = latent_nodes(guide_trace)
    drawn = {node["name"] for node in nodes if not node["infer"].get("is_auxiliary")}
    missing, extra = sorted(latent - drawn), sorted(drawn - latent)
    expect(not missing, "guide", "every latent site of the model", f"one that misses {missing}")
    expect(not extra, "guide", f"only the latent sites {sorted(latent)} of the model", extra)


def is_vectorized(model: Any, told: Any = None) -> bool:
    """Whether a model can run inside further plates to the left of its own.

    Args:
        model: the model, which may say so.
        told: what the user says; None asks the model.

    Raises:
        TypeError: the user says neither True nor False.
    """
    told = getattr(model, "vectorized", False) if told is None else check_flag("vectorized", told)
    return bool(told)


def given(program: Program, trace: Any, values: Mapping[str, Tensor]) -> Program:
    """A program that takes the given values at its latent sites instead of drawing them.

    Args:
        program: a model or a guide.
        trace: a trace of the program, which tells its sites and the rows that its plates drew.
        values: site -> value; sites of the trace that are not here are run anew, so that what
            follows from the values follows from the new ones.
    """
    return poutine.replay(program, trace=kept_nodes(trace, values))


def kept_nodes(trace: Any, values: Mapping[str, Tensor]) -> Any:
    """The nodes that `given` hands to a program: of the values, and of subsampled plates."""
    kept = poutine.Trace()
    for name, node in trace.iter_stochastic_nodes():
        if site_is_subsample(node):
            kept.add_node(name, **node)
        elif name in values:
            kept.add_node(name, **{**node, "value": values[name]})
    return kept


def held(program: Program, values: Mapping[str, Tensor], factors: Iterable[str] = ()) -> Program:
    """A program in which some sites have a value, and are no part of it any more.

    Args:
        program: a model or a guide.
        values: site -> value.
        factors: names of factors that go with them.
    """
    fixed = poutine.condition(program, data=dict(values))
    return poutine.block(fixed, hide=[*values, *factors])


def run_trace(program: Program, args: Args, draws: Any = None) -> Any:
    """A trace of a program, inside a plate of draws where there is one."""
    safe_point()
    with draws if draws is not None else nullcontext():
        return trace_of(program, args)
