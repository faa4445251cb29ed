"""The likelihood of counts of which some are zero for a reason of their own."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae.likelihoods.base import Likelihood


class Inflated(dist.TorchDistribution):
    """Zero with some probability, by its logit, and else of another distribution of counts."""

    arg_constraints = {"logit": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, base: Any, logit: Tensor, *, validate_args: bool | None = None) -> None:
        self.base, self.logit = base, logit
        super().__init__(logit.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Inflated":
        """The same for more data."""
        shape = torch.Size(batch_shape)
        return Inflated(self.base.expand(shape), self.logit.expand(shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The mean, the zeros among it."""
        return torch.sigmoid(-self.logit) * self.base.mean

    @property
    def variance(self) -> Tensor:
        """The variance, by that of a mixture."""
        share, mean = torch.sigmoid(-self.logit), self.base.mean
        return share * (self.base.variance + (1 - share) * mean**2)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the counts."""
        drawn = self.base.sample(torch.Size(sample_shape))
        with torch.no_grad():
            return drawn * torch.bernoulli(torch.sigmoid(-self.logit).expand(drawn.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability."""
        if self._validate_args:
            self._validate_sample(value)
        log_sigmoid = nn.functional.logsigmoid
        counted = log_sigmoid(-self.logit) + self.base.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(log_sigmoid(self.logit), counted), counted)


class ZeroInflated(Likelihood):
    """A likelihood of counts with zeros of their own.

    The decoder puts out the numbers of the other likelihood, and then for each column the logit of
    a zero of its own; `ZeroInflated(NegativeBinomial())` is what is called ZINB.

    Args:
        counts: `Poisson()` or `NegativeBinomial()`, or another likelihood of counts.

    Raises:
        TypeError: `counts` is no likelihood.
    """

    def __init__(self, counts: Likelihood) -> None:
        super().__init__()
        known = isinstance(counts, Likelihood)
        expect(known, "counts", "a likelihood of counts", type(counts).__name__, TypeError)
        self.counts, self.outputs = counts, counts.outputs + 1

    def settings(self) -> list[str]:
        """Those of the other likelihood."""
        return [type(self.counts).__qualname__, *self.counts.settings()]

    def begin(self, data: NDArray[np.float64], exposure: Any = 1.0) -> None:
        """Starts as the other likelihood does, with few zeros of their own."""
        begin: Any = self.counts.begin
        begin(data, exposure) if self.takes_exposure else begin(data)
        self.register_buffer("rare", torch.tensor(-2.0, dtype=torch.get_default_dtype()))

    @property
    def takes_exposure(self) -> bool:  # type: ignore[override]
        """Whether the other likelihood does."""
        return self.counts.takes_exposure

    def forward(self, output: Tensor, exposure: Tensor | None = None) -> dist.Distribution:
        """One distribution per column."""
        *_, logit = self.numbers(output)
        told = () if exposure is None else (exposure,)
        base = self.counts(output[..., : -logit.shape[-1]], *told)
        rare = getattr(self, "rare", None)
        return Inflated(base, logit if rare is None else logit + rare)
