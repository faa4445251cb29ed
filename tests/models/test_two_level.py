"""Two layers of latents, against the marginal that is known where all is linear and Gaussian."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppvae import (
    Block,
    FamilyGuide,
    annealed_importance,
    encode,
    evaluate,
    fit,
    from_pyro_svi,
    generate,
    impute,
    likelihoods,
    models,
    priors,
    simulate,
    stage,
)
from ppvae._scopes import private_modules
from ppvae.nn import conv_decoder, mlp
from ppvae.objectives import ELBO
from ppvae.objectives.trace_terms import terms
from ppvae.programs.tracing import draws_plate, trace_pair

N, SD = 40, 0.5
QUIET = {"progress": False}


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


B = double([0.9, 0.3], [-0.2, 0.8], [0.5, -1.0])  # z_bottom = B z_top + noise
Q = double([0.5, 0.1, 0.0], [0.1, 0.4, -0.1], [0.0, -0.1, 0.3])  # of this covariance
C = double([1.0, 0.0, 0.3], [0.5, -1.0, 0.0], [0.2, 0.7, 1.0], [0.0, 0.4, -0.6])  # x = C z_bottom


class Linear(nn.Module):
    """From the top to the bottom."""

    def forward(self, top):
        return dist.MultivariateNormal(top @ B.T, Q)


def linear_model():
    decoder = nn.Linear(3, 4, bias=False)
    decoder.weight = nn.Parameter(C.clone(), requires_grad=False)
    model = models.TwoLevelVAE(decoder, Linear(), (2, 3), likelihoods.Normal(SD))
    torch.manual_seed(1)
    with private_modules():
        return model, model(size=N).detach()


def log_evidence(x):
    covariance = C @ (B @ B.T + Q) @ C.T + SD**2 * torch.eye(4)
    return dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x)


def put(head, weight, covariance):
    """Makes a head of `full_rank` a linear function with a constant covariance."""
    size = len(covariance)
    rows, columns = torch.tril_indices(size, size)
    tril = torch.linalg.cholesky(covariance)
    raw = tril.tril(-1) + tril.diagonal().log().diag()
    with torch.no_grad():
        head.loc.linear.weight.copy_(weight)
        head.loc.linear.bias.zero_()
        head.scale_tril.linear.weight.zero_()
        head.scale_tril.linear.bias.copy_(raw[rows, columns])


def exact_guide(model, first):
    """The posterior, drawn from the top down (`first="z_top"`) or from the bottom up."""
    joint = torch.zeros(9, 9)  # covariance of z_top, z_bottom and x
    joint[:2, :2], joint[2:5, :2], joint[2:5, 2:5] = torch.eye(2), B, B @ B.T + Q
    joint[5:, :2], joint[5:, 2:5] = C @ B, C @ joint[2:5, 2:5]
    joint[5:, 5:] = C @ joint[2:5, 2:5] @ C.T + SD**2 * torch.eye(4)
    joint = joint.tril() + joint.tril(-1).T
    top, bottom, x = range(2), range(2, 5), range(5, 9)
    here, then = (top, bottom) if first == "z_top" else (bottom, top)
    second = {"z_top": "z_bottom", "z_bottom": "z_top"}[first]
    by_site = {first: "full_rank", second: Block("full_rank", given=[first])}
    guide = FamilyGuide(model, by_site, nn.Identity())
    for name, of, given in ((first, here, x), (second, then, [*x, *here])):
        cross, inner = joint[[*of]][:, [*given]], joint[[*given]][:, [*given]]
        weight = torch.linalg.solve(inner, cross.T).T
        put(guide.heads[name], weight, joint[[*of]][:, [*of]] - weight @ cross.T)
    return guide


def log_weights(model, guide, *args, draws=None):
    with private_modules(), torch.no_grad():
        plate = None if draws is None else draws_plate(model, *args, draws=draws)
        return terms(*trace_pair(model, guide, *args, draws=plate)).log_weight


@pytest.mark.parametrize("first", ["z_top", "z_bottom"])
def test_with_the_posterior_as_its_guide_every_draw_gives_log_p(first):
    model, x = linear_model()
    guide, expected = exact_guide(model, first), log_evidence(x)
    for draws, shape in ((None, (N,)), (4, (4, N))):
        found = log_weights(model, guide, x, draws=draws)
        assert torch.allclose(found, expected.expand(shape), rtol=1e-10)
    for vectorized in (True, False):
        found = evaluate(model, guide, x, num_samples=3, vectorized=vectorized, **QUIET)
        assert torch.allclose(torch.tensor(found.log_likelihood.values), expected, rtol=1e-10)


def test_a_fitted_guide_reaches_log_p_and_log_p_is_found_without_one():
    model, x = linear_model()
    by_site = {"z_top": "full_rank", "z_bottom": Block("full_rank", given=["z_top"])}
    torch.manual_seed(0)
    guide = FamilyGuide(model, by_site, nn.Identity())
    for rate in (0.05, 0.01, 0.001):
        fit(model, guide, x, num_epochs=120, learning_rate=rate, seed=0, **QUIET)
    draws = log_weights(model, guide, x, draws=500).mean(-1)
    gap, error = draws.mean() - log_evidence(x).mean(), draws.std() / 500**0.5
    assert -0.02 < gap < 5 * error and error < 0.002
    told = {"num_temperatures": 100, "num_chains": 50, "start": "prior", "seed": 0}
    found = annealed_importance(model, None, x, **told, **QUIET)
    error = (1 / found.ess.values - 1 / 50) ** 0.5
    away = found.log_likelihood.values - log_evidence(x).numpy()
    assert (abs(away) < 5 * error + error**2).all() and error.max() < 0.3
    # of their mean, which sees what is the same for all
    assert abs(away.mean()) < 5 * (error**2).sum() ** 0.5 / N + (error**2).mean()


def small(**parts):
    told = {"decoder": mlp(3, 8, out=4), "latent": (2, 3), "likelihood": likelihoods.Poisson()}
    told |= {"between": priors.Learned(3, context=2, network=mlp(2, 8))}
    return models.TwoLevelVAE(**(told | parts))


def test_all_that_is_done_with_a_pair():
    torch.manual_seed(0)
    model = small()
    with private_modules():
        x = model(size=N)
    assert x.shape == (N, 4) and model.mean(torch.zeros(6, 5, 3)).shape == (6, 5, 4)
    by_site = {"z_top": "mean_scale", "z_bottom": Block("mean_scale", given=["z_top"])}
    guide = FamilyGuide(model, by_site, mlp(4, 8))
    assert set(guide.heads) == {"z_top", "z_bottom"}  # the example tells the shapes
    result = fit(model, guide, x, num_epochs=2, batch_size=16, seed=0, **QUIET)
    assert all(map(math.isfinite, result.losses)) and len(result.losses) == 2
    loss = stage(model, guide, x)
    with private_modules():
        torch.manual_seed(5)
        staged = loss(x[:7])
        torch.manual_seed(5)
        assert torch.allclose(staged, ELBO()(model, guide, x[:7]), rtol=1e-9)
    tree = from_pyro_svi(model, guide, x, num_samples=7)
    assert tree["posterior/z_top"].shape == (1, 7, N, 2)
    assert torch.equal(generate(model, 5, seed=0), generate(model, 5, seed=0))
    drawn = simulate(model, x, seed=0)
    assert drawn.args[0].shape == x.shape and drawn.latents["z_bottom"].shape == (N, 3)
    gaps = x.clone()
    gaps[0, 1] = math.nan
    assert impute(model, guide, gaps, num_samples=50).value[0, 1] > 0
    assert encode(model, guide, x, site="z_bottom").mean.shape == (N, 3)
    other = small()
    other.load_state_dict(copy.deepcopy(model).state_dict())
    torch.manual_seed(3)
    found = log_weights(other, guide, x)
    torch.manual_seed(3)
    assert torch.equal(found, log_weights(model, guide, x))
    with pytest.raises(ValueError, match="likelihood: expected a state of"):
        small(likelihood=likelihoods.Bernoulli()).load_state_dict(model.state_dict())


def test_images_come_as_they_are():
    model = small(decoder=conv_decoder(3, (1, 4, 4), 4), likelihood=likelihoods.Bernoulli())
    assert model.example()[0].shape == (1, 1, 4, 4)
    with private_modules():
        assert model(size=3).shape == (3, 1, 4, 4)


X = torch.zeros(2, 4)
BAD = [
    (lambda: small(between=None), TypeError, "between: expected a torch.nn.Module"),
    (lambda: small(between=priors.Learned(2, context=2)), ValueError, r"between: .* shape \(3,\)"),
    (lambda: small(latent=3), ValueError, "latent: expected the lengths of the top and of the b"),
    (lambda: small(latent=(2, 0)), ValueError, "latent: .* got 0"),
    (lambda: small(latent=(2, 5)), ValueError, "between: expected event shape"),
    (lambda: small(prior=dist.Normal(0.0, 1.0)), ValueError, "prior: "),
    (lambda: small()([1]), TypeError, "x: expected a tensor"),
    (lambda: small()(X[:, :3]), ValueError, "decoder: expected output of shape"),
    (lambda: small()(X[:0]), ValueError, "x: expected at least one datum"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with private_modules(), pytest.raises(error, match=message):
        call()
