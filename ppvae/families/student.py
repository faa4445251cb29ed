"""Student's t distribution of latents of half precision, too."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.families.half import HALF, widened

_SHAPE = torch.Size()


class StudentT(dist.StudentT):  # type: ignore[misc]
    """`pyro.distributions.StudentT`, which draws and scores half precision in single precision."""

    def rsample(self, sample_shape: Any = _SHAPE) -> Tensor:
        """A draw, of the dtype of the location."""
        if self.loc.dtype not in HALF:
            return super().rsample(sample_shape)
        draw: Tensor = self._widened().rsample(sample_shape)
        return draw.to(self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density; in single precision for half precision."""
        if self.loc.dtype not in HALF:
            return super().log_prob(value)
        density: Tensor = self._widened().log_prob(widened(value))
        return density

    def entropy(self) -> Tensor:
        """In nats; in single precision for half precision."""
        if self.loc.dtype not in HALF:
            return super().entropy()
        entropy: Tensor = self._widened().entropy()
        return entropy

    def _widened(self) -> Any:
        return dist.StudentT(*map(widened, (self.df, self.loc, self.scale)))
