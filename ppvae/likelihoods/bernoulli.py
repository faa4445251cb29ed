"""The likelihood of binary data."""

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from ppvae.likelihoods.base import Likelihood, seen, taken

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
    """A Bernoulli distribution whose events have a density that is soon worked out."""

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
        bits, events = self.base_dist, self.reinterpreted_batch_ndims
        logits = bits.logits
        able = logits.device.type == "cpu" and torch.finfo(logits.dtype).bits >= 32
        if torch.is_grad_enabled() or not able or not 0 < events <= value.dim() <= logits.dim():
            return super().log_prob(value)
        if bits._validate_args:
            bits._validate_sample(value)
        if value.dim() == logits.dim() or logits.numel() < _CACHED:
            return _log_prob(logits, value, events)
        return torch.stack([_log_prob(each, value, events) for each in logits])


def _log_prob(logits: Tensor, value: Tensor, events: int) -> Tensor:
    """The log density of bits x with logits l, summed over so many dims on the right.

    It is x l - log(1 + exp(l)) = x l - max(l, 0) + log(sigmoid(|l|)), and many of these logarithms
    are the one of a product.
    """
    logits, value = torch.broadcast_tensors(logits, value)
    products = logits.abs().sigmoid_().flatten(-events).split(_FACTORS, -1)
    logs = torch.stack([each.prod(-1).log() for each in products]).sum(0)
    lines = logits.relu().addcmul_(logits, value, value=-1)
    return logs - lines.flatten(-events).sum(-1)
