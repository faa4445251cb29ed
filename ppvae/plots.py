"""Pictures of results; each function returns a matplotlib figure and touches no global state."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ppvae._checks import check_array, check_count, check_mapping, check_share, expect
from ppvae.evaluation.ranks import ecdf_band, ecdf_of

__all__ = ["calibration", "encodings", "images", "rate_distortion", "rate_distortion_curves"]

Style = dict[str, Any]

# the name of a point, with a line to it
_NAME: Style = {"fontsize": 8, "va": "center"}
_NAME["arrowprops"] = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5}


def calibration(found: xr.Dataset, *, level: float = 0.95) -> Figure:
    """What `ppvae.calibration` found: ranks against uniform ones, and coverage against its level.

    Left, for each latent the cumulative distribution of the ranks less that of uniform ones, with
    a grey band that holds the whole of an exact guide's line with a chance of `level`: an arch
    above says draws too high, one below too low; first above and then below, intervals too narrow.
    Right, the share of true values inside central intervals, with standard errors.

    Args:
        found: a result of `ppvae.calibration`.
        level: of the band, for one latent, in (0, 1).

    Raises:
        ValueError: `level` is not in (0, 1), or `found` is no result of `calibration`.
    """
    level = check_share("level", level)
    known = isinstance(found, xr.Dataset) and "rank" in found
    expect(known, "found", "a result of ppvae.calibration", type(found).__name__)
    rank, num_samples = found["rank"].values, found.attrs["num_samples"]
    points, low, high = ecdf_band(len(rank), num_samples, level)
    ends = np.concatenate([[0.0], points, [1.0]])
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.fill_between(ends, *(np.pad(edge - points, 1) for edge in (low, high)), color="0.88")
    right.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    several = found.sizes["latent"] > 10
    for index, name in enumerate(found.latent.values):
        one = found.sel(latent=name)
        style: Style = {"color": f"C{index % 10}", "alpha": 0.4 if several else 1.0}
        shares = np.concatenate([[0.0], ecdf_of(rank[:, index], num_samples), [1.0]])
        left.plot(ends, shares - ends, linewidth=1.0, label=name, **style)
        right.errorbar(one.level, one.coverage, one.coverage_se, marker="o", markersize=3, **style)
    left.set(xlabel="rank of the true value, as a share", ylabel="ECDF - uniform")
    right.set(xlabel="level of the interval", ylabel="share of true values inside")
    if not several:
        left.legend(fontsize=7, ncols=2)
    figure.suptitle(found.attrs["reading"], fontsize=9, wrap=True)
    return figure


def encodings(draws: Mapping[str, ArrayLike], *, columns: int = 4) -> Figure:
    """The same few data encoded many times, one panel per family and one colour per datum.

    Args:
        draws: family -> codes of shape `(data, repeats, 2)`.
        columns: panels in a row.

    Raises:
        TypeError: there are others than real numbers among the codes.
        ValueError: there are none, their shape is another, or one is not finite.
    """
    check_mapping("draws", draws)
    arrays = {
        name: check_array(f"draws of {name}", codes, ("data", "repeats", 2))
        for name, codes in draws.items()
    }
    full = all(len(codes) and codes.shape[1] for codes in arrays.values())
    expect(full, "draws", "at least one datum and repeat", "none")
    columns = check_count("columns", columns)
    rows = math.ceil(len(arrays) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    spread = [np.abs(np.quantile(codes, [0.01, 0.99])).max() for codes in arrays.values()]
    limit = 1.1 * max(*spread, 1e-3)
    for panel, (name, codes) in zip(axes, arrays.items(), strict=False):
        for datum, cloud in enumerate(codes):
            color = f"C{datum % 10}"
            panel.scatter(*cloud.T, s=4, alpha=0.35, linewidths=0, color=color)
            panel.scatter(*cloud.mean(0), s=26, edgecolors="black", linewidths=0.8, color=color)
        panel.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    for panel in axes[len(arrays) :]:
        panel.set_axis_off()
    figure.suptitle("The same images, encoded many times (dots: mean of each cloud)")
    return figure


def images(rows: Mapping[str, ArrayLike], *, title: str = "") -> Figure:
    """Rows of images, one label each.

    Args:
        rows: label -> images of shape `(count, height * width)` with height = width.
        title: a line above.

    Raises:
        TypeError: there are others than real numbers among the pixels.
        ValueError: there are none, the images are not square, or a pixel is not finite.
    """
    check_mapping("rows", rows)
    arrays = {
        name: check_array(f"rows, {name}", row, ("count", "side^2")) for name, row in rows.items()
    }
    side = math.isqrt(next(iter(arrays.values())).shape[-1])
    for name, row in arrays.items():
        square = row.shape[-1] == side * side
        expect(square, "rows", "square images (count, side^2)", f"{row.shape} for {name}")
    count = max(len(row) for row in arrays.values())
    expect(count, "rows", "at least one image", "none")
    figure = Figure(figsize=(1.8 + 0.55 * count, 0.62 * len(arrays) + 0.4), layout="constrained")
    axes = figure.subplots(len(arrays), count, squeeze=False)
    for line, (name, row) in zip(axes, arrays.items(), strict=True):
        for panel in line:
            panel.set_axis_off()
        for panel, image in zip(line, row, strict=False):
            panel.imshow(image.reshape(side, side), cmap="gray_r", vmin=0, vmax=1)
        left = line[0]
        left.text(-0.25, 0.5, name, transform=left.transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(title)
    return figure


def rate_distortion(points: Mapping[str, tuple[float, float]]) -> Figure:
    """The rate-distortion plane with a point per family and lines of equal objective.

    Args:
        points: family -> (rate, distortion), in nats per datum.

    Raises:
        TypeError, ValueError: there are none, or they are no pairs of finite numbers.
    """
    check_mapping("points", points)
    values = check_array("points", list(points.values()), ("families", 2)).T
    figure, axes = _plane((6.4, 4.8), "Rate and distortion (grey: lines of equal ELBO)")
    rates, distortions = values
    reach = np.array([-0.08, 1.25]) * max(rates.max(), 1.0)
    for total in np.unique(np.round(rates + distortions)):
        axes.plot(reach, total - reach, color="0.88", linewidth=0.8, zorder=0)
    for index, point in enumerate(values.T):
        axes.scatter(*point, color=f"C{index % 10}", zorder=2)
    height, spread = -math.inf, np.ptp(distortions) + 1.0
    for name, (rate, distortion) in sorted(points.items(), key=lambda item: item[1][1]):
        height = max(distortion, height + 0.045 * spread)  # apart from the name below
        axes.annotate(name, (rate, distortion), (rate + 0.35, height), **_NAME)
    ends = distortions.min() - 0.1 * spread, distortions.max() + 0.1 * spread
    axes.set(xlim=reach, ylim=ends)
    return figure


def _plane(size: tuple[float, float], title: str) -> tuple[Figure, Axes]:
    """A figure with the axes of rate and distortion."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(
        xlabel="rate  KL(q(z|x) || p(z))  [nats per datum]",
        ylabel="distortion  -E log p(x|z)  [nats per datum]",
        title=title,
    )
    return figure, axes


def rate_distortion_curves(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    bounds: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    title: str = "",
) -> Figure:
    """Distortion over rate, one line per family with a mark per fit, and bounds in grey.

    Args:
        curves: family -> (rates, distortions), equally long, in nats per datum.
        bounds: label -> (rates, distortions) of a curve to hold them against.
        title: a line above.

    Raises:
        TypeError: there are others than real numbers.
        ValueError: rates and distortions are not vectors of the same length, or not finite.
    """
    figure, axes = _plane((6.8, 5.0), title)
    check_mapping("curves", curves)
    known, got = bounds is None or isinstance(bounds, Mapping), type(bounds).__name__
    expect(known, "bounds", "a mapping from labels", got, TypeError)
    for kind, lines in (("bounds", bounds or {}), ("curves", curves)):
        for index, (name, pair) in enumerate(lines.items()):
            paired = isinstance(pair, (Sequence, np.ndarray)) and len(pair) == 2
            expect(paired, kind, f"a pair (rates, distortions) for {name}", pair)
            rates, distortions = (check_array(f"{kind}, {name}", part, ("k",)) for part in pair)
            alike = rates.shape == distortions.shape
            wanted = f"two vectors of the same length for {name}"
            expect(alike, kind, wanted, f"shapes {rates.shape} and {distortions.shape}")
            style: Style = {"color": "0.55", "linewidth": 2.5}
            style |= {"linestyle": ["-", ":", "--", "-."][index % 4]}
            if kind == "curves":
                style = {"color": f"C{index % 10}", "linewidth": 1}
                style |= {"marker": "os^Dvpx"[index % 7], "markersize": 5, "fillstyle": "none"}
            axes.plot(rates, distortions, label=name, **style)
    axes.legend(fontsize=8)
    return figure
