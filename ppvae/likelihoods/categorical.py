"""The likelihood of categories without an order."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppvae._checks import check_count
from ppvae.likelihoods.base import Likelihood, taken


class Codes(dist.Categorical):
    """A categorical distribution whose draws are codes in the dtype of its logits, as data are.

    What is no code has a log probability of minus infinity, and is no index out of bounds.
    """

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws of the codes."""
        return super().sample(*args, **kwargs).to(self.logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the probability."""
        if self._validate_args:
            self._validate_sample(value)
        number = self.logits.shape[-1]
        codes = value.long().clamp(0, number - 1)
        codes, logits = torch.broadcast_tensors(codes.unsqueeze(-1), self.logits)
        log_p = logits.gather(-1, codes[..., :1]).squeeze(-1)
        return torch.where(value == codes[..., 0], log_p, -torch.inf)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Codes":
        """The same for more data."""
        return super().expand(batch_shape, self._get_checked_instance(Codes, _instance))


class Categorical(Likelihood):
    """The likelihood of codes 0, 1, ..., categories - 1; the decoder's outputs are their logits.

    Args:
        categories: how many there are, at least 2.

    Raises:
        ValueError: `categories` is no whole number of at least 2.
    """

    def __init__(self, categories: int) -> None:
        super().__init__()
        self.categories = self.outputs = check_count("categories", categories, 2)

    def settings(self) -> list[str]:
        """The number of categories."""
        return [f"categories={self.categories}"]

    def extra_repr(self) -> str:
        """The number of categories."""
        return str(self.categories)

    def begin(self, data: NDArray[np.float64]) -> None:
        """Starts at the shares of each column, as if there were half a datum more in each."""
        shares = np.moveaxis(shares_of(data, self.categories), -1, 0)
        self.register_buffer("shares", torch.tensor(np.log(shares)).to(torch.get_default_dtype()))

    def forward(self, output: Tensor) -> dist.Distribution:
        """One categorical distribution per column."""
        logits = torch.stack(self.numbers(output), -1)
        shares = getattr(self, "shares", None)
        return Codes(logits=logits if shares is None else logits + shares.movedim(0, -1))


def shares_of(data: NDArray[np.float64], categories: int) -> NDArray[np.float64]:
    """The share of each code in each column, as if there were half a datum more in each.

    Raises:
        ValueError: there is something else among the data.
    """
    codes = np.arange(categories)
    taken(data, np.isin(data, codes), f"whole numbers from 0 to {categories - 1}")
    counts = np.stack([(data == code).sum(0) + 0.5 for code in codes], -1)
    return np.asarray(counts / counts.sum(-1, keepdims=True))
