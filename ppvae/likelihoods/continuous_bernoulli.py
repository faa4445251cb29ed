"""The likelihood of grey images."""

import numpy as np
import pyro.distributions as dist
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from ppvae.likelihoods.base import Likelihood, seen, taken


class ContinuousBernoulli(Likelihood):
    """The likelihood of numbers in [0, 1], as grey values; the decoder's output is the logits.

    Loaiza-Ganem and Cunningham, The continuous Bernoulli: fixing a pervasive error in variational
    autoencoders, 2019.
    """

    def begin(self, data: NDArray[np.float64]) -> None:
        """Starts near the mean of each column."""
        taken(data, (data >= 0) & (data <= 1), "numbers in [0, 1]")
        self.set_start(special.logit((np.nansum(data, 0) + 0.5) / (seen(data) + 1)))

    def forward(self, output: Tensor) -> dist.Distribution:
        """One continuous Bernoulli distribution per element."""
        return dist.ContinuousBernoulli(logits=self.numbers(output)[0])
