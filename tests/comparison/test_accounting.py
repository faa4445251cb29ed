"""Where the nats go: against closed forms, quadrature, `gaps`, and identities that must hold."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import Own, cases
from linear import Linear, Regression, close, holes, observed_only, within
from pairs import traceless
from pyro.infer.autoguide import AutoNormal
from scipy.optimize import minimize
from torch import nn

from ppvae import (
    VAE,
    Family,
    FamilyGuide,
    account,
    closed_form,
    families,
    fit,
    gaps,
    likelihoods,
    simulate,
)
from ppvae.comparison.ledger import Measured, notes_of, posterior_mean
from ppvae.nn import mlp

LADDER = ("noise_only", "mean_only", "mean_scale", "full_rank")
ROWS = ["noise", "prior_cost", "mean_channel", "scale_channel", "correlations", "beyond_gaussian"]


def measure(model, guide, *args, **options):
    return account(model, guide, *args, **{"num_steps": 100, "progress": False} | options).dataset


def row(found, name):
    return found.nats.sel(row=name).values


def sums(found, end, bound=1e-9):
    """Whether the rows sum to log p(x), and on to an end."""
    inside = found.where(found.summed, drop=True)
    last = inside.end.values.tolist().index("log p(x)")
    half = inside.nats.isel(row=slice(last + 1)).sum("row")
    return close(half, found.log_likelihood, bound) and close(inside.nats.sum("row"), end, bound)


GUIDES = ["noise_only", "mean_only", "shared_scale", "mean_scale", "full_rank", "deterministic"]


@pytest.mark.parametrize("name", GUIDES)
def test_every_row_of_a_linear_decoder_has_its_closed_form(name):
    """Whatever the guide: its errors are in the last row alone, or outside of the sum."""
    linear, family = Linear(size=6), families.LADDER[name]
    guide = linear.guide(family, error=0.1)
    found = measure(linear.model, guide, linear.x)
    known = {
        each: closed_form.fixed_decoder(
            linear.x, linear.W, linear.b, linear.noise, families.LADDER[each]
        )
        for each in {*LADDER, name, "deterministic"}
    }
    for each in LADDER:
        assert close(found.optimum.sel(family=each), known[each].objective), each
        assert close(found.optimum_se.sel(family=each), 0.0)
    assert close(found.log_likelihood, linear.log_p)
    assert close(row(found, "point"), known["deterministic"].objective)
    # the posterior N(mean, C): E (x - W z - b)^2 has a part of the mean and one of the spread
    C = linear.P.inverse()
    miss = (linear.x - linear.b - linear.mean @ linear.W.T).square().sum(-1)
    noise = (miss + (linear.W @ C @ linear.W.T).trace()) / linear.noise**2
    noise = -(noise + 5 * math.log(2 * math.pi * linear.noise**2)) / 2
    assert close(row(found, "noise"), noise)
    # KL(prior || posterior) + KL(posterior || prior), in which the log-determinants cancel
    both = linear.P.trace() + C.trace() - 6 + ((linear.mean @ linear.P) * linear.mean).sum(-1)
    both = (both + linear.mean.square().sum(-1)) / 2
    assert close(row(found, "prior_cost"), -both)
    steps = np.diff([known[each].objective.numpy() for each in LADDER], axis=0)
    for step, expected in zip(ROWS[2:5], steps, strict=True):
        assert close(row(found, step), expected)
    assert close(row(found, "beyond_gaussian"), 0.0)
    assert found.row.values[:6].tolist() == ROWS and found.attrs["notes"] == []
    if name == "deterministic":
        assert sums(found, linear.log_p, 1e-5) and found.elbo.isnull().all()
        assert found.row.values[6:].tolist() == ["point", "guide_point"]
        said = guide.heads["z"](linear.x).v.detach() - linear.mean
        away = ((said @ linear.P) * said).sum(-1) / 2
        assert close(row(found, "guide_point"), known[name].objective - away)
        return
    assert found.row.values[6:].tolist() == ["family_gap", "amortization_gap", "point"]
    assert close(row(found, "family_gap"), -known[name].gap)
    best = known[name].objective.numpy()
    elbo = best if name == "noise_only" else linear.elbo(guide)
    assert close(found.elbo, elbo) and sums(found, found.elbo)
    assert close(row(found, "amortization_gap"), elbo - best)
    known_gaps = gaps(linear.model, guide, linear.x, num_steps=100, progress=False)
    if name != "shared_scale":  # which stays where it is in `gaps`
        assert close(row(found, "amortization_gap"), -known_gaps.amortization)
    assert close(found.running.sel(row="amortization_gap"), elbo.mean())


def test_other_families_give_the_rows_their_names():
    linear = Linear(size=6)
    half = Family(dist.Normal, scale=0.5)
    names = {"prior": "noise_only", "fixed": half, "one width": "shared_scale", "best": "low_rank"}
    guide = linear.guide(families.mean_scale, error=0.1)
    found = measure(linear.model, guide, linear.x, families=names)
    assert found.row.values[:6].tolist() == ["noise", *names, "beyond_best"]
    for name, family in (("fixed", half), ("one width", families.shared_scale)):
        known = closed_form.fixed_decoder(linear.x, linear.W, linear.b, linear.noise, family)
        assert close(found.optimum.sel(family=name), known.objective)
    assert row(found, "beyond_best").max() < 1e-3  # two factors and a diagonal: any covariance
    assert sums(found, found.elbo)
    # the families need not hold the prior: a fixed width that does not suit costs more than it
    wide = Family(dist.Normal, scale=3.0)
    found = measure(linear.model, guide, linear.x, families=[families.mean_scale, wide])
    assert (row(found, wide.name) < -1).all() and sums(found, found.elbo)
    assert (row(found, f"beyond_{wide.name}") > 1).all()


def test_batches_missing_entries_and_single_precision():
    linear = Linear(size=7)
    guide = linear.guide(families.mean_scale, error=0.1)
    whole, cut = (measure(linear.model, guide, linear.x, batch_size=b) for b in (256, 3))
    assert close(whole.nats, cut.nats, 2e-6)
    assert close(cut.mean_se_data, cut.nats.std("datum", ddof=1) / math.sqrt(7), 1e-9)
    x = holes(linear.x)
    covariance = linear.W @ linear.W.T + linear.noise**2 * torch.eye(5)
    found = measure(linear.model, guide, x, batch_size=3)
    expected = [observed_only(each, linear.b, covariance) for each in x]
    assert close(found.log_likelihood, expected) and sums(found, found.elbo)
    assert close(row(found, "beyond_gaussian"), 0.0)
    assert close(found.nats.sel(datum=0, row=ROWS), 0.0)  # of nothing nothing is said
    # a search ends where rounding, some 1e-6 nats, hides the rest, which is of second order in how
    # far the member is off: 1e-3, of which the noise is of first order
    args = linear.model.float(), guide.float(), linear.x.float()
    single = measure(*args)
    assert close(single.optimum, whole.optimum, 1e-4) and close(single.nats, whole.nats, 1e-2)


PLATES = ["one vector", "left of pixels", "steps inside", "told rows"]


@pytest.mark.parametrize("case", PLATES)
def test_full_rank_is_the_posterior_of_every_linear_gaussian_model(case):
    """Plates, subsamples, keyword arguments: nothing is left beyond it."""
    model, args, encoder, _ = cases()[case]
    guide = FamilyGuide(model, families.mean_scale, encoder)
    told = {"num_samples": 64, "num_steps": 60, "vectorized": True}
    found = measure(model, guide, *args, **told)
    assert close(row(found, "beyond_gaussian"), 0.0, 1e-4) and sums(found, found.elbo)
    assert (row(found, "amortization_gap") < 0).all() and (row(found, "prior_cost") < 0).all()
    if case == "one vector":
        (x,) = args
        named = measure(lambda *, x: model(x), WithoutNames(guide), kwargs={"x": x}, **told)
        assert close(named.log_likelihood, found.log_likelihood, 1e-4)


class WithoutNames(FamilyGuide):
    """The same guide, called by keyword."""

    def __new__(cls, guide):
        return FamilyGuide(lambda *, x: guide.model(x), guide.family, Named(guide.encoder))


class Named(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, *, x):
        return self.encoder(x)


class Grid:
    """A latent of one dimension, all integrals over which are sums over a grid."""

    def __init__(self, log_joint, log_likelihood, reach=12.0):
        self.z = torch.linspace(-reach, reach, 6001)
        self.width = float(self.z[1] - self.z[0])
        self.joint, self.likelihood = log_joint(self.z), log_likelihood(self.z)  # (data, grid)
        self.log_p = self.joint.logsumexp(-1) + math.log(self.width)
        self.posterior = torch.softmax(self.joint, -1)

    @property
    def noise(self):
        return (self.posterior * self.likelihood).sum(-1)

    def elbo(self, datum, loc, scale):
        log_q = dist.Normal(loc, scale).log_prob(self.z)
        q = torch.softmax(log_q, -1)
        return float((q * (self.joint[datum] - log_q)).sum())

    def best(self, datum, start, scale=None):
        """The ELBO of the best Gaussian, or of the best one of a fixed scale."""

        def loss(raw):
            return -self.elbo(datum, raw[0], math.exp(raw[1]) if scale is None else scale)

        first = [start, -0.5] if scale is None else [start]
        return -minimize(loss, first, method="Nelder-Mead", options={"xatol": 1e-5}).fun


def test_a_curved_decoder_against_quadrature():
    """Every row of each datum is within 5 of its errors.

    The searches end within 0.01 nats of the optimum of their draws. With 4096 draws the bias of
    matched draws, of order 8 / 4096 of what a datum's terms vary, is below a hundredth of a nat.
    """
    torch.manual_seed(3)
    decoder = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 6))
    for weight in decoder.parameters():
        weight.data *= 2
    model = VAE(decoder, 1, likelihoods.Bernoulli())
    (x,), _ = simulate(model, torch.zeros(8, 6), seed=1)

    def log_likelihood(z):
        return dist.Bernoulli(logits=decoder(z[:, None])).log_prob(x[:, None]).sum(-1).detach()

    def log_joint(z):
        return log_likelihood(z) + dist.Normal(0.0, 1.0).log_prob(z)

    grid = Grid(log_joint, log_likelihood)
    guide = FamilyGuide(model, families.mean_scale, mlp(6, 8))
    found = measure(model, guide, x, num_samples=4096, num_steps=200)

    def near(value, expected, error):
        return bool((np.abs(value - np.asarray(expected)) < 5 * error + 0.02).all())

    errors = found.nats_se
    assert errors.max() < 0.1
    assert near(found.log_likelihood, grid.log_p, found.log_likelihood_se)
    assert near(row(found, "noise"), grid.noise, errors.sel(row="noise"))
    prior = torch.softmax(dist.Normal(0.0, 1.0).log_prob(grid.z), -1)
    nothing = (prior * grid.likelihood).sum(-1)
    assert near(found.optimum.sel(family="noise_only"), nothing, found.optimum_se[0])
    for family, scale in (("mean_only", 1.0), ("mean_scale", None)):
        best = [max(grid.best(n, start, scale) for start in (-1.0, 1.0)) for n in range(8)]
        one = found.sel(family=family)
        assert near(one.optimum, best, one.optimum_se), (one.optimum.values, best)
    one = found.sel(family="full_rank")  # of a single coordinate it is mean_scale
    assert near(one.optimum, best, one.optimum_se)
    point = grid.joint.max(-1).values
    assert close(row(found, "point"), point, 1e-3)
    assert sums(found, found.elbo)
    known = gaps(model, guide, x, num_samples=4096, num_steps=200, progress=False)
    error = np.hypot(errors.sel(row="amortization_gap"), known.amortization_se)
    assert near(row(found, "amortization_gap"), -known.amortization, error)


def test_two_modes_of_which_a_gaussian_holds_one():
    """The posterior is half of N(-8, 1) and half of N(8, 1): KL(N(8, 1) || it) is log 2.

    What the other half adds to that is below exp(-8^2 / 2). The data say nothing of the latent, so
    that the draws of the prior are those of the posterior: they find what the Gaussian misses.
    """
    mode = dist.Normal(torch.tensor([-8.0, 8.0]), 1.0)
    prior = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), mode)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(0.0 * z[..., None], 1.0).to_event(1), obs=x)

    model.vectorized = True
    x = torch.randn(5, 2)
    guide = FamilyGuide(model, families.mean_scale, nn.Linear(2, 3)).setup(x)
    with torch.no_grad():
        for part in (guide.heads["z"].loc.linear, guide.heads["z"].scale.linear):
            part.weight.zero_()
            part.bias.fill_(7.0 if part is guide.heads["z"].loc.linear else 0.3)
    log_p = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    found = measure(model, guide, x, num_samples=2048)
    assert close(row(found, "noise"), log_p, 1e-9)
    assert close(row(found, "prior_cost"), 0.0, 1e-9)
    # 2048 draws of a log density whose sd is that of a squared normal, sqrt(1/2): 5 errors, 0.08
    for name, expected in (("mean_channel", -math.log(2)), ("beyond_gaussian", math.log(2))):
        assert close(row(found, name), expected, 0.08), row(found, name)
    for name in ("scale_channel", "correlations"):
        assert close(row(found, name), 0.0, 0.08)
    assert close(found.log_likelihood, log_p, 1e-9)
    assert found.attrs["notes"] == []
    blind = measure(model, guide, x, families=["mean_scale"], log_likelihood=log_p)
    assert close(row(blind, "beyond_mean_scale"), math.log(2), 0.15)
    assert "miss up to 0.69 nats of the log p(x) that was given" in blind.attrs["notes"][0]


def test_draws_from_the_prior_find_the_mode_that_the_best_member_misses():
    """Only the square of z is seen. Quadrature tells all; 4096 draws of the prior are within 5
    errors, and so is the noise, which is the same in both modes."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.2), obs=x)

    model.vectorized = True
    x = torch.tensor([1.0, 1.5, 2.0])

    def log_likelihood(z):
        return dist.Normal(z**2, 0.2).log_prob(x[:, None])

    grid = Grid(lambda z: log_likelihood(z) + dist.Normal(0.0, 1.0).log_prob(z), log_likelihood)
    guide = FamilyGuide(model, families.mean_scale, nn.Unflatten(0, (-1, 1))).setup(x)
    with torch.no_grad():
        guide.heads["z"].loc.linear.bias.fill_(1.0)
    found = measure(model, guide, x, num_samples=4096)
    (note,) = found.attrs["notes"]
    assert "draws from the prior found up to 0." in note and "for all the data" not in note
    assert within(found.log_likelihood, grid.log_p.numpy(), found.log_likelihood_se)
    assert within(row(found, "noise"), grid.noise.numpy(), found.nats_se.sel(row="noise"))
    best = [grid.best(datum, 1.0) for datum in range(3)]
    assert (abs(found.optimum.sel(family="mean_scale") - best) < 0.02).all()
    assert (row(found, "beyond_gaussian") > math.log(2) - 0.1).all()


def test_the_posterior_mean_of_weighted_draws_and_its_error():
    """Importance draws of a normal from a wider one: 5 errors, which are those that seeds show."""

    def one(seed):
        z = 1.5 * torch.randn(8, 256, 1, generator=torch.Generator().manual_seed(seed))
        weight = dist.Normal(0.5, 1.0).log_prob(z) - dist.Normal(0.0, 1.5).log_prob(z)
        groups = posterior_mean(weight, z)
        return float(groups.mean()), float(groups.std() / math.sqrt(8))

    values, errors = np.array([one(seed) for seed in range(200)]).T
    assert abs(values.mean() - 0.5) < 5 * values.std() / math.sqrt(200)
    # the ratio of the variances is that of two chi-squares of 199 and 1400 degrees of freedom
    assert 0.55 < values.var() / (errors**2).mean() < 1.6
    assert torch.allclose(posterior_mean(torch.zeros(8, 4, 2), torch.ones(8, 4, 2)), torch.ones(()))


GLOBALS = ["noise_only", "mean_only", "mean_scale", "full_rank", "deterministic"]


@pytest.mark.parametrize("name", GLOBALS)
def test_a_regression_in_nats_of_all_the_data(name):
    reg, family = Regression(rows=40, columns=3), families.LADDER[name]
    X, y = reg.args
    guide = FamilyGuide(reg.model, family)
    if name not in ("noise_only", "mean_only"):
        fit(reg.model, guide, reg.args, progress=False)
    guide.setup(*reg.args)
    with traceless(reg.model, guide, moved=False):
        found = measure(reg.model, guide, *reg.args)
    known = {
        each: closed_form.regression(X, y, 0.7, 0.5, families.LADDER[each])
        for each in {*LADDER, name, "deterministic"}
    }
    for each in LADDER:
        assert close(found.optimum.sel(family=each), known[each].objective)
    evidence = known[name].log_likelihood
    assert close(found.log_likelihood, evidence) and "datum" not in found.dims
    assert close(row(found, "point"), known["deterministic"].objective)
    C, m = reg.P.inverse(), reg.mean(X, y)
    noise = ((y - X @ m).square().sum() + (X @ C @ X.T).trace()) / 0.49
    noise = -(noise + 40 * math.log(2 * math.pi * 0.49)) / 2
    assert close(row(found, "noise"), noise)
    # KL both ways between N(0, I / 4) and N(m, C)
    both = (0.25 * reg.P).trace() + (4 * C).trace() - 6 + m @ reg.P @ m + 4 * m @ m
    assert close(row(found, "prior_cost"), -both / 2)
    assert row(found, "mean_channel") < 0  # a sd of 1, where that of the prior is 1/2
    assert found.attrs["unit"] == "nats of all the data" and not found.attrs["notes"]
    if name == "deterministic":
        assert sums(found, evidence) and close(row(found, "guide_point"), known[name].objective)
        return
    assert close(row(found, "family_gap"), -known[name].gap)
    assert sums(found, found.elbo)
    if name == "mean_only":  # which was not fitted
        with torch.no_grad():
            away = guide.heads["weight"].loc.raw - m
        short = -(away @ reg.P @ away) / 2
        assert short < -1 and close(row(found, "optimization_gap"), short)
    else:
        assert close(row(found, "optimization_gap"), 0.0, 1e-4)


def test_globals_of_a_plain_function_whose_parameters_stay_where_they_are():
    """Also those of `pyro.param`, and of a module that it closes over."""
    inside = nn.Linear(2, 2)
    X, y = torch.randn(30, 2), torch.randn(30)

    def model(X, y, *, offset=0.0):
        pyro.module("inside", inside)
        scale = pyro.param("user_scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(inside(X) @ w + offset, scale), obs=y)

    store = pyro.get_param_store()
    with store.scope():
        pyro.param("user_scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        guide = FamilyGuide(model, families.mean_scale).setup(X, y)
        before = {k: v.detach().clone() for k, v in inside.state_dict().items()}
        wanted = [p.requires_grad for p in (*inside.parameters(), *guide.parameters())]
        told = {"kwargs": {"offset": 0.3}}
        found = measure(model, guide, X, y, **told)
        assert [p.requires_grad for p in (*inside.parameters(), *guide.parameters())] == wanted
        assert all(torch.equal(before[k], v) for k, v in inside.state_dict().items())
        assert pyro.param("user_scale").item() == pytest.approx(0.7)
        assert pyro.param("user_scale").requires_grad and all(wanted)
        assert all(p.grad is None for p in (*inside.parameters(), *guide.parameters()))
        with torch.no_grad():
            Z = inside(X)
    P = Z.T @ Z / 0.49 + torch.eye(2)
    marginal = dist.MultivariateNormal(torch.zeros(30), Z @ Z.T + 0.49 * torch.eye(30))
    assert close(found.log_likelihood, marginal.log_prob(y - 0.3).item(), 1e-5)
    gap = (P.diagonal().log().sum() - P.logdet()) / 2
    assert close(row(found, "correlations"), gap, 1e-5)
    assert row(found, "optimization_gap") < -0.1


def test_locals_of_a_model_with_a_global_are_given_one_draw_of_it():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 0.3))
            pyro.sample("x", dist.Normal(z[..., None], 0.7).to_event(1), obs=x)

    x = torch.randn(6, 1)
    guide = FamilyGuide(model, families.mean_scale, nn.Linear(1, 2)).setup(x)
    found = measure(model, guide, x, num_steps=60, num_samples=32)
    known = gaps(model, guide, x, num_steps=60, num_samples=32, progress=False)
    assert close(found.log_likelihood, known.log_likelihood, 1e-5)
    assert close(found.elbo, known.elbo) and sums(found, found.elbo)
    assert close(row(found, "amortization_gap"), -known.amortization, 1e-5)
    assert found.attrs["unit"] == "nats per datum"


def test_a_guide_with_networks_of_its_own_is_a_rung_of_its_own():
    linear = Linear(size=4)
    guide = FamilyGuide(linear.model, families.flow, mlp(5, 4))
    ladder = [*LADDER, "flow"]
    few = {"num_samples": 32, "num_steps": 20}
    found = measure(linear.model, guide, linear.x, families=ladder, **few)
    assert found.row.values[5:8].tolist() == ["flow", "beyond_flow", "family_gap"]
    assert close(row(found, "family_gap"), -row(found, "beyond_flow"), 1e-12)
    assert sums(found, found.elbo)
    own = FamilyGuide(linear.model, Own(lambda loc: dist.Normal(loc, 1.0)), mlp(5, 4))
    found = measure(linear.model, own, linear.x, families=["noise_only", "mean_only"], **few)
    assert found.row.values[4:6].tolist() == ["family_gap", "amortization_gap"]
    assert sums(found, found.elbo)


def test_nothing_moves_and_equal_calls_give_equal_numbers():
    linear = Linear(size=4)
    guide = linear.guide(families.mean_scale, error=0.1)
    call = partial(measure, linear.model, guide, linear.x, num_steps=9, num_samples=32)
    with traceless(linear.model, guide, moved=False):
        first = call()
    assert first.equals(call()) and not first.equals(call(seed=1))


def test_the_table_says_in_words_what_each_row_is():
    linear = Linear(size=4)
    guide = linear.guide(families.mean_scale, error=0.1)
    found = account(linear.model, guide, linear.x, num_samples=32, num_steps=9, progress=False)
    text = str(found)
    assert all(name in text for name in ROWS) and "nats per datum, a mean of 4" in text
    assert "log p(x)" in text and "ELBO of the guide" in text and "(not in the sum) max" in text
    assert f"{float(found.dataset.elbo.mean()):.3f}" in text and "nan" not in text
    assert {"nats", "mean", "running", "log_likelihood"} <= set(found.dataset)
    assert all("unit" in found.dataset[name].attrs for name in ("nats", "optimum", "khat"))
    with pytest.raises(AttributeError):
        found.dataset = None


def told(khat=0.1, prior=0.0, low=0.0, kinds=("mean_scale", "full_rank"), exact=False):
    """What is said where one of three data has such numbers."""
    ones = torch.zeros(3)
    rungs = {"mean_scale": torch.zeros(8, 3), "full_rank": torch.zeros(8, 3)}
    rungs["full_rank"][:, 1] = -low
    shapes = torch.tensor([0.1, khat, math.nan])
    more = torch.tensor([0.0, prior, 0.0])
    zero = torch.zeros(8, 3)
    found = Measured(rungs, zero, ones, ones, ones, shapes, ones, zero, zero, more)
    return notes_of(found, dict(zip(rungs, kinds, strict=True)), exact=exact)


def test_what_cannot_be_trusted_is_said():
    assert told() == []
    (note,) = told(khat=0.71)
    assert "k-hat is above 0.7 for 1 of 3 data" in note and "understated" in note
    assert "found up to 0.5 nats" in told(prior=0.5)[0]
    (note,) = told(low=0.2)
    assert "below mean_scale, which full_rank holds, by up to 0.2 nats for 1 of 3 data" in note
    assert told(low=0.2, kinds=("full_rank", "mean_scale")) == []  # names of the caller's own
    (note,) = told(khat=0.71, exact=True)  # a given log p(x) is not understated
    assert note == "k-hat is above 0.7 for 1 of 3 data: `noise` may be off there"
    assert told(low=1e-4) == []  # no more than a search may end short


def test_a_rung_is_held_against_all_that_it_holds_not_only_the_one_before():
    rungs = {"wide": torch.zeros(8, 1), "other": -torch.ones(8, 1), "widest": -torch.ones(8, 1)}
    zero, one = torch.zeros(8, 1), torch.zeros(1)
    found = Measured(rungs, zero, one, one, one, one, one, zero, zero, one)
    kinds = {"wide": "mean_scale", "other": "student_t", "widest": "full_rank"}
    (note,) = notes_of(found, kinds)
    assert "below wide, which widest holds, by up to 1 nats for all the data" in note


def test_names_of_the_ladder_for_other_families_do_not_name_the_rows():
    linear = Linear(size=3)
    swapped = {"mean_scale": "full_rank", "full_rank": "mean_scale"}
    guide = linear.guide(families.mean_scale, error=0.1)
    found = measure(linear.model, guide, linear.x, families=swapped)
    assert found.row.values[1:4].tolist() == ["mean_scale", "full_rank", "beyond_full_rank"]
    assert close(row(found, "mean_scale") + row(found, "noise"), linear.log_p)
    assert found.attrs["notes"] == []


def test_a_family_of_the_same_name_as_that_of_the_guide_is_another_one():
    """The sds of the two families are told apart by what their heads make, not by their names."""
    linear = Linear(size=4)
    narrow, wide = (Own(lambda loc, sd=sd: dist.Normal(loc, sd)) for sd in (0.5, 1.0))
    assert narrow.name == wide.name
    guide = FamilyGuide(linear.model, narrow, mlp(5, 4))
    few = {"num_samples": 32, "num_steps": 20}
    with pytest.raises(ValueError, match="families: expected families each member"):
        measure(linear.model, guide, linear.x, families=["noise_only", wide], **few)
    found = measure(linear.model, guide, linear.x, families=["noise_only", narrow], **few)
    assert sums(found, found.elbo)


@pytest.mark.parametrize("name", ["mean_scale", "noise_only"])
def test_discrete_latents_are_summed_out_by_all_rungs(name):
    """A guide that is the prior draws the class, and pays for that in its last two rows.

    Against quadrature. Matched draws of a curved term have a bias of order 8 / num_samples of its
    spread, some tenths of a nat with 64 draws.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(z + 3 * k, 0.5), obs=x)

    x = torch.tensor([0.0, 4.0])

    def log_likelihood(z):
        parts = [math.log(p) + dist.Normal(z + m, 0.5).log_prob(x[:, None]) for p, m in CLASSES]
        return torch.logaddexp(*parts)

    grid = Grid(lambda z: log_likelihood(z) + dist.Normal(0.0, 1.0).log_prob(z), log_likelihood)
    prior = torch.softmax(dist.Normal(0.0, 1.0).log_prob(grid.z), -1)
    summed = (prior * grid.likelihood).sum(-1)
    drawn = [
        sum(p * (prior * dist.Normal(grid.z + m, 0.5).log_prob(each)).sum() for p, m in CLASSES)
        for each in x
    ]
    guide = FamilyGuide(model, name, nn.Unflatten(0, (-1, 1))).setup(x)
    found = measure(model, guide, x, num_samples=64, num_steps=10)
    nothing = found.sel(family="noise_only")
    assert within(nothing.optimum, summed.numpy(), nothing.optimum_se + 0.1)
    assert sums(found, found.elbo)
    if name == "noise_only":
        assert within(found.elbo, np.array(drawn), found.elbo_se + 0.5)
        assert (found.elbo < nothing.optimum - 2).all()


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0])
def test_a_point_of_a_density_without_a_maximum_is_told_from_one_that_has_it(size):
    """A Beta(0.5, 0.5) density is infinite at its ends, where three equal coins lead.

    Of a Beta(a, a) with k of three heads the mode is (k + a - 1) / (3 + 2a - 2).
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(torch.tensor(size), torch.tensor(size)))
            pyro.sample("x", dist.Bernoulli(z[..., None]).to_event(1), obs=x)

    model.vectorized = True
    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    guide = FamilyGuide(model, families.mean_scale, nn.Linear(3, 4)).setup(x)
    found = measure(model, guide, x, num_samples=64)
    said = [note for note in found.attrs["notes"] if "found no maximum" in note]
    heads = x.sum(-1)
    mode = (heads + size - 1) / (1 + 2 * size)
    known = dist.Beta(size, size, validate_args=False).log_prob(mode) + torch.xlogy(heads, mode)
    known = known + torch.xlogy(3 - heads, 1 - mode)
    assert close(row(found, "point")[1], known[1], 1e-6)
    if size < 1:
        assert len(said) == 1 and "for 2 of 3 data: log p(x, z) may be infinite" in said[0]
    else:
        assert not said and close(row(found, "point"), known, 1e-6)


def test_a_maximum_far_out_is_one():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(50.0, 0.8))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    model.vectorized = True
    x = torch.tensor([49.0, 51.0])
    guide = FamilyGuide(model, "deterministic", nn.Unflatten(0, (-1, 1))).setup(x)
    with torch.no_grad():
        guide.heads["z"].v.linear.weight.fill_(1.0)
        guide.heads["z"].v.linear.bias.zero_()
    found = measure(model, guide, x, num_samples=64)
    assert not [note for note in found.attrs["notes"] if "maximum" in note]


CLASSES = [(0.3, 0.0), (0.7, 3.0)]

LINEAR = Linear(size=3)
POINT = "families: expected families with a density, got "
REFUSED = [
    ({"families": ["mean_scale", "deterministic"]}, ValueError, POINT + "deterministic"),
    ({"families": []}, ValueError, "families: expected at least 1"),
    ({"families": "full_rank"}, ValueError, "families: expected at least 1"),
    ({"families": ["bayes"]}, TypeError, "families: expected a guide family"),
    ({"families": ["flow"]}, ValueError, "families: expected families each member .* got flow"),
    ({"families": ["mean_only", "mean_only"]}, ValueError, "families: expected different"),
    ({"num_samples": 8}, ValueError, "num_samples: .* at least 16, got 8"),
    ({"num_steps": 0}, ValueError, "num_steps: .* got 0"),
    ({"seed": None}, TypeError, "seed: expected a whole number, got None"),
    ({"log_likelihood": [0.0]}, ValueError, "log_likelihood: expected 3 finite numbers, one per"),
    ({"log_likelihood": [0.0, 0.0, math.nan]}, ValueError, "log_likelihood: .* with 1 that are"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_input(options, error, message):
    guide = LINEAR.guide(families.mean_scale)
    few = {"num_steps": 1, "num_samples": 16, "progress": False}
    with pytest.raises(error, match=message):
        account(LINEAR.model, guide, LINEAR.x, **few | options)


def test_guides_that_have_no_account():
    model = VAE(nn.Linear(2, 3), 2, likelihoods.Normal(1e-200))
    guide = FamilyGuide(model, families.mean_scale, nn.Linear(3, 2))
    with pytest.raises(ValueError, match="model or guide: expected a finite ELBO of every datum"):
        measure(model, guide, torch.ones(4, 3), num_steps=1, num_samples=16)
    with pytest.raises(ValueError, match="guide: expected a FamilyGuide, got AutoNormal"):
        account(LINEAR.model, AutoNormal(LINEAR.model), LINEAR.x)
    reg = Regression(rows=6, columns=2)
    with pytest.raises(ValueError, match=POINT + "zero, whose members are points"):
        measure(reg.model, FamilyGuide(reg.model, "mean_scale"), *reg.args, families=["zero"])
    with pytest.raises(ValueError, match="log_likelihood: expected a finite number"):
        guide = FamilyGuide(reg.model, "mean_scale")
        measure(reg.model, guide, *reg.args, families=["full_rank"], log_likelihood=[1.0, 2.0])
