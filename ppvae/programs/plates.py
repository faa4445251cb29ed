"""Plates: which are around a node, which one holds the data, and what is inside of it."""

from collections.abc import Collection, Iterable
from typing import Any

from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._checks import check_choice
from ppvae.programs.nodes import DRAWS, Node, latent_nodes, observed_nodes


def values_outside(frame: Any, *traces: Any) -> dict[str, Tensor]:
    """The values of all that traces draw outside of a plate, but for subsamples."""
    nodes = [node for trace in traces for _, node in trace.iter_stochastic_nodes()]
    drawn = [node for node in nodes if not site_is_subsample(node)]
    return {node["name"]: node["value"] for node in drawn if not is_inside(node, frame)}


def draws_its_rows(node: Any) -> bool:
    """Whether a node is that of a plate that draws a subsample; one told its rows has no size."""
    return site_is_subsample(node) and node["fn"].subsample_size not in (None, node["fn"].size)


def plates_of(node: Node) -> dict[str, Any]:
    """The vectorized plates around a node by name, outermost first, those of draws left out."""
    stack = node["cond_indep_stack"]
    return {f.name: f for f in stack if f.dim is not None and f.name != DRAWS}


def depth_of(node: Node) -> int:
    """How far to the left the plates around a node reach."""
    return max((-f.dim for f in node["cond_indep_stack"] if f.dim is not None), default=0)


def is_inside(node: Node, plate: Any) -> bool:
    """Whether a node lies in a plate; nothing lies in None."""
    return plate is not None and any(f.name == plate.name for f in node["cond_indep_stack"])


def data_plate(trace: Any, plate: str | None = None) -> Any:
    """Finds the plate whose members are the data, by the one rule of the library.

    A name that is given decides. Else it is the plate `data`; else, of the plates around observed
    sites, those of the length of the data (the first tensor among the arguments of the trace), or
    all if none has it; of several the one that all latent sites share, and then the outermost.

    Args:
        trace: a trace of the model.
        plate: its name.

    Returns:
        The frame of the plate, or None if nothing is observed in a plate.

    Raises:
        ValueError: there is no plate of that name.
    """
    frames: dict[str, Any] = {}
    for node in observed_nodes(trace):
        frames |= {name: f for name, f in plates_of(node).items() if name not in frames}
    latents = [plates_of(node) for node in latent_nodes(trace)]
    shared = {name for name in frames if latents and all(name in plates for plates in latents)}
    call = trace.nodes.get("_INPUT", {"args": (), "kwargs": {}})
    inputs = [*call["args"], *call["kwargs"].values()]
    return choose_plate(frames, length_of(inputs), plate, shared)


def length_of(args: Iterable[Any]) -> int | None:
    """Length of the first argument that is a tensor with a dimension; None if there is none."""
    return next((arg.shape[0] for arg in args if isinstance(arg, Tensor) and arg.dim()), None)


def choose_plate(
    frames: dict[str, Any], length: int | None, plate: str | None, preferred: Collection[str] = ()
) -> Any:
    """The rule of `data_plate` for plates by name, outermost first, and the length of the data."""
    if plate is not None:
        check_choice("plate", plate, list(frames))
        return frames[plate]
    if "data" in frames:
        return frames["data"]
    fitting = [name for name, f in frames.items() if length in (f.size, f.full_size)]
    names = fitting or list(frames)
    names = [name for name in names if name in preferred] or names
    return frames[names[0]] if names else None


def per_datum(value: Tensor, node: Node, frame: Any) -> Tensor:
    """Sums over all plates but those of the data and of the draws."""
    keep = {f.dim for f in node["cond_indep_stack"] if f.name == DRAWS}
    if frame is not None:
        keep.add(frame.dim)
    drop = [dim for dim in range(-value.dim(), 0) if dim not in keep]
    return value.sum(drop) if drop else value


def leftmost_plate(trace: Any) -> int:
    """The dim of the leftmost plate of a trace, but for that of draws; 0 if there is none."""
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
    frames = [f for node in nodes for f in node["cond_indep_stack"] if f.name != DRAWS]
    return min([frame.dim for frame in frames if frame.dim is not None], default=0)
