"""Pictures hold what they were given."""

import numpy as np
import pytest
from linear import Linear

from ppvae import calibration, plots
from ppvae.evaluation import ranks


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


def test_encodings_and_images():
    codes = {"a": np.random.default_rng(0).normal(size=(3, 50, 2)), "b": np.zeros((3, 50, 2))}
    codes["c"] = codes["a"]
    panels = plots.encodings(codes, columns=2).axes
    assert [panel.get_title() for panel in panels] == ["a", "b", "c", ""]
    assert [panel.axison for panel in panels] == [True] * 3 + [False]
    assert np.array_equal(panels[0].collections[0].get_offsets(), codes["a"][0])
    assert np.allclose(panels[0].collections[1].get_offsets(), codes["a"][0].mean(0))
    edge = np.abs(np.quantile(codes["a"], [0.01, 0.99])).max()
    assert np.allclose(panels[1].get_xlim(), (-1.1 * edge, 1.1 * edge))
    rows = {"data": np.eye(4)[:, :4], "again": np.eye(4)}
    axes = plots.images(rows, title="t").axes
    assert len(axes) == 8
    assert np.array_equal(axes[5].images[0].get_array(), rows["again"][1].reshape(2, 2))
    with pytest.raises(ValueError, match=r"draws of a: expected shape \(data, repeats, 2\)"):
        plots.encodings({"a": np.zeros((3, 50, 3))})
    with pytest.raises(ValueError, match=r"rows: expected square images .* got \(3, 5\) for a"):
        plots.images({"a": np.zeros((3, 5))})


def test_rate_and_distortion():
    """Points with names that do not collide, lines of equal sum, and curves with their bounds."""
    points = {"a": (0.0, 5.0), "b": (2.0, 3.0), "c": (2.0, 3.01)}
    (axes,) = plots.rate_distortion(points).axes
    assert np.array_equal([c.get_offsets()[0] for c in axes.collections], list(points.values()))
    assert {round(line.get_xydata()[0].sum(), 6) for line in axes.lines} == {5.0}
    names = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert names["b"] == 3.0 and names["a"] == 5.0
    assert names["c"] == pytest.approx(3.0 + 0.045 * 3.0)  # apart by a share of the height
    assert axes.get_ylim() == pytest.approx((3.0 - 0.3, 5.0 + 0.3))
    curves = {"a": ([0.0, 1.0], [3.0, 2.0]), "b": ([0.5], [2.5])}
    (axes,) = plots.rate_distortion_curves(curves, bounds={"c": ([0, 1], [1, 0])}, title="t").axes
    assert [line.get_label() for line in axes.lines] == ["c", "a", "b"]
    assert np.array_equal(axes.lines[1].get_xydata(), [[0.0, 3.0], [1.0, 2.0]])
    assert axes.get_title() == "t"
    with pytest.raises(ValueError, match=r"curves: .* same length for a, got shapes \(2,\) and"):
        plots.rate_distortion_curves({"a": ([0.0, 1.0], [3.0])})
