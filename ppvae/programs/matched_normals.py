"""Standard normal numbers of which the first two moments over the draws are exact.

The average of any quadratic function over such draws is its expectation, without an error; that of
a smooth function loses the greatest part of its variance, at the price of a bias of order 1/K.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MomentMatched(TorchFunctionMode):
    """Makes the standard normal numbers of a run uncorrelated over its draws, exactly."""

    def __init__(self, draws: int) -> None:
        super().__init__()
        self.draws = draws
        self.basis = torch.ones(draws, 1) / draws**0.5

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the function; `normal_` without arguments is matched."""
        result = func(*args, **(kwargs or {}))
        plain = _is_plain(func, args, kwargs) and result.shape[:1] == (self.draws,)
        return self._match(result) if plain else result

    def _match(self, normal: Tensor) -> Tensor:
        flat = normal.reshape(self.draws, -1)
        found = _matched(flat, self.basis.to(normal))
        if found is None:
            return normal
        value, self.basis = found
        return value.reshape(normal.shape)


class MatchedPerDatum(TorchFunctionMode):
    """Makes the standard normal numbers of each datum uncorrelated over the draws, exactly.

    The draws may come in several runs, with a plate of draws or single ones without; each takes its
    share of one set. Use it around a guide, together with `places`.

    Args:
        draws: how many draws are one set.
        common: give all data the same numbers, which is cheaper.
    """

    def __init__(self, draws: int, *, common: bool = False) -> None:
        super().__init__()
        self.draws, self.common = draws, common
        self.axis: int | None = None  # the dim of the data in what is drawn now, from the left
        self.bank: list[Tensor | None] = []  # the set of each statement: (draws, *shape)
        self.basis: Tensor | None = None
        self.share, self.single, self.call = slice(0, draws), False, 0

    def start_run(self, first: int, count: int, *, single: bool) -> None:
        """Announces a run that takes draws from `first`; a single one has no dim of draws."""
        self.share, self.single, self.call = slice(first, first + count), single, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the function; `normal_` without arguments is matched."""
        result = func(*args, **(kwargs or {}))
        if self.axis is None or not _is_plain(func, args, kwargs):
            return result
        axis = self.axis - (not self.single)
        shape = result.shape if self.single else result.shape[1:]
        if self.call == len(self.bank):
            self.bank.append(self._draw(result, shape, axis))
        kept = self.bank[self.call]
        self.call += 1
        if kept is None:
            return result
        share = kept[self.share].to(result)
        return (share[0] if self.single else share).expand(result.shape)

    def _draw(self, like: Tensor, shape: torch.Size, axis: int) -> Tensor | None:
        """One statement's set, or None if it has too many coordinates for so few draws."""
        shape = torch.Size([*shape[:axis], 1, *shape[axis + 1 :]]) if self.common else shape
        # doubles, since as many draws as coordinates make for a bad condition
        normal = torch.randn(self.draws, *shape, dtype=torch.float64, device=like.device)
        rows = normal.movedim(axis + 1, 0)
        if self.basis is None:
            ones = torch.ones(len(rows), self.draws, 1, dtype=rows.dtype, device=rows.device)
            self.basis = ones / self.draws**0.5
        found = _matched(rows.reshape(len(rows), self.draws, -1), self.basis)
        if found is None:
            return None
        value, self.basis = found
        return value.reshape(rows.shape).movedim(0, axis + 1)

    def places(self, frame: Any) -> Messenger:
        """A handler that tells where the data are in what a sample statement draws."""
        return _Places(self, frame)


class _Places(Messenger):
    def __init__(self, numbers: MatchedPerDatum, frame: Any) -> None:
        super().__init__()
        self.numbers, self.frame = numbers, frame

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if any(frame.name == self.frame.name for frame in msg["cond_indep_stack"]):
            self.numbers.axis = len(msg["fn"].batch_shape) + self.frame.dim

    def _pyro_post_sample(self, msg: Any) -> None:
        self.numbers.axis = None


def _is_plain(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    return func is torch.Tensor.normal_ and len(args) == 1 and not kwargs


def _matched(normal: Tensor, basis: Tensor) -> tuple[Tensor, Tensor] | None:
    """Makes columns orthogonal to one another and to a basis; `(*, draws, columns)` in and out.

    Returns:
        The columns, with mean square one, and the larger basis; None if there are too few draws.
    """
    draws = normal.shape[-2]
    if normal.shape[-1] + basis.shape[-1] > draws:
        return None
    normal = normal - basis @ (basis.mT @ normal)  # mean zero, and apart from earlier sites
    orthogonal, triangle = torch.linalg.qr(normal)
    orthogonal = orthogonal * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return orthogonal * draws**0.5, torch.cat([basis, orthogonal], -1)
