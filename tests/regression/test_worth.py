"""Is being Bayesian worth it: the ridge path against other code, and answers that are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge as TheirRidge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ppvae.regression import (
    BayesianRegressor,
    evidence_maximum,
    exact_posterior,
    plots,
    worth_of_bayes,
)
from ppvae.regression.ridge import Ridge, squared_errors
from ppvae.regression.worth import BY_EVIDENCE, FULL, POINTS, Method


def data(rows, columns, noise, seed=0):
    generator = np.random.default_rng(seed)
    X = generator.standard_normal((rows, columns))
    y = X @ generator.standard_normal(columns) / columns**0.5
    return X, y + noise * generator.standard_normal(rows)


@pytest.fixture(scope="module")
def diabetes():
    return load_diabetes(return_X_y=True, as_frame=True, scaled=False)


def test_the_path_is_that_of_other_code(diabetes):
    X, y = diabetes[0].to_numpy()[:50], diabetes[1].to_numpy()[:50]
    ridge, new = Ridge.of(X, y), diabetes[0].to_numpy()[50:60]
    penalties = np.array([1e-3, 3.0, 400.0])
    left_out = []
    for penalty, mine in zip(penalties, ridge.predict(new, penalties), strict=True):
        theirs = make_pipeline(StandardScaler(), TheirRidge(penalty)).fit(X, y)
        np.testing.assert_allclose(mine, theirs.predict(new), rtol=1e-9)
        # in the units of all data, as a datum left out of those is at the same penalty
        Z = StandardScaler().fit_transform(X)
        left_out.append(y - cross_val_predict(TheirRidge(penalty), Z, y, cv=LeaveOneOut()))
    np.testing.assert_allclose(ridge.errors(penalties)[1], left_out, rtol=1e-7)
    np.testing.assert_allclose(ridge.errors(penalties)[0], y - ridge.predict(X, penalties))
    parts = np.array_split(np.arange(50), 5)
    model = make_pipeline(StandardScaler(), TheirRidge(3.0))
    cuts = [(np.delete(np.arange(50), part), part) for part in parts]
    squared = np.mean((y - cross_val_predict(model, X, y, cv=cuts)) ** 2)
    assert squared_errors(X, y, penalties, parts)[1] == pytest.approx(squared)


def test_the_evidence_is_that_of_the_exact_posterior(diabetes):
    Z = StandardScaler().fit_transform(np.column_stack(diabetes))
    best = evidence_maximum(Z[:, :-1], Z[:, -1], maximize_noise=True, intercept=True)
    ridge = Ridge.of(*(np.asarray(part) for part in diabetes))
    ratio = (best.noise / best.scale) ** 2
    log_evidence, noise = ridge.evidence(np.array([ratio / 2, ratio, ratio * 2]))
    assert log_evidence[1] == pytest.approx(best.log_evidence) and log_evidence.argmax() == 1
    assert noise[1] == pytest.approx(best.noise * diabetes[1].std(ddof=0))
    wide = diabetes[0].to_numpy()[:8], diabetes[1].to_numpy()[:8]
    for (X, y), penalty in (((np.asarray(p) for p in diabetes), ratio), (wide, 3.0)):
        ridge = Ridge.of(X, y)
        Z = ridge.units.standardize(np.column_stack([X, y]))
        # with known noise the prediction is that of the exact posterior, of wide tables, too
        prior = dist.Normal(0.0, torch.tensor(penalty**-0.5))
        new = exact_posterior(Z[:, :-1], Z[:, -1], weight=prior, noise=1.0, intercept=True)
        line = new.predict(Z[:5, :-1] + 1.0)
        shifted = (Z[:5, :-1] + 1.0) * ridge.units.spread[:-1] + ridge.units.center[:-1]
        np.testing.assert_allclose(ridge.spread(shifted, penalty), line.epistemic_sd**2, rtol=1e-7)


def test_the_methods_are_those_of_other_code(diabetes):
    X, y = (part.to_numpy(dtype=float) for part in diabetes)
    X, y, new, target = X[:80], y[:80], X[80:], y[80:]
    found = worth_of_bayes(X, y, test=(new, target), level=0.8)
    assert list(found.methods) == [*POINTS, BY_EVIDENCE, FULL]
    design = np.column_stack([np.ones(80), X])
    weight, residual = np.linalg.lstsq(design, y)[:2]
    mean, noise = np.column_stack([np.ones(len(new)), new]) @ weight, np.sqrt(residual[0] / 69)
    least = found.methods["least squares"]
    np.testing.assert_allclose(least.log_density, stats.norm.logpdf(target, mean, noise))
    assert least.coverage == np.mean(abs(target - mean) < stats.norm.ppf(0.9) * noise)
    assert least.rmse == pytest.approx(np.sqrt(np.mean((target - mean) ** 2)))
    # whose noise has a floor of a millionth
    regressor = BayesianRegressor().fit(X, y)
    full, (low, high) = found.methods[FULL], regressor.predict_interval(new, level=0.8)
    np.testing.assert_allclose(full.log_density, regressor.log_prob(new, target), rtol=1e-6)
    np.testing.assert_allclose(full.error, target - regressor.predict(new), rtol=1e-4)
    assert (full.inside == ((low < target) & (target < high))).all()
    gains = full.log_density - least.log_density
    error = gains.std() / np.sqrt(len(gains))
    assert found.gain_over("least squares") == pytest.approx((gains.mean(), error))
    assert found.gain_over(FULL) == (0.0, 0.0)


def test_folds_hold_out_every_row_once_in_the_order_of_the_rows(diabetes):
    """And units change nothing but the density, by their logarithm."""
    X, y = (part.to_numpy(dtype=float)[:60] for part in diabetes)
    found = worth_of_bayes(X, y, num_folds=3, seed=1)
    other = worth_of_bayes(pd.DataFrame(1e3 * X + 7), 1e-2 * y - 1, num_folds=3, seed=1)
    predicted = y - found.methods["ridge by evidence"].error
    assert np.corrcoef(predicted, y)[0, 1] > 0.4
    for name, method in found.methods.items():
        assert len(method.error) == 60 and method.rmse < 1.1 * y.std()
        shifted = other.methods[name].log_density + np.log(1e-2)
        np.testing.assert_allclose(method.log_density, shifted, rtol=1e-6)
        assert (method.inside == other.methods[name].inside).all()
    np.testing.assert_allclose(found.path.penalties, other.path.penalties)
    assert worth_of_bayes(X, y, num_folds=3, seed=1).verdict == found.verdict


def test_it_says_yes_where_data_are_few_and_that_nothing_is_gained_where_they_are_many():
    """15 rows for ten columns; and 3,000, where all methods are alike to a few rows' worth."""
    few, many = data(1015, 10, 1.0), data(4000, 10, 1.0)
    found = worth_of_bayes(few[0][:15], few[1][:15], test=(few[0][15:], few[1][15:]))
    gain, error = found.gain
    assert gain > 2 * error and found.verdict.startswith("Yes: the full posterior predicts better")
    assert found.methods[FULL].coverage > found.methods["least squares"].coverage + 0.2
    assert "has 1" not in found.verdict and "Over least squares it gains" in found.verdict
    found = worth_of_bayes(many[0][:3000], many[1][:3000], test=(many[0][3000:], many[1][3000:]))
    assert abs(found.gain[0]) < 0.003 and "Yes" not in found.verdict
    assert found.line_share < 0.01
    # of 1000 new data: five standard errors of a share of 90 %
    assert abs(found.methods[FULL].coverage - 0.9) < 5 * np.sqrt(0.09 / 1000)


def test_more_columns_than_rows_leave_least_squares_without_a_noise():
    X, y = data(240, 60, 0.5)
    found = worth_of_bayes(X[:40], y[:40], test=(X[40:], y[40:]))
    assert "least squares" not in found.methods
    assert "Least squares has no noise left" in found.verdict
    assert found.line_share > 0.1 and np.isfinite(found.path.held_out).all()


def test_a_target_of_noise_alone_is_predicted_by_its_mean():
    """Six numbers that are fitted to 200 rows cost 6 / 400 nats: twice that, and five errors."""
    X, _ = data(400, 5, 1.0)
    y = np.random.default_rng(1).standard_normal(400)
    found = worth_of_bayes(X[:200], y[:200], test=(X[200:], y[200:]))
    best = stats.norm.logpdf(y[200:])
    for method in found.methods.values():
        away = method.log_density - best
        assert abs(away.mean()) < 2 * 6 / 400 + 5 * away.std() / np.sqrt(200)
    assert found.path.chosen["ridge by evidence"] > 0.5


def test_guides_predict_as_their_posteriors_do():
    """Of columns that are nearly independent the mean field is nearly exact."""
    X, y = data(360, 4, 1.0)
    found = worth_of_bayes(X[:60], y[:60], test=(X[60:], y[60:]), guides=True)
    for name in ("mean field", "horseshoe, mean field"):
        gain, _ = found.gain_over(name)
        assert abs(gain) < 0.03 and found.methods[name].note
    assert "mean field" in repr(found)


def test_it_reads_as_an_answer_and_draws_one_picture(diabetes):
    found = worth_of_bayes(*diabetes)
    assert repr(found).startswith("442 rows, 10 columns; 5 folds; each method standardises")
    assert "It makes no difference that these data show" in repr(found)
    left, right = plots.worth(found).axes
    assert {line.get_label() for line in left.lines} >= {"training", "held out", *list(POINTS)[1:]}
    assert [text.get_text() for text in right.get_yticklabels()] == [FULL, *POINTS, BY_EVIDENCE]
    with pytest.raises(TypeError, match="^found: expected what worth_of_bayes returns, got int"):
        plots.worth(3)


@pytest.mark.parametrize(
    "gain, spread, words",
    [
        (
            0.1,
            0.1,
            "Yes: the full posterior predicts better than the best point, least",
        ),
        (0.005, 0.001, "Hardly: the full posterior predicts better"),
        (0.1, 5.0, "It makes no difference that these data show: 0.1"),
        (-0.1, 0.1, "No: the full posterior predicts worse"),
    ],
)
def test_the_words_are_those_of_the_numbers(gain, spread, words):
    """Of 100 pairs that differ by the gain and a spread, of which the error is a tenth."""
    found = worth_of_bayes(*data(30, 3, 1.0))
    zeros = np.zeros(100)
    gains = gain + spread * np.tile([1.0, -1.0], 50)
    methods = {
        n: Method(v, zeros, zeros < 1) for n, v in {"least squares": zeros, FULL: gains}.items()
    }
    found = replace(found, methods=methods)
    assert found.gain == pytest.approx((gain, spread / 10))
    assert found.verdict.startswith(words) and "its own have 100% of the data" in found.verdict


def test_bad_arguments_are_named():
    X, y = data(30, 3, 1.0)
    for told, options in {
        "num_folds: expected a whole number of at least 2": {"num_folds": 1},
        "X: expected at least 40 rows": {"num_folds": 20},
        "level: expected a number between 0 and 1": {"level": 90},
        "test: expected at least one row": {"test": (X[:0], y[:0])},
    }.items():
        with pytest.raises(ValueError, match=f"^{told}"):
            worth_of_bayes(X, y, **options)
    with pytest.raises(ValueError, match="^y: expected numbers that differ, got 1.0 only"):
        worth_of_bayes(X, np.ones(30))
    with pytest.raises(ValueError, match="^y: expected numbers that are no exact function"):
        worth_of_bayes(X, X @ [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="^name: expected one of"):
        worth_of_bayes(X, y).gain_over("lasso")
