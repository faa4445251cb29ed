"""Models with discrete latents in every function that takes a model: what comes is right."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppvae import (
    FamilyGuide,
    calibration,
    evaluate,
    fit,
    from_pyro_svi,
    impute,
    log_prob,
    predict,
    reconstruct,
)
from ppvae._scopes import private_modules
from ppvae.objectives import ELBO

QUIET = {"progress": False}


def data(*shape):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def stacked(x):
    """Discrete latents in as many plates as the data have dims."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate_stack("d", x.shape):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(mu + k, 1.0), obs=x)


def origin(*_):
    pyro.sample("mu", dist.Delta(torch.tensor(0.0)))


def test_a_model_may_have_more_plates_in_a_later_call():
    """The dims of enumeration are to the left of all plates of the call, not of an earlier one."""
    for x in (data(4), data(3, 4), data(2, 3, 4), data(2, 2, 3, 4), data(4)):
        with private_modules():
            loss = ELBO()(stacked, origin, x, size=1)
        logs = [math.log(p) + dist.Normal(m, 1.0).log_prob(x) for p, m in ((0.7, 0.0), (0.3, 1.0))]
        prior = dist.Normal(0.0, 2.0).log_prob(torch.tensor(0.0))
        # a mean over the members of the data plate, the outermost with the length of the data
        expected = -(prior + torch.logaddexp(*logs).sum() / len(x))
        assert torch.allclose(loss, expected, rtol=1e-6)


def mixed(n, x=None, seen=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", n):
        k = pyro.sample("k", dist.Bernoulli(0.25))
        if seen is not None:
            pyro.sample("seen", dist.Normal(10 * k, 0.1), obs=seen)
        pyro.sample("x", dist.Normal(mu + 10 * k, 0.1), obs=x)


def test_predictions_draw_what_is_summed_out():
    """From its prior, or given what else is observed, and not given the prediction itself."""
    guide = FamilyGuide(mixed, "mean_scale").setup(6, torch.zeros(6))
    found = predict(mixed, guide, 6, seed=0, num_samples=300)
    assert found.x.dims == ("draw", "datum") and found.x.shape == (300, 6)
    far = (found.x > 5).mean()
    assert abs(far - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 1800)
    seen = torch.tensor([0.0, 10.0, 0.0])
    found = predict(mixed, guide, 3, seed=0, num_samples=300, kwargs={"seen": seen})
    assert np.array_equal((found.x > 5).all("draw"), seen.numpy() > 5)
    assert np.array_equal((found.x < 5).all("draw"), seen.numpy() < 5)


def labels(x, y=None):
    """A regression of labels: the data themselves are discrete."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=w * x), obs=y)


def test_predictions_of_discrete_data_are_draws():
    guide = FamilyGuide(labels, "mean_scale").setup(data(5), torch.ones(5))
    guide.heads["w"].loc.raw.data.fill_(3.0)
    guide.heads["w"].scale.raw.data.fill_(-9.0)
    x = torch.tensor([-2.0, 0.0, 2.0])
    found = predict(labels, guide, x, seed=0, num_samples=1000)
    assert found.y.dims == ("draw", "datum") and set(np.unique(found.y)) == {0.0, 1.0}
    assert np.allclose(found.y.mean("draw"), torch.sigmoid(3 * x), atol=5 * 0.5 / math.sqrt(1000))


def two(x):
    """A local latent and a discrete one behind three columns."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        loc = torch.stack([0 * k, 3 * k, 3 * k], -1)
        z = pyro.sample("z", dist.Normal(0.0, 0.1))
        pyro.sample("x", dist.Normal(loc + z[..., None], 0.5).to_event(1), obs=x)


two.vectorized = True


def guide_of_two(x):
    guide = FamilyGuide(two, "mean_scale", nn.Identity()).setup(x)
    with torch.no_grad():  # the prior of z, which has little to say
        for part, value in (("loc", 0.0), ("scale", math.log(0.1))):
            getattr(guide.heads["z"], part).linear.weight.zero_()
            getattr(guide.heads["z"], part).linear.bias.fill_(value)
    return guide


def test_what_is_missing_follows_from_the_discrete_latent():
    """Columns 1 and 2 are both near 0 or both near 3: one tells the other."""
    x = torch.tensor([[0.0, 3.0, math.nan], [0.0, math.nan, 0.0], [0.1, 2.9, 3.1]])
    guide = guide_of_two(x)
    found = impute(two, guide, x, num_samples=2000, seed=0)
    assert found.value[0, 2].item() == pytest.approx(3.0, abs=0.1)
    assert found.value[1, 1].item() == pytest.approx(0.0, abs=0.1)
    again = reconstruct(two, guide, x[2:], num_samples=2000, seed=0)
    assert np.allclose(np.asarray(again).reshape(-1), [0.0, 3.0, 3.0], atol=0.1)
    logs = []
    for p, m in ((0.6, [0.0, 0.0, 0.0]), (0.4, [0.0, 3.0, 3.0])):
        covariance = 0.25 * torch.eye(3) + 0.01
        fn = dist.MultivariateNormal(torch.tensor(m), covariance)
        logs.append(math.log(p) + fn.log_prob(x[2]))
    found = log_prob(two, guide, x[2:], num_samples=4000)
    assert found.log_likelihood.item() == pytest.approx(torch.logaddexp(*logs).item(), abs=0.02)


def test_calibration_ranks_what_the_guide_draws():
    x = data(200, 3)
    found = calibration(two, guide_of_two(x), x, num_samples=39, **QUIET)
    assert found.latent.values.tolist() == ["z"] and np.isfinite(found.information)


def parts(x):
    """Nothing but discrete latents, and parameters."""
    loc = pyro.param("loc", torch.tensor([-0.5, 0.5]))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)


def test_a_model_of_discrete_latents_only_is_fitted_and_measured(plain_pyro):
    """The likelihood is exact, so the bound is log p(x) itself; at its maximum nothing is left."""
    x = torch.cat([data(150) - 2.0, data(151)[1:] + 2.0])
    guide = FamilyGuide(parts, "mean_scale")
    fitted = fit(parts, guide, x, num_epochs=300, learning_rate=0.05, **QUIET)
    loc = pyro.param("loc").detach()
    logs = [
        math.log(p) + dist.Normal(m, 1.0).log_prob(x) for p, m in zip((0.3, 0.7), loc, strict=True)
    ]
    exact = torch.logaddexp(*logs)
    assert fitted.losses[-1] == pytest.approx(-exact.mean().item(), abs=1e-3)
    found = evaluate(parts, guide, x, num_samples=4, **QUIET)
    assert found.total_elbo.item() == pytest.approx(exact.sum().item(), rel=1e-9)
    assert found.log_evidence.item() == pytest.approx(exact.sum().item(), rel=1e-9)
    assert np.allclose(found.log_likelihood, exact, rtol=1e-9)
    assert np.allclose(found.k_responsibility, torch.stack(logs, -1).softmax(-1), rtol=1e-6)
    tree = from_pyro_svi(parts, guide, x, num_samples=50)
    assert tree["posterior"]["k"].shape == (1, 50, 300)
