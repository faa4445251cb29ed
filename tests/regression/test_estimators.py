"""The estimators: scikit-learn's own checks, and known answers."""

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import statsmodels.api as sm
import torch
from cases import LONG
from scipy import integrate, special
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_diabetes, load_iris
from sklearn.linear_model import BayesianRidge, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import ppvae
from ppvae import NarrowFamily, NotConverged, families
from ppvae.regression import (
    BayesianClassifier,
    BayesianRegressor,
    ConjugateNormal,
    Horseshoe,
    exact_posterior,
)

# their data are of all kinds, some of a few rows, and separable
TELLS = [
    pytest.mark.filterwarnings(f"ignore::{kind.__module__}.{kind.__qualname__}")
    for kind in (NarrowFamily, NotConverged)
]
FLAT = {"weight": None, "noise": None}
# Of the classifier only at length: what goes the way of other checks, or of tests below, and of the
# regressor, whose data are read in the same lines.
AGAIN = [
    "check_classifier_data_not_an_array",
    "check_classifiers_classes",
    "check_dict_unchanged",
    "check_dont_overwrite_attributes",
    "check_dont_overwrite_parameters",
    "check_dtype_object",
    "check_estimators_dtypes",
    "check_estimators_fit_returns_self",
    "check_estimators_nan_inf",
    "check_estimators_overwrite_params",
    "check_estimators_pickle",
    "check_f_contiguous_array_estimator",
    "check_fit2d_predict1d",
    "check_fit_idempotent",
    "check_fit_score_takes_y",
    "check_methods_sample_order_invariance",
    "check_methods_subset_invariance",
    "check_n_features_in_after_fitting",
    "check_pipeline_consistency",
    "check_positive_only_tag_during_fit",
    "check_readonly_memmap_input",
    "check_sample_weight_equivalence_on_dense_data",
    "check_sample_weights_list",
    "check_sample_weights_not_an_array",
    "check_sample_weights_not_overwritten",
    "check_sample_weights_pandas_series",
]


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True, as_frame=True, scaled=False)
    return X, y


@pytest.fixture(scope="module")
def binary():
    generator = np.random.default_rng(0)
    X = generator.normal([3.0, -100.0], [2.0, 50.0], (60, 2))
    logits = (X - [3.0, -100.0]) @ [0.8, -0.02] + 0.3
    return X, np.where(generator.random(60) < special.expit(logits), "yes", "no")


@TELLS[0]
@TELLS[1]
@pytest.mark.filterwarnings("ignore:.*(not pass|skipp|SCIPY_ARRAY_API).*")
@parametrize_with_checks([BayesianRegressor(), BayesianClassifier()])
def test_the_checks_of_scikit_learn_pass_with_no_exception(estimator, check):
    again = check.func.__name__ in AGAIN or "readonly_memmap" in check.keywords
    if again and isinstance(estimator, BayesianClassifier) and not LONG:
        pytest.skip("of the classifier at length")
    check(estimator)


def test_flat_priors_give_least_squares_and_weights_count_rows(diabetes):
    """Against statsmodels' WLS; a weight of 2 is that row twice."""
    X, y = diabetes
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 4, len(y))
    regressor = BayesianRegressor(**FLAT).fit(X, y, sample_weight=counts)
    theirs = sm.WLS(y, sm.add_constant(X), weights=counts).fit()
    np.testing.assert_allclose(regressor.coef_, theirs.params.values[1:], rtol=1e-8)
    assert regressor.intercept_ == pytest.approx(theirs.params.values[0], rel=1e-8)
    again = BayesianRegressor().fit(X.loc[X.index.repeat(counts)], np.repeat(y, counts))
    weighted = BayesianRegressor().fit(X, y, sample_weight=counts)
    for mine, other in zip(
        *(each.predict(X, return_std=True) for each in (again, weighted)), strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-9)
    assert again.posterior_.log_normalizer == pytest.approx(weighted.posterior_.log_normalizer)
    # their sds of the weights are those of a known noise; ours have its uncertainty, a Student's t
    freedom = counts.sum() - X.shape[1] - 1
    sds = theirs.bse.values[1:] * np.sqrt(theirs.df_resid / (freedom - 3))
    np.testing.assert_allclose(regressor.posterior_.sd[1 : X.shape[1] + 1], sds, rtol=1e-6)


def test_where_priors_agree_the_mean_is_that_of_bayesian_ridge(diabetes):
    """Its noise and scale are points, those of the highest evidence: given them all is equal."""
    X, y = StandardScaler().fit_transform(diabetes[0]), diabetes[1].to_numpy()
    tiny = {f"{name}_{i}": 0.0 for name in ("alpha", "lambda") for i in (1, 2)}
    ridge = BayesianRidge(**tiny, tol=1e-12, max_iter=10_000).fit(X, y)
    noise, sd = ridge.alpha_**-0.5, ridge.lambda_**-0.5
    mine = BayesianRegressor(
        weight=dist.Normal(0.0, sd), noise=noise, scale=None, standardize=False
    ).fit(X, y)
    np.testing.assert_allclose(mine.coef_, ridge.coef_, rtol=1e-6)
    (mean, sd), (their_mean, their_sd) = (r.predict(X, return_std=True) for r in (mine, ridge))
    np.testing.assert_allclose(mean, their_mean, rtol=1e-6)
    # that the intercept is not known either, by noise / sqrt(rows), they leave out
    np.testing.assert_allclose(sd**2, their_sd**2 + noise**2 / len(y), rtol=1e-6)
    # integrated over, noise and scale move no weight by as much as its sd
    default = BayesianRegressor().fit(X, y)
    assert (abs(default.coef_ - ridge.coef_) < default.posterior_.sd[1:-2]).all()


def test_standardized_priors_are_those_of_standardized_data(diabetes):
    X, y = diabetes
    regressor = BayesianRegressor().fit(X, y)
    Z, z = (X - X.mean()) / X.std(ddof=0), (y - y.mean()) / y.std(ddof=0)
    normal, half = dist.Normal(0.0, 1.0), dist.HalfNormal(1.0)
    exact = exact_posterior(Z, z, weight=normal, noise=half, scale=half, intercept=True)
    ratio = (y.std(ddof=0) / X.std(ddof=0)).to_numpy()
    # the noise has a floor of 1e-6, of which it is 1e6 away
    np.testing.assert_allclose(regressor.coef_, exact.mean[1:11] * ratio, rtol=1e-6)
    # the word of `exact_posterior`, without a floor and whatever the other argument says
    word = {"weight": normal, "noise": half, "scale": "data"}
    exact = exact_posterior(X, y, intercept=True, **word)
    mine = BayesianRegressor(**word, standardize=False).fit(X, y)
    np.testing.assert_allclose(mine.posterior_.mean, exact.mean, rtol=1e-6)
    relative = {"weight": ConjugateNormal(0.0, scale=1.0), "scale": None}
    exact = exact_posterior(Z, z, noise=half, intercept=True, **relative)
    conjugate = BayesianRegressor(**relative).fit(X, y)
    np.testing.assert_allclose(conjugate.coef_, exact.mean[1:11] * ratio, rtol=1e-6)
    other = BayesianRegressor().fit(1e3 * X + 7, 1e-5 * y - 3)
    np.testing.assert_allclose(
        other.predict(1e3 * X + 7), 1e-5 * regressor.predict(X) - 3, rtol=1e-9
    )


def test_predictions_are_those_of_draws(diabetes):
    """Of 20,000: five standard errors of means, sds, densities and shares inside."""
    X, y = diabetes
    regressor = BayesianRegressor().fit(X[:60], y[:60])
    new, target = X[60:70].to_numpy(), y[60:70].to_numpy()
    draws, size = regressor.posterior_.sample(20_000, seed=0), 20_000
    lines, noise = draws[:, :1] + draws[:, 1:11] @ new.T, draws[:, 11:12]
    data = lines + noise * np.random.default_rng(1).standard_normal(lines.shape)
    mean, sd = regressor.predict(X[60:70], return_std=True)
    assert (abs(data.mean(0) - mean) < 5 * sd / np.sqrt(size)).all()
    assert (abs(data.std(0) / sd - 1) < 5 * np.sqrt(1 / size)).all()
    low, high = regressor.predict_interval(X[60:70], level=0.8)
    inside = ((low < data) & (data < high)).mean(0)
    assert (abs(inside - 0.8) < 5 * np.sqrt(0.16 / size)).all()
    each = np.exp(-(((target - lines) / noise) ** 2) / 2) / noise / np.sqrt(2 * np.pi)
    error = each.std(0) / each.mean(0) / np.sqrt(size)
    logs = regressor.log_prob(X[60:70], target)
    assert (abs(np.log(each.mean(0)) - logs) < 5 * error).all()
    assert regressor.score(X[60:], y[60:]) > 0.3


def test_an_exact_line_has_a_posterior_and_a_flat_noise_has_none():
    X = np.arange(10.0)[:, None]
    regressor = BayesianRegressor().fit(X, 2 * X[:, 0] + 1)
    assert regressor.predict([[20.0]]) == pytest.approx(41.0, abs=1e-3)
    with pytest.raises(ValueError, match="^noise: expected .* improper"):
        BayesianRegressor(noise=None).fit(X, 2 * X[:, 0] + 1)


def test_the_classifier_is_the_posterior_of_a_grid(binary):
    """One column without an intercept: quadrature, and the family is within 1 % of it."""
    X, y = binary
    x, wide = (X[:, 0] - 3.0)[:, None], {"standardize": False, "fit_intercept": False}
    classifier = BayesianClassifier(**wide, weight=dist.Normal(0.0, 1.0), num_samples=20_000)
    classifier.fit(x, y)
    sign = np.where(y == "yes", 1.0, -1.0)

    def joint(w):
        return np.exp(special.log_expit(sign * x[:, 0] * w).sum() - w**2 / 2 + 30)

    def mean(function):
        return integrate.quad(lambda w: function(w) * joint(w), -5, 5)[0]

    total = mean(lambda w: 1.0)
    exact = mean(lambda w: w) / total
    sd = np.sqrt(mean(lambda w: (w - exact) ** 2) / total)
    drawn = classifier.posterior_["weight"][:, 0, 0]
    assert abs(drawn.mean() - exact) < (5 / np.sqrt(20_000) + 0.05) * sd
    assert drawn.std() == pytest.approx(sd, rel=0.05)
    wanted = [mean(lambda w, at=at: special.expit(at * w)) / total for at in (-2.0, 1.0, 4.0)]
    got = classifier.predict_proba([[-2.0], [1.0], [4.0]])
    np.testing.assert_allclose(got[:, 1], wanted, atol=0.005)
    np.testing.assert_allclose(got.sum(1), 1.0)


def test_the_point_of_the_classifier_is_that_of_logistic_regression(binary):
    """Penalised maximum likelihood, of two classes and of three, counts included."""
    point = {"family": families.deterministic, "standardize": False, "fit_intercept": False}
    flowers = load_iris(return_X_y=True)
    counts = np.random.default_rng(0).integers(0, 3, 150)
    for X, y in ((StandardScaler().fit_transform(binary[0]), binary[1]), flowers):
        weights = counts[: len(y)]
        prior = dist.Normal(0.0, 1.0)
        mine = BayesianClassifier(weight=prior, num_samples=1, **point).fit(X, y, weights)
        theirs = LogisticRegression(fit_intercept=False, tol=1e-10, max_iter=10_000)
        theirs.fit(X, y, weights)
        np.testing.assert_allclose(mine.coef_, theirs.coef_, atol=1e-5)
        np.testing.assert_allclose(mine.predict_proba(X), theirs.predict_proba(X), atol=1e-5)


def test_counts_of_the_classifier_are_repeated_rows(binary):
    """In the units of the data, too, which rows that count zero times are none of."""
    X, y = binary
    counts = np.random.default_rng(0).integers(0, 3, len(y))
    X = np.where(counts[:, None] == 0, 1e6, X)  # a copy
    weighted = BayesianClassifier().fit(X, y, sample_weight=counts)
    again = BayesianClassifier().fit(np.repeat(X, counts, 0), np.repeat(y, counts))
    new = X[counts > 0]
    np.testing.assert_allclose(weighted.predict_proba(new), again.predict_proba(new), atol=1e-6)


def test_the_priors_of_the_classifier_are_those_of_the_model(binary):
    """The scale is a factor of the weight's; a few large weights; a flat prior of two classes."""
    X, y = binary
    told = {"family": families.deterministic, "num_samples": 1}
    wide = BayesianClassifier(weight=dist.Normal(0.0, 3.0), **told).fit(X, y)
    factor = BayesianClassifier(weight=dist.Normal(0.0, 1.0), scale=3.0, **told).fit(X, y)
    np.testing.assert_allclose(factor.coef_, wide.coef_, rtol=1e-6)
    correlated = dist.MultivariateNormal(torch.zeros(2), 9 * torch.eye(2))
    point = BayesianClassifier(weight=correlated, **told).fit(X, y)
    np.testing.assert_allclose(point.coef_, wide.coef_, rtol=1e-6)
    flat = BayesianClassifier(weight=None, fit_intercept=False, **told).fit(X, y)
    theirs = sm.Logit(y == "yes", X).fit(disp=0, tol=1e-12)
    np.testing.assert_allclose(flat.coef_[0], theirs.params, rtol=1e-6)
    unknown = BayesianClassifier(scale=dist.HalfNormal(1.0)).fit(X, y)
    assert unknown.posterior_["scale"].shape == (1000,) and (unknown.posterior_["scale"] > 0).all()
    told = {"weight": Horseshoe(), "family": families.mean_scale}
    with warnings.catch_warnings(action="ignore", category=NarrowFamily):
        sparse = BayesianClassifier(**told).fit(X, y)
    assert set(sparse.posterior_) == {"global_scale", "local_scale", "weight", "intercept"}
    assert ((sparse.predict_proba(X) >= 0).all(), sparse.coef_.shape) == (True, (1, 2))
    with pytest.raises(TypeError, match="^scale: expected None for a prior that is none of"):
        BayesianClassifier(weight=Horseshoe(), scale=2.0).fit(X, y)
    with pytest.raises(ValueError, match="^weight: expected a proper prior"):
        BayesianClassifier(weight=None).fit(*load_iris(return_X_y=True))


def test_units_change_no_probability(binary):
    X, y = binary
    one, other = (BayesianClassifier().fit(Z, y) for Z in (X, 1e4 * X - 5))
    np.testing.assert_allclose(one.predict_proba(X), other.predict_proba(1e4 * X - 5), atol=1e-6)
    assert list(one.classes_) == ["no", "yes"] and one.coef_.shape == (1, 2)
    assert "optimum" in one.verdict_


def test_the_same_state_gives_the_same_bits_and_leaves_no_trace(binary):
    X, y = binary
    before = torch.get_rng_state()
    one, same, other = (BayesianClassifier(random_state=s).fit(X, y) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert (one.predict_proba(X) == same.predict_proba(X)).all()
    assert (one.predict_proba(X) != other.predict_proba(X)).any()


@pytest.mark.parametrize("kind", [BayesianRegressor, BayesianClassifier])
def test_copies_pickles_and_tables(kind, binary):
    X, y = binary
    y = y if kind is BayesianClassifier else X[:, 0] + np.sin(X[:, 1])
    table = pd.DataFrame(X, columns=["dose", "age"])
    fitted = kind(weight=dist.Normal(0.0, 1.0)).fit(table, y)
    again = pickle.loads(pickle.dumps(fitted))
    assert (again.predict(table) == fitted.predict(table)).all()
    assert list(fitted.feature_names_in_) == ["dose", "age"]
    if kind is BayesianRegressor:
        assert fitted.posterior_.names[:3] == ["intercept", "weight[dose]", "weight[age]"]
        assert np.isfinite(fitted.posterior_.loo().total)
    assert clone(fitted).get_params()["weight"].scale == 1.0
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(table[["age", "dose"]])


@pytest.mark.filterwarnings("ignore:prior and data disagree")  # which is what the search finds
def test_pipelines_and_searches(diabetes):
    X, y = diabetes
    X = X[:80].assign(sex=np.where(X.sex[:80] > 1, "m", "f"))
    steps = make_column_transformer(
        (OneHotEncoder(sparse_output=False), ["sex"]),
        remainder="passthrough",
        verbose_feature_names_out=False,
    ).set_output(transform="pandas")
    search = GridSearchCV(
        make_pipeline(steps, BayesianRegressor(noise=60.0)),
        {"bayesianregressor__scale": [1e-3, 0.3]},
        scoring=lambda model, X, y: model[-1].log_prob(model[:-1].transform(X), y).mean(),
        cv=3,
    ).fit(X, y[:80])
    assert search.best_params_ == {"bayesianregressor__scale": 0.3}
    names = list(search.best_estimator_[-1].feature_names_in_)
    assert names[:3] == ["sex_f", "sex_m", "age"]


def test_bad_arguments_are_named(binary):
    X, y = binary[0], binary[0][:, 0]
    with pytest.raises(ValueError, match=r"^scale: expected one of \['auto', 'data'\]"):
        BayesianRegressor(scale="wide").fit(X, y)
    with pytest.raises(ValueError, match=r"^weight: expected one of \['auto'\]"):
        BayesianClassifier(weight="data").fit(*binary)
    with pytest.raises(TypeError, match="^fit_intercept: expected True or False"):
        BayesianRegressor(fit_intercept=1).fit(X, y)
    with pytest.raises(ValueError, match="a row that counts|at least one non-zero"):
        BayesianRegressor().fit(X, y, np.zeros(60))
    with pytest.raises(ValueError, match="^level: expected a number between"):
        BayesianRegressor().fit(X, y).predict_interval(X, 90)
    with pytest.raises(TypeError, match="^weight: expected a distribution"):
        BayesianClassifier(weight=1.0).fit(*binary)
    with pytest.raises(ValueError, match="^weight: expected a univariate prior of shape"):
        BayesianClassifier(weight=dist.Normal(0.0, torch.ones(3))).fit(*binary)
    with pytest.raises(ValueError, match="^y: expected at least two classes, got 1 class"):
        BayesianClassifier().fit(X, np.ones(60, dtype=int))


def test_without_scikit_learn_the_library_is_whole_and_says_what_is_missing():
    """In a process where it cannot be found."""
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'sklearn': raise ModuleNotFoundError(name)\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n.split('.')[0] == 'sklearn' else find(n, *a)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from ppvae.regression import *\n"
        "import ppvae.regression\n"
        "try: ppvae.regression.BayesianRegressor\n"
        "except ImportError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("pip install ppvae[sklearn]")
    assert "BayesianRegressor" in dir(ppvae.regression)
    with pytest.raises(AttributeError, match="no attribute 'Ridge'"):
        ppvae.regression.Ridge  # noqa: B018


def test_the_words_of_a_conflict_have_the_names_of_the_table():
    table = pd.DataFrame({"near": np.arange(30.0), "far": np.sin(np.arange(30.0))})
    y = 1000 * table["far"]
    regressor = BayesianRegressor(
        weight=dist.Normal(0.0, 1.0), scale=None, noise=1.0, standardize=False
    )
    with pytest.warns(UserWarning, match=r"prior and data disagree: .*weight\[far\]"):
        assert regressor.fit(table, y).posterior_.names[2] == "weight[far]"
    with pytest.raises(ValueError, match="^noise: expected one number"):
        BayesianRegressor(noise=np.ones(30)).fit(table, y)
