"""The gaps against the linear-Gaussian model and others where log p(x) and the best q are exact.

There the numbers come out to rounding: given the offsets the ELBO is the expectation of a quadratic
(the KL is closed), and the draws are moment-matched, so their average is that expectation.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import cases
from pyro.infer.autoguide import AutoNormal
from torch import nn

from ppvae import VAE, Family, FamilyGuide, closed_form, families, likelihoods
from ppvae.evaluation.amortization import gaps
from ppvae.evaluation.search import Offsets, adam, quasi_newton
from ppvae.nn import mlp
from ppvae.programs.matched_normals import MatchedNormals
from ppvae.programs.runs import opened

EXACT = 1e-6


class Linear:
    """x = W z + b + noise, and a guide with a linear encoder that can be set to anything."""

    def __init__(self, *, orthogonal=False, size=12, noise=0.5):
        torch.manual_seed(0)
        self.W, self.b, self.noise = torch.randn(5, 3), torch.randn(5), noise
        if orthogonal:
            self.W = torch.linalg.qr(self.W)[0] * torch.tensor([0.3, 1.0, 2.0])
        decoder = nn.Linear(3, 5)
        decoder.weight.data, decoder.bias.data = self.W.clone(), self.b.clone()
        self.model = VAE(decoder, 3, likelihoods.Normal(noise))
        self.x = self.model(size=size).detach()
        pyro.clear_param_store()
        self.P = torch.eye(3) + self.W.T @ self.W / noise**2
        self.mean = (self.x - self.b) @ self.W @ self.P.inverse() / noise**2

    def best(self, family):
        return closed_form.fixed_decoder(self.x, self.W, self.b, self.noise, family)

    def guide(self, family, error=0.0, encoder=None):
        """The exact posterior mean and the best scale, all weights off by so much."""
        torch.manual_seed(1)
        guide = FamilyGuide(self.model, family, encoder or nn.Identity())
        head = guide.heads["z"]
        for name, value in head.named_children():
            if value.linear is None:
                continue
            weight, bias = (
                torch.zeros_like(value.linear.weight),
                torch.zeros_like(value.linear.bias),
            )
            if name == "loc" and encoder is None:
                weight = self.P.inverse() @ self.W.T / self.noise**2
                bias = -weight @ self.b
            if name == "scale":
                bias = -self.P.diagonal().log() / 2
            if name == "scale_tril":
                lower = torch.linalg.cholesky(self.P.inverse())
                lower = lower - torch.diag(lower.diagonal() - lower.diagonal().log())
                bias = lower[tuple(torch.tril_indices(3, 3))]
            value.linear.weight.data = weight + error * torch.randn_like(weight)
            value.linear.bias.data = bias + error * torch.randn_like(bias)
        return guide

    def elbo(self, guide):
        """The ELBO of a Gaussian guide, in closed form."""
        with torch.no_grad():
            fn = guide.heads["z"](guide.encoder(self.x))
        if isinstance(fn, dist.MultivariateNormal):
            mean, S = fn.loc, fn.covariance_matrix
        else:
            mean, S = fn.mean, torch.diag_embed(fn.variance)
        away = mean - self.mean
        gap = (self.P @ S).diagonal(dim1=-2, dim2=-1).sum(-1) - 3 + ((away @ self.P) * away).sum(-1)
        gap = (gap - self.P.logdet() - S.logdet()) / 2
        return self.best(families.full_rank).log_likelihood - gap


def measure(model, guide, *args, num_steps=60, **options):
    return gaps(model, guide, *args, num_steps=num_steps, progress=False, **options)


def close(found, expected, bound=EXACT):
    return np.abs(np.asarray(found) - np.asarray(expected)).max() < bound


def test_both_gaps_are_zero_for_an_orthogonal_decoder_and_the_exact_encoder():
    linear = Linear(orthogonal=True)
    log_p = linear.best(families.mean_scale).log_likelihood
    guide = linear.guide(families.mean_scale)
    found = measure(linear.model, guide, linear.x, log_likelihood=log_p)
    for name in ("approximation", "amortization", "gap", "approximation_se", "amortization_se"):
        assert close(found[name], 0.0), name
    assert "ess" not in found and found.sizes == {"datum": 12}


@pytest.mark.parametrize("family", ["noise_only", "mean_only", "mean_scale", "full_rank"])
def test_a_correlated_posterior_and_a_bad_encoder(family):
    """The encoder's errors, of many nats, are amortization, and leave the approximation alone."""
    linear, family = Linear(), families.LADDER[family]
    best = linear.best(family)
    P, G = linear.P, linear.P - torch.eye(3)
    expected = {
        families.mean_only: (G.trace() - P.logdet()) / 2,
        families.mean_scale: (P.diagonal().log().sum() - P.logdet()) / 2,
        families.full_rank: torch.zeros(()),
    }
    if family in expected:
        assert close(best.gap, expected[family])
        guide = linear.guide(family, error=0.1)
        elbo = linear.elbo(guide)
    else:
        guide, elbo = FamilyGuide(linear.model, family, nn.Identity()), best.objective
    found = measure(linear.model, guide, linear.x, log_likelihood=best.log_likelihood)
    assert close(found.best_elbo, best.objective) and close(found.elbo, elbo)
    assert close(found.approximation, best.gap)
    assert close(found.amortization, best.objective - elbo)
    assert close(found.gap, found.approximation + found.amortization)
    assert close(found.approximation_se, 0.0) and close(found.amortization_se, 0.0)
    if family is families.noise_only:
        assert (found.amortization == 0).all() and (found.amortization_se == 0).all()
    else:
        assert found.amortization.mean() > 0.5


@pytest.mark.parametrize("family", ["mean_scale", "full_rank"])
def test_an_encoder_that_is_too_small_shows_amortization_only(family):
    """One feature for three latents: a mean on a line, and all of the gap above the family's."""
    linear, family = Linear(), families.LADDER[family]
    best = linear.best(family)
    guide = linear.guide(family, error=0.1, encoder=nn.Linear(5, 1))
    found = measure(linear.model, guide, linear.x, log_likelihood=best.log_likelihood)
    assert close(found.approximation, best.gap)
    assert close(found.amortization, best.objective - linear.elbo(guide))
    assert found.amortization.min() > 0.1


def test_a_shared_scale_stays_where_it_is():
    linear = Linear()
    guide = linear.guide(families.shared_scale, error=0.1)
    raw = guide.heads["z"].scale.raw
    raw.data.fill_(math.log(0.4))
    found = measure(linear.model, guide, linear.x, log_likelihood=linear.elbo(guide) * 0)
    S = 0.16 * torch.eye(3)
    gap = ((linear.P @ S).trace() - 3 - linear.P.logdet() - S.logdet()) / 2
    expected = linear.best(families.full_rank).log_likelihood - gap
    assert close(found.best_elbo, expected) and close(found.elbo, linear.elbo(guide))
    assert close(found.approximation, -expected)
    assert raw.item() == pytest.approx(math.log(0.4), abs=1e-15)


OTHERS = {
    "student_t": families.student_t,
    "low_rank": families.low_rank,
    "flow": families.flow,
    "mean_only_bounded": families.mean_only_bounded,
    "asymmetric_laplace": Family(dist.AsymmetricLaplace),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_families_lie_between_their_start_and_log_p(name):
    """Above the encoder's ELBO, below log p(x), up to 5 errors of the mean over 12 data."""
    linear = Linear()
    log_p = linear.best(families.full_rank).log_likelihood
    guide = FamilyGuide(linear.model, OTHERS[name], mlp(5, 8))
    found = measure(linear.model, guide, linear.x, log_likelihood=log_p, num_steps=150)
    approximation, amortization = found.approximation.mean(), found.amortization.mean()
    low = [
        -5 * math.hypot(*found[f"{k}_se"].values) / 12 for k in ("approximation", "amortization")
    ]
    assert approximation > low[0] - 1e-9 and amortization > max(low[1], 0.5)
    if name == "low_rank":  # two factors and a diagonal hold every 3x3 covariance
        assert approximation < 1e-3
    if name == "flow":  # it holds every Gaussian with independent coordinates, and more
        assert approximation < float(linear.best(families.mean_scale).gap.mean()) + 0.02
    if name == "student_t":  # nearly Gaussian at 1000 degrees of freedom
        # heavy tails: for some data the search misses by ten times as much, whatever the seed
        best = float(linear.best(families.mean_scale).gap.mean())
        assert best - 0.05 < found.approximation.median() < best + 0.05


def test_draws_that_are_not_matched_show_no_optimism():
    """Gamma to a Gamma prior and Poisson counts: the posterior is in the family.

    The best ELBO is log p(x) itself. A measure on the draws of the search would lie above it.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(z).expand(z.shape), obs=x[:, 0])

    x = torch.arange(40.0)[:, None] % 8
    log_p = dist.GammaPoisson(2.0, 1.0).log_prob(x[:, 0])
    guide = FamilyGuide(model, Family(dist.Gamma), nn.Identity())
    guide.setup(x)
    for argument, bias in ((guide.heads["z"].concentration, 1.0), (guide.heads["z"].rate, 0.5)):
        argument.linear.weight.data.fill_(0.2)
        argument.linear.bias.data.fill_(bias)
    found = measure(model, guide, x, vectorized=True, log_likelihood=log_p, num_steps=200)
    error = 5 * math.sqrt(float((found.approximation_se**2).sum())) / 40
    assert 1e-5 < error < 0.03
    assert -error < found.approximation.mean() < error + 0.05 < found.amortization.mean()
    sampled = measure(model, guide, x, vectorized=True, num_steps=200)
    assert abs(float(sampled.log_likelihood.mean()) - float(log_p.mean())) < 0.02


@pytest.mark.parametrize(
    ("case", "vectorized"),
    [
        ("one vector", True),
        ("left of pixels", True),
        ("steps inside", True),
        ("told rows", True),
        ("left of pixels", False),
    ],
)
def test_full_rank_is_exact_on_every_linear_gaussian_model(case, vectorized):
    """Plates, subsamples and joint draws: at the exact posterior all importance weights agree."""
    model, args, encoder, _ = cases()[case]
    guide = FamilyGuide(model, families.full_rank, encoder)
    steps = 300 if vectorized else 50
    options = {"num_samples": 64, "vectorized": vectorized, "num_steps": steps}
    found = measure(model, guide, *args, **options)
    bound = EXACT if vectorized else 0.05
    assert close(found.approximation, 0.0, bound) and found.amortization.min() > 0.01
    assert close(found.ess, 64, 64 * bound) and (found.khat < 0.7).all()


def test_single_draws_are_matched_too():
    """A model that cannot be vectorized; two sites share the correlated latents."""
    linear = Linear(size=4)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            assert a.dim() == 2 and b.dim() == 1
            loc = torch.cat([a, b[:, None]], 1) @ linear.W.T + linear.b
            pyro.sample("x", dist.Normal(loc, linear.noise).to_event(1), obs=x)

    best = linear.best(families.mean_scale)
    guide = FamilyGuide(model, families.mean_scale, mlp(5, 4))
    log_p = best.log_likelihood
    found = measure(model, guide, linear.x, num_samples=64, log_likelihood=log_p)
    assert close(found.approximation_se, 0.0) and close(found.amortization_se, 0.0)
    assert close(found.approximation, best.gap, 1e-3)  # what 60 steps leave
    assert found.amortization.min() > 0.1


class OwnHead(nn.Module):
    def __init__(self, features, shape):
        super().__init__()
        self.net = nn.Linear(features, 2 * shape[0])

    def forward(self, features=None):
        features = torch.ones(1) if features is None else features
        loc, raw = self.net(features).chunk(2, -1)
        return dist.Normal(loc, raw.exp())


class OwnFamily:
    channels, joint, name = ("loc", "scale"), False, "own"

    def head(self, features, shape):
        return OwnHead(1 if features is None else features, shape)


def test_a_head_of_unknown_kind_is_searched_through_its_features():
    linear = Linear()
    best = linear.best(families.mean_scale)
    guide = FamilyGuide(linear.model, OwnFamily(), mlp(5, 16))
    log_p = best.log_likelihood
    found = measure(linear.model, guide, linear.x, log_likelihood=log_p, num_steps=300)
    assert close(found.approximation, best.gap, 1e-4) and found.amortization.mean() > 5


def test_the_arguments_of_a_flow_see_the_true_features(plain_pyro):
    """Its couplings and spline get an offset on the features; location and scale their own."""
    linear = Linear()
    guide = FamilyGuide(linear.model, families.flow, nn.Identity())
    head = guide.heads["z"]
    for parameter in head.parameters():
        parameter.data = torch.randn_like(parameter)
    with opened(linear.model, guide, (linear.x,)) as runs:
        true = head(linear.x)
        offsets = Offsets(runs, guide.heads, runs.args, None)
        with offsets.attached():
            shift = torch.zeros_like(offsets.zero)
            shift[:, :5] = torch.randn(12, 5)  # the features come first
            shift[:, 5:8] = 1.0  # then the location
            offsets.place(shift)
            moved = head(linear.x)
    assert shift.shape == (12, 5 + 3 + 3)
    assert close(moved.transforms[-1].loc, true.transforms[-1].loc + 1)
    assert close(moved.transforms[-1].scale, true.transforms[-1].scale)
    points = torch.linspace(-1, 1, 3).expand(12, 3)
    inner = [moved.transforms[-2](points), true.transforms[-2](points)]
    assert (inner[0] - inner[1]).abs().max() > 0.01


def test_batches_and_precision():
    linear = Linear()
    best, guide = linear.best(families.mean_scale), linear.guide(families.mean_scale, error=0.1)
    args, log_p = (linear.model, guide, linear.x.numpy()), best.log_likelihood
    found = measure(*args, batch_size=5, log_likelihood=list(log_p))
    assert close(found.approximation, best.gap) and close(found.elbo, linear.elbo(guide))
    again = measure(*args, batch_size=5)
    assert found.elbo.equals(again.elbo) and close(found.best_elbo, again.best_elbo, 1e-12)
    single = measure(linear.model.float(), guide.float(), linear.x.float(), log_likelihood=log_p)
    assert close(single.approximation, best.gap, 1e-3)
    assert close(single.amortization, found.amortization, 1e-3)


def test_the_errors_are_those_that_seeds_show(plain_pyro):
    """The variance over 30 seeds against the mean of the squared errors: within a factor of 1.6.

    Their ratio is that of two chi-squares with 29 * 12 and 30 * 12 * 7 degrees of freedom; five of
    its standard deviations (0.08) are 0.4, and the draws of a group are not quite Gaussian.
    """
    model = VAE(mlp(2, 8, out=6), 2, likelihoods.Bernoulli())
    for weight in model.parameters():
        weight.data *= 3  # far from linear
    guide = FamilyGuide(model, families.mean_scale, mlp(6, 8))
    x = model(size=12).detach()
    options = {"num_steps": 1, "num_samples": 64, "log_likelihood": np.zeros(12)}
    runs = [measure(model, guide, x, seed=seed, **options) for seed in range(30)]
    for name, error in {"elbo": "gap_se", "best_elbo": "approximation_se"}.items():
        spread = np.var([run[name] for run in runs], axis=0, ddof=1).mean()
        assert 1 / 1.6 < spread / np.mean([run[error] ** 2 for run in runs]) < 1.6
    sampled = measure(model, guide, x, num_steps=1, num_samples=64)
    assert sampled.elbo.equals(runs[0].elbo) and (sampled.gap_se > runs[0].gap_se).all()


class Buffered(nn.Module):
    """An encoder with everything that could move."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU())

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("family", ["noise_only", "mean_scale", "flow"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_moves(family, fails):
    model = VAE(mlp(2, 8, out=5), 2, likelihoods.Bernoulli())
    guide = FamilyGuide(model, families.LADDER[family], Buffered())
    x = torch.ones(9, 5)
    calls_before_failure = 30 if family != "noise_only" else 5
    for parameter in guide.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    guide.encoder.net[2].eval()
    guide.eval = model.eval = None  # the modes are not to be set by way of these
    modes = [m.training for m in guide.modules()] + [m.training for m in model.modules()]
    tensors = [
        *guide.parameters(),
        *guide.buffers(),
        *model.parameters(),
        *(p.grad for p in guide.parameters()),
    ]
    before = [tensor.clone() for tensor in tensors]
    state, calls = torch.get_rng_state(), []

    def failing(*args):
        calls.append(None)
        if len(calls) == calls_before_failure:
            raise RuntimeError("in the middle of it")

    if fails:
        handle = model.decoder.register_forward_hook(failing)
        with pytest.raises(RuntimeError, match="in the middle"):
            measure(model, guide, x, num_samples=4000)
        handle.remove()
    else:
        measure(model, guide, x, num_samples=16, num_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in guide.modules()] + [m.training for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in guide.modules())
    assert all(p.grad is None for p in model.parameters())


def _outside(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 15}, "num_samples: .*at least 16, got 15"),
        ({"num_steps": 0}, "num_steps: .*at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: .*at least 1, got 0"),
        ({"plate": "rows"}, "plate: expected one of"),
        ({"log_likelihood": np.zeros(3)}, r"log_likelihood: expected 12 .* got shape \(3,\)"),
        ({"log_likelihood": np.full(12, math.nan)}, "12 that are not finite"),
    ],
)
def test_bad_options(options, message):
    linear = Linear()
    with pytest.raises(ValueError, match=message):
        gaps(linear.model, linear.guide(families.mean_only), linear.x, **options)


def test_bad_guides_models_and_data():
    linear = Linear()
    for family in (families.deterministic, families.zero):
        guide = FamilyGuide(linear.model, family, mlp(5, 4))
        with pytest.raises(ValueError, match="guide: expected a family with a density, got"):
            gaps(linear.model, guide, linear.x)
    with pytest.raises(ValueError, match="with an encoder, got one of global latents"):
        gaps(linear.model, FamilyGuide(linear.model, families.mean_scale), linear.x)
    with pytest.raises(ValueError, match="expected a FamilyGuide with an encoder, got AutoNormal"):
        gaps(linear.model, AutoNormal(linear.model), linear.x)
    with pytest.raises(ValueError, match="args: expected finite numbers"):
        gaps(linear.model, linear.guide(families.mean_only), linear.x * math.nan)
    with pytest.raises(ValueError, match=r"in the plate 'data'; outside: \['w'\]"):
        gaps(_outside, FamilyGuide(_outside, families.noise_only), linear.x)
    model, args, encoder, _ = cases()["steps inside"]
    with pytest.raises(ValueError, match="plate: expected 'data', along which"):
        gaps(model, FamilyGuide(model, families.mean_scale, encoder), *args, plate="steps")


def test_draws_that_are_not_reparametrized():
    class Rough(dist.Normal):
        has_rsample = False

    linear = Linear()
    guide = FamilyGuide(linear.model, families.mean_scale, mlp(5, 4))
    head = guide.heads["z"]
    head.forward = lambda features: Rough(head.loc(features), head.scale(features))
    with pytest.raises(ValueError, match="guide: expected reparametrized draws; 'z'"):
        gaps(linear.model, guide, linear.x)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("match", ["datum", "common"])
def test_the_numbers_of_each_datum_are_matched_over_all_sites(vectorized, match, plain_pyro):
    """The draws of two sites of mean-field Gaussians, shifted and scaled back."""
    model, args, encoder, _ = cases()["positive"]
    guide = FamilyGuide(model, families.mean_scale, encoder)
    taken = []

    def keep(module, given, output):
        taken.append(output)

    with opened(model, guide, args, vectorized=vectorized) as runs:
        numbers = MatchedNormals(20, common=match == "common")
        plates = [(20, pyro.plate("_draws", 20, dim=-2))] if vectorized else [(1, None)] * 20
        first = 0
        with numbers, numbers.places(runs.plate):
            for count, plate in plates:
                numbers.start_run(first, count, single=plate is None)
                first += count
                with plate or pyro.plate("_none", 1, dim=-5):
                    taken.append(guide(*args))
    a = torch.stack([draw["a"].log() for draw in taken]).reshape(20, 6, 2)
    b = torch.stack([draw["b"] for draw in taken]).reshape(20, 6, 1)
    value = torch.cat([a, b], -1)
    value = (value - value.mean(0)) / value.std(0, correction=0)
    products = torch.einsum("kni,knj->nij", value, value) / 20
    assert close(products, torch.eye(3).expand(6, 3, 3), 1e-10)
    same = (value - value[:, :1]).abs().amax((0, 2))
    assert (same < 1e-9).all() if match == "common" else (same[1:] > 0.1).all()


def test_the_minimisers():
    """Quadratics of condition 1e4, each by itself; one that starts at its minimum, one of NaN."""
    torch.manual_seed(0)
    H = torch.diag_embed(torch.logspace(-2, 2, 6)) * torch.rand(4, 1, 1).add(0.5)
    start = torch.randn(4, 6)
    start[2] = 0

    def slope(x):
        value = torch.einsum("ni,nij,nj->n", x, H, x) / 2
        gradient = torch.einsum("nij,nj->ni", H, x)
        value[3], gradient[3] = math.nan, math.nan
        return value, gradient

    for found in (quasi_newton(slope, start, 200), adam(slope, start, 1000, 0.2)):
        assert (slope(found)[0][:3] < 1e-5).all()
        assert torch.equal(found[3], start[3]) and torch.equal(found[2], start[2])
    assert (slope(quasi_newton(slope, start, 200))[0][:3] < 1e-12).all()
    assert torch.equal(quasi_newton(slope, start, 1), start)
