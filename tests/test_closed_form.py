"""The closed forms: against densities written out, each other, and numerical optimisation."""

import copy
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy import optimize

from ppvae import Family, closed_form, families
from ppvae.regression import exact_posterior

POINTS = ("deterministic", "zero")
FREE = ("mean_only", "shared_scale", "mean_scale", "full_rank")
NAMES = [*POINTS, "noise_only", *FREE]
LADDER, LOG_2PI = families.LADDER, math.log(2 * math.pi)


def decoder():
    torch.manual_seed(0)
    W, b = torch.randn(5, 3), torch.randn(5)
    x = torch.randn(8, 3) @ W.T + b + 0.6 * torch.randn(8, 5)
    return x, W, b, 0.6


def fixed(family, **changed):
    """The optimum for the data and the decoder above, or for others."""
    given = dict(zip(("x", "weight", "bias", "noise"), decoder(), strict=True)) | changed
    return closed_form.fixed_decoder(**given, family=LADDER.get(family, family))


def learned(family, x=None, latent=2):
    x = decoder()[0] if x is None else x
    return closed_form.learned_decoder(x, latent, LADDER.get(family, family))


@pytest.mark.parametrize("name", [*NAMES, "mean_only_bounded"])
def test_fixed_decoder_adds_up(name):
    """log p by the marginal covariance; the terms of q by torch's own KL and a quadratic form."""
    x, W, b, s = decoder()
    found = fixed(name)
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
    found = fixed(name)
    P = torch.eye(3) + W.T @ W / s**2
    m = torch.linalg.solve(P, W.T @ (x - b).T).T / s**2

    def gap(mean, S):
        away = mean - m
        return ((P @ S).trace() - 3 + ((away @ P) * away).sum(-1) - P.logdet() - S.logdet()) / 2

    best = gap(found.mean, found.covariance)
    assert torch.allclose(best, found.gap)
    for _ in range(20):
        mean = found.mean + 0.01 * torch.randn_like(found.mean)
        moves = {
            "mean_only": torch.zeros(3, 3),
            "shared_scale": torch.randn(()) * torch.eye(3),
            "mean_scale": torch.diag(torch.randn(3)),
            "full_rank": torch.randn(3, 3),
        }
        factor = torch.eye(3) + 0.01 * moves[name]
        assert (gap(mean, factor @ found.covariance @ factor.T) >= best - 1e-12).all()


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_a_bounded_mean_solves_its_quadratic_programme(size, condition):
    """Against SciPy, and the conditions of a minimum, which hold nowhere else: P is definite."""
    torch.manual_seed(size)
    W = torch.randn(12, size) * torch.logspace(0, math.log10(condition) / 2, size)
    W[:, 0] += W.sum(1)  # correlated: clipping the free optimum is far from the best
    x, zero = 3.0 * torch.randn(60, 12), torch.zeros(12)
    names = ("mean_only", "mean_only_bounded")
    free, found = (closed_form.fixed_decoder(x, W, zero, 1.0, LADDER[name]) for name in names)
    P = torch.eye(size) + W.T @ W
    at_bound = found.mean.abs() == 1
    assert (found.mean.abs() <= 1).all() and 0 < at_bound.double().mean() < 1
    pull = (free.mean - found.mean) @ P  # downhill
    noise = 1e-9 * P.abs().max() * free.mean.abs().max()
    assert pull[~at_bound].abs().max() < noise
    assert (pull * found.mean)[at_bound].min() > -noise
    root = torch.linalg.cholesky(P).T.numpy()
    for row in range(10):
        target = root @ free.mean[row].numpy()
        best = optimize.lsq_linear(root, target, (-1, 1), method="bvls", tol=1e-15, max_iter=500)
        assert np.abs(best.x - found.mean[row].numpy()).max() < 1e-7
    assert found.mutual_information.isnan()
    assert (found.objective <= free.objective + 1e-9).all()


def test_families_of_your_own():
    """A scale or a mean that is fixed, or a mean on a half-line; copies, and other starts."""
    W, s = decoder()[1], 0.6
    exact, P = fixed("full_rank"), torch.eye(3) + W.T @ W / s**2
    half = fixed(Family(dist.Normal, scale=0.5))
    assert torch.equal(half.mean, fixed("mean_only").mean)
    assert torch.allclose(half.covariance, torch.eye(3) / 4)
    known = fixed(Family(dist.Normal, loc=0.2, scale=torch.tensor([0.1, 0.5, 2.0])))
    away = 0.2 - exact.mean
    gap = (P.diagonal() * torch.tensor([0.01, 0.25, 4.0])).sum() - 3 - 2 * math.log(0.1)
    gap = (gap + ((away @ P) * away).sum(-1) - P.logdet()) / 2
    assert torch.allclose(known.gap, gap) and known.mutual_information == 0
    scale = fixed(Family(dist.Normal, loc=0.0))
    assert torch.allclose(scale.covariance, torch.diag(1 / P.diagonal())) and not scale.mean.any()
    positive = fixed(Family(dist.Normal, loc=constraints.positive, scale=1.0)).mean
    assert (positive >= 0).all() and (positive == 0).any() and (positive > 1).any()
    for name, rule in {"shared_scale": families.Shared, "mean_scale": families.Channel}.items():
        for family in (copy.deepcopy(LADDER[name]), Family(dist.Normal, scale=rule(start=2.0))):
            assert torch.equal(fixed(family).gap, fixed(name).gap)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_family_has_its_optimum(name):
    for call in (fixed, learned):
        one, other = call(name), call(copy.deepcopy(LADDER[name]))
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [3, 7])
def test_mutual_information_is_that_of_data_of_the_model(name, columns):
    """From data whose covariance is that of the model exactly: I = H(z) - H(z|x), all Gaussian."""
    torch.manual_seed(1)
    W, b, s = torch.randn(5, columns), torch.randn(5), 0.6
    root = torch.linalg.cholesky(W @ W.T + s**2 * torch.eye(5)) * 5**0.5
    x = b + torch.cat([root.T, -root.T])  # N = 10
    found = closed_form.fixed_decoder(x, W, b, s, LADDER[name])
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


@pytest.mark.parametrize("name", [*NAMES, "mean_only_bounded"])
def test_all_is_computed_in_double_whatever_comes(name):
    """Single precision, arrays and lists."""
    single = [torch.as_tensor(v).float() for v in decoder()]
    x, W, b, s = (v.double() for v in single)
    given = [
        (closed_form.fixed_decoder, (x, W, b, s), single),
        (closed_form.fixed_decoder, (x, W, b, s), (x.tolist(), W.numpy(), b.tolist(), s.item())),
        (closed_form.regression, (W, W.sum(1), 0.5, 2.0), (single[1], W.sum(1).numpy(), 0.5, 2)),
    ]
    for call, args, others in given:
        for one, other in zip(call(*args, LADDER[name]), call(*others, LADDER[name]), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_regression_is_the_same_algebra(name):
    torch.manual_seed(0)
    X, y = torch.randn(20, 3) * torch.tensor([0.1, 1.0, 10.0]), torch.randn(20)
    found = closed_form.regression(X, y, 0.7, 0.5, LADDER[name])
    exact = exact_posterior(X, y, weight=dist.Normal(0.0, 0.5), noise=0.7)
    assert found.log_likelihood.item() == pytest.approx(exact.log_evidence, abs=1e-9)
    if name in ("deterministic", "full_rank"):
        assert torch.allclose(found.mean, torch.as_tensor(exact.mean))
    if name == "full_rank":
        assert torch.allclose(found.covariance, torch.as_tensor(exact.covariance))
        lost = (torch.eye(3) / 4).logdet() - found.covariance.logdet()  # volume of the weights
        assert found.mutual_information.item() == pytest.approx(lost.item() / 2)
    if name == "deterministic":  # ridge
        ridge = torch.linalg.solve(X.T @ X + 0.49 / 0.25 * torch.eye(3), X.T @ y)
        assert torch.allclose(found.mean, ridge)
        joint = dist.Normal(X @ ridge, 0.7).log_prob(y).sum()
        joint = joint + dist.Normal(0.0, 0.5).log_prob(ridge).sum()
        assert torch.allclose(found.objective, joint)
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
        found = closed_form.fixed_decoder(x, W, bias, math.exp(place[-1]), LADDER[name])
        return -found.objective.mean().item()

    place = [*(0.5 + values[:latent].sqrt()).tolist(), -0.5]
    options = {"fatol": 1e-14, "xatol": 1e-9, "maxiter": 4000, "maxfev": 4000}
    for _ in range(4):  # from where it stopped, until nothing changes
        best = optimize.minimize(loss, place, method="Nelder-Mead", options=options)
        place = best.x
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
    found = learned(name, x, latent)
    assert found.objective == pytest.approx(best, abs=1e-6)
    assert found.noise == pytest.approx(noise, abs=1e-3)
    assert torch.allclose(found.weight.norm(dim=0), gains, atol=1e-2)
    assert found.attained and found.active == (gains > 1e-2).sum()
    assert found.distortion == pytest.approx(-found.objective - found.rate)


@pytest.mark.parametrize("name", FREE)
def test_learned_decoder_pays_what_the_formulas_say(name):
    """Nats above the best at equal noise (the excess of design); rate and information by r."""
    values = torch.tensor(SPECTRA["apart"])
    found = learned(name, data_of(values))
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
    if name in ("mean_scale", "full_rank"):  # probabilistic PCA: the codes are those of the prior
        assert found.rate == pytest.approx(r.log().sum().item(), abs=1e-9)
    if name != "shared_scale":
        information = r.log().sum().item() / (2 if name == "mean_only" else 1)
        assert found.mutual_information == pytest.approx(information, abs=1e-9)
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
        found = learned(name, x, latent)
        assert found.objective == pytest.approx(best, abs=1e-6)
        assert found.noise == pytest.approx(noise, abs=1e-3)
        assert found.weight.shape == (5, latent)
    free = dist.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0)).log_prob(x).mean()
    for name in ("mean_scale", "full_rank"):
        found = learned(name, x, latent)
        assert found.objective == pytest.approx(free.item(), abs=1e-9) and found.attained
    if latent == 5:
        found = learned("shared_scale", x, 5)
        assert found.objective == pytest.approx(learn(values, "shared_scale", 5)[0], abs=1e-6)
    found = learned("deterministic", x, latent)
    assert found.objective == math.inf and not found.attained


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 6), (4, 6), (3, 40)])
def test_data_in_a_subspace_leave_no_noise(dtype, shape):
    """Rank two at most, and rounded: no optimum, but where q has a noise of its own."""
    torch.manual_seed(0)
    x = (torch.randn(shape[0], 2) @ torch.randn(2, shape[1])).to(dtype) + 1
    for name in ("shared_scale", "mean_scale", "full_rank", "deterministic"):
        found = learned(name, x)
        assert found.objective == math.inf and not found.attained and found.noise == 0
        fewer = learned(name, x, 1)
        assert math.isfinite(fewer.objective)
    assert learned("mean_scale", x).active == 2
    for name in ("mean_only", "noise_only", "zero"):
        found = learned(name, x)
        assert found.attained and math.isfinite(found.objective) and found.noise > 0
    for name in NAMES:
        found = learned(name, x[:1].expand(3, -1))
        assert found.objective == math.inf and not found.attained


def test_directions_below_the_noise_collapse():
    """Mean-only noise is larger: with unequal eigenvalues it keeps fewer directions."""
    x = torch.cat([a := torch.diag(torch.tensor([90.0, 1.0, 0.9, 0.8, 0.7]).sqrt()), -a])
    assert learned("mean_scale", x).active == 2
    assert learned("mean_only", x).active == 1
    noise_only = learned("noise_only", x)
    assert noise_only.active == 0 and noise_only.rate == 0
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    normal = dist.Normal(0.0, values.mean().sqrt())
    assert noise_only.objective == pytest.approx(normal.log_prob(x).sum(-1).mean().item(), abs=1e-9)


def test_a_point_has_a_supremum_and_no_optimum():
    """The penalised objective rises towards it as the decoder grows."""
    x = decoder()[0]
    found = learned("deterministic", x)
    assert not found.attained and found.weight.isnan().all()
    assert found.mutual_information == math.inf and found.log_likelihood == -math.inf
    assert found.rate == pytest.approx(LOG_2PI)  # of two codes that are almost zero
    centred = x - x.mean(0)
    vectors = torch.linalg.svd(centred)[2][:2].T
    grown = [
        fixed("deterministic", weight=gain * vectors, bias=x.mean(0), noise=found.noise)
        for gain in (1e1, 1e2, 1e3, 1e4)
    ]
    values = [each.objective.mean().item() for each in grown]
    assert values == sorted(values) and values[-1] < found.objective
    assert values[-1] == pytest.approx(found.objective, abs=1e-3)
    assert grown[-1].rate.mean().item() == pytest.approx(found.rate, abs=1e-3)


def test_zero_is_noise_only_with_the_penalty_of_a_point():
    zero, noise_only = learned("zero"), learned("noise_only")
    assert zero.attained and zero.rate == pytest.approx(LOG_2PI)
    assert zero.objective == pytest.approx(noise_only.objective - LOG_2PI)
    assert zero.noise == noise_only.noise and zero.mutual_information == 0


def _regression(**changed):
    given = {"X": torch.ones(4, 2), "y": torch.ones(4), "noise": 1.0, "prior_scale": 1.0} | changed
    return closed_form.regression(**given, family=families.mean_only)


BOUNDED, UNKNOWN = constraints.interval(0.1, 2.0), "family: expected one with a closed form here"
BAD = [
    (lambda: fixed("zero", noise=0.0), "noise: .* got 0.0"),
    (lambda: fixed("zero", noise=math.inf), "noise: .* got inf"),
    (lambda: fixed("zero", x=torch.ones(5)), r"x: expected 2 dimensions, none empty, got \(5,\)"),
    (lambda: fixed("zero", x=torch.full((8, 5), math.nan)), "x: expected finite real numbers"),
    (lambda: fixed("zero", weight=torch.ones(4, 3)), "weight: expected 5 rows, .* got 4"),
    (lambda: fixed("zero", weight=torch.ones(5, 3) * 1j), "weight: expected finite real numbers"),
    (lambda: fixed("zero", bias=[0.0, 0.0, 0.0]), "bias: expected 5 rows, .* got 3"),
    (lambda: fixed("flow"), UNKNOWN + ", got flow"),
    (lambda: fixed("bayes"), UNKNOWN + ", got bayes"),
    (lambda: fixed(Family(dist.Normal, loc=families.shared)), UNKNOWN),
    (lambda: fixed(Family(dist.Normal, scale=BOUNDED)), UNKNOWN),
    (lambda: fixed(Family(dist.Normal, scale=families.Shared(BOUNDED))), UNKNOWN),
    (lambda: fixed(Family(dist.Laplace)), UNKNOWN),
    (lambda: _regression(y=np.ones(3)), "y: expected 4 rows, as X, got 3"),
    (lambda: _regression(noise=math.nan), "noise: .* got nan"),
    (lambda: _regression(prior_scale=-1.0), "prior_scale: .* positive number, got -1.0"),
    (lambda: learned("zero", torch.ones(0, 5)), r"x: .* got \(0, 5\)"),
    (lambda: learned("zero", latent=0), "latent: expected a whole number of at least 1, got 0"),
    (lambda: learned("shared_scale", latent=6), "latent: expected at most 5 .* got 6"),
    (lambda: learned("student_t"), UNKNOWN + ", got student_t"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
