"""The likelihood of real data with some large errors."""

import pyro.distributions as dist
from torch import Tensor

from ppvae.likelihoods.scale import Scaled


class Laplace(Scaled):
    """The likelihood of real data with some large errors; arguments as those of `Normal`.

    The decoder's output is the medians; `scale` is the mean absolute error.
    """

    def forward(self, output: Tensor) -> dist.Distribution:
        """One Laplace distribution per element."""
        return dist.Laplace(*self.location_and_scale(output))
