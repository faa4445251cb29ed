"""What people do with a fitted pair, against what the programs themselves say."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import exact_pair, holes, observed_only
from pairs import build, data, traceless
from torch import nn

from ppvae import (
    VAE,
    FamilyGuide,
    encode,
    evaluate,
    families,
    fit,
    generate,
    interpolate,
    likelihoods,
    log_prob,
    predict,
    priors,
    reconstruct,
)
from ppvae.nn import Concatenate, mlp
from ppvae.regression import LinearRegression

FAMILIES = [*families.LADDER]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_encodes_reconstructs_and_scores(family):
    model, guide = build(family)
    x = data(7)
    with traceless(model, guide):
        q = encode(model, guide, x)
        back = reconstruct(model, guide, x, num_samples=3)
        again = reconstruct(model, guide, x, num_samples=3, batch_size=7)
        if family not in ("deterministic", "zero"):
            score = log_prob(model, guide, x, num_samples=40)
    assert q.batch_shape == (7,) and q.event_shape == (2,) and q.sample().shape == (7, 2)
    assert back.shape == x.shape and torch.equal(back, again) and not back.requires_grad
    if family in ("deterministic", "zero"):
        assert torch.allclose(back, model.mean(q.mean).detach())
        with pytest.raises(ValueError, match="^guide: expected one with a density, got a point"):
            log_prob(model, guide, x)
    else:
        found = evaluate(model, guide, x, num_samples=40, progress=False)
        bound = 6 * (score.log_likelihood_se + 0.1)
        assert (abs(score.log_likelihood - found.log_likelihood) < bound).all()
    if family in ("mean_scale", "full_rank", "student_t", "low_rank"):
        fn = guide.heads["z"](guide.encoder(x))
        assert torch.equal(q.mean, fn.mean)
    if family == "flow":
        with pytest.raises(NotImplementedError, match="the variance of a .* has no closed form"):
            _ = q.stddev


def test_a_code_on_a_half_line_says_that_its_mean_is_not_known():
    def model(x):
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, scale), obs=x[:, 0])

    q = encode(model, FamilyGuide(model, "mean_scale", mlp(3, 4)).setup(data(3)), data(3))
    with pytest.raises(NotImplementedError, match="^the mean of a Normal through Exp"):
        _ = q.mean
    assert q.sample((10,)).min() > 0


def test_a_reconstruction_is_the_mean_over_draws():
    """Of a linear decoder it is the decoded mean, up to the error of so many draws."""
    model = VAE(nn.Linear(2, 3), 2, likelihoods.Normal(0.5))
    guide = FamilyGuide(model, "mean_scale", mlp(3, 4))
    x, draws = data(7), 4000
    q = encode(model, guide, x)
    expected = model.mean(q.mean).detach()
    weight = model.decoder.weight.detach()
    error = (q.variance @ weight.T.square() / draws).sqrt().detach()
    assert ((reconstruct(model, guide, x, num_samples=draws) - expected).abs() < 5 * error).all()
    holed = reconstruct(model, guide, holes(x), num_samples=3)
    assert torch.isfinite(holed).all()


def test_log_p_is_exact_where_the_guide_is():
    model, guide, covariance = exact_pair()
    x = holes(torch.randn(9, 4))
    found = log_prob(model, guide, x, num_samples=40)
    expected = [observed_only(row, torch.zeros(4), covariance) for row in x]
    assert np.allclose(found.log_likelihood, expected, atol=1e-8)
    assert np.allclose(found.log_likelihood_se, 0, atol=1e-6) and (found.khat == 0).all()
    assert found.log_likelihood.attrs["unit"] == "nats"


def test_global_latents_have_one_evidence():
    """y = w + noise, with the exact posterior: the evidence is that of all the data, exactly."""
    y = torch.tensor([1.0, 2.0, 0.5])

    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w, 0.5), obs=y)

    def guide(y):
        precision = 1 + 3 / 0.25
        pyro.sample("w", dist.Normal(3.5 / 0.25 / precision, precision**-0.5))

    covariance = torch.ones(3, 3) + 0.25 * torch.eye(3)
    expected = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(y)
    found = log_prob(model, guide, y, num_samples=10)
    assert found.log_likelihood.item() == pytest.approx(expected.item(), abs=1e-9)
    assert encode(model, guide, y).batch_shape == ()


@pytest.mark.parametrize("prior", [None, "learned", "conditional"])
def test_generated_data_have_the_moments_of_the_model(prior):
    """Of a linear model x is normal; means and variances within five standard errors."""
    context = 3 if prior == "conditional" else None
    made = None if prior is None else priors.Learned(2, context=context)
    model = VAE(nn.Linear(2 + (context or 0), 4), 2, likelihoods.Normal(0.5), made, context=context)
    label = torch.tensor([1])
    count = 20_000
    with traceless(model):
        x = generate(model, count, context=None if context is None else label, seed=1)
    fn = dist.Normal(torch.zeros(2), 1.0)
    if made is not None:
        fn = made() if context is None else made(torch.eye(3)[1:2])
    weight, bias = model.decoder.weight.detach(), model.decoder.bias.detach()
    mean, variance = fn.mean.detach().reshape(2), fn.variance.detach().reshape(2)
    center = weight[:, :2] @ mean + bias + (0 if context is None else weight[:, 2 + 1])
    spread = weight[:, :2].square() @ variance + 0.25
    assert ((x.mean(0) - center).abs() < 5 * (spread / count).sqrt()).all()
    assert ((x.var(0) / spread - 1).abs() < 5 * math.sqrt(2 / count)).all()
    assert torch.equal(x, generate(model, count, context=label if context else None, seed=1))


def test_generated_counts_under_an_exposure():
    model = VAE(mlp(2, out=1), 2, likelihoods.Poisson())
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.decoder[0].bias.fill_(math.log(3.0))
    exposure = torch.tensor([1.0, 100.0]).repeat(500)
    x = generate(model, exposure=exposure, num_samples=1000)
    assert abs(x[::2].mean() - 3) < 5 * math.sqrt(3 / 500)
    assert abs(x[1::2].mean() - 300) < 5 * math.sqrt(300 / 500)


def test_predictions_of_a_regression():
    """Draws of y for new rows: mean and variance of the weights' and the noise's, exactly known."""
    X, y, new = torch.randn(30, 2), torch.randn(30), torch.randn(4, 2)
    model = LinearRegression(2, noise=0.5)
    guide = FamilyGuide(model, families.full_rank)
    fit(model, guide, (X, y), progress=False)
    draws = 8000
    with traceless(model, guide):
        found = predict(model, guide, new, num_samples=draws)
    assert dict(found.sizes) == {"draw": draws, "datum": 4}
    fn = guide.heads["weight"](None)
    mean = (new @ fn.mean).detach().numpy()
    variance = (new @ fn.covariance_matrix @ new.T).diagonal().detach().numpy() + 0.25
    assert (abs(found.y.mean("draw") - mean) < 5 * np.sqrt(variance / draws)).all()
    assert (abs(found.y.var("draw") / variance - 1) < 5 * math.sqrt(2 / draws)).all()
    with pytest.raises(ValueError, match="^model: expected sites that are drawn .*are the data gi"):
        predict(model, guide, X, y)


def test_a_guide_that_was_not_fitted_is_not_set_up_by_a_prediction():
    model = LinearRegression(2)
    guide = FamilyGuide(model, families.full_rank)
    with pytest.raises(ValueError, match="^guide: expected one that was fitted"):
        predict(model, guide, torch.randn(4, 2))
    assert guide.blocks == ()


def test_predictions_of_a_program_by_hand():
    """One draw at a time, an event, and keyword arguments."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x * w, 0.1).to_event(1), obs=y)

    guide = FamilyGuide(model, families.mean_scale).setup(data(5), data(5))
    found = predict(model, guide, num_samples=6, kwargs={"x": data(4)})
    assert found.y.dims == ("draw", "datum", "y_dim_0") and found.y.shape == (6, 4, 3)


@pytest.mark.parametrize("family", ["mean_scale", "deterministic"])
def test_a_path_of_codes(family):
    model, guide = build(family)
    a, b = data(4), data(8)[4:]
    with traceless(model, guide):
        found = interpolate(model, guide, a, b, steps=5)
    codes = [encode(model, guide, x).mean for x in (a, b)]
    assert torch.allclose(found[0], model.mean(codes[0]).detach())
    assert torch.allclose(found[2], model.mean((codes[0] + codes[1]) / 2).detach())
    assert found.shape == (5, 4, 3)


def _two(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.stack([a, b, a + b], -1), 0.5).to_event(1), obs=x)


def test_of_several_latents_one_is_named():
    x = data(6)
    guide = FamilyGuide(_two, families.mean_scale, mlp(3, 4))
    guide.setup(x)
    assert encode(_two, guide, x, site="b").batch_shape == (6,)
    with pytest.raises(ValueError, match=r"^site: expected one of \['a', 'b'\], got None"):
        encode(_two, guide, x)
    joint = FamilyGuide(_two, families.full_rank, mlp(3, 4)).setup(x)
    with pytest.raises(ValueError, match="^guide: expected a guide that draws 'b' by itself"):
        encode(_two, joint, x, site="b")
    point = FamilyGuide(_two, families.deterministic, mlp(3, 4)).setup(x)
    assert encode(_two, point, x, site="b").mean.shape == (6,)


def _labelled():
    model = VAE(mlp(5, out=4), 2, likelihoods.Normal(0.5), context=3)
    return model, FamilyGuide(model, "mean_scale", Concatenate(mlp(7, 4), labels={1: 3}))


def test_a_context_goes_along():
    model, guide = _labelled()
    x, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    assert encode(model, guide, x, labels).batch_shape == (6,)
    assert reconstruct(model, guide, x, labels).shape == (6, 4)
    assert np.isfinite(log_prob(model, guide, x, labels, num_samples=30).log_likelihood).all()
    assert generate(model, context=labels).shape == (6, 4)
    assert generate(model, 9, context=2).shape == (9, 4)
    assert interpolate(model, guide, x[:3], x[3:], steps=3, context=labels[:3]).shape == (3, 3, 4)
    with pytest.raises(TypeError, match="^args: expected a tensor at 1, got list"):
        guide.encoder(x, ["a"] * 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, g: generate(m), ValueError, "^num_samples: expected how many data"),
        (lambda m, g: generate(m, 0), ValueError, "^num_samples: .* at least 1, got 0"),
        (
            lambda m, g: generate(_two, 3),
            TypeError,
            "^model: expected a VAE or a TwoLevelVAE, got func",
        ),
        (lambda m, g: generate(m, 3, context=1), ValueError, "^context: expected none, as the mod"),
        (
            lambda m, g: generate(_labelled()[0], 3),
            ValueError,
            "^context: expected one for a model",
        ),
        (
            lambda m, g: generate(_labelled()[0], 3, context=[1, 2]),
            ValueError,
            "^context: .* 3 rows",
        ),
        (lambda m, g: interpolate(m, g, data(3), data(2)), ValueError, "^end: expected as many"),
        (lambda m, g: interpolate(m, g, data(3), data(3), steps=1), ValueError, "^steps: "),
        (lambda m, g: interpolate(_two, g, data(3), data(3)), TypeError, "^model: expected one wi"),
        (lambda m, g: reconstruct(m, g, data(3), num_samples=0), ValueError, "^num_samples: "),
        (lambda m, g: reconstruct(m, g, data(3), site="y"), ValueError, "^site: expected one of"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(*build())
