"""Verdicts on families for latents of all the data: against closed forms and `evaluate`."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import Regression, S, T, hierarchy
from torch import nn

from ppvae import Block, FamilyGuide, evaluate, families, fit
from ppvae.comparison import compare_families, interval_of_totals

QUIET = {"progress": False}
UNIT = "nats of all the data"


def mean_field_gap(precision):
    """KL from the best factorized Gaussian to the one of this precision, in nats."""
    return ((precision.diagonal().log().sum() - precision.logdet()) / 2).item()


GIVEN = {"z": Block("mean_scale", given=["mu"]), "mu": "mean_scale"}
NAMED = {"mean field": "mean_scale", "given": GIVEN}


def amortized():
    return hierarchy, nn.Linear(1, 2)


def test_the_gain_of_correlations_in_a_regression_is_the_gap_of_the_mean_field():
    """The exact posterior is full_rank: the gap of the mean field is the whole gain.

    The error left is of 2,000 draws for each of two seeds: `gain_se_draws`, five of which are
    allowed, and the optimum for the draws of the fit, which was within 0.02 nats.
    """
    known = Regression(columns=6)

    def build():
        return Regression(columns=6).model, None

    names = ["mean_scale", "full_rank", Block("full_rank", "free")]
    found = compare_families(build, names, known.args, num_samples=2000, num_seeds=2, **QUIET)
    step, gap = found.dataset.sel(family="full_rank"), mean_field_gap(known.P)
    assert gap > 1 and step.verdict == "yes", f"\n{found}"
    assert abs(float(step.gain) - gap) < 5 * float(step.gain_se_draws) + 0.02
    assert step.gain_lower < gap < step.gain_upper
    assert found.dataset.parameters.values.tolist() == [12, 27, 27]
    assert found.dataset.unit == found.dataset.gain.unit == found.dataset.total_elbo.unit == UNIT
    assert UNIT in str(found) and "nan" not in str(found).lower()
    assert found.dataset.num_data == 442 and set(found.dataset.dims) == {"family", "seed"}
    # of the exact posterior the draws do not matter, and the seeds end at one optimum
    assert found.dataset.total_elbo.sel(family="full_rank").std() < 1e-4
    assert found.dataset.family.values.tolist() == [*names[:2], "full_rank(source='free')"]
    assert found.dataset.verdict[2] == "no" and found.dataset.gain_upper[2] < 1e-3


def test_local_latents_that_depend_on_a_global_one_gain_what_the_closed_form_says():
    """The posterior is Gaussian, with `z` linear in `x` and `mu`: the family `given` holds it.

    Adam comes to rest with a falling rate; what it left was at most 0.03 nats of all the data. The
    total of the mean field has a Monte Carlo error, of which five are allowed.
    """
    x = 0.5 + torch.randn(10, 1) * math.hypot(T, S)
    precision = torch.diag(torch.tensor([1 + 10 / T**2] + [1 / T**2 + 1 / S**2] * 10))
    precision[0, 1:] = precision[1:, 0] = -1 / T**2

    def halving(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.988)

    options = {"num_epochs": 400, "learning_rate": 0.1, "scheduler": halving, **QUIET}
    found = compare_families(amortized, NAMED, x, num_samples=2000, num_seeds=2, **options)
    step, gap = found.dataset.sel(family="given"), mean_field_gap(precision)
    assert found.dataset.family.values.tolist() == ["mean field", "given"]
    assert abs(float(step.gain) - gap) < 5 * float(step.gain_se_draws) + 0.03, f"\n{found}"
    covariance = (T**2 + S**2) * torch.eye(10) + 1.0
    exact = dist.MultivariateNormal(torch.zeros(10), covariance).log_prob(x[:, 0]).item()
    assert abs(found.dataset.total_elbo.sel(family="given") - exact).max() < 0.03
    assert abs(found.dataset.log_evidence.sel(family="given") - exact).max() < 0.03


def test_the_numbers_of_a_mixed_model_are_those_of_fit_and_evaluate():
    x = torch.randn(12, 1)
    short = {"num_epochs": 3, **QUIET}
    found = compare_families(
        amortized, NAMED, x, num_seeds=2, seed=4, num_samples=32, batch_size=5, **short
    ).dataset
    for name, family in NAMED.items():
        for seed in (4, 5):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model, encoder = amortized()
                guide = FamilyGuide(model, family, encoder)
                fit(model, guide, x, seed=seed, batch_size=5, **short)
            row = evaluate(model, guide, x, num_samples=32, seed=seed, **QUIET)
            for number in ("total_elbo", "total_elbo_se", "log_evidence", "global_rate"):
                one = found[number].sel(family=name, seed=seed)
                assert float(one) == pytest.approx(float(row[number]), abs=1e-12), number
    gains = found.total_elbo[1] - found.total_elbo[0]
    assert float(found.gain[1]) == pytest.approx(float(gains.mean()), abs=1e-12)
    errors = (found.total_elbo_se**2).sum() / 4  # of two families, over two seeds squared
    assert float(found.gain_se_draws[1]) == pytest.approx(float(errors) ** 0.5, abs=1e-12)
    assert float(found.gain_se_seeds[1]) == pytest.approx(float(gains.std(ddof=1)) / 2**0.5)


def test_a_discrete_latent_is_summed_out_of_both():
    """Components far apart: the posterior of their places is a product of Normals, a mean field.

    Both families hold it: the gain is 0 but for the optimum, found to a thousandth of a nat.
    """
    x = torch.cat([torch.randn(9) - 20, torch.randn(15) + 20])

    def parts(x):
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(torch.tensor([-20.0, 20.0]), 1.0))
        with pyro.plate("data", len(x)):
            part = pyro.sample("part", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(loc[part], 1.0), obs=x)

    told = {"num_seeds": 2, **QUIET}
    found = compare_families(lambda: (parts, None), ["mean_scale", "full_rank"], x, **told).dataset
    assert found.verdict[1] == "no" and abs(found.gain[1]) < 1e-3
    one = torch.arange(2).repeat_interleave(torch.tensor([9, 15]))
    covariance = torch.eye(24) + (one[:, None] == one).double()
    normal = dist.MultivariateNormal(torch.where(one == 0, -20.0, 20.0).double(), covariance)
    exact = normal.log_prob(x) + 9 * math.log(0.4) + 15 * math.log(0.6)
    assert abs(found.total_elbo - exact.item()).max() < 1e-3


def test_points_have_no_verdict():
    known = Regression(rows=40, columns=2)

    def build():
        return Regression(columns=2).model, None

    pair = ["deterministic", "mean_scale"]
    found = compare_families(build, pair, known.args, num_seeds=2, **QUIET)
    assert found.dataset.verdict.values.tolist() == ["", ""] and "a point" in str(found)
    assert (
        found.dataset.total_elbo[0].isnull().all() and found.dataset.global_rate[0].isnull().all()
    )


@pytest.mark.parametrize("seeds", [2, 3, 6])
@pytest.mark.parametrize("spread", [(1, 0), (0, 1), (1, 1), (1, 0.2)])
def test_the_interval_covers_at_least_as_often_as_it_says(seeds, spread):
    """Another optimum for each seed, and noise of the draws; 5 standard errors below 0.9."""
    rng, (a, e) = np.random.default_rng(0), spread
    differences = 0.7 + a * rng.standard_normal((4000, seeds))
    differences += e * rng.standard_normal((4000, seeds))
    errors = np.full((4000, seeds), float(e))
    mean, lower, upper, over_seeds, of_draws = interval_of_totals(differences, errors, 0.9)
    share = ((lower < 0.7) & (0.7 < upper)).mean()
    assert share > 0.9 - 5 * math.sqrt(0.09 / 4000)
    assert np.allclose(mean, (lower + upper) / 2) and np.allclose(of_draws, e / math.sqrt(seeds))
    assert abs((over_seeds**2).mean() - (a**2 + e**2) / seeds) < 5 * (over_seeds**2).std() / 63
    # seeds that agree leave the error of the draws, 1.645 of them
    _, lower, upper, *_ = interval_of_totals(np.full((2, 3), 1.0), np.full((2, 3), 0.3), 0.9)
    assert np.allclose(upper - lower, 2 * 1.6448536 * 0.3 / math.sqrt(3))


def linear_build():
    return Regression(columns=2).model, None


def of_each(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


def test_members_have_names():
    by_site = [{"z": "mean_only"}, {"z": "mean_scale"}, Block("mean_scale"), families.full_rank]
    x = torch.randn(6, 1)
    told = {"num_epochs": 1, "num_samples": 4, "num_seeds": 2, **QUIET}
    found = compare_families(lambda: (of_each, nn.Linear(1, 2)), by_site, x, x, **told).dataset
    names = ["z: mean_only", "z: mean_scale", "mean_scale", "full_rank"]
    assert found.family.values.tolist() == names and found.gain.unit == "nats per datum"
    several = compare_families(lambda: (of_each, {"z": nn.Linear(1, 2)}), by_site[:2], x, x, **told)
    assert several.dataset.elbo.equals(found.elbo[:2])  # an encoder by its site is that encoder


X = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(8, 2) ** 2
Y = torch.linspace(-1, 1, 8, dtype=torch.float64)
OF_DATA = "test: expected None: the posterior is one of the training data, got others"
REFUSED = [
    ({"test": (X, Y)}, ValueError, f"{OF_DATA}, of latents of all the data"),
    ({"build": lambda: (of_each, None), "train": Y[:, None], "test": Y[:, None]}, ValueError,
     OF_DATA),
    ({"build": lambda: (of_each, None), "train": Y[:, None]}, ValueError,
     "families: expected ones that all draw the latents of each datum by themselves"),
    ({"build": lambda: (linear_build()[0], 3)}, TypeError, "build: expected a model and an enc"),
    ({"families": {"a": "mean_only"}}, ValueError, "families: expected at least two"),
    ({"families": {"a": "mean_only", 2: "mean_scale"}}, TypeError, "families: expected names"),
    ({"families": {"a": "mean_only", "b": "bayes"}}, TypeError, "families: .* got 'bayes'"),
    ({"families": ["mean_only", {"weight": "bayes"}]}, TypeError, "families: .* got 'bayes'"),
    ({"families": ["mean_only", {}]}, ValueError, "families: expected a family for every latent"),
    ({"families": ["mean_only", {2: "mean_only"}]}, TypeError, "families: expected a mapping"),
    ({"families": [{"*": "mean_only"}, {"*": "mean_only"}]}, ValueError,
     "families: expected different ones"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_input(options, error, message):
    good = {"build": linear_build, "families": ["mean_scale", "full_rank"], "train": (X, Y)}
    with pytest.raises(error, match=message):
        compare_families(**(good | options), num_epochs=30, num_samples=8, **QUIET)
