"""Pictures of the regression twin; each returns a figure and touches no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ppvae._checks import (
    check_array,
    check_count,
    check_mapping,
    check_names,
    check_share,
    check_size,
    expect,
)
from ppvae._look import color, empty, line, mark
from ppvae.regression.quantiles import mixture_quantiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ppvae.regression.worth import Worth

__all__ = ["band", "bands", "forest", "overconfidence", "paths", "worth"]

Interval = tuple[ArrayLike, ArrayLike, ArrayLike]


def forest(rows: Mapping[str, Interval], labels: Sequence[str]) -> Figure:
    """Coefficients with their intervals, one panel per column and one line per row.

    Args:
        rows: name -> (middle, low, high), each of shape `(columns,)`.
        labels: names of the columns.

    Raises:
        TypeError, ValueError: the intervals are no finite numbers, or not one for each name.
    """
    labels, rows = check_names("labels", labels), check_mapping("rows", rows)
    shape = (3, len(labels))
    table = np.array([check_array(f"rows, {name}", row, shape) for name, row in rows.items()])
    heights = np.arange(len(rows))[::-1]
    lines = -(-len(labels) // 5)
    figure = empty(2.1 * min(len(labels), 5) + 1.4, 2.6 * lines)
    axes = figure.subplots(lines, min(len(labels), 5), sharey=True, squeeze=False).ravel()
    for panel, label, (middle, low, high) in zip(axes, labels, table.T, strict=False):
        reach = 1.3 * np.abs(middle).max() + 0.15
        panel.hlines(heights, low, high, color=color(0), linewidth=1.6)
        for end, side, marker in ((low, -reach, "<"), (high, reach, ">")):
            cut = heights[abs(end) > reach]  # an arrow where an interval leaves the panel
            at, style = np.full(len(cut), side), {"markersize": 5, "clip_on": False}
            panel.plot(at, cut, marker, color=color(0), **style)
        panel.plot(middle, heights, "o", color="black", markersize=3)
        panel.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        panel.set(title=label, xlim=(-reach, reach), yticks=heights, yticklabels=list(rows))
        panel.locator_params(axis="x", nbins=4)
        panel.tick_params(labelsize=7)
    for panel in axes[len(labels) :]:
        panel.set_axis_off()
    figure.suptitle("Weights with 90 % intervals (arrows: they go on beyond the panel)")
    return figure


def paths(
    ridge: tuple[ArrayLike, ArrayLike],
    lasso: tuple[ArrayLike, ArrayLike],
    evidence: ArrayLike,
    best: tuple[float, float],
    labels: Sequence[str],
) -> Figure:
    """Ridge and lasso paths, and under the ridge path the evidence with its maximum.

    Args:
        ridge: (penalties, weights), shapes `(k,)` and `(k, columns)`.
        lasso: the same for the lasso.
        evidence: log evidence at the ridge penalties, shape `(k,)`.
        best: penalty and log evidence at the maximum.
        labels: names of the columns.

    Raises:
        TypeError, ValueError: there are others than finite numbers, or they do not fit each other.
    """
    names = check_names("labels", labels)
    both = {"ridge": ridge, "lasso": lasso}
    lines = {name: _path(name, pair, len(names)) for name, pair in both.items()}
    penalties = lines["ridge"][0]
    evidence = check_array("evidence", evidence, (len(penalties),))
    best = tuple(check_array("best", best, (2,)).tolist())
    figure = empty(10.0, 5.6)
    panels = figure.subplot_mosaic("rl;el", height_ratios=(2, 1))
    left, right, below = (panels[key] for key in "rle")
    for panel, title in ((left, "ridge"), (right, "lasso")):
        for index, (name, path) in enumerate(zip(names, lines[title][1].T, strict=True)):
            panel.semilogx(lines[title][0], path, label=name, **line(index))
        panel.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        panel.set(title=title, ylabel="weight")
    right.set_xlabel("penalty  noise^2 / b")
    right.sharey(left)
    handles = right.get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", fontsize=8, title="weight of")
    below.sharex(left)
    below.semilogx(penalties, evidence, color="black")
    below.plot(*best, "o", color=color(3), label=f"maximum at {best[0]:.3g}")
    below.legend(fontsize=8)
    low, high = np.quantile(evidence, [0.25, 1.0])
    below.set_ylim(low, high + 0.08 * (high - low))
    below.set(xlabel="penalty  noise^2 / prior variance", ylabel="log evidence [nats]")
    for panel in (left, below):
        panel.axvline(best[0], color=color(3), linestyle=":", linewidth=1)
    return figure


def band(means: ArrayLike, noise: float, *, level: float = 0.9) -> Interval:
    """Mean and central interval of a prediction, a mixture of Normals with one sd.

    Args:
        means: mean of each draw of the weights, shape `(k, draws)`.
        noise: sd of the noise.
        level: of the interval, in (0, 1).

    Raises:
        TypeError: there are others than real numbers among the means.
        ValueError: they have another shape, or one is not finite; `noise` is not positive, or
            `level` not in (0, 1).
    """
    means, level = check_array("means", means, ("k", "draws")), check_share("level", level)
    noise = check_size("noise", noise)
    levels = np.array([1 - level, 1 + level]) / 2
    shares, sds = np.full(means.shape[1], 1 / means.shape[1]), np.full(means.T.shape, noise)
    low, high = mixture_quantiles(shares, means.T, sds, levels)
    return means.mean(1), low, high


def bands(
    grid: ArrayLike,
    curves: Mapping[str, Interval],
    data: tuple[ArrayLike, ArrayLike],
    label: str,
    *,
    target: str = "target",
    columns: int = 3,
) -> Figure:
    """Predictive bands along one feature, one panel per row.

    Args:
        grid: values of the feature, shape `(k,)`.
        curves: name -> (middle, low, high) of the prediction, each of shape `(k,)`.
        data: (feature, target) of the training data.
        label: name of the feature, with its unit.
        target: name of what is predicted, with its unit.
        columns: panels in a row.

    Raises:
        TypeError, ValueError: there are others than finite numbers, or they do not fit each other.
    """
    grid, curves = check_array("grid", grid, ("k",)), check_mapping("curves", curves)
    shape = (3, len(grid))
    checked = {name: check_array(f"curves, {name}", one, shape) for name, one in curves.items()}
    points = check_array("data", data, (2, "rows"))
    expect(points.size and grid.size, "grid, data", "at least one point", "none")
    for name, text in (("label", label), ("target", target)):
        expect(isinstance(text, str), name, "a name", repr(text), TypeError)
    columns = min(check_count("columns", columns), len(curves))
    lines = -(-len(curves) // columns)
    figure = empty(2.8 * columns + 0.6, 2.5 * lines + 0.5)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel, (name, (middle, low, high)) in zip(axes.flat, checked.items(), strict=False):
        panel.scatter(*points, s=3, color="0.75")
        panel.fill_between(grid, low, high, color=color(0), alpha=0.3, linewidth=0)
        panel.plot(grid, middle, color=color(0))
        panel.set(title=name, ylim=(2 * points[1].min(), 2 * points[1].max()))
    for panel in axes.flat[len(curves) :]:
        panel.set_axis_off()
    figure.supxlabel(label, fontsize=10)
    figure.supylabel(target, fontsize=10)
    figure.suptitle("Predictive mean and 90 % band, the other features at their means")
    return figure


def overconfidence(
    posteriors: Mapping[str, tuple[ArrayLike, ArrayLike]], labels: tuple[str, str]
) -> Figure:
    """90 % regions of two weights under several posteriors.

    Args:
        posteriors: name -> (mean, covariance) of the pair, shapes `(2,)` and `(2, 2)`.
        labels: names of the two columns.

    Raises:
        TypeError, ValueError: there are others than finite numbers, or of other shapes; or a
            covariance is not positive definite.
    """
    names = check_names("labels", labels, 2)
    figure = empty(5.4, 4.6)
    axes, angles = figure.subplots(), np.linspace(0, 2 * np.pi, 181)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    for index, (name, pair) in enumerate(check_mapping("posteriors", posteriors).items()):
        where = f"posteriors, {name}"
        expect(_paired(pair), where, "a pair (mean, covariance)", repr(pair), TypeError)
        mean, covariance = check_array(where, pair[0], (2,)), check_array(where, pair[1], (2, 2))
        positive = np.linalg.eigvalsh(covariance)[0] > 0
        expect(positive, where, "a positive definite covariance", covariance)
        ring = np.sqrt(-2 * np.log(0.1)) * np.linalg.cholesky(covariance) @ circle
        dashes = ["-", "--", "-.", ":"][index % 4]
        axes.plot(*(mean[:, None] + ring), color=color(index), linestyle=dashes, label=name)
        axes.plot(*mean, "+", color=color(index))
    axes.set(xlabel=f"weight of {names[0]}", ylabel=f"weight of {names[1]}")
    axes.set_title("Where mean field is overconfident: 90 % regions")
    axes.legend(fontsize=8)
    return figure


def worth(found: Worth) -> Figure:
    """What a ridge regression is along its penalties, and what the full posterior adds to a point.

    Left: nats per datum of the data themselves, of data left out and held out, and the evidence,
    with the penalties that methods choose. Right: held-out log density less that of the full
    posterior, with two standard errors of the pairs, and the share of data inside the intervals.

    Args:
        found: what `worth_of_bayes` returns.

    Raises:
        TypeError: it is something else.
    """
    from ppvae.regression.worth import FULL, POINTS, Worth

    kind = type(found).__name__
    expect(isinstance(found, Worth), "found", "what worth_of_bayes returns", kind, TypeError)
    figure, path = empty(10.0, 4.6), found.path
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    curves = {
        "training": (path.training, "--"),
        "held out": (path.held_out, "-"),
        "exact leave-one-out": (path.leave_one_out, ":"),
        "evidence per datum (shifted)": (path.evidence, "-."),
    }
    for index, (name, (curve, style)) in enumerate(curves.items()):
        left.semilogx(path.penalties, curve, color=color(index), linestyle=style, label=name)
    # the evidence may fall far below
    seen = np.concatenate([path.held_out, path.leave_one_out, path.training])
    low, high = seen.min(), seen.max()
    step = 0.06 * (high - low)
    chosen = [name for name in POINTS if path.chosen.get(name, 0) > 0]
    for index, name in enumerate(chosen):
        at, look = path.chosen[name], mark(index + 4)
        left.plot(at, low - (index + 1) * step, label=name, linestyle="none", **look)
        left.axvline(at, color=look["color"], linewidth=0.6, zorder=0)
    left.set(ylim=(low - (len(chosen) + 1) * step, high + step), ylabel="nats per datum")
    left.set(xlabel="penalty per row of standardised data")
    left.set_title("Ridge regression along its penalty")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncol=4)
    names = [name for name in found.methods if name != FULL]
    heights = np.arange(len(names) + 1)[::-1]
    gains = np.array([*map(found.gain_over, names)])
    right.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    right.errorbar(-gains[:, 0], heights[1:], xerr=2 * gains[:, 1], fmt="o", color=color(0))
    right.plot(0, heights[0], "D", color="black")
    for name, height in zip([FULL, *names], heights, strict=True):
        share = f"{found.methods[name].coverage:.0%}"
        right.annotate(share, (1.02, height), xycoords=("axes fraction", "data"), va="center")
    right.annotate(
        f"{found.level:.0%}\nhave", (1.02, len(names) + 0.45), xycoords=("axes fraction", "data")
    )
    right.set(yticks=heights, yticklabels=[FULL, *names], ylim=(-0.6, len(names) + 0.6))
    right.set(xlabel="held-out log density less the full posterior's\n[nats per datum, 2 s.e.]")
    right.locator_params(axis="x", nbins=5)
    right.set_title("Held-out predictions")
    figure.suptitle(f"{found.rows} rows, {found.columns} columns")
    return figure


def _paired(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


def _path(name: str, pair: Any, columns: int) -> tuple[Any, Any]:
    """Penalties and weights, as arrays."""
    expect(_paired(pair), name, "a pair (penalties, weights)", repr(pair), TypeError)
    penalties = check_array(name, pair[0], ("k",))
    expect(penalties.size and (penalties > 0).all(), name, "positive penalties", pair[0])
    return penalties, check_array(name, pair[1], (len(penalties), columns))
