"""Predictions and distribution functions, against closed forms, leave-one-out and quantiles."""

import numpy as np
import pyro.distributions as dist
import pytest
from scipy import stats

from ppvae.regression import exact_posterior, factorize

# what is said of priors that are far from the data is asked for in test_conflict.py
pytestmark = pytest.mark.filterwarnings("ignore:prior and data disagree")

GENERATOR = np.random.default_rng(1)
ROWS, COLUMNS = 25, 3
X = GENERATOR.normal(size=(ROWS, COLUMNS))
Y = 2.0 + X @ [1.0, -0.5, 0.0] + 0.7 * GENERATOR.normal(size=ROWS)
NEW = GENERATOR.normal(size=(6, COLUMNS))
THERE = np.column_stack([np.ones(6), NEW])
WEIGHTS = np.array([1.0, 4.0, 0.25, 1.0, 2.0, 9.0])
OFFSET = np.array([0.0, 1.0, -2.0, 0.0, 0.5, 0.0])
HALF = dist.HalfNormal(2.0)
UNIT = dist.Normal(0.0, 1.0)
FLAT = dict(weight=None, noise=None, intercept=True)
BOTH = dict(weight=UNIT, noise=HALF, scale=dist.HalfNormal(1.0), intercept=True)


def test_a_known_noise_gives_normals():
    post = exact_posterior(X, Y, weight=UNIT, noise=0.7, intercept=True)
    new = post.predict(NEW, weights=WEIGHTS, offset=OFFSET)
    line = np.sqrt(np.einsum("ij,jk,ik->i", THERE, post.covariance, THERE))
    mean, sd = THERE @ post.mean + OFFSET, np.sqrt(line**2 + 0.49 / WEIGHTS)
    np.testing.assert_allclose(new.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(new.epistemic_sd, line, rtol=1e-12)
    np.testing.assert_allclose(new.noise_sd, 0.7 / np.sqrt(WEIGHTS), rtol=1e-12)
    np.testing.assert_allclose(new.sd, sd, rtol=1e-12)
    fn = stats.norm(mean, sd)
    y = mean + np.linspace(-3, 3, 6)
    np.testing.assert_allclose(new.log_prob(y), fn.logpdf(y), rtol=1e-12)
    np.testing.assert_allclose(new.cdf(y), fn.cdf(y), rtol=1e-10)
    np.testing.assert_allclose(new.interval(0.8), fn.interval(0.8), rtol=1e-10)
    np.testing.assert_allclose(new.quantile([0.1, 0.9]), fn.interval(0.8), rtol=1e-10)
    np.testing.assert_allclose(
        new.interval(0.8, line=True), stats.norm(mean, line).interval(0.8), rtol=1e-10
    )
    each = exact_posterior(X, Y, weight=UNIT, noise=np.full(len(X), 0.7), intercept=True)
    other = each.predict(NEW, noise=0.7 / np.sqrt(WEIGHTS), offset=OFFSET)
    np.testing.assert_allclose(other.sd, sd, rtol=1e-12)


def test_flat_priors_give_student_t():
    """As least squares does, with one degree of freedom less for p(s) = 1 in place of 1 / s."""
    post, free = exact_posterior(X, Y, **FLAT), ROWS - COLUMNS - 2
    design = np.column_stack([np.ones(ROWS), X])
    squares, left = np.linalg.lstsq(design, Y, rcond=None)[:2]
    inner = np.linalg.inv(design.T @ design)
    size = np.sqrt(left[0] / free * (1 + np.einsum("ij,jk,ik->i", THERE, inner, THERE)))
    fn = stats.t(free, THERE @ squares, size)
    new = post.predict(NEW)
    y = fn.mean() + np.array([-30.0, -3.0, -0.1, 0.0, 2.0, 40.0])
    np.testing.assert_allclose(new.log_prob(y), fn.logpdf(y), rtol=1e-9)
    weighted = post.predict(NEW, weights=WEIGHTS, offset=OFFSET)
    far = np.arange(6) % 2 * 1e6 + y  # where the noise is none that the data have
    inner = 1 / WEIGHTS + np.einsum("ij,jk,ik->i", THERE, inner, THERE)
    wide = stats.t(free, THERE @ squares + OFFSET, np.sqrt(left[0] / free * inner))
    np.testing.assert_allclose(weighted.log_prob(far), wide.logpdf(far), rtol=1e-9)
    np.testing.assert_allclose(new.cdf(y), fn.cdf(y), rtol=1e-8, atol=1e-20)
    np.testing.assert_allclose(new.sd, fn.std(), rtol=1e-9)
    np.testing.assert_allclose(new.quantile(0.999), fn.ppf(0.999), rtol=1e-9)
    np.testing.assert_allclose(new.sd**2, new.epistemic_sd**2 + new.noise_sd**2, rtol=1e-12)
    # and the weights themselves, far into the tails
    inner = np.linalg.inv(design.T @ design)
    weight = stats.t(free, squares, np.sqrt(left[0] / free * np.diag(inner)))
    np.testing.assert_allclose(post.prob_positive[:4], weight.sf(0.0), rtol=1e-8)
    np.testing.assert_allclose(post.cdf(0.4)[:4], weight.cdf(0.4), rtol=1e-8)
    # s^2 is an inverse gamma
    noise = stats.invgamma((free) / 2, scale=left[0] / 2)
    for s in (0.3, 0.7, 1.5):
        assert post.cdf(s)[4] == pytest.approx(noise.cdf(s**2), abs=1e-10)


@pytest.mark.parametrize("priors", [dict(weight=UNIT, noise=0.7), dict(noise=HALF), FLAT, BOTH])
def test_predicting_a_datum_from_the_others_is_leave_one_out(priors):
    loo = exact_posterior(X, Y, **priors).loo().pointwise
    for i in range(0, ROWS, 5):
        keep = np.arange(ROWS) != i
        others = exact_posterior(X[keep], Y[keep], **priors)
        found = others.predict(X[[i]]).log_prob(Y[[i]])
        np.testing.assert_allclose(found, loo[[i]], rtol=1e-8)


def test_distribution_functions_are_inverses_of_quantiles():
    for post in (
        exact_posterior(X, Y, **BOTH),
        exact_posterior(X, Y, noise=dist.Uniform(0.5, 0.9)),
    ):
        for q in (1e-3, 0.05, 0.5, 0.9, 0.999):
            np.testing.assert_allclose(post.cdf(post.quantile(q)), q, rtol=1e-7)
        assert (post.cdf(-50.0) < 1e-6).all() and (post.cdf(1e6) > 1 - 1e-6).all()
        np.testing.assert_allclose(1 - post.cdf(0.0), post.prob_positive, rtol=1e-8)
        new = post.predict(NEW)
        np.testing.assert_allclose(new.cdf(new.quantile(0.1)), 0.1, rtol=1e-9)


def test_draws_of_predictions_have_its_moments():
    """Bounds are of 5 standard errors; an sd's is that of a Normal, times two for heavier tails."""
    post = exact_posterior(X, Y, **BOTH)
    new, size = post.predict(NEW, weights=WEIGHTS), 20_000
    for line, sd in ((False, new.sd), (True, new.epistemic_sd)):
        drawn = new.sample(size, seed=0, line=line)
        assert drawn.shape == (size, 6)
        np.testing.assert_allclose(drawn.mean(0), new.mean, atol=5 * sd.max() / np.sqrt(size))
        np.testing.assert_allclose(drawn.std(0), sd, rtol=10 / np.sqrt(2 * size))
    np.testing.assert_array_equal(new.sample(3, seed=4), new.sample(3, seed=4))


def test_moments_that_do_not_exist_say_so():
    few = exact_posterior(X[:6], Y[:6], **FLAT)  # noise of one degree of freedom
    new = few.predict(NEW)
    assert np.isnan(new.mean).all() and np.isinf(new.sd).all() and np.isinf(new.noise_sd).all()
    assert np.isfinite(new.quantile([0.1, 0.9])).all() and np.isfinite(new.log_prob(Y[:6])).all()
    few = exact_posterior(X[:7], Y[:7], **FLAT)  # two: means, no variances
    new = few.predict(NEW)
    assert np.isfinite(new.mean).all() and np.isinf(new.sd).all()


def test_no_rows_are_predicted_by_the_prior():
    post = exact_posterior(X[:0], Y[:0], weight=dist.Normal(0.5, 2.0), noise=0.7)
    new = post.predict(NEW)
    np.testing.assert_allclose(new.mean, 0.5 * NEW.sum(1), rtol=1e-12)
    np.testing.assert_allclose(new.epistemic_sd, 2 * np.linalg.norm(NEW, axis=1), rtol=1e-12)


def test_the_printed_table_and_the_tree():
    post = exact_posterior(X, Y, weights=np.ones(ROWS), **BOTH)
    text = repr(post.predict(X))
    assert text.startswith("Prediction of 25 rows") and len(text.splitlines()) == 13
    assert f"{post.predict(X).mean[3]:.4g}" in text.splitlines()[5]
    second = repr(post).splitlines()[1]
    assert second.startswith(f"R2 {post.r2:.4f}, leave-one-out {post.loo().total:.4f} nats (")
    left = Y - np.column_stack([np.ones(ROWS), X]) @ post.mean[:4]
    about = Y - Y.mean()
    assert post.r2 == pytest.approx(1 - left @ left / (about @ about), rel=1e-12)
    tree = post.to_datatree(50, seed=0)
    assert set(tree.children) == {
        "posterior", "posterior_predictive", "log_likelihood", "observed_data", "constant_data",
    }  # fmt: skip
    assert tree["posterior_predictive"]["y"].shape == (1, 50, ROWS)
    assert tree["constant_data"]["X"].dims == ("datum", "feature")
    np.testing.assert_array_equal(tree["constant_data"]["X"], X)
    np.testing.assert_array_equal(tree["constant_data"]["noise_sd"], np.ones(ROWS))
    drawn = {name: tree["posterior"][name].values[0] for name in tree["posterior"]}
    line = drawn["intercept"][:, None] + drawn["weight"] @ X.T
    expected = stats.norm(line, drawn["noise"][:, None]).logpdf(Y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0], expected, rtol=1e-10)


def test_bad_requests_are_named():
    post = exact_posterior(X, Y, **BOTH)
    new = post.predict(NEW)
    for name, call in (
        ("X: expected 3 columns", lambda: post.predict(NEW[:, :2])),
        ("X: expected shape", lambda: post.predict(NEW[0])),
        ("X: expected finite", lambda: post.predict(NEW * np.nan)),
        ("weights: expected shape", lambda: post.predict(NEW, weights=WEIGHTS[:2])),
        ("y: expected shape", lambda: new.log_prob(Y)),
        ("y: expected finite", lambda: new.cdf(np.full(6, np.nan))),
        ("q: expected probabilities", lambda: new.quantile(1.5)),
        ("level", lambda: new.interval(2.0)),
        ("num_samples", lambda: new.sample(-1)),
        ("values: expected shape", lambda: post.cdf([1.0, 2.0])),
        ("X: expected 3 columns", lambda: post.update(NEW[:, :2], np.ones(6))),
        ("X: expected an intercept in all", lambda: post.update(factorize(NEW, np.ones(6)))),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
