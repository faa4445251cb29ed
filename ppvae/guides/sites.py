"""What a guide has to know of a model: its latent sites, their supports, and the data plate."""

from typing import Any, NamedTuple

import torch

from ppvae._checks import expect
from ppvae.programs.nodes import choose_plate, from_reals, is_real, latent_nodes, plates_of


class Site(NamedTuple):
    """A latent site of a model.

    Attributes:
        name: the name of its sample statement.
        support: the constraint on its values.
        frames: the plates around it, outermost first.
        event_shape: shape of one event.
        left: its batch dims to the left of the data plate; empty if they all are one.
        right: its batch dims to the right of the data plate, or all, where there is none.
    """

    name: str
    support: Any
    frames: tuple[Any, ...]
    event_shape: torch.Size
    left: torch.Size
    right: torch.Size

    @property
    def transform(self) -> Any:
        """The bijection from the reals to the support."""
        return from_reals(self.support)

    @property
    def space(self) -> torch.Size:
        """Shape of the event in unconstrained space."""
        if self.support.is_discrete or is_real(self.support):
            return self.event_shape
        return torch.Size(self.transform.inverse_shape(self.event_shape))

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates (per datum, where there is a data plate)."""
        return (self.left + self.right + self.space).numel()


def read_site(node: dict[str, Any], data: Any | None) -> Site:
    """Reads a latent site off its node in a trace.

    Args:
        node: the node.
        data: the data plate, or None.

    Raises:
        ValueError: the support has no bijection from the reals, or the site needs an encoder.
    """
    name, fn, frames = node["name"], node["fn"], node["cond_indep_stack"]
    whole = data is not None or all(f.full_size in (None, f.size) for f in frames)
    expect(whole, "encoder", f"one, since the plate around the site {name!r} is subsampled", None)
    parallel = all(f.dim is not None for f in frames)
    expect(parallel, "model", f"a vectorized plate around the site {name!r}", "a sequential one")
    try:
        _ = fn.support.is_discrete or from_reals(fn.support)
    except NotImplementedError:
        expected = f"a bijection from the reals to the support of the latent site {name!r}"
        raise ValueError(f"model: expected {expected}, got {fn.support}") from None
    left, right = torch.Size(), fn.batch_shape
    if data is not None:
        left, right = right[: data.dim], right[len(right) + data.dim + 1 :]
        left, right = (dims if dims.numel() > 1 else torch.Size() for dims in (left, right))
    return Site(name, fn.support, frames, fn.event_shape, left, right)


def encoder_plate(trace: Any, length: int, plate: str | None) -> Any:
    """The plate that an encoder's batch runs along, by the rule of `data_plate`.

    Args:
        trace: a trace of the model.
        length: length of the encoder's batch.
        plate: name of the plate; by default the rule chooses among those that all latent sites
            share.

    Raises:
        ValueError: there is no such plate, more than one of that length, or it has another length.
    """
    stacks = {node["name"]: plates_of(node) for node in latent_nodes(trace)}
    inside = next(iter(stacks.values()))
    shared = {n: f for n, f in inside.items() if all(n in stack for stack in stacks.values())}
    where = ", ".join(f"{name!r} in {list(stack)}" for name, stack in stacks.items())
    advice = "; give global latents a guide without encoder and combine the two by AutoGuideList"
    expect(shared, "encoder", "all latent sites in one plate", where + advice)
    # Not the plates around data: the model may be the part of another that holds no data.
    frame = choose_plate(shared, length, plate)
    fitting = [name for name, f in shared.items() if length in (f.size, f.full_size)]
    clear = plate is not None or frame.name == "data" or len(fitting) < 2
    expect(clear, "plate", f"one of {fitting}, which all have {length} members", plate)
    expected = f"features of shape ({frame.size}, features), as the plate {frame.name!r}"
    expect(frame.name in fitting, "encoder", expected, f"{length} rows")
    return frame
