"""Random draws of a part of a minibatch: the numbers that it would have within the whole.

All processes have one stream of random numbers. Each draws for the whole minibatch, and takes what
belongs to its own data.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppvae._scopes import random_numbers, random_state

_ATEN = torch.ops.aten
_LIKE = ("rand_like", "randn_like", "randint_like")
#: Draws that depend on numbers, of the order of their first argument.
_OF_NUMBERS = (
    _ATEN._standard_gamma.default,
    _ATEN._sample_dirichlet.default,
    _ATEN.poisson.default,
    _ATEN.bernoulli.default,
    _ATEN.normal.Tensor_Tensor,
    _ATEN.normal.Tensor_float,
)
_UNTAGGED = ("_sample_dirichlet", "binomial")  # which PyTorch does not mark as random


class Indivisible(ValueError):
    """A minibatch cannot be shared among processes; the message says why, in a few words."""


class Part(NamedTuple):
    """A part of the rows of a minibatch.

    Attributes:
        start: the first of its rows.
        rows: how many it has.
        whole: how many the minibatch has.
    """

    start: int
    rows: int
    whole: int

    @property
    def slice(self) -> slice:
        """Its rows, in the minibatch."""
        return slice(self.start, self.start + self.rows)


class Draw(NamedTuple):
    """How a draw for the whole minibatch was made.

    Attributes:
        dim: its dimension of data; None if it has none, and is the same for all data.
        order: its dimensions as they follow each other in memory, in which numbers are drawn.
    """

    dim: int | None
    order: tuple[int, ...]

    def fits(self, shape: Sequence[int], rows: int) -> bool:
        """Whether one of that shape may be the same draw for so many data."""
        return len(shape) == len(self.order) and (self.dim is None or shape[self.dim] == rows)

    def empty(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of that shape, which lies in memory as the draw did."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return like.new_empty([shape[dim] for dim in self.order]).permute(back)


class SharedDraws(TorchDispatchMode):
    """Inside, each draw that has a dimension of data is made for the whole minibatch, and cut.

    Where it depends on numbers, as that of a gamma with a computed shape, these are gathered from
    all processes. What may not be random at all, as attention without dropout, is left to each.

    Args:
        draws: those of the whole minibatch, as `draws_of` finds them.
        part: the rows that are at hand.
        gather: from the numbers for these rows and their dimension to those for the minibatch;
            without it such draws are no draws, but about their mean.
    """

    def __init__(
        self,
        draws: Sequence[Draw],
        part: Part,
        gather: Any = None,
    ) -> None:
        super().__init__()
        self.draws, self.part, self.gather = draws, part, gather
        self._next = 0

    def __exit__(self, kind: Any, *error: Any) -> None:
        """Leaves.

        Raises:
            RuntimeError: the draws were not those of the first minibatch.
        """
        super().__exit__(kind, *error)
        if kind is None and self._next != len(self.draws):
            raise RuntimeError(_others(f"{self._next} of {len(self.draws)}"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation; one that draws, in the way above."""
        kwargs = kwargs or {}
        if not _draws(func):
            return func(*args, **kwargs)
        if not _is_divisible(func, args):
            with random_state(None, keep=True):  # all processes stay where they are
                return func(*args, **kwargs)
        number, self._next = self._next, self._next + 1
        shape, of_numbers = _shape(func, args), func in _OF_NUMBERS
        if of_numbers and self.gather is None:
            return args[0].expand(shape).clone()
        draw = self.draws[number] if number < len(self.draws) else None
        if draw is None or not draw.fits(shape, self.part.rows):
            raise RuntimeError(_others(f"one of shape {tuple(shape)} as number {number}"))
        if draw.dim is None:
            return func(*args, **kwargs)
        whole = [*shape]
        whole[draw.dim] = self.part.whole
        if of_numbers:
            numbers = (a.expand(shape) if isinstance(a, Tensor) else a for a in args)
            told = [self._gathered(a, draw, whole) if isinstance(a, Tensor) else a for a in numbers]
        elif (at := _size_at(func)) is not None:
            told = [*args[:at], whole, *args[at + 1 :]]
        else:
            told = [draw.empty(args[0], whole), *args[1:]]
        own = func(*told, **kwargs).narrow(draw.dim, self.part.start, self.part.rows)
        return args[0].copy_(own) if _writes(func) else own.contiguous()

    def _gathered(self, numbers: Tensor, draw: Draw, shape: Sequence[int]) -> Tensor:
        return draw.empty(numbers, shape).copy_(self.gather(numbers, draw.dim))


def draws_of(
    call: Callable[[Any], Any], whole: tuple[Any, int], part: tuple[Any, int]
) -> list[Draw]:
    """The draws of a call on a minibatch.

    Args:
        call: a function of a minibatch.
        whole: a minibatch, and its number of data.
        part: a part of it, and its number of data, which is less.

    Raises:
        Indivisible: they are not one for each datum, or the same for all.
    """
    records = []
    for batch, _ in (whole, part):
        with random_state(None, keep=True), _Recorded() as recorded:
            call(batch)
        records.append(recorded)
    shapes = [record.shapes for record in records]
    draws: list[Draw] = []
    if len(shapes[0]) != len(shapes[1]):
        raise Indivisible("fewer data draw another number of times")
    for one, other, order in zip(*shapes, records[0].orders, strict=True):
        if len(one) != len(other):
            raise Indivisible(f"draws of shape {one} become {other} for fewer data")
        differ = [d for d, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        if len(differ) > 1 or any((one[d], other[d]) != (whole[1], part[1]) for d in differ):
            raise Indivisible(f"draws of shape {one} are not one for each datum")
        draws.append(Draw(differ[0] if differ else None, order))
    return draws


class _Recorded(TorchDispatchMode):
    """Notes the shapes of the draws that are made inside, and how they lie in memory.

    Raises:
        Indivisible: a draw for some data cannot be cut from one for more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.orders: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation."""
        if not _draws(func):
            return func(*args, **(kwargs or {}))
        before = random_numbers()
        made = func(*args, **(kwargs or {}))
        if _is_divisible(func, args):
            self.shapes.append(tuple(_shape(func, args)))
            dims = range(made.dim())
            self.orders.append(tuple(sorted(dims, key=made.stride, reverse=True)))
        elif not all(map(torch.equal, before, random_numbers())):  # attention may draw nothing
            name = func.overloadpacket.__name__
            raise Indivisible(f"draws of {name} for some data are no part of those for more")
        return made


def _draws(func: Any) -> bool:
    """Whether an operation draws random numbers."""
    return (
        torch.Tag.nondeterministic_seeded in func.tags or func.overloadpacket.__name__ in _UNTAGGED
    )


def _writes(func: Any) -> bool:
    """Whether an operation writes its numbers into its first argument."""
    return bool(func.overloadpacket.__name__.endswith("_"))


def _is_divisible(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a draw for some data can be cut from one for more."""
    if _size_at(func) is not None or func in _OF_NUMBERS:
        return True
    tensors = sum(isinstance(arg, Tensor) for arg in args)
    like = func.overloadpacket.__name__ in _LIKE or func is _ATEN.bernoulli.p
    return tensors == 1 and isinstance(args[0], Tensor) and (_writes(func) or like)


def _size_at(func: Any) -> int | None:
    """Which argument of an operation is the shape of what it makes."""
    names = [argument.name for argument in func._schema.arguments]
    return names.index("size") if "size" in names else None


def _shape(func: Any, args: tuple[Any, ...]) -> list[int]:
    """The shape of what an operation makes."""
    at = _size_at(func)
    if at is not None:
        return [*args[at]]
    return [*torch.broadcast_shapes(*(arg.shape for arg in args if isinstance(arg, Tensor)))]


def _others(came: str) -> str:
    return (
        f"fit: expected the draws of the first minibatch in all processes, got {came}; an "
        "objective that says why it is `indivisible` (see objectives.Objective) is computed by each"
    )
