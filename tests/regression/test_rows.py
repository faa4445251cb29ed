"""What rows have beside X and y: weights, a known noise, offsets and counts; names, and updates."""

import copy
import pickle

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import statsmodels.api as sm
import torch
import xarray as xr
from regressions import COUNTS, HALF, OFFSET, ONES, ROWS, SDS, UNIT, X, Y, correlated, dense, same
from scipy import stats

from ppvae.regression import ConjugateNormal, combine, exact_posterior, factorize

# what is said of priors that are far from the data is asked for in test_conflict.py
pytestmark = pytest.mark.filterwarnings("ignore:prior and data disagree")


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


def test_names_come_from_tables_and_bad_rows_are_named():
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
    "noise: expected a positive number, a distribution": dict(noise=xr.Dataset()),
    "offset: expected finite": dict(offset=np.full(ROWS, np.nan)),
    "counts: expected a number from 0 .* -1 in row 0": dict(counts=np.full(ROWS, -1)),
    "counts: expected a number .* 1e.101 in row 0": dict(counts=np.full(ROWS, 1e101)),
    "offset: expected a number from -1e.100 to": dict(offset=np.full(ROWS, -1e101)),
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


def test_posteriors_with_weights_are_values():
    post = exact_posterior(X, Y, noise=HALF, weights=SDS, offset=OFFSET, weight=correlated())
    for other in (copy.deepcopy(post), pickle.loads(pickle.dumps(post))):
        np.testing.assert_array_equal(other.mean, post.mean)
        assert repr(other) == repr(post)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_by_its_argument(number):
    """Wherever it is: what a decomposition makes of it says little of where it was."""
    for shape in ((1, 1), (2, 1), (3, 3), (4, 2)):
        rows, target = np.ones(shape), np.ones(shape[0])
        for place in np.ndindex(shape):
            bad = rows.copy()
            bad[place] = number
            with pytest.raises(ValueError, match="^X: expected finite numbers, got 1 that"):
                exact_posterior(bad, target, noise=1.0)
        for place in range(shape[0]):
            bad = np.where(np.arange(shape[0]) == place, number, target)
            with pytest.raises(ValueError, match="^y of block 0: expected finite numbers"):
                exact_posterior([(rows, bad)], noise=1.0)
