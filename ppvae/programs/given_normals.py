"""Random numbers of a program as smooth functions of standard normal ones that are given to it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MOVE = 1e-5  # of a shape, relative to it, for the slope of a quantile
_DRAWS = frozenset(
    {Tensor.normal_, Tensor.exponential_, Tensor.uniform_, torch.rand, torch._standard_gamma}
)


class GivenNormals(TorchFunctionMode):
    """Gives the random numbers that are drawn inside, one after the other, from normal ones.

    Normal, uniform, exponential and gamma numbers, as distributions draw them, are smooth functions
    of standard normal ones. All others are drawn as ever.

    Attributes:
        count: how many were drawn.
        given: a vector of standard normal numbers; without one, zeros are taken.

    Example:
        >>> with GivenNormals(torch.tensor([0.0, 1.0])):
        ...     torch.distributions.Normal(torch.tensor([5.0, 5.0]), 2.0).rsample()
        tensor([5., 7.])
    """

    def __init__(self, given: Tensor | None = None) -> None:
        super().__init__()
        self.count, self.given = 0, given

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the function, or takes its numbers from those that are given."""
        kwargs = kwargs or {}
        if func not in _DRAWS:  # first of all: this is asked of every operation
            return func(*args, **kwargs)
        told = {name for name, value in kwargs.items() if value is not None}  # no generator, say
        if func is torch.Tensor.normal_ and len(args) == 1 and not told:
            return self._next(args[0])
        if func is torch.Tensor.exponential_ and len(args) == 1 and not told:
            return -torch.special.ndtr(self._next(args[0])).log()
        if func is torch.Tensor.uniform_ and not told:
            low, high = args[1:] or (0.0, 1.0)
            return low + (high - low) * torch.special.ndtr(self._next(args[0]))
        if func is torch.rand and told <= {"dtype", "device"}:
            with torch._C.DisableTorchFunction():
                like = torch.empty(*args, **kwargs)
            return torch.special.ndtr(self._next(like))
        if func is torch._standard_gamma and len(args) == 1 and not told:
            return _Gamma.apply(args[0], self._next(args[0]))[0]
        return func(*args, **kwargs)

    def _next(self, like: Tensor) -> Tensor:
        """So many numbers as a tensor has, in its shape and dtype."""
        first, self.count = self.count, self.count + like.numel()
        if self.given is None:
            return torch.zeros_like(like)
        return self.given[first : self.count].reshape(like.shape).to(like.dtype)


class _Gamma(torch.autograd.Function):
    """Gamma numbers of rate one, of some shapes, at the quantiles of normal numbers.

    Differentiable once, in the shapes, the slopes by central differences.
    """

    @staticmethod
    def forward(shape: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers, and their slopes in the shapes."""
        both = _gamma_quantiles(shape.numpy(force=True), normals.numpy(force=True))
        values, slopes = (torch.as_tensor(value).to(shape) for value in both)
        return values, slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the slopes."""
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Any) -> tuple[Tensor, None]:
        """The slope in the shapes; the normal numbers are given."""
        (slopes,) = ctx.saved_tensors
        return slope * slopes, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, shape: Tensor, normals: Tensor) -> Any:
        """Elementwise, with what is mapped in front."""
        pairs = zip((shape, normals), in_dims, strict=True)
        parts = [x.unsqueeze(0) if at is None else x.movedim(at, 0) for x, at in pairs]
        return _Gamma.apply(*torch.broadcast_tensors(*parts)), (0, 0)


def _gamma_quantiles(shape: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a gamma distribution has as much below as a normal one, and the slopes in its shape.

    A tail is worked out from its own end, so that no digit is lost. With `F(x, shape)` for what is
    below, the slope is minus the change of F with the shape over the density.
    """
    from scipy import special  # takes a quarter of a second to import

    low, tail, move = normals < 0, special.ndtr(-np.abs(normals)), _MOVE * shape
    x = np.where(low, special.gammaincinv(shape, tail), special.gammainccinv(shape, tail))
    less, more = shape - move, shape + move
    fall = np.where(
        low,
        special.gammainc(less, x) - special.gammainc(more, x),
        special.gammaincc(more, x) - special.gammaincc(less, x),
    )
    log_density = special.xlogy(shape - 1, x) - x - special.gammaln(shape)
    return x, fall / (2 * move) / np.exp(log_density)
