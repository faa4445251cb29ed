"""The mean of q and the divergence of every latent coordinate, for each datum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae.objectives.divergence import by_coordinate, closed_kl
from ppvae.programs.layout import Layout
from ppvae.programs.nodes import is_point, latent_nodes


class Coordinates:
    """The coordinates of the latents of one minibatch; draws are added run by run.

    Args:
        model_trace: a trace of the model, without a plate of draws.
        guide_trace: the trace of the guide that it was replayed on.
        plate: the data plate.

    Attributes:
        labels: names of the coordinates, see `Layout.labels`.
        differ: whether two draws differ.
    """

    def __init__(self, model_trace: Any, guide_trace: Any, plate: Any) -> None:
        self.layout = Layout.of(model_trace, plate)
        self.labels, self.differ = self.layout.labels, False
        names = list(self.layout.places)
        self.first = self.layout.flat({name: guide_trace.nodes[name]["value"] for name in names})[0]
        point = not _is_drawn(guide_trace)
        means: list[Tensor] = []
        kls: list[Tensor] = []
        for prior in latent_nodes(model_trace):
            place, node = self.layout.places[prior["name"]], guide_trace.nodes[prior["name"]]
            known = point or not is_point(node["fn"])
            for arrays, value in (
                (means, _mean(node["fn"]) if known else None),
                (kls, _split_kl(node["fn"], prior["fn"]) if known else None),
            ):
                nothing = torch.full_like(node["value"], math.nan, dtype=torch.float64)
                value = nothing if value is None else value.double().expand(node["value"].shape)
                arrays.append(place.flat(value)[0])
        self.mean, self.kl = torch.cat(means, -1), torch.cat(kls, -1)
        self.count = 0
        self.sum: Any = 0.0
        self.squares: Any = 0.0

    def add(self, guide_trace: Any, draws: Any = None) -> None:
        """Counts in the draws of a run, made in a plate of draws or without one."""
        rows = []
        for name, place in self.layout.places.items():
            place = place if draws is None else place.inside(draws)
            rows.append(place.flat(guide_trace.nodes[name]["value"]))
        away = torch.cat(rows, -1) - self.first
        self.differ = self.differ or bool((away != 0).any())
        away = away.double()
        self.count += len(away)
        self.sum, self.squares = self.sum + away.sum(0), self.squares + away.square().sum(0)

    def arrays(self) -> dict[str, np.ndarray]:
        """The mean, the variance of its error (where it is one of draws), and the KL.

        Each is of shape `(datum, coordinates)`.
        """
        drawn = self.sum / self.count
        spread = (self.squares / self.count - drawn.square()) / max(1, self.count - 1)
        known = ~self.mean.isnan()
        mean = torch.where(known, self.mean, self.first.double() + drawn)
        error = torch.where(known, 0.0, spread)
        arrays = {"mean": mean, "error": error, "kl": self.kl}
        return {name: value.cpu().numpy() for name, value in arrays.items()}


def _is_drawn(trace: Any) -> bool:
    """Whether a guide draws anything: a latent, or an auxiliary site that latents follow from."""
    nodes = [node for _, node in trace.iter_stochastic_nodes()]
    return any(node["infer"].get("is_auxiliary") or not is_point(node["fn"]) for node in nodes)


def _mean(fn: Any) -> Tensor | None:
    try:
        return fn.mean
    except NotImplementedError:
        return None


def _split_kl(guide: Any, prior: Any) -> Tensor | None:
    """KL by coordinate, of the shape of a draw; None where it does not split."""
    pair = by_coordinate(guide, prior)
    return None if pair is None else closed_kl(*pair)
