"""The likelihood of categories in an order."""

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor, nn

from ppvae._checks import check_count
from ppvae.likelihoods.base import Likelihood
from ppvae.likelihoods.categorical import Codes, shares_of


class Ordinal(Likelihood):
    r"""The likelihood of grades 0, 1, ..., categories - 1; the decoder's output moves them up.

    .. math:: p(x \le k) = \sigma(c_k - y)

    with learned thresholds c, those of all columns or, made by `of`, of each.

    Args:
        categories: how many grades there are, at least 2.

    Raises:
        ValueError: `categories` is no whole number of at least 2.

    McCullagh, Regression models for ordinal data, 1980.
    """

    def __init__(self, categories: int) -> None:
        super().__init__()
        self.categories = check_count("categories", categories, 2)
        shares = np.arange(1, self.categories) / self.categories
        self._set(special.logit(shares))

    def _set(self, thresholds: NDArray[np.float64]) -> None:
        """Makes parameters of thresholds of shape `(*columns, categories - 1)`."""
        steps = np.log(np.diff(thresholds))
        raw = np.concatenate([thresholds[..., :1], steps], -1)
        self.steps = nn.Parameter(torch.tensor(raw, dtype=torch.get_default_dtype()))

    @property
    def thresholds(self) -> Tensor:
        """Where each grade but the last ends, of shape `(*columns, categories - 1)`."""
        first, steps = self.steps[..., :1], self.steps[..., 1:].exp()
        return torch.cat([first, first + steps.cumsum(-1)], -1)

    def settings(self) -> list[str]:
        """The number of grades."""
        return [f"categories={self.categories}"]

    def extra_repr(self) -> str:
        """The number of grades."""
        return str(self.categories)

    def begin(self, data: NDArray[np.float64]) -> None:
        """Starts at the shares of each column, as if there were half a datum more in each."""
        below = shares_of(data, self.categories).cumsum(-1)[..., :-1]
        self._set(special.logit(below))

    def forward(self, output: Tensor) -> dist.Distribution:
        """One distribution over the grades per column."""
        # s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)), of which no digit is lost
        ends = self.thresholds - self.numbers(output)[0].unsqueeze(-1)
        below, above = nn.functional.logsigmoid(ends), nn.functional.logsigmoid(-ends)
        steps = self.steps[..., 1:].exp()
        between = below[..., 1:] + above[..., :-1] + torch.log(-torch.expm1(-steps))
        return Codes(logits=torch.cat([below[..., :1], between, above[..., -1:]], -1))
