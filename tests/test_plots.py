"""Pictures hold what they were given."""

import numpy as np
import pytest
import torch
from linear import Linear
from matplotlib.colors import to_rgb

from ppvae import account, calibration, families, plots
from ppvae._look import color, line, mark
from ppvae.evaluation import ranks
from ppvae.objectives import ELBO
from ppvae.training.result import Fit

#: what an eye without red or green cones sees
BLIND = [
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
     [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
     [-0.011820, 0.042940, 0.968881]],
]  # fmt: skip


def test_calibration():
    """The ranks against uniform ones, with the band, and the coverage."""
    linear = Linear(size=200)
    found = calibration(linear.model, linear.exact(), linear.x, num_samples=19, progress=False)
    left, right = plots.calibration(found).axes
    lines = left.get_lines()
    assert [line.get_label() for line in lines] == ["z[0]", "z[1]", "z[2]"]
    ends = np.linspace(0, 1, 21)
    below = (found["rank"].values[:, 1, None] < np.arange(21)).mean(0)
    assert np.allclose(lines[1].get_xydata(), np.stack([ends, below - ends], 1))
    points, low, high = ranks.ecdf_band(200, 19)
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    assert [band.min(), band.max()] == pytest.approx([(low - points).min(), (high - points).max()])
    assert np.array_equal(right.get_lines()[1].get_ydata(), found.coverage[:, 0])
    many = found.isel(latent=[0] * 11).assign_coords(latent=range(11))
    assert left.get_legend() and not plots.calibration(many).axes[0].get_legend()


def test_account():
    """Each bar begins where the one above ends; points lie outside, in marks of their own."""
    linear = Linear(size=4)
    guide = linear.guide(families.mean_scale, error=0.1)
    few = {"num_samples": 32, "num_steps": 9, "progress": False}
    found = account(linear.model, guide, linear.x, **few)
    (axes,) = plots.account(found).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == found.dataset.row.values.tolist() and "nats per datum" in axes.get_xlabel()
    bars = [bar.get_bbox() for bar in axes.patches]
    inside = found.dataset.summed.values
    ends, steps = found.dataset.running.values[inside], found.dataset["mean"].values[inside]
    starts = np.concatenate([[0.0], ends[:-1]])
    assert len(bars) == inside.sum() == len(names) - 1
    for bar, start, end in zip(bars, starts, ends, strict=True):
        assert sorted([bar.x0, bar.x1]) == pytest.approx(sorted([start, end]))
    hatched = [bool(bar.get_hatch()) for bar in axes.patches]
    assert hatched == (steps < 0).tolist() and True in hatched and False in hatched
    drawn = [line for line in axes.get_lines() if line.get_marker() == "D"]
    assert drawn[0].get_xydata().tolist() == [[float(found.dataset["mean"][-1]), len(names) - 1]]
    marks = {line.get_label(): line.get_xdata()[0] for line in axes.get_lines()}
    ends = dict(zip(found.dataset.row.values[inside], ends, strict=True))
    label = f"log p(x)  {ends['beyond_gaussian']:.2f}"
    assert marks[label] == pytest.approx(float(found.dataset.log_likelihood.mean()))
    label = f"ELBO of the guide  {ends['amortization_gap']:.2f}"
    assert marks[label] == pytest.approx(float(found.dataset.elbo.mean()))
    assert plots.account(found.dataset).axes
    with pytest.raises(ValueError, match="found: expected a result of ppvae.account, got dict"):
        plots.account({})


def test_encodings():
    """One panel per family, the clouds and then their means; a key and rates where given."""
    codes = {"a": np.random.default_rng(0).normal(size=(3, 50, 2)), "b": np.zeros((3, 50, 2))}
    codes["c"] = codes["a"]
    panels = plots.encodings(codes, columns=2).axes
    assert [panel.get_title() for panel in panels] == ["a", "b", "c", ""]
    assert [panel.axison for panel in panels] == [True] * 3 + [False]
    assert np.array_equal(panels[0].collections[0].get_offsets(), codes["a"][0])
    assert np.allclose(panels[0].collections[3].get_offsets(), codes["a"][0].mean(0))
    edge = np.abs(np.quantile(codes["a"], [0.01, 0.99])).max()
    assert np.allclose(panels[1].get_xlim(), (-1.1 * edge, 1.1 * edge))
    data = np.random.default_rng(0).uniform(size=(3, 2, 5))
    figure = plots.encodings(codes, images=data, rates={"a": 1.26, "c": 0})
    key, panels = figure.axes[:3], figure.axes[3:]
    assert all(np.array_equal(k.images[0].get_array(), x) for k, x in zip(key, data, strict=True))
    assert [panel.get_xlabel() for panel in panels] == ["rate 1.3 nats", "", "rate 0.0 nats"]
    for number, panel in enumerate(key):  # in the colour and with the mark of its cloud
        (mark,) = panel.lines
        cloud, mean = (panels[0].collections[number + k] for k in (0, 3))
        assert to_rgb(mark.get_color()) == tuple(cloud.get_facecolors()[0, :3])
        assert to_rgb(panel.spines["top"].get_edgecolor()) == tuple(mean.get_facecolors()[0, :3])
        path = mark._marker.get_path().transformed(mark._marker.get_transform())
        assert np.allclose(mean.get_paths()[0].vertices, path.vertices)
    with pytest.raises(ValueError, match=r"draws of a: expected shape \(data, repeats, 2\)"):
        plots.encodings({"a": np.zeros((3, 50, 3))})
    with pytest.raises(ValueError, match="images: expected one for each of 3 data, got 2"):
        plots.encodings(codes, images=data[:2])
    with pytest.raises(ValueError, match=r"rates: expected families .* got \['d'\]"):
        plots.encodings(codes, rates={"d": 1.0})


def test_images_of_any_shape():
    pixels = np.random.default_rng(0).uniform(size=(4, 3, 2, 5))
    for given, shown in [
        (pixels, pixels.transpose(0, 2, 3, 1)),
        (torch.tensor(pixels[:, :1]), pixels[:, 0]),
        (pixels[:, 0], pixels[:, 0]),
        (np.eye(4), np.eye(4).reshape(4, 2, 2)),
    ]:
        axes = plots.images({"data": given, "again": given[:3]}, title="t").axes
        assert len(axes) == 8
        assert np.array_equal(axes[1].images[0].get_array(), shown[1])
        assert np.array_equal(axes[6].images[0].get_array(), shown[2]) and not axes[7].images
    for bad, message in [
        (np.zeros((3, 5)), r"square images .* got \(3, 5\)"),
        (pixels[:, :2], r"one channel or three, got \(4, 2, 2, 5\)"),
        (np.zeros(4), r"shape \(count, side\^2\), got \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=f"rows, a: expected {message}"):
            plots.images({"a": bad})
    with pytest.raises(
        ValueError, match=r"rows: expected images of one size, \(2, 5\), got \(2, 2\)"
    ):
        plots.images({"a": pixels[:, 0], "b": np.eye(4)})


def test_interpolation_is_a_straight_line_of_codes():
    start, end = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5])
    rows = {"a": (lambda z: torch.cat([z, 1 - z], 1), start, end)}
    panels = plots.interpolation(rows, steps=5, title="t").axes
    assert len(panels) == 5
    for share, panel in zip(np.linspace(0, 1, 5), panels, strict=True):
        z = np.array([share, 1 - share / 2])
        assert np.allclose(panel.images[0].get_array(), [z, 1 - z])
    with pytest.raises(TypeError, match="rows, a: expected a function and two codes"):
        plots.interpolation({"a": (start, end)})
    with pytest.raises(ValueError, match=r"rows, a: expected shape \(2\), got \(1,\)"):
        plots.interpolation({"a": (torch.sigmoid, start, end[:1])})


def test_latents_by_class():
    """Two latents as they are, more of them along the axes on which they are spread most."""
    z = np.random.default_rng(0).normal(size=(300, 2)) * [3.0, 1.0]
    labels = np.array(["one", "two"])[(z[:, 0] > 1).astype(int)]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    figure = plots.latents(
        {"a": z, "b": np.pad(z - z.mean(0), ((0, 0), (0, 2))) @ turn + 5}, labels
    )
    left, right = figure.axes
    assert np.array_equal(left.collections[1].get_offsets(), z[labels == "two"])
    assert left.get_xlabel() == "first latent" and right.get_ylabel() == "second principal axis"
    values, directions = np.linalg.eigh(np.cov(z.T))
    axes = (z - z.mean(0)) @ directions[:, ::-1]
    assert np.allclose(np.abs(right.collections[0].get_offsets()), np.abs(axes[labels == "one"]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    with pytest.raises(ValueError, match=r"codes of a: expected shape \(299, latent\)"):
        plots.latents({"a": z}, labels[:-1])
    with pytest.raises(ValueError, match="codes of a: expected two latents or more"):
        plots.latents({"a": z[:, :1]}, labels)


def test_losses():
    """Of fits and of lists; with validation dotted, and a ring at the epoch that was kept."""
    fall = 10 * 0.9 ** np.arange(50.0)
    course = Fit([*fall], [*(fall + 1)], 0.0, 50, 30, "m", ELBO(), "eager")
    (axes,) = plots.losses({"a": course, "b": fall[:20] / 2}).axes
    a, held, ring, b = axes.lines
    assert np.array_equal(a.get_xydata(), np.stack([np.arange(1, 51), fall], 1))
    assert np.array_equal(held.get_ydata(), fall + 1) and a.get_color() == held.get_color()
    assert [*ring.get_xydata()[0]] == [31, fall[30] + 1]
    assert np.array_equal(b.get_ydata(), fall[:20] / 2) and b.get_color() != a.get_color()
    assert axes.get_ylim()[1] == pytest.approx((fall[5] + 1) * 1.05 - 0.05 * fall[-1])
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["a", "b"]
    plots.losses({"a": [1.0]})
    with pytest.raises(ValueError, match="fits, a: expected at least one loss"):
        plots.losses({"a": []})


def test_rate_and_distortion():
    """Points in the order of their ELBO, lines with its value, and curves with their bounds."""
    points = {"a": (0.0, 5.0), "b": (2.0, 2.5), "c": (2.0, 3.01)}
    (axes,) = plots.rate_distortion(points).axes
    marks = [line for line in axes.lines if line.get_marker() != "None"]
    assert np.array_equal([line.get_xydata()[0] for line in marks], list(points.values()))
    words = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert words == ["b  -4.5", "a  -5.0", "c  -5.0"]
    assert len(axes.texts) >= 3
    for text in axes.texts:  # at the end of a line on which rate and distortion sum to minus it
        assert sum(text.get_position()) == pytest.approx(-float(text.get_text()))
    curves = {"a": ([0.0, 1.0], [3.0, 2.0]), "b": ([0.5], [2.5])}
    more = {"bounds": {"c": ([0, 1], [1, 0])}, "labels": {"a": ["u", "v"]}, "title": "t"}
    (axes,) = plots.rate_distortion_curves(curves, **more).axes
    assert [line.get_label() for line in axes.lines] == ["c", "a", "b"]
    assert np.array_equal(axes.lines[1].get_xydata(), [[0.0, 3.0], [1.0, 2.0]])
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("u", (0, 3)), ("v", (1, 2))]
    assert axes.get_title() == "t"
    with pytest.raises(ValueError, match=r"curves: .* same length for a, got shapes \(2,\) and"):
        plots.rate_distortion_curves({"a": ([0.0, 1.0], [3.0])})
    with pytest.raises(ValueError, match="labels: expected 2 words for a"):
        plots.rate_distortion_curves(curves, labels={"a": ["u"]})
    with pytest.raises(ValueError, match=r"labels: expected families .* got \['d'\]"):
        plots.rate_distortion_curves(curves, labels={"d": ["u"]})


def test_looks_differ_and_every_eye_can_tell_them_apart():
    """Also one without red or green cones; and all marks and lines of the cycle differ.

    The matrices are those of Machado, Oliveira and Fernandes (2009) at full severity, on linear
    RGB; 0.1 is the distance of greys that differ by a tenth of the way from black to white.
    """
    marks = [tuple(mark(k).values()) for k in range(56)]
    assert len({*marks}) == 56 and len({tuple(line(k).values()) for k in range(28)}) == 28
    linear = np.array([to_rgb(color(k)) for k in range(7)]) ** 2.2
    for matrix in BLIND:
        seen = (linear @ np.array(matrix).T).clip(0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen, axis=-1) / 3**0.5
        assert apart[~np.eye(7, dtype=bool)].min() > 0.1
