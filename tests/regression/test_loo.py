"""Each datum predicted from all others: exactly, against posteriors that are fitted without it."""

import numpy as np
import pyro.distributions as dist
import pytest
from regressions import simulated
from scipy import stats

from ppvae.regression import ConjugateNormal, LeaveOneOut, combine, exact_posterior, factorize

# words of priors that are far from data are asked for in test_conflict.py
pytestmark = pytest.mark.filterwarnings("ignore:prior and data disagree")

NORMAL, HALF = dist.Normal(0.0, 1.0), dist.HalfNormal(1.0)
SMALL, PLAIN = simulated(9, 2, seed=2), simulated(12, 3)
#: an outlier, whose absence changes the posterior of the noise altogether
OUTLIER = SMALL[0], SMALL[1] + 40.0 * (np.arange(9) == 3)
#: without a datum the others can be fitted exactly, and the noise may go to zero
EXACT = [simulated(*shape, noise=1.0) for shape in ((5, 5), (6, 5), (5, 10))]
WIDE = simulated(6, 20, noise=1.0)
#: two rows that differ by little: a singular value of which rounding leaves few digits
TWINS = WIDE[0] + np.outer(np.arange(6) == 1, WIDE[0][0] * (1 + 1e-11) - WIDE[0][1]), WIDE[1]
LOO = {
    "known": (OUTLIER, dict(weight=NORMAL, noise=0.7)),
    "known flat": (OUTLIER, dict(weight=None, noise=0.7, intercept=True)),
    "unknown": (OUTLIER, dict(weight=NORMAL, noise=dist.HalfCauchy(2.5))),
    "flat": (OUTLIER, dict(weight=None, noise=None)),
    "scale": (OUTLIER, dict(weight=NORMAL, noise=0.7, scale=HALF)),
    "both": (OUTLIER, dict(weight=NORMAL, noise=HALF, scale=dist.LogNormal(0.0, 0.5))),
    # every datum moves the posterior: the priors contradict them all
    "conflict": ((PLAIN[0], PLAIN[1] * 1e4), dict(weight=NORMAL, noise=HALF)),
    "tight": (PLAIN, dict(weight=NORMAL, noise=dist.LogNormal(-3.0, 0.01))),
    **{f"exact fit {i}": (data, dict()) for i, data in enumerate(EXACT)},
    "wide": (WIDE, dict(weight=NORMAL, noise=HALF, scale=HALF, intercept=True)),
    "wide, flat": (WIDE, dict(weight=NORMAL, noise=0.1, scale=None, intercept=True)),
    "wide, conjugate": (WIDE, dict(weight=ConjugateNormal(0.0, 1.0), noise=HALF, scale=HALF)),
    "twins": (TWINS, dict(weight=NORMAL, noise=HALF, scale=HALF)),
}


@pytest.mark.parametrize("name", LOO)
def test_leave_one_out_is_refitting(name):
    (X, y), priors = LOO[name]
    whole = exact_posterior(X, y, **priors)
    loo = whole.loo()
    for i in range(len(y)):
        rest = exact_posterior(np.delete(X, i, 0), np.delete(y, i), **priors)
        exact = whole.log_normalizer - rest.log_normalizer
        assert loo.pointwise[i] == pytest.approx(exact, abs=1e-8, rel=1e-12), i
    assert loo.total == pytest.approx(loo.pointwise.sum())
    assert loo.standard_error == pytest.approx(np.sqrt(len(y) * np.var(loo.pointwise)))


@pytest.mark.parametrize("name", LOO)
def test_leave_one_out_of_blocks_is_that_of_all_rows(name):
    """To 1e-12 of what it is computed from: where data are left out by fitting, two evidences."""
    (X, y), priors = LOO[name]
    intercept = priors.get("intercept", False)
    priors = {key: value for key, value in priors.items() if key != "intercept"}
    parts = [slice(0, 1), slice(1, 4), slice(4, None)]
    factors = [factorize(X[part], y[part], intercept=intercept) for part in parts]
    post = exact_posterior(combine(factors), **priors)
    found = [
        post.loo(X[part], y[part], others=combine([*factors[:i], *factors[i + 1 :]]))
        for i, part in enumerate(parts)
    ]
    whole = exact_posterior(X, y, intercept=intercept, **priors)
    pairs = zip(LeaveOneOut.combine(found), whole.loo(), strict=True)
    bound = 1e-12 * max(1.0, abs(whole.log_normalizer))
    for block, exact in pairs:
        np.testing.assert_allclose(block, exact, rtol=1e-12, atol=bound)


def test_wide_data_are_not_fitted_anew(monkeypatch):
    """As many coordinates as rows: nothing is left beside them that could lose digits."""
    X, y = WIDE
    for priors in (LOO["wide"][1], LOO["wide, conjugate"][1]):
        post = exact_posterior(X, y, **priors)
        expected = post.loo().pointwise
        monkeypatch.setattr("ppvae.regression.loo.make_problem", None)
        np.testing.assert_array_equal(post.loo().pointwise, expected)


def test_leave_one_out_of_the_only_datum_of_a_column():
    X = np.column_stack([np.ones(8), np.eye(8)[0]])
    y = np.arange(8.0)
    flat = exact_posterior(X, y, weight=None, noise=1.0).loo()
    assert np.isnan(flat.pointwise[0]) and np.isfinite(flat.pointwise[1:]).all()
    vague = exact_posterior(X, y, weight=dist.Normal(0.0, 1e6), noise=1.0).loo()
    spread = np.sqrt(1e12 + 1 + 1 / 7)
    assert vague.pointwise[0] == pytest.approx(stats.norm(4.0, spread).logpdf(0.0), abs=1e-9)
