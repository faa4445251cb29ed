"""The likelihood of binary data."""

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor
from torch.nn.functional import softplus

from ppvae.likelihoods.base import Likelihood, seen, taken

_LINEAR = 80.0  # log(1 + exp(s)) is s there in every precision, and exp(s) is a number
_FACTORS = 100  # numbers from 1/2 to 1, whose product is a number in single precision
_CACHED = 2**18  # numbers that stay in the cache of a core from one operation to the next


class Bernoulli(Likelihood):
    """The likelihood of binary data; the decoder's output is the logits."""

    def begin(self, data: NDArray[np.float64]) -> None:
        """Starts at the share of ones of each column, as if there were half a one more."""
        taken(data, (data == 0) | (data == 1), "zeros and ones")
        self.set_start(special.logit((np.nansum(data, 0) + 0.5) / (seen(data) + 1)))

    def forward(self, output: Tensor) -> dist.Distribution:
        """One Bernoulli distribution per element."""
        return _Bits(logits=self.numbers(output)[0])


class _Bits(dist.Bernoulli):  # type: ignore[misc]
    """A Bernoulli distribution whose density goes over memory fewer times than Pyro's."""

    def log_prob(self, value: Tensor) -> Tensor:
        """-log(1 + exp(s)) of the logits s, with their sign turned where there is a one."""
        return -softplus(self.logits * (1 - 2 * value), threshold=_LINEAR)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> dist.Distribution:
        """Independent elements as one event."""
        count = reinterpreted_batch_ndims
        return _Independent(self, len(self.batch_shape) if count is None else count)


class _Independent(dist.Independent):
    """Bits as one event, whose density is not worked out bit by bit where no gradient is wanted.

    That is for processors, whose memory is slow, and not for half precision, which holds no product
    of many factors.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of the event, draw by draw where they are many numbers."""
        logits, events = self.base_dist.logits, self.reinterpreted_batch_ndims
        able = logits.device.type == "cpu" and torch.finfo(logits.dtype).bits >= 32
        if torch.is_grad_enabled() or not able or not 0 < events <= value.dim() <= logits.dim():
            return super().log_prob(value)
        if value.dim() == logits.dim() or logits.numel() < _CACHED:
            return _log_prob(logits, value, events)
        return torch.stack([_log_prob(each, value, events) for each in logits])


def _log_prob(logits: Tensor, value: Tensor, events: int) -> Tensor:
    """The log density of bits, summed over so many dims on the right.

    With s as above, log(1 + exp(s)) = max(s, 0) - log(sigmoid(|s|)); and many of these logarithms
    are the one of a product.
    """
    turned = logits * (1 - 2 * value)
    products = turned.abs().sigmoid_().flatten(-events).split(_FACTORS, -1)
    logs = torch.stack([each.prod(-1).log() for each in products]).sum(0)
    return logs - turned.relu_().flatten(-events).sum(-1)
