"""What a guide has to know of a model: its latent sites, their supports and plates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae.families.rules import support_of
from ppvae.programs.masks import mask_of
from ppvae.programs.nodes import Node
from ppvae.programs.plates import choose_plate, plates_of
from ppvae.programs.supports import from_reals, is_real, same_support, space_of


class Site(NamedTuple):
    """A latent site of a model.

    Attributes:
        name: the name of its sample statement.
        support: the constraint on its values.
        frames: the plates around it, outermost first.
        event_shape: shape of one event.
        left: its batch dims to the left of its plate, the one that an encoder's batch runs along or
            whose members share parameters; empty if they all are one.
        right: its batch dims to the right of its plate, or all, where there is none.
        rank: number of its batch dims.
        thinned: names of the plates that draw subsamples, by their dims in `right`.
        transform: the bijection from the reals to the support; None where that is all of them, or
            discrete, or the model draws the site.
        space: shape of the event in unconstrained space.
    """

    name: str
    support: Any
    frames: tuple[Any, ...]
    event_shape: torch.Size
    left: torch.Size
    right: torch.Size
    rank: int
    thinned: tuple[tuple[int, str], ...]
    transform: Any
    space: torch.Size

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates (per member, where it has a plate)."""
        return (self.left + self.right + self.space).numel()

    def seen_from(self, plate: Any | None) -> int:
        """Number of unconstrained coordinates that one member of a plate sees: its own, or all."""
        sizes = {f.dim: f.full_size or f.size for f in self.frames}
        if plate is not None and any(f.name == plate.name for f in self.frames):
            sizes.pop(plate.dim, None)
        return math.prod(sizes.values()) * self.space.numel()


def read_site(node: Node, plate: Any | None, *, drawn: bool = True) -> Site:
    """Reads a latent site off its node in a trace.

    Args:
        node: the node.
        plate: the plate along which features run or parameters are shared, or None.
        drawn: whether a head draws it, and not the model.

    Raises:
        ValueError: the support has no bijection from the reals, or a plate is sequential.
    """
    name, fn, frames = node["name"], node["fn"], node["cond_indep_stack"]
    parallel = all(f.dim is not None for f in frames)
    expect(
        parallel or not drawn,
        "model",
        f"a vectorized plate around the site {name!r}",
        "a sequential one",
    )
    transform, space, support = None, torch.Size(fn.event_shape), support_of(fn)
    try:
        if drawn and not (support.is_discrete or is_real(support)):
            transform = from_reals(support)
            space = space_of(transform, fn.batch_shape, fn.event_shape)
            wanted = f"a support of {name!r} that all members of {plate and plate.name!r} share"
            shared = plate is None or len(transform.inverse_shape(fn.event_shape)) == len(space)
            expect(shared, "model", wanted, support)
    except NotImplementedError:
        expected = f"a bijection from the reals to the support of the latent site {name!r}"
        raise ValueError(f"model: expected {expected}, got {support}") from None
    batch, depth = list(fn.batch_shape), len(fn.batch_shape)
    left, right = torch.Size(), torch.Size(batch)
    thinned: tuple[tuple[int, str], ...] = ()
    if plate is not None:
        left, right = right[: plate.dim], right[depth + plate.dim + 1 :]
        left, right = (dims if dims.numel() > 1 else torch.Size() for dims in (left, right))
    else:  # parameters of every member, of which a run may see some
        some = [f for f in frames if drawn and f.full_size not in (None, f.size)]
        for frame in some:
            batch[frame.dim] = frame.full_size
        right, thinned = torch.Size(batch), tuple((depth + f.dim, f.name) for f in some)
    shapes = fn.event_shape, left, right, depth, thinned
    return Site(name, support, frames, *shapes, transform, space)


def encoder_plate(
    nodes: Sequence[Node], length: int, plate: str | None, others: Sequence[str] = ()
) -> Any:
    """The plate that an encoder's batch runs along, by the rule of `data_plate`.

    Args:
        nodes: the latent nodes that it may be for, in a trace of the model.
        length: length of the encoder's batch.
        plate: name of the plate; by default the rule chooses among those around these sites: the
            plates that they all share first.
        others: names of all latent sites, for the error.

    Raises:
        ValueError: there is no such plate, more than one of that length, or it has another length.
    """
    stacks = [plates_of(node) for node in nodes]
    around = {name: frame for stack in stacks for name, frame in stack.items()}
    where = ", ".join(
        f"{node['name']!r} in {[*stack]}" for node, stack in zip(nodes, stacks, strict=True)
    )
    expect(around, "encoder", "latent sites in a plate", where or f"none for it among {[*others]}")
    shared = {n: f for n, f in around.items() if all(n in stack for stack in stacks)}
    frames = around if plate is not None else shared or around
    # Not the plates around data: the model may be the part of another that holds no data.
    frame = choose_plate(frames, length, plate)
    fitting = [name for name, f in frames.items() if length in (f.size, f.full_size)]
    clear = plate is not None or frame.name == "data" or len(fitting) < 2
    expect(clear, "plate", f"one of {fitting}, which all have {length} members", plate)
    expected = f"features of shape ({frame.size}, features), as the plate {frame.name!r}"
    expect(frame.name in fitting, "encoder", expected, f"{length} rows")
    return frame


def only_plate(node: Node, plate: str | None) -> Any:
    """The plate of that name around a site, or else the only one.

    Raises:
        ValueError: there is none, or more than one and no name.
    """
    frames = plates_of(node)
    clear = plate in frames or (plate is None and len(frames) == 1)
    wanted = (
        f"the plate whose members share parameters, around {node['name']!r}: one of {[*frames]}"
    )
    expect(clear, "plate", wanted, plate)
    return frames[plate or next(iter(frames))]


def check_supports(nodes: list[Node], again: Any) -> None:
    """Raises a ValueError if a support in one trace is another in the next, of other draws."""
    for node in nodes:
        name, support = node["name"], node["fn"].support
        same = name not in again.nodes or same_support(support, again.nodes[name]["fn"].support)
        wanted = f"a support of {name!r} that does not depend on other latents"
        expect(same, "model", wanted, support)


def check_present(nodes: list[Node], present: Mapping[str, Tensor]) -> None:
    """Raises a ValueError if a model says of its latents what its masks do not."""
    known = {node["name"]: mask_of(node) for node in nodes}
    for name, counts in present.items():
        wanted = f"latent sites in its `present`, {[*known]}"
        expect(name in known, "model", wanted, name)
        mask = torch.as_tensor(True if known[name] is None else known[name])  # noqa: FBT003
        same = mask.shape == counts.shape or not mask.dim()
        same = same and bool((mask.to(counts.device) == counts).all())
        expect(same, "model", f"the mask of {name!r} from its `present`", "something else")
