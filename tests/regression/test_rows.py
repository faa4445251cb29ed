"""Weights, known noise, offsets and counts of rows, priors of all kinds, and wide data."""

import copy
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import statsmodels.api as sm
import torch
from scipy import stats

from ppvae.regression import (
    ConjugateNormal,
    LinearRegression,
    combine,
    compare,
    evidence_maximum,
    exact_posterior,
    factorize,
    g_prior,
    log_evidence_curve,
)

# what is said of priors that are far from the data is asked for in test_conflict.py
pytestmark = pytest.mark.filterwarnings("ignore:prior and data disagree")

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


def test_a_known_noise_of_each_row_is_the_dense_formula():
    post = exact_posterior(X, Y, weight=UNIT, noise=SDS, offset=OFFSET)
    mean, cov, evidence = dense(X, Y - OFFSET, np.zeros(3), np.eye(3), np.diag(SDS**2))
    np.testing.assert_allclose(post.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(post.covariance, cov, rtol=1e-10, atol=1e-14)
    assert post.log_evidence == pytest.approx(evidence, rel=1e-12)
    loo = post.loo()
    for i in range(ROWS):
        keep = np.arange(ROWS) != i
        rest = dense(X[keep], (Y - OFFSET)[keep], np.zeros(3), np.eye(3), np.diag(SDS[keep] ** 2))
        assert loo.pointwise[i] == pytest.approx(evidence - rest[2], rel=1e-9)


def test_weights_are_generalised_least_squares():
    """With flat priors, the noise too: the t distribution of statsmodels' WLS."""
    post = exact_posterior(
        X, Y, weight=None, noise=None, intercept=True, weights=SDS**-2.0, offset=OFFSET
    )
    fit = sm.WLS(Y - OFFSET, ONES, weights=SDS**-2.0).fit()
    np.testing.assert_allclose(post.mean[:4], fit.params, rtol=1e-10)
    # p(s) = 1 on s is one degree of freedom less than p(s) = 1 / s, which is least squares' own
    free = ROWS - 4 - 1
    scale = fit.bse * np.sqrt((ROWS - 4) / free)
    np.testing.assert_allclose(post.sd[:4], scale * np.sqrt(free / (free - 2)), rtol=1e-9)
    for q in (0.05, 0.7):
        expected = fit.params + scale * stats.t(free).ppf(q)
        np.testing.assert_allclose(post.quantile(q)[:4], expected, rtol=1e-9)


def test_weights_by_hand():
    """Rows divided by their sds, and the evidence less the sum of the logs of these."""
    weights = SDS**-2.0
    for priors in (dict(noise=HALF), dict(noise=0.7), dict(noise=HALF, scale=dist.HalfNormal(1.0))):
        post = exact_posterior(X, Y, weight=UNIT, weights=weights, offset=OFFSET, **priors)
        divided = exact_posterior(X / SDS[:, None], (Y - OFFSET) / SDS, weight=UNIT, **priors)
        np.testing.assert_allclose(post.mean, divided.mean, rtol=1e-12)
        log_sds = np.log(SDS)
        assert post.log_evidence == pytest.approx(divided.log_evidence - log_sds.sum(), rel=1e-12)
        expected = divided.loo().pointwise - log_sds
        np.testing.assert_allclose(post.loo().pointwise, expected, rtol=1e-9)


def test_one_weight_for_all_rows_is_another_noise():
    """Times 4, the noise has half the sd: a change of the unit of the noise alone."""
    post = exact_posterior(X, Y, weight=UNIT, noise=1.0, weights=np.full(ROWS, 4.0))
    same(post, exact_posterior(X, Y, weight=UNIT, noise=0.5))


@pytest.mark.parametrize("noise", [0.7, HALF])
def test_counts_are_repeated_rows(noise):
    options = dict(weight=UNIT, noise=noise, intercept=True)
    sides = {"weights": SDS**-2.0, "offset": OFFSET}
    repeated = {name: np.repeat(side, COUNTS) for name, side in sides.items()}
    often = exact_posterior(np.repeat(X, COUNTS, 0), np.repeat(Y, COUNTS), **repeated, **options)
    post = exact_posterior(X, Y, counts=COUNTS, **sides, **options)
    same(post, often)
    halves = exact_posterior(
        np.tile(X, (2, 1)), np.tile(Y, 2), counts=np.tile(COUNTS, 2) / 2,
        weights=np.tile(SDS**-2.0, 2), offset=np.tile(OFFSET, 2), **options,
    )  # fmt: skip
    same(halves, often)
    with pytest.raises(ValueError, match="^loo: expected rows of which each counts once"):
        post.loo()


def test_factors_of_rows_with_weights():
    sides = {"weights": SDS**-2.0, "offset": OFFSET, "counts": COUNTS}
    whole = exact_posterior(X, Y, weight=UNIT, noise=HALF, **sides)
    parts = np.array_split(np.arange(ROWS), 3)
    factors = [factorize(X[p], Y[p], **{n: side[p] for n, side in sides.items()}) for p in parts]
    same(exact_posterior(combine(factors), weight=UNIT, noise=HALF), whole)
    plain = exact_posterior(X, Y, weight=UNIT, noise=HALF, weights=sides["weights"])
    factors = [factorize(X[p], Y[p], weights=sides["weights"][p]) for p in parts]
    post = exact_posterior(combine(factors), weight=UNIT, noise=HALF)
    for number, part in enumerate(parts):
        others = combine(factors[:number] + factors[number + 1 :])
        found = post.loo(X[part], Y[part], weights=sides["weights"][part], others=others)
        np.testing.assert_allclose(found.pointwise, plain.loo().pointwise[part], rtol=1e-9)


@pytest.mark.parametrize(
    "priors",
    [
        dict(noise=0.7),
        dict(noise=HALF),
        dict(noise=HALF, scale=dist.HalfNormal(1.0)),
        dict(weight=ConjugateNormal(0.0, 2.0), noise=HALF),
        dict(noise=HALF, scale="data"),
    ],
)
def test_updates_are_all_data_at_once(priors):
    """Where priors are in units of data, in those of the first."""
    options = {"weight": UNIT, "intercept": True, **priors}
    first = exact_posterior(X[:12], Y[:12], **options)
    weights = np.ones(ROWS)
    weights[12:] = SDS[12:] ** -2.0
    offset = OFFSET * (np.arange(ROWS) >= 12)
    post = first.update(X[12:20], Y[12:20], weights=weights[12:20], offset=offset[12:20])
    post = post.update(
        factorize(X[20:], Y[20:], intercept=True, weights=weights[20:], offset=offset[20:])
    )
    if options.get("scale") == "data":
        units = Y[:12].std() / X[:12].std(0)
        options["scale"], options["weight"] = None, dist.Normal(torch.zeros(3), torch.tensor(units))
        options["noise"] = dist.HalfNormal(float(2 * Y[:12].std()))
    whole = exact_posterior(X, Y, weights=weights, offset=offset, **options)
    same(post, whole, 1e-11)
    assert post.rows is None  # as the last came as a factor
    kept = first.update(X[12:], Y[12:], weights=weights[12:], offset=offset[12:])
    np.testing.assert_allclose(kept.loo().pointwise, whole.loo().pointwise, rtol=1e-8)


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


COV = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.5]])
LOC = np.array([0.5, -1.0, 0.0])


def correlated(cov=COV, loc=LOC):
    return dist.MultivariateNormal(torch.as_tensor(loc), torch.as_tensor(cov))


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


def test_rows_are_asked_for_the_noise_that_others_had():
    """Else it would be one, without a word."""
    post = exact_posterior(X, Y, noise=SDS)
    for act in (lambda: post.predict(X), lambda: post.update(X, Y)):
        with pytest.raises(ValueError, match="^noise: expected the noise sd of each row"):
            act()
    np.testing.assert_array_equal(post.predict(X, noise=SDS).noise_sd, SDS)
    weighted = post.predict(X, weights=SDS**-2)  # which say the same
    np.testing.assert_allclose(weighted.noise_sd, SDS, rtol=1e-12)
    with pytest.raises(ValueError, match="^noise: expected the noise sd of each row"):
        post.update(X, Y, noise=SDS).predict(X)
    for noise in (0.7, HALF):  # of which a noise of each row would be a factor
        post = exact_posterior(X, Y, noise=noise)
        with pytest.raises(ValueError, match="^noise: expected none where all rows"):
            post.predict(X, noise=SDS)
        with pytest.raises(ValueError, match="^noise: expected none where all rows"):
            post.loo(X, Y, noise=SDS)
    of_weights = exact_posterior(X, Y, noise=1.0, weights=SDS**-2)
    np.testing.assert_array_equal(of_weights.predict(X, noise=SDS).noise_sd, SDS)


def test_leave_one_out_asks_for_the_weights_of_the_rows():
    post = exact_posterior(X, Y, noise=HALF, weights=SDS)
    with pytest.raises(ValueError, match="^weights, noise: expected those of the rows"):
        post.loo(X, Y)
    parts = [slice(10), slice(10, None)]
    blocks = [(X[part], Y[part]) for part in parts]
    factors = [
        factorize(*block, weights=SDS[part]) for block, part in zip(blocks, parts, strict=True)
    ]
    with pytest.raises(ValueError, match="^weights, noise: expected those of the rows"):
        post.loo(*blocks[0], others=factors[1])
    half = post.loo(*blocks[0], weights=SDS[:10], others=factors[1])
    np.testing.assert_allclose(half.pointwise, post.loo().pointwise[:10], rtol=1e-9)
    assert post.loo(X, Y, weights=SDS).total == pytest.approx(post.loo().total, rel=1e-12)


def test_a_posterior_as_a_prior_is_of_the_same_columns():
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(X, columns=["a", "b", "c"])
    before = exact_posterior(table, Y, noise=0.7)
    with pytest.raises(ValueError, match="^X: expected the columns .*'a', 'b', 'c'"):
        exact_posterior(table[["b", "a", "c"]], Y, weight=before, noise=0.7)


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


def test_a_row_without_which_the_posterior_is_improper_is_told():
    """A category of one row with a flat prior: what it adds is known from that row alone."""
    one = np.column_stack([X, np.eye(ROWS)[0]])
    post = exact_posterior(one, Y, weight=None, noise=HALF)
    lost = "undefined (the posterior is improper without one of the rows)"
    assert np.isnan(post.loo().pointwise[0]) and np.isfinite(post.loo().pointwise[1:]).all()
    assert repr(post.loo()) == f"LeaveOneOut of {ROWS} rows: {lost}"
    assert f"leave-one-out {lost}" in repr(post)
    table = compare({"one": post, "none": exact_posterior(X, Y, weight=None, noise=HALF)})
    assert table.index.tolist() == ["none", "one"] and np.isnan(table.loc["one", "elpd_loo"])
    with pytest.raises(ValueError, match="^posteriors, counts: expected one whose rows count once"):
        compare({"counts": exact_posterior(X, Y, counts=COUNTS)})


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


def test_names_come_from_tables_and_bad_rows_are_named():
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(X, columns=["a", "b", "c"])
    post = exact_posterior(table, pd.DataFrame({"y": Y}), noise=HALF, intercept=True)
    assert post.names == ["intercept", "weight[a]", "weight[b]", "weight[c]", "noise"]
    assert "weight[b]" in repr(post) and "flat prior" in repr(post)
    tree = post.to_datatree(5, seed=0)
    assert tree["posterior"]["feature"].values.tolist() == ["a", "b", "c"]
    with pytest.raises(ValueError, match="^X: expected the columns .*'a', 'b', 'c'"):
        post.predict(table[["b", "a", "c"]])


BAD = {
    "weights: expected a positive number .* -1 in row 2": dict(weights=[1, 1, -1] + [1] * 27),
    "weights: expected shape": dict(weights=np.ones(3)),
    "weights: expected nothing beside the noise sd": dict(weights=np.ones(ROWS), noise=SDS),
    "noise: expected a positive": dict(noise=np.zeros(ROWS)),
    "noise: expected shape": dict(noise=np.ones(4)),
    "offset: expected finite": dict(offset=np.full(ROWS, np.nan)),
    "counts: .* -1 in row 0": dict(counts=np.full(ROWS, -1)),
    "scale: .*'data'": dict(scale="rows"),
    "weight: expected a Normal with one loc": dict(weight=correlated(np.eye(2), np.zeros(2))),
    "weight: .*unknown noise": dict(weight=exact_posterior(X, Y)),
    "intercept: expected True .flat.": dict(intercept=UNIT, scale=dist.HalfNormal(1.0)),
    "intercept: .*HalfNormal": dict(intercept=dist.HalfNormal(1.0)),
    "y: .*vary": dict(y=np.ones(ROWS), scale="data", intercept=True),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_named(words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        exact_posterior(**{"X": X, "y": Y, **BAD[words]})


def test_a_posterior_of_another_kind_is_refused_as_a_prior():
    with pytest.raises(TypeError, match="^weight: .*LinearRegression with a guide"):
        exact_posterior(X, Y, weight=dist.Laplace(0.0, 1.0))
    for given in ({}, {"scale": 1.0, "covariance": np.eye(2)}):
        with pytest.raises(TypeError, match="^scale, covariance: expected one"):
            ConjugateNormal(0.0, **given)
    with pytest.raises(ValueError, match="^covariance: expected a positive definite"):
        ConjugateNormal(covariance=-np.eye(2))
    with pytest.raises(ValueError, match="^X: expected 2 independent columns, got 1"):
        g_prior(np.ones((4, 2)))


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


def test_comparison_ranks_by_leave_one_out():
    fits = {
        "all": exact_posterior(X, Y, noise=HALF, intercept=dist.Normal(0.0, 5.0)),
        "one": exact_posterior(X[:, :1], Y, noise=HALF, intercept=dist.Normal(0.0, 5.0)),
        "flat": exact_posterior(X, Y, weight=None, noise=HALF, intercept=True),
    }
    table = compare(fits)
    assert (np.diff(table["elpd_loo"]) <= 0).all() and table["elpd_diff"].iloc[0] == 0
    for name, row in table.iterrows():
        loo = fits[name].loo()
        assert (row["elpd_loo"], row["se"]) == (loo.total, loo.standard_error)
        away = fits[table.index[0]].loo().pointwise - loo.pointwise
        assert row["elpd_diff"] == pytest.approx(away.sum())
        assert row["dse"] == pytest.approx(np.sqrt(ROWS * away.var()))
    both = table.loc[["all", "one"]]
    odds = np.exp(both["log_evidence"] - both["log_evidence"].max())
    np.testing.assert_allclose(both["probability"], odds / odds.sum(), rtol=1e-12)
    assert np.isnan(table.loc["flat", "probability"])
    with pytest.raises(ValueError, match="^posteriors, other: expected the same y"):
        compare({**fits, "other": exact_posterior(X, Y + 1, noise=HALF)})
    with pytest.raises(ValueError, match="^posteriors, blocks: expected one that keeps"):
        compare({"blocks": exact_posterior(factorize(X, Y), noise=HALF)})


def test_posteriors_with_weights_are_values():
    post = exact_posterior(X, Y, noise=HALF, weights=SDS, offset=OFFSET, weight=correlated())
    for other in (copy.deepcopy(post), pickle.loads(pickle.dumps(post))):
        np.testing.assert_array_equal(other.mean, post.mean)
        assert repr(other) == repr(post)
