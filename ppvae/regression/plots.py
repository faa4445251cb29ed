"""Pictures of the regression twin; each returns a figure and touches no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from numpy.typing import ArrayLike

from ppvae.regression.roots import mixture_quantiles

__all__ = ["band", "bands", "forest", "overconfidence", "paths"]

Interval = tuple[ArrayLike, ArrayLike, ArrayLike]


def forest(rows: Mapping[str, Interval], labels: Sequence[str]) -> Figure:
    """Coefficients with their intervals, one panel per column and one line per row.

    Args:
        rows: name -> (middle, low, high), each of shape `(columns,)`.
        labels: names of the columns.
    """
    count, names = len(labels), list(rows)
    figure = Figure(figsize=(2.1 * min(count, 5) + 1.4, 2.6 * -(-count // 5)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(-(-count // 5), min(count, 5), sharey=True)).ravel()
    spread = np.array([np.asarray(rows[name][0]) for name in names if name in rows])
    for column, panel in enumerate(axes[:count]):
        for height, name in enumerate(reversed(names)):
            middle, low, high = (np.asarray(value)[column] for value in rows[name])
            panel.plot([low, high], [height, height], color="C0", linewidth=1.6)
            panel.plot(middle, height, "o", color="black", markersize=3)
        panel.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        reach = 1.3 * np.abs(spread[:, column]).max() + 0.15
        panel.set(title=labels[column], xlim=(-reach, reach))
        panel.set_yticks(range(len(names)), list(reversed(names)))
        panel.tick_params(labelsize=7)
    for panel in axes[count:]:
        panel.set_axis_off()
    figure.suptitle("Weights with 90 % intervals (cut where they leave the panel)")
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
    """
    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
    left = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=left)
    right = figure.add_subplot(grid[:, 1], sharey=left)
    for panel, (penalty, weights), title in ((left, ridge, "ridge"), (right, lasso, "lasso")):
        for column, label in enumerate(labels):
            panel.semilogx(penalty, np.asarray(weights)[:, column], color=f"C{column}", label=label)
        panel.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        panel.set(title=title, ylabel="weight")
    right.set_xlabel("penalty  noise^2 / b")
    below.semilogx(ridge[0], evidence, color="black")
    below.set(xlabel="penalty  noise^2 / prior variance", ylabel="log evidence [nats]")
    low, high = np.quantile(np.asarray(evidence), [0.25, 1.0])
    below.set_ylim(low, high + 0.08 * (high - low))
    below.plot(*best, "o", color="C3")
    for panel in (left, below):
        panel.axvline(best[0], color="C3", linestyle=":", linewidth=1)
    text = f"maximum at {best[0]:.3g}"
    below.text(0.03, 0.08, text, transform=below.transAxes, fontsize=8, color="C3")
    right.legend(fontsize=7, ncols=2)
    return figure


def band(means: ArrayLike, noise: float, *, level: float = 0.9) -> Interval:
    """Mean and central interval of a prediction, a mixture of Normals with one sd.

    Args:
        means: mean of each draw of the weights, shape `(k, draws)`.
        noise: sd of the noise.
        level: of the interval.
    """
    means = np.asarray(means, dtype=float)
    tail = (1 - level) / 2
    weights = np.full(means.shape[1], 1 / means.shape[1])
    ends = mixture_quantiles(
        weights, means.T, np.full(means.T.shape, noise), np.array([tail, 1 - tail])
    )
    return means.mean(1), ends[0], ends[1]


def bands(
    grid: ArrayLike, curves: Mapping[str, Interval], data: tuple[ArrayLike, ArrayLike], label: str
) -> Figure:
    """Predictive bands along one feature, one panel per row.

    Args:
        grid: values of the feature, shape `(k,)`.
        curves: name -> (middle, low, high) of the prediction, each of shape `(k,)`.
        data: (feature, target) of the training data.
        label: name of the feature.
    """
    figure = Figure(figsize=(2.6 * len(curves) + 0.6, 3.0), layout="constrained")
    axes = figure.subplots(1, len(curves), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (name, (middle, low, high)) in zip(axes, curves.items(), strict=True):
        panel.scatter(*data, s=3, color="0.75")
        panel.fill_between(np.asarray(grid), low, high, color="C0", alpha=0.3, linewidth=0)
        panel.plot(grid, middle, color="C0")
        panel.set(title=name, xlabel=label)
    values = np.asarray(data[1])
    axes[0].set(ylabel="target", ylim=(2 * values.min(), 2 * values.max()))
    figure.suptitle("Predictive mean and 90 % band, the other features at their means")
    return figure


def overconfidence(
    posteriors: Mapping[str, tuple[ArrayLike, ArrayLike]], labels: tuple[str, str]
) -> Figure:
    """90 % regions of two weights under several posteriors.

    Args:
        posteriors: name -> (mean, covariance) of the pair, shapes `(2,)` and `(2, 2)`.
        labels: names of the two columns.
    """
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    radius = np.sqrt(-2 * np.log(0.1))
    for index, (name, (mean, covariance)) in enumerate(posteriors.items()):
        values, vectors = np.linalg.eigh(np.asarray(covariance))
        width, height = 2 * radius * np.sqrt(values)
        angle = np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0]))
        place = tuple(np.asarray(mean, dtype=float))
        axes.add_patch(
            Ellipse(place, width, height, angle=angle, fill=False, color=f"C{index}", label=name)
        )
        axes.plot(*place, "+", color=f"C{index}")
    axes.autoscale_view()
    axes.set(xlabel=f"weight of {labels[0]}", ylabel=f"weight of {labels[1]}")
    axes.set_title("Where mean field is overconfident: 90 % regions")
    axes.legend(fontsize=8)
    return figure
