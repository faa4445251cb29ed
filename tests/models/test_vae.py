"""The model, what it may say of itself, its priors and likelihoods, and the networks."""

import math
from itertools import product

import pyro.distributions as dist
import pytest
import torch
from cases import DENSITIES, FAMILIES, LIKELIHOODS, LONG, PRIORS, in_turn
from torch import nn

from ppvae import VAE, FamilyGuide, families, fit, likelihoods
from ppvae._scopes import private_modules
from ppvae.models.protocol import check_data_of, example_of
from ppvae.nn import conv_decoder, conv_encoder, mlp
from ppvae.priors import as_prior
from ppvae.programs.tracing import trace_pair

#: priors with all families under one likelihood, all likelihoods with a few of both; and where
#: there is no time for that, families of each kind in turn, and one of the priors by likelihood
FEW = [*product(PRIORS, ["mean_scale"]), ("standard", "zero"), ("standard", "flow")]
KINDS = ["mean_scale", "full_rank", "flow", "noise_only", "deterministic"]
PAIRS = in_turn(PRIORS, KINDS, 3)
PAIRS += [(p, f) for f, p in in_turn(FAMILIES, ["standard", "positive mixture"], 1)]
WHOLE = [("normal", *row) for row in (product(PRIORS, FAMILIES) if LONG else dict.fromkeys(PAIRS))]
#: a guide that draws from its model, where no gradient reaches the parameters of a mixture
BLOCKED = [("normal", f"{kind} mixture", "noise_only") for kind in ("learned", "full")]
WHOLE = [row for row in WHOLE if row not in BLOCKED]
WHOLE += [
    (kind, *row)
    for number, kind in enumerate(LIKELIHOODS)
    for row in (FEW if LONG else [FEW[number % len(PRIORS)], FEW[-1 - number % 2]])
    if kind != "normal"
]


@pytest.mark.parametrize(("kind", "prior", "family"), WHOLE)
def test_every_likelihood_and_every_family_with_every_prior(kind, prior, family):
    """The densities are those written out, draws lie in the support, and a fit moves what it may.

    In the space of the reals, the density of the guide is that of its head.
    """
    likelihood, (make_prior, log_prior) = LIKELIHOODS[kind], PRIORS[prior]
    made = likelihood.make()
    model = VAE(mlp(2, 8, out=made.size(4)), 2, made, prior=make_prior())
    guide, x = FamilyGuide(model, FAMILIES[family], mlp(4, 8)), likelihood.draw(12, 4)
    with private_modules(), torch.no_grad():
        model_trace, guide_trace = trace_pair(model, guide, x)
    for trace in (model_trace, guide_trace):
        trace.compute_log_prob()
    z, positive = model_trace.nodes["z"]["value"], prior == "positive mixture"
    expected = likelihood.log_prob(model.decoder(z), x).sum(-1)
    torch.testing.assert_close(model_trace.nodes["x"]["log_prob"], expected)
    torch.testing.assert_close(model_trace.nodes["z"]["log_prob"], log_prior(z))
    assert (z > 0).all() or not positive
    if family in DENSITIES and family != "noise_only":
        u = z.log() if positive else z
        density = guide.heads["z"](guide.encoder(x)).log_prob(u).reshape(12, -1).sum(-1)
        density = density - u.sum(-1) if positive else density
        torch.testing.assert_close(guide_trace.nodes["z"]["log_prob"], density)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = fit(model, guide, x, num_epochs=2, progress=False)
    assert all(map(math.isfinite, result.losses))
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert all(moved[1:]) and moved[0] == (family != "zero" or positive)  # weights of z = 0
    own = [] if model.prior is None else [*getattr(model.prior, "parameters", list)()]
    assert len(moved) == 4 + len([*made.parameters()]) + len(own)


#: what goes into a loop in every run of the tests; in the long form it is all, and compiled
LOOPED = ["mixed", "learned mixture"]


@pytest.mark.parametrize("name", [n for n in [*LIKELIHOODS, *PRIORS] if LONG or n in LOOPED])
def test_every_likelihood_and_every_prior_goes_into_a_loop(name, interpreted):
    """The losses are those of the programs, up to the rounding of a graph; and so with gaps."""
    kind = LIKELIHOODS.get(name, LIKELIHOODS["normal"])
    x, losses = kind.draw(12, 4).to(torch.get_default_dtype()), []
    x[::3, 1] = math.nan
    for compiled in (False, True):
        torch.manual_seed(0)
        made = kind.make()
        prior = PRIORS[name][0]() if name in PRIORS else None
        model = VAE(mlp(2, 8, out=made.size(4)), 2, made, prior=prior)
        guide = FamilyGuide(model, "mean_scale", mlp(4, 8))
        told = {"num_epochs": 3, "seed": 0, "compile": compiled, "progress": False}
        result = fit(model, guide, x, **told)
        assert result.execution == ("looped" if compiled else "eager")
        losses.append(result.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_decoder_of_another_width_is_told_where_the_encoder_fails():
    model = VAE(mlp(2, 8, out=3), 2, likelihoods.Normal())
    with pytest.raises(
        ValueError, match=r"^encoder: expected a module that takes \[\(1, 3\)\]"
    ) as told:
        FamilyGuide(model, "mean_scale", mlp(4, 8))
    assert "its decoder's output" in told.value.__notes__[-1]


@pytest.mark.parametrize(("kind", "prior", "family"), BLOCKED)
def test_a_guide_without_a_gradient_is_refused(kind, prior, family):
    model = VAE(mlp(2, out=4), 2, LIKELIHOODS[kind].make(), prior=PRIORS[prior][0]())
    with pytest.raises(ValueError, match="guide: expected reparametrized draws; 'z' is drawn from"):
        fit(model, FamilyGuide(model, FAMILIES[family], mlp(4, 8)), torch.randn(6, 4))


def test_learned_scale_reaches_the_maximum_likelihood():
    """Without a latent in use: the scale per feature is the root mean square of the data."""
    x = torch.randn(400, 3) * torch.tensor([0.5, 1.0, 2.0])

    class Nothing(nn.Module):
        def forward(self, z):
            return 0 * z @ torch.zeros(2, 3)

    model = VAE(Nothing(), 2, likelihoods.Normal(torch.ones(3), learned=True))
    guide = FamilyGuide(model, families.noise_only)
    fit(model, guide, x, num_epochs=400, learning_rate=0.05, progress=False)
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


@pytest.mark.parametrize("name", ["flow", "mixture", "positive mixture"])
def test_a_fixed_prior_moves_with_its_model(name):
    """And stays the same distribution; the one that was given is left as it was."""
    given = PRIORS[name][0]()
    model = VAE(mlp(2, out=3), 2, likelihoods.Bernoulli(), prior=given)
    assert model.prior is given and as_prior(given, 2) is given
    model.float()
    z = model.draw_prior(5)
    assert z.dtype == torch.float32 and given.sample().dtype == torch.float64
    torch.testing.assert_close(model.prior.log_prob(z), PRIORS[name][1](z.double()).float())
    with private_modules():
        assert model(size=2).dtype == torch.float32


def test_what_models_say_of_themselves():
    model = VAE(mlp(2, out=3), 2, likelihoods.Bernoulli())
    assert torch.equal(example_of(model)[0], torch.zeros(1, 3)) and example_of(len) is None
    asked = []
    model.check_data = lambda x, context=None: asked.append((x, context))
    check_data_of(model, 1, context=2, other=3)
    check_data_of(len, 1)
    assert asked == [(1, 2)]


MEANINGS = {
    "one": lambda: {"likelihood": likelihoods.Normal(1.0)},
    "three": lambda: {"likelihood": likelihoods.Normal(3.0)},
    "learned": lambda: {"likelihood": likelihoods.Normal(1.0, learned=True)},
    "bernoulli": lambda: {"likelihood": likelihoods.Bernoulli()},
    "poisson": lambda: {"likelihood": likelihoods.Poisson()},
    "wide prior": lambda: {"prior": dist.Normal(torch.zeros(2), 3.0).to_event(1)},
    "narrow prior": lambda: {"prior": dist.Normal(torch.zeros(2), 0.3).to_event(1)},
    "other prior": lambda: {"prior": dist.Laplace(torch.zeros(2), 3.0).to_event(1)},
}


@pytest.mark.parametrize("one", MEANINGS)
@pytest.mark.parametrize("other", MEANINGS)
def test_a_state_of_another_meaning_is_refused(one, other, tmp_path):
    """Also where all shapes are the same; a state that does not say what it is loads as before."""
    model, target = (_vae(**MEANINGS[name]())() for name in (one, other))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if one == other:
        target.load_state_dict(state)
        assert torch.equal(target.decoder[0].weight, model.decoder[0].weight)
        del state["_extra_state"]
        target.float().load_state_dict(state)
    else:
        with pytest.raises(ValueError, match="^(likelihood|prior|scale): expected a state of "):
            target.load_state_dict(state)


def _vae(decoder=None, latent=2, likelihood=None, **prior):
    return lambda: VAE(decoder or mlp(2, 3), latent, likelihood or likelihoods.Bernoulli(), **prior)


class _Sum(nn.Module):
    def forward(self, z):
        return z.sum()


class _Complex(nn.Module):
    def forward(self, z):
        return z + 1j


NORMAL = dist.Normal(torch.zeros(4, 2), 1.0)
ROWS = likelihoods.Normal(torch.ones(12, 3))
BAD = [
    (_vae(decoder=_Complex()), TypeError, "decoder: expected an output of real numbers"),
    (_vae(likelihood=likelihoods.Normal([1.0, 2.0])), ValueError, r"likelihood: .* \(1, 3\)"),
    (_vae(likelihood=ROWS), ValueError, r"likelihood: .* one datum, got torch.Size\(\[12, 3\]\)"),
    (lambda: likelihoods.Normal("a"), TypeError, "scale: expected real numbers"),
    (lambda: likelihoods.Normal(torch.tensor(1 + 0j)), TypeError, "scale: expected real numbers"),
    (lambda: likelihoods.Normal(True), ValueError, "scale: expected positive"),
    (lambda: likelihoods.Normal(1.0, learned=1), TypeError, "learned: expected True or False"),
    (lambda: mlp(3), ValueError, "hidden, out: expected at least one layer"),
    (lambda: mlp(3, 0), ValueError, "hidden: .* at least 1, got 0"),
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
