"""The likelihood of binary data."""

import numpy as np
import pyro.distributions as dist
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from ppvae.likelihoods.base import Likelihood, seen, taken


class Bernoulli(Likelihood):
    """The likelihood of binary data; the decoder's output is the logits."""

    def begin(self, data: NDArray[np.float64]) -> None:
        """Starts at the share of ones of each column, as if there were half a one more."""
        taken(data, (data == 0) | (data == 1), "zeros and ones")
        self.set_start(special.logit((np.nansum(data, 0) + 0.5) / (seen(data) + 1)))

    def forward(self, output: Tensor) -> dist.Distribution:
        """One Bernoulli distribution per element."""
        return dist.Bernoulli(logits=self.numbers(output)[0])
