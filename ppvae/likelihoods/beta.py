"""The likelihood of shares."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from scipy import special
from torch import Tensor, nn

from ppvae._checks import check_flag
from ppvae.likelihoods.base import Likelihood, positive, taken


class _Inside(constraints.interval):
    """Numbers between 0 and 1, both left out: there the density may be infinite."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)

    def check(self, value: Tensor) -> Tensor:
        """Which are."""
        return (value > 0) & (value < 1)


class Shares(dist.Beta):
    """A beta distribution of which 0 and 1 are no values."""

    support = _Inside()

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Shares":
        """The same for more data."""
        return super().expand(batch_shape, self._get_checked_instance(Shares, _instance))


class Beta(Likelihood):
    """The likelihood of shares, numbers between 0 and 1.

    The decoder's output is the logits of the mean.

    The variance is mean (1 - mean) / (1 + concentration).

    Args:
        concentration: a positive number, or a tensor that broadcasts to one event.
        learned: whether training moves it.

    Raises:
        TypeError: `concentration` is no number, or `learned` no bool.
        ValueError: `concentration` is not positive and finite.
    """

    def __init__(self, concentration: float | Tensor = 2.0, *, learned: bool = True) -> None:
        super().__init__()
        self.learned = check_flag("learned", learned)
        self.raw = nn.Parameter(
            positive("concentration", concentration).log(), requires_grad=self.learned
        )

    def settings(self) -> list[str]:
        """The concentration, where it is fixed."""
        return [] if self.learned else [f"concentration={self.concentration.tolist()}"]

    @property
    def concentration(self) -> Tensor:
        """The sum of both parameters of the distribution, of the shape it was given in."""
        return self.raw.exp()

    def begin(self, data: NDArray[np.float64]) -> None:
        """Starts at the mean and variance of each column."""
        taken(data, (data > 0) & (data < 1), "numbers between 0 and 1")
        mean, variance = np.nanmean(data, 0), np.nanvar(data, 0)
        self.set_start(special.logit(mean))
        most = mean * (1 - mean)
        concentration = (most / np.maximum(variance, 1e-6 * most) - 1).clip(0.01, 1e6)
        self.raw.data = torch.tensor(np.log(concentration)).to(self.raw)

    def forward(self, output: Tensor) -> dist.Distribution:
        """One beta distribution per element."""
        logit, total = self.numbers(output)[0], self.concentration
        return Shares(torch.sigmoid(logit) * total, torch.sigmoid(-logit) * total)
