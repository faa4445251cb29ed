"""Labels of rows and columns: what does not fit together is refused, wherever rows are given."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from ppvae import likelihoods
from ppvae.regression import (
    BayesianClassifier,
    BayesianRegressor,
    GeneralizedLinear,
    LinearRegression,
    exact_posterior,
    factorize,
    objective,
    predictive_scores,
    worth_of_bayes,
)

ROWS = 12
GENERATOR = np.random.default_rng(5)
VALUES = GENERATOR.normal(size=(ROWS, 2))
LABELS = [f"r{i}" for i in range(ROWS)]
X = pd.DataFrame(VALUES, index=LABELS, columns=["a", "b"])
Y = pd.Series(VALUES @ [1.0, -2.0] + 0.5 * GENERATOR.normal(size=ROWS), index=LABELS)
SIDE = pd.Series(GENERATOR.uniform(0.5, 2.0, ROWS), index=LABELS)
BITS = (Y > Y.median()).astype(int)
POSTERIOR = exact_posterior(X, Y, noise=0.5)
NOISY = exact_posterior(X, Y, noise=SIDE)
MODEL = LinearRegression(2, noise=0.5)


def guide(*_, **__):
    torch.zeros(0)


# what takes rows: the argument that has the labels of X, and a call with it
CALLS = {
    "exact_posterior, y": ("y", Y, lambda y: exact_posterior(X, y, noise=0.5)),
    "a column of a table": ("y", Y.to_frame(), lambda y: exact_posterior(X, y, noise=0.5)),
    "weights": ("weights", SIDE, lambda s: exact_posterior(X, Y, noise=0.5, weights=s)),
    "offset": ("offset", SIDE, lambda s: exact_posterior(X, Y, noise=0.5, offset=s)),
    "counts": ("counts", SIDE, lambda s: exact_posterior(X, Y, noise=0.5, counts=s)),
    "noise": ("noise", SIDE, lambda s: exact_posterior(X, Y, noise=s)),
    "factorize": ("y", Y, lambda y: factorize(X, y)),
    "a block": ("y of block 1", Y, lambda y: factorize([(X, Y), (X, y)])),
    "predict, offset": ("offset", SIDE, lambda s: POSTERIOR.predict(X, offset=s)),
    "predict, noise": ("noise", SIDE, lambda s: NOISY.predict(X, noise=s)),
    "log_prob": ("y", Y, POSTERIOR.predict(X).log_prob),
    "cdf": ("y", Y, POSTERIOR.predict(X).cdf),
    "update": ("y", Y, lambda y: POSTERIOR.update(X, y)),
    "loo": ("y", Y, lambda y: POSTERIOR.loo(X, y)),
    "worth": ("y", Y, lambda y: worth_of_bayes(X, y, num_folds=3)),
    "worth, test": ("y of test", Y, lambda y: worth_of_bayes(X, Y, num_folds=2, test=(X, y))),
    "LinearRegression": ("y", Y, lambda y: LinearRegression.of(X, y, scale="data")),
    "without units": ("y", Y, lambda y: LinearRegression.of(X, y)),
    "its weights": (
        "weights", SIDE, lambda s: LinearRegression.of(X, Y, weights=s, scale="data")
    ),
    "GeneralizedLinear": (
        "counts", SIDE, lambda s: GeneralizedLinear.of(X, BITS, likelihoods.Bernoulli(), counts=s)
    ),
    "scores": ("y", Y, lambda y: predictive_scores(X, y, np.ones((3, 2)), 1.0)),
    "regressor": ("y", Y, lambda y: BayesianRegressor().fit(X, y)),
    "regressor, log_prob": ("y", Y, lambda y: BayesianRegressor().fit(X, Y).log_prob(X, y)),
    "sample_weight": ("sample_weight", SIDE, lambda s: BayesianRegressor().fit(X, Y, s)),
    "classifier": ("y", BITS, lambda y: BayesianClassifier().fit(X, y)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:prior and data disagree")
@pytest.mark.parametrize("call", CALLS)
def test_rows_have_the_same_labels_in_the_same_order(call):
    name, side, function = CALLS[call]
    function(side)  # which fits
    first = "X" + name[len(name.split()[0]) :]
    told = f"^{name}: expected the row labels of {first}, in this order, or an array"
    for other, kind in (
        (side[::-1], "these in another order: row 0 is 'r11' here and 'r0' there"),
        (side.reset_index(drop=True), "others: row 0 is 0 here and 'r0' there"),
    ):
        with pytest.raises(ValueError, match=f"{told}, which has none, got {kind}"):
            function(other)


def test_an_objective_reads_labels_too():
    told = "^{}: expected the row labels of X"
    with pytest.raises(ValueError, match=told.format("y")):
        objective(MODEL, guide, X, Y[::-1])
    with pytest.raises(ValueError, match=told.format("weights")):
        objective(MODEL, guide, X, Y, kwargs={"weights": SIDE[::-1]})


def same(one, other):
    np.testing.assert_array_equal(one.mean, other.mean)
    np.testing.assert_array_equal(one.sd, other.sd)


def test_an_array_goes_by_position():
    """On either side, and what has labels beside it has to agree with the rest that has some."""
    same(exact_posterior(X, Y.to_numpy(), noise=0.5), POSTERIOR)
    same(exact_posterior(VALUES, Y[::-1].to_numpy()[::-1], noise=0.5), POSTERIOR)
    same(exact_posterior(VALUES, list(Y), noise=torch.tensor(SIDE.tolist())), NOISY)
    with pytest.raises(ValueError, match="^weights: expected the row labels of y, in this order"):
        exact_posterior(VALUES, Y, noise=0.5, weights=SIDE[::-1])


@pytest.mark.parametrize(
    "index",
    [
        np.arange(ROWS) + 0.5,
        pd.Index([*LABELS[:-2], None, np.nan], dtype=object),
        pd.date_range("2020-01-01", periods=ROWS),
        pd.MultiIndex.from_product([["a", "b"], range(ROWS // 2)]),
        ["twice"] * ROWS,
    ],
)
def test_labels_are_of_any_kind(index):
    """Such as are missing or not unique, too, as only their order is asked."""
    table, y = X.set_axis(index), Y.set_axis(index)
    same(exact_posterior(table, y, noise=0.5), POSTERIOR)
    with pytest.raises(ValueError, match="^y: .*others: row 3 is 'new' here"):
        exact_posterior(table, y.set_axis([*index[:3], "new", *index[4:]]), noise=0.5)


def test_the_first_row_that_differs_is_named():
    turned = Y.iloc[[0, 1, 2, 3, 5, 4, *range(6, ROWS)]]
    with pytest.raises(ValueError, match="these in another order: row 4 is 'r5' here and 'r4' th"):
        exact_posterior(X, turned, noise=0.5)


def test_arrays_of_xarray_have_labels_where_they_have_coordinates():
    coords = {"row": LABELS, "column": ["a", "b"]}
    array = xr.DataArray(VALUES, coords, ("row", "column"))
    y = xr.DataArray(Y.to_numpy(), {"row": LABELS}, ("row",))
    post = exact_posterior(array, y, noise=0.5)
    same(post, POSTERIOR)
    assert post.names == POSTERIOR.names
    same(exact_posterior(X, y, noise=xr.DataArray(SIDE.to_numpy())), NOISY)  # without coordinates
    with pytest.raises(ValueError, match="^y: expected the row labels of X"):
        exact_posterior(array, y[::-1], noise=0.5)
    with pytest.raises(ValueError, match="^noise: expected the row labels of X"):
        exact_posterior(X, y, noise=xr.DataArray(SIDE.to_numpy()[::-1], coords=y[::-1].coords))
    with pytest.raises(ValueError, match=r"^X: expected the columns \('a', 'b'\), in this order"):
        post.predict(array[:, ::-1])


def test_numbers_of_columns_are_names_too():
    """So that those of another order are refused; beside names they go by position."""
    table = pd.DataFrame(VALUES)
    post = exact_posterior(table, Y.to_numpy(), noise=0.5)
    assert post.names == ["weight[0]", "weight[1]"]
    assert post.to_datatree(3, seed=0)["posterior"]["feature"].values.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"^X: expected the columns \(0, 1\), in this order"):
        post.predict(table[[1, 0]])
    turned = exact_posterior(table[[1, 0]], Y.to_numpy(), noise=0.5)
    assert turned.names == ["weight[1]", "weight[0]"]
    with pytest.raises(ValueError, match=r"^X: expected the columns \(1, 0\), in this order"):
        turned.predict(table)
    expected = POSTERIOR.predict(VALUES).mean
    for new in (table, X, X.set_axis([0, 1], axis=1)):
        np.testing.assert_array_equal(POSTERIOR.predict(new).mean, expected)
    dates = table.set_axis(pd.date_range("2020-01-01", periods=2), axis=1)
    assert exact_posterior(dates, Y.to_numpy(), noise=0.5).names[1] == "weight[2020-01-02 00:00:00]"


def test_columns_that_are_held_out_are_those_of_the_data():
    with pytest.raises(ValueError, match=r"^test: expected the columns \('a', 'b'\), in this ord"):
        worth_of_bayes(X, Y, num_folds=2, test=(X[["b", "a"]], Y))
