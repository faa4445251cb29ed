"""Posteriors of the same data, ranked."""

import numpy as np
import pyro.distributions as dist
import pytest
from regressions import COUNTS, HALF, ROWS, X, Y

from ppvae.regression import compare, exact_posterior, factorize

# what is said of priors that are far from the data is asked for in test_conflict.py
pytestmark = pytest.mark.filterwarnings("ignore:prior and data disagree")


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
