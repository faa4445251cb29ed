"""Pictures of results; each function returns a matplotlib figure and touches no global state."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ppvae._checks import (
    as_doubles,
    check_array,
    check_count,
    check_mapping,
    check_real,
    check_share,
    expect,
)
from ppvae._look import color, empty, line, mark
from ppvae.evaluation.ranks import ecdf_band, ecdf_of
from ppvae.training.result import Fit

__all__ = [
    "account",
    "calibration",
    "encodings",
    "images",
    "interpolation",
    "latents",
    "losses",
    "rate_distortion",
    "rate_distortion_curves",
]

_DOTS: dict[str, Any] = {"alpha": 0.4, "linewidths": 0}
_IMAGES = {  # by the number of their dims
    2: ("count", "side^2"),
    3: ("count", "height", "width"),
    4: ("count", "channels", "height", "width"),
}


def account(found: Any) -> Figure:
    """What `ppvae.account` found: a waterfall from the noise of the data to the guide's ELBO.

    Each bar begins where the one above it ends; blue ones add nats, hatched ones take some away.
    Grey lines mark log p(x) and, dashed, the ELBO of the guide. Below the dotted line, outside of
    the sum, diamonds mark points, whose objective is no bound. Whiskers are standard errors of the
    draws.

    Args:
        found: a result of `ppvae.account`, or its dataset.

    Raises:
        ValueError: it is neither.
    """
    data = getattr(found, "dataset", found)
    known = isinstance(data, xr.Dataset) and {"running", "summed", "mean_se_draws"} <= {*data}
    expect(known, "found", "a result of ppvae.account", type(found).__name__)
    names, inside = [str(name) for name in data.row.values], data.summed.values
    figure = empty(7.8, 0.42 * len(names) + 1.6)
    axes = figure.subplots()
    ends, errors = data.running.values, data.mean_se_draws.values
    before = np.concatenate([[0.0], ends[inside][:-1]])
    for place, step in enumerate(data["mean"].values):
        whisker: dict[str, Any] = {"xerr": errors[place], "color": "black", "linewidth": 0.8}
        if not inside[place]:
            axes.plot(step, place, "D", color="black", markersize=7)
            axes.errorbar(step, place, **whisker)
            continue
        lost: dict[str, Any] = {"color": color(1), "hatch": "///", "edgecolor": "white"}
        style = {"color": color(0)} if step >= 0 else lost
        axes.barh(place, step, left=before[place], height=0.7, **style)
        axes.errorbar(ends[place], place, **whisker)
        axes.annotate(
            f"{round(float(step), 2) + 0.0:+.2f}",
            (max(ends[place], before[place]), place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        end = str(data.end.values[place])
        if end:
            kind: dict[str, Any] = {"linestyle": "-" if end == "log p(x)" else "--"}
            kind |= {"color": "0.5", "linewidth": 1.0, "label": f"{end}  {ends[place]:.2f}"}
            axes.axvline(ends[place], zorder=0, **kind)
    axes.axhline(inside.sum() - 0.5, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.set(
        ylim=(len(names) - 0.4, -1.5), xlabel=f"sum of the rows so far  [{data.attrs['unit']}]"
    )
    axes.use_sticky_edges = False
    axes.margins(x=0.1)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle("Where the nats go", fontsize=10)
    return figure


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
    figure = empty(9.6, 4.4)
    left, right = figure.subplots(1, 2)
    left.fill_between(ends, *(np.pad(edge - points, 1) for edge in (low, high)), color="0.88")
    right.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    several = found.sizes["latent"] > 10
    for index, name in enumerate(found.latent.values):
        one = found.sel(latent=name)
        style = line(index) | {"alpha": 0.4 if several else 1.0}
        shares = np.concatenate([[0.0], ecdf_of(rank[:, index], num_samples), [1.0]])
        left.plot(ends, shares - ends, linewidth=1.0, label=name, **style)
        right.errorbar(one.level, one.coverage, one.coverage_se, marker="o", markersize=3, **style)
    left.set(xlabel="rank of the true value, as a share", ylabel="ECDF - uniform")
    right.set(xlabel="level of the interval", ylabel="share of true values inside")
    if not several:
        left.legend(fontsize=7, ncols=2)
    figure.suptitle(found.attrs["reading"], fontsize=9, wrap=True)
    return figure


def encodings(
    draws: Mapping[str, ArrayLike],
    *,
    images: ArrayLike | None = None,
    rates: Mapping[str, float] | None = None,
    columns: int = 4,
) -> Figure:
    """The same few data encoded many times: one panel per family, one colour and mark per datum.

    Args:
        draws: family -> codes of shape `(data, repeats, 2)`.
        images: the data, in a shape that `plots.images` takes, to be shown above in their colours.
        rates: family -> nats per datum, to be written under its panel.
        columns: panels in a row.

    Raises:
        TypeError: there are others than real numbers among the codes, images or rates.
        ValueError: there are none, their shape is another, or one is not finite; or there is not
            one image for each datum, or a rate of another family.
    """
    check_mapping("draws", draws)
    arrays = {
        name: check_array(f"draws of {name}", codes, ("data", "repeats", 2))
        for name, codes in draws.items()
    }
    full = all(len(codes) and codes.shape[1] for codes in arrays.values())
    expect(full, "draws", "at least one datum and repeat", "none")
    given = rates is None or isinstance(rates, Mapping)
    expect(given, "rates", "a mapping from families", type(rates).__name__, TypeError)
    numbers = dict(rates or {})
    known, got = numbers.keys() <= arrays.keys(), sorted(numbers.keys() - arrays.keys(), key=str)
    expect(known, "rates", "families that are among the draws", got)
    columns = min(check_count("columns", columns), len(arrays))
    lines = math.ceil(len(arrays) / columns)
    figure: Any = empty(2.6 * columns, 2.8 * lines + (0.0 if images is None else 1.0))
    below = figure
    if images is not None:
        count = max(map(len, arrays.values()))
        above, below = figure.subfigures(2, 1, height_ratios=[1.0, 2.8 * lines])
        _key(above, _pixels("images", images), count)
    axes = below.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    spread = [np.abs(np.quantile(codes, [0.01, 0.99])).max() for codes in arrays.values()]
    limit = 1.1 * max(*spread, 1e-3)
    for panel, (name, codes) in zip(axes, arrays.items(), strict=False):
        for datum, cloud in enumerate(codes):
            panel.scatter(*cloud.T, s=5, color=color(datum), **_DOTS)
        for datum, cloud in enumerate(codes):  # above the clouds of all others
            panel.scatter(*cloud.mean(0), s=38, edgecolors="white", linewidths=0.8, **mark(datum))
        panel.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        if name in numbers:
            rate = float(check_array(f"rates of {name}", [numbers[name]], (1,))[0])
            panel.set_xlabel(f"rate {rate:.1f} nats", fontsize=9)
    for panel in axes[len(arrays) :]:
        panel.set_axis_off()
    below.supxlabel("first latent", fontsize=10)
    below.supylabel("second latent", fontsize=10)
    figure.suptitle("The same data, encoded many times (large: the mean of each cloud)")
    return figure


def _key(figure: Any, pixels: NDArray[np.float64], count: int) -> None:
    """Which datum has which colour and mark."""
    expect(len(pixels) == count, "images", f"one for each of {count} data", len(pixels))
    for datum, panel in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        _show(panel, pixels[datum])
        panel.plot(-0.3, 0.5, markersize=7, transform=panel.transAxes, clip_on=False, **mark(datum))
        panel.set_axis_on()
        panel.set(xticks=[], yticks=[])
        for side in panel.spines.values():
            side.set(color=color(datum), linewidth=2.0)


def images(rows: Mapping[str, ArrayLike], *, title: str = "") -> Figure:
    """Rows of images, one label each.

    Args:
        rows: label -> images, all of one size: `(count, channels, height, width)` with one channel
            or three, as a convolutional decoder gives them, `(count, height, width)`, or
            `(count, height * width)` with height = width. Pixels are in [0, 1], and one is black
            where there is one channel.
        title: a line above.

    Raises:
        TypeError: there are others than real numbers among the pixels.
        ValueError: there are none, the images have another shape, or a pixel is not finite.
    """
    check_mapping("rows", rows)
    arrays = {name: _pixels(f"rows, {name}", row) for name, row in rows.items()}
    shape = next(iter(arrays.values())).shape[1:]
    for name, row in arrays.items():
        got = f"{row.shape[1:]} for {name}"
        expect(row.shape[1:] == shape, "rows", f"images of one size, {shape}", got)
    count = max(len(row) for row in arrays.values())
    expect(count, "rows", "at least one image", "none")
    figure = empty(1.8 + 0.55 * count, 0.62 * len(arrays) + 0.4)
    axes = figure.subplots(len(arrays), count, squeeze=False)
    for panels, (name, row) in zip(axes, arrays.items(), strict=True):
        for panel in panels:
            panel.set_axis_off()
        for panel, image in zip(panels, row, strict=False):
            _show(panel, image)
        left = panels[0]
        left.text(-0.25, 0.5, name, transform=left.transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(title)
    return figure


def _pixels(name: str, values: Any) -> NDArray[np.float64]:
    """Images as an array of shape `(count, height, width)`, with three channels behind if so."""
    array = as_doubles(check_real(name, values, writable=False))
    array = check_array(name, array, _IMAGES.get(array.ndim, _IMAGES[2]))
    if array.ndim == 2:
        side = math.isqrt(array.shape[1])
        square = array.shape[1] == side * side
        expect(square, name, "square images (count, side^2)", array.shape)
        return array.reshape(-1, side, side)
    if array.ndim == 3:
        return array
    expect(array.shape[1] in (1, 3), name, "one channel or three", array.shape)
    return array[:, 0] if array.shape[1] == 1 else array.transpose(0, 2, 3, 1).clip(0, 1)


def _show(panel: Axes, image: NDArray[np.float64]) -> None:
    panel.imshow(image, cmap="gray_r", vmin=0, vmax=1)


def interpolation(
    rows: Mapping[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor]],
    *,
    steps: int = 9,
    title: str = "",
) -> Figure:
    """Images along the straight line from one code to another, one row for each pair of codes.

    Args:
        rows: label -> a function of codes of shape `(steps, latent)` that gives images in a shape
            that `plots.images` takes, such as the method `mean` of a VAE; and the two codes, of
            shape `(latent,)`.
        steps: images in a row, the two ends among them; at least 2.
        title: a line above.

    Raises:
        TypeError: a row is not a function and two codes.
        ValueError: codes are no finite vectors of the same length, or `steps` is below 2.

    Example:
        `plots.interpolation({"from 3 to 8": (model.mean, z[0], z[1])})`
    """
    shares = torch.linspace(0, 1, check_count("steps", steps, 2), dtype=torch.float64)[:, None]
    decoded = {}
    for name, row in check_mapping("rows", rows).items():
        good = isinstance(row, (list, tuple)) and len(row) == 3 and callable(row[0])
        expect(good, f"rows, {name}", "a function and two codes", repr(row), TypeError)
        decode, *ends = row
        start, end = (check_real(f"rows, {name}", code) for code in ends)
        expect(start.numel(), f"rows, {name}", "codes of at least one number", "none")
        for code in (start, end):
            check_array(f"rows, {name}", code, (start.numel(),))
        kind = torch.result_type(start, end)
        kind = kind if kind.is_floating_point else torch.get_default_dtype()
        line_of_codes = torch.lerp(start.to(kind), end.to(kind), shares.to(start.device, kind))
        with torch.no_grad():
            decoded[name] = decode(line_of_codes)
    return images(decoded, title=title)


def latents(codes: Mapping[str, ArrayLike], labels: Sequence[Any] | ArrayLike) -> Figure:
    """Codes by class: one panel per encoder, one colour and mark per class.

    Codes with more than two latents are seen along the two axes on which they are spread most
    (principal components of each panel's codes).

    Args:
        codes: name -> one code per datum, shape `(data, latent)`.
        labels: the class of each datum, shape `(data,)`.

    Raises:
        TypeError: there are others than real numbers among the codes.
        ValueError: there are none, they are no finite table, have one latent, or there is not one
            label for each.
    """
    listed = isinstance(labels, (Sequence, np.ndarray, Tensor)) or hasattr(labels, "to_numpy")
    expect(listed, "labels", "a list or an array", type(labels).__name__, TypeError)
    classes = np.asarray(labels)
    expect(classes.ndim == 1 and classes.size, "labels", "shape (data,)", classes.shape)
    figure = empty(3.4 * len(check_mapping("codes", codes)) + 0.8, 3.6)
    axes = figure.subplots(1, len(codes), squeeze=False)[0]
    for panel, (name, values) in zip(axes, codes.items(), strict=True):
        table = check_array(f"codes of {name}", values, (len(classes), "latent"))
        expect(table.shape[1] > 1, f"codes of {name}", "two latents or more", table.shape)
        names = "latent"
        if table.shape[1] > 2:
            _, _, directions = np.linalg.svd(table - table.mean(0), full_matrices=False)
            table, names = (table - table.mean(0)) @ directions[:2].T, "principal axis"
        for index, one in enumerate(np.unique(classes)):
            points = table[classes == one].T
            panel.scatter(*points, s=9, alpha=0.7, linewidths=0, label=str(one), **mark(index))
        panel.set(title=name, xlabel=f"first {names}", ylabel=f"second {names}")
    handles = axes[0].get_legend_handles_labels()
    legend = figure.legend(*handles, loc="outside right upper", fontsize=8, title="class")
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1.0)
    return figure


def losses(fits: Mapping[str, Fit | ArrayLike]) -> Figure:
    """The course of trainings: the loss after each epoch, in nats per datum.

    Dashed, the loss on the validation data, with a ring at the epoch that was kept. Of a long
    course the first tenth may lie above the picture, which would else show nothing but it.

    Args:
        fits: label -> what `fit` returned, or losses in a row.

    Raises:
        TypeError: there are others than these.
        ValueError: there are no losses, or one is not finite.
    """
    figure, tops = empty(7.8, 4.4), []
    axes = figure.subplots()
    for index, (name, result) in enumerate(check_mapping("fits", fits).items()):
        held = result.validation_losses if isinstance(result, Fit) else []
        values = result.losses if isinstance(result, Fit) else result
        course = check_array(f"fits, {name}", values, ("epoch",))
        expect(course.size, f"fits, {name}", "at least one loss", "none")
        axes.plot(np.arange(1, len(course) + 1), course, label=name, **line(index))
        tops.append(course[len(course) // 10 :].max())
        if isinstance(result, Fit) and held:
            axes.plot(np.arange(1, len(held) + 1), held, color=color(index), linestyle=(0, (1, 1)))
            at = result.best_epoch
            axes.plot(at + 1, held[at], "o", color=color(index), fillstyle="none")
            tops.append(max(held[len(held) // 10 :]))
    low = min(axes.dataLim.y0, *tops)
    axes.set(xlabel="epoch", ylabel="loss  [nats per datum]", title="Training")
    if max(tops) > low:
        axes.set_ylim(low - 0.05 * (max(tops) - low), max(tops) + 0.05 * (max(tops) - low))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def rate_distortion(points: Mapping[str, tuple[float, float]]) -> Figure:
    """The rate-distortion plane with a point per family and lines of equal ELBO.

    Args:
        points: family -> (rate, distortion), in nats per datum.

    Raises:
        TypeError, ValueError: there are none, or they are no pairs of finite numbers.
    """
    check_mapping("points", points)
    values = check_array("points", list(points.values()), ("families", 2))
    figure, axes = _plane((7.8, 4.8), "Rate and distortion (grey: lines of equal ELBO)")
    elbos = dict(zip(points, -values.sum(1), strict=True))
    for index, (name, point) in enumerate(zip(points, values, strict=True)):
        label = f"{name}  {elbos[name]:.1f}"
        axes.plot(*point, linestyle="none", markersize=7, label=label, zorder=2, **mark(index))
    (left, bottom), (right, top) = values.min(0), values.max(0)
    right, top = right + 0.1 * max(right - left, 1.0), top + 0.1 * max(top - bottom, 1.0)
    left, bottom = left - 0.1 * max(right - left, 1.0), bottom - 0.1 * max(top - bottom, 1.0)
    for total in MaxNLocator(7).tick_values(left + bottom, right + top):
        axes.axline((left, total - left), slope=-1, color="0.85", linewidth=0.8, zorder=0)
        x = min(right, total - bottom)  # where the line leaves the panel
        if left < x and total - x < top:
            style: dict[str, Any] = {"fontsize": 7, "color": "0.45", "ha": "right", "va": "bottom"}
            axes.text(x, total - x, f"{-total:g} ", **style)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda k: -list(elbos.values())[k])
    best_first = [handles[k] for k in order], [labels[k] for k in order]
    figure.legend(*best_first, fontsize=8, title="ELBO", loc="outside right upper")
    axes.set(xlim=(left, right), ylim=(bottom, top))
    return figure


def _plane(size: tuple[float, float], title: str) -> tuple[Figure, Axes]:
    """A figure with the axes of rate and distortion."""
    figure = empty(*size)
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
    labels: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
) -> Figure:
    """Distortion over rate, one line per family with a mark per fit, and bounds in grey.

    Args:
        curves: family -> (rates, distortions), equally long, in nats per datum.
        bounds: label -> (rates, distortions) of a curve to hold them against.
        labels: family -> a word for each of its marks, such as `"beta 2"`.
        title: a line above.

    Raises:
        TypeError: there are others than real numbers.
        ValueError: rates and distortions are not vectors of the same length, or not finite; labels
            are not those of a curve, one for each mark.
    """
    figure, axes = _plane((6.8, 5.0), title)
    check_mapping("curves", curves)
    for name, given in (("bounds", bounds), ("labels", labels)):
        known = given is None or isinstance(given, Mapping)
        expect(known, name, "a mapping from labels", type(given).__name__, TypeError)
    words = dict(labels or {})
    unknown = sorted(words.keys() - curves.keys(), key=str)
    expect(not unknown, "labels", "families that are among the curves", unknown)
    for kind, lines in (("bounds", bounds or {}), ("curves", curves)):
        for index, (name, pair) in enumerate(lines.items()):
            paired = isinstance(pair, (Sequence, np.ndarray)) and len(pair) == 2
            expect(paired, kind, f"a pair (rates, distortions) for {name}", pair)
            rates, distortions = (check_array(f"{kind}, {name}", part, ("k",)) for part in pair)
            alike = rates.shape == distortions.shape
            wanted = f"two vectors of the same length for {name}"
            expect(alike, kind, wanted, f"shapes {rates.shape} and {distortions.shape}")
            style: dict[str, Any] = {"color": "0.55", "linewidth": 2.5}
            style |= {"linestyle": ["-", ":", "--", "-."][index % 4]}
            if kind == "curves":
                style = {"linewidth": 1, "markersize": 5, "fillstyle": "none", **mark(index)}
            axes.plot(rates, distortions, label=name, **style)
            if kind == "curves" and name in words:
                got = words[name]
                fitting = isinstance(got, Sequence) and len(got) == len(rates)
                expect(fitting, "labels", f"{len(rates)} words for {name}", got)
                right = list(words).index(name) % 2 == 0  # the next ones on the other side
                place: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7}
                place |= {"ha": "left", "va": "bottom"} if right else {"ha": "right", "va": "top"}
                place |= {"xytext": (5, 2) if right else (-5, -2), "color": color(index)}
                for word, rate, distortion in zip(got, rates, distortions, strict=True):
                    axes.annotate(str(word), (rate, distortion), **place)
    axes.margins(0.13, 0.07)
    axes.legend(fontsize=8)
    return figure
