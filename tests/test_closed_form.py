"""The closed forms: against densities written out, each other, and numerical optimisation."""

import copy
import functools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from linear import Linear
from pyro.distributions import constraints
from scipy import optimize
from torch.distributions import kl_divergence

from ppvae import Family, closed_form, families

POINTS = ("deterministic", "zero")
FREE = ("mean_only", "shared_scale", "mean_scale", "full_rank")
NAMES = [*POINTS, "noise_only", *FREE]
LADDER, LOG_2PI = families.LADDER, math.log(2 * math.pi)


@functools.cache
def linear():
    return Linear()


def fixed(family, **changed):
    """The optimum for the data and the decoder of `linear`, or for others."""
    one = linear()
    given = {"x": one.x, "weight": one.W, "bias": one.b, "noise": one.noise} | changed
    return closed_form.fixed_decoder(**given, family=LADDER.get(family, family))


def learned(family, x=None, latent=2):
    x = linear().x if x is None else x
    return closed_form.learned_decoder(x, latent, LADDER.get(family, family))


def normal(covariance):
    return dist.MultivariateNormal(torch.zeros(len(covariance)), covariance)


@pytest.mark.parametrize("t", [1.0, 0.5])
@pytest.mark.parametrize("name", [*NAMES, "mean_only_bounded"])
def test_the_terms_add_up(name, t):
    """log p by the marginal covariance; the terms of q by torch's own KL and a quadratic form."""
    one, found = linear(), fixed(name)
    x, W, b, s = one.x, one.W, one.b, one.noise
    if t != 1:  # a regression is a decoder without bias, of one datum y and a prior of any scale
        W, x = torch.randn(20, 3) * torch.tensor([0.1, 1.0, 10.0]), torch.randn(1, 20)
        b, s = torch.zeros(20), 0.7
        found = closed_form.regression(W, x[0], s, t, LADDER[name])
        assert found.objective.shape == () and found.mean.shape == (3,)
    prior, P = normal(t**2 * torch.eye(3)), W.T @ W / s**2 + torch.eye(3) / t**2
    marginal = dist.MultivariateNormal(b, t**2 * W @ W.T + s**2 * torch.eye(len(b)))
    assert torch.allclose(found.log_likelihood, marginal.log_prob(x))
    assert torch.allclose(found.objective, -found.rate - found.distortion)
    fit = dist.Normal(found.mean @ W.T + b, s).log_prob(x).sum(-1)
    fit = fit - (W @ found.covariance @ W.T).trace() / (2 * s**2)
    assert torch.allclose(found.distortion, -fit)
    if name in POINTS:
        assert torch.allclose(found.rate, -prior.log_prob(found.mean))
    else:
        q = dist.MultivariateNormal(found.mean, found.covariance)
        assert torch.allclose(found.rate, kl_divergence(q, prior))
        assert (found.gap > -1e-9).all()
    if name in ("deterministic", *FREE):
        assert torch.allclose(found.mean, torch.linalg.solve(P, W.T @ (x - b).T).T / s**2)
    if name == "full_rank":
        assert found.gap.abs().max() < 1e-9
        lost = prior.covariance_matrix.logdet() + P.logdet()  # volume of the latents
        assert found.mutual_information.item() == pytest.approx(lost.item() / 2)


@pytest.mark.parametrize("name", FREE)
def test_fixed_decoder_is_a_maximum_within_its_family(name):
    """No small move inside the family raises the ELBO, written as a function of mean and S."""
    found, one = fixed(name), torch.eye(3)
    away = found.mean - linear().mean
    moves = {"mean_only": 0 * one, "shared_scale": one, "mean_scale": one, "full_rank": one + 1}
    for _ in range(20):
        size = torch.randn(()) if name == "shared_scale" else torch.randn(3, 3)
        factor = one + 0.01 * moves[name] * size
        covariance = factor @ found.covariance @ factor.T
        moved = linear().gap(covariance, away + 0.01 * torch.randn_like(away))
        assert (moved >= found.gap - 1e-12).all()


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
    """A scale or a mean that is fixed, or a mean on a half-line, and other starts."""
    half, sd = fixed(Family(dist.Normal, scale=0.5)), torch.tensor([0.1, 0.5, 2.0])
    assert torch.equal(half.mean, fixed("mean_only").mean)
    assert torch.allclose(half.covariance, torch.eye(3) / 4)
    known = fixed(Family(dist.Normal, loc=0.2, scale=sd))
    assert torch.allclose(known.gap, linear().gap(torch.diag(sd**2), 0.2 - linear().mean))
    assert known.mutual_information == 0
    scale, best = fixed(Family(dist.Normal, loc=0.0)), torch.diag(linear().best_sd ** 2)
    assert torch.allclose(scale.covariance, best) and not scale.mean.any()
    positive = fixed(Family(dist.Normal, loc=constraints.positive, scale=1.0)).mean
    assert (positive >= 0).all() and (positive == 0).any() and (positive > 1).any()
    for name, rule in {"shared_scale": families.Shared, "mean_scale": families.Channel}.items():
        assert torch.equal(fixed(Family(dist.Normal, scale=rule(start=2.0))).gap, fixed(name).gap)


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
    if name not in FREE:
        assert found.mutual_information == (math.inf if name == "deterministic" else 0)
        alone = closed_form.fixed_decoder(x, 0 * W, b, s, LADDER[name])
        assert alone.mutual_information == 0  # all codes are equal
        return
    total = torch.cov(found.mean.T, correction=0) + found.covariance
    information = (total.logdet() - found.covariance.logdet()) / 2
    assert found.mutual_information.item() == pytest.approx(information.item(), abs=1e-9)
    kl = kl_divergence(normal(total), normal(torch.eye(columns)))  # what is left of the mean rate
    assert (found.rate.mean() - information).item() == pytest.approx(kl.item(), abs=1e-9)
    if name == "full_rank":
        marginal = (W @ W.T / s**2 + torch.eye(5)).logdet() / 2  # I(x; z) of the model
        assert information.item() == pytest.approx(marginal.item(), abs=1e-9)


@pytest.mark.parametrize("name", [*NAMES, "mean_only_bounded"])
def test_all_is_computed_in_double_whatever_comes(name):
    """Single precision, arrays and lists, and a copy of the family."""
    one = linear()
    single = [torch.as_tensor(v).float() for v in (one.x, one.W, one.b, one.noise)]
    x, W, b, s = (v.double() for v in single)
    given = [
        (closed_form.fixed_decoder, (x, W, b, s), single),
        (closed_form.fixed_decoder, (x, W, b, s), (x.tolist(), W.numpy(), b.tolist(), s.item())),
        (closed_form.regression, (W, W.sum(1), 0.5, 2.0), (single[1], W.sum(1).numpy(), 0.5, 2)),
        (closed_form.learned_decoder, (x, 2), (x.tolist(), 2)),
    ]
    for call, args, others in given if name in NAMES else given[:3]:
        pair = call(*args, LADDER[name]), call(*others, copy.deepcopy(LADDER[name]))
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*pair, strict=True))


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
    best = optimize.minimize(loss, place, method="BFGS", jac="3-point", options={"gtol": 1e-8})
    gains = np.sort(abs(best.x[:-1]))[::-1].copy()
    return -best.fun, math.exp(best.x[-1]), torch.as_tensor(gains), x


APART = [9.0, 4.0, 2.0, 0.5, 0.2]
# under the larger noise of mean-only, fewer directions of the second are worth their rate
SPECTRA = [APART, [18.0, 0.2, 0.18, 0.16, 0.14], [2.0] * 5, [9.0, *[1.0] * 4], [4.0, 2, 1, 0, 0]]
LEARNED = [(name, values, 2) for name in FREE for values in SPECTRA]
LEARNED += [(name, APART, 4) for name in FREE]
LEARNED += [("mean_only", [0.09, 0.04, 0.02, 0.005, 0.002], 2)]  # a variance is no deviation
LEARNED += [(name, APART, latent) for name in ("noise_only", "mean_only") for latent in (5, 7)]


@pytest.mark.parametrize(("name", "values", "latent"), LEARNED)
def test_learned_decoder_is_what_optimisation_finds(name, values, latent):
    best, noise, gains, x = learn(torch.tensor(values), name, latent)
    found = learned(name, x, latent)
    assert found.objective == pytest.approx(best, abs=1e-6)
    assert found.noise == pytest.approx(noise, abs=1e-3) and found.weight.shape == (5, latent)
    assert torch.allclose(found.weight.norm(dim=0)[: len(gains)], gains, atol=1e-2)
    assert found.attained and found.active == (gains > 1e-2).sum()
    assert found.distortion == pytest.approx(-found.objective - found.rate)


@pytest.mark.parametrize("name", FREE)
def test_learned_decoder_pays_what_the_formulas_say(name):
    """Nats above the best at equal noise (the excess of design); rate and information by r."""
    values = torch.tensor(APART)
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
    """Where the noise is one of many, the likelihood of a free covariance is reached."""
    values = torch.tensor(APART)
    x = data_of(values)
    free = dist.MultivariateNormal(x.mean(0), torch.diag(values)).log_prob(x).mean().item()
    for name in ("mean_scale", "full_rank"):
        found = learned(name, x, latent)
        assert found.objective == pytest.approx(free, abs=1e-9) and found.attained
    if latent == 5:
        best = learn(values, "shared_scale", 5)[0]
        assert learned("shared_scale", x, 5).objective == pytest.approx(best, abs=1e-6)
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
        assert math.isfinite(learned(name, x, 1).objective)
    assert learned("mean_scale", x).active == 2
    for name in ("mean_only", "noise_only", "zero"):
        found = learned(name, x)
        assert found.attained and math.isfinite(found.objective) and found.noise > 0
    for name in NAMES:
        found = learned(name, x[:1].expand(3, -1))
        assert found.objective == math.inf and not found.attained


def test_a_point_has_a_supremum_and_no_optimum():
    """The penalised objective rises towards it as the decoder grows."""
    x = linear().x
    found = learned("deterministic", x)
    assert not found.attained and found.weight.isnan().all()
    assert found.mutual_information == math.inf and found.log_likelihood == -math.inf
    assert found.rate == pytest.approx(LOG_2PI)  # of two codes that are almost zero
    axes, bias = torch.linalg.svd(x - x.mean(0))[2][:2].T, x.mean(0)
    options = {"bias": bias, "noise": found.noise}
    grown = [fixed("deterministic", weight=10**power * axes, **options) for power in (1, 2, 3, 4)]
    values = [each.objective.mean().item() for each in grown]
    assert values == sorted(values) and values[-1] < found.objective
    assert values[-1] == pytest.approx(found.objective, abs=1e-3)
    assert grown[-1].rate.mean().item() == pytest.approx(found.rate, abs=1e-3)


def test_zero_is_noise_only_with_the_penalty_of_a_point():
    zero, noise_only = learned("zero"), learned("noise_only")
    assert zero.attained and zero.rate == pytest.approx(LOG_2PI)
    assert zero.objective == pytest.approx(noise_only.objective - LOG_2PI)
    assert zero.noise == noise_only.noise and zero.mutual_information == noise_only.rate == 0


REGRESSION = functools.partial(closed_form.regression, torch.ones(4, 2), family=families.mean_only)
BOUNDED, UNKNOWN = constraints.interval(0.1, 2.0), "family: expected one with a closed form here"
BAD = [
    (lambda: fixed("zero", noise=0.0), "noise: .* got 0.0"),
    (lambda: fixed("zero", noise=math.inf), "noise: .* got inf"),
    (lambda: fixed("zero", x=torch.ones(5)), r"x: expected 2 dimensions, none empty, got \(5,\)"),
    (lambda: fixed("zero", x=torch.full((8, 5), math.nan)), "x: expected finite real numbers"),
    (lambda: fixed("zero", weight=torch.ones(4, 3)), "weight: expected 5 rows, .* got 4"),
    (lambda: fixed("zero", weight=torch.full((5, 3), 1e200)), "weight: .* size .* got 1e.200"),
    (lambda: fixed("zero", noise=1e-200), "noise: .* from 1e-100 to 1e.100, got 1e-200"),
    (lambda: learned("mean_scale", 1e-200 * torch.randn(9, 5)), "x: .* size from 1e-100"),
    (lambda: fixed("zero", bias=[0.0, 0.0, 0.0]), "bias: expected 5 rows, .* got 3"),
    (lambda: fixed("flow"), UNKNOWN + ", got flow"),
    (lambda: fixed("bayes"), UNKNOWN + ", got bayes"),
    (lambda: fixed(Family(dist.Normal, loc=families.shared)), UNKNOWN),
    (lambda: fixed(Family(dist.Normal, scale=BOUNDED)), UNKNOWN),
    (lambda: fixed(Family(dist.Normal, scale=families.Shared(BOUNDED))), UNKNOWN),
    (lambda: fixed(Family(dist.Laplace)), UNKNOWN),
    (lambda: REGRESSION(np.ones(3), 1.0, 1.0), "y: expected 4 rows, as X, got 3"),
    (lambda: REGRESSION(np.ones(4), math.nan, 1.0), "noise: .* got nan"),
    (lambda: REGRESSION(np.ones(4), 1.0, -1.0), "prior_scale: .* positive number, got -1.0"),
    (lambda: learned("zero", torch.ones(0, 5)), r"x: .* got \(0, 5\)"),
    (lambda: learned("zero", latent=0), "latent: expected a whole number of at least 1, got 0"),
    (lambda: learned("shared_scale", latent=6), "latent: expected at most 5 .* got 6"),
    (lambda: learned("student_t"), UNKNOWN + ", got student_t"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
