"""How pictures look: an empty figure, and colours and marks that every eye can tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Those of Okabe and Ito, "Color Universal Design" (2008), without yellow, which is lost on white.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "black")
_MARKERS = "os^DvP<X"
_LINES = ("-", "--", "-.", ":")


def color(index: int) -> str:
    """The colour of the datum, family or class with that number."""
    return _COLORS[index % len(_COLORS)]


def mark(index: int) -> dict[str, Any]:
    """A colour and a marker; 56 that differ."""
    return {"color": color(index), "marker": _MARKERS[index % len(_MARKERS)]}


def line(index: int) -> dict[str, Any]:
    """A colour and a kind of line; 28 that differ."""
    return {"color": color(index), "linestyle": _LINES[index // len(_COLORS) % len(_LINES)]}


def empty(width: float, height: float) -> Figure:
    """A figure without anything in it, in inches; `pyplot` does not know of it."""
    from matplotlib.figure import Figure  # takes 0.2 s to import

    return Figure(figsize=(width, height), layout="constrained")
