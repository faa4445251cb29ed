"""The likelihood of real data with outliers."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae._checks import check_number
from ppvae.likelihoods.scale import Scaled


class StudentT(Scaled):
    """The likelihood of real data with outliers; other arguments as those of `Normal`.

    The decoder's output is the medians. With `per_datum` it puts out, after these, the logarithms
    of the scale and numbers y that give the degrees of freedom 2 + log(1 + exp(y)).

    Args:
        df: degrees of freedom, a positive number; nothing with `per_datum`.
        **scale: `scale`, `learned` and `per_datum`.

    Raises:
        TypeError, ValueError: `df` is no positive number; and as `Normal`.
    """

    def __init__(self, df: float = 4.0, **scale: Any) -> None:
        super().__init__(**scale)
        self.df = check_number("df", df, positive=True)
        self.outputs = 3 if self.per_datum else 1

    def extra_repr(self) -> str:
        """The degrees of freedom and the scale, where they are fixed."""
        words = super().extra_repr()
        return words if self.per_datum else f"{self.df:g}, {words}"

    def settings(self) -> list[str]:
        """The degrees of freedom, where they are fixed."""
        return super().settings() or [f"df={self.df}"]

    def forward(self, output: Tensor) -> dist.Distribution:
        """One Student-t distribution per element."""
        location, scale = self.location_and_scale(output)
        if not self.per_datum:
            return dist.StudentT(torch.full_like(location, self.df), location, scale)
        last = output[..., 2 * location.shape[-1] :]
        return dist.StudentT(2 + nn.functional.softplus(last), location, scale)
