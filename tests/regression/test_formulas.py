"""Formulas: the columns of statsmodels' own, and the same ones for new rows."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from sklearn.datasets import load_diabetes

from ppvae.regression import BayesianRegressor, design, exact_posterior

FORMULA = "target ~ bmi + C(sex) + center(age) + bmi:bp"


@pytest.fixture(scope="module")
def table():
    return load_diabetes(as_frame=True, scaled=False).frame.assign(
        sex=lambda t: np.where(t.sex > 1, "m", "f")
    )


def test_the_columns_are_those_of_another_program(table):
    """Flat priors give least squares, which statsmodels makes of the same formula."""
    made = design(FORMULA, table)
    post = exact_posterior(made.X, made.y, weight=None, noise=None, intercept=made.intercept)
    theirs = smf.ols(FORMULA, table).fit().params
    # in another order
    assert {"intercept", *(f"weight[{name}]" for name in theirs.index[1:])} == {*post.names[:-1]}
    weights = dict(zip(post.names, post.mean, strict=True))
    mine = [weights["intercept"], *(weights[f"weight[{name}]"] for name in theirs.index[1:])]
    np.testing.assert_allclose(mine, theirs, rtol=1e-8)


def test_new_rows_have_the_levels_and_means_of_the_first(table):
    made = design(FORMULA, table)
    few = table[table.sex == "m"][:3]
    new = made.of(few)
    assert list(new.columns) == list(made.X.columns) and len(new) == 3
    pd.testing.assert_frame_equal(new, made.X.loc[few.index])
    regressor = BayesianRegressor(fit_intercept=made.intercept).fit(made.X, made.y)
    assert regressor.predict(new).shape == (3,)


def test_without_an_intercept_every_level_has_a_column(table):
    made = design("target ~ 0 + C(sex)", table)
    assert not made.intercept and made.X.shape[1] == 2 and (made.X.to_numpy().sum(1) == 1).all()
    assert repr(made) == "Design of 442 rows: C(sex)[f], C(sex)[m]"


def test_a_column_that_is_called_intercept_is_kept_or_refused(table):
    """Beside its own, formulaic makes one column of the two."""
    own = table.assign(Intercept=table.bmi)
    made = design("target ~ 0 + age + Intercept", own)
    assert not made.intercept and list(made.X.columns) == ["age", "Intercept"]
    np.testing.assert_array_equal(made.X["Intercept"], table.bmi)
    np.testing.assert_array_equal(made.of(own[:4])["Intercept"], table.bmi[:4])
    assert list(design("target ~ age", own).X.columns) == ["age"]  # which does not ask for it
    for formula in ("target ~ age + Intercept", "target ~ Intercept"):
        with pytest.raises(ValueError, match="^data: expected another name of .*'Intercept'"):
            design(formula, own)


def test_bad_formulas_and_tables_are_named(table):
    for formula, told in {
        "bmi + age": "^formula: expected a target",
        "~ bmi": "^formula: expected a target",
        "target ~ bmi | age": "^formula: expected one target and one right side",
        "target | bmi ~ age": "^formula: expected one target and one right side",
        "C(sex) + age ~ bmi": "^formula: expected one numeric target",
        "target ~ 1": "^formula: expected at least one column",
        "target ~ weight": "^data: expected a table with all columns",
    }.items():
        with pytest.raises(ValueError, match=told):
            design(formula, table)
    with pytest.raises(TypeError, match="^formula: expected a string, got int"):
        design(3, table)
    with pytest.raises(ValueError, match="^data: expected .*nothing missing"):
        design(FORMULA, table.assign(bmi=[np.nan, *table.bmi[1:]]))
    made = design(FORMULA, table)
    for wrong in (table.assign(sex="x"), table.drop(columns="bp"), table.assign(bmi=np.nan)):
        with pytest.raises(ValueError, match="^data: expected"):
            made.of(wrong)
