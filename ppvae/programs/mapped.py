"""Many draws of a program in one run, by `torch.vmap`, and what it cannot do as it is written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: what is raised where a function cannot be mapped
UNMAPPED = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError)


def mapped(one: Callable[[Tensor], Any], *, own: bool = False) -> Callable[[Tensor], Any]:
    """A function of many draws, which are in the first dimension, from that of one.

    Args:
        one: runs a program.
        own: give each draw tensors of its own, where the program makes some without a word of the
            draw. They can be written to then, and take their memory so many times.
    """

    def run(draw: Tensor) -> Any:
        with _Writes(torch.zeros_like(draw.detach()).sum() if own else None):
            return one(draw)

    return torch.func.vmap(run, randomness="different")


def many(one: Callable[[Tensor], Any], draws: Tensor) -> Any:
    """What a function gives for many draws, which get tensors of their own if need be.

    Raises:
        Exception: any of `UNMAPPED`: it cannot be mapped.
    """
    try:
        return mapped(one)(draws)
    except UNMAPPED:
        return mapped(one, own=True)(draws)


@dataclass(frozen=True)
class _Chosen:
    """The entries of a tensor at a mask; all that can be done with them is to write them."""

    tensor: Tensor
    mask: Tensor


class _Writes(TorchFunctionMode):
    """Writes of parts of a tensor go for one of many, too.

    Entries at a mask are written as a choice for every entry: what a mask chooses has a size that
    depends on values, which `vmap` cannot have (Pyro's splines do so, and many a model).

    Args:
        zero: one of the draw at hand, which is added to what is made from nothing: a model may make
            `torch.zeros(...)` and fill it piece by piece. None leaves that as it is.
    """

    def __init__(self, zero: Tensor | None) -> None:
        super().__init__()
        self.zero = zero
        self.known = _BY_INDEX if zero is None else _BY_INDEX | _MAKERS

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the function, or puts off reading, and writes, by a mask."""
        if func not in self.known:  # first of all: what is asked here is asked of every operation
            return func(*args, **(kwargs or {}))
        if self.zero is not None and func in _MAKERS:
            made = func(*args, **(kwargs or {}))
            return made + self.zero.to(made) if made.is_floating_point() else made
        mask = args[1]
        if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            return func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and mask.shape == args[0].shape:
            return _Chosen(args[0].clone(), mask)  # it may be written to before it is used
        if func is Tensor.__setitem__ and mask.shape == args[0].shape:
            value = args[2]
            if isinstance(value, _Chosen) and value.mask is mask:
                value = value.tensor
            elif isinstance(value, Tensor) and value.dim():  # as many as a mask of its own chooses
                return func(*args, **(kwargs or {}))
            return args[0].copy_(torch.where(mask, value, args[0]))
        return func(*args, **(kwargs or {}))


_BY_INDEX = frozenset({Tensor.__getitem__, Tensor.__setitem__})
_MAKERS: frozenset[Any] = frozenset(
    {
        *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.tensor),
        *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.clone),
        *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.clone),
    }
)
