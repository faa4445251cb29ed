"""The exact posterior against dense formulas, closed forms, fixed rules and refits."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import world
from linear import diabetes
from pyro.distributions import transforms
from regressions import simulated
from scipy import linalg, special, stats
from sklearn.linear_model import BayesianRidge

from ppvae.regression import (
    evidence_maximum,
    exact_posterior,
    log_evidence_curve,
)
from ppvae.regression.priors import Unknown

# words of priors that are far from data are asked for in test_conflict.py
pytestmark = pytest.mark.filterwarnings("ignore:prior and data disagree")


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def dense(X, y, loc, sd, noise):
    """Mean, covariance and log evidence for a known noise, as the formulas stand."""
    marginal = noise**2 * np.eye(len(y)) + (X * sd**2) @ X.T
    if len(X) < len(loc):
        gain = np.linalg.solve(marginal, X * sd**2).T
        mean, covariance = loc + gain @ (y - X @ loc), np.diag(sd**2) - gain @ (X * sd**2)
    else:
        covariance = np.linalg.inv(X.T @ X / noise**2 + np.diag(1 / sd**2))
        mean = covariance @ (X.T @ y / noise**2 + loc / sd**2)
    # y in coordinates in which its covariance is diagonal, for any size of the noise and the sds
    rotation, singular, _ = np.linalg.svd(X * sd)
    variance = np.full(len(y), noise**2)
    variance[: len(singular)] += singular**2
    misfit = (rotation.T @ (y - X @ loc)) ** 2 / variance
    return mean, covariance, -(np.log(2 * np.pi * variance) + misfit).sum() / 2


CONSTANT = simulated(30, 4)
CONSTANT[0][:, 2:] = [3.0, 0.0]
SHAPES = [(50, 4), (4, 9), (1, 1), (7, 7), (0, 3)]


@pytest.mark.parametrize("data", [*(simulated(*shape) for shape in SHAPES), CONSTANT])
def test_known_noise_is_the_dense_formula(data):
    (X, y), (rows, columns) = data, data[0].shape
    loc, sd = np.linspace(-1, 1, columns), np.geomspace(0.3, 4, columns)
    post = exact_posterior(X, y, weight=dist.Normal(double(loc), double(sd)), noise=0.7)
    mean, covariance, evidence = dense(X, y, loc, sd, 0.7) if rows else (loc, np.diag(sd**2), 0)
    np.testing.assert_allclose(post.mean, mean, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(post.covariance, covariance, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(post.log_evidence, evidence, rtol=1e-10, atol=1e-10)
    quantiles = stats.norm.ppf([0.01, 0.5, 0.9])[:, None] * post.sd + post.mean
    np.testing.assert_allclose(post.quantile([0.01, 0.5, 0.9]), quantiles, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(post.quantile(0.5), post.quantile([0.5])[0])


def test_a_normal_prior_in_any_form_and_dtype():
    X, y = simulated(20, 3)
    forms = (
        dist.Normal(0.0, 0.1),
        dist.Normal(torch.zeros(3), 0.1),
        dist.Normal(0.0, 0.1).expand([3]).to_event(1),
        dist.Normal(torch.zeros(1), 0.1 * torch.ones(1)),
        dist.Normal(torch.tensor(0.0), torch.tensor(0.1, dtype=torch.float32)),
    )
    first, *others = (exact_posterior(X, y, weight=w, noise=dist.HalfCauchy(0.3)) for w in forms)
    for post in others:
        np.testing.assert_array_equal(post.mean, first.mean)
    X, y = torch.tensor(X, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    single, twin = exact_posterior(X, y, noise=1.0), exact_posterior(X.double(), y.numpy(), noise=1)
    np.testing.assert_array_equal(single.mean, twin.mean)
    assert single.log_evidence == twin.log_evidence


def test_constant_columns_beside_an_intercept():
    X, y = CONSTANT
    both = exact_posterior(X, y, weight=dist.Normal(0.0, 2.0), noise=0.7, intercept=True)
    ones = np.column_stack([np.ones(30), X])
    precision = ones.T @ ones / 0.49 + np.diag([1e-14, *[0.25] * 4])  # all but flat on the first
    np.testing.assert_allclose(both.mean, linalg.solve(precision, ones.T @ y / 0.49), atol=1e-8)
    np.testing.assert_allclose(both.sd[3:], 2.0, rtol=1e-12)


def exact_fractions(X, y, sd, noise):
    """Mean and sds of a two-column regression in rational arithmetic."""
    X, y = (np.vectorize(Fraction, otypes=[object])(array) for array in (X, y))
    precision = X.T @ X / Fraction(noise) ** 2
    precision = precision + np.eye(2, dtype=int) * (0 if sd is None else 1 / Fraction(sd) ** 2)
    (a, b), (_, d) = precision
    covariance = np.array([[d, -b], [-b, a]]) / (a * d - b * b)
    mean = covariance @ (X.T @ y) / Fraction(noise) ** 2
    return mean.astype(float), np.sqrt(np.diag(covariance).astype(float))


@pytest.mark.parametrize("ratio", [1.0, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("sd", [None, 1e3, 1.0])
def test_bad_condition_and_bad_scales_against_rational_arithmetic(ratio, gap, sd):
    generator = np.random.default_rng(3)
    a = generator.normal(size=30)
    X = np.column_stack([a, (a + gap * generator.normal(size=30)) * ratio])
    y = a + 0.5 * generator.normal(size=30)
    for columns in ([0, 1], [1, 0]):
        weight = None if sd is None else dist.Normal(double(0.0), double(sd))
        post = exact_posterior(X[:, columns], y, weight=weight, noise=0.5)
        mean, sds = exact_fractions(X[:, columns], y, sd, 0.5)
        np.testing.assert_allclose((post.mean - mean) / sds, 0, atol=1e-7)
        np.testing.assert_allclose(post.sd / sds, 1, atol=1e-7)


def test_badly_scaled_columns_in_any_order():
    """A singular value must be exact beside much larger ones: 1e-7 sds, from scaled columns."""
    X, y = simulated(30, 5)
    X[:, 4] = X[:, 2] + 1e-4 * X[:, 4]
    scales = np.array([1e-7, 1e8, 1e2, 1e-3, 1e6])
    sd = np.geomspace(0.5, 2, 5)
    post = exact_posterior(X * scales, y, weight=dist.Normal(0.0, double(sd / scales)), noise=0.5)
    mean, covariance, evidence = dense(X, y, np.zeros(5), sd, 0.5)
    sds = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((post.mean * scales - mean) / sds, 0, atol=1e-7)
    np.testing.assert_allclose(post.sd * scales / sds, 1, atol=1e-7)
    np.testing.assert_allclose(post.log_evidence, evidence, atol=1e-8)
    one = exact_posterior(X * scales, y, weight=dist.Normal(0.0, 1.0), noise=0.5)
    two = exact_posterior((X * scales)[:, ::-1], y, weight=dist.Normal(0.0, 1.0), noise=0.5)
    np.testing.assert_allclose((one.mean - two.mean[::-1]) / one.sd, 0, atol=1e-7)
    np.testing.assert_allclose(one.sd / two.sd[::-1], 1, atol=1e-7)


def by_rule(X, y, loc, sd, noise, log_prior, *ends):
    """Means, sds and log normalizer by 200 Gauss points of the log number between each two ends.

    The number is the noise, or with a known noise the scale.
    """
    points, weights = np.polynomial.legendre.leggauss(200)
    rows, logs = [], []
    for low, high in zip(ends[:-1], ends[1:], strict=True):
        for u, share in zip(low + (high - low) * (points + 1) / 2, weights, strict=True):
            number = np.exp(u)
            known = (loc, sd, number) if noise is None else (loc, sd * number, noise)
            mean, covariance, evidence = dense(X, y, *known)
            logs.append(evidence + log_prior(number) + u + np.log(share * (high - low) / 2))
            rows.append([*mean, number, *np.diag(covariance), 0.0])
    shares, table, size = np.exp(logs - special.logsumexp(logs)), np.array(rows), len(loc) + 1
    mean = shares @ table[:, :size]
    variance = shares @ ((table[:, :size] - mean) ** 2 + table[:, size:])
    return mean, np.sqrt(variance), special.logsumexp(logs)


LOC, SD = np.array([0.0, 1.0, -1.0]), np.array([2.0, 0.5, 1.0])
TALL, WIDE = (*simulated(12, 3), LOC, SD), (*simulated(4, 6), np.zeros(6), np.full(6, 2.0))
#: columns that say nothing are no exact fit
BLIND = [
    (X, np.arange(1.0, len(X) + 1) ** 2, np.zeros(X.shape[1]), np.full(X.shape[1], 10.0))
    for X in (np.zeros((1, 1)), np.ones((2, 2)), np.ones((3, 3)))
]
#: the noise that all rows but a few see is much smaller than the one under the prior's weights
TWO_MODES = (np.ones((6, 1)), 3 + 0.01 * np.arange(6), np.zeros(1), np.full(1, 0.3))


def uniform(low, high):
    return dist.Uniform(double(low), double(high)), stats.uniform(low, high - low).logpdf


def half_normal(scale):
    return dist.HalfNormal(double(scale)), stats.halfnorm(scale=scale).logpdf


def half_cauchy(scale):
    return dist.HalfCauchy(double(scale)), stats.halfcauchy(scale=scale).logpdf


def log_normal(loc, scale):
    return dist.LogNormal(double(loc), double(scale)), stats.lognorm(scale, 0, np.exp(loc)).logpdf


def two_narrow(s):
    return np.logaddexp(*(log_normal(m, 0.01)[1](s) for m in (-0.5, 0.5))) - np.log(2)


LOG_UNIFORM = dist.TransformedDistribution(
    dist.Uniform(double(-2.0), double(1.0)), [transforms.ExpTransform()]
)
NARROW_MODES = dist.MixtureSameFamily(
    dist.Categorical(torch.ones(2)), dist.LogNormal(double([-0.5, 0.5]), double(0.01))
)
#: data, prior of the noise, its log density, ends of the rule
NOISES = {
    "half normal": (TALL, *half_normal(10.0), -5, 6),
    "half cauchy": (TALL, *half_cauchy(2.5), -5, 8),
    "exponential": (TALL, dist.Exponential(0.5), stats.expon(scale=2).logpdf, -5, 6),
    "log normal": (TALL, *log_normal(0.1, 0.4), -5, 6),
    "gamma": (TALL, dist.Gamma(2.0, 3.0), stats.gamma(2, scale=1 / 3).logpdf, -5, 6),
    "uniform": (TALL, *uniform(0.5, 0.9), np.log(0.5), np.log(0.9)),
    "from a": (TALL, dist.Pareto(0.6, 2.0), stats.pareto(2, scale=0.6).logpdf, np.log(0.6), 8),
    "log uniform": (TALL, LOG_UNIFORM, lambda s: -np.log(3 * s), -2, 1),
    "conflict": (TALL, *log_normal(-3.0, 0.01), -3.1, -2.3),
    "narrow modes": (TALL, NARROW_MODES, two_narrow, -0.6, 0, 0.6),
    "two modes": (TWO_MODES, *half_cauchy(2.5), -7, 9),
    "flat": (WIDE, None, lambda s: 0.0, -26, -10, 10, 30),
    **{f"blind {i}": (blind, *half_normal(10.0), -6, 5) for i, blind in enumerate(BLIND)},
}
#: prior of the scale, for a known noise, its log density, ends of the rule
SCALES = {
    "scale": (*half_cauchy(1.0), -25, -3, 3, 20),
    **{f"in {e}": (*uniform(*e), *np.log(e)) for e in ((0.9, 1.1), (5.0, 6.0), (50.0, 60.0))},
    "tiny scale": (*half_normal(1e-4), -30, -8, -6, -4),
    "huge scale": (*half_normal(1e10), -30, -5, 0, 5, 10, 23, 25),
}


@pytest.mark.parametrize("name", [*NOISES, *SCALES])
def test_one_unknown_number_against_a_fixed_rule(name):
    noise, row = (None, NOISES[name]) if name in NOISES else (0.7, (TALL, *SCALES[name]))
    (X, y, loc, sd), prior, log_prior, *ends = row
    mean, sds, total = by_rule(X, y, loc, sd, noise, log_prior, *ends)
    known = {"noise": prior} if noise is None else {"noise": noise, "scale": prior}
    post = exact_posterior(X, y, weight=dist.Normal(double(loc), double(sd)), **known)
    assert post.names[-1] == ("noise" if noise is None else "scale")
    np.testing.assert_allclose(post.log_normalizer, total, atol=2e-9)
    assert np.isnan(post.log_evidence) == (prior is None)
    np.testing.assert_allclose((post.mean - mean) / sds, 0, atol=2e-8)
    np.testing.assert_allclose(post.sd / sds, 1, atol=2e-8)


@pytest.mark.parametrize(
    "rows, columns, shape, rate", [(3, 1, 0, 0), (442, 1, 0, 0), (442, 10, 0, 0), (40, 5, 2.5, 1.5)]
)
def test_flat_weights_give_student_t(rows, columns, shape, rate):
    """Under an inverse gamma prior of the noise variance, or a flat one of the noise."""
    X, y = diabetes(rows, columns)
    noise, log_prior = None, -np.log(2)  # p(s) = 1 is an improper inverse gamma of shape -1/2
    if rate:
        base = dist.InverseGamma(double(shape), double(rate))
        noise = dist.TransformedDistribution(base, [transforms.PowerTransform(double(0.5))])
        log_prior = shape * np.log(rate) - special.gammaln(shape)
    post = exact_posterior(X, y, weight=None, noise=noise)
    inverse = np.linalg.inv(X.T @ X)
    mean = inverse @ X.T @ y
    df = rows - columns + (2 * shape if rate else -1)
    rate = rate + np.sum((y - X @ mean) ** 2) / 2
    levels = np.array([1e-6, 0.05, 0.5, 0.95])
    scale = np.sqrt(np.diag(inverse) * 2 * rate / df)
    student = mean + scale * stats.t.ppf(levels, df)[:, None]
    variance = stats.invgamma(df / 2, scale=rate).ppf(levels)
    rtol = 1e-9 if df > 1 else 2e-6  # far out on the tails of a Cauchy the points are few
    np.testing.assert_allclose(post.quantile(levels)[:, :-1], student, rtol=rtol, atol=1e-10)
    error = np.abs(post.quantile(levels)[:, -1] / np.sqrt(variance) - 1)
    assert (error < [1e-10, 1e-11, 1e-11, 1e-11]).all()
    normalizer = (columns - rows) / 2 * np.log(2 * np.pi) - np.linalg.slogdet(X.T @ X)[1] / 2
    normalizer += log_prior + special.gammaln(df / 2) - df / 2 * np.log(rate)
    np.testing.assert_allclose(post.log_normalizer, normalizer, atol=1e-9)
    if df == 1:
        assert np.isnan(post.mean[0]) and np.isinf(post.mean[1]) and np.isinf(post.sd).all()
        return
    ratio = np.exp(special.gammaln((df - 1) / 2) - special.gammaln(df / 2))
    noise_mean = np.sqrt(rate) * ratio
    sd = np.append(scale * np.sqrt(df / (df - 2)), np.sqrt(2 * rate / (df - 2) - noise_mean**2))
    np.testing.assert_allclose(post.mean, np.append(mean, noise_mean), atol=1e-12)
    np.testing.assert_allclose(post.sd, sd, rtol=1e-8)  # the closed form of the last one cancels


def test_zero_rows_give_the_prior():
    weight = dist.Normal(double([1.0, -2.0]), double([0.5, 3.0]))
    none = np.zeros((0, 2)), np.zeros(0)
    post = exact_posterior(*none, weight=weight, noise=dist.Gamma(3.0, 2.0))
    np.testing.assert_allclose(post.mean, [1.0, -2.0, 1.5], rtol=1e-12)
    np.testing.assert_allclose(post.sd, [0.5, 3.0, np.sqrt(0.75)], rtol=1e-11)
    np.testing.assert_allclose(post.log_evidence, 0, atol=1e-12)
    levels = [0.1, 0.8]
    np.testing.assert_allclose(post.quantile(levels)[:, 2], stats.gamma(3, scale=0.5).ppf(levels))
    assert post.loo().total == 0 and post.loo().pointwise.shape == (0,)
    heavy = exact_posterior(*none, noise=dist.HalfCauchy(2.0), scale=dist.HalfCauchy(1.0))
    assert np.isinf(heavy.mean[2:]).all() and np.isinf(heavy.sd).all()
    assert np.isnan(heavy.mean[:2]).all()  # the weights are as wide as the scale
    assert np.isnan(heavy.covariance[0, 1])
    tangent = np.tan(0.375 * np.pi)
    np.testing.assert_allclose(heavy.quantile(0.75)[2:], [2 * tangent, tangent])
    light = exact_posterior(*none, noise=dist.HalfCauchy(2.0))
    np.testing.assert_allclose(light.sd, [10, 10, np.inf])


def hold_draws(post, draws):
    """Moments and quantiles to five standard errors, at most 2 / sqrt(n) of a scaled covariance."""
    unit, sds = 1 / np.sqrt(len(draws)), np.outer(post.sd, post.sd)
    assert np.abs((draws.mean(0) - post.mean) / post.sd).max() < 5 * unit
    assert np.abs((np.cov(draws.T) - post.covariance) / sds).max() < 10 * unit
    for level in (1e-3, 0.05, 0.3, 0.9):
        below = (draws < post.quantile(level)).mean(0)
        assert np.abs(below - level).max() < 5 * np.sqrt(level * (1 - level)) * unit


def test_unknown_scale_and_noise_against_a_plain_grid():
    X, y = simulated(15, 3)
    priors = {"noise": dist.HalfNormal(1.0), "scale": dist.LogNormal(0.0, 0.5)}
    post = exact_posterior(X, y, weight=dist.Normal(0.0, 1.0), **priors)
    u, v = np.linspace(-3, 2.5, 251), np.linspace(-3.5, 3.5, 251)
    rotation, singular, _ = np.linalg.svd(X)  # y in coordinates where its covariance is diagonal
    along = (rotation.T @ y) ** 2
    eigen = np.append(singular**2, np.zeros(12))
    variance = np.exp(2 * u)[:, None, None] + np.exp(2 * v)[:, None] * eigen
    logs = -(np.log(2 * np.pi * variance) + along / variance).sum(-1) / 2
    logs += (stats.halfnorm.logpdf(np.exp(u)) + u)[:, None] + stats.norm(0, 0.5).logpdf(v)
    shares = np.exp(logs - special.logsumexp(logs))
    log_total = special.logsumexp(logs) + np.log((u[1] - u[0]) * (v[1] - v[0]))
    np.testing.assert_allclose(post.log_evidence, log_total, atol=1e-9)
    marginals = ((shares.sum(1), np.exp(u)), (shares.sum(0), np.exp(v)))
    means = np.array([p @ number for p, number in marginals])
    squares = np.array([p @ number**2 for p, number in marginals])
    np.testing.assert_allclose(post.mean[-2:], means, rtol=1e-9)
    np.testing.assert_allclose(post.sd[-2:], np.sqrt(squares - means**2), rtol=1e-9)
    cross = np.exp(u) @ shares @ np.exp(v) - means.prod()
    np.testing.assert_allclose(post.covariance[-2, -1], cross, rtol=1e-8)
    hold_draws(post, post.sample(20_000, seed=1))


def test_evidence_curve_and_its_maximum():
    X, y = diabetes()
    scales = np.geomspace(0.01, 10, 7)
    curve = log_evidence_curve(X, y, scales=scales, noise=0.7)
    exact = [dense(X, y, np.zeros(10), np.full(10, t), 0.7)[2] for t in scales]
    np.testing.assert_allclose(curve, exact, atol=1e-8)
    for noise in (0.7, dist.HalfNormal(1.0), None):
        best = evidence_maximum(X, y, noise=noise)
        near = log_evidence_curve(X, y, scales=best.scale * np.array([0.99, 1, 1.01]), noise=noise)
        assert near[1] > near[0] and near[1] > near[2]
        # a parabola through the three has its top in the middle, to the search's tolerance
        assert abs(near[2] - near[0]) < 0.05 * (2 * near[1] - near[0] - near[2])
        np.testing.assert_allclose(best.log_evidence, near[1])
        np.testing.assert_allclose(best.posterior.log_normalizer, near[1])
        assert best.noise == 0.7 if noise == 0.7 else np.isnan(best.noise)
        one = exact_posterior(X, y, weight=dist.Normal(0.0, 1.0), scale=best.scale, noise=noise)
        np.testing.assert_allclose(one.log_normalizer, near[1])


@pytest.mark.parametrize("unit", [1.0, 1e-30])
def test_evidence_maximum_over_both_is_bayesian_ridge(unit):
    X, y = diabetes()
    best = evidence_maximum(X, y * unit, maximize_noise=True)
    flat = dict(alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0)
    peer = BayesianRidge(fit_intercept=False, max_iter=2000, tol=1e-12, **flat).fit(X, y)
    np.testing.assert_allclose((best.noise / unit) ** -2, peer.alpha_, rtol=1e-6)
    np.testing.assert_allclose((best.scale / unit) ** -2, peer.lambda_, rtol=1e-6)
    np.testing.assert_allclose(best.posterior.mean / unit, peer.coef_, atol=1e-7)
    exact = dense(X, y, np.zeros(10), np.full(10, best.scale / unit), best.noise / unit)[2]
    np.testing.assert_allclose(best.log_evidence, exact - 442 * np.log(unit), rtol=1e-10)


def test_draws_have_the_moments_and_touch_no_global_state():
    X, y = diabetes(rows=30, columns=3)
    post = exact_posterior(X, y, weight=dist.Normal(0.0, 1.0), noise=dist.HalfNormal(1.0))
    before, numbers = world(), np.random.get_state()[1].copy()
    draws = post.sample(40_000, seed=5)
    assert world() == before and (np.random.get_state()[1] == numbers).all()
    np.testing.assert_array_equal(draws, post.sample(40_000, np.random.default_rng(5)))
    hold_draws(post, draws)
    assert post.sample(0).shape == (0, 4)
    with pytest.warns(DeprecationWarning, match="num_samples"):
        np.testing.assert_array_equal(post.sample(n=3, seed=0), post.sample(3, 0))


def test_tree_holds_the_draws_and_the_pointwise_likelihood():
    X, y = simulated(12, 2)
    post = exact_posterior(X, y, weight=dist.Normal(0.0, 1.0), intercept=True)
    tree = post.to_datatree(50, seed=0, features=["a", "b"])
    draws = post.sample(50, seed=0)
    assert dict(tree["posterior"].sizes) == {"chain": 1, "draw": 50, "feature": 2}
    np.testing.assert_array_equal(tree["posterior"]["weight"][0], draws[:, 1:3])
    np.testing.assert_array_equal(tree["posterior"]["intercept"][0], draws[:, 0])
    np.testing.assert_array_equal(tree["posterior"]["noise"][0], draws[:, 3])
    predicted = draws[:, :1] + draws[:, 1:3] @ X.T
    logs = stats.norm(predicted, draws[:, 3:]).logpdf(y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"][0], logs)
    np.testing.assert_array_equal(tree["observed_data"]["y"], y)
    known = exact_posterior(X, y, noise=2.0)
    tree, draws = known.to_datatree(5, seed=0), known.sample(5, seed=0)
    assert set(tree["posterior"].data_vars) == {"weight"}
    logs = stats.norm(draws @ X.T, 2.0).logpdf(y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"][0], logs)


def test_a_posterior_is_a_value():
    """It pickles and copies, and does not change with the arrays that it was made of."""
    X, y = simulated(9, 2)
    loc, scale = double([0.0, 0.0]), double(1.0)
    priors = {"noise": dist.HalfNormal(scale), "scale": dist.LogNormal(0.0, scale)}
    post = exact_posterior(X, y, weight=dist.Normal(loc, scale), **priors)
    others = [pickle.loads(pickle.dumps(post)), copy.deepcopy(post)]
    loo, draws = post.loo().pointwise, post.sample(5, seed=0)
    X *= 0
    y *= 0
    loc += 1
    scale += 1
    for each in (post, *others):
        np.testing.assert_array_equal(each.loo().pointwise, loo)
        np.testing.assert_array_equal(each.sample(5, seed=0), draws)
        np.testing.assert_array_equal(each.quantile(0.3), post.quantile(0.3))
        assert each.log_evidence == post.log_evidence


@pytest.mark.parametrize("sizes", [[442], [1, 200, 0, 241], [100] * 4 + [42], [9000, 11_000]])
@pytest.mark.parametrize("intercept", [False, True])
def test_blocks_equal_the_whole(sizes, intercept):
    """Least squares under a flat prior, also of more rows than are factorized at a time."""
    X, y = simulated(sum(sizes), 3)
    ends = np.cumsum([0, *sizes])
    blocks = ((X[a:b], y[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True))
    options = {"weight": None, "noise": 0.7, "intercept": intercept}
    post, whole = exact_posterior(blocks, **options), exact_posterior(X, y, **options)
    ones = np.column_stack([*[np.ones(len(X))] * intercept, X])
    for each in (post, whole):
        np.testing.assert_allclose(each.mean, np.linalg.lstsq(ones, y)[0], atol=1e-12)
        np.testing.assert_allclose(each.covariance, 0.49 * np.linalg.inv(ones.T @ ones), rtol=1e-9)
        assert np.isnan(each.log_evidence)
        assert each.names == [*["intercept"] * intercept, "weight[0]", "weight[1]", "weight[2]"]
    np.testing.assert_allclose(post.log_normalizer, whole.log_normalizer, rtol=1e-12)
    assert "log_likelihood" not in post.to_datatree(5, seed=0).children
    with pytest.raises(ValueError, match="blocks"):
        post.loo()


X3, Y3 = simulated(6, 3)
NAN = np.where(np.arange(18).reshape(6, 3) == 4, np.nan, X3)
ONES = np.column_stack([X3, np.full(6, 0.1)])
FLAT = dict(weight=None, noise=1.0)
BAD_SDS = [dist.Normal(0.0, sd, validate_args=False) for sd in (0.0, -1.0, np.inf)]
#: arguments beside X3 and Y3, and the words of the refusal
BAD_KINDS = [
    (dict(X=[["a"]], y=[1.0]), "^X: expected real numbers"),
    (dict(intercept=2), "^intercept: expected True or False, got 2"),
    (dict(y=None), "^y: "),
    (dict(X=[1.0], y=None), "pairs"),
    (dict(noise="small"), "^noise: .*None, got 'small'"),
    (dict(weight=dist.Laplace(0.0, 1.0)), "^weight: .*Laplace"),
]
BAD_VALUES = [
    (dict(y=Y3[:5]), r"y: expected shape \(6\), got \(5,\)"),
    (dict(y=np.tile(Y3[:, None], 2)), r"y: .*\(6, 2\)"),
    (dict(X=Y3), r"X: expected shape \(rows, columns\), got \(6,\)"),
    (dict(X=NAN), "^X: .*NaN"),
    (dict(y=np.append(Y3[:5], np.inf)), "^y: .*infinite"),
    (dict(y=Y3 * 1e-150, weight=None, noise=None), "^y: .*size"),
    (dict(X=X3 * 1e200), "^X: .*size of 1e.100 at most"),
    (dict(X=X3 * 1e-200, **FLAT), "^X: .*size of 1e-100 at least"),
    (dict(y=Y3 * 1e200), "^y: .*size of 1e.100 at most"),
    (dict(noise=1e-200), "^noise: .*from 1e-100 to 1e.100, got 1e-200"),
    (dict(weight=dist.Normal(double(1e90), 1.0), X=X3 * 1e20), "^y: .*distance from the prior"),
    (dict(weight=dist.Normal(0.0, double(1e200))), "^weight: .*from 1e-100 to 1e.100"),
    (dict(X=np.zeros((6, 0))), "at least one column"),
    (dict(X=[], y=None), "at least one block"),
    (dict(X=[(X3, Y3), (X3[:, :2], Y3)], y=None), "3 columns .* block 1"),
    (dict(X=iter([(X3, Y3), (X3, Y3[:2])]), y=None), "block 1"),
    (dict(noise=-1.0), "^noise: .*positive.*-1"),
    (dict(noise=0.0), "^noise: "),
    (dict(noise=float("nan")), "^noise: "),
    (dict(noise=np.inf), "^noise: .*got inf"),
    (dict(noise=torch.tensor(-2.0)), "^noise: .*got -2.0"),
    (dict(noise=dist.Normal(0.0, 1.0)), "^noise: "),
    (dict(noise=dist.Poisson(1.0)), "^noise: "),
    (dict(noise=dist.Gamma(torch.ones(2), 1.0)), "^noise: "),
    (dict(weight=dist.Normal(torch.zeros(2), 1.0)), "^weight"),
    *((dict(weight=weight), "^weight: .*positive") for weight in BAD_SDS),
    (dict(scale=0.0), "^scale: "),
    (dict(weight=None, scale=2.0), "^scale: "),
    (dict(X=X3[:2], y=Y3[:2], **FLAT), "^weight: .*improper"),
    (dict(X=X3[:, [0, 1, 0]], **FLAT), "improper.*only 2"),
    (dict(X=ONES, **FLAT, intercept=True), "constant"),
    (dict(X=X3[:0], y=Y3[:0], noise=1.0, intercept=True), "improper"),
    (dict(X=X3[:4], y=Y3[:4], weight=None, noise=None), "at least 5"),
    (dict(X=X3[:0], y=Y3[:0], noise=None), "^noise: .*improper"),
    (dict(y=X3 @ np.ones(3)), "^noise: .*exact linear"),
]
BAD = [*((TypeError, *row) for row in BAD_KINDS), *((ValueError, *row) for row in BAD_VALUES)]


@pytest.mark.parametrize(("error", "arguments", "words"), BAD)
def test_bad_input_is_named(error, arguments, words):
    with pytest.raises(error, match=words):
        exact_posterior(**{"X": X3, "y": Y3, **arguments})


def test_bad_requests_are_named():
    post, few = exact_posterior(X3, Y3), exact_posterior(X3[:5], Y3[:5], weight=None, noise=None)
    line, wave = np.linspace(-1, 1, 20)[:, None], 0.01 * np.cos(40 * np.linspace(-1, 1, 20))
    requests = [
        *(("q", lambda q=q: post.quantile(q)) for q in (0.0, 1.0, [0.5, -1], np.nan, [[0.5]])),
        *(("num_samples", lambda n=n: post.sample(n)) for n in (-1, 2.5, None)),
        ("num_samples", lambda: post.to_datatree(0)),
        ("features", lambda: post.to_datatree(5, features=["a"])),
        ("scales", lambda: log_evidence_curve(X3, Y3, scales=[1.0, 0.0], noise=1.0)),
        ("noise", lambda: evidence_maximum(X3, Y3, noise=1.0, maximize_noise=True)),
        ("weight", lambda: evidence_maximum(X3, Y3, noise=1.0, weight=None)),
        ("weight: .*at zero", lambda: evidence_maximum(line, wave, noise=1.0)),
        ("loo", few.loo),
    ]
    for name, call in requests:
        with pytest.raises(ValueError, match=f"^{name}"):
            call()


@pytest.mark.parametrize("ends", [(0.0, np.inf), (5.0, np.inf), (5.0, 7.0), (0.0, 7.0)])
def test_the_line_of_an_unknown_number_is_finest_around_a_guess(ends):
    """Where the map to the number is the inverse of the one that placed the middle."""
    for number in (5.1, 6.5):
        log_number, _ = Unknown(None, *ends).around(number).on_line(np.zeros(1))
        assert np.exp(log_number) == pytest.approx(number, rel=1e-14)
    for outside in ends:
        assert Unknown(None, *ends).around(outside) == Unknown(None, *ends)


def test_moments_that_do_not_exist_are_told():
    """Under flat priors of the weights and of the noise the weights have a t distribution.

    It has as many degrees of freedom as there are rows more than weights, less one for the noise:
    one has no mean, two have no sd.
    """
    generator = np.random.default_rng(0)
    for rows, word in ((5, "mean"), (6, "sd"), (7, None)):
        X, y = generator.normal(size=(rows, 3)), generator.normal(size=rows)
        post = exact_posterior(X, y, weight=None, noise=None, intercept=False)
        last = repr(post).splitlines()[-1]
        told = f"tails are too heavy for a {word} that is finite; quantiles are exact"
        assert last == told if word else last.startswith("noise ")
        assert np.isfinite(post.mean[:3]).all() == (word != "mean")
        assert np.isfinite(post.sd[:3]).all() == (word is None)
        assert np.isfinite(post.quantile(0.3)).all()
