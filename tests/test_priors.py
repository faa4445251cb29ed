"""Learned priors: where they start, that they are densities, and what the exact answers say."""

import copy
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import PRIORS
from pairs import data, traceless
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.distributions import AffineTransform, ExpTransform

from ppvae import (
    VAE,
    Family,
    FamilyGuide,
    annealed_importance,
    evaluate,
    fit,
    fit_replicates,
    likelihoods,
    priors,
    stage,
)
from ppvae._scopes import private_modules
from ppvae.nn import mlp
from ppvae.objectives import ELBO, IWAE, negative_elbo
from ppvae.priors import moved

QUIET = {"progress": False}
FAMILIES = ["mean_scale", "shared_scale", "full_rank", "low_rank", "student_t", "flow"]


@pytest.fixture(autouse=True)
def _alone():
    """Programs that are run by hand leave their modules in Pyro's store."""
    with private_modules():
        yield


def vamp(family="mean_scale", rows=4):
    """A model whose prior is made of the posteriors of some pseudo-inputs."""
    prior = priors.VampPrior(data(rows), latent=2)
    model = VAE(mlp(2, 4, out=3), 2, likelihoods.Normal(0.5), prior)
    return model, FamilyGuide(model, family, encoder=mlp(3, 4))


def grid(fn, end=12.0, count=400):
    """The integral of a density of two latents over a square."""
    line = torch.linspace(-end, end, count)
    points = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    return (fn.log_prob(points).exp().sum() * (2 * end / (count - 1)) ** 2).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_is_a_prior_that_starts_near_the_standard_normal(family):
    prior = priors.Learned(2, family)
    fn, standard = prior(), dist.Normal(torch.zeros(2), 1.0).to_event(1)
    z = torch.randn(50, 2)
    # a t of 30 degrees of freedom, factors and couplings of small random numbers
    assert (fn.log_prob(z) - standard.log_prob(z)).abs().max() < 0.3
    assert grid(fn) == pytest.approx(1.0, abs=1e-3)
    model = VAE(mlp(2, out=3), 2, likelihoods.Normal(0.5), prior)
    guide = FamilyGuide(model, "mean_scale", encoder=mlp(3, 4))
    before = [p.detach().clone() for p in prior.parameters()]
    fit(model, guide, data(10), num_epochs=3, **QUIET)
    assert all((p != b).any() for p, b in zip(prior.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["learned", "tilted", "relevance", "learned mixture"])
def test_they_are_densities_whose_draws_have_their_moments(name):
    fn = PRIORS[name][0]()()
    assert grid(fn) == pytest.approx(1.0, abs=1e-3)
    draws = fn.sample((20_000,)).detach()
    error = fn.stddev / math.sqrt(20_000)
    assert ((draws.mean(0) - fn.mean).abs() < 5 * error).all()
    # the variance of a squared deviation is at most 2 s^4 here: no tail is heavier than normal
    spread = fn.variance * math.sqrt(2 / 20_000)
    assert ((draws.var(0) - fn.variance).abs() < 5 * spread).all()


def test_log_p_under_a_learned_normal_prior_is_exact():
    """x = W z + b + noise with z ~ N(m, S): x is normal, and so is the posterior."""
    decoder, prior = nn.Linear(2, 3), PRIORS["tilted"][0]()
    model = VAE(decoder, 2, likelihoods.Normal(0.5), prior)
    x = data(12)
    fn = prior()
    W, b = decoder.weight.detach(), decoder.bias.detach()
    mean, covariance = fn.mean.detach(), fn.covariance_matrix.detach()
    marginal = dist.MultivariateNormal(W @ mean + b, W @ covariance @ W.T + 0.25 * torch.eye(3))
    precision = torch.linalg.inv(covariance) + W.T @ W / 0.25
    slope = torch.linalg.solve(precision, W.T / 0.25)

    def posterior(x):
        with pyro.plate("data", len(x)):
            loc = mean + (x - W @ mean - b) @ slope.T
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))

    found = evaluate(model, posterior, x, num_samples=8, **QUIET)
    expected = marginal.log_prob(x).detach()
    assert np.allclose(found.log_likelihood, expected, atol=1e-6)
    guide = FamilyGuide(model, "mean_scale", encoder=mlp(3, 4))
    run = annealed_importance(model, guide, x, num_temperatures=100, num_chains=64, **QUIET)
    error = np.sqrt(1 / run.ess - 1 / 64)  # of the log of a mean weight
    assert error.max() < 0.3
    assert (abs(run.log_likelihood - expected.numpy()) < 5 * error + 0.02).all()


@pytest.mark.parametrize("full", [True, False])
def test_a_mixture_fitted_to_codes_is_that_of_the_em_algorithm(full):
    rng = np.random.default_rng(0)
    codes = np.concatenate([rng.normal(size=(60, 2)) - 3, rng.normal(size=(90, 2)) * 0.3 + 2])
    prior = priors.Mixture.of(codes, components=2, full=full)
    kind = "full" if full else "diag"
    known = GaussianMixture(2, covariance_type=kind, random_state=0).fit(codes)
    density = prior().log_prob(torch.tensor(codes)).detach().numpy()
    assert np.allclose(density, known.score_samples(codes), atol=1e-10)
    model = VAE(nn.Linear(2, 3), 2, likelihoods.Normal(0.5))
    assert abs(model.draw_prior(500).mean()) < 0.3
    model.prior = prior
    assert abs(model.draw_prior(500).mean() + 0.0) < 1.0 and model.draw_prior(500).min() < -3


def test_a_vamp_prior_is_the_mixture_of_its_posteriors():
    model, guide = vamp()
    assert model.prior.attached
    z = torch.randn(7, 2)
    parts = guide.posterior(model.prior.inputs).log_prob(z[:, None])
    share = model.prior.logits.log_softmax(-1)
    assert torch.allclose(model.prior().log_prob(z), (parts + share).logsumexp(-1))
    loss = negative_elbo(model, guide, data(6))
    wanted = [model.prior.inputs, model.prior.logits, *guide.encoder.parameters()]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("family", ["full_rank", "student_t", "flow"])
def test_a_vamp_prior_takes_families_with_a_density(family):
    model, guide = vamp(family)
    result = fit(model, guide, data(6), num_epochs=2, seed=0, **QUIET)
    assert all(map(math.isfinite, result.losses))
    with traceless(model, guide):
        assert np.isfinite(evaluate(model, guide, data(6), num_samples=8, **QUIET).elbo).all()


def test_a_vamp_prior_runs_staged_and_side_by_side():
    model, guide = vamp()
    for objective in (ELBO(), IWAE(3)):
        staged = stage(model, guide, data(6), objective=objective)
        values = []
        for call in (staged, lambda x, f=objective: f(model, guide, x)):
            torch.manual_seed(1)
            values.append(call(data(5)).item())
        assert values[0] == pytest.approx(values[1], rel=1e-6)
    pairs = []
    for seed in range(2):
        torch.manual_seed(seed)
        pairs.append(vamp())
    alone = copy.deepcopy(pairs)
    told = {"num_epochs": 3, "batch_size": 3, **QUIET}
    together = fit_replicates(pairs, data(6), seeds=[1, 2], **told)
    for pair, seed, result in zip(alone, [1, 2], together, strict=True):
        assert np.allclose(fit(*pair, data(6), seed=seed, **told).losses, result.losses, rtol=1e-5)


def test_copies_of_a_pair_are_attached_to_one_another():
    pair = vamp()
    for model, guide in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert guide.model is model and model.prior._encode[0].__self__ is guide
    guide = pickle.loads(pickle.dumps(pair[1]))
    assert guide.model.prior._encode[0].__self__ is guide
    other = FamilyGuide(pair[0], "full_rank", encoder=mlp(3, 4))  # the first one is the prior's
    assert pair[0].prior._encode[0].__self__ is pair[1] is not other
    keys = pair[0].state_dict()
    assert not any("encoder" in key for key in keys)
    fresh = vamp()
    fresh[0].load_state_dict(keys)
    assert torch.equal(fresh[0].prior.inputs, pair[0].prior.inputs)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: priors.Learned(0), ValueError, "^latent: .* at least 1, got 0"),
        (lambda: priors.Learned(2, "noise_only"), ValueError, "^family: .* density of its own"),
        (lambda: priors.Learned(2, "deterministic"), ValueError, "^family: .* density of its own"),
        (lambda: priors.Learned(2, Family(dist.Gamma)), ValueError, "^family: .* over the reals"),
        (lambda: priors.Learned(2, 3), TypeError, "^family: expected a guide family"),
        (
            lambda: priors.Learned(2, context=1)(torch.zeros(1, 2)),
            ValueError,
            r"^context: expected shape \(batch, 1\), got \(1, 2\)",
        ),
        (lambda: priors.Learned(2, context=1)(), ValueError, "^context: .*, got none"),
        (lambda: priors.Learned(2)(torch.zeros(1, 2)), ValueError, "^context: expected none, got"),
        (lambda: priors.ARD(1.5), ValueError, "^latent: expected a whole number"),
        (lambda: priors.Mixture(2, 0), ValueError, "^components: .* at least 1, got 0"),
        (lambda: priors.Mixture(2, full=1), TypeError, "^full: expected True or False, got 1"),
        (lambda: priors.Mixture.of([[0.0]], 2), ValueError, "^codes: expected at least 2"),
        (lambda: priors.Mixture.of([0.0]), ValueError, r"^codes: expected shape \(N, latent\)"),
        (lambda: priors.Mixture.of([[math.nan]]), ValueError, "^codes: expected finite numbers"),
        (lambda: priors.VampPrior([1.0], 2), ValueError, r"^inputs: expected shape \(components"),
        (lambda: priors.VampPrior([[math.nan]], 2), ValueError, "^inputs: expected finite"),
        (
            lambda: priors.VampPrior(data(2), 2).attach(3),
            TypeError,
            "^encode: .* function, got int",
        ),
        (lambda: priors.VampPrior(data(2), 2)(), ValueError, "^prior: expected an encoder: a Fam"),
        (lambda: vamp("deterministic")[0].prior(), ValueError, "^family: .* density"),
        (lambda: vamp("noise_only")[0].prior(), ValueError, "^guide: expected an encoder, and one"),
        (lambda: _wrong()(), ValueError, r"^encode: expected batch shape \(2,\) and event shape"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def _wrong():
    prior = priors.VampPrior(data(2), 2)
    prior.attach(lambda x: dist.Normal(x, 1.0))
    return prior


def test_a_guide_by_hand_says_what_its_posterior_is():
    prior = priors.VampPrior(data(4), latent=2)
    encoder = nn.Linear(3, 2)
    prior.attach(lambda x: dist.Normal(encoder(x), 0.5).to_event(1))
    model = VAE(mlp(2, out=3), 2, likelihoods.Normal(0.5), prior)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    assert fit(model, guide, data(6), num_epochs=2, **QUIET).num_steps == 2


def test_a_distribution_moves_also_once_its_inverse_was_asked_for():
    """PyTorch's transforms keep their inverse, which holds them in turn."""
    prior = dist.LogNormal(0.0, torch.tensor(0.5))
    inverted = dist.TransformedDistribution(dist.Normal(0.0, torch.tensor(0.5)), ExpTransform())
    for fn, value in ((prior, 2.0), (inverted, 2.0)):
        value = torch.tensor(value)
        expected = fn.log_prob(value)
        single = moved(fn, lambda tensor: tensor.float())
        assert single.log_prob(value.float()).dtype == torch.float32
        assert torch.allclose(single.log_prob(value.float()).double(), expected, rtol=1e-6)
    shift = AffineTransform(torch.tensor(1.0), torch.tensor(2.0)).inv
    fn = dist.TransformedDistribution(dist.Normal(0.0, torch.tensor(1.0)), [shift])
    expected = fn.log_prob(torch.tensor(0.3))  # of (z - 1) / 2
    assert torch.allclose(expected, dist.Normal(-0.5, 0.5).log_prob(torch.tensor(0.3)))
    single = moved(fn, lambda tensor: tensor.float()).log_prob(torch.tensor(0.3).float())
    assert single.dtype == torch.float32 and torch.allclose(single.double(), expected, rtol=1e-6)
