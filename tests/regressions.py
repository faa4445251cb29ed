"""Rows of a regression with all that they may have, and what a posterior of them has to be."""

import numpy as np
import pyro.distributions as dist
import torch
from scipy import stats

GENERATOR = np.random.default_rng(0)
ROWS, COLUMNS = 30, 3
X = GENERATOR.normal(size=(ROWS, COLUMNS))
SDS = GENERATOR.uniform(0.3, 2.0, ROWS)
OFFSET = GENERATOR.normal(size=ROWS)
COUNTS = GENERATOR.integers(0, 4, ROWS)
Y = 1.0 + X @ [1.0, -0.5, 0.3] + OFFSET + SDS * GENERATOR.normal(size=ROWS)
ONES = np.column_stack([np.ones(ROWS), X])
UNIT = dist.Normal(0.0, 1.0)
HALF = dist.HalfNormal(2.0)
COV = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.5]])
LOC = np.array([0.5, -1.0, 0.0])


def simulated(rows, columns, noise=0.7, seed=0):
    """Data of weights that are standard normals, of columns of very different sizes."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(rows, columns)) * np.geomspace(0.1, 30, columns)
    y = X @ generator.normal(size=columns) + noise * generator.normal(size=rows)
    return X, y


def correlated(cov=COV, loc=LOC):
    return dist.MultivariateNormal(torch.as_tensor(loc), torch.as_tensor(cov))


def moments(post):
    return post.mean, post.sd, post.log_normalizer


def same(one, other, rtol=1e-12):
    for mine, theirs in zip(moments(one), moments(other), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=rtol)


def dense(X, y, loc, cov, noise_cov):
    """Mean, covariance and log evidence by the formulas with matrices of all rows."""
    total = noise_cov + X @ cov @ X.T
    gain = cov @ X.T @ np.linalg.inv(total)
    evidence = stats.multivariate_normal(X @ loc, total).logpdf(y)
    return loc + gain @ (y - X @ loc), cov - gain @ X @ cov, evidence
