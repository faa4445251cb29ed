"""Priors in the units of the data: those of standardised data, whatever the units are."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from regressions import COV, HALF, ROWS, UNIT, X, Y, same

from ppvae.regression import ConjugateNormal, LinearRegression, exact_posterior

# what is said of priors that are far from the data is asked for in test_conflict.py
pytestmark = pytest.mark.filterwarnings("ignore:prior and data disagree")


def test_priors_in_units_of_the_data_are_those_of_standardised_data():
    """In any units of X and y: the same posterior of what is standardised."""
    Z, z = (X - X.mean(0)) / X.std(0), (Y - Y.mean()) / Y.std()
    plain = exact_posterior(Z, z, weight=UNIT, noise=HALF, intercept=True)
    units = np.array([1e3, 1.0, 1e-4])
    given = dict(weight=UNIT, noise=HALF, intercept=True, scale="data")
    post = exact_posterior(X * units + 100.0, 50 * Y - 3.0, **given)
    back = 50 * Y.std() / (units * X.std(0))
    np.testing.assert_allclose(post.mean[1:4], plain.mean[1:4] * back, rtol=1e-9)
    np.testing.assert_allclose(post.sd[1:4], plain.sd[1:4] * back, rtol=1e-9)
    np.testing.assert_allclose(post.mean[4], plain.mean[4] * 50 * Y.std(), rtol=1e-9)
    # about zero without an intercept, and a column that does not vary takes that of y
    size = np.sqrt((np.column_stack([X, Y]) ** 2).mean(0))
    post = exact_posterior(X, Y, weight=UNIT, noise=0.7, scale="data")
    sds = torch.as_tensor(size[3] / size[:3])
    same(post, exact_posterior(X, Y, weight=dist.Normal(0.0 * sds, sds), noise=0.7))
    constant = np.column_stack([X, np.full(ROWS, 0.1)])
    post = exact_posterior(constant, Y, weight=UNIT, noise=0.7, scale="data", intercept=True)
    assert post.sd[4] == pytest.approx(Y.std(), rel=1e-9)


@pytest.mark.parametrize("root", [np.array([0.5, 1.0, 2.0]), np.linalg.cholesky(COV)])
def test_a_conjugate_prior_of_standardised_data_keeps_its_mean(root):
    """Its covariance is in units of the noise, and its mean in those of y over a column."""
    loc = np.array([0.5, -1.0, 0.2])
    covariance = np.diag(root**2) if root.ndim == 1 else root @ root.T
    sds, sd = X.std(0), Y.std()
    Z, z = (X - X.mean(0)) / sds, (Y - Y.mean()) / sd
    given = ConjugateNormal(loc, root) if root.ndim == 1 else ConjugateNormal(loc, covariance=COV)
    plain = exact_posterior(Z, z, weight=given, noise=HALF, intercept=True)
    units = dict(weight=given, noise=HALF, intercept=True, scale="data")
    post = exact_posterior(X, Y, **units)
    np.testing.assert_allclose(post.mean[1:4], plain.mean[1:4] * sd / sds, rtol=1e-9)
    np.testing.assert_allclose(post.sd[1:4], plain.sd[1:4] * sd / sds, rtol=1e-9)
    prior = LinearRegression.of(X, Y, **units).weight_prior.prior
    np.testing.assert_allclose(prior.mean, loc * sd / sds, rtol=1e-6)
    np.testing.assert_allclose(prior.variance, np.diag(covariance) / sds**2, rtol=1e-6)


@pytest.mark.parametrize("count", [0.01, 1.0, 7.0])
def test_the_units_of_the_data_are_those_of_rows_however_often_they_count(count):
    """Counts that add up to less than one, such as shares of a sum, too."""
    size = np.sqrt((np.column_stack([X, Y]) ** 2).mean(0))
    sds = torch.as_tensor(size[3] / size[:3])
    counts = np.full(ROWS, count)
    post = exact_posterior(X, Y, weight=UNIT, noise=0.7, scale="data", counts=counts)
    same(post, exact_posterior(X, Y, weight=dist.Normal(0 * sds, sds), noise=0.7, counts=counts))


def test_numbers_too_large_are_named_in_the_units_of_the_data():
    for name, data in {"X": (X * 1e200, Y), "y": (X, Y * 1e200)}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected numbers of a size of"):
            exact_posterior(*data, scale="data")


def test_the_noise_alone_may_be_in_units_of_the_data():
    """Where the prior of the weights is flat, as `LinearRegression.of` has it."""
    given = dict(weight=None, intercept=True, noise=dist.HalfNormal(1.0), scale="data")
    post = exact_posterior(X, Y, **given)
    noise = dist.HalfNormal(torch.as_tensor(Y.std()))
    same(post, exact_posterior(X, Y, weight=None, intercept=True, noise=noise))
    prior = LinearRegression.of(X, Y, **given).noise_prior
    assert float(prior.scale) == pytest.approx(Y.std(), rel=1e-6)
    with pytest.raises(ValueError, match="^scale: expected None or .data. with weight=None"):
        exact_posterior(X, Y, weight=None, scale=2.0)


def test_rows_are_read_as_those_of_a_posterior():
    """Whether the priors are in their units or not, and where none counts."""
    for told in ({}, {"scale": "data"}):
        with pytest.raises(ValueError, match="^weights: expected a positive number"):
            LinearRegression.of(X, Y, weights=np.zeros(ROWS), **told)
        with pytest.raises(TypeError, match="^y: expected the target of each row, got None"):
            LinearRegression.of(X, None, **told)
    for make in (LinearRegression.of, exact_posterior):
        with pytest.raises(ValueError, match="^counts: expected a row that counts, got zeros"):
            make(X, Y, counts=np.zeros(ROWS), scale="data")
