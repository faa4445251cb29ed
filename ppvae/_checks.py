"""The parts of the training loop: steps, parameters, checks, and the way back."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["is_count"]


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_count(name: str, value: Any) -> None:
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def check_weight(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")
