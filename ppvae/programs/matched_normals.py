"""Standard normal numbers of which the first two moments over the draws are exact.

The average of any quadratic function over such draws is its expectation, without an error; that of
a smooth function loses the greatest part of its variance, at the price of a bias of order 1/draws.
"""

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode


def matched(draws: int, size: int, seed: int) -> Tensor:
    """Standard normal numbers `(draws, size)`, of which mean and, if it can be, covariance match.

    They come in pairs of opposite sign, so that all odd moments are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(draws // 2, size, generator=generator, dtype=torch.float64, device="cpu")
    if draws // 2 > size:
        triangle = torch.linalg.cholesky(half.T @ half / len(half))
        half = torch.linalg.solve_triangular(triangle, half.T, upper=False).T
    return torch.cat([half, -half]).to(torch.get_default_device())


class MatchedNormals(TorchFunctionMode):
    """Makes the standard normal numbers of a run uncorrelated over its draws, exactly.

    By itself it matches every set of numbers whose first dimension is that of the draws. Inside
    `places(plate)` it matches the numbers of each datum by themselves, and the draws may come in
    several runs, with a plate of draws or single ones without, each of which is announced by
    `start_run` and takes its share of one set.

    Args:
        draws: how many draws are one set.
        common: give all data the same numbers, which is cheaper.

    Example:
        >>> with MatchedNormals(8):
        ...     z = torch.empty(8, 2).normal_()
        >>> torch.allclose(z.T @ z / 8, torch.eye(2), atol=1e-5)
        True
    """

    def __init__(self, draws: int, *, common: bool = False) -> None:
        super().__init__()
        self.draws, self.common = draws, common
        self.per_datum = False
        self.axis: int | None = None  # the dim of the data in what is drawn now, from the left
        self.sets: list[Tensor | None] = []  # of each statement: (draws, *shape); None: unmatched
        self.basis: Tensor | None = None  # what further numbers must be orthogonal to
        self.start_run(0, draws, single=False)

    def start_run(self, first: int, count: int, *, single: bool) -> None:
        """Announces a run that takes draws from `first`; a single one has no dim of draws."""
        self.share, self.single, self.call = slice(first, first + count), single, 0

    def places(self, plate: Any) -> Messenger:
        """A handler that says where the data, in a plate, are in what a sample statement draws."""
        self.per_datum = True
        return _Places(self, plate)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the function; `normal_` without arguments, as distributions draw, is matched."""
        result = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.normal_ or len(args) > 1 or kwargs:
            return result
        ours = self.axis is not None if self.per_datum else result.shape[:1] == (self.draws,)
        if not ours:
            return result
        if self.call == len(self.sets):
            self.sets.append(self._set_for(result))
        matched = self.sets[self.call]
        self.call += 1
        if matched is None:
            return result
        share = matched[self.share].to(result)
        return (share[0] if self.single else share).expand(result.shape)

    def _set_for(self, result: Tensor) -> Tensor | None:
        """One statement's set, or None if it has too many coordinates for so few draws."""
        if self.axis is None:
            normal = rows = result
        else:
            axis = self.axis - (not self.single)
            shape = [*(result.shape if self.single else result.shape[1:])]
            shape[axis] = 1 if self.common else shape[axis]
            # doubles, since as many draws as coordinates make for a bad condition
            normal = torch.randn(self.draws, *shape, dtype=torch.float64, device=result.device)
            rows = normal.movedim(axis + 1, 0)
        flat = rows.reshape(*rows.shape[: self.per_datum], self.draws, -1)
        if self.basis is None:  # orthogonal to ones: of mean zero
            self.basis = torch.ones_like(flat[..., :1]) / self.draws**0.5
        basis = self.basis.to(flat)
        if flat.shape[-1] + basis.shape[-1] > self.draws:
            return None
        orthogonal, triangle = torch.linalg.qr(flat - basis @ (basis.mT @ flat))
        # with the signs that the numbers had: an orthogonal factor alone has any
        orthogonal = orthogonal * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        self.basis = torch.cat([basis, orthogonal], -1)
        value = (orthogonal * self.draws**0.5).reshape(rows.shape)
        return value if self.axis is None else value.movedim(0, axis + 1)


class _Places(Messenger):
    """Tells the numbers which dim of a draw the data plate is, for as long as it is drawn."""

    def __init__(self, numbers: MatchedNormals, plate: Any) -> None:
        super().__init__()
        self.numbers, self.plate = numbers, plate

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if any(plate.name == self.plate.name for plate in msg["cond_indep_stack"]):
            self.numbers.axis = len(msg["fn"].batch_shape) + self.plate.dim

    def _pyro_post_sample(self, msg: Any) -> None:
        self.numbers.axis = None
