"""Scores of tables, against what is known of two normal distributions and of a linear rule."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ppvae import (
    VAE,
    FamilyGuide,
    imputation_error,
    impute,
    likelihoods,
    linear_probe,
    two_sample,
)
from ppvae.evaluation.scores import _area
from ppvae.nn import mlp

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.5])
def test_two_normal_samples_are_told_apart_as_well_as_can_be(distance):
    """The best area for N(0, 1) and N(d, 1) is Phi(d / sqrt(2)); a linear classifier finds it."""
    real = RNG.normal(size=(600, 2))
    drawn = RNG.normal(size=(500, 2)) + [distance, 0.0]
    found = two_sample(real, drawn, classifier=LogisticRegression())
    best = stats.norm.cdf(distance / math.sqrt(2))
    assert abs(found.value - best) < 5 * found.se + 1e-12
    # by Hanley and McNeil, at 0.5 the variance of a rank statistic: (m + n + 1) / (12 m n)
    if distance == 0:
        assert found.se == pytest.approx(math.sqrt(1101 / 12 / 600 / 500), rel=0.02)


def test_a_dependence_that_no_column_shows_is_found():
    x = RNG.normal(size=400)
    real = np.stack([x, x + 0.1 * RNG.normal(size=400)], 1)
    drawn = np.stack([x, RNG.permutation(x)], 1)
    assert two_sample(real, drawn).value > 0.9
    real[::7, 0] = np.nan  # missing entries are taken
    assert two_sample(real, drawn).value > 0.8


def test_the_area_counts_ties_half():
    above, below = RNG.integers(0, 5, 40) / 4.0, RNG.integers(0, 4, 60) / 4.0
    labels = np.repeat([1, 0], [40, 60])
    expected = roc_auc_score(labels, np.concatenate([above, below]))
    assert _area(above, below) == pytest.approx(expected, abs=1e-12)


def test_a_linear_probe_finds_a_linear_rule_and_nothing_else():
    codes = RNG.normal(size=(300, 3))
    rule = np.where(codes @ [1.0, -2.0, 0.5] > 0, "b", "a")
    assert linear_probe(torch.tensor(codes), rule).value > 0.95
    chance = linear_probe(codes, RNG.integers(0, 2, 300))
    assert abs(chance.value - 0.5) < 5 * chance.se
    assert chance.se == pytest.approx(math.sqrt(chance.value * (1 - chance.value) / 300))
    assert str(chance).count("+-") == 1


def filled():
    """A table whose columns do not depend on a latent, so that all is known of their entries."""
    parts = {0: likelihoods.Normal(1.0), 1: likelihoods.Categorical(2)}
    model = VAE(mlp(2, out=3), 2, likelihoods.Mixed(parts))
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.decoder[0].bias.copy_(torch.tensor([0.0, 0.0, 2.0]))
    truth = pd.DataFrame({"x": RNG.normal(size=400), "k": RNG.integers(0, 2, 400).astype(float)})
    gaps = truth.mask(RNG.random((400, 2)) < 0.5)
    guide = FamilyGuide(model, "noise_only")
    return impute(model, guide, gaps, num_samples=2000, level=0.8), gaps, truth


def test_errors_and_coverage_of_what_was_filled_in():
    found, gaps, truth = filled()
    table = imputation_error(found, truth)
    assert [*table.index] == ["x", "k", "all"]
    gone = gaps.x.isna()
    assert table.missing["x"] == gone.sum() and table.missing["all"] == gaps.isna().sum().sum()
    mean = found.value.values[gone, 0]
    error = math.sqrt(((mean - truth.x[gone]) ** 2).mean())
    assert table.rmse["x"] == pytest.approx(error)
    assert table.nrmse["x"] == pytest.approx(error / truth.x.std(ddof=0))
    assert table.nrmse["all"] == pytest.approx(table.nrmse["x"])
    wrong = (truth.k[gaps.k.isna()] != 1).mean()  # the more probable code is 1
    assert table.wrong["k"] == pytest.approx(wrong) == table.wrong["all"]
    assert math.isnan(table.wrong["x"]) and math.isnan(table.rmse["k"])
    assert abs(table.coverage["x"] - 0.8) < 5 * table.coverage_se["x"]
    whole = imputation_error(impute(*_whole(), truth), truth)
    assert whole.missing["all"] == 0 and math.isnan(whole.coverage["all"])


def _whole():
    parts = {0: likelihoods.Normal(1.0), 1: likelihoods.Categorical(2)}
    model = VAE(mlp(2, out=3), 2, likelihoods.Mixed(parts))
    return model, FamilyGuide(model, "noise_only")


def test_what_is_refused():
    found, gaps, truth = filled()
    x = np.zeros((20, 2))
    with pytest.raises(TypeError, match="^found: expected a result of impute, got int"):
        imputation_error(3, truth)
    with pytest.raises(ValueError, match=r"^truth: expected shape \(400, 2\).*, got \(3, 2\)"):
        imputation_error(found, truth[:3])
    with pytest.raises(ValueError, match="^truth: expected a value for each entry that was filled"):
        imputation_error(found, gaps)
    with pytest.raises(ValueError, match="^drawn: expected 2 columns, as the data, got 3"):
        two_sample(x, np.zeros((20, 3)))
    with pytest.raises(ValueError, match="^real, drawn: expected at least 10 rows for 5 folds"):
        two_sample(x[:9], x)
    with pytest.raises(ValueError, match="^folds: .* at least 2, got 1"):
        two_sample(x, x, folds=1)
    with pytest.raises(ValueError, match=r"^labels: expected shape \(20,\), one for each code"):
        linear_probe(x, [1, 2])
    with pytest.raises(ValueError, match="^labels: expected two classes or more, of 5 data"):
        linear_probe(x, [1] * 20)
    with pytest.raises(ValueError, match="^real: expected finite numbers, or NaN"):
        two_sample(x + math.inf, x)
