"""Rows that count more than once, or less."""

from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from ppvae._checks import expect


class Counted(TorchDistribution):
    """The distribution of rows that count so often: its log density is so many times as large.

    A row that counts zero times adds nothing, whatever its density is. What is drawn is one datum
    for each row.

    Args:
        base: the distribution of each row once, of batch shape `(*, rows)`.
        counts: numbers of at least 0, shape `(rows,)`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, counts: Tensor) -> None:
        self.base, self.counts = base, counts
        super().__init__(base.batch_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the base."""
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Counted":
        """The same for more draws."""
        return Counted(self.base.expand(batch_shape), self.counts)

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, times the counts."""
        once = self.base.log_prob(value)
        return self.counts * torch.where(self.counts > 0, once, torch.zeros_like(once))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """One datum for each row."""
        sample: Tensor = self.base.sample(sample_shape)
        return sample


def observed(fn: Any, y: Tensor | None, counts: Tensor | None) -> Any:
    """The distribution of y, whose rows count where there are counts and y is observed."""
    return fn if y is None or counts is None else Counted(fn, counts.to(y.dtype))


def check_counts(counts: Tensor | None) -> None:
    """Raises a ValueError unless counts of rows are at least zero and finite, and one is more."""
    if counts is not None:
        good = torch.isfinite(counts) & (counts >= 0)
        first = "" if good.all() else counts[~good][0].item()
        expect(good.all(), "counts", "finite numbers of at least 0", first)
        expect((counts > 0).any(), "counts", "a row that counts", "zeros")


def kept(values: Tensor, counts: Tensor | None) -> Tensor:
    """The rows that count."""
    return values if counts is None else values[counts > 0]
