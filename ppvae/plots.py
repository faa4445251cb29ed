"""Pictures of the ladder; each function returns a matplotlib figure and touches no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ppvae.evaluation.ranks import ecdf_band, ecdf_of

__all__ = ["calibration", "encodings", "images", "rate_distortion", "rate_distortion_curves"]


def calibration(found: xr.Dataset, *, level: float = 0.95) -> Figure:
    """What `ppvae.calibration` found: ranks against uniform ones, and coverage against its level.

    Left, for each latent the cumulative distribution of the ranks less that of uniform ones, with
    a grey band that holds the whole of an exact guide's line with a chance of `level`: an arch
    above says draws too high, one below too low; first above and then below, intervals too narrow.
    Right, the share of true values inside central intervals, with standard errors.

    Args:
        found: a result of `ppvae.calibration`.
        level: of the band, for one latent.
    """
    rank, num_samples = found["rank"].values, found.attrs["num_samples"]
    points, low, high = ecdf_band(len(rank), num_samples, level)
    ends = np.concatenate([[0.0], points, [1.0]])
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    pad = np.zeros(1)
    left.fill_between(
        ends,
        np.concatenate([pad, low - points, pad]),
        np.concatenate([pad, high - points, pad]),
        color="0.88",
    )
    right.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    several = found.sizes["latent"] <= 10
    for index, name in enumerate(found.latent.values):
        one = found.sel(latent=name)
        style = {"color": f"C{index % 10}", "alpha": 1.0 if several else 0.4}
        shares = np.concatenate([pad, ecdf_of(rank[:, index], num_samples), pad + 1])
        left.plot(ends, shares - ends, linewidth=1.0, label=name, **style)
        right.errorbar(one.level, one.coverage, one.coverage_se, marker="o", markersize=3, **style)
    left.set(xlabel="rank of the true value, as a share", ylabel="ECDF - uniform")
    right.set(xlabel="level of the interval", ylabel="share of true values inside")
    if several:
        left.legend(fontsize=7, ncols=2)
    figure.suptitle(found.attrs["reading"], fontsize=9, wrap=True)
    return figure


def encodings(draws: Mapping[str, ArrayLike], *, columns: int = 4) -> Figure:
    """The same few data encoded many times, one panel per family and one colour per datum.

    Args:
        draws: family -> codes of shape `(data, repeats, 2)`.
        columns: panels in a row.
    """
    arrays = {name: np.asarray(codes) for name, codes in draws.items()}
    for name, codes in arrays.items():
        if codes.ndim != 3 or codes.shape[-1] != 2:
            raise ValueError(
                f"draws: expected shape (data, repeats, 2), got {codes.shape} for {name}"
            )
    rows = math.ceil(len(arrays) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.7 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    spread = [np.abs(np.quantile(codes, [0.01, 0.99])).max() for codes in arrays.values()]
    limit = 1.1 * max(*spread, 1e-3)
    for panel, (name, codes) in zip(axes, arrays.items(), strict=False):
        for datum, cloud in enumerate(codes):
            panel.scatter(*cloud.T, s=4, alpha=0.35, color=f"C{datum % 10}", linewidths=0)
            panel.scatter(
                *cloud.mean(0), s=26, color=f"C{datum % 10}", edgecolors="black", linewidths=0.8
            )
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
    """
    arrays = {name: np.asarray(row) for name, row in rows.items()}
    side = math.isqrt(next(iter(arrays.values())).shape[-1])
    for name, row in arrays.items():
        if row.ndim != 2 or row.shape[-1] != side * side:
            raise ValueError(
                f"rows: expected square images (count, side^2), got {row.shape} for {name}"
            )
    count = max(len(row) for row in arrays.values())
    figure = Figure(figsize=(1.8 + 0.55 * count, 0.62 * len(arrays) + 0.4), layout="constrained")
    axes = figure.subplots(len(arrays), count, squeeze=False)
    for line, (name, row) in zip(axes, arrays.items(), strict=True):
        for panel in line:
            panel.set_axis_off()
        for panel, image in zip(line, row, strict=False):
            panel.imshow(image.reshape(side, side), cmap="gray_r", vmin=0, vmax=1)
        line[0].text(
            -0.25, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
    figure.suptitle(title)
    return figure


def rate_distortion(points: Mapping[str, tuple[float, float]]) -> Figure:
    """The rate-distortion plane with a point per family and lines of equal objective.

    Args:
        points: family -> (rate, distortion), in nats per datum.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    rates, distortions = np.array(list(points.values())).T
    reach = np.array([-0.08, 1.25]) * max(rates.max(), 1.0)
    for total in np.unique(np.round(rates + distortions)):
        axes.plot(reach, total - reach, color="0.88", linewidth=0.8, zorder=0)
    for index, (rate, distortion) in enumerate(points.values()):
        axes.scatter(rate, distortion, color=f"C{index % 10}", zorder=2)
    _label(axes, points)
    pad = 0.1 * (distortions.max() - distortions.min() + 1.0)
    axes.set(
        xlabel="rate  KL(q(z|x) || p(z))  [nats per datum]",
        ylabel="distortion  -E log p(x|z)  [nats per datum]",
        xlim=reach,
        ylim=(distortions.min() - pad, distortions.max() + pad),
        title="Rate and distortion (grey: lines of equal ELBO)",
    )
    return figure


def _label(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes the names to the right of the points, pushed apart where they would collide."""
    ordered = sorted(points.items(), key=lambda item: item[1][1])
    values = np.array([value for _, value in points.values()])
    gap = 0.045 * (values.max() - values.min() + 1.0)
    last = -math.inf
    for name, (rate, distortion) in ordered:
        height = max(distortion, last + gap)
        last = height
        axes.annotate(
            name,
            (rate, distortion),
            (rate + 0.35, height),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5},
        )


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
        ValueError: rates and distortions are not vectors of the same length.
    """
    figure = Figure(figsize=(6.8, 5.0), layout="constrained")
    axes = figure.subplots()
    for kind, lines in (("bounds", bounds or {}), ("curves", curves)):
        for index, (name, pair) in enumerate(lines.items()):
            rates, distortions = (np.asarray(part) for part in pair)
            if rates.ndim != 1 or rates.shape != distortions.shape:
                raise ValueError(
                    f"{kind}: expected two vectors of the same length for {name}, got shapes "
                    f"{rates.shape} and {distortions.shape}"
                )
            if kind == "bounds":
                style = ["-", ":", "--", "-."][index % 4]
                axes.plot(rates, distortions, style, color="0.55", linewidth=2.5, label=name)
            else:
                axes.plot(
                    rates, distortions, "os^Dvpx"[index % 7], linestyle="-", label=name,
                    color=f"C{index % 10}", markersize=5, linewidth=1, fillstyle="none",
                )  # fmt: skip
    axes.set(
        xlabel="rate  KL(q(z|x) || p(z))  [nats per datum]",
        ylabel="distortion  -E log p(x|z)  [nats per datum]",
        title=title,
    )
    axes.legend(fontsize=8)
    return figure
