"""The model, its likelihoods and the networks."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ppvae import VAE, FamilyGuide, families, fit, likelihoods
from ppvae._scopes import private_modules
from ppvae.nn import conv_decoder, conv_encoder, mlp

LIKELIHOODS = {
    "bernoulli": (lambda: likelihoods.Bernoulli(), lambda shape: torch.ones(shape)),
    "poisson": (lambda: likelihoods.Poisson(), lambda shape: torch.full(shape, 3.0)),
    "normal": (lambda: likelihoods.Normal(0.3), lambda shape: torch.randn(shape)),
    "learned": (lambda: likelihoods.Normal(0.3, learned=True), lambda shape: torch.randn(shape)),
    "per feature": (
        lambda: likelihoods.Normal(torch.tensor([0.1, 0.2, 0.3, 0.4]), learned=True),
        lambda shape: torch.randn(shape),
    ),
}


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_joint_density_written_out(name):
    make, draw = LIKELIHOODS[name]
    model = VAE(mlp(2, 8, out=4), 2, make())
    x = draw((5, 4))
    with private_modules():
        trace = poutine.trace(model).get_trace(x)
    z = trace.nodes["z"]["value"]
    out = model.decoder(z)
    expected = {
        "bernoulli": lambda: out - torch.nn.functional.softplus(out),
        "poisson": lambda: 3 * out - out.exp() - math.log(6),
    }.get(name, lambda: dist.Normal(out, model.likelihood.scale).log_prob(x))()
    trace.compute_log_prob()
    assert torch.allclose(trace.nodes["x"]["log_prob"], expected.sum(-1))
    prior = -0.5 * (z**2).sum(-1) - math.log(2 * math.pi)
    assert torch.allclose(trace.nodes["z"]["log_prob"], prior)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_every_likelihood_trains(name):
    make, draw = LIKELIHOODS[name]
    model = VAE(mlp(2, 8, out=4), 2, make())
    guide = FamilyGuide(model, families.mean_scale, mlp(4, 8))
    result = fit(model, guide, draw((12, 4)), num_epochs=3, progress=False)
    assert all(map(math.isfinite, result.losses))
    learned = [n for n, _ in model.named_parameters() if "likelihood" in n]
    assert bool(learned) == (name in ("learned", "per feature"))


def test_learned_scale_reaches_the_maximum_likelihood():
    """Without a latent in use: the scale per feature is the root mean square of the data."""
    x = torch.randn(400, 3) * torch.tensor([0.5, 1.0, 2.0])

    class Nothing(torch.nn.Module):
        def forward(self, z):
            return 0 * z @ torch.zeros(2, 3)

    model = VAE(Nothing(), 2, likelihoods.Normal(torch.ones(3), learned=True))
    guide = FamilyGuide(model, families.noise_only)
    fit(model, guide, x, num_epochs=800, learning_rate=0.02, progress=False)
    assert torch.allclose(model.likelihood.scale, x.square().mean(0).sqrt(), rtol=1e-6)


def test_model_draws_data_and_decodes_any_number_of_dims():
    shape = (1, 8, 8)
    model = VAE(conv_decoder(3, shape, 4, 8), 3, likelihoods.Bernoulli())
    with private_modules():
        assert model(size=5).shape == (5, *shape)
    z = torch.randn(2, 6, 3)
    assert torch.equal(model.decode(z)[1], model.decode(z[1]))
    assert torch.equal(model.mean(z), model.decode(z).sigmoid())


def test_convolutions_mirror_each_other():
    shape = (2, 8, 12)
    encoder, decoder = conv_encoder(shape, 4, 6), conv_decoder(5, shape, 4, 6)
    x = torch.randn(3, *shape)
    assert encoder(x).shape == (3, 6 * 2 * 3)
    assert decoder(torch.randn(3, 5)).shape == x.shape


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: mlp(3), ValueError, "two or more widths"),
        (lambda: mlp(3, 0), ValueError, r"above 0, got \[3, 0\]"),
        (lambda: conv_encoder((1, 9, 8), 4), ValueError, "sides divisible by 2"),
        (lambda: conv_decoder(2, (1, 8, 8)), ValueError, "0 convolutions"),
        (lambda: likelihoods.Normal(0.0), ValueError, "scale: expected positive"),
        (lambda: VAE(None, 2, likelihoods.Bernoulli()), TypeError, "decoder: expected"),
        (lambda: VAE(mlp(2, 3), 2, "bernoulli"), TypeError, "likelihood: .* got 'bernoulli'"),
        (lambda: VAE(mlp(2, 3), 0, likelihoods.Bernoulli()), ValueError, "latent: .* got 0"),
        (lambda: VAE(mlp(2, 3), 4, likelihoods.Bernoulli()), ValueError, r"decoder: .*\(1, 4\)"),
        (
            lambda: VAE(mlp(2, 3), 2, likelihoods.Bernoulli(), prior=dist.Normal(0.0, 1.0)),
            ValueError,
            r"prior: expected event shape \(2,\), got \(\)",
        ),
    ],
)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_building_a_model_leaves_buffers_and_random_numbers_alone():
    decoder = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3))
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    state = torch.get_rng_state()
    VAE(decoder, 2, likelihoods.Bernoulli())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, decoder.state_dict()[k]) for k, v in before.items())
