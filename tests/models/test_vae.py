"""The model, what it may say of itself, its priors and likelihoods, and the networks."""

import math

import pyro.distributions as dist
import pytest
import torch
from cases import LIKELIHOODS
from pyro import poutine
from torch import nn

from ppvae import VAE, FamilyGuide, families, fit, likelihoods
from ppvae._scopes import private_modules
from ppvae.models.protocol import check_data_of, example_of
from ppvae.nn import conv_decoder, conv_encoder, mlp
from ppvae.priors import as_prior


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_joint_density_written_out_and_trained(name):
    likelihood = LIKELIHOODS[name]
    model, x = VAE(mlp(2, 8, out=4), 2, likelihood.make()), likelihood.draw(12, 4)
    with private_modules():
        trace = poutine.trace(model).get_trace(x)
    z = trace.nodes["z"]["value"]
    trace.compute_log_prob()
    expected = likelihood.log_prob(model.decoder(z), x).sum(-1)
    assert torch.allclose(trace.nodes["x"]["log_prob"], expected)
    prior = -0.5 * (z**2).sum(-1) - math.log(2 * math.pi)
    assert torch.allclose(trace.nodes["z"]["log_prob"], prior)
    guide = FamilyGuide(model, families.mean_scale, mlp(4, 8))
    result = fit(model, guide, x, num_epochs=3, progress=False)
    assert all(map(math.isfinite, result.losses))
    learned = [n for n, _ in model.named_parameters() if "likelihood" in n]
    assert bool(learned) == (name in ("learned", "per feature"))


def test_learned_scale_reaches_the_maximum_likelihood():
    """Without a latent in use: the scale per feature is the root mean square of the data."""
    x = torch.randn(400, 3) * torch.tensor([0.5, 1.0, 2.0])

    class Nothing(nn.Module):
        def forward(self, z):
            return 0 * z @ torch.zeros(2, 3)

    model = VAE(Nothing(), 2, likelihoods.Normal(torch.ones(3), learned=True))
    guide = FamilyGuide(model, families.noise_only)
    fit(model, guide, x, num_epochs=800, learning_rate=0.02, progress=False)
    assert torch.allclose(model.likelihood.scale, x.square().mean(0).sqrt(), rtol=1e-6)


def test_model_draws_data_and_decodes_any_number_of_dims():
    """Batches of other sizes may go through other kernels, which round differently.

    A sum of n products is off by less than n eps times the sum of their sizes; here a number is
    made by at most 128 products of numbers below 2, three layers deep.
    """
    shape = (1, 8, 8)
    model = VAE(conv_decoder(3, shape, 4, 8), 3, likelihoods.Bernoulli())
    with private_modules():
        assert model(size=5).shape == (5, *shape)
    z = torch.randn(2, 6, 3)
    rounding = 3 * 128 * 128 * 4 * torch.finfo(z.dtype).eps
    decoded = model.decode(z)
    torch.testing.assert_close(decoded[1], model.decode(z[1]), rtol=0, atol=rounding)
    torch.testing.assert_close(model.mean(z), decoded.sigmoid(), rtol=0, atol=rounding)


def test_convolutions_mirror_each_other():
    shape = (2, 8, 12)
    encoder, decoder = conv_encoder(shape, 4, 6), conv_decoder(5, shape, 4, 6)
    x = torch.randn(3, *shape)
    assert encoder(x).shape == (3, 6 * 2 * 3)
    assert decoder(torch.randn(3, 5)).shape == x.shape


def test_building_a_model_leaves_buffers_and_random_numbers_alone():
    decoder = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    state = torch.get_rng_state()
    VAE(decoder, torch.tensor(2).numpy()[()], likelihoods.Bernoulli())  # an integer of NumPy's
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, decoder.state_dict()[k]) for k, v in before.items())


def _flow(dtype):
    base = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [dist.transforms.AffineTransform(base.mean + 1, 2.0)])


def _mixture(dtype):
    parts = dist.Normal(torch.zeros(3, 2, dtype=dtype), 1.0).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(3, dtype=dtype)), parts)


@pytest.mark.parametrize("make", [_flow, _mixture])
def test_a_fixed_prior_moves_with_its_model(make):
    """And stays the same distribution; the one that was given is left as it was."""
    given = make(torch.float32)
    model = VAE(mlp(2, out=3), 2, likelihoods.Bernoulli(), prior=given)
    assert model.prior is given and as_prior(given, 2) is given
    model.double()
    z = torch.randn(5, 2)
    assert torch.equal(model.prior.log_prob(z), make(torch.float64).log_prob(z))
    assert given.sample().dtype == torch.float32 and model.draw_prior(4).shape == (4, 2)
    with private_modules():
        assert model(size=2).dtype == torch.float64


def test_what_models_say_of_themselves():
    model = VAE(mlp(2, out=3), 2, likelihoods.Bernoulli())
    assert torch.equal(example_of(model)[0], torch.zeros(1, 3)) and example_of(len) is None
    asked = []
    model.check_data = lambda *args: asked.append(args)
    check_data_of(model, 1, 2)
    check_data_of(len, 1)
    assert asked == [(1, 2)]


def _vae(decoder=None, latent=2, likelihood=None, **prior):
    return lambda: VAE(decoder or mlp(2, 3), latent, likelihood or likelihoods.Bernoulli(), **prior)


class _Sum(nn.Module):
    def forward(self, z):
        return z.sum()


NORMAL = dist.Normal(torch.zeros(4, 2), 1.0)
BAD = [
    (lambda: mlp(3), ValueError, "two or more widths"),
    (lambda: mlp(3, 0), ValueError, r"above 0, got \[3, 0\]"),
    (lambda: conv_encoder((1, 9, 8), 4), ValueError, "sides divisible by 2"),
    (lambda: conv_encoder((1, 8, 9), 4), ValueError, "sides divisible by 2"),
    (lambda: conv_decoder(2, (1, 8, 8)), ValueError, "0 convolutions"),
    (lambda: likelihoods.Normal(0.0), ValueError, "scale: expected positive"),
    (lambda: likelihoods.Normal(math.inf), ValueError, "scale: expected positive finite .* inf"),
    (lambda: VAE(None, 2, likelihoods.Bernoulli()), TypeError, "decoder: expected .* got None"),
    (_vae(likelihood="bernoulli"), TypeError, "likelihood: .* got 'bernoulli'"),
    (_vae(likelihood=nn.Identity()), TypeError, "likelihood: expected a module that returns"),
    (_vae(latent=0), ValueError, "latent: .* got 0"),
    (_vae(latent=2.5), ValueError, "latent: expected a whole number of at least 1, got 2.5"),
    (_vae(latent=4), ValueError, r"decoder: .*\(1, 4\)"),
    (_vae(decoder=nn.LSTM(2, 3)), ValueError, r"decoder: .*\(1, \*event\).* got tuple"),
    (_vae(decoder=_Sum()), ValueError, r"decoder: .*\(1, \*event\).* got torch.Size\(\[\]\)"),
    (_vae(prior=dist.Normal(0.0, 1.0)), ValueError, r"prior: .* got \(\) and \(\)"),
    (_vae(prior=NORMAL.to_event(1)), ValueError, r"prior: .* got \(2,\) and \(4,\)"),
    (_vae(prior=torch.distributions.Normal(0.0, 1.0)), TypeError, "prior: expected a Pyro dist"),
    (_vae(prior=nn.Identity), TypeError, "prior: expected a Pyro distribution, or a module"),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()
