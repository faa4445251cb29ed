"""How many principal directions of the data are worth a latent at the noise of the decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.distributions import Normal

from ppvae.programs.layout import Place
from ppvae.programs.nodes import observed_nodes

WORTH = 0.05  # nats per datum: a direction that gains less is not worth a latent
_WIDEST = 2000  # values per datum of which the covariance is looked at


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

    def add(self, model_trace: Any, plate: Any) -> None:
        """Counts in the data of a minibatch, from the one observed site if it is Gaussian."""
        seen = observed_nodes(model_trace)
        fn = seen[0]["fn"]
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if len(seen) > 1 or not isinstance(fn, Normal):
            return
        x = Place.of(seen[0], plate).flat(seen[0]["value"])[0].double().cpu().numpy()
        if x.shape[1] <= _WIDEST:
            self.noise.append(float(fn.variance.double().mean()))
            self.count += len(x)
            self.sum, self.products = self.sum + x.sum(0), self.products + x.T @ x

    def attrs(self) -> dict[str, Any]:
        """The mean noise variance, and the number of directions that are worth a latent."""
        if self.count < 2:
            return {}
        mean = self.sum / self.count
        values = np.linalg.eigvalsh(self.products / self.count - np.outer(mean, mean))
        noise = float(np.mean(self.noise))
        ratio = np.maximum(values / noise, 1.0)
        worth = (ratio - 1 - np.log(ratio)) / 2
        return {"noise_variance": noise, "directions": int((worth > WORTH).sum())}
