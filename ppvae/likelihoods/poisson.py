"""The likelihood of counts whose variance is their mean."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor

from ppvae.likelihoods.base import Likelihood, taken


class LogPoisson(dist.TorchDistribution):
    """A Poisson distribution by its log rate.

    The density is worked out in double precision: that of large counts is a small difference of
    large numbers.
    """

    arg_constraints = {"log_rate": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, log_rate: Tensor, *, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogPoisson":
        """The same for more data."""
        return LogPoisson(self.log_rate.expand(torch.Size(batch_shape)), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The rate."""
        return self.log_rate.exp()

    @property
    def variance(self) -> Tensor:
        """The rate."""
        return self.log_rate.exp()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the counts."""
        with torch.no_grad():
            return torch.poisson(self.mean.expand(self._extended_shape(torch.Size(sample_shape))))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability."""
        if self._validate_args:
            self._validate_sample(value)
        count, log_rate = value.double(), self.log_rate.double()
        return (count * log_rate - log_rate.exp() - torch.lgamma(count + 1)).to(self.log_rate.dtype)


class Poisson(Likelihood):
    """The likelihood of counts; the decoder's output is the log rates."""

    takes_exposure = True

    def begin(self, data: NDArray[np.float64], exposure: Any = 1.0) -> None:
        """Starts at the mean of each column, as if half of a count had been seen more."""
        self.set_start(np.log(mean_of(data, exposure)))

    def forward(self, output: Tensor, exposure: Tensor | None = None) -> dist.Distribution:
        """One Poisson distribution per element."""
        return LogPoisson(self.exposed(self.numbers(output)[0], exposure))


def mean_of(data: NDArray[np.float64], exposure: Any) -> NDArray[np.float64]:
    """The mean of each column of counts per exposure, as if half of a count had been seen more."""
    counts(data)
    exposed = np.where(np.isnan(data), 0.0, exposure).sum(0)
    return np.asarray((np.nansum(data, 0) + 0.5) / exposed)


def counts(data: NDArray[np.float64]) -> None:
    """Raises a ValueError unless all are counts."""
    taken(data, (data >= 0) & (data == np.floor(data)), "whole numbers of at least 0")
