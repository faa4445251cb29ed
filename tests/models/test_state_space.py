"""The deep Markov model, against a Kalman filter where it is linear and Gaussian."""

import copy
import math
from typing import NamedTuple

import pyro.distributions as dist
import pytest
import torch
from cases import LONG
from torch import nn

from ppvae import (
    Block,
    FamilyGuide,
    annealed_importance,
    evaluate,
    families,
    fit,
    from_pyro_svi,
    impute,
    likelihoods,
    models,
    priors,
    reading,
    simulate,
    stage,
)
from ppvae._scopes import private_modules
from ppvae.families import GuideFamily
from ppvae.nn import conv_decoder, mlp
from ppvae.objectives import ELBO
from ppvae.objectives.trace_terms import terms
from ppvae.programs.tracing import draws_plate, trace_pair

STEPS, N, SD = 6, 12, 0.5
LENGTHS = torch.tensor([6, 1, 4, 3, 2, 6, 5, 1, 6, 4, 2, 3])
QUIET = {"progress": False}


class System(NamedTuple):
    """z_t = A z_{t-1} + noise of covariance Q, which z_0 has too; x_t = C z_t + noise of sd SD."""

    A: torch.Tensor
    Q: torch.Tensor
    C: torch.Tensor


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


ONE = System(double([0.9]), double([0.3]), double([1.0], [-0.5]))
TWO = System(
    double([0.9, 0.3], [-0.2, 0.8]),
    double([0.3, 0.1], [0.1, 0.2]),
    double([1.0, 0.0], [0.5, -1.0], [0.2, 0.7]),
)


class Linear(nn.Module):
    """The transition of a system."""

    def __init__(self, system):
        super().__init__()
        self.system = system

    def forward(self, z):
        return dist.MultivariateNormal(z @ self.system.A.T, self.system.Q)


def model_of(system):
    latent = len(system.A)
    decoder = nn.Linear(latent, len(system.C), bias=False)
    decoder.weight = nn.Parameter(system.C.clone(), requires_grad=False)
    prior = dist.MultivariateNormal(torch.zeros(latent), system.Q)
    parts = Linear(system), latent, likelihoods.Normal(SD), prior
    return models.DeepMarkov(decoder, *parts)


def data_of(system, steps=STEPS, size=N):
    torch.manual_seed(2)
    with private_modules():
        return model_of(system)(steps=steps, size=size).detach()


def kalman(system, x, lengths=None):
    """Log p(x) of each sequence by prediction and update; NaN, and what is behind an end, is not.

    And mean and covariance of each state given the data so far.
    """
    A, Q, C = system
    counts = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
    totals = []
    for row, count in zip(x, counts, strict=True):
        mean, cov, total = torch.zeros(len(A)), Q, torch.zeros(())
        for t in range(count):
            if t:
                mean, cov = A @ mean, A @ cov @ A.T + Q
            seen = ~row[t].isnan()
            c, value = C[seen], row[t][seen]
            if len(value):
                spread = c @ cov @ c.T + SD**2 * torch.eye(len(c))
                total = total + dist.MultivariateNormal(c @ mean, spread).log_prob(value)
                gain = cov @ c.T @ torch.linalg.inv(spread)
                mean, cov = mean + gain @ (value - c @ mean), cov - gain @ c @ cov
        totals.append(total)
    return torch.stack(totals)


class Ahead(nn.Module):
    """What the data from each step on say of its state: exp(h z - J z^2 / 2), by recursion back."""

    def forward(self, x, lengths=None):
        (a,), (q,), c = ONE.A[0], ONE.Q[0], ONE.C[:, 0]
        J, h, rows = torch.zeros(len(x)), torch.zeros(len(x)), []
        for t in reversed(range(x.shape[1])):
            J, h = a**2 * J / (1 + q * J), a * h / (1 + q * J)
            J, h = J + c @ c / SD**2, h + x[:, t] @ c / SD**2
            if lengths is not None:
                J, h = J * (t < lengths), h * (t < lengths)
            rows.append(torch.stack([J, h], -1))
        return torch.stack(rows[::-1], 1)


class Smoother(GuideFamily):
    """q(z_t | z_{t-1}, x) of the system ONE, from what is ahead; no parameters."""

    channels, joint, name, support = ("loc", "scale"), False, "smoother", dist.constraints.real

    def head(self, features, shape):
        return SmootherHead()


class SmootherHead(nn.Module):
    def forward(self, features):
        J, h, before = features.split(1, -1)
        precision = 1 / ONE.Q[0] + J
        return dist.Normal((ONE.A[0] * before / ONE.Q[0] + h) / precision, precision**-0.5)


def chain(family):
    return {"z_*": Block(family, given="previous")}


def log_weights(model, guide, *args, draws=None):
    with private_modules(), torch.no_grad():
        plate = None if draws is None else draws_plate(model, *args, draws=draws)
        return terms(*trace_pair(model, guide, *args, draws=plate)).log_weight


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_with_the_smoother_as_its_guide_every_draw_gives_log_p(lengths):
    """Since q is the posterior; what stands behind the ends changes nothing."""
    model, x = model_of(ONE), data_of(ONE)
    guide = FamilyGuide(model, chain(Smoother()), Ahead())
    args, expected = (x,) if lengths is None else (x, lengths), kalman(ONE, x, lengths)
    for draws, shape in ((None, (N,)), (4, (4, N))):
        found = log_weights(model, guide, *args, draws=draws)
        assert found.shape == shape
        assert torch.allclose(found, expected.expand(shape), rtol=1e-12, atol=1e-12)
    if lengths is not None:
        behind = torch.arange(STEPS) >= lengths[:, None]
        other = torch.where(behind[..., None], 1e3, x)
        assert torch.allclose(log_weights(model, guide, other, lengths), expected, rtol=1e-12)
    for vectorized in (True, False):
        found = evaluate(model, guide, *args, num_samples=3, vectorized=vectorized, **QUIET)
        assert torch.allclose(torch.tensor(found.log_likelihood.values), expected, rtol=1e-12)
        assert found.mutual_information.isnull() == (lengths is not None)
        assert ("There is no I(x; z)" in reading(found)) == (lengths is not None)
    if lengths is None:  # with ends it is tried below
        return
    annealed = annealed_importance(model, guide, *args, num_temperatures=3, num_chains=2, **QUIET)
    assert torch.allclose(torch.tensor(annealed.log_likelihood.values), expected, rtol=1e-9)


#: without lengths and gaps, and with both; with either alone only where there is time
SEEN = [(None, False), (LENGTHS, True)] + [(None, True), (LENGTHS, False)] * LONG


@pytest.mark.parametrize(("lengths", "gaps"), SEEN)
def test_log_p_of_a_fitted_chain_is_that_of_the_kalman_filter(lengths, gaps):
    """The error of the log of a mean of K weights is the relative error of that mean, which is
    sqrt(1 / ess - 1 / K), and its bias half the square of that.
    """
    model, x = model_of(TWO), data_of(TWO)
    if gaps:
        x[::3, 0, 1] = x[0, 4] = math.nan
    args, expected = (x,) if lengths is None else (x, lengths), kalman(TWO, x, lengths).numpy()
    torch.manual_seed(0)
    guide = FamilyGuide(model, chain("mean_scale"), Backward(3))
    fit(model, guide, args, num_epochs=200, learning_rate=2e-2, seed=0, **QUIET)
    found = evaluate(model, guide, *args, num_samples=5_000, **QUIET)
    error = (1 / found.ess.values - 1 / 5_000) ** 0.5
    assert (error < 0.1).all()
    assert (abs(found.log_likelihood.values - expected) < 5 * error + error**2).all()
    assert found.elbo.mean() < expected.mean()


def test_a_fitted_chain_with_a_head_for_each_step_reaches_log_p():
    """Such guides contain the posterior of sequences of one length."""
    model, x = model_of(ONE), data_of(ONE, steps=3, size=64)
    by_site = {f"z_{t}": Block("mean_scale", given=f"z_{t - 1}" if t else ()) for t in range(3)}
    torch.manual_seed(0)
    guide = FamilyGuide(model, by_site, nn.Flatten())
    for rate in (0.05, 0.01, 0.001):
        fit(model, guide, x, num_epochs=120, learning_rate=rate, seed=0, **QUIET)
    draws = log_weights(model, guide, x, draws=500).mean(-1)
    gap, error = draws.mean() - kalman(ONE, x).mean(), draws.std() / 500**0.5
    assert -0.005 < gap < 5 * error and error < 0.001


def test_a_joint_draw_of_states_that_some_sequences_have_not_is_refused():
    """Steps without data are no harm: then the states behind an end are there, and unobserved."""
    model, x, lengths = model_of(ONE), data_of(ONE, steps=4), LENGTHS.clamp(max=4)
    guide = FamilyGuide(model, families.Banded(1), Flat())
    with pytest.raises(ValueError, match="guide: expected latents drawn one by one where the mode"):
        evaluate(model, guide, x, lengths, **QUIET)
    behind = torch.arange(4) >= lengths[:, None]
    with_gaps = torch.where(behind[..., None], math.nan, x)
    found = annealed_importance(model, guide, with_gaps, num_temperatures=80, seed=0, **QUIET)
    whole = FamilyGuide(model, chain(Smoother()), Ahead())
    alike = evaluate(model, whole, x, lengths, num_samples=2, **QUIET).log_likelihood.values
    error = (1 / found.ess.values - 1 / found.num_chains) ** 0.5
    assert error.max() < 0.3
    away = found.log_likelihood.values - alike
    assert (abs(away) < 5 * error + error**2).all()
    assert abs(away.mean()) < 5 * (error**2).sum() ** 0.5 / N + (error**2).mean()


class Backward(nn.Module):
    """Features of the steps by a recurrent network that reads them from the last to the first."""

    takes_missing = True

    def __init__(self, width):
        super().__init__()
        self.net = nn.GRU(2 * width, 16, batch_first=True)

    def forward(self, x, lengths=None):
        x = torch.cat([x.nan_to_num(0.0), x.isnan().to(x.dtype)], -1)
        if lengths is not None:
            x = torch.where((torch.arange(x.shape[1]) < lengths[:, None])[..., None], x, 0.0)
        return torch.cat([self.net(x.flip(1))[0].flip(1), x], -1)


def small(**parts):
    """Counts of two kinds, and a transition by a network."""
    told = {"decoder": mlp(2, 8, out=3), "latent": 2, "likelihood": likelihoods.Poisson()}
    told |= {"transition": priors.Learned(2, context=2, network=mlp(2, 8))}
    return models.DeepMarkov(**(told | parts))


@pytest.mark.parametrize("lengths", [LENGTHS, *[None] * LONG])
def test_all_that_is_done_with_a_pair(lengths):
    torch.manual_seed(0)
    model = small()
    with private_modules():
        x = model(steps=STEPS, size=N)
    assert x.shape == (N, STEPS, 3) and model.mean(torch.zeros(4, 5, 2)).shape == (4, 5, 3)
    args = (x,) if lengths is None else (x, lengths)
    guide = FamilyGuide(model, chain("mean_scale"), Backward(3))
    result = fit(model, guide, args, num_epochs=2, batch_size=5, seed=0, **QUIET)
    assert all(map(math.isfinite, result.losses)) and len(result.losses) == 2
    loss = stage(model, guide, *args)
    few = [arg[:4] for arg in args]
    with private_modules():
        torch.manual_seed(5)
        staged = loss(*few)
        torch.manual_seed(5)
        assert torch.allclose(staged, ELBO()(model, guide, *few), rtol=1e-9)
    tree = from_pyro_svi(model, guide, *args, num_samples=7)
    assert tree["posterior/z_0"].shape == (1, 7, N, 2)
    assert tree["log_likelihood/x"].shape == (1, 7, N)
    drawn = simulate(model, *args, seed=0)
    assert drawn.args[0].shape == x.shape and drawn.latents["z_5"].shape == (N, 2)
    gaps = x.clone()
    gaps[0, 0, 1] = math.nan
    filled = impute(model, guide, gaps, *args[1:], num_samples=50)
    assert filled.missing.sum() == 1 and filled.value[0, 0, 1] > 0
    other = small()
    other.load_state_dict(copy.deepcopy(model).state_dict())
    torch.manual_seed(3)
    found = log_weights(other, guide, *args)
    torch.manual_seed(3)
    assert torch.equal(found, log_weights(model, guide, *args))


def test_steps_of_images_and_a_mask_of_each():
    """The likelihood of a sequence is the sum over its own steps of that of the images."""
    shape = (1, 4, 4)
    model = small(decoder=conv_decoder(2, shape, 4), likelihood=likelihoods.Bernoulli())
    with private_modules():
        x = model(steps=3, size=2)
        lengths = torch.tensor([3, 1])
        guide = FamilyGuide(model, chain("mean_scale"), Images())
        trace, _ = trace_pair(model, guide, x, lengths)
    z = torch.stack([trace.nodes[f"z_{t}"]["value"] for t in range(3)], 1)
    steps = dist.Bernoulli(logits=model.decode(z)).log_prob(x).sum((-3, -2, -1))
    trace.compute_log_prob()
    expected = torch.stack([steps[0].sum(), steps[1, 0]])
    assert torch.allclose(trace.nodes["x"]["log_prob"], expected)


class Images(nn.Module):
    def forward(self, x, lengths):
        return x.flatten(2)


class Flat(nn.Module):
    def forward(self, x, lengths=None):
        return x.flatten(1)


class Scalar(nn.Module):
    def forward(self, z):
        return dist.Normal(z, 1.0)


X = torch.zeros(2, 4, 3)
BAD = [
    (lambda: small(transition=None), TypeError, "transition: expected a torch.nn.Module"),
    (lambda: small(transition=nn.Identity()), TypeError, "transition: expected a module that ret"),
    (lambda: small(transition=Scalar()), ValueError, r"transition: expected event shape \(2,\)"),
    (lambda: small(transition=mlp(3, 2)), ValueError, r"transition: .* takes shape \(1, 2\)"),
    (lambda: small(latent=0), ValueError, "latent: .* got 0"),
    (lambda: small()(), ValueError, "x: expected sequences, or `steps` without, got None"),
    (lambda: small()(X[0]), ValueError, r"x: expected shape \(batch, steps, 3\).* got \(4, 3\)"),
    (lambda: small()([1]), TypeError, "x: expected a tensor, got list"),
    (lambda: small()(X, [4, 4]), TypeError, "lengths: expected a dense tensor of whole numb"),
    (lambda: small()(X, torch.ones(3)), ValueError, r"lengths: expected shape \(2,\)"),
    (lambda: small()(X, torch.tensor([5, 1])), ValueError, "from 1 to 4, got 5 in row 0"),
    (lambda: small()(X, torch.tensor([4, 0])), ValueError, "from 1 to 4, got 0 in row 1"),
    (lambda: small()(None, torch.ones(2)), ValueError, "lengths: expected none without x"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with private_modules(), pytest.raises(error, match=message):
        call()
