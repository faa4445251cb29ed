"""Runs a Pyro model and its guide: one pair of traces, many draws, and the data in minibatches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import check_count, expect
from ppvae._scopes import eval_mode, private_modules, random_state, unchecked
from ppvae.data.adapters import has_missing
from ppvae.programs.checks import check_densities, check_model
from ppvae.programs.keywords import prepared_call
from ppvae.programs.missing import nan_masked
from ppvae.programs.nodes import drawn_nodes, latent_nodes, observed_nodes, prototype
from ppvae.programs.plates import data_plate, draws_its_rows, is_inside, values_outside
from ppvae.programs.tracing import (
    Args,
    Program,
    draws_plate,
    forget,
    held,
    is_vectorized,
    trace_pair,
)

# Numbers of the largest tensor in one vectorized run: the draws are cut to keep below it.
BUDGET = 4_000_000
_KEPT = 2**25 - 2**16  # bytes: a little less than the largest block that glibc would keep


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
    model, guide, args = prepared_call(model, guide, args, kwargs)
    if has_missing(args):
        model, guide = nan_masked(model), nan_masked(guide)
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model, guide):
        with unchecked():
            forget(model)  # it may have other plates than before
            traces = trace_pair(model, guide, *args)
            check_model(model, traces[0], args)
            check_densities(traces[0])
            for node in latent_nodes(traces[1]):
                bad = int((~node["value"].isfinite()).sum())
                wanted = f"finite draws at {node['name']!r}"
                expect(not bad, "guide", wanted, f"{bad} that are NaN or infinite")
            frame = data_plate(traces[0], plate)
            batches = [args]
            if frame is not None and batch_size is not None:
                batches = minibatches(model, guide, args, frame, batch_size)
            yield Runs(model, guide, args, traces, frame, batches, vectorized)
