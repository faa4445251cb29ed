"""The best member of each of several families for each datum by itself, without an encoder.

Every family gets a guide whose encoder says nothing, and a search over what its heads say. The
search of a family begins at what the one before it found, so that a family which holds that one
does not end below it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae.comparison.members import summing_out
from ppvae.data.adapters import has_missing
from ppvae.evaluation.search import (
    Found,
    ShiftedGuide,
    best_shifts,
    better_found,
    better_of,
    new_seed,
    shifted_guide,
)
from ppvae.families.heads import Argument, Head
from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.trace_terms import terms
from ppvae.programs.keywords import WithKeywords
from ppvae.programs.layout import Layout
from ppvae.programs.missing import nan_masked
from ppvae.programs.nodes import latent_nodes
from ppvae.programs.runs import Runs
from ppvae.programs.supports import is_real
from ppvae.programs.tracing import Args, held, trace_pair

_MOMENTS = 64  # draws that tell where a member is
_RISING = 0.05  # nats by unit of location, above which a point is at no maximum
FAR = 30.0  # in unconstrained space, where what is bounded is at its end by rounding
_NARROWEST = 1e-6  # an sd that a search may begin with

Moments = tuple[Tensor, Tensor | None]  # of the coordinates of each datum: mean and sd


class Silent(nn.Module):
    """An encoder that says the same of every datum, for families whose members are searched for.

    Attributes:
        rows: number of data in the minibatch at hand; None takes that of the first argument.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.rows: int | None = None
        self.register_buffer("like", like.new_zeros(1, 1), persistent=False)

    def forward(self, *args: Any) -> Tensor:
        """Zeros, of shape `(rows, 1)`."""
        zeros: Any = self.like
        return zeros.expand(len(args[0]) if self.rows is None else self.rows, 1)


@dataclass(frozen=True)
class Rung:
    """A family, and a guide whose members of it can be searched for each datum.

    Attributes:
        guide: a guide of the family.
        runs: the model and that guide.
    """

    guide: FamilyGuide
    runs: Runs

    def on(self, args: Args, rows: int | None = None) -> ShiftedGuide:
        """The guide on a minibatch of so many rows, with all its arguments free for each datum."""
        if isinstance(self.guide.encoder, Silent):
            self.guide.encoder.rows = rows
        return shifted_guide(self.runs, self.guide.heads, args, shared=True)


def rung_of(
    name: str,
    family: Any,
    model: Any,
    runs: Runs,
    outer: Mapping[str, Tensor],
    names: tuple[str, ...],
    *,
    dense: bool = True,
) -> Rung:
    """Makes a guide of a family for a model whose pair with another guide was opened.

    Args:
        name: what to call the family.
        family: what `FamilyGuide` takes as such.
        model: the model as it was given.
        runs: the opened pair, given what is outside of the data plate.
        outer: site -> value of what is outside.
        names: of the keyword arguments.
        dense: whether the family must have a density.

    Raises:
        ValueError: it has none; or its members are not given by what its heads say, as those of a
            flow, whose networks are learned.
    """
    frame, program = runs.plate, held(model, outer) if outer else model
    drawn = latent_nodes(runs.traces[1])
    expect(drawn, "model", "a latent beside those that are summed out", "none")
    silent = Silent(drawn[0]["value"])
    guide = FamilyGuide(program, summing_out(family), silent, plate=frame.name)
    silent.rows = frame.size
    guided: Any = WithKeywords(guide, names) if names else guide
    if has_missing(runs.args):
        guided = nan_masked(guided)
    guide.eval()
    pair = replace(runs, guide=guided, traces=trace_pair(runs.model, guided, *runs.args))
    known = terms(*pair.traces, frame.name).is_dense or not dense
    expect(known, "families", "families with a density", f"{name}, whose members are points")
    own = [key for key, head in guide.heads.items() if type(head) is not Head]
    wanted = "families each member of which is given by its channels (a `Family`), or the guide's"
    expect(not own, "families", wanted, f"{name}, which has networks of its own at {own}")
    return Rung(guide, pair)


def moments_of(shifted: ShiftedGuide, shifts: Tensor) -> Moments | None:
    """Where members are, for a search to begin there; None of latents that are not continuous."""
    try:
        mean, sd = shifted.moments(shifts, _MOMENTS if shifted.coordinates else 1, new_seed())
    except (ValueError, NotImplementedError):
        return None
    return mean, sd.clamp_min(_NARROWEST) if shifted.coordinates else None


def shifts_at(shifted: ShiftedGuide, guide: FamilyGuide, moments: Moments) -> Tensor:
    """The shifts by which locations and scales are those of other members.

    What a family has beside them is left as it is.
    """
    if not shifted.columns:
        return shifted.start  # of the only member
    mean, sd = moments
    slices = Layout.of(shifted.traces[0], shifted.runs.plate).slices
    pieces = shifted.pieces(shifted.start.clone())
    for block in guide.blocks:
        steps = block.step is not None or block.per_member
        drawn = block.over_reals and not block.in_model and slices.keys() >= {*block.names}
        if not drawn or steps or any(site.left for site in block.sites):
            continue
        at = [number for name in block.names for number in range(mean.shape[1])[slices[name]]]
        for name, argument in guide.heads[block.key].named_children():
            key = f"{block.key}.{name}"
            if isinstance(argument, Argument) and key in pieces:
                value = _argument_at(name, argument, mean[:, at], None if sd is None else sd[:, at])
                if value is not None:
                    raw = argument.raw_at(value).reshape(pieces[key].shape)
                    pieces[key] = (raw - shifted.said[key]).to(pieces[key])
    rows = [piece.reshape(len(mean), -1) for piece in pieces.values()]
    return torch.cat(rows, 1) if rows else shifted.start


def without_maximum(shifted: ShiftedGuide, guide: FamilyGuide, best: Tensor) -> Tensor:
    """Where a search for points found no maximum, as of a density that is infinite at an end.

    There the density still rises with the location, or the value of the latent is at the end of its
    range by rounding: the density is above that half way, and stays as it is further out.

    Returns:
        Booleans of shape `(data,)`; all False for latents that are real or not continuous.
    """
    moments = moments_of(shifted, best)
    layout = Layout.of(shifted.traces[0], shifted.runs.plate)
    places = layout.places
    if moments is None or all(is_real(place.support) for place in places.values()):
        return torch.zeros(len(best), dtype=torch.bool, device=best.device)
    loss, slope = shifted.slope(best, 1, new_seed())
    far = moments[0].abs() > FAR
    for name, at in layout.slices.items():
        if is_real(places[name].support):
            far[:, at] = False

    def lost(factor: float, step: float) -> Tensor:
        mean = torch.where(far, moments[0] * factor + step * moments[0].sign(), moments[0])
        return shifted.loss(shifts_at(shifted, guide, (mean, None)), 1, new_seed()) - loss

    at_end = far.any(1) & at_an_end(lost(0.5, 0.0), lost(1.0, 1.0))
    rises = ~(slope.abs().amax(1) < _RISING)
    return rises | at_end | ~loss.isfinite()


def at_an_end(half: Tensor, beyond: Tensor) -> Tensor:
    """Whether a far point is no maximum, but at the end of a range by rounding.

    Args:
        half: by how many nats the density is lower half way to it.
        beyond: the same a step further out.
    """
    return (half > 1) & (beyond < 1e-3)


def _argument_at(name: str, argument: Argument, mean: Tensor, sd: Tensor | None) -> Tensor | None:
    """The value of an argument for each datum; None where the moments do not tell it."""
    shape = (len(mean), *argument.shape)
    if name in ("loc", "v"):
        return mean.reshape(shape) if mean[0].numel() == argument.shape.numel() else None
    if sd is None or name not in ("scale", "scale_tril", "cov_diag"):
        return None
    if name == "scale_tril":
        return torch.diag_embed(sd)
    sd = sd if argument.shape.numel() == sd.shape[1] else sd.mean(1, keepdim=True)
    return (sd.square() if name == "cov_diag" else sd).reshape(shape)


def climb(
    shifted: ShiftedGuide,
    guide: FamilyGuide,
    starts: list[Moments | None],
    steps: int,
    tick: Callable[[], Any],
    *,
    own: bool = False,
) -> Found:
    """The best member for each datum, by a search from the best of some starts.

    Args:
        shifted: a guide of the family.
        guide: that guide.
        starts: where other members are.
        steps: evaluations of a search.
        tick: is called before each.
        own: whether what the guide says by itself is a start, too; from there goes another search.
    """
    known = [shifts_at(shifted, guide, start) for start in starts if start is not None]
    begin = known[0] if known else shifted.start
    for other in known[1:]:
        begin = better_of(shifted, begin, other)
    found = best_shifts(shifted, begin, steps, tick)
    if not own or not known or not shifted.start.shape[1]:
        return found
    return better_found(shifted, best_shifts(shifted, shifted.start, steps, tick), found)
