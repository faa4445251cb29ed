"""A prior that the data contradict is warned of, and no other is."""

import warnings

import numpy as np
import pyro.distributions as dist
import pytest
from sklearn.datasets import load_diabetes

from ppvae.regression import ConjugateNormal, exact_posterior, factorize, g_prior

UNIT = dist.Normal(0.0, 1.0)
DIABETES = load_diabetes(return_X_y=True)


def simulated(seed, rows=60, columns=4, scale=1.0):
    """Data of weights that are Normal, with a half-normal noise."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(rows, columns))
    line = X @ (scale * generator.normal(size=columns))
    return X, line + abs(generator.normal()) * generator.normal(size=rows)


def words_of(*data, **priors):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exact_posterior(*data, **priors)
    (warned,) = caught or (None,)
    return "" if warned is None else str(warned.message)


def test_the_defaults_on_data_as_loaded():
    """Where they predict nothing; the ways out that are told are ways out."""
    X, y = DIABETES
    words = words_of(X, y)
    assert words.startswith("prior and data disagree: ") and "a noise near" in words
    post = exact_posterior(X, y, scale="data", intercept=True)  # which warns of nothing
    assert post.r2 == pytest.approx(0.5177, abs=1e-3)  # of least squares 0.51775
    standard = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    assert exact_posterior(*standard).r2 == pytest.approx(0.5177, abs=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_data_of_the_prior_are_no_conflict(seed):
    """Each word is one in some 15,000 (4 sds, or 8 nats), and 20 data sets are seen."""
    X, y = simulated(seed)
    for priors in (dict(noise=dist.HalfNormal(1.0)), dict(noise=dist.HalfCauchy(1.0))):
        assert words_of(X, y, weight=UNIT, **priors) == ""
    assert words_of(X, y, weight=None, noise=None, intercept=True) == ""
    half = dist.HalfNormal(1.0)
    scaled = simulated(seed, scale=abs(np.random.default_rng(100 + seed).normal()))
    assert words_of(*scaled, weight=UNIT, noise=half, scale=half) == ""
    assert words_of(X[:0], y[:0], weight=UNIT, noise=dist.HalfNormal(1.0)) == ""


def test_each_conflict_is_named():
    X, y = simulated(0)
    table = factorize(X, y + 30 * X[:, 2], names=["a", "b", "c", "d"])
    words = words_of(table, weight=UNIT, noise=1.0)
    assert "weight[c] by" in words and "weight[a]" not in words
    near = 100 * X.sum(1) + 10 * y
    assert "times as wide have" in words_of(X, near, weight=UNIT, noise=None)
    assert "a known noise of 0.01, where " in words_of(X, y, weight=UNIT, noise=0.01)
    assert "a noise near" in words_of(X, 100 * y, weight=None, noise=dist.HalfNormal(1.0))
    assert "a noise near" in words_of(X, y, weight=None, noise=dist.LogNormal(9.0, 0.1))
    tenth = ConjugateNormal(0.0, 1e-2)
    assert "times as wide" in words_of(X, near, weight=tenth, noise=None)


@pytest.mark.parametrize("ends", [(20.0, 21.0), (20.0, 20.01), (1e-3, 0.01)])
def test_a_noise_outside_of_the_ends_of_its_prior_is_a_conflict(ends):
    """Within them the prior is flat, so that its density says nothing."""
    X, y = simulated(0)
    assert "is likely" in words_of(X, y, weight=UNIT, noise=dist.Uniform(*ends))
    for around in ((0.0, 100.0), (0.1, 20.0)):
        assert words_of(X, y, weight=UNIT, noise=dist.Uniform(*around)) == ""


@pytest.mark.parametrize("noise", [1.0, None, dist.HalfNormal(1.0)])
@pytest.mark.parametrize("kind", [dist.Normal, ConjugateNormal])
def test_an_unknown_scale_is_judged_where_its_posterior_is(noise, kind):
    generator = np.random.default_rng(0)
    X = generator.normal(size=(60, 4))
    near = X @ np.array([90.0, -110.0, 95.0, 105.0]) + generator.normal(size=60)
    weight = kind(0.0, 1.0)
    words = words_of(X, near, weight=weight, noise=noise, scale=dist.HalfNormal(1.0))
    assert "weight[1] by" in words and "times as wide have" in words and "a scale near" in words
    # whose density says nothing within the ends of its prior
    words = words_of(X, near, weight=weight, noise=noise, scale=dist.Uniform(0.0, 5.0))
    assert "times as wide have" in words and "a scale near" not in words
    # and one that is far larger than the weights are is as a known one is
    for wide in (dist.HalfCauchy(10.0), dist.Uniform(0.0, 1e3), dist.LogNormal(9.0, 0.1)):
        assert words_of(X, near, weight=weight, noise=noise, scale=wide) == ""


def test_one_weight_apart_from_those_of_an_unknown_scale_is_named():
    """The scale is that of all of them, about `10 / sqrt(30)`, and that one 5 times as large."""
    generator = np.random.default_rng(0)
    X = generator.normal(size=(200, 30))
    y = 10 * X[:, 7] + generator.normal(size=200)
    words = words_of(X, y, weight=UNIT, noise=1.0, scale=dist.HalfNormal(10.0))
    assert "away from the prior's: weight[7] by 5." in words and "times" not in words


def test_an_exact_function_of_the_columns_is_no_conflict():
    """The noise is at the end of its prior, and none suits better than zero."""
    X, _ = simulated(0)
    floor = dist.TransformedDistribution(
        dist.HalfNormal(1.0), [dist.transforms.AffineTransform(1e-6, 1.0)]
    )
    for scale in (None, 2.0, dist.HalfNormal(1.0), dist.HalfCauchy(1.0)):
        for y in (X[:, 0], X @ [1.0, -1.0, 2.0, 0.5], 0 * X[:, 0]):
            assert words_of(X, y, weight=UNIT, noise=floor, scale=scale, intercept=True) == ""


def test_data_that_come_later_may_be_in_conflict_too():
    X, y = simulated(0)
    post = exact_posterior(X[:5], y[:5], weight=UNIT, noise=dist.HalfNormal(1.0))
    with pytest.warns(UserWarning, match="^prior and data disagree: .*a noise near"):
        post.update(X[5:], 100 * y[5:])
    post.update(X[5:], y[5:])  # which warns of nothing


def test_wide_priors_and_unknown_scales_are_no_conflict():
    X, y = simulated(1)
    for weight in (dist.Normal(0.0, 1e4), ConjugateNormal(0.0, 1e4), g_prior(X, 1e6)):
        assert words_of(X, y, weight=weight, noise=dist.HalfNormal(1e4)) == ""
    assert words_of(X, 100 * y, weight=UNIT, noise=None, scale=dist.HalfCauchy(1.0)) == ""
    inverse = dist.LogNormal(0.0, 1.0)  # which keeps away from a noise of zero
    assert "noise near" in words_of(X, 0 * y, weight=UNIT, noise=inverse)
    small = y / 1e3  # a noise that is small is what a half-normal expects, among others
    assert words_of(X, small, weight=UNIT, noise=dist.HalfNormal(1.0)) == ""
    assert words_of(X, small, weight=UNIT, noise=dist.HalfCauchy(1.0)) == ""
