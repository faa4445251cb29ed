"""Latents of half precision, whose densities are worked out in single precision.

PyTorch has no Cholesky factors, triangular systems and gamma draws of half precision, and
log-gammas of it are rounding. So such distributions hold their arguments in single precision, and
only their draws are given back in half, as the latent is.
"""

from typing import Any, Self

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)

_SHAPE = torch.Size()


def widened(value: Any) -> Any:
    """A tensor of half precision in single precision; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


class InHalf:
    """A mixin for distributions over the reals that have their arguments in single precision.

    A draw is rounded to `narrow`, where that is set; at the last draw, the very tensor, the density
    is that of the draw before it was rounded, which a distribution may know by its noise.
    """

    narrow: torch.dtype | None = None
    _rounded: tuple[Tensor, Tensor] | None = None

    def rsample(self, sample_shape: Any = _SHAPE) -> Tensor:
        """A draw, of the dtype of the latent."""
        return self._round(super().rsample(sample_shape))  # type: ignore[misc]

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density, in single precision."""
        if self._rounded is not None and value is self._rounded[0]:
            value = self._rounded[1]
        density: Tensor = super().log_prob(widened(value))  # type: ignore[misc]
        return density

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same distribution with more batch dims, and no draw yet."""
        new: Self = super().expand(batch_shape, _instance)  # type: ignore[misc]
        new.narrow, new._rounded = self.narrow, None
        return new

    def _round(self, draw: Tensor) -> Tensor:
        if self.narrow is None:
            return draw
        value = draw.to(self.narrow)
        self._rounded = value, draw
        return value


def dtype_in_half(value: Any) -> torch.dtype | None:
    """The dtype of a tensor, if that is of half precision, which draws are to be rounded to."""
    return value.dtype if value.dtype in HALF else None
