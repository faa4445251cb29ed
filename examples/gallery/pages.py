"""What the pages share: how numbers with their spread are written, tables, and pictures."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from IPython import get_ipython
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats
from myst_nb import glue
from numpy.typing import ArrayLike

from ppvae._look import color

#: The colours of the library's own pictures, those of Okabe and Ito (2008): every eye can tell them
#: apart.
BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK = map(color, range(7))
GREY = "#777777"  # for what stands behind

matplotlib.rcParams |= {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK]),
    "legend.frameon": False,
}


def _print(message: Any, category: Any, *_: Any, **__: Any) -> None:
    print(f"{category.__name__}: {message}")


warnings.showwarning = _print  # on the page, where all see it
if get_ipython() is not None:
    set_matplotlib_formats("png")  # shows figures that are not of pyplot, as those of `ppvae.plots`
warnings.filterwarnings("ignore", "IProgress not found")  # of bars, which a page has not


def spread(values: ArrayLike, digits: int = 2) -> str:
    """A mean with, in brackets, the standard deviation over seeds: `3.61 (0.05)`."""
    numbers = np.asarray(values, dtype=float)
    return f"{numbers.mean():z.{digits}f} ({numbers.std(ddof=1):.{digits}f})"


def say(**numbers: Any) -> None:
    """Makes numbers known to the text of a page, which writes them as {glue:text}`name`."""
    for name, value in numbers.items():
        glue(name, value if isinstance(value, str) else f"{value:z.2f}", display=False)


def table(rows: Iterable[Mapping[str, Any]], digits: int = 2) -> Any:
    """A table of one row for each mapping; its numbers with so many digits."""
    frame = pd.DataFrame(list(rows)).astype(object).fillna("")
    cells = {name: _cell(digits) for name in frame}
    return frame.style.format(cells).hide(axis="index")


def _cell(digits: int) -> Any:
    return lambda value: f"{value:z.{digits}f}" if isinstance(value, float) else str(value)


def axes(xlabel: str, ylabel: str, width: float = 6.4, height: float = 4.0) -> tuple[Figure, Axes]:
    """An empty picture with named axes."""
    figure, ax = plt.subplots(figsize=(width, height))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return figure, ax
