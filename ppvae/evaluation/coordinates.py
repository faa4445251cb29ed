"""The mean of q and the divergence of every latent coordinate, for each datum."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae.objectives.divergence import by_coordinate, closed_kl
from ppvae.programs.layout import Layout
from ppvae.programs.nodes import is_point, latent_nodes


@dataclass
class Coordinates:
    """The coordinates of the latents of one minibatch; made by `coordinates`.

    Draws are added run by run. Tensors have shape `(datum, coordinates)`.

    Attributes:
        layout: of the latents.
        first: the first draw, from which the others are measured.
        mean: the mean of q; NaN where it has no closed form.
        kl: KL(q || p); NaN where the divergence does not split.
        count: number of draws that were added.
        total: the sum of the draws, less `first`.
        squares: the sum of their squares.
    """

    layout: Layout
    first: Tensor
    mean: Tensor
    kl: Tensor
    count: int
    total: Tensor
    squares: Tensor

    def add(self, guide_trace: Any, draws: Any = None) -> None:
        """Adds the draws of a run, made in a plate of draws or without one."""
        values = {name: guide_trace.nodes[name]["value"] for name in self.layout.places}
        away = (self.layout.inside(draws).flat(values) - self.first).double()
        self.count += len(away)
        self.total, self.squares = self.total + away.sum(0), self.squares + away.square().sum(0)

    def arrays(self) -> dict[str, np.ndarray]:
        """Mean, variance of its error (where it is one of draws), KL, and whether draws differ."""
        drawn = self.total / self.count
        spread = (self.squares / self.count - drawn.square()) / max(1, self.count - 1)
        known = ~self.mean.isnan()
        mean = torch.where(known, self.mean, self.first.double() + drawn)
        error = torch.where(known, 0.0, spread)
        arrays = {"mean": mean, "error": error, "kl": self.kl, "differ": self.squares > 0}
        return {name: value.cpu().numpy() for name, value in arrays.items()}


def coordinates(model_trace: Any, guide_trace: Any, plate: Any) -> Coordinates:
    """Reads what is known of the coordinates without draws.

    Args:
        model_trace: a trace of the model, without a plate of draws.
        guide_trace: the trace of the guide that it was replayed on.
        plate: the data plate.
    """
    layout, values = Layout.of(model_trace, plate), guide_trace.nodes
    first = layout.flat({name: values[name]["value"] for name in layout.places})[0]
    point = not _is_drawn(guide_trace)
    tables: list[dict[str, Tensor]] = [{}, {}]
    for node in latent_nodes(model_trace):
        fn, shape = values[node["name"]]["fn"], values[node["name"]]["value"].shape
        # the point of a piece of a joint draw says nothing of its distribution
        known = point or not is_point(fn)
        for table, value in zip(tables, (_mean(fn), _split_kl(fn, node["fn"])), strict=True):
            value = value if known and value is not None else first.new_tensor(math.nan)
            table[node["name"]] = value.double().expand(shape)
    mean, kl = (layout.flat(table)[0] for table in tables)
    zero = torch.zeros_like(mean)
    return Coordinates(layout, first, mean, kl, 0, zero, zero)


def _is_drawn(trace: Any) -> bool:
    """Whether a guide draws anything: a latent, or an auxiliary site that latents follow from."""
    nodes = [node for _, node in trace.iter_stochastic_nodes()]
    return any(node["infer"].get("is_auxiliary") or not is_point(node["fn"]) for node in nodes)


def _mean(fn: Any) -> Tensor | None:
    """The mean of a distribution; None where it has no closed form."""
    try:
        return fn.mean
    except NotImplementedError:
        return None


def _split_kl(guide: Any, prior: Any) -> Tensor | None:
    """KL by coordinate, of the shape of a draw; None where it does not split."""
    pair = by_coordinate(guide, prior)
    return None if pair is None else closed_kl(*pair)
