"""Resampled and annealed draws of posteriors that are known."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import in_turn
from linear import Linear, Regression
from pyro.infer import Predictive
from torch import nn

from ppvae import FamilyGuide, families, fit, resample
from ppvae._scopes import private_modules
from ppvae.regression import LinearRegression

W = [[1.3, 0.4], [-0.2, 0.9], [0.5, -1.1], [0.8, 0.6]]


def draw(*args, **options):
    return resample(*args, progress=False, **options)


def whitened(values, mean, precision):
    """Draws that are standard normal, if they are of this posterior; `(draws, datum, latent)`."""
    return (values - mean) @ torch.linalg.cholesky(precision)


def standard(z):
    """Whether draws are standard normal: means of each datum, and second moments of all.

    Five standard errors: the mean of S draws has one of 1 / sqrt(S), a mean square over M numbers
    one of sqrt(2 / M), and a mean product one of 1 / sqrt(M).
    """
    means, pooled = z.mean(0) * math.sqrt(len(z)), z.flatten(0, -2)
    moments = pooled.T @ pooled / len(pooled)
    off = (moments - torch.eye(len(moments))).abs()
    fits = bool((off < 5 * math.sqrt(2 / len(pooled))).all()) and bool((means.abs() < 5).all())
    return fits and abs(means.square().mean() - 1) < 5 * math.sqrt(2 / means.numel())


@pytest.mark.parametrize(
    ("shift", "options"),
    [
        (0.7, {"num_candidates": 1000}),
        (3.0, {"num_candidates": 8, "num_temperatures": 60, "batch_size": 7}),
    ],
    ids=["resampled", "annealed in minibatches"],
)
def test_draws_of_a_guide_that_is_off_become_draws_of_the_posterior(shift, options):
    """The bias of resampling is of the order of 1 / candidates, of one of the guide's deviations.

    Chains from a guide three deviations off make up for candidates of which none would do.
    """
    linear = Linear(W, size=14, noise=1.0)
    guide = linear.guide(families.mean_only, shift=shift)
    with torch.no_grad(), private_modules():
        guides = torch.stack([guide(linear.x)["z"] for _ in range(200)])
    assert not standard(whitened(guides, linear.mean, linear.P))
    found = draw(linear.model, guide, linear.x, num_samples=200, **options)
    assert found.latents["z"].shape == (200, 14, 2)
    assert standard(whitened(found.latents["z"], linear.mean, linear.P))
    gain = found.gain
    assert (gain.gain > 0).all() and (gain.ess > 1).all()
    assert np.allclose(gain.gain, gain.log_likelihood - gain.elbo)
    assert gain.gain.attrs["unit"] == gain.elbo.attrs["unit"] == "nats per datum"
    # the bound has the gap of its mean and noise: 200 draws of a log of a mean
    assert abs((gain.log_likelihood - linear.log_p).mean()) < 0.1
    # the log weights of the guide have a standard deviation of less than 10 nats
    error = 10 / math.sqrt(200 * options["num_candidates"])
    assert abs(gain.elbo - linear.elbo(guide)).max() < 5 * error


def test_the_more_candidates_the_higher_the_bound():
    """Up to log p(x), of which it is a bound: within five standard errors of its mean."""
    linear = Linear(W, size=20, noise=1.0)
    guide = linear.guide(families.mean_only, shift=1.0)
    bounds = []
    for count in (1, 4, 64, 500):
        gain = draw(linear.model, guide, linear.x, num_samples=200, num_candidates=count).gain
        bounds.append(float(gain.gain.mean()))
        exact = linear.log_p - linear.elbo(guide)
        assert (gain.gain - exact).mean() < 5 * float(gain.gain_se.max()) / math.sqrt(20)
        if count == 1:
            assert gain.elbo.equals(gain.log_likelihood) and (gain.ess == 1).all()
    assert bounds[0] == 0 and all(a < b for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize(("vectorized", "temperatures"), in_turn([True, False], [1, 4], 1))
def test_of_the_posterior_itself_nothing_is_gained(vectorized, temperatures):
    linear = Linear(size=6)
    options = {"num_samples": 3, "num_candidates": 4, "num_temperatures": temperatures}
    found = draw(
        linear.model, linear.exact(), linear.x, vectorized=vectorized, batch_size=4, **options
    )
    gain = found.gain
    assert abs(gain.gain).max() < 1e-10 and gain.gain_se.max() < 1e-10
    assert np.allclose(gain.elbo, linear.log_p) and np.allclose(gain.log_likelihood, linear.log_p)
    assert np.allclose(gain.ess, 4) and (gain.khat == 0).all()
    assert found.latents["z"].shape == (3, 6, 3) and gain.attrs == options
    assert repr(found).startswith("Resampled 3 draws of ['z']: gain")


def test_runs_of_single_draws_are_of_the_posterior_too():
    linear = Linear(W, size=10, noise=1.0)
    guide = linear.guide(families.mean_only, shift=0.3)
    options = {"num_samples": 30, "num_candidates": 25, "vectorized": False}
    found = draw(linear.model, guide, linear.x, **options)
    assert standard(whitened(found.latents["z"], linear.mean, linear.P))


@pytest.mark.parametrize("options", [{"num_candidates": 2000}, {"num_temperatures": 60}])
def test_weights_of_a_regression_become_draws_of_their_exact_posterior(options):
    known = Regression(rows=100, columns=4)
    guide = known.guide(families.mean_scale)
    options = {"num_samples": 300, "num_candidates": 8} | options
    found = draw(known.model, guide, *known.args, **options)
    weight, gain = found.latents["weight"], found.gain
    assert weight.shape == (300, 4) and not gain.sizes
    assert standard(whitened(weight[:, None], known.mean(*known.args), known.P))
    gap = (known.P.diagonal().log().sum() - known.P.logdet()) / 2
    assert abs(gain.gain - gap.item()) < 5 * gain.gain_se + 0.05  # the bound's own gap
    assert gain.gain.attrs["unit"] == gain.total_elbo.attrs["unit"] == "nats of all the data"
    assert float(gain.log_evidence - gain.total_elbo) == pytest.approx(float(gain.gain))


def test_draws_go_into_predictive():
    known = Regression(rows=40, columns=3)
    model = LinearRegression(3, weight=dist.Normal(0.0, 1.0), noise=dist.HalfNormal(1.0))
    guide = FamilyGuide(model, "mean_scale")
    fit(model, guide, known.args, progress=False)
    for temperatures in (1, 10):
        options = {"num_samples": 50, "num_candidates": 4, "num_temperatures": temperatures}
        found = draw(model, guide, *known.args, **options)
        shapes = {name: tuple(value.shape) for name, value in found.latents.items()}
        assert shapes == {"weight": (50, 3), "noise": (50,)} and (found.latents["noise"] > 0).all()
        drawn = Predictive(model, posterior_samples=found.latents)(known.args[0])["y"]
        mean = found.latents["weight"] @ known.args[0].T
        z = (drawn - mean) / found.latents["noise"][:, None]
        assert abs(z.mean()) < 5 / math.sqrt(2000)
        assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / 2000)


@pytest.mark.parametrize("options", [{"num_candidates": 300}, {"num_temperatures": 30}])
def test_discrete_latents_are_drawn_given_the_others(options):
    """Their chances given the data are a mixture's; five standard errors, and the bias of 0.01."""
    weight, loc = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-2.0, 0.0, 2.0])

    def clusters(x):
        with pyro.plate("data", len(x)):
            part = pyro.sample("part", dist.Categorical(weight))
            z = pyro.sample("z", dist.Normal(loc[part], 0.5))
            pyro.sample("x", dist.Normal(z[..., None], 0.8).to_event(1), obs=x)

    clusters.vectorized = True
    x = 2 * torch.randn(7, 1)
    guide = FamilyGuide(clusters, "mean_scale", nn.Identity()).setup(x)
    with torch.no_grad():  # as wide as the data
        guide.heads["z"].scale.linear.weight.zero_()
        guide.heads["z"].scale.linear.bias.fill_(0.5)
    found = draw(clusters, guide, x, num_samples=400, **({"num_candidates": 16} | options))
    part, z = found.latents["part"], found.latents["z"]
    assert part.dtype == torch.long and part.shape == z.shape == (400, 7)
    chances = dist.Normal(loc, math.hypot(0.5, 0.8)).log_prob(x) + weight.log()
    chances = chances.softmax(-1)
    share = nn.functional.one_hot(part, 3).double().mean(0)
    error = (chances * (1 - chances) / 400).sqrt()
    assert ((share - chances).abs() < 5 * error + 0.01).all()
    precision = 1 / 0.25 + 1 / 0.64
    mean = (loc[part] / 0.25 + x[:, 0] / 0.64) / precision  # of z given both
    off = (z - mean) * math.sqrt(precision)
    assert abs(off.mean()) < 5 / math.sqrt(2800) + 0.02
    assert abs(off.square().mean() - 1) < 5 * math.sqrt(2 / 2800) + 0.02


def test_locals_and_globals_are_chosen_together():
    """Four data, whose posterior is Gaussian: of the precision below, in `mu` and all `z`."""

    def hierarchy(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 0.7))
            pyro.sample("x", dist.Normal(z[..., None], 0.5).to_event(1), obs=x)

    hierarchy.vectorized = True
    x = torch.randn(4, 1)
    guide = FamilyGuide(hierarchy, "mean_scale", nn.Identity()).setup(x)
    precision = torch.diag(torch.tensor([1 + 4 / 0.49] + [1 / 0.49 + 4] * 4))
    precision[0, 1:] = precision[1:, 0] = -1 / 0.49
    mean = torch.linalg.solve(precision, torch.cat([torch.zeros(1), 4 * x[:, 0]]))
    found = draw(hierarchy, guide, x, num_samples=400, num_candidates=8, num_temperatures=100)
    mu, z = found.latents["mu"], found.latents["z"]
    assert mu.shape == (400,) and z.shape == (400, 4) and not found.gain.sizes
    both = torch.cat([mu[:, None], z], -1)[:, None]
    assert standard(whitened(both, mean, precision))


def test_bad_input():
    linear = Linear(W, size=6)
    point = linear.guide(families.deterministic)
    with pytest.raises(ValueError, match="guide: expected a density of every latent, got a point"):
        draw(linear.model, point, linear.x)
    for name in ("num_samples", "num_candidates", "num_temperatures", "num_leapfrog"):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number"):
            draw(linear.model, linear.exact(), linear.x, **{name: 0})
    with pytest.raises(ValueError, match="num_samples: .* at least 2, got 1"):
        draw(linear.model, linear.exact(), linear.x, num_samples=1)
