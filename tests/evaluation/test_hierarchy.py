"""Models with latents of all the data: bounds and evidence held against closed forms."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import hierarchy_of
from pyro.infer.autoguide import AutoMultivariateNormal
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture
from torch import nn

from ppvae import (
    Block,
    FamilyGuide,
    annealed_importance,
    evaluate,
    families,
    fit,
    gaps,
    reading,
    summary,
)
from ppvae.regression import LinearRegression, exact_posterior

QUIET = {"progress": False}
T, S = 0.7, 0.5


def data(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


hierarchy = hierarchy_of(T, S)


def log_evidence(x):
    covariance = (T**2 + S**2) * torch.eye(len(x)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x[:, 0]).item()


def exact_guide(x, wider=1.0):
    """The posterior of the hierarchy, or one whose local scales are wider."""
    by_site = {"z": Block("mean_scale", given=["mu"]), "mu": "mean_scale"}
    guide = FamilyGuide(hierarchy, by_site, nn.Identity()).setup(x)
    local, top = 1 / T**2 + 1 / S**2, 1 + len(x) / (T**2 + S**2)
    z, mu = guide.heads["z"], guide.heads["mu"]
    with torch.no_grad():
        z.loc.linear.weight.copy_(torch.tensor([[1 / S**2 / local, 1 / T**2 / local]]))
        z.loc.linear.bias.zero_()
        z.scale.linear.weight.zero_()
        z.scale.linear.bias.fill_(math.log(wider * local**-0.5))
        mu.loc.raw.fill_(x.sum() / (T**2 + S**2) / top)
        mu.scale.raw.fill_(math.log(top**-0.5))
    return guide


@pytest.mark.parametrize("vectorized", [True, False])
def test_of_the_exact_posterior_every_number_is_exact(vectorized):
    x = data(12, 1)
    guide, expected = exact_guide(x), log_evidence(x)
    samples = 64 if vectorized else 16
    found = evaluate(hierarchy, guide, x, num_samples=samples, vectorized=vectorized, **QUIET)
    for name in ("total_elbo", "total_objective", "log_evidence"):
        assert found[name].item() == pytest.approx(expected, rel=1e-10), name
        assert found[name].attrs["unit"] == "nats"
    assert found.total_elbo_se < 1e-12 and found.log_evidence_se < 1e-7
    assert found.evidence_ess.item() == pytest.approx(32)
    q = dist.Normal(guide.heads["mu"](None).loc, guide.heads["mu"](None).scale)
    kl = torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0)).item()
    assert found.global_rate.item() == pytest.approx(kl, rel=1e-10)
    assert np.allclose(found.ess, samples // 8 if vectorized else 2)
    assert found.attrs["bound"] == 1 and found.sizes == {"datum": 12}


def test_a_guide_that_is_too_wide_loses_its_divergence():
    """KL(q || p) of each local latent is known: log w - (1 - 1 / w^2) / 2 nats, with w the factor.

    The reverse of that is the loss; and log p(x) by the weights of each datum stays right.
    """
    x, wider = data(12, 1), 1.3
    expected = log_evidence(x)
    loss = 12 * ((wider**2 - 1) / 2 - math.log(wider))
    found = evaluate(hierarchy, exact_guide(x, wider), x, num_samples=4096, **QUIET)
    assert abs(found.total_elbo - (expected - loss)) < 5 * found.total_elbo_se
    # each datum's average of 512 weights has a relative error of about 0.3 / sqrt(512)
    assert abs(found.log_evidence - expected) < 5 * 0.3 * math.sqrt(12 / 512)
    local = gaps(hierarchy, exact_guide(x, wider), x, **QUIET)
    assert np.allclose(local.gap, loss / 12, atol=1e-6) and np.allclose(
        local.approximation, 0, atol=1e-6
    )


def test_chains_find_the_evidence_of_all_the_data():
    x = data(12, 1)
    expected = log_evidence(x)
    exact = annealed_importance(hierarchy, exact_guide(x), x, num_temperatures=5, **QUIET)
    assert exact.log_evidence.item() == pytest.approx(expected, rel=1e-10) and not exact.sizes
    prior = annealed_importance(
        hierarchy, None, x, start="prior", num_chains=200, num_temperatures=70, **QUIET
    )
    error = math.sqrt(1 / prior.ess.item() - 1 / 200)
    assert abs(prior.log_evidence - expected) < 5 * error


def test_a_regression_has_the_evidence_of_its_exact_posterior():
    X, w = data(30, 3), torch.tensor([0.5, -1.0, 0.0])
    y = X @ w + 0.5 * data(31, 1)[1:, 0]
    priors = {"weight": dist.Normal(0.0, 1.0), "noise": 0.5}
    exact = exact_posterior(X, y, **priors)
    model = LinearRegression(3, **priors)
    guide = FamilyGuide(model, families.full_rank)
    fit(model, guide, (X, y), **QUIET)
    found = evaluate(model, guide, X, y, **QUIET)
    assert found.log_evidence.item() == pytest.approx(exact.log_evidence, abs=1e-6)
    assert found.total_elbo.item() == pytest.approx(exact.log_evidence, abs=1e-5)
    assert found.rate.max() == 0 and found.sizes == {"datum": 30}
    unknown = {"weight": dist.Normal(0.0, 1.0), "noise": dist.HalfNormal(1.0)}
    exact = exact_posterior(X, y, **unknown)
    model = LinearRegression(3, **unknown)
    guide = FamilyGuide(model, families.full_rank)
    fit(model, guide, (X, y), **QUIET)
    found = evaluate(model, guide, X, y, num_samples=2048, **QUIET)
    assert abs(found.log_evidence - exact.log_evidence) < 5 * found.log_evidence_se + 1e-6
    assert found.total_elbo < exact.log_evidence + 5 * found.total_elbo_se
    chains = annealed_importance(model, guide, X, y, num_temperatures=30, num_chains=64, **QUIET)
    error = math.sqrt(max(1 / chains.ess.item() - 1 / 64, 1e-6))
    assert abs(chains.log_evidence - exact.log_evidence) < 5 * error


def test_a_guide_that_draws_everything_at_once_is_one_of_all_the_data(plain_pyro):
    x = data(5, 1)
    torch.manual_seed(0)
    guide = AutoMultivariateNormal(hierarchy, init_scale=0.3)
    fit(hierarchy, guide, x, **QUIET)
    found = evaluate(hierarchy, guide, x, num_samples=2048, **QUIET)
    assert abs(found.log_evidence - log_evidence(x)) < 5 * found.log_evidence_se + 1e-4
    assert found.total_elbo.item() == pytest.approx(log_evidence(x), abs=0.02)
    assert found.ess.isnull().all()
    chains = annealed_importance(hierarchy, guide, x, num_temperatures=5, **QUIET)
    assert chains.log_evidence.item() == pytest.approx(log_evidence(x), abs=0.02)
    with pytest.raises(ValueError, match="guide: expected a FamilyGuide with an encoder"):
        gaps(hierarchy, guide, x, **QUIET)


def test_a_point_of_all_the_data_is_no_bound():
    x = data(5, 1)
    guide = FamilyGuide(hierarchy, {"mu": "deterministic", "z": "mean_scale"}, nn.Identity()).setup(
        x
    )
    found = evaluate(hierarchy, guide, x, num_samples=64, **QUIET)
    assert found.attrs["bound"] == 0 and math.isfinite(found.total_objective)
    for name in ("total_elbo", "log_evidence", "evidence_khat", "total_elbo_se"):
        assert math.isnan(found[name])
    assert found.elbo.isnull().all() and "no bound" in reading(found)
    assert list(summary(found).index) == ["objective", "global_rate", "rate", "distortion"]


def test_a_model_without_a_plate_has_totals_only():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)

    x = data(3)
    guide = FamilyGuide(model, "mean_scale").setup(x)
    head = guide.heads["z"]
    head.loc.raw.data.fill_(x.sum() / 4)
    head.scale.raw.data.fill_(math.log(0.5))
    covariance = torch.eye(3) + 1.0
    expected = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).item()
    found = evaluate(model, guide, x, num_samples=16, **QUIET)
    assert found.log_evidence.item() == pytest.approx(expected, rel=1e-10) and not found.sizes
    assert list(summary(found).index)[:3] == ["elbo", "log_evidence", "global_rate"]
    chains = annealed_importance(model, guide, x, num_temperatures=3, **QUIET)
    assert chains.log_evidence.item() == pytest.approx(expected, rel=1e-10)


def test_the_table_and_the_words_are_those_of_all_the_data():
    x = data(12, 1)
    found = evaluate(hierarchy, exact_guide(x), x, num_samples=512, **QUIET)
    table, words = summary(found), reading(found)
    assert table.loc["elbo", "mean"] == pytest.approx(log_evidence(x))
    assert table.loc["elbo", "unit"] == "nats" and table.loc["rate", "unit"] == "nats per datum"
    assert f"The ELBO of all the data is {log_evidence(x):.2f} +- 0.00 nats" in words
    assert "their weights are well behaved" in words
    off = exact_guide(x)
    off.heads["mu"].loc.raw.data += 8 * off.heads["mu"](None).scale  # draws all miss its middle
    words = reading(evaluate(hierarchy, off, x, num_samples=512, **QUIET))
    assert "above 0.7: the guide misses parts of their posterior" in words


@pytest.mark.parametrize(("narrow", "said"), [(0.3, True), (0.8, False)])
def test_local_latents_drawn_too_narrowly_are_told_where_the_globals_are_right(narrow, said):
    """Weights of a scale of s times the posterior's have a Pareto shape of 1 - s^2: 0.91 or 0.36.

    With 4,000 draws of each datum a shape has an error of about 0.1.
    """
    x = data(40, 1)
    found = evaluate(hierarchy, exact_guide(x, narrow), x, num_samples=32_000, **QUIET)
    share, words = float((found.khat > 0.7).mean()), reading(found)
    assert share > 0.8 if said else share == 0
    told = f"k-hat of the local latents is above 0.7 for {100 * share:.0f} % of the data"
    assert told in words if said else "of the local latents is" not in words
    off = abs(found.log_evidence.item() - log_evidence(x))
    if said:
        assert found.log_evidence_se.isnull() and found.log_evidence_se.attrs["reason"] == told
        assert f"How far log p(x) is off is not known: {told}." in words
        assert f"log p(x) is {found.log_evidence.item():.2f} or more by importance" in words
    else:
        assert off < 5 * found.log_evidence_se and "reason" not in found.log_evidence_se.attrs


def test_what_local_weights_lower_the_evidence_by_is_in_its_error():
    """Of a local scale of w times the posterior's a weight has a relative variance of
    w^2 / sqrt(2 w^2 - 1) - 1, here 1.87, and an average of 64 draws a 64th of it. Of 2,000 data
    that makes 58, of which 29 nats are half, and more than any of 32 draws of the globals makes up
    for: the spread over these, which cannot be above one nat, does not show it.
    """
    x = data(2000, 1)
    found = evaluate(hierarchy, exact_guide(x, 4.0), x, num_samples=512, **QUIET)
    low, error = log_evidence(x) - found.log_evidence.item(), found.log_evidence_se.item()
    assert found.khat.max() < 0.7
    assert 5 < low < error and error == pytest.approx(2000 * (16 / 31**0.5 - 1) / 64 / 2, rel=0.1)
    few = evaluate(hierarchy, exact_guide(x[:40]), x[:40], num_samples=64, **QUIET)
    assert few.log_evidence_se < 1e-6  # equal weights have no tail
    few = evaluate(hierarchy, exact_guide(x[:40], 4.0), x[:40], num_samples=64, **QUIET)
    assert few.log_evidence_se.isnull()
    reason = "k-hat of the local latents cannot be told from so few draws"
    assert few.log_evidence_se.attrs["reason"] == reason and reason in reading(few)


def mixture(x):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(4), 10.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        part = pyro.sample("part", dist.Categorical(weight))
        pyro.sample("x", dist.Normal(loc[part], scale[part]).to_event(1), obs=x)


def test_responsibilities_on_iris_are_those_of_scikit_learn():
    x = torch.as_tensor(load_iris().data)
    theirs = GaussianMixture(3, covariance_type="diag", random_state=0).fit(x.numpy())
    guide = FamilyGuide(mixture, "deterministic").setup(x)
    values = {"weight": theirs.weights_, "loc": theirs.means_, "scale": theirs.covariances_**0.5}
    for site in guide.sites:
        value = torch.as_tensor(values[site.name])
        free = value if site.transform is None else site.transform.inv(value)
        guide.heads[site.name].v.raw.data.copy_(free)
    found = evaluate(mixture, guide, x, num_samples=2, **QUIET)
    assert found.part_responsibility.dims == ("datum", "part_value")
    expected = theirs.predict_proba(x.numpy())
    assert np.allclose(found.part_responsibility, expected, atol=1e-8)
    assert np.allclose(-found.distortion, theirs.score_samples(x.numpy()), rtol=1e-6)


def test_responsibilities_of_a_local_model_are_averaged_over_its_draws():
    """Against the integral over the guide's normal of p(k | x, z), by the trapezoid rule."""
    weight, loc = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-2.0, 0.0, 2.0])

    def clusters(x):
        with pyro.plate("data", len(x)):
            part = pyro.sample("part", dist.Categorical(weight))
            z = pyro.sample("z", dist.Normal(loc[part], 0.5))
            pyro.sample("x", dist.Normal(z[..., None], 0.8).to_event(1), obs=x)

    clusters.vectorized = True
    x = data(7, 1)
    guide = FamilyGuide(clusters, "mean_scale", nn.Identity()).setup(x)
    found = evaluate(clusters, guide, x, num_samples=4000, batch_size=3, **QUIET)
    grid = torch.linspace(-30, 30, 60_001)[:, None, None]
    chances = (weight.log() + dist.Normal(loc, 0.5).log_prob(grid)).softmax(-1)
    q = guide.heads["z"](x)
    density = dist.Normal(q.loc, q.scale).log_prob(grid[:, 0]).exp()[..., None]
    expected = (chances * density).sum(0) * 0.001
    off = np.abs(found.part_responsibility.values - expected.detach().numpy())
    assert (off < 5 * 0.5 / math.sqrt(4000)).all()  # a chance has an sd of at most a half
    assert found.part_value.values.tolist() == [0, 1, 2]


def test_a_datum_of_all_locals_leaves_no_evidence_of_each(plain_pyro):
    """s depends on every z, so p(x | mu) is no product over the data: joint weights are used."""
    x = data(5)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("s", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(3.0))

    rows = torch.cat([torch.eye(5), torch.ones(1, 5)])
    covariance = rows @ (torch.eye(5) + 1.0) @ rows.T + torch.eye(6)
    both = torch.cat([x, torch.tensor([3.0])])
    exact = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(both).item()
    guide = FamilyGuide(model, "mean_scale")
    fit(model, guide, x, **QUIET)
    found = evaluate(model, guide, x, num_samples=1000, **QUIET)
    assert abs(found.log_evidence - exact) < 5 * found.log_evidence_se + 0.02
    assert found.ess.isnull().all()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_rates_that_cannot_be_told_apart_are_not_told(scale, plain_pyro):
    """A joint guide of locals and globals: its density belongs to neither; units change nothing."""
    x = scale * data(5, 1)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, scale))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, T * scale))
            pyro.sample("x", dist.Normal(z[..., None], S * scale).to_event(1), obs=x)

    guide = FamilyGuide(model, "full_rank")
    fit(model, guide, x, **QUIET)
    found = evaluate(model, guide, x, num_samples=64, **QUIET)
    expected = log_evidence(x / scale) - 5 * math.log(scale)
    assert found.log_evidence.item() == pytest.approx(expected, abs=1e-3)
    for name in ("global_rate", "rate", "elbo", "log_likelihood"):
        assert found[name].isnull().all(), name
    assert found.distortion.notnull().all() and "are not told" in reading(found)
    assert "global_rate" not in summary(found).index
