"""Measures of each coordinate of the latents, and of the directions of the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pyro.distributions import Normal
from torch import Tensor

from ppvae.objectives.divergence import by_coordinate, closed_kl
from ppvae.programs.layout import drawn_rows, in_front, labels
from ppvae.programs.nodes import counts, is_point, latent_nodes

WORTH = 0.05  # nats per datum: a direction that gains less is not worth a latent


_WIDEST = 2000  # values per datum of which the covariance is looked at


class Coordinates:
    """The mean of q and the KL of every latent coordinate, for one minibatch.

    Args:
        model_trace: a trace of the model, without a plate of draws.
        guide_trace: the trace of the guide that it was replayed on.
        frame: the data plate.

    Attributes:
        names: of the coordinates: numbers for one latent vector, else `site[index]`.
        differ: whether two draws differ.
    """

    def __init__(self, model_trace: Any, guide_trace: Any, frame: Any) -> None:
        self.frame, self.differ = frame, False
        priors = latent_nodes(model_trace)
        guides = [guide_trace.nodes[node["name"]] for node in priors]
        point = all(is_point(node["fn"]) for node in guides) and not _auxiliary(guide_trace)
        self.first = drawn_rows(guide_trace, priors, frame, None)[0]
        self.names: list[Any] = []
        means: list[Tensor] = []
        kls: list[Tensor] = []
        for node, prior in zip(guides, priors, strict=True):
            value = in_front(node["value"], node, frame)
            flat = value.reshape(len(value), -1)
            self.names += labels(node["name"], value.shape[1:], single=len(priors) == 1)
            mean, kl = None, None
            if point or not is_point(node["fn"]):
                mean = _mean(node["fn"])
                kl = _split_kl(node["fn"], prior["fn"])
            for found, values in ((mean, means), (kl, kls)):
                if found is None:
                    values.append(torch.full_like(flat, math.nan, dtype=torch.float64))
                else:
                    found = in_front(found.expand(node["value"].shape), node, frame)
                    values.append(found.reshape(flat.shape).double())
        self.mean, self.kl = torch.cat(means, -1), torch.cat(kls, -1)
        self.count = 0
        self.sum: Any = 0.0
        self.squares: Any = 0.0

    def add(self, rows: Tensor) -> None:
        """Counts in the draws of a run, of shape `(draws, batch, coordinates)`."""
        self.differ = self.differ or bool((rows != self.first).any())
        away = (rows - self.first).double()
        self.count += len(rows)
        self.sum, self.squares = self.sum + away.sum(0), self.squares + away.square().sum(0)

    def arrays(self) -> dict[str, np.ndarray]:
        """The mean, the variance of its error (where it is one of draws), and the KL.

        Each is of shape `(batch, coordinates)`.
        """
        drawn = self.sum / self.count
        spread = (self.squares / self.count - drawn.square()) / max(1, self.count - 1)
        known = ~self.mean.isnan()
        mean = torch.where(known, self.mean, self.first.double() + drawn)
        error = torch.where(known, 0.0, spread)
        found = {"mean": mean, "error": error, "kl": self.kl}
        return {name: value.cpu().numpy() for name, value in found.items()}


def _auxiliary(trace: Any) -> bool:
    nodes = [node for _, node in trace.iter_stochastic_nodes()]
    return any(node["infer"].get("is_auxiliary") for node in nodes)


def _mean(fn: Any) -> Tensor | None:
    try:
        return fn.mean
    except NotImplementedError:
        return None


def _split_kl(guide: Any, prior: Any) -> Tensor | None:
    """KL by coordinate, of the shape of a draw; None where it does not split."""
    pair = by_coordinate(guide, prior)
    return None if pair is None else closed_kl(*pair)


class Directions:
    """The principal directions of the data against the noise of a Gaussian likelihood.

    At noise variance s2 a direction of variance l > s2 is worth `(l/s2 - 1 - log(l/s2)) / 2` nats
    per datum to a linear decoder (see `closed_form.learned_decoder`); one of less is worth nothing.
    """

    def __init__(self) -> None:
        self.noise: list[float] = []
        self.count = 0
        self.sum: Any = 0.0
        self.products: Any = 0.0

    def add(self, model_trace: Any, frame: Any) -> None:
        """Counts in the data of a minibatch, from the one observed site if it is Gaussian."""
        seen = [
            node
            for node in model_trace.nodes.values()
            if node["type"] == "sample" and node["is_observed"] and counts(node)
        ]
        fn = seen[0]["fn"]
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if len(seen) > 1 or not isinstance(fn, Normal):
            return
        rows = in_front(seen[0]["value"], seen[0], frame)
        x = rows.reshape(len(rows), -1).double().cpu().numpy()
        if x.shape[1] <= _WIDEST:
            self.noise.append(float(fn.variance.double().mean()))
            self.count += len(x)
            self.sum, self.products = self.sum + x.sum(0), self.products + x.T @ x

    def found(self) -> dict[str, Any]:
        """The mean noise variance, and the number of directions that are worth a latent."""
        if self.count < 2:
            return {}
        mean = self.sum / self.count
        values = np.linalg.eigvalsh(self.products / self.count - np.outer(mean, mean))
        noise = float(np.mean(self.noise))
        ratio = np.maximum(values / noise, 1.0)
        worth = (ratio - 1 - np.log(ratio)) / 2
        return {"noise_variance": noise, "directions": int((worth > WORTH).sum())}
