"""The likelihood of counts that vary more than those of a Poisson distribution."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae._checks import check_flag
from ppvae.likelihoods.base import Likelihood, positive
from ppvae.likelihoods.poisson import mean_of

#: dispersions beyond which there is no difference to see, as to a Poisson distribution
_LEAST, _MOST = 1e-8, 1e8


class Overdispersed(dist.TorchDistribution):
    """A negative binomial distribution of some log mean; its variance is mean + dispersion mean^2.

    The density is worked out in double precision: that of large counts is a small difference of
    large numbers.
    """

    arg_constraints = {"log_mean": constraints.real, "log_dispersion": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(
        self, log_mean: Tensor, log_dispersion: Tensor, *, validate_args: bool | None = None
    ) -> None:
        self.log_mean, self.log_dispersion = torch.broadcast_tensors(log_mean, log_dispersion)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Overdispersed":
        """The same for more data."""
        both = (self.log_mean, self.log_dispersion)
        return Overdispersed(
            *(x.expand(torch.Size(batch_shape)) for x in both), validate_args=False
        )

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """The variance."""
        return self.mean + self.log_dispersion.exp() * self.mean**2

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the counts: of Poisson distributions whose rates are of a gamma distribution."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            form = (-self.log_dispersion).exp().expand(shape)
            rate = torch._standard_gamma(form) * (self.log_dispersion + self.log_mean).exp()
            return torch.poisson(rate)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability."""
        if self._validate_args:
            self._validate_sample(value)
        count, log_mean, log_dispersion = (
            part.double() for part in (value, self.log_mean, self.log_dispersion)
        )
        form, logit = (-log_dispersion).exp(), log_mean + log_dispersion
        ways = torch.lgamma(count + form) - torch.lgamma(form) - torch.lgamma(count + 1)
        log_sigmoid = nn.functional.logsigmoid
        log_p = ways + count * log_sigmoid(logit) + form * log_sigmoid(-logit)
        return log_p.to(self.log_mean.dtype)


class NegativeBinomial(Likelihood):
    """The likelihood of counts, by mean and dispersion: variance = mean + dispersion mean^2.

    The decoder's output is the log means. The dispersion is learned: one for all columns or, made
    by `of` or with a tensor, one for each.

    Args:
        dispersion: a positive number, or a tensor that broadcasts to one event.
        learned: whether training moves it.

    Raises:
        TypeError: `dispersion` is no number, or `learned` no bool.
        ValueError: `dispersion` is not positive and finite.
    """

    takes_exposure = True

    def __init__(self, dispersion: float | Tensor = 1.0, *, learned: bool = True) -> None:
        super().__init__()
        self.learned = check_flag("learned", learned)
        self.raw = nn.Parameter(
            positive("dispersion", dispersion).log(), requires_grad=self.learned
        )

    def settings(self) -> list[str]:
        """The dispersion, where it is fixed."""
        return [] if self.learned else [f"dispersion={self.dispersion.tolist()}"]

    @property
    def dispersion(self) -> Tensor:
        """The dispersion, of the shape it was given in."""
        return self._log().exp()

    def _log(self) -> Tensor:
        return self.raw.clamp(np.log(_LEAST), np.log(_MOST))

    def begin(self, data: NDArray[np.float64], exposure: Any = 1.0) -> None:
        """Starts at the mean of each column, and at the dispersion that gives its variance."""
        mean = mean_of(data, exposure)
        self.set_start(np.log(mean))
        exposed = np.where(np.isnan(data), np.nan, exposure)
        own = np.nansum(data, 0) / np.nansum(exposed, 0)
        variance, means = np.nanmean((data - own * exposed) ** 2, 0), mean * exposed
        dispersion = (variance - np.nanmean(means, 0)) / np.nanmean(means**2, 0)
        dispersion = dispersion.clip(0.01, 100.0)
        with torch.no_grad():
            self.raw.data = torch.tensor(np.log(dispersion)).to(self.raw)

    def forward(self, output: Tensor, exposure: Tensor | None = None) -> dist.Distribution:
        """One negative binomial distribution per element."""
        return Overdispersed(self.exposed(self.numbers(output)[0], exposure), self._log())
