"""Normal priors of every kind: correlated, conjugate, Zellner's, of an intercept, a posterior."""

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from regressions import COV, HALF, LOC, ONES, ROWS, UNIT, X, Y, correlated, dense, same
from scipy import stats

from ppvae.regression import (
    ConjugateNormal,
    evidence_maximum,
    exact_posterior,
    g_prior,
    log_evidence_curve,
)

# what is said of priors that are far from the data is asked for in test_conflict.py
pytestmark = pytest.mark.filterwarnings("ignore:prior and data disagree")


def test_correlated_priors_are_the_dense_formula():
    for scale in (1.0, 1.7):
        post = exact_posterior(X, Y, weight=correlated(), noise=0.7, scale=scale)
        mean, cov, evidence = dense(X, Y, LOC, scale**2 * COV, 0.49 * np.eye(ROWS))
        np.testing.assert_allclose(post.mean, mean, rtol=1e-11)
        np.testing.assert_allclose(post.covariance, cov, rtol=1e-10, atol=1e-13)
        assert post.log_evidence == pytest.approx(evidence, rel=1e-11)


def test_a_diagonal_covariance_is_a_normal_prior():
    sds = np.array([0.5, 1.0, 2.0])
    plain = dist.Normal(torch.as_tensor(LOC), torch.as_tensor(sds))
    for options in (dict(noise=HALF, scale=dist.HalfNormal(1.0)), dict(noise=HALF, intercept=True)):
        one = exact_posterior(X, Y, weight=plain, **options)
        same(exact_posterior(X, Y, weight=correlated(np.diag(sds**2)), **options), one)


def test_an_intercept_with_a_prior_is_a_column_with_it():
    for scale in (None, 3.0):
        sds = torch.tensor([2.0, *[1.0 * (scale or 1.0)] * 3])
        wide = exact_posterior(
            ONES, Y, weight=dist.Normal(torch.tensor([5.0, 0, 0, 0]), sds), noise=HALF
        )
        given = dict(weight=UNIT, noise=HALF, intercept=dist.Normal(5.0, 2.0), scale=scale)
        post = exact_posterior(X, Y, **given)
        same(post, wide)
        assert post.names[0] == "intercept" and np.isfinite(post.log_evidence)
    prior = correlated()
    post = exact_posterior(X, Y, weight=prior, noise=0.7, intercept=dist.Normal(5.0, 2.0))
    cov = np.zeros((4, 4))
    cov[0, 0], cov[1:, 1:] = 4.0, COV
    mean, _, evidence = dense(ONES, Y, np.append(5.0, LOC), cov, 0.49 * np.eye(ROWS))
    np.testing.assert_allclose(post.mean, mean, rtol=1e-11)
    assert post.log_evidence == pytest.approx(evidence, rel=1e-11)


def test_conjugate_priors_have_a_closed_form():
    """With s^2 ~ InverseGamma(a, b): the marginal of y is a multivariate t."""
    a, b = 3.0, 2.0
    noise = dist.TransformedDistribution(
        dist.InverseGamma(a, b), torch.distributions.PowerTransform(torch.tensor(0.5))
    )
    for weight, cov in (
        (ConjugateNormal(0.5, 2.0), 4.0 * np.eye(3)),
        (ConjugateNormal(0.5, covariance=COV), COV),
        (g_prior(X, 9.0), 9.0 * np.linalg.inv(X.T @ X)),
    ):
        loc = np.full(3, 0.5) if weight.prior.mean.abs().sum() > 0 else np.zeros(3)
        for scale in (1.0, 1.5):
            shape = b / a * (np.eye(ROWS) + scale**2 * X @ cov @ X.T)
            expected = stats.multivariate_t(X @ loc, shape, df=2 * a).logpdf(Y)
            post = exact_posterior(X, Y, weight=weight, noise=noise, scale=scale)
            assert post.log_evidence == pytest.approx(expected, rel=1e-10)
            mean = dense(X, Y, loc, scale**2 * cov, np.eye(ROWS))[0]
            np.testing.assert_allclose(post.mean[:3], mean, rtol=1e-9)


def test_a_g_prior_shrinks_least_squares():
    post = exact_posterior(X, Y, weight=g_prior(X, 9.0), noise=HALF)
    squares = np.linalg.lstsq(X, Y, rcond=None)[0]
    np.testing.assert_allclose(post.mean[:3], 0.9 * squares, rtol=1e-10)
    post = exact_posterior(X, Y, weight=g_prior(X, intercept=True), noise=HALF, intercept=True)
    squares = np.linalg.lstsq(ONES, Y, rcond=None)[0][1:]
    np.testing.assert_allclose(post.mean[1:4], ROWS / (ROWS + 1) * squares, rtol=1e-10)
    # of an unknown g the evidence has its maximum where the curve is highest
    best = evidence_maximum(X, Y, weight=g_prior(X, 1.0), maximize_noise=True)
    grid = best.scale * np.array([0.9, 1.0, 1.1])
    curve = log_evidence_curve(X, Y, scales=grid, weight=g_prior(X, 1.0), noise=best.noise)
    assert curve.argmax() == 1 and curve[1] == pytest.approx(best.log_evidence, rel=1e-12)


def test_a_posterior_is_the_prior_of_more_data():
    for intercept in (False, True):
        options = dict(noise=0.7, intercept=intercept)
        first = exact_posterior(X[:20], Y[:20], weight=UNIT, **options)
        post = exact_posterior(X[20:], Y[20:], weight=first, **options)
        whole = exact_posterior(X, Y, weight=UNIT, **options)
        np.testing.assert_allclose(post.mean, whole.mean, rtol=1e-10)
        np.testing.assert_allclose(post.covariance, whole.covariance, rtol=1e-9, atol=1e-13)
        both = first.log_normalizer + post.log_normalizer
        assert both == pytest.approx(whole.log_normalizer, rel=1e-11)


def test_a_posterior_as_a_prior_is_of_the_same_columns():
    table = pd.DataFrame(X, columns=["a", "b", "c"])
    before = exact_posterior(table, Y, noise=0.7)
    with pytest.raises(ValueError, match="^X: expected the columns .*'a', 'b', 'c'"):
        exact_posterior(table[["b", "a", "c"]], Y, weight=before, noise=0.7)


def test_a_conjugate_prior_given_the_noise():
    noise = torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    for prior, cov in (
        (ConjugateNormal(0.5, 2.0), 4.0 * np.eye(3)),
        (ConjugateNormal(0.5, [1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 9.0])),
        (ConjugateNormal(0.5, covariance=COV), COV),
    ):
        for given in (noise, noise[0, 0]):
            fn = prior.given(given, 3)
            assert fn.batch_shape == given.shape and fn.event_shape == (3,)
            expected = given[..., None] ** 2 * torch.as_tensor(np.diag(cov).copy())
            torch.testing.assert_close(fn.variance, expected.expand(fn.variance.shape))
            torch.testing.assert_close(fn.mean, torch.full_like(fn.mean, 0.5))


def test_a_posterior_of_another_kind_is_refused_as_a_prior():
    with pytest.raises(TypeError, match="^weight: .*LinearRegression with a guide"):
        exact_posterior(X, Y, weight=dist.Laplace(0.0, 1.0))
    for given in ({}, {"scale": 1.0, "covariance": np.eye(2)}):
        with pytest.raises(TypeError, match="^scale, covariance: expected one"):
            ConjugateNormal(0.0, **given)
    with pytest.raises(ValueError, match="^covariance: expected a positive definite"):
        ConjugateNormal(covariance=-np.eye(2))
    for told, columns in {
        "2 independent columns, got 1": np.ones((4, 2)),
        "at least one column": np.ones((4, 0)),
        "columns of a size from 1e-100 to 1e.100, got 1e.200": np.full((4, 2), 1e200),
        "columns of a size from 1e-100 to 1e.100, got 1e-200": np.array([[1.0, 1e-200]]),
    }.items():
        with pytest.raises(ValueError, match=f"^X: expected {told}"):
            g_prior(columns)
