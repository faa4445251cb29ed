"""One way to refuse an argument: its name, what was expected, and what came."""

import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Sizes of which the square, and that of their inverse, is a number in double precision.
LEAST, MOST = 1e-100, 1e100

_LONG = 1000  # characters of what came, of which the middle is left out beyond


#: Where it says what a warning means and what to do about it.
TROUBLE = "see examples/gallery/howto/when_it_goes_wrong.md"


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
        came = f"{got}"
        came = came if len(came) <= _LONG else f"{came[: _LONG // 2]} ... {came[-_LONG // 2 :]}"
        raise error(f"{name}: expected {expected}, got {came}")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number as an `int`, of at least `least`; NumPy's are as good as Python's.

    Raises:
        ValueError: it is no whole number, or below `least`.
    """
    count = _whole(value)
    if count is None or not least <= count < 2**63:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r:.80}")
    return count


def _whole(value: Any) -> Any:
    """A whole number as an `int`, or None for what is none; True and False are none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_seed(value: Any, name: str = "seed") -> int:
    """A seed as an `int`; NumPy's whole numbers are as good as Python's.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is not one of 64 bits.
    """
    seed = _whole(value)
    expect(seed is not None, name, "a whole number", repr(value), TypeError)
    expect(
        -(2**63) <= seed < 2**64, name, "a whole number of 64 bits", f"one of {seed.bit_length()}"
    )
    return seed


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """A finite number of at least 0, or above 0, as a `float`; NumPy's are as good as Python's.

    Raises:
        ValueError: it is no such number.
    """
    number = _real(value)
    kind = "positive number" if positive else "number of at least 0"
    fits = math.isfinite(number) and (number > 0 or number == 0 and not positive)
    expect(fits, name, f"a finite {kind}", repr(value))
    return number


def _real(value: Any) -> float:
    """A number as a `float`, or NaN for what is none; True and False are none, nor is text.

    One in single precision is the shortest decimal that it stands for: 0.1, and not 0.10000000149.
    """
    if isinstance(value, np.float32):
        return float(str(value))
    try:
        return math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        return math.nan


def check_share(name: str, value: Any) -> float:
    """A number between 0 and 1, both left out, as a `float`.

    Raises:
        ValueError: it is no such number.
    """
    share = _real(value)
    expect(0 < share < 1, name, "a number between 0 and 1", repr(value))
    return share


def check_real(name: str, values: Any, *, writable: bool = True, missing: bool = False) -> Tensor:
    """Real numbers as a dense tensor; arrays, lists and tables keep their dtype and share memory.

    Nothing is made a number that is none, such as text or a date, and no part of one is dropped.

    Args:
        name: of the argument.
        values: a tensor, an array, a list or a table.
        writable: copy an array that can only be read, such as a memory map; else nothing may be
            written to the tensor.
        missing: entries may be missing; what is masked, None or pandas' NA becomes NaN.

    Raises:
        TypeError: there is something else among them, or the tensor is sparse, nested, quantized,
            or on the device `meta`.
        ValueError: entries of an array are masked.
    """
    wanted, kind = "real numbers in a dense array or tensor", type(values).__name__
    if isinstance(values, Tensor):
        dense = values.layout is torch.strided and not (values.is_nested or values.is_quantized)
        real = not (values.is_complex() or values.is_meta)
        got = f"{values.dtype} with layout {values.layout} on {values.device}"
        expect(dense and real, name, wanted, got, TypeError)
        return values
    hidden = np.ma.count_masked(values) if np.ma.is_masked(values) else 0
    expect(missing or not hidden, name, "no masked entries", f"{hidden}")
    try:
        array = np.asarray(values.astype(float).filled(np.nan) if hidden else values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected {wanted}, got {kind}: {error}") from None
    if missing and array.dtype == object:
        none = [each is None or type(each).__name__ == "NAType" for each in array.flat]
        array = np.where(np.reshape(none, array.shape), np.nan, array)
    if array.dtype == object and all(isinstance(each, (Real, np.bool_)) for each in array.flat):
        try:
            array = array.astype(float)
        except OverflowError:  # a whole number of hundreds of digits is left as the object it is
            pass
    if array.dtype.kind not in "biuf":
        got = f"{kind} of {array.dtype}{_others_in(values, array)}"
        raise TypeError(f"{name}: expected {wanted}, got {got}")
    if array.dtype.kind == "u" and array.itemsize > 1:  # which PyTorch cannot calculate with
        array = array.astype(float if array.itemsize > 4 else np.int64)
    native = float if array.itemsize > 8 else array.dtype.newbyteorder("=")
    array = np.require(array, native, ["C", "W"] if writable else ["C"])
    with nullcontext() if array.flags.writeable else warnings.catch_warnings(action="ignore"):
        return torch.from_numpy(array)  # which warns of what can only be read


def check_array(name: str, values: Any, shape: tuple[int | str, ...]) -> NDArray[np.float64]:
    """Finite real numbers as an array in double precision, of a given shape.

    Args:
        name: of the argument.
        values: an array, a tensor, a list or a table.
        shape: the length of each dimension; where it may be any, a word that says what it counts.

    Raises:
        TypeError: they are no real numbers; see `check_real`.
        ValueError: they have another shape, or one is not finite.
    """
    array = as_doubles(check_real(name, values))
    lengths = [n if isinstance(m, int) else m for n, m in zip(array.shape, shape, strict=False)]
    fits = array.ndim == len(shape) and tuple(lengths) == shape
    expect(fits, name, f"shape ({', '.join(map(str, shape))})", array.shape)
    bad = int((~np.isfinite(array)).sum())
    expect(not bad, name, "finite numbers", f"{bad} that are NaN or infinite")
    return array


def _others_in(values: Any, array: Any) -> str:
    """What are no numbers in a table of pandas: its missing entries, or its columns of a kind."""
    dtypes: Any = getattr(values, "dtypes", None)
    if not hasattr(dtypes, "items"):
        return ""
    if any(type(each).__name__ == "NAType" for each in array.flat):
        return ", with missing entries"
    kinds = [(n, k) for n, k in dtypes.items() if getattr(k, "kind", "O") not in "biuf"]
    return f" (columns {', '.join(f'{name!r}: {kind}' for name, kind in kinds[:3])})"


def as_doubles(values: Tensor) -> NDArray[np.float64]:
    """The values of a tensor as an array in double precision."""
    array: NDArray[np.float64] = values.detach().cpu().double().numpy()
    return array


def check_size(name: str, value: Any) -> float:
    """A positive number of which the square and its inverse are numbers in double precision.

    Raises:
        ValueError: it is no such number.
    """
    number = check_number(name, value, positive=True)
    expect(LEAST <= number <= MOST, name, f"a number from {LEAST} to {MOST}", repr(value))
    return number


def check_flag(name: str, value: Any) -> bool:
    """True or False as a `bool`; NumPy's are as good as Python's.

    Raises:
        TypeError: it is neither.
    """
    expect(isinstance(value, (bool, np.bool_)), name, "True or False", repr(value), TypeError)
    return bool(value)


def check_mapping(name: str, value: Any) -> Mapping[Any, Any]:
    """A mapping with something in it.

    Raises:
        TypeError: it is no mapping.
        ValueError: it is empty.
    """
    expect(
        isinstance(value, Mapping), name, "a mapping from names", type(value).__name__, TypeError
    )
    expect(len(value), name, "at least one name", "none")
    return value


def check_names(name: str, values: Any, count: int | None = None) -> list[str]:
    """A list of names, at least one, or so many.

    Raises:
        TypeError: it is no list.
        ValueError: there are not so many.
    """
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    several = listed or getattr(values, "ndim", 0) == 1
    expect(several, name, "a list of names", type(values).__name__, TypeError)
    fits = len(values) > 0 if count is None else len(values) == count
    expect(fits, name, f"{count or 'some'} names", list(values))
    return [f"{value}" for value in values]


def check_label(name: str, value: Any, default: str) -> tuple[bool, str]:
    """Whether something is shown, and its label: what `progress` says, which is a bool or a label.

    Raises:
        TypeError: it is neither.
    """
    known = isinstance(value, (bool, np.bool_, str))
    expect(known, name, "True, False or a label", repr(value), TypeError)
    return bool(value), value if isinstance(value, str) else default


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    known = any(isinstance(value, type(choice)) and value == choice for choice in choices)
    expect(known, name, f"one of {list(choices)}", repr(value))
