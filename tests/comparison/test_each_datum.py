"""Accounts of latents of each datum: against closed forms, quadrature and `gaps`."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from accounts import LADDER, ROWS, Grid, measure, row, sums
from cases import LONG, cases
from linear import Linear, close, hierarchy, holes, observed_only, within
from torch import nn

from ppvae import (
    VAE,
    FamilyGuide,
    closed_form,
    families,
    gaps,
    likelihoods,
    simulate,
)
from ppvae.nn import mlp

CLASSES = [(0.3, 0.0), (0.7, 3.0)]
GUIDES = ["noise_only", "mean_only", "shared_scale", "mean_scale", "full_rank", "deterministic"]


@pytest.mark.parametrize("name", GUIDES if LONG else ["noise_only", "mean_scale", "deterministic"])
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


def test_batches_missing_entries_and_single_precision():
    linear = Linear(size=4)
    guide = linear.guide(families.mean_scale, error=0.1)
    few = {"families": LADDER[2:]}
    whole, cut = (measure(linear.model, guide, linear.x, batch_size=b, **few) for b in (256, 3))
    assert close(whole.nats, cut.nats, 2e-6)
    assert close(cut.mean_se_data, cut.nats.std("datum", ddof=1) / math.sqrt(4), 1e-9)
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
    single = measure(*args, **few)
    assert close(single.optimum, whole.optimum, 1e-4) and close(single.nats, whole.nats, 1e-2)


PLATES = ["one vector", "steps inside"] + ["left of pixels", "told rows"] * LONG


@pytest.mark.parametrize("case", PLATES)
def test_full_rank_is_the_posterior_of_every_linear_gaussian_model(case):
    """Plates, subsamples, keyword arguments: nothing is left beyond it."""
    model, args, encoder, _ = cases()[case]
    guide = FamilyGuide(model, families.mean_scale, encoder)
    told = {"num_samples": 64, "num_steps": 40, "vectorized": True}
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
    (x,), _ = simulate(model, torch.zeros(5, 6), seed=1)

    def log_likelihood(z):
        return dist.Bernoulli(logits=decoder(z[:, None])).log_prob(x[:, None]).sum(-1).detach()

    def log_joint(z):
        return log_likelihood(z) + dist.Normal(0.0, 1.0).log_prob(z)

    grid = Grid(log_joint, log_likelihood)
    guide = FamilyGuide(model, families.mean_scale, mlp(6, 8))
    found = measure(model, guide, x, num_samples=4096, num_steps=90)

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
        best = [max(grid.best(n, start, scale) for start in (-1.0, 1.0)) for n in range(5)]
        one = found.sel(family=family)
        assert near(one.optimum, best, one.optimum_se), (one.optimum.values, best)
    one = found.sel(family="full_rank")  # of a single coordinate it is mean_scale
    assert near(one.optimum, best, one.optimum_se)
    point = grid.joint.max(-1).values
    assert close(row(found, "point"), point, 1e-3)
    assert sums(found, found.elbo)
    known = gaps(model, guide, x, num_samples=4096, num_steps=90, progress=False)
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


def test_locals_of_a_model_with_a_global_are_given_one_draw_of_it():
    x, few = torch.randn(6, 1), {"num_steps": 24, "num_samples": 16, "vectorized": False}
    guide = FamilyGuide(hierarchy, families.mean_scale, nn.Linear(1, 2)).setup(x)
    found = measure(hierarchy, guide, x, families=["noise_only", "mean_scale"], **few)
    known = gaps(hierarchy, guide, x, **few, progress=False)
    assert close(found.log_likelihood, known.log_likelihood, 1e-5)
    assert close(found.elbo, known.elbo) and sums(found, found.elbo)
    assert close(row(found, "amortization_gap"), -known.amortization, 1e-5)
    assert found.attrs["unit"] == "nats per datum"


@pytest.mark.parametrize("name", ["mean_scale"] * LONG + ["noise_only"])
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

    model.vectorized = True  # else each draw is a run of all values of the class
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


@pytest.mark.parametrize("size", [0.5, 1.0] + [2.0] * LONG)
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
    few = {"families": ["mean_scale"], "num_samples": 64, "num_steps": 100}
    found = measure(model, guide, x, **few)
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


def test_a_search_that_ends_too_early_says_so():
    """Its judgement is no less than what it is short of; with more steps it is short of nothing.

    The posterior is narrow and correlated: its precisions are from 51 to 1739.
    """
    linear = Linear(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), 6, 0.1)
    guide = linear.guide(families.mean_scale, error=0.1)
    told = {"families": ["mean_scale"], "num_samples": 64}
    best = linear.log_p - linear.gap(torch.diag(linear.best_sd**2)).item()
    early = measure(linear.model, guide, linear.x, num_steps=12, **told)
    short = best - early.optimum.sel(family="mean_scale").values
    (note,) = (note for note in early.attrs["notes"] if "still rose" in note)
    said = re.search("short of the best of mean_scale by ([^ ,]+)", note)
    assert 1e-2 < short.max() < float(said[1])
    found = measure(linear.model, guide, linear.x, num_steps=100, **told)
    assert close(found.optimum.sel(family="mean_scale"), best, 1e-4)
    assert not [note for note in found.attrs["notes"] if "still rose" in note]


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
    found = measure(model, guide, x, families=["noise_only"], num_samples=64)
    assert not [note for note in found.attrs["notes"] if "maximum" in note]
