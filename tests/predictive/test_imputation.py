"""Filling in: against the conditional normal distribution, and for every kind of column."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import exact_pair, holes
from pairs import build, data, traceless
from scipy import stats

from ppvae import VAE, FamilyGuide, families, impute, likelihoods
from ppvae.nn import mlp


def conditional(row, covariance):
    """Mean and standard deviation of the missing entries of a datum given the others."""
    seen, gone = ~row.isnan(), row.isnan()
    slope = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, gone]).T
    left = covariance[gone][:, gone] - slope @ covariance[seen][:, gone]
    return (slope @ row[seen]).numpy(), left.diagonal().sqrt().numpy()


@pytest.mark.parametrize("exact", [True, False])
def test_it_is_the_conditional_normal_distribution(exact):
    """By the posterior itself, or by weighted draws from the prior."""
    model, guide, covariance = exact_pair()
    x, draws = holes(torch.randn(12, 4)), 20_000

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    model = _Vectorized(model)
    guide = guide if exact else prior
    found = impute(model, guide, x, num_samples=draws, num_imputations=400, level=0.8)
    assert np.array_equal(found.missing, x.isnan())
    for row in range(len(x)):
        gone = x[row].isnan().numpy()
        whole = found.imputations.values[:, row]
        for name in ("value", "lower", "upper"):
            assert np.array_equal(found[name].values[row][~gone], x[row][~gone])
        assert (whole[:, ~gone] == x[row].numpy()[~gone]).all()
        mean, sd = conditional(x[row], covariance)
        error = 5 * sd / math.sqrt(found.ess[row])  # an expectation varies less than a draw
        assert (abs(found.value.values[row][gone] - mean) < error).all()
        for name, end in (("lower", 0.1), ("upper", 0.9)):
            height = stats.norm.pdf(stats.norm.ppf(end))
            error = 5 * sd * math.sqrt(end * (1 - end) / found.ess[row]) / height
            quantile = mean + sd * stats.norm.ppf(end)
            assert (abs(found[name].values[row][gone] - quantile) < error).all()
        assert (abs(whole[:, gone].mean(0) - mean) < 6 * sd / math.sqrt(400)).all()
        assert (abs(whole[:, gone].std(0) / sd - 1) < 6 / math.sqrt(2 * 400)).all()
    assert exact == bool((found.ess > 0.999 * draws).all())
    assert not exact or (found.khat == 0).all()


class _Vectorized:
    """A function that may run inside further plates."""

    vectorized = True

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model(x)


def test_every_kind_of_column_gets_its_own_kind_of_value():
    parts = {
        (0, 3): likelihoods.Normal(0.1),
        1: likelihoods.Categorical(3),
        2: likelihoods.Bernoulli(),
        4: likelihoods.Poisson(),
        5: likelihoods.Ordinal(4),
    }
    model = VAE(mlp(2, out=8), 2, likelihoods.Mixed(parts))
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        # two means, three logits, one logit, a log rate and a grade, in the order of the parts
        out = [1.5, -0.5, 0.0, 3.0, 1.0, math.log(0.25 / 0.75), math.log(4.2), 8.0]
        model.decoder[0].bias.copy_(torch.tensor(out))
    x = torch.tensor([[1.0, 0.0, 1.0, 2.0, 3.0, 1.0]]).repeat(40, 1)
    x[1:] = math.nan
    found = impute(model, FamilyGuide(model, families.noise_only), x, num_samples=500)
    assert np.array_equal(found.value[0], x[0])
    assert np.allclose(found.value[1:], [1.5, 1.0, 0.25, -0.5, 4.2, 3.0], atol=1e-4)
    drawn = found.imputations.values[:, 1:]
    assert set(np.unique(drawn[..., 1])) == {0.0, 1.0, 2.0}
    assert set(np.unique(drawn[..., 2])) == {0.0, 1.0}
    assert (drawn[..., 4] == np.floor(drawn[..., 4])).all() and (drawn[..., 5] <= 3).all()


def test_alone_categories_get_the_most_probable_code():
    model = VAE(mlp(2, out=6), 2, likelihoods.Categorical(3))
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.decoder[0].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 2.0, 1.0, 0.0]))
    x = torch.tensor([[0.0, math.nan], [math.nan, 1.0]])
    found = impute(model, FamilyGuide(model, families.noise_only), x, num_samples=50)
    assert np.array_equal(found.value, [[0.0, 1.0], [2.0, 1.0]])


@pytest.mark.parametrize("family", ["mean_scale", "deterministic", "flow"])
def test_it_leaves_no_trace_and_takes_every_family(family):
    x = holes(data(12))
    model, guide = build(family)
    with traceless(model, guide):
        found = impute(model, guide, x, num_samples=40, batch_size=5)
    assert np.isfinite(found.value).all() and found.value.dims == ("datum", "x_dim_0")
    again = impute(model, guide, x, num_samples=40, batch_size=5)
    assert found.identical(again)
    whole = impute(model, guide, data(12), num_samples=40)
    assert np.array_equal(whole.value, data(12)) and not whole.missing.any()


def test_global_latents_and_masks_of_pyro():
    """Of a weight w ~ N(0, 1) and y = w + noise: a missing y has the mean of w given others."""
    y = torch.tensor([1.0, 2.0, math.nan, 0.5])

    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w, 0.5), obs=y)

    def masked(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            seen = torch.tensor([True, True, False, True])
            pyro.sample("y", dist.Normal(w, 0.5), obs=y, obs_mask=seen)

    precision = 1 + 3 / 0.25
    mean, sd = 3.5 / 0.25 / precision, precision**-0.5

    def guide(y):
        pyro.sample("w", dist.Normal(mean, sd))

    for program, given in ((model, y), (masked, y), (masked, y.nan_to_num(7.0))):
        found = impute(program, guide, given, num_samples=200)
        assert abs(found.value[2] - mean) < 5 * sd / math.sqrt(200)
        assert found.khat.shape == (4,) and (found.khat == 0).all()
    assert impute(masked, guide, y, site="y", num_samples=20).attrs["site"] == "y_observed"


def test_what_cannot_be_filled_in():
    model, guide, _ = exact_pair()
    x = holes(torch.randn(5, 4))
    with pytest.raises(ValueError, match="^level: expected a number between 0 and 1, got 1"):
        impute(model, guide, x, level=1)
    with pytest.raises(ValueError, match="^num_samples: expected a whole number of at least 2"):
        impute(model, guide, x, num_samples=1)
    with pytest.raises(ValueError, match=r"^site: expected one of \['x'\], got 'y'"):
        impute(model, guide, x, site="y")

    def joint(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(4) + z.sum(), torch.eye(4)), obs=x)

    with pytest.raises(ValueError, match="cannot leave out"):
        impute(joint, guide, x)
    with pytest.raises(ValueError, match="^model: expected a site of elements that are indep"):
        impute(joint, guide, torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"^site: expected one of \['a', 'b'\], got None"):
        impute(_two, guide, x)
    assert impute(_two, guide, x, site="b", num_samples=20).value.shape == (5, 2)


def _two(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("a", dist.Normal(z, 1.0).to_event(1), obs=x[:, :2])
        pyro.sample("b", dist.Normal(z, 1.0).to_event(1), obs=x[:, 2:])
