"""The closed forms: against densities written out, each other, and numerical optimisation."""

import math

import pyro.distributions as dist
import pytest
import torch
from scipy import optimize

from ppvae import closed_form, families
from ppvae.regression import exact_posterior

NAMES = ["deterministic", "zero", "noise_only", "mean_only", "shared_scale", "mean_scale"]
NAMES.append("full_rank")
POINTS = ("deterministic", "zero")


def decoder():
    torch.manual_seed(0)
    W, b = torch.randn(5, 3), torch.randn(5)
    x = torch.randn(8, 3) @ W.T + b + 0.6 * torch.randn(8, 5)
    return x, W, b, 0.6


@pytest.mark.parametrize("name", NAMES)
def test_fixed_decoder_adds_up(name):
    """log p by the marginal covariance; the terms of q by torch's own KL and a quadratic form."""
    x, W, b, s = decoder()
    found = closed_form.fixed_decoder(x, W, b, s, families.LADDER[name])
    marginal = dist.MultivariateNormal(b, W @ W.T + s**2 * torch.eye(5))
    assert torch.allclose(found.log_likelihood, marginal.log_prob(x))
    assert torch.allclose(found.objective, -found.rate - found.distortion)
    prior = dist.MultivariateNormal(torch.zeros(3), torch.eye(3))
    fit = dist.Normal(found.mean @ W.T + b, s).log_prob(x).sum(-1)
    fit = fit - (W @ found.covariance @ W.T).trace() / (2 * s**2)
    assert torch.allclose(found.distortion, -fit)
    if name in POINTS:
        assert torch.allclose(found.rate, -prior.log_prob(found.mean))
    else:
        q = dist.MultivariateNormal(found.mean, found.covariance)
        assert torch.allclose(found.rate, torch.distributions.kl_divergence(q, prior))
        assert (found.gap > -1e-9).all()
    if name == "full_rank":
        assert found.gap.abs().max() < 1e-9


@pytest.mark.parametrize("name", ["mean_only", "shared_scale", "mean_scale", "full_rank"])
def test_fixed_decoder_is_a_maximum_within_its_family(name):
    """No small move inside the family raises the ELBO, written as a function of mean and S."""
    x, W, b, s = decoder()
    found = closed_form.fixed_decoder(x, W, b, s, families.LADDER[name])
    P = torch.eye(3) + W.T @ W / s**2
    m = torch.linalg.solve(P, W.T @ (x - b).T).T / s**2

    def gap(mean, S):
        away = mean - m
        return ((P @ S).trace() - 3 + ((away @ P) * away).sum(-1) - P.logdet() - S.logdet()) / 2

    best = gap(found.mean, found.covariance)
    assert torch.allclose(best, found.gap)
    for _ in range(20):
        mean = found.mean + 0.01 * torch.randn_like(found.mean)
        factor = torch.eye(3)
        if name == "shared_scale":
            factor = factor * (1 + 0.01 * torch.randn(()))
        elif name == "mean_scale":
            factor = torch.diag(1 + 0.01 * torch.randn(3))
        elif name == "full_rank":
            factor = factor + 0.01 * torch.randn(3, 3)
        assert (gap(mean, factor @ found.covariance @ factor.T) >= best - 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_regression_is_the_same_algebra(name):
    torch.manual_seed(0)
    X, y = torch.randn(20, 3) * torch.tensor([0.1, 1.0, 10.0]), torch.randn(20)
    found = closed_form.regression(X, y, 0.7, 0.5, families.LADDER[name])
    exact = exact_posterior(X, y, weight=dist.Normal(0.0, 0.5), noise=0.7)
    assert found.log_likelihood.item() == pytest.approx(exact.log_evidence, abs=1e-9)
    if name in ("deterministic", "full_rank"):
        assert torch.allclose(found.mean, torch.as_tensor(exact.mean))
    if name == "full_rank":
        assert torch.allclose(found.covariance, torch.as_tensor(exact.covariance))
    if name == "deterministic":  # ridge
        ridge = torch.linalg.solve(X.T @ X + 0.49 / 0.25 * torch.eye(3), X.T @ y)
        assert torch.allclose(found.mean, ridge)
        joint = dist.Normal(0.0, 0.5).log_prob(ridge).sum()
        assert torch.allclose(
            found.objective, joint + dist.Normal(X @ ridge, 0.7).log_prob(y).sum()
        )
    if name not in POINTS:
        assert found.gap > -1e-9


def learn(values, name, latent):
    """Minimises the negative ELBO over decoder gains and noise, by differences: no formula used.

    In the basis of the eigenvectors a linear decoder has gains a_i along d directions, and for
    given gains the best q is that of `fixed_decoder`.
    """
    # data with exactly these eigenvalues: plus and minus each axis, N = 2 D
    axes = torch.diag((values * len(values)).sqrt())
    x, zero = torch.cat([axes, -axes]), torch.zeros(len(values))

    def loss(place):
        W = torch.eye(len(values))[:, :latent] * torch.as_tensor(place[:latent])
        noise = math.exp(place[latent])
        found = closed_form.fixed_decoder(x, W, zero, noise, families.LADDER[name])
        return -found.objective.mean().item()

    start = [*values[:latent].sqrt().tolist(), -0.5]
    found = optimize.minimize(
        loss, start, method="Nelder-Mead", options={"fatol": 1e-13, "xatol": 1e-8}
    )
    return -found.fun, math.exp(found.x[latent]), x


@pytest.mark.parametrize("name", ["mean_only", "shared_scale", "mean_scale", "full_rank"])
@pytest.mark.parametrize("values", [[9.0, 4.0, 2.0, 0.5, 0.2], [3.0, 2.5, 0.4, 0.3, 0.3]])
def test_learned_decoder_is_what_optimisation_finds(name, values):
    best, noise, x = learn(torch.tensor(values), name, 2)
    found = closed_form.learned_decoder(x, 2, families.LADDER[name])
    assert found.objective == pytest.approx(best, abs=1e-6)
    assert found.noise == pytest.approx(noise, abs=1e-3)
    assert found.active == 2 and found.attained


def test_learned_decoder_is_probabilistic_pca():
    torch.manual_seed(0)
    x = torch.randn(40, 2) @ torch.randn(2, 6) + 0.3 * torch.randn(40, 6)
    found = closed_form.learned_decoder(x, 2, families.mean_scale)
    covariance = torch.cov(x.T, correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    W = vectors[:, -2:] * (values[-2:] - found.noise**2).sqrt()
    marginal = dist.MultivariateNormal(x.mean(0), W @ W.T + found.noise**2 * torch.eye(6))
    assert found.objective == pytest.approx(marginal.log_prob(x).mean().item(), abs=1e-9)
    exact = closed_form.fixed_decoder(x, W, x.mean(0), found.noise, families.full_rank)
    assert found.rate == pytest.approx(exact.rate.mean().item(), abs=1e-9)


def test_directions_below_the_noise_collapse():
    """Mean-only noise is larger: with unequal eigenvalues it keeps fewer directions."""
    x = torch.cat([a := torch.diag(torch.tensor([90.0, 1.0, 0.9, 0.8, 0.7]).sqrt()), -a])
    assert closed_form.learned_decoder(x, 2, families.mean_scale).active == 2
    assert closed_form.learned_decoder(x, 2, families.mean_only).active == 1
    noise_only = closed_form.learned_decoder(x, 2, families.noise_only)
    assert noise_only.active == 0 and noise_only.rate == 0
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    normal = dist.Normal(0.0, values.mean().sqrt())
    assert noise_only.objective == pytest.approx(normal.log_prob(x).sum(-1).mean().item(), abs=1e-9)


def test_a_point_has_a_supremum_and_no_optimum():
    """The penalised objective rises towards it as the decoder grows."""
    x = decoder()[0]
    found = closed_form.learned_decoder(x, 2, families.deterministic)
    assert not found.attained and math.isnan(found.rate)
    centred = x - x.mean(0)
    vectors = torch.linalg.svd(centred)[2][:2].T
    values = []
    for gain in (1e1, 1e2, 1e3, 1e4):
        values.append(
            closed_form.fixed_decoder(
                x, gain * vectors, x.mean(0), found.noise, families.deterministic
            ).objective.mean()
        )
    assert values == sorted(values) and values[-1].item() == pytest.approx(
        found.objective, abs=1e-3
    )
    assert values[-1] < found.objective


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, W, b, s: closed_form.fixed_decoder(x, W, b, 0.0, families.zero),
            "noise: .* 0.0",
        ),
        (
            lambda x, W, b, s: closed_form.fixed_decoder(x, W, b, s, families.flow),
            "family: .* flow",
        ),
        (lambda x, W, b, s: closed_form.learned_decoder(x, 5, families.mean_only), "1 to 4, got 5"),
        (lambda x, W, b, s: closed_form.learned_decoder(x, 2, families.student_t), "got student_t"),
        (
            lambda x, W, b, s: closed_form.regression(W, b, 1.0, -1.0, families.mean_only),
            "prior_scale: expected positive numbers, got 1.0 and -1.0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*decoder())
