"""Runs a Pyro model and its guide: one pair of traces, many draws, and the data in minibatches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._checks import check_count, check_flag, expect
from ppvae._process import safe_point
from ppvae._scopes import eval_mode, private_modules, random_state, unchecked
from ppvae.data.adapters import form_of, has_missing, prepared
from ppvae.programs.enumeration import draw_discrete, enumerated_trace, summed_out
from ppvae.programs.keywords import bare, check_programs, has_keywords, with_keywords
from ppvae.programs.missing import nan_masked
from ppvae.programs.nodes import (
    DRAWS,
    check_densities,
    check_observed,
    check_shapes,
    counts,
    data_plate,
    drawn_nodes,
    draws_its_rows,
    is_data,
    is_inside,
    latent_nodes,
    log_prob,
    mask_of,
    observed_nodes,
    prototype,
    summed_nodes,
    trace_of,
    values_outside,
)

Program = Callable[..., Any]  # a Pyro model or guide
Args = tuple[Any, ...]  # the arguments of a program

# Numbers of the largest tensor in one vectorized run: the draws are cut to keep below it.
BUDGET = 4_000_000
_KEPT = 2**25 - 2**16  # bytes: a little less than the largest block that glibc would keep


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


def _look_at(model: Program, trace: Any) -> Look:
    """Reads off a plain trace of a model what is kept for later calls."""
    discrete = frozenset(node["name"] for node in summed_nodes(trace))
    found = Look(leftmost_plate(trace), discrete)
    with suppress(TypeError):
        _looks[model] = found
    return found


def leftmost_plate(trace: Any) -> int:
    """The dim of the leftmost plate of a trace, but for that of draws; 0 if there is none."""
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
    frames = [f for node in nodes for f in node["cond_indep_stack"] if f.name != DRAWS]
    return min([frame.dim for frame in frames if frame.dim is not None], default=0)


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


def check_masked(model: Program, trace: Any, args: Args) -> None:
    """Raises a ValueError if latents that a model masks change what it does not mask.

    What is masked counts nothing, in the model and in the guide: it is not there. A latent that is
    there, and whose prior alone is masked, would have no entropy and shrink to a point.

    Args:
        model: a Pyro model.
        trace: of the model, at draws of its guide.
        args: the arguments of the model.
    """
    nodes = latent_nodes(trace)
    values = {node["name"]: node["value"].detach() for node in nodes}
    hidden: dict[str, Tensor] = {}
    for node in nodes:
        mask = mask_of(node)
        if mask is not None and values[node["name"]].is_floating_point():
            gone = ~torch.as_tensor(mask, device=node["value"].device)
            if gone.any():
                hidden[node["name"]] = gone.reshape(gone.shape + (1,) * len(node["fn"].event_shape))
    if not hidden:
        return
    with torch.enable_grad():
        moved = {name: values[name].requires_grad_() for name in hidden}
        again = run_model(model, kept_nodes(trace, values), args)
        parts = [node for node in again.nodes.values() if node["type"] == "sample" and counts(node)]
        total = torch.stack([log_prob(node).sum() for node in parts]).sum()
        if not total.requires_grad:
            return
        slopes = torch.autograd.grad(total, list(moved.values()), allow_unused=True)
    for (name, gone), slope in zip(hidden.items(), slopes, strict=True):
        free = slope is None or not (gone & (slope.nan_to_num() != 0)).any()
        wanted = "latents that a mask leaves out to change nothing else (a flat prior is an "
        wanted += "ImproperUniform)"
        expect(free, "model", wanted, f"{name!r}, on which other densities depend")


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


def minibatches(model: Any, guide: Any, args: Args, plate: Any, size: int) -> list[Args]:
    """The arguments cut into minibatches, or whole, where the model's plate does not follow.

    Every tensor with as many rows as the data plate is cut.

    Raises:
        ValueError: the plate draws a subsample of its own.
    """
    rows = plate.size
    if plate.full_size not in (None, rows):
        own = draws_its_rows(prototype(model, args, {}).nodes[plate.name])
        wanted = "a model that takes all its data, or that takes their rows as an argument"
        got = f"one in which the plate {plate.name!r} draws a subsample of {rows} in each run"
        expect(not own, "model", wanted, got)
    if rows <= size:
        return [args]

    def chunk(arg: Any, start: int) -> Any:
        cut = isinstance(arg, Tensor) and arg.shape[:1] == (rows,)
        return arg[start : start + size] if cut else arg

    chunks = [tuple(chunk(arg, start) for arg in args) for start in range(0, rows, size)]
    try:
        followed = data_plate(trace_pair(model, guide, *chunks[0])[0], plate.name).size == size
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
        # whatever a model may raise that was written for one number of data
        return [args]
    return chunks if followed else [args]


def draw_runs(model: Any, args: Args, draws: int, widest: int | None) -> Iterator[tuple[int, Any]]:
    """Cuts draws into runs that fit in memory; yields how many, and the plate for so many.

    `widest` is the size of the largest tensor for one draw; None asks for single draws without a
    plate, for models that are not vectorized.
    """
    at_once = 1 if widest is None else max(1, min(draws, BUDGET // widest))
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        yield count, None if widest is None else draws_plate(model, *args, draws=count)


@dataclass(frozen=True)
class Runs:
    """A model and its guide, ready to be run on data as often as needed; made by `opened`.

    Attributes:
        model: the model, which takes positional arguments only.
        guide: the guide, likewise.
        args: the arguments, those that were given by keyword behind the others.
        traces: of model and guide, on all the data.
        plate: the data plate, or None.
        batches: the arguments in minibatches.
        vectorized: whether many draws are made in one run.
    """

    model: Any
    guide: Any
    args: Args
    traces: tuple[Any, Any]
    plate: Any
    batches: list[Args]
    vectorized: bool

    def given_globals(self) -> "Runs":
        """The pair with one draw of all that is outside of the data plate, which is held there.

        What is left has local latents only. A pair that has no others is returned as it is.

        Raises:
            ValueError: the guide draws no latent of a datum by itself.
        """
        frame, guide_trace = self.plate, self.traces[1]
        outer = values_outside(frame, *self.traces)
        if frame is None or not outer:
            return self
        inner = [n for n in drawn_nodes(guide_trace).values() if is_inside(n, frame)]
        wanted = f"latents of each datum, in the plate {frame.name!r}"
        expect(inner, "guide", wanted, f"one that draws {list(outer)} of all data")
        factors = [n["name"] for n in observed_nodes(guide_trace) if not is_inside(n, frame)]
        model, guide = held(self.model, outer), held(self.guide, outer, factors)
        return replace(self, model=model, guide=guide, traces=trace_pair(model, guide, *self.args))

    def pair(self, args: Args, draws: Any = None) -> tuple[Any, Any]:
        """Traces of model and guide on a minibatch, inside a plate of draws if one is given."""
        return trace_pair(self.model, self.guide, *args, draws=draws)

    def draws(self, args: Args, count: int, traces: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Cuts draws for a minibatch into runs that fit in memory; see `draw_runs`.

        Args:
            args: the minibatch.
            count: number of draws.
            traces: of one draw on the minibatch, which tell the memory that one takes.
        """
        widest = largest_tensor(args, *traces) if self.vectorized else None
        return draw_runs(self.model, args, count, widest)


def largest_tensor(args: Args, *traces: Any) -> int:
    """Size of the largest tensor of a run of one draw: an argument, or the value of a site."""
    nodes = [node for trace in traces for node in trace.nodes.values() if node["type"] == "sample"]
    values = [*args, *(node["value"] for node in nodes)]
    return max((value.numel() for value in values if isinstance(value, Tensor)), default=1)


def _keep_memory() -> None:
    """Has glibc keep the memory of each run for the next one, which would be as large.

    It gives back to the system what is larger than any block that it had to take back before, and
    the system clears it, page by page, when it is wanted again: that took a quarter of the time.
    One block of almost 32 MiB, which is never touched, is the most that it learns from, see
    mallopt(3), M_MMAP_THRESHOLD. Other C libraries make nothing of it.
    """
    torch.empty(_KEPT, dtype=torch.uint8, device="cpu")


@contextmanager
def opened(
    model: Program,
    guide: Program,
    args: Args,
    kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    vectorized: bool | None = None,  # noqa: FBT001
    seed: int | None = None,
    plate: str | None = None,
) -> Iterator[Runs]:
    """Opens a model and its guide for measurements that change nothing.

    Inside, no gradients are recorded, modules are in evaluation mode, the random numbers are those
    of the seed, Pyro's checks are off and its param store is left alone.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their arguments.
        kwargs: their keyword arguments.
        batch_size: data per run; None leaves the data whole.
        vectorized: whether to make many draws in one run; by default as the model says.
        seed: seeds the draws; None uses the caller's stream.
        plate: name of the data plate, see `data_plate`.

    Raises:
        TypeError: a program is no function, or data are no numbers.
        ValueError: the data are not finite or not in the support of their likelihood, nothing is
            observed, or guide and model do not fit.
    """
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size)
    _keep_memory()
    vectorized = is_vectorized(model, vectorized)
    args = prepared(args, form_of(model, guide))
    model, guide, args = with_keywords(model, guide, args, kwargs)
    if has_missing(args):
        model, guide = nan_masked(model), nan_masked(guide)
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model, guide):
        with unchecked():
            with suppress(TypeError):
                _looks.pop(model, None)  # it may have other plates than before
            traces = trace_pair(model, guide, *args)
            check_observed(traces[0])
            check_densities(traces[0])
            with random_state(None, keep=True):
                check_shapes(prototype(model, args, {}))
                check_masked(model, traces[0], args)
            for node in latent_nodes(traces[1]):
                bad = int((~node["value"].isfinite()).sum())
                wanted = f"finite draws at {node['name']!r}"
                expect(not bad, "guide", wanted, f"{bad} that are NaN or infinite")
            frame = data_plate(traces[0], plate)
            batches = [args]
            if frame is not None and batch_size is not None:
                batches = minibatches(model, guide, args, frame, batch_size)
            yield Runs(model, guide, args, traces, frame, batches, vectorized)
