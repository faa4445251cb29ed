"""Labels and covariates: what the model, its prior and the encoder make of them, and exposures."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LONG
from pairs import traceless
from scipy import stats
from torch import nn

from ppvae import (
    VAE,
    FamilyGuide,
    evaluate,
    families,
    fit,
    fit_replicates,
    from_pyro_svi,
    likelihoods,
    priors,
    simulate,
    stage,
)
from ppvae._scopes import private_modules
from ppvae.nn import Concatenate, Log1p, mlp
from ppvae.objectives import IWAE

QUIET = {"progress": False}
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1])


@pytest.fixture(autouse=True)
def _alone():
    """Programs that are run by hand leave their modules in Pyro's store."""
    with private_modules():
        yield


def conditional(prior=None, context=3):
    model = VAE(mlp(2 + context, 8, out=4), 2, likelihoods.Normal(0.5), prior, context=context)
    encoder = Concatenate(mlp(4 + context, 8), labels={1: context})
    return model, FamilyGuide(model, families.mean_scale, encoder)


@pytest.mark.parametrize("own", [False, True])
def test_log_p_given_a_context_is_exact(own):
    """x = W z + A c + b + noise, with z ~ N(B c, S) or standard normal: x given c is normal."""
    prior = priors.Learned(2, context=3) if own else None
    model = VAE(nn.Linear(5, 4), 2, likelihoods.Normal(0.5), prior, context=3)
    x, c = torch.randn(8, 4), torch.randn(8, 3)
    weight, b = model.decoder.weight.detach(), model.decoder.bias.detach()
    W, A = weight[:, :2], weight[:, 2:]
    fn = prior(c) if own else dist.Normal(torch.zeros(8, 2), 1.0).to_event(1)
    mean, variance = fn.mean.detach(), fn.variance.detach()
    covariance = W @ variance.diag_embed() @ W.T + 0.25 * torch.eye(4)
    expected = dist.MultivariateNormal(mean @ W.T + c @ A.T + b, covariance).log_prob(x)
    precision = variance.reciprocal().diag_embed() + W.T @ W / 0.25
    away = (x - mean @ W.T - c @ A.T - b) @ W / 0.25
    loc = mean + torch.linalg.solve(precision, away.unsqueeze(-1)).squeeze(-1)

    def posterior(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))

    found = evaluate(model, posterior, x, c, num_samples=8, batch_size=8, **QUIET)
    assert np.allclose(found.log_likelihood, expected, atol=1e-6)


@pytest.mark.parametrize("prior", [None, "network"] + ["linear"] * LONG)
def test_everything_takes_it(prior):
    if prior is not None:
        network = mlp(3, 6) if prior == "network" else None
        prior = priors.Learned(2, "full_rank", context=3, network=network)
    model, guide = conditional(prior)
    x = torch.randn(8, 4)
    result = fit(model, guide, (x, LABELS), num_epochs=2, batch_size=4, seed=0, **QUIET)
    assert all(map(math.isfinite, result.losses))
    ones = torch.eye(3)[LABELS]
    with traceless(model, guide):
        found = evaluate(model, guide, x, LABELS, num_samples=40, **QUIET)
        assert found.identical(evaluate(model, guide, x, ones, num_samples=40, **QUIET))
        codes = LABELS.to(x.dtype)
        assert found.identical(evaluate(model, guide, x, codes, num_samples=40, **QUIET))
        tree = from_pyro_svi(model, guide, x, LABELS, num_samples=3, seed=0)
    assert tree["prior_predictive/x"].shape == (1, 3, 8, 4)
    for objective in (None, IWAE(3)) if prior else (None,):
        staged = stage(model, guide, x, LABELS, objective=objective)
        torch.manual_seed(0)
        value = staged(x[:5], LABELS[:5]).item()
        torch.manual_seed(0)
        assert staged.program(x[:5], LABELS[:5], *staged.program.settings(0)).item() == (
            pytest.approx(value, rel=1e-6)
        )
    (drawn, labels), latents = simulate(model, x, LABELS, seed=0)
    assert (
        torch.equal(labels.long(), LABELS)
        and drawn.shape == x.shape
        and latents["z"].shape == (8, 2)
    )
    if prior is None:
        pairs = [conditional(), conditional()]
        assert len(fit_replicates(pairs, (x, LABELS), num_epochs=1, **QUIET)) == 2


def test_draws_decoding_and_means():
    model, _ = conditional(priors.Learned(2, context=3))
    assert model(context=LABELS).shape == (8, 4)
    assert model.draw_prior(8, LABELS).shape == (8, 2)
    z = torch.randn(5, 8, 2)
    both = torch.cat([z, torch.eye(3)[LABELS].expand(5, 8, 3)], -1)
    assert torch.allclose(model.decode(z, LABELS), model.decoder(both))
    assert model.mean(z, LABELS).shape == (5, 8, 4)


def test_a_state_is_of_one_context():
    state = conditional()[0].state_dict()
    other = VAE(mlp(5, 8, out=4), 2, likelihoods.Normal(0.5), context=3)
    other.load_state_dict(state)
    wrong = VAE(mlp(5, 8, out=4), 5, likelihoods.Normal(0.5))
    with pytest.raises(ValueError, match=r"^context: expected a state of \['None'\], got \['3'\]"):
        wrong.load_state_dict(state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x), r"^context: expected a tensor of shape \(batch, 3\).*, got NoneType"),
        (lambda m, x: m(x, torch.zeros(8, 2)), r"^context: .*, got \(8, 2\)"),
        (lambda m, x: m(x, LABELS[:5]), "^context: expected 8 rows, as x, got 5"),
        (lambda m, x: m(x, LABELS + 1), "^context: expected labels from 0 to 2, got 3 in row 1"),
        (lambda m, x: m(x, LABELS * math.nan), "^context: expected labels from 0 to 2, got nan in"),
        (lambda m, x: VAE(mlp(2, out=3), 2, likelihoods.Normal())(x[:, :3], LABELS),
         "^context: expected none, as the model was made without"),
        (lambda m, x: VAE(mlp(5, out=3), 2, m.likelihood, priors.Learned(2, context=2), context=3),
         "^prior: expected one for a context of 3 numbers, got one for 2"),
        (lambda m, x: VAE(mlp(2, out=3), 2, m.likelihood, priors.Learned(2, context=2)),
         "^prior: expected one for a context of None numbers, got one for 2"),
        (lambda m, x: conditional(priors.Learned(2, context=3))[0].draw_prior(3),
         "^context: expected one, which the prior depends on"),
        (lambda m, x: priors.Learned(2, network=mlp(2, 3)), "^network: expected none, without"),
        (lambda m, x: priors.Learned(2, context=3, network=mlp(2, 3)), "^network: .* takes shape"),
        (lambda m, x: m(x, LABELS, exposure=torch.ones(8)), "^exposure: expected none for this"),
        (lambda m, x: fit(m, FamilyGuide(m, "mean_scale", mlp(4, 3)), (x, LABELS)), "^encoder: "),
        # what the encoder would be blamed for
        (lambda m, x: evaluate(m, conditional()[1], x), "^context: expected a tensor of shape"),
        (lambda m, x: evaluate(m, conditional()[1], x, LABELS[:5]), "^context: .* 8 rows, as x"),
        (lambda m, x: fit(m, conditional()[1], (x, torch.zeros(8, 2))), r"^context: .*, got \(8"),
    ],
)  # fmt: skip
def test_what_is_refused(call, message):
    model, _ = conditional()
    with pytest.raises(ValueError, match=message):
        call(model, torch.randn(8, 4))


COUNTED = {
    "poisson": (likelihoods.Poisson, lambda x, mean, _: stats.poisson.logpmf(x, mean)),
    "binomial": (
        lambda: likelihoods.NegativeBinomial(0.7),
        lambda x, mean, _: stats.nbinom.logpmf(x, 1 / 0.7, 1 / (1 + 0.7 * mean)),
    ),
    "zeros": (
        lambda: likelihoods.ZeroInflated(likelihoods.Poisson()),
        lambda x, mean, share: np.log(share * (x == 0) + (1 - share) * stats.poisson.pmf(x, mean)),
    ),
}


def test_further_arguments_are_refused_where_the_encoder_would_be_blamed():
    model, guide = conditional()
    x = torch.randn(8, 4)
    with pytest.raises(TypeError, match="^args: expected data, and a context at most, got 4 arg"):
        evaluate(model, guide, x, LABELS, x, x)


@pytest.mark.parametrize("name", COUNTED)
def test_an_exposure_multiplies_the_means_of_counts(name):
    make, log_p = COUNTED[name]
    likelihood = make()
    exposure = torch.tensor([0.5, 2.0, 10.0])
    x, out = torch.tensor([[0.0, 3.0], [1.0, 0.0], [40.0, 7.0]]), torch.randn(3, 2)
    extra = torch.full((3, 2), math.log(0.2 / 0.8))
    whole = torch.cat([out, extra], -1) if name == "zeros" else out
    found = likelihood(whole, exposure).log_prob(x)
    mean = (out.exp() * exposure[:, None]).numpy()
    assert np.allclose(found.detach(), log_p(x.numpy(), mean, 0.2), atol=1e-10)
    each = exposure[:, None] * torch.ones(3, 2)
    assert torch.equal(likelihood(whole, each).log_prob(x), found)
    model = VAE(mlp(2, out=likelihood.size(2)), 2, likelihood)
    guide = FamilyGuide(model, families.mean_scale, nn.Sequential(Log1p(), mlp(2, 4)))
    told = {"kwargs": {"exposure": exposure}, "progress": False}
    assert math.isfinite(fit(model, guide, x, num_epochs=2, batch_size=2, **told).losses[-1])
    assert np.isfinite(evaluate(model, guide, x, num_samples=8, **told).elbo).all()


def test_a_start_under_an_exposure():
    """Counts of two rates under exposures: the start is at the rates, and at their dispersion."""
    rng = np.random.default_rng(0)
    exposure = rng.uniform(0.5, 20.0, 4000)
    means = exposure[:, None] * [0.3, 5.0]
    x = rng.poisson(rng.gamma(2.0, means / 2.0)).astype(float)
    made = likelihoods.NegativeBinomial.of(x, exposure=exposure)
    error = 5 * np.sqrt((means + means**2 / 2).sum(0)) / exposure.sum()  # of the mean
    assert (abs(made.start.exp().numpy() - [0.3, 5.0]) < error).all()
    assert np.allclose(made.dispersion.detach(), 0.5, atol=0.1)
    poisson = likelihoods.Poisson.of(x, exposure=exposure)
    assert torch.equal(poisson.start, made.start)
    zeros = likelihoods.ZeroInflated.of(x, exposure=exposure, counts=likelihoods.Poisson())
    assert torch.equal(zeros.counts.start, made.start)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: likelihoods.Poisson()(x, torch.tensor([1.0, 0.0])), "numbers, got 0 in row 1"),
        (lambda x: likelihoods.Poisson()(x, torch.ones(3)), r"shape \(2,\), one for each datum"),
        (lambda x: likelihoods.Poisson.of(x, exposure=[1.0]), r"^exposure: expected shape \(2\)"),
        (lambda x: likelihoods.Poisson.of(x, exposure=[1.0, -1.0]), "^exposure: expected positive"),
        (lambda x: likelihoods.Normal.of(x, exposure=[1.0, 1.0]), "^exposure: expected none for"),
    ],
)
def test_an_exposure_that_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 2))
