"""Numbers as text, in tables that are no wider than a page."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from ppvae.comparison.steps import MEASURES, RATES, TOTALS

PAGE = 79  # characters of a line of sentences; tables of long names may be somewhat wider
_NAME = 30  # characters of a name that stands in the line of its numbers
_MOST = 3  # decimals of a number


def places(errors: Any, least: int = 1) -> int:
    """The decimals that numbers with such errors are worth: two digits of the smallest error.

    Args:
        errors: standard errors or half-widths; zeros, of what is exact, and NaN do not count.
        least: so many at least; three at most.
    """
    known = np.asarray(errors, dtype=float).ravel()
    known = known[np.isfinite(known) & (known > 0)]
    worth = math.ceil(1 - math.log10(known.min())) if known.size else _MOST
    return max(least, min(worth, _MOST))


def shown(value: Any, decimals: int = _MOST) -> str:
    """A number with so many decimals, without the sign of a zero; nothing where there is none."""
    number = float(value)
    return f"{round(number, decimals) + 0.0:.{decimals}f}" if not math.isnan(number) else ""


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 0) -> list[str]:
    """The lines of a table: names to the left, numbers to the right of their columns.

    Args:
        head: the headings; the first is that of the names.
        rows: a name, and a cell for each other heading. A long name has a line of its own.
        words: so many of the last columns are words, and begin at the left.
    """
    lines = [head, *rows]
    long = [len(line[0]) > _NAME for line in lines]
    first = max((len(line[0]) for line, own in zip(lines, long, strict=True) if not own), default=0)
    widths = [max(len(line[at]) for line in lines) for at in range(1, len(head))]
    text = []
    for line, own in zip(lines, long, strict=True):
        name, cells = ("" if own else line[0]).ljust(first), []
        for at, (cell, width) in enumerate(zip(line[1:], widths, strict=True), 1):
            cells.append(cell.ljust(width) if at >= len(head) - words else cell.rjust(width))
        text += [line[0]] if own else []
        text.append("  ".join([name, *cells]).rstrip())
    return text


def wrapped(text: str, indent: str = "  ") -> list[str]:
    """A sentence in lines of a page; those behind the first are indented."""
    return textwrap.wrap(text, PAGE, subsequent_indent=indent, break_long_words=False)


def table_of(data: xr.Dataset) -> str:
    """The results of `with_steps`: each family, each step up, and the notes on them."""
    lines = [*_families(data), *_steps(data)]
    notes = data.note.values
    for note in dict.fromkeys(notes[notes != ""]):
        lines += wrapped(f"{', '.join(data.family.values[notes == note])}: {note}")
    return "\n".join(lines)


def _families(data: xr.Dataset) -> list[str]:
    """What each family is worth, and what it costs."""
    measures = [name for name in (*MEASURES, *TOTALS) if name in data]
    seeds = data.sizes["seed"]
    spread = [data[name].std("seed", ddof=1) / math.sqrt(seeds) for name in measures]
    decimals = places([each.values for each in spread])
    rows = []
    for number, family in enumerate(data.family.values):
        one = data.isel(family=number)
        cells = [shown(one[name].mean("seed", skipna=False), decimals) for name in measures]
        cells.append(shown(one.fall.mean("seed", skipna=False)))
        costs = [f"{float(one.seconds.median('seed')):.3g}", str(int(one.parameters))]
        rows.append([str(family), *cells, *costs])
    called = {"total_elbo_se": "+-"}
    head = ["", *(called.get(name, name) for name in measures), "fall", "seconds", "parameters"]
    unit = f"densities and gains in {data.gain.unit}; the seconds are those of a fit"
    return [*aligned(head, rows), *wrapped(unit)]


def _steps(data: xr.Dataset) -> list[str]:
    """What each step gains, with its interval, and the verdict."""
    threshold = f"{data.attrs['min_gain']:g}".partition(".")[2]
    half = ((data.gain_upper - data.gain_lower) / 2).values
    decimals = places(half, min(len(threshold), _MOST))
    rows = []
    for number, family in enumerate(data.family.values):
        one = data.isel(family=number)
        if one.below.item() and not np.isnan(one.gain):
            gain = [shown(one[name], decimals) for name in ("gain", "gain_lower", "gain_upper")]
            rates = [float(one[name]) for name in RATES]
            per = ["" if math.isnan(rate) else f"{rate:.1e}" for rate in rates]
            rows.append([f"{family} over {one.below.item()}", *gain, *per, one.verdict.item()])
    if not rows:
        return []
    head = ["step", "gain", "lower", "upper", "per number", "per second", "verdict"]
    level = f"lower and upper are the ends of an interval of {data.attrs['level']:.0%}; a gain is"
    level += " also given per parameter (a number) and per second that the step adds"
    return ["", *aligned(head, rows, words=1), *wrapped(level)]
