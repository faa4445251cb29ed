"""What makes a guide family a value: equal by what it says, and named by the ladder."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from torch import Tensor
from torch.distributions.constraints import Constraint

NAMES: dict[Any, str] = {}  # of the families in the ladder


class Value:
    """An object that is equal to another of its class that was made from equal parts.

    A subclass gives `_parts`, all that it was made from. Copies and pickles are then equal to the
    original, and have its name.
    """

    def _parts(self) -> Any:
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The name in the ladder, or the expression that builds the family."""
        return NAMES.get(self, repr(self))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and _key(self._parts()) == _key(other._parts())

    def __hash__(self) -> int:
        return hash((type(self), _key(self._parts())))


def _key(part: Any) -> Any:
    """A part as something that can be compared and hashed; a number is a tensor of one."""
    if isinstance(part, dict):
        return tuple((name, _key(part[name])) for name in sorted(part))
    if isinstance(part, (tuple, list)):
        return tuple(_key(each) for each in part)
    if isinstance(part, Tensor):
        return tuple(part.shape), tuple(part.detach().double().reshape(-1).tolist())
    if isinstance(part, (int, float)) and not isinstance(part, bool):
        return (), (float(part),)
    if isinstance(part, Constraint) or is_dataclass(part):
        return type(part), _key(vars(part))
    return part
