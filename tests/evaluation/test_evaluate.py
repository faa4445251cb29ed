"""Evaluation against models where every number has a closed form, and the units of all numbers."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from cases import CASES, FAMILIES, cases, in_turn
from linear import Linear, close, within
from pyro.distributions import constraints
from scipy import integrate

from ppvae import Family, FamilyGuide, evaluate, families, reading
from ppvae.evaluation.measures import PER_DATUM, PER_LATENT
from ppvae.families.family import cap
from ppvae.objectives import weights

W = [[1.3, 0.4], [-0.2, 0.9], [0.5, -1.1], [0.8, 0.6]]


# --- the linear model -----------------------------------------------------------------------------


def test_with_the_exact_guide_every_draw_gives_log_p():
    linear = Linear(W, noise=0.7)
    found = evaluate(linear.model, linear.exact(), linear.x, num_samples=8, batch_size=7)
    assert close(found.log_likelihood, linear.log_p, 1e-10) and close(found.ess, 8.0, 1e-8)
    assert (found.khat == 0).all() and found.bound == found.stochastic == 1
    # the rate is exact and the distortion an average: their sum has the spread of 8 draws
    spread = math.sqrt((linear.P.trace() - 2).item())
    assert close(found.elbo, linear.log_p, 5 * spread * 3 / math.sqrt(8))


@pytest.mark.parametrize("family", ["mean_only", "mean_scale"])
def test_every_measure_is_that_of_the_closed_form(family):
    linear = Linear(W, noise=0.7)
    sd = torch.ones(2) if family == "mean_only" else linear.best_sd
    guide = linear.guide(families.LADDER[family])
    found = evaluate(linear.model, guide, linear.x, num_samples=4000)
    S, m2 = torch.diag(sd**2), linear.mean.square()
    kl = 0.5 * (sd**2 + m2 - 1 - 2 * sd.log())
    assert close(found.rate, kl.sum(-1), 1e-10) and close(found.kl, kl.mean(0), 1e-10)
    assert close(found.mean_variance, linear.mean.var(0, correction=0), 1e-10)
    away = (linear.mean - linear.mean.mean(0)).square()
    assert close(found.mean_variance_se, away.std(0, correction=0) / math.sqrt(20), 1e-10)
    assert close(found.objective, -(found.rate + found.distortion), 1e-12)
    assert found.elbo.equals(found.objective) and found.active.all()
    assert found.family == family
    assert found.channels == ("loc" if family == "mean_only" else "loc, scale")
    # the distortion's variance over draws of the guide: quadratic plus linear part
    G = linear.P - torch.eye(2)
    variance = 0.5 * (G @ S @ G @ S).trace() + (S @ G @ G).trace() * m2.sum(-1).max()
    error = math.sqrt(variance / (20 * 4000))
    gap = (linear.log_p - found.elbo).mean()
    assert within(gap, linear.gap(S).item(), error)
    # importance sampling: from below and near, with an error by the delta method
    difference = found.log_likelihood - linear.log_p
    assert (abs(difference) < 5 / found.ess**0.5).all() and abs(difference.mean()) < 0.01
    single = evaluate(linear.model, guide, linear.x, num_samples=200, vectorized=False)
    for name in ("rate", "mean_variance", "kl"):
        assert close(single[name], found[name], 1e-10)
    error = math.sqrt(variance * (1 / 200 + 1 / 4000) / 20)
    assert within((found.distortion - single.distortion).mean(), 0.0, error)
    for name in ("mutual_information", "aggregate_kl"):
        error = math.hypot(found[f"{name}_se"], single[f"{name}_se"])
        assert within(found[name] - single[name], 0.0, error)


def test_units_and_a_latent_whose_mean_does_not_move():
    """Every number has a unit, and every one that is registered is there."""
    linear = Linear(W, noise=0.7)
    guide = linear.guide(families.mean_scale)
    guide.heads["z"].loc.linear.weight.data[1] = 0
    found = evaluate(linear.model, guide, linear.x, num_samples=2)
    assert found.active.values.tolist() == [True, False]
    assert found.latent.values.tolist() == [0, 1] and found.num_samples == 2
    nats = ["distortion", "rate", "objective", "elbo", "log_likelihood", "terms"]
    nats += ["mutual_information", "mutual_information_se", "aggregate_kl", "aggregate_kl_se"]
    units = dict.fromkeys(nats, "nats per datum") | {"ess": "draws", "khat": "", "kl": "nats"}
    units |= dict.fromkeys(["mean_variance", "mean_variance_se"], "squares of the latent")
    assert {name: found[name].attrs["unit"] for name in found} == {**units, "active": ""}
    assert {*PER_DATUM, *PER_LATENT} < set(found)
    needs = {name for name, measure in PER_DATUM.items() if measure.density}
    assert needs == {"elbo", "log_likelihood", "ess", "khat"}


LOCAL = [n for n in CASES if n not in ("regression", "hierarchy", "own rows")]
KINDS = ["mean_scale", "full_rank", "flow", "noise_only", "deterministic"]
OTHERS = [("one vector", name) for name in FAMILIES if name not in KINDS]


@pytest.mark.parametrize(("name", "family"), in_turn(LOCAL, KINDS, 2) + OTHERS)
def test_terms_by_site_sum_to_the_objective(name, family):
    """For every family and model, in minibatches; and what a point lacks."""
    case = cases()[name]
    guide = FamilyGuide(case.model, FAMILIES[family], case.encoder)
    found = evaluate(case.model, guide, *case.args, num_samples=6, batch_size=4)
    assert abs(found.terms.sum("site") - found.objective).max() < 1e-6
    assert abs(found.terms.sel(site="x") + found.distortion).max() < 1e-6
    assert set(found.site.values) - {"guide"} == {*case.latents, "x"}
    size = sum(math.prod(shape) for shape in case.latents.values()) // found.sizes["datum"]
    assert found.sizes["latent"] == size
    point = family in ("deterministic", "zero")
    assert found.bound == found.stochastic == (not point)
    for measure in ("elbo", "log_likelihood", "ess", "mutual_information", "aggregate_kl_se"):
        assert found[measure].isnull().all() == point
    if not point:
        assert float(found.mutual_information) <= math.log(found.sizes["datum"]) + 1e-12
        total = float(found.mutual_information + found.aggregate_kl)
        assert total == pytest.approx(float(found.rate.mean()))


# --- what the latents tell ------------------------------------------------------------------------


def pair(family, *, loc=1.0, scale=None):
    """A decoder x = z with noise 1, and a guide with mean `loc * x` and a fixed scale."""
    linear = Linear([[1.0]], size=1, noise=1.0, b=torch.zeros(1))
    guide = linear.guide(family, scale)
    if family.channels:
        guide.heads["z"].loc.linear.weight.data.fill_(loc)
    return linear.model, guide


@pytest.mark.parametrize(("scale", "size"), [(0.1, 20), (0.5, 60), (1.0, 60)])
def test_mutual_information_is_that_of_the_mixture(scale, size):
    """With one latent the aggregate posterior is a mixture on the line: quadrature is exact."""
    x = 1.5 * torch.randn(size, 1) + 0.3
    found = evaluate(*pair(families.mean_scale, scale=scale), x, num_samples=2, batch_size=17)

    def integrand(z):
        away = (z - x.numpy()[:, 0]) / scale
        q = np.exp(-0.5 * away**2).mean() / scale / math.sqrt(2 * math.pi)
        return q * (math.log(q) + 0.5 * z**2 + 0.5 * math.log(2 * math.pi)) if q > 0 else 0.0

    exact, _ = integrate.quad(integrand, -12, 12, points=sorted(x[:, 0].tolist()), limit=500)
    rate = float((0.5 * (scale**2 + x**2 - 1) - math.log(scale)).mean())
    assert float(found.rate.mean()) == pytest.approx(rate)
    assert float(found.mutual_information_se) < 0.16
    assert within(found.aggregate_kl, exact, found.mutual_information_se)
    assert within(found.mutual_information, rate - exact, found.mutual_information_se)


def test_mutual_information_is_at_most_log_n():
    """Narrow posteriors far apart: each draw tells its datum, and log N is all there is to tell."""
    found = evaluate(*pair(families.mean_scale, scale=1e-3), torch.arange(10.0)[:, None])
    assert float(found.mutual_information) == pytest.approx(math.log(10), abs=1e-9)
    assert float(found.mutual_information_se) < 1e-9
    rest = found.rate - math.log(10)
    assert float(found.aggregate_kl_se) == pytest.approx(float(rest.std(ddof=1)) / math.sqrt(10))


@pytest.mark.parametrize("family", ["noise_only", "mean_only"])
def test_a_channel_that_is_not_used_tells_nothing(family):
    found = evaluate(*pair(families.LADDER[family], loc=0.0), torch.randn(30, 1))
    for name in ("mutual_information", "aggregate_kl", "mutual_information_se"):
        assert abs(float(found[name])) < 1e-9
    assert not found.active.any()
    assert found.channels == {"noise_only": "none"}.get(family, "loc")


def test_cap():
    """0.3368 nats: `I = A^2 - E log cosh(A^2 + A eps)`, here as an entropy by quadrature.

    Means at the two ends carry all that there is room for; in between less.
    """

    def density(y):
        return 0.5 * sum(math.exp(-0.5 * (y - m) ** 2) for m in (-1, 1)) / math.sqrt(2 * math.pi)

    entropy, _ = integrate.quad(lambda y: -density(y) * math.log(density(y)), -20, 20)
    capacity = entropy - 0.5 * math.log(2 * math.pi * math.e)
    half = Family(dist.Normal, loc=constraints.interval(-0.5, 0.5), scale=0.5)
    assert cap(families.mean_only_bounded) == pytest.approx(capacity, abs=1e-9)
    assert capacity == pytest.approx(0.3368, abs=5e-5) and cap(half) == pytest.approx(capacity)
    wide = Family(dist.Normal, loc=constraints.interval(-4.0, 4.0), scale=1.0)
    assert 1.0 < cap(wide) < 0.5 * math.log(17)
    assert cap(families.mean_scale) == cap(families.deterministic) == math.inf
    assert cap(families.noise_only) == 0
    x = torch.cat([torch.full((200, 1), -1.0), torch.full((200, 1), 1.0)])
    found = evaluate(*pair(families.mean_only_bounded, loc=40.0), x, num_samples=2)
    assert float(found.mutual_information_se) < 0.03
    assert within(found.mutual_information, found.cap, found.mutual_information_se)


# --- errors, and whether weights can be trusted ---------------------------------------------------


def test_the_error_of_the_variance_of_the_means():
    """Means from N(0, 2.25) known up to noise of variance 0.25: an error of sqrt(2 / N) * 2.5.

    Of 2,000 sets of N = 400 data, whose spread is known to 1.6 % (1 sd).
    """
    rng = np.random.default_rng(0)
    means = 1.5 * rng.standard_normal((400, 2000)) + 0.5 * rng.standard_normal((400, 2000))
    arrays = {"mean": means, "error": np.full_like(means, 0.25)}
    variance, error = PER_LATENT["mean_variance"], PER_LATENT["mean_variance_se"]
    variance, error = variance.function(arrays), error.function(arrays)
    exact = math.sqrt(2 * 2.5**2 / 400)
    assert within(variance.mean(), 2.25 - 2.5 / 400, exact / math.sqrt(2000))
    assert variance.std() == pytest.approx(exact, rel=0.1)
    assert error.mean() == pytest.approx(exact, rel=0.05)
    limit = {"mean": np.zeros((2, 1)), "error": np.full((2, 1), -0.01)}  # a variance of 0.01
    assert not PER_LATENT["active"].function(limit).any()
    assert PER_LATENT["active"].function(limit | {"error": np.full((2, 1), -0.011)}).all()


def follows(x):
    """A guide whose second latent follows from a draw of the first."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("b", dist.Delta(a.log().sum(-1)))


def joint():
    case = cases()["positive"]
    guide = FamilyGuide(case.model, families.full_rank, case.encoder)
    for module in guide.setup(*case.args).heads.modules():
        if isinstance(module, torch.nn.Linear):  # the same q for all data
            torch.nn.init.zeros_(module.weight)
    return guide


@pytest.mark.parametrize("make", [joint, lambda: follows])
def test_the_variance_of_an_estimated_mean_is_not_inflated(make):
    """With few draws the mean of q, where it has no closed form, is noisy: that is taken off."""
    model, guide = cases()["positive"].model, make()
    found = evaluate(model, guide, torch.randn(1500, 3), num_samples=4, vectorized=True)
    error = found.mean_variance_se.values
    assert (found.mean_variance.values < 5 * error + 1e-12).all() and (error < 0.3).all()


def test_the_error_of_the_log_of_a_mean_weight():
    """Its definition, and the spread of 4,000 sets of 400 log-normal weights with sd 0.5."""
    log_w = 0.5 * torch.randn(400, 4000) - 7.0
    error, ess = weights.log_mean_weight_se(log_w), weights.effective_sample_size(log_w)
    w = (log_w + 7.0).exp()
    assert close(error, w.std(0, correction=0) / w.mean(0) / math.sqrt(400), 1e-12)
    assert close(ess, w.sum(0).square() / w.square().sum(0), 1e-8)
    estimate = weights.log_mean_weight(log_w)
    assert estimate.std().item() == pytest.approx(error.square().mean().sqrt().item(), rel=0.06)
    assert abs(estimate.mean().item() - (0.125 - 7.0)) < 0.002
    equal = weights.estimates(torch.full((30, 2), -3.0))
    expected = {"log_likelihood": -3.0, "log_likelihood_se": 0.0, "ess": 30.0, "khat": 0.0}
    assert equal.keys() == expected.keys()
    assert all(close(equal[name], value, 1e-7) for name, value in expected.items())


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_khat_finds_the_shape_of_pareto_weights(k):
    """Weights u^-k have shape k. PSIS adds ten pseudo-observations of 0.5 to its M in the tail."""
    draws, rows = 4000, 100
    tail = 3 * math.sqrt(draws)
    log_w = -k * np.log(np.random.default_rng(0).uniform(size=(rows, draws)))
    expected = (k * tail + 0.5 * 10) / (tail + 10)
    error = (1 + k) / math.sqrt(tail * rows)  # of the maximum likelihood estimate
    khat = weights.khat(torch.as_tensor(log_w).T).mean()
    assert abs(khat - expected) < 5 * error + 0.01  # and its bias, of order 1/M


@pytest.mark.parametrize("size", [30, 225, 226, 1000])
def test_khat_is_that_of_arviz(size):
    """Of tails that are short, long and full of ties, and of weights of which one is all."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((4, size))
    kinds = [normal, -normal.cumsum(1), (2 * normal).round(), 900 * normal, np.maximum(normal, 0.5)]
    rows = np.concatenate([*kinds, rng.standard_cauchy((4, size))])
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        known = np.array([float(array_stats.psislw(-row)[1]) for row in rows])
    # newer versions have none for a tail of six of which two are its smallest value
    told = torch.as_tensor(np.isfinite(known))
    assert told.sum() >= len(rows) - (3 if size == 30 else 0)
    found = weights.khat(torch.as_tensor(rows).T)
    assert found.isfinite().all() and close(found[told], known[told.numpy()], 1e-10)


def test_khat_of_a_tail_of_one_value_is_zero():
    """Where ArviZ has no answer; of a thousand weights the tail is 94."""
    for equal in (94, 95, 500):
        assert weights.khat((torch.arange(1000) >= 1000 - equal).double()).item() == 0
    assert weights.khat((torch.arange(1000) >= 1000 - 93).double()).item() != 0


def test_khat_at_the_edges():
    rng = np.random.default_rng(0)
    equal = 3 + 1e-12 * rng.standard_normal((100, 2))
    assert weights.khat(torch.as_tensor(equal)).tolist() == [0.0, 0.0]
    assert weights.khat(torch.as_tensor(rng.standard_normal((29, 2)))).isnan().all()
    few = weights.khat(torch.as_tensor(rng.standard_normal((30, 2))))
    assert few.isfinite().all() and weights.khat(torch.zeros(30, 2, 3)).shape == (2, 3)
    broken = rng.standard_normal((100, 2))
    broken[3, 0] = np.nan
    assert weights.khat(torch.as_tensor(broken)).isnan().tolist() == [True, False]


@pytest.mark.parametrize(("ratio", "low", "high"), [(0.1, 0.7, 1.2), (0.8, -0.5, 0.5)])
def test_a_guide_that_is_too_narrow_has_a_large_khat(ratio, low, high):
    """N(m, ratio S) for a posterior N(m, S) has weights of shape 1 - ratio."""
    model, guide = pair(families.mean_scale, loc=0.5, scale=math.sqrt(0.5 * ratio))
    found = evaluate(model, guide, torch.randn(40, 1), num_samples=4000)
    assert low < float(found.khat.mean()) < high
    assert ("can be trusted" in reading(found)) == (ratio < 0.5)
