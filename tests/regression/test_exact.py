import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from scipy import integrate, linalg, special, stats
from sklearn.datasets import load_diabetes
from sklearn.linear_model import BayesianRidge

from ppvae.regression import evidence_maximum, exact_posterior, log_evidence_curve

DOUBLE = torch.float64


def double(value):
    return torch.tensor(value, dtype=DOUBLE)


def diabetes(rows=442, columns=10):
    X, y = load_diabetes(return_X_y=True)
    X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    return X[:rows, :columns], y[:rows]


def simulated(rows, columns, noise=0.7, seed=0):
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(rows, columns)) * np.geomspace(0.1, 30, columns)
    y = X @ generator.normal(size=columns) + noise * generator.normal(size=rows)
    return X, y


def dense(X, y, loc, sd, noise):
    """Design section 7 as it stands: mean, covariance and log evidence for a known noise."""
    marginal = noise**2 * np.eye(len(y)) + (X * sd**2) @ X.T
    if len(X) < len(loc):
        gain = np.linalg.solve(marginal, X * sd**2).T
        mean, covariance = loc + gain @ (y - X @ loc), np.diag(sd**2) - gain @ (X * sd**2)
    else:
        covariance = np.linalg.inv(X.T @ X / noise**2 + np.diag(1 / sd**2))
        mean = covariance @ (X.T @ y / noise**2 + loc / sd**2)
    root = np.linalg.cholesky(marginal)
    white = linalg.solve_triangular(root, y - X @ loc, lower=True)
    logs = np.log(np.diag(root)).sum() + len(y) / 2 * np.log(2 * np.pi) + white @ white / 2
    return mean, covariance, -logs


def by_fixed_rule(X, y, loc, sd, log_prior, low, high):
    """Moments and evidence from 400 Gauss points in the log noise and the dense formulas."""

    points, weights = np.polynomial.legendre.leggauss(400)
    points = low + (high - low) * (points + 1) / 2
    rows, logs = [], []
    for u, share in zip(points, weights * (high - low) / 2, strict=True):
        mean, covariance, evidence = dense(X, y, loc, sd, np.exp(u))
        logs.append(evidence + log_prior(np.exp(u)) + u + np.log(share))
        rows.append(np.concatenate([mean, [np.exp(u)], np.diag(covariance), [0.0]]))
    logs, table = np.array(logs), np.array(rows)
    shares, size = np.exp(logs - special.logsumexp(logs)), len(loc) + 1
    mean = shares @ table[:, :size]
    variance = shares @ ((table[:, :size] - mean) ** 2 + table[:, size:])
    return mean, np.sqrt(variance), special.logsumexp(logs)


# --- known noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(50, 4), (4, 9), (1, 1), (7, 7), (0, 3)])
def test_known_noise_is_the_dense_formula(rows, columns):
    X, y = simulated(rows, columns)
    loc, sd = np.linspace(-1, 1, columns), np.geomspace(0.3, 4, columns)
    post = exact_posterior(X, y, weight=dist.Normal(double(loc), double(sd)), noise=0.7)
    mean, covariance, evidence = dense(X, y, loc, sd, 0.7) if rows else (loc, np.diag(sd**2), 0)
    np.testing.assert_allclose(post.mean, mean, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(post.covariance, covariance, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(post.log_evidence, evidence, rtol=1e-10, atol=1e-10)
    quantiles = stats.norm.ppf([0.01, 0.5, 0.9])[:, None] * post.sd + post.mean
    np.testing.assert_allclose(post.quantile([0.01, 0.5, 0.9]), quantiles, rtol=1e-10, atol=1e-12)


def test_flat_prior_with_known_noise_is_least_squares():
    X, y = diabetes()
    post = exact_posterior(X, y, weight=None, noise=0.7, intercept=True)
    ones = np.column_stack([np.ones(len(y)), X])
    np.testing.assert_allclose(post.mean, np.linalg.lstsq(ones, y)[0], atol=1e-12)
    np.testing.assert_allclose(post.covariance, 0.49 * np.linalg.inv(ones.T @ ones), atol=1e-12)
    assert np.isnan(post.log_evidence)
    assert post.names[:2] == ["intercept", "weight[0]"]


def test_normal_prior_accepts_events_and_single_values():
    X, y = simulated(20, 3)
    posts = [
        exact_posterior(X, y, weight=weight, noise=1.0)
        for weight in (
            dist.Normal(0.0, 2.0),
            dist.Normal(torch.zeros(3), 2.0),
            dist.Normal(0.0, 2.0).expand([3]).to_event(1),
            dist.Normal(torch.zeros(1), 2 * torch.ones(1)),
        )
    ]
    for post in posts[1:]:
        np.testing.assert_array_equal(post.mean, posts[0].mean)


def test_float32_is_computed_in_float64():
    X, y = (torch.tensor(a, dtype=torch.float32) for a in simulated(30, 3))
    post = exact_posterior(X, y, weight=dist.Normal(0.0, 0.1), noise=dist.HalfCauchy(0.3))
    twin = exact_posterior(
        X.double(),
        y.double(),
        weight=dist.Normal(double(0.0), double(0.1)),
        noise=dist.HalfCauchy(double(0.3)),
    )
    np.testing.assert_array_equal(post.mean, twin.mean)
    assert post.log_evidence == twin.log_evidence


# --- unknown noise --------------------------------------------------------------------------------

NOISES = {
    "half normal": (dist.HalfNormal(10.0), stats.halfnorm(scale=10).logpdf),
    "half cauchy": (dist.HalfCauchy(2.5), stats.halfcauchy(scale=2.5).logpdf),
    "exponential": (dist.Exponential(0.5), stats.expon(scale=2).logpdf),
    "log normal": (dist.LogNormal(0.1, 0.4), stats.lognorm(0.4, 0, np.exp(0.1)).logpdf),
    "gamma": (dist.Gamma(2.0, 3.0), stats.gamma(2, scale=1 / 3).logpdf),
    "uniform": (dist.Uniform(0.5, 0.9), lambda s: np.log(2.5) if 0.5 < s < 0.9 else -np.inf),
    "conflict": (dist.LogNormal(-3.0, 0.01), stats.lognorm(0.01, 0, np.exp(-3)).logpdf),
}


@pytest.mark.parametrize("name", NOISES)
def test_unknown_noise_against_a_fixed_rule(name):
    prior, log_prior = NOISES[name]
    X, y = simulated(12, 3)
    loc, sd = np.array([0.0, 1.0, -1.0]), np.array([2.0, 0.5, 1.0])
    ends = (np.log(0.5), np.log(0.9)) if name == "uniform" else (-5.0, 6.0)
    if name == "conflict":
        ends = (-3.1, -2.3)
    mean, sds, evidence = by_fixed_rule(X, y, loc, sd, log_prior, *ends)
    post = exact_posterior(X, y, weight=dist.Normal(double(loc), double(sd)), noise=prior)
    np.testing.assert_allclose((post.mean - mean) / sds, 0, atol=2e-8)
    np.testing.assert_allclose(post.sd / sds, 1, atol=2e-8)
    np.testing.assert_allclose(post.log_evidence, evidence, atol=2e-9)


def test_wide_data_under_a_flat_prior_of_the_noise():
    X, y = simulated(4, 6)
    loc, sd = np.zeros(6), np.full(6, 2.0)
    post = exact_posterior(X, y, weight=dist.Normal(0.0, 2.0), noise=None)
    mean, _, total = by_fixed_rule(X, y, loc, sd, lambda s: 0.0, -26.0, 20.0)
    np.testing.assert_allclose(post.mean / mean, 1, atol=1e-8)
    np.testing.assert_allclose(post.log_normalizer, total, atol=1e-8)
    assert np.isnan(post.log_evidence)


@pytest.mark.parametrize("columns", [1, 10])
def test_flat_priors_give_student_t(columns):
    X, y = diabetes(columns=columns)
    post = exact_posterior(X, y, weight=None, noise=None)
    inverse = np.linalg.inv(X.T @ X)
    mean = inverse @ X.T @ y
    rss, df = np.sum((y - X @ mean) ** 2), len(y) - columns - 1
    levels = np.array([1e-6, 0.05, 0.5, 0.95])
    scale = np.sqrt(np.diag(inverse) * rss / df)
    student = mean + scale * stats.t.ppf(levels, df)[:, None]
    noise = np.sqrt(rss / stats.chi2.isf(levels, df))
    sd = np.append(scale * np.sqrt(df / (df - 2)), 0)
    ratio = np.exp(special.gammaln((df - 1) / 2) - special.gammaln(df / 2))
    noise_mean = np.sqrt(rss / 2) * ratio
    sd[-1] = np.sqrt(rss / (df - 2) - noise_mean**2)
    np.testing.assert_allclose(post.mean, np.append(mean, noise_mean), atol=1e-12)
    np.testing.assert_allclose(post.sd, sd, rtol=1e-8)  # the closed form of the last one cancels
    np.testing.assert_allclose(post.quantile(levels)[:, :-1], student, atol=1e-10)
    np.testing.assert_allclose(post.quantile(levels)[:, -1], noise, atol=1e-11)
    spare = len(y) - columns
    normalizer = -spare / 2 * np.log(2 * np.pi) - np.linalg.slogdet(X.T @ X)[1] / 2
    normalizer += special.gammaln(df / 2) - df / 2 * np.log(rss / 2) - np.log(2)
    np.testing.assert_allclose(post.log_normalizer, normalizer, atol=1e-9)


def test_inverse_gamma_on_the_variance_under_flat_weights():
    X, y = diabetes(rows=40, columns=5)
    shape, rate = 2.5, 1.5
    base = dist.InverseGamma(double(shape), double(rate))
    noise = dist.TransformedDistribution(base, [transforms.PowerTransform(double(0.5))])
    post = exact_posterior(X, y, weight=None, noise=noise)
    inverse = np.linalg.inv(X.T @ X)
    mean = inverse @ X.T @ y
    shape, rate = shape + 35 / 2, rate + np.sum((y - X @ mean) ** 2) / 2
    levels = np.array([0.03, 0.5, 0.9])
    scale = np.sqrt(np.diag(inverse) * rate / shape)
    np.testing.assert_allclose(
        post.quantile(levels)[:, :-1], mean + scale * stats.t.ppf(levels, 2 * shape)[:, None]
    )
    variance = stats.invgamma(shape, scale=rate).ppf(levels)
    np.testing.assert_allclose(post.quantile(levels)[:, -1], np.sqrt(variance), rtol=1e-11)


def test_zero_rows_give_the_prior():
    weight = dist.Normal(double([1.0, -2.0]), double([0.5, 3.0]))
    post = exact_posterior(np.zeros((0, 2)), np.zeros(0), weight=weight, noise=dist.Gamma(3.0, 2.0))
    np.testing.assert_allclose(post.mean, [1.0, -2.0, 1.5], rtol=1e-12)
    np.testing.assert_allclose(post.sd, [0.5, 3.0, np.sqrt(0.75)], rtol=1e-11)
    np.testing.assert_allclose(post.log_evidence, 0, atol=1e-12)
    levels = [0.1, 0.8]
    np.testing.assert_allclose(post.quantile(levels)[:, 2], stats.gamma(3, scale=0.5).ppf(levels))
    heavy = exact_posterior(np.zeros((0, 2)), np.zeros(0), noise=dist.HalfCauchy(2.0))
    assert np.isinf(heavy.mean[2]) and np.isinf(heavy.sd[2])
    np.testing.assert_allclose(heavy.quantile(0.75)[2], stats.halfcauchy(scale=2).ppf(0.75))
    np.testing.assert_allclose(heavy.sd[:2], 10)


def test_moments_that_do_not_exist_are_not_given_as_numbers():
    X, y = simulated(5, 2)
    post = exact_posterior(X, y, weight=None, noise=None)  # Student t with 2 degrees of freedom
    assert np.isfinite(post.mean[:2]).all() and np.isinf(post.sd).all()
    assert np.isfinite(post.quantile(0.9)).all()


def test_constant_column_under_a_proper_prior():
    X, y = simulated(30, 2)
    X = np.column_stack([X, np.full(30, 3.0), np.zeros(30)])
    sd = np.full(4, 2.0)
    post = exact_posterior(X, y, weight=dist.Normal(0.0, 2.0), noise=0.7)
    mean, covariance, evidence = dense(X, y, np.zeros(4), sd, 0.7)
    np.testing.assert_allclose(post.mean, mean, atol=1e-12)
    np.testing.assert_allclose(post.covariance, covariance, atol=1e-12)
    np.testing.assert_allclose(post.log_evidence, evidence, atol=1e-9)
    both = exact_posterior(X, y, weight=dist.Normal(0.0, 2.0), noise=0.7, intercept=True)
    ones = np.column_stack([np.ones(30), X])
    wide = np.append(1e7, sd)  # an all but flat prior on the intercept
    precision = ones.T @ ones / 0.49 + np.diag(wide**-2.0)
    np.testing.assert_allclose(both.mean, linalg.solve(precision, ones.T @ y / 0.49), atol=1e-8)
    np.testing.assert_allclose(both.sd[3:], 2.0, rtol=1e-12)


def exact_fractions(X, y, sd, noise):
    """Mean and sds of a two-column regression in rational arithmetic."""
    from fractions import Fraction

    columns = [[Fraction(v) for v in column] for column in X.T]
    target = [Fraction(v) for v in y]
    variance = Fraction(noise) ** 2

    def dot(a, b):
        return sum(p * q for p, q in zip(a, b, strict=True)) / variance

    a, b = columns
    prior = [Fraction(0) if s is None else 1 / Fraction(s) ** 2 for s in sd]
    aa, ab, bb = dot(a, a) + prior[0], dot(a, b), dot(b, b) + prior[1]
    determinant = aa * bb - ab * ab
    u, v = dot(a, target), dot(b, target)
    mean = [(bb * u - ab * v) / determinant, (aa * v - ab * u) / determinant]
    return np.array([float(m) for m in mean]), np.sqrt(
        [float(bb / determinant), float(aa / determinant)]
    )


@pytest.mark.parametrize("ratio", [1.0, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("sd", [None, 1e3, 1.0])
def test_bad_condition_and_bad_scales_against_rational_arithmetic(ratio, gap, sd):
    generator = np.random.default_rng(3)
    a = generator.normal(size=30)
    X = np.column_stack([a, (a + gap * generator.normal(size=30)) * ratio])
    y = a + 0.5 * generator.normal(size=30)
    weight = None if sd is None else dist.Normal(double(0.0), double(sd))
    post = exact_posterior(X, y, weight=weight, noise=0.5)
    mean, sds = exact_fractions(X, y, [sd, sd], 0.5)
    np.testing.assert_allclose((post.mean - mean) / sds, 0, atol=1e-7)
    np.testing.assert_allclose(post.sd / sds, 1, atol=1e-7)


def test_two_modes_of_the_noise_are_both_counted():
    X, y = np.ones((6, 1)), 3 + 0.01 * np.arange(6)
    log_prior = NOISES["half cauchy"][1]
    mean, sds, evidence = by_fixed_rule(X, y, np.zeros(1), np.full(1, 0.3), log_prior, -7.0, 9.0)
    post = exact_posterior(X, y, weight=dist.Normal(0.0, 0.3), noise=dist.HalfCauchy(2.5))
    np.testing.assert_allclose((post.mean - mean) / sds, 0, atol=1e-6)
    np.testing.assert_allclose(post.log_evidence, evidence, atol=1e-8)


# --- prior scale ----------------------------------------------------------------------------------


def test_unknown_scale_against_a_fixed_rule():
    X, y = simulated(15, 3)
    prior = stats.halfcauchy(scale=1.0)

    def values(v):
        mean, covariance, evidence = dense(X, y, np.zeros(3), np.full(3, np.exp(v)), 0.7)
        density = np.exp(evidence + prior.logpdf(np.exp(v)) + v + 40)
        return density * np.concatenate([[1, np.exp(v)], mean, np.diag(covariance) + mean**2])

    rule = [
        integrate.fixed_quad(lambda p: np.array([values(v) for v in p]).T, *ends, n=200)[0]
        for ends in ((-25, -3), (-3, 3), (3, 9))
    ]
    total = sum(rule)
    mean = np.append(total[2:5], total[1]) / total[0]
    post = exact_posterior(
        X, y, weight=dist.Normal(0.0, 1.0), noise=0.7, scale=dist.HalfCauchy(1.0)
    )
    assert post.names[-1] == "scale"
    np.testing.assert_allclose(post.mean, mean, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(
        post.sd[:3], np.sqrt(total[5:] / total[0] - mean[:3] ** 2), rtol=1e-6
    )
    np.testing.assert_allclose(post.log_evidence, np.log(total[0]) - 40, atol=1e-8)


def test_unknown_scale_and_noise_against_a_plain_grid():
    X, y = simulated(15, 3)
    post = exact_posterior(
        X,
        y,
        weight=dist.Normal(0.0, 1.0),
        noise=dist.HalfNormal(1.0),
        scale=dist.LogNormal(0.0, 0.5),
    )
    u, v = np.linspace(-3, 2.5, 251), np.linspace(-3.5, 3.5, 251)
    rotation, singular, _ = np.linalg.svd(X)  # y in coordinates where its covariance is diagonal
    along = (rotation.T @ y) ** 2
    eigen = np.append(singular**2, np.zeros(12))
    variance = np.exp(2 * u)[:, None, None] + np.exp(2 * v)[:, None] * eigen
    logs = -(np.log(2 * np.pi * variance) + along / variance).sum(-1) / 2
    logs += (stats.halfnorm.logpdf(np.exp(u)) + u)[:, None]
    logs += stats.norm(0, 0.5).logpdf(v)
    weights = np.exp(logs - logs.max())
    log_total = np.log(weights.sum() * (u[1] - u[0]) * (v[1] - v[0])) + logs.max()
    weights /= weights.sum()
    noise, scale = (weights.sum(1) @ np.exp(u)), (weights.sum(0) @ np.exp(v))
    np.testing.assert_allclose(post.log_evidence, log_total, atol=1e-9)
    np.testing.assert_allclose(post.mean[-2:], [noise, scale], rtol=1e-9)
    draws = post.sample(20_000, seed=1)
    for column, name in ((-2, "noise"), (-1, "scale")):
        below = draws[:, column, None] < post.quantile([0.05, 0.4, 0.9])[:, column]
        error = np.abs(below.mean(0) - [0.05, 0.4, 0.9]) / np.sqrt(0.25 / 20_000)
        assert error.max() < 5, name
    error = (draws.mean(0) - post.mean) / (post.sd / np.sqrt(20_000))
    assert np.abs(error).max() < 5
    correlation = np.corrcoef(draws.T) - post.covariance / np.outer(post.sd, post.sd)
    assert np.abs(correlation).max() < 5 * 3 / np.sqrt(20_000)


def test_evidence_curve_and_its_maximum():
    X, y = diabetes()
    scales = np.geomspace(0.01, 10, 7)
    curve = log_evidence_curve(X, y, scales=scales, noise=0.7)
    exact = [dense(X, y, np.zeros(10), np.full(10, t), 0.7)[2] for t in scales]
    np.testing.assert_allclose(curve, exact, atol=1e-8)
    unknown = log_evidence_curve(X, y, scales=scales[:3], noise=dist.HalfNormal(1.0))
    one = exact_posterior(
        X, y, weight=dist.Normal(0.0, 1.0), scale=scales[1], noise=dist.HalfNormal(1.0)
    )
    np.testing.assert_allclose(unknown[1], one.log_evidence, atol=1e-9)
    best = evidence_maximum(X, y, noise=0.7)
    near = log_evidence_curve(X, y, scales=best.scale * np.array([0.99, 1.0, 1.01]), noise=0.7)
    assert near[1] > near[0] and near[1] > near[2]
    np.testing.assert_allclose(best.log_evidence, near[1])
    np.testing.assert_allclose(best.posterior.log_evidence, near[1])


def test_evidence_maximum_over_both_is_bayesian_ridge():
    X, y = diabetes()
    best = evidence_maximum(X, y, maximize_noise=True)
    flat = dict(alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0)
    peer = BayesianRidge(fit_intercept=False, max_iter=2000, tol=1e-12, **flat).fit(X, y)
    np.testing.assert_allclose(best.noise**-2, peer.alpha_, rtol=1e-6)
    np.testing.assert_allclose(best.scale**-2, peer.lambda_, rtol=1e-6)
    np.testing.assert_allclose(best.posterior.mean, peer.coef_, atol=1e-7)


def test_evidence_without_a_maximum_is_refused():
    X = np.linspace(-1, 1, 20)[:, None]
    with pytest.raises(ValueError, match="at zero"):
        evidence_maximum(X, np.cos(40 * X[:, 0]) * 0.01, noise=1.0)


# --- draws and trees ------------------------------------------------------------------------------


def test_draws_have_the_moments_and_touch_no_global_state():
    X, y = diabetes(rows=30, columns=3)
    post = exact_posterior(X, y, weight=dist.Normal(0.0, 1.0), noise=dist.HalfNormal(1.0))
    before = (np.random.get_state()[1].copy(), torch.get_rng_state(), torch.get_default_dtype())
    draws = post.sample(40_000, seed=5)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.get_default_dtype() == before[2]
    np.testing.assert_array_equal(draws, post.sample(40_000, seed=5))
    assert np.abs((draws.mean(0) - post.mean) / post.sd).max() < 5 / np.sqrt(40_000)
    assert np.abs(draws.std(0) / post.sd - 1).max() < 5 / np.sqrt(40_000)
    away = np.cov(draws.T) / np.outer(post.sd, post.sd)
    assert np.abs(away - post.covariance / np.outer(post.sd, post.sd)).max() < 10 / np.sqrt(40_000)
    uniform = stats.kstest((draws[:, 0] < post.quantile(0.3)[0]).astype(float), "uniform")
    assert uniform.statistic == pytest.approx(0.7, abs=5 * np.sqrt(0.21 / 40_000))
    assert post.sample(0).shape == (0, 4)


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
    known = exact_posterior(X, y, noise=2.0).to_datatree(5, seed=0)
    assert set(known["posterior"].data_vars) == {"weight"}


# --- data in pieces -------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[442], [1, 200, 0, 241], [100] * 4 + [42]])
@pytest.mark.parametrize("intercept", [False, True])
def test_blocks_equal_the_whole(sizes, intercept):
    X, y = diabetes()
    ends = np.cumsum([0, *sizes])
    blocks = ((X[a:b], y[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True))
    post = exact_posterior(blocks, intercept=intercept)
    whole = exact_posterior(X, y, intercept=intercept)
    np.testing.assert_allclose(post.mean, whole.mean, atol=1e-13)
    np.testing.assert_allclose(post.covariance, whole.covariance, atol=1e-14)
    np.testing.assert_allclose(post.log_normalizer, whole.log_normalizer, atol=1e-9)
    assert "log_likelihood" not in post.to_datatree(5, seed=0).children
    with pytest.raises(ValueError, match="blocks"):
        post.loo()


def test_more_rows_than_the_buffer():
    X, y = simulated(20_000, 3)
    blocks = [(X[:9000], y[:9000]), (X[9000:], y[9000:])]
    post, again = exact_posterior(blocks), exact_posterior(X, y)
    np.testing.assert_allclose((post.mean - again.mean) / again.sd, 0, atol=1e-10)
    np.testing.assert_allclose(post.mean[:3], np.linalg.lstsq(X, y)[0], atol=1e-3)


# --- leave one out --------------------------------------------------------------------------------

PRIORS = {
    "known": dict(weight=dist.Normal(0.0, 1.0), noise=0.7),
    "known flat": dict(weight=None, noise=0.7, intercept=True),
    "unknown": dict(weight=dist.Normal(0.0, 1.0), noise=dist.HalfCauchy(2.5)),
    "flat": dict(weight=None, noise=None),
    "scale": dict(
        weight=dist.Normal(0.0, 1.0), noise=dist.HalfNormal(1.0), scale=dist.LogNormal(0.0, 0.5)
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_leave_one_out_is_refitting(name):
    X, y = simulated(9, 2, seed=2)
    y[3] += 40.0  # an outlier, whose absence changes the posterior of the noise altogether
    whole = exact_posterior(X, y, **PRIORS[name])
    loo = whole.loo()
    for i in (0, 3) if name == "scale" else range(9):
        rest = exact_posterior(np.delete(X, i, 0), np.delete(y, i), **PRIORS[name])
        exact = whole.log_normalizer - rest.log_normalizer
        assert loo.pointwise[i] == pytest.approx(exact, abs=1e-8), i
    assert loo.total == pytest.approx(loo.pointwise.sum())


def test_leave_one_out_of_the_only_datum_of_a_column():
    X = np.column_stack([np.ones(8), np.eye(8)[0]])
    y = np.arange(8.0)
    flat = exact_posterior(X, y, weight=None, noise=1.0).loo()
    assert np.isnan(flat.pointwise[0]) and np.isfinite(flat.pointwise[1:]).all()
    vague = exact_posterior(X, y, weight=dist.Normal(0.0, 1e6), noise=1.0).loo()
    spread = np.sqrt(1e12 + 1 + 1 / 7)
    assert vague.pointwise[0] == pytest.approx(stats.norm(4.0, spread).logpdf(0.0), abs=1e-9)


# --- bad input ------------------------------------------------------------------------------------

X3, Y3 = simulated(6, 3)
NAN = np.where(np.arange(18).reshape(6, 3) == 4, np.nan, X3)
BAD = {
    "lengths": (dict(X=X3, y=Y3[:5]), ValueError, r"X, y: .*\(6, 3\) and \(5,\)"),
    "column y": (dict(X=X3, y=Y3[:, None]), ValueError, "X, y: "),
    "flat X": (dict(X=Y3, y=Y3), ValueError, "X, y: "),
    "nan": (dict(X=NAN, y=Y3), ValueError, "^X: .*NaN"),
    "inf": (dict(X=X3, y=np.append(Y3[:5], np.inf)), ValueError, "^y: .*infinity"),
    "words": (dict(X=[["a"]], y=[1.0]), TypeError, "X, y: expected numbers"),
    "tiny units": (dict(X=X3, y=Y3 * 1e-150, weight=None, noise=None), ValueError, "^y: .*size"),
    "no columns": (dict(X=np.zeros((3, 0)), y=np.zeros(3)), ValueError, "at least one column"),
    "no y": (dict(X=X3), TypeError, "^y: "),
    "no blocks": (dict(X=[]), ValueError, "at least one block"),
    "block kind": (dict(X=[1.0]), TypeError, "pairs"),
    "block columns": (dict(X=[(X3, Y3), (X3[:, :2], Y3)]), ValueError, "3 columns .* block 1"),
    "block lengths": (dict(X=iter([(X3, Y3), (X3, Y3[:2])])), ValueError, "block 1"),
    "negative noise": (dict(X=X3, y=Y3, noise=-1.0), ValueError, "^noise: .*positive.*-1"),
    "zero noise": (dict(X=X3, y=Y3, noise=0.0), ValueError, "^noise: "),
    "nan noise": (dict(X=X3, y=Y3, noise=float("nan")), ValueError, "^noise: "),
    "noise on the line": (dict(X=X3, y=Y3, noise=dist.Normal(0.0, 1.0)), ValueError, "^noise: "),
    "counted noise": (dict(X=X3, y=Y3, noise=dist.Poisson(1.0)), ValueError, "^noise: "),
    "two noises": (dict(X=X3, y=Y3, noise=dist.Gamma(torch.ones(2), 1.0)), ValueError, "^noise: "),
    "noise kind": (dict(X=X3, y=Y3, noise="small"), TypeError, "^noise: .*str"),
    "weight kind": (
        dict(X=X3, y=Y3, weight=dist.Laplace(0.0, 1.0)),
        TypeError,
        "^weight: .*Laplace",
    ),
    "weight shape": (
        dict(X=X3, y=Y3, weight=dist.Normal(torch.zeros(2), 1.0)),
        ValueError,
        "^weight",
    ),
    "zero scale": (dict(X=X3, y=Y3, scale=0.0), ValueError, "^scale: "),
    "scale of flat": (dict(X=X3, y=Y3, weight=None, scale=2.0), ValueError, "^scale: "),
    "few rows": (
        dict(X=X3[:2], y=Y3[:2], weight=None, noise=1.0),
        ValueError,
        "^weight: .*improper",
    ),
    "repeated": (
        dict(X=X3[:, [0, 1, 0]], y=Y3, weight=None, noise=1.0),
        ValueError,
        "improper.* only 2",
    ),
    "constant": (
        dict(
            X=np.column_stack([X3, np.full(6, 0.1)]), y=Y3, weight=None, noise=1.0, intercept=True
        ),
        ValueError,
        "constant column",
    ),
    "no rows": (dict(X=X3[:0], y=Y3[:0], noise=1.0, intercept=True), ValueError, "improper"),
    "flat noise": (dict(X=X3[:4], y=Y3[:4], weight=None, noise=None), ValueError, "at least 5"),
    "no rows, flat noise": (dict(X=X3[:0], y=Y3[:0], noise=None), ValueError, "^noise: .*improper"),
    "exact fit": (dict(X=X3, y=X3 @ np.ones(3)), ValueError, "^noise: .*exact linear"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    arguments, error, words = BAD[name]
    with pytest.raises(error, match=words):
        exact_posterior(**arguments)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_prior_sd_must_be_positive(scale):
    weight = dist.Normal(0.0, torch.tensor(scale), validate_args=False)
    with pytest.raises(ValueError, match="^weight: .*positive"):
        exact_posterior(X3, Y3, weight=weight)


def test_bad_requests_are_named():
    post = exact_posterior(X3, Y3)
    for q in (0.0, 1.0, [0.5, -1], np.nan):
        with pytest.raises(ValueError, match="^q: "):
            post.quantile(q)
    with pytest.raises(ValueError, match="^n: "):
        post.sample(-1)
    with pytest.raises(ValueError, match="^num_samples: "):
        post.to_datatree(0)
    with pytest.raises(ValueError, match="^features: "):
        post.to_datatree(5, features=["a"])
    with pytest.raises(ValueError, match="^scales: "):
        log_evidence_curve(X3, Y3, scales=[1.0, 0.0], noise=1.0)
    with pytest.raises(ValueError, match="^noise: "):
        evidence_maximum(X3, Y3, noise=1.0, maximize_noise=True)
    few = exact_posterior(X3[:5], Y3[:5], weight=None, noise=None)
    with pytest.raises(ValueError, match="^loo: "):
        few.loo()


@pytest.mark.parametrize("shape", [(5, 5), (6, 5), (5, 10)])
def test_loo_where_the_others_can_be_fitted_exactly(shape):
    """Without a datum the noise may go to zero; each value against a refit."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=shape)
    y = X.sum(1) + rng.normal(size=shape[0])
    found = exact_posterior(X, y)
    loo = found.loo()
    for i in range(len(y)):
        without = exact_posterior(np.delete(X, i, 0), np.delete(y, i))
        assert abs(loo.pointwise[i] - (found.log_evidence - without.log_evidence)) < 1e-9


@pytest.mark.parametrize("X", [np.zeros((1, 1)), np.ones((2, 2)), np.ones((3, 3))])
def test_columns_that_say_nothing_are_no_exact_fit(X):
    """The evidence by a trapezoid rule over log noise of the dense marginal density."""
    y = np.arange(1.0, len(X) + 1) ** 2
    u = np.linspace(-6, 6, 4001)
    density = [
        stats.multivariate_normal.logpdf(y, cov=np.exp(2 * v) * np.eye(len(y)) + 100 * X @ X.T)
        + stats.halfnorm(scale=10).logpdf(np.exp(v))
        + v
        for v in u
    ]
    expected = np.log(integrate.trapezoid(np.exp(density), u))
    assert abs(exact_posterior(X, y).log_evidence - expected) < 1e-6
