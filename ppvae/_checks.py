"""One way to refuse an argument: its name, what was expected, and what came."""

import math
import operator
from collections.abc import Sequence
from typing import Any


def expect(
    ok: Any, name: str, expected: str, got: Any, error: type[Exception] = ValueError
) -> None:
    """Raises an error that says `name: expected ..., got ...`, unless `ok`.

    Args:
        ok: whether the argument is as expected.
        name: of the argument.
        expected: what it should be, in words.
        got: what came, a value or words.
        error: the kind of error.
    """
    if not ok:
        raise error(f"{name}: expected {expected}, got {got}")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number as an `int`, of at least `least`; NumPy's are as good as Python's.

    Raises:
        ValueError: it is no whole number, or below `least`.
    """
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or count < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return count


def check_seed(value: Any, name: str = "seed") -> int:
    """A seed as an `int`; NumPy's whole numbers are as good as Python's.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is not one of 64 bits.
    """
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    expect(whole, name, "a whole number", repr(value), TypeError)
    seed = operator.index(value)
    expect(-(2**63) <= seed < 2**64, name, "a whole number of 64 bits", seed)
    return seed


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """A finite number of at least 0, or above 0, as a `float`; NumPy's are as good as Python's.

    Raises:
        ValueError: it is no such number.
    """
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    kind = "positive number" if positive else "number of at least 0"
    fits = math.isfinite(number) and (number > 0 or number == 0 and not positive)
    expect(fits, name, f"a finite {kind}", repr(value))
    return number


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    expect(value in choices, name, f"one of {list(choices)}", repr(value))
