"""Many draws of a guide for each datum: their runs, their weights, and gradients through them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._divergence import is_point
from ppvae._replay import given, run_trace
from ppvae.objective import (
    Terms,
    check_sites,
    common_scale,
    data_size,
    draws_plate,
    is_vectorized,
)

__all__ = ["Cut", "averaged", "log_joint_and_guide", "path", "runs"]


class Cut(Messenger):
    """Cuts the graph at every draw of a guide, so that what follows sees a leaf in its place.

    Attributes:
        draws: pairs of a draw, with the graph that leads back to the guide's parameters, and the
            leaf of the same value; in the order of drawing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[tuple[Tensor, Tensor]] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        hidden = site_is_subsample(msg) or msg["is_observed"] or is_point(msg["fn"])
        if hidden or not msg["value"].requires_grad:
            return
        leaf = msg["value"].detach().requires_grad_()
        self.draws.append((msg["value"], leaf))
        msg["value"] = leaf


def runs(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    num_samples: int,
    cuts: list[Cut] | None = None,
) -> list[tuple[Any, Any]]:
    """Traces of model and guide: of one run, if the model is vectorized, else one for each draw.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their arguments.
        num_samples: number of draws; all are for the same data, if a plate subsamples.
        cuts: a list that gets a `Cut` for each run; None leaves the graph whole.

    Raises:
        ValueError: the sites of model and guide do not match.
    """
    draws, count = None, num_samples
    if num_samples > 1 and is_vectorized(model):
        draws, count = draws_plate(model, *args, draws=num_samples), 1
    pairs: list[tuple[Any, Any]] = []
    for _ in range(count):
        program = given(guide, pairs[0][1], {}) if pairs else guide
        cut = None if cuts is None else Cut()
        with cut or nullcontext():  # outside the trace, which then records the leaves
            guide_trace = run_trace(program, args, draws)
        model_trace = run_trace(poutine.replay(model, trace=guide_trace), args, draws)
        check_sites(model_trace, guide_trace)
        pairs.append((model_trace, guide_trace))
        if cuts is not None and cut is not None:
            cuts.append(cut)
    return pairs


def log_joint_and_guide(parts: list[Terms], size: int | None) -> tuple[Tensor, Tensor]:
    """Log p(x, z) and log q(z) of the terms of each run, shape `(draws, batch)`, in nats.

    If all latents are global there is one weight for all the data, and the shape is `(draws,)`.

    Raises:
        ValueError: the guide has a point, or these are no weights of importance (see `IWAE`).
    """
    first = parts[0]
    _check_density(first)
    names = set(first.log_prior) | set(first.log_guide)
    local = bool(names & first.local)
    if local:
        outside = (names | set(first.log_likelihood)) - first.local
        if outside:
            raise ValueError(
                f"model: expected all sites in the plate {first.plate.name!r}, or all latent "
                f"sites outside, for weights of importance; outside: {sorted(outside)}"
            )
    else:
        _check_all_data(first, size)
    log_p, log_q = [], []
    for part in parts:
        log_p.append(_total({**part.log_likelihood, **part.log_prior}, part, local=local))
        log_q.append(_total(part.log_guide, part, local=local))
    return _stacked(log_p, local=local), _stacked(log_q, local=local)


def averaged(values: Tensor, parts: Terms, size: int | None) -> Tensor:
    """Values per datum, or one for all the data, in nats per datum, times the model's scale.

    Raises:
        ValueError: some sites are scaled and others are not, so that the scale is not a factor.
    """
    scale = common_scale(list(parts.scales.values()))
    if scale is None:
        raise ValueError(
            f"model: expected one poutine.scale around all sites, got {parts.scales}; weights of "
            "importance have no meaning else"
        )
    if values.dim():
        return (values * scale).mean()
    if isinstance(scale, Tensor) and scale.dim():
        raise ValueError("model: expected a scale that is one number, beside global latents")
    return values * scale / data_size(parts, size)


def path(cuts: list[Cut], value: Tensor) -> Tensor:
    """A scalar with the gradient that `value` has by way of the draws of all runs, and no other."""
    leaves = [leaf for cut in cuts for _, leaf in cut.draws]
    total = torch.zeros(())
    if not leaves:
        return total
    slopes = iter(_slopes(value, leaves))
    for cut in cuts:
        total = total + _path(cut.draws, [next(slopes) for _ in cut.draws])
    return total


def _path(draws: list[tuple[Tensor, Tensor]], slopes: list[Tensor]) -> Tensor:
    """Takes the slope at each leaf, the others held fixed, back to the parameters of the draws."""
    total = torch.zeros(())
    for (drawn, leaf), slope in zip(reversed(draws), reversed(slopes), strict=True):
        if total.requires_grad:  # later draws may follow from this one
            slope = slope + _slopes(total, [leaf])[0]
        total = total + (slope * drawn).sum()
    return total


def _slopes(value: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _check_density(parts: Terms) -> None:
    points = sorted(set(parts.log_prior) - set(parts.log_guide))
    joint = set(parts.log_guide) - set(parts.log_prior)
    if points and not joint:
        raise ValueError(
            f"guide: expected a density for every latent site; {points} are points, which have "
            "none, and no weight of importance"
        )


def _check_all_data(parts: Terms, size: int | None) -> None:
    frame = parts.plate
    if frame is None:
        return
    full = size or frame.full_size or frame.size
    if frame.size != full or frame.full_size not in (None, frame.size):
        raise ValueError(
            f"batch_size: expected all {full} data in one batch, since the latent sites are "
            f"global, and a weight of importance belongs to all the data; got {frame.size}"
        )


def _total(values: dict[str, Tensor], parts: Terms, *, local: bool) -> Tensor:
    """The sum over sites, and over the data too, unless it is to be local."""
    summed = [v.sum(-1) if n in parts.local and not local else v for n, v in values.items()]
    return sum(summed, start=torch.zeros(()))


def _stacked(runs: list[Tensor], *, local: bool) -> Tensor:
    """One run of many draws, or many runs of one, with the draws in front."""
    value = torch.stack(runs)
    return value[0] if value.dim() > 1 + local else value
