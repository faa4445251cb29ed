"""The closed forms: against densities written out, each other, and numerical optimisation."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy import optimize

from ppvae import Family, closed_form, families
from ppvae.regression import exact_posterior

NAMES = ["deterministic", "zero", "noise_only", "mean_only", "shared_scale", "mean_scale"]
NAMES.append("full_rank")
POINTS = ("deterministic", "zero")
FREE = ("mean_only", "shared_scale", "mean_scale", "full_rank")
LOG_2PI = math.log(2 * math.pi)


def decoder():
    torch.manual_seed(0)
    W, b = torch.randn(5, 3), torch.randn(5)
    x = torch.randn(8, 3) @ W.T + b + 0.6 * torch.randn(8, 5)
    return x, W, b, 0.6


@pytest.mark.parametrize("name", [*NAMES, "mean_only_bounded"])
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


@pytest.mark.parametrize("name", FREE)
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


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_a_bounded_mean_solves_its_quadratic_programme(size, condition):
    """Against SciPy, and the conditions of a minimum, which hold nowhere else: P is definite."""
    torch.manual_seed(size)
    W = torch.randn(12, size) * torch.logspace(0, math.log10(condition) / 2, size)
    W[:, 0] += W.sum(1)  # correlated: clipping the free optimum is far from the best
    x = 3.0 * torch.randn(60, 12)
    free = closed_form.fixed_decoder(x, W, torch.zeros(12), 1.0, families.mean_only).mean
    found = closed_form.fixed_decoder(x, W, torch.zeros(12), 1.0, families.mean_only_bounded)
    P = torch.eye(size) + W.T @ W
    at_bound = found.mean.abs() == 1
    assert (found.mean.abs() <= 1).all() and 0 < at_bound.double().mean() < 1
    pull = (free - found.mean) @ P  # downhill
    noise = 1e-9 * P.abs().max() * free.abs().max()
    assert pull[~at_bound].abs().max() < noise
    assert (pull * found.mean)[at_bound].min() > -noise
    root = torch.linalg.cholesky(P).T.numpy()
    for row in range(10):
        target = root @ free[row].numpy()
        best = optimize.lsq_linear(root, target, (-1, 1), method="bvls", tol=1e-15, max_iter=500)
        assert np.abs(best.x - found.mean[row].numpy()).max() < 1e-7
    assert found.mutual_information.isnan()
    assert (
        found.objective
        <= closed_form.fixed_decoder(x, W, torch.zeros(12), 1.0, families.mean_only).objective
        + 1e-9
    ).all()


def test_families_of_your_own():
    """A scale or a mean that is fixed, or a mean on a half-line."""
    x, W, b, s = decoder()
    call = lambda family: closed_form.fixed_decoder(x, W, b, s, family)  # noqa: E731
    exact, P = call(families.full_rank), torch.eye(3) + W.T @ W / s**2
    half = call(Family(dist.Normal, scale=0.5))
    assert torch.equal(half.mean, call(families.mean_only).mean)
    assert torch.allclose(half.covariance, torch.eye(3) / 4)
    fixed = call(Family(dist.Normal, loc=0.2, scale=torch.tensor([0.1, 0.5, 2.0])))
    away = 0.2 - exact.mean
    gap = (P.diagonal() * torch.tensor([0.01, 0.25, 4.0])).sum() - 3 - 2 * math.log(0.1)
    gap = (gap + ((away @ P) * away).sum(-1) - P.logdet()) / 2
    assert torch.allclose(fixed.gap, gap) and fixed.mutual_information == 0
    scale = call(Family(dist.Normal, loc=0.0))
    assert torch.allclose(scale.covariance, torch.diag(1 / P.diagonal())) and not scale.mean.any()
    positive = call(Family(dist.Normal, loc=constraints.positive, scale=1.0)).mean
    assert (positive >= 0).all() and (positive == 0).any() and (positive > 1).any()
    for family in (Family(dist.Normal, loc=families.shared), Family(dist.Laplace), "mean_only"):
        with pytest.raises(ValueError, match="family: expected one with a closed form here"):
            call(family)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [3, 7])
def test_mutual_information_is_that_of_data_of_the_model(name, columns):
    """From data whose covariance is that of the model exactly: I = H(z) - H(z|x), all Gaussian."""
    torch.manual_seed(1)
    W, b, s = torch.randn(5, columns), torch.randn(5), 0.6
    root = torch.linalg.cholesky(W @ W.T + s**2 * torch.eye(5)) * 5**0.5
    x = b + torch.cat([root.T, -root.T])  # N = 10
    found = closed_form.fixed_decoder(x, W, b, s, families.LADDER[name])
    assert torch.allclose(torch.cov(x.T, correction=0), W @ W.T + s**2 * torch.eye(5))
    if name == "deterministic":
        assert found.mutual_information == math.inf
        alone = closed_form.fixed_decoder(x, 0 * W, b, s, families.deterministic)
        assert alone.mutual_information == 0  # all codes are zero
        return
    if name in ("zero", "noise_only"):
        assert found.mutual_information == 0
        return
    total = torch.cov(found.mean.T, correction=0) + found.covariance
    information = (total.logdet() - found.covariance.logdet()) / 2
    assert found.mutual_information.item() == pytest.approx(information.item(), abs=1e-9)
    aggregate = dist.MultivariateNormal(torch.zeros(columns), total)
    prior = dist.MultivariateNormal(torch.zeros(columns), torch.eye(columns))
    kl = torch.distributions.kl_divergence(aggregate, prior)  # what is left of the mean rate
    assert (found.rate.mean() - information).item() == pytest.approx(kl.item(), abs=1e-9)
    if name == "full_rank":
        marginal = (W @ W.T / s**2 + torch.eye(5)).logdet() / 2  # I(x; z) of the model
        assert information.item() == pytest.approx(marginal.item(), abs=1e-9)


def test_mutual_information_of_a_regression():
    """What the data tell of the weights: half the log of the volume that the posterior loses."""
    torch.manual_seed(0)
    X, y = torch.randn(20, 3), torch.randn(20)
    found = closed_form.regression(X, y, 0.7, 0.5, families.full_rank)
    lost = (torch.eye(3) / 4).logdet() - found.covariance.logdet()
    assert found.mutual_information.item() == pytest.approx(lost.item() / 2)


@pytest.mark.parametrize("name", [*NAMES, "mean_only_bounded"])
def test_single_precision_is_computed_in_double(name):
    x, W, b, s = (torch.as_tensor(v).float() for v in decoder())
    for call, args in (
        (closed_form.fixed_decoder, (x, W, b, s.item())),
        (closed_form.regression, (W, W.sum(1), 0.5, 2.0)),
    ):
        double = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
        for one, other in zip(
            call(*args, families.LADDER[name]), call(*double, families.LADDER[name]), strict=True
        ):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


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


def data_of(values):
    """Data of which the covariance has exactly these eigenvalues: plus and minus each axis."""
    axes = torch.diag((values * len(values)).sqrt())
    return torch.cat([axes, -axes]) + 0.3


def learn(values, name, latent):
    """Minimises the negative ELBO over decoder gains and noise, by differences: no formula used.

    In the basis of the eigenvectors a linear decoder has gains a_i along its directions, and for
    given gains the best q is that of `fixed_decoder`.
    """
    x, size = data_of(values), len(values)
    bias = torch.full((size,), 0.3)

    def loss(place):
        W = torch.zeros(size, latent)
        used = min(size, latent)
        W[:used, :used] = torch.diag(torch.as_tensor(place[:used]))
        found = closed_form.fixed_decoder(x, W, bias, math.exp(place[-1]), families.LADDER[name])
        return -found.objective.mean().item()

    start = [*(0.5 + values[:latent].sqrt()).tolist(), -0.5]
    best = None
    for _ in range(4):  # from where it stopped, until nothing changes
        best = optimize.minimize(
            loss,
            start if best is None else best.x,
            method="Nelder-Mead",
            options={"fatol": 1e-14, "xatol": 1e-9, "maxiter": 4000, "maxfev": 4000},
        )
    gains = np.sort(abs(best.x[:-1]))[::-1].copy()
    return -best.fun, math.exp(best.x[-1]), torch.as_tensor(gains), x


SPECTRA = {
    "apart": [9.0, 4.0, 2.0, 0.5, 0.2],
    "close": [3.0, 2.5, 0.4, 0.3, 0.3],
    "equal": [2.0, 2.0, 2.0, 2.0, 2.0],
    "ties": [9.0, 1.0, 1.0, 1.0, 1.0],
    "zeros": [4.0, 2.0, 1.0, 0.0, 0.0],
}


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize(
    ("spectrum", "latent"),
    [("apart", 2), ("close", 2), ("equal", 2), ("ties", 2), ("zeros", 2), ("apart", 4)],
)
def test_learned_decoder_is_what_optimisation_finds(name, spectrum, latent):
    values = torch.tensor(SPECTRA[spectrum])
    best, noise, gains, x = learn(values, name, latent)
    found = closed_form.learned_decoder(x, latent, families.LADDER[name])
    assert found.objective == pytest.approx(best, abs=1e-6)
    assert found.noise == pytest.approx(noise, abs=1e-3)
    assert torch.allclose(found.weight.norm(dim=0), gains, atol=1e-2)
    assert found.attained and found.active == (gains > 1e-2).sum()
    assert found.distortion == pytest.approx(-found.objective - found.rate)


@pytest.mark.parametrize("name", FREE)
def test_learned_decoder_pays_what_the_formulas_say(name):
    """Nats above the best at equal noise (the excess of design); rate and information by r."""
    values = torch.tensor(SPECTRA["apart"])
    found = closed_form.learned_decoder(data_of(values), 2, families.LADDER[name])
    r, D = values[:2].sqrt() / found.noise, 5
    best = D * (LOG_2PI + 2 * math.log(found.noise)) + 2 * r.log().sum() + 2
    best = -(best + values[2:].sum() / found.noise**2).item() / 2  # log p(x) of PCA's directions
    pays = {
        "mean_only": (r - 1 - r.log()).sum(),
        "shared_scale": 2 * r.mean().log() - r.log().sum(),
    }.get(name, torch.zeros(()))
    assert best - found.objective == pytest.approx(pays.item(), abs=1e-9)
    assert found.objective == pytest.approx(found.log_likelihood - found.gap)
    assert found.gap == pytest.approx(pays.item() / 2, abs=1e-9)  # the decoder loses the rest
    information = {"mean_only": r.log().sum() / 2}.get(name, found.rate)
    if name != "shared_scale":
        assert found.mutual_information == pytest.approx(float(information), abs=1e-9)
    assert -1e-9 < found.mutual_information <= found.rate + 1e-9
    squares = {"mean_only": r - 1, "shared_scale": r * r.mean() - 1}.get(name, r**2 - 1)
    assert torch.allclose(found.weight.square().sum(0), squares * found.noise**2)


@pytest.mark.parametrize("latent", [5, 7])
def test_as_many_latents_as_features(latent):
    """`mean_only` by optimisation; the others reach the likelihood of a free covariance."""
    values = torch.tensor(SPECTRA["apart"])
    x = data_of(values)
    for name in ("noise_only", "mean_only"):
        best, noise, _, _ = learn(values, name, latent)
        found = closed_form.learned_decoder(x, latent, families.LADDER[name])
        assert found.objective == pytest.approx(best, abs=1e-6)
        assert found.noise == pytest.approx(noise, abs=1e-3)
        assert found.weight.shape == (5, latent)
    free = dist.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0)).log_prob(x).mean()
    for name in ("mean_scale", "full_rank"):
        found = closed_form.learned_decoder(x, latent, families.LADDER[name])
        assert found.objective == pytest.approx(free.item(), abs=1e-9) and found.attained
    if latent == 5:
        found = closed_form.learned_decoder(x, 5, families.shared_scale)
        assert found.objective == pytest.approx(learn(values, "shared_scale", 5)[0], abs=1e-6)
    found = closed_form.learned_decoder(x, latent, families.deterministic)
    assert found.objective == math.inf and not found.attained


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 6), (4, 6), (3, 40)])
def test_data_in_a_subspace_leave_no_noise(dtype, shape):
    """Rank two at most, and rounded: no optimum, but where q has a noise of its own."""
    torch.manual_seed(0)
    x = (torch.randn(shape[0], 2) @ torch.randn(2, shape[1])).to(dtype) + 1
    for name in ("shared_scale", "mean_scale", "full_rank", "deterministic"):
        found = closed_form.learned_decoder(x, 2, families.LADDER[name])
        assert found.objective == math.inf and not found.attained and found.noise == 0
        fewer = closed_form.learned_decoder(x, 1, families.LADDER[name])
        assert math.isfinite(fewer.objective)
    assert closed_form.learned_decoder(x, 2, families.mean_scale).active == 2
    for name in ("mean_only", "noise_only", "zero"):
        found = closed_form.learned_decoder(x, 2, families.LADDER[name])
        assert found.attained and math.isfinite(found.objective) and found.noise > 0
    for name in NAMES:
        found = closed_form.learned_decoder(x[:1].expand(3, -1), 2, families.LADDER[name])
        assert found.objective == math.inf and not found.attained


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
    assert not found.attained and found.weight.isnan().all()
    assert found.mutual_information == math.inf and found.log_likelihood == -math.inf
    assert found.rate == pytest.approx(LOG_2PI)  # of two codes that are almost zero
    centred = x - x.mean(0)
    vectors = torch.linalg.svd(centred)[2][:2].T
    values = []
    for gain in (1e1, 1e2, 1e3, 1e4):
        grown = closed_form.fixed_decoder(
            x, gain * vectors, x.mean(0), found.noise, families.deterministic
        )
        values.append(grown.objective.mean())
    assert values == sorted(values) and values[-1].item() == pytest.approx(
        found.objective, abs=1e-3
    )
    assert grown.rate.mean().item() == pytest.approx(found.rate, abs=1e-3)
    assert values[-1] < found.objective


def test_zero_is_noise_only_with_the_penalty_of_a_point():
    x = decoder()[0]
    zero, noise_only = (
        closed_form.learned_decoder(x, 2, families.LADDER[name]) for name in ("zero", "noise_only")
    )
    assert zero.attained and zero.rate == pytest.approx(LOG_2PI)
    assert zero.objective == pytest.approx(noise_only.objective - LOG_2PI)
    assert zero.noise == noise_only.noise and zero.mutual_information == 0


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
        (lambda x, W, b, s: closed_form.learned_decoder(x, 0, families.mean_only), "1 to 5.*got 0"),
        (
            lambda x, W, b, s: closed_form.learned_decoder(x, 6, families.shared_scale),
            "latent: expected 1 to 5 for this family, got 6",
        ),
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
