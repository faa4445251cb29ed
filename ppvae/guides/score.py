"""The density of a guide at given latents, however it draws them.

A guide that draws a latent at its own site is scored there. Joint families and Pyro's autoguides
draw at an auxiliary site instead, in unconstrained space, and hand each latent its piece; here the
entries of such a draw are found among the coordinates of the latents.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.layout import Layout, Place
from ppvae.programs.nodes import drawn_nodes
from ppvae.programs.supports import is_real
from ppvae.programs.tracing import given, kept_nodes, run_model, run_trace, trace_pair

_PROBE = 0.3  # a value that other maps than a copy change

Auxiliary = dict[str, tuple[Place, Tensor]]


def auxiliary_draws(
    guide: Any,
    trace: Any,
    layout: Layout,
    args: tuple[Any, ...],
    plate: Any,
    draws: Any = None,
) -> Auxiliary:
    """Finds which unconstrained coordinates of the latents the auxiliary draws of a guide are.

    Args:
        guide: a guide.
        trace: its trace.
        layout: of the latents of the model.
        args: the arguments of the guide.
        plate: the data plate, or None for draws that belong to all the data.
        draws: the plate of draws that the trace was made in, or None.

    Returns:
        Auxiliary site -> its place, and the number of the coordinate behind each of its entries.

    Raises:
        ValueError: a latent is a point, or an auxiliary draw is not made of such coordinates.
    """
    drawn = drawn_nodes(trace)
    own = {name: drawn[name]["value"] for name in layout.places if name in drawn}
    hidden = {name: node for name, node in drawn.items() if name not in own}
    points = [name for name in layout.places if name not in own]
    expect(hidden or not points, "guide", "a density", f"a point at {points}")
    if not hidden:
        return {}

    def state_of(values: dict[str, Tensor]) -> Tensor:
        again = run_trace(given(guide, trace, own | values), args, draws)
        return layout.free({name: again.nodes[name]["value"] for name in layout.places})

    result = {}
    slopes, state = _copies(state_of, {name: node["value"] for name, node in hidden.items()})
    taken = [number for name in own for number in range(layout.size)[layout.slices[name]]]
    for (name, node), slope in zip(hidden.items(), slopes, strict=True):
        place = Place.of(node, plate, draws)
        copies = place.flat(slope)
        numbers = copies[0, 0].round().long().clamp(1, layout.size) - 1
        copied = (copies - numbers - 1).abs().amax((0, 1)) < 0.01
        copied &= (state[..., numbers] - _PROBE).abs().amax((0, 1)) < 0.001
        copied &= is_real(node["fn"].support)
        numbers = torch.where(copied, numbers, -1)
        result[name] = place, numbers
        taken += numbers.tolist()
    wanted = "auxiliary draws whose entries are unconstrained coordinates of the latents"
    same = sorted(taken) == list(range(layout.size))
    expect(same, "guide", wanted, f"others at {list(hidden)}")
    return result


def _copies(
    state_of: Callable[[dict[str, Tensor]], Tensor], draws: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """For each hidden draw the numbers of the coordinates that copy its entries, and the state.

    If the coordinates are numbered from 1, the gradient of the sum of number times coordinate is,
    at each entry of a draw, the number of its copy. And where all entries are set to one value,
    that is what the copies are.

    Args:
        state_of: from draws by site to the unconstrained coordinates of the latents.
        draws: some draws, for their shapes.
    """
    with torch.enable_grad():
        probes = {k: torch.full_like(v, _PROBE).requires_grad_() for k, v in draws.items()}
        state = state_of(probes)
        total = (state * torch.arange(1, state.shape[-1] + 1, device=state.device)).sum()
        total = total + sum(0 * probe.sum() for probe in probes.values())  # for one not copied
        return torch.autograd.grad(total, list(probes.values())), state


def terms_at(
    model: Any, guide: Any, args: tuple[Any, ...], latents: Mapping[str, Tensor], plate: str | None
) -> Terms | None:
    """The terms of the objective at given values of the latents.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their arguments.
        latents: latent site -> value.
        plate: name of the data plate.

    Returns:
        The terms; None where the density of the guide at given latents cannot be found.
    """
    model_trace, guide_trace = trace_pair(model, guide, *args)
    layout = Layout.of(model_trace, None)
    try:
        auxiliary = auxiliary_draws(guide, guide_trace, layout, args, None)
    except ValueError:
        return None
    values = {name: latents[name] for name in drawn_nodes(guide_trace) if name in latents}
    if auxiliary:
        state = layout.free(latents)
        values |= {
            name: place.back(state[..., numbers]) for name, (place, numbers) in auxiliary.items()
        }
    model_trace = run_model(model, kept_nodes(model_trace, latents), args)
    return terms(model_trace, run_trace(given(guide, guide_trace, values), args), plate)
