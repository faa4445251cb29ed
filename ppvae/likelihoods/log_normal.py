"""The likelihood of positive data."""

import numpy as np
import pyro.distributions as dist
from numpy.typing import NDArray
from torch import Tensor

from ppvae.likelihoods.base import taken
from ppvae.likelihoods.scale import Scaled


class LogNormal(Scaled):
    """The likelihood of positive data, whose logarithms are Normal; arguments as those of `Normal`.

    The decoder's output is the means of the logarithms; `scale` is their standard deviation.
    """

    def begin(self, data: NDArray[np.float64]) -> None:
        """Starts at the mean and standard deviation of the logarithms of each column."""
        taken(data, data > 0, "positive numbers")
        super().begin(np.log(data))

    def forward(self, output: Tensor) -> dist.Distribution:
        """One log-normal distribution per element."""
        return dist.LogNormal(*self.location_and_scale(output))
