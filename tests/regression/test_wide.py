"""More columns than rows: weights of which the data see some directions only."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from regressions import HALF, UNIT, dense

from ppvae.regression import evidence_maximum, exact_posterior

# what is said of priors that are far from the data is asked for in test_conflict.py
pytestmark = pytest.mark.filterwarnings("ignore:prior and data disagree")

SHAPES = [(5, 40), (12, 13), (20, 300)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("intercept", [False, True])
def test_wide_data_are_the_dense_formula(rows, columns, intercept):
    generator = np.random.default_rng(rows)
    wide, y = generator.normal(size=(rows, columns)), generator.normal(size=rows)
    wide[:, 1] = (np.arange(rows) == 2) * 30.0  # a weight that data decide, nearly alone
    sds = generator.uniform(0.5, 2.0, columns)
    prior = dist.Normal(torch.full((columns,), 0.3), torch.as_tensor(sds))
    flat = dist.Normal(1.0, 3.0) if intercept else False
    post = exact_posterior(wide, y, weight=prior, noise=0.5, intercept=flat)
    design = np.column_stack([np.ones(rows), wide]) if intercept else wide
    loc = np.append([1.0] * intercept, np.full(columns, 0.3))
    variances = np.append([9.0] * intercept, sds**2)
    mean, cov, evidence = dense(design, y, loc, np.diag(variances), 0.25 * np.eye(rows))
    np.testing.assert_allclose(post.mean, mean, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(post.sd, np.sqrt(np.diag(cov)), rtol=1e-9)
    np.testing.assert_allclose(post.covariance, cov, atol=1e-9)
    assert post.log_evidence == pytest.approx(evidence, rel=1e-11)
    new = generator.normal(size=(4, columns))
    there = np.column_stack([np.ones(4), new]) if intercept else new
    found = post.predict(new)
    np.testing.assert_allclose(found.mean, there @ mean, rtol=1e-9, atol=1e-10)
    spread = np.sqrt(np.einsum("ij,jk,ik->i", there, cov, there))
    np.testing.assert_allclose(found.epistemic_sd, spread, rtol=1e-9)
    draws = post.sample(4000, seed=0)
    away = (draws.mean(0) - post.mean) / post.sd * np.sqrt(len(draws))
    assert np.abs(away).max() < 5  # of so many standard normals
    np.testing.assert_allclose(draws.std(0), post.sd, rtol=5 / np.sqrt(2 * len(draws)))
    line = found.sample(4000, seed=1, line=True)
    np.testing.assert_allclose(line.std(0), spread, rtol=5 / np.sqrt(2 * len(line)))


def test_a_weight_that_one_wide_row_decides_keeps_its_digits():
    """A column alone in its row: its own regression, 1e-16 of the prior's variance away from it."""
    wide = np.zeros((2, 30))
    wide[0, 0], wide[1, 1:] = 1e6, 1.0
    post = exact_posterior(wide, np.array([1e6, 1.0]), weight=UNIT, noise=1.0)
    assert post.sd[0] == pytest.approx(1 / np.sqrt(1 + 1e12), rel=1e-12)


def test_wide_data_with_unknown_noise_and_scale_are_integrals_over_known_ones():
    generator = np.random.default_rng(3)
    wide, y = generator.normal(size=(6, 25)), 3 * generator.normal(size=6)
    flat = dict(weight=UNIT, intercept=True)
    post = exact_posterior(wide, y, noise=HALF, scale=dist.HalfNormal(1.0), **flat)
    new, hyper = wide[:2] + 1, post.hyper
    logs = hyper.log_numbers
    keep = np.argsort(-hyper.shares)[:200]
    shares = hyper.shares[keep] / hyper.shares[keep].sum()
    lost = 1 - hyper.shares[keep].sum()
    total = np.zeros(26)
    for share, point in zip(shares, keep, strict=True):
        noise, scale = float(np.exp(logs["noise"][point])), float(np.exp(logs["scale"][point]))
        known = exact_posterior(wide, y, noise=noise, scale=scale, **flat)
        total += share * known.cdf(0.2)
    assert lost < 0.9
    np.testing.assert_allclose(post.cdf(0.2)[:26], total, atol=lost)
    assert np.isfinite(post.predict(new).sd).all()


def test_nothing_is_left_beside_as_many_coordinates_as_rows():
    """What rounding left was taken for a noise of 1e-8, and that for the maximum of the evidence.

    Of these data the evidence, with the noise that suits each ratio of scale and noise, grows up to
    the end.
    """
    generator = np.random.default_rng(0)
    wide, y = generator.normal(size=(2, 3)), generator.normal(size=2)
    squares = np.linalg.eigh(wide @ wide.T)
    ratios = np.logspace(-3, 6, 19)
    along = (squares[1].T @ y) ** 2
    profile = [
        -np.log((along / (1 + squares[0] * ratio**2)).sum() / 2)
        - np.log1p(squares[0] * ratio**2).sum() / 2
        for ratio in ratios
    ]
    assert np.argmax(profile) == len(ratios) - 1
    with pytest.raises(ValueError, match="^weight: expected evidence .* got growth without bound"):
        evidence_maximum(wide, y, maximize_noise=True)
    for intercept in (False, True):
        post = exact_posterior(wide, y, noise=1.0, intercept=intercept)
        assert post.problem.gaussian.residual == 0.0
