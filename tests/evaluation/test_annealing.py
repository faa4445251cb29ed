"""Annealed importance sampling against closed forms, quadrature and identities."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, cases, in_turn
from linear import Column, Linear, close, local
from pyro.infer.autoguide import AutoNormal

from ppvae import FamilyGuide, annealed_importance, evaluate, families, simulate
from ppvae._scopes import private_modules
from ppvae.evaluation.hmc import Schedule, anneal, tune
from ppvae.evaluation.path import densities
from ppvae.guides.score import terms_at
from ppvae.objectives.trace_terms import terms
from ppvae.programs.runs import opened
from ppvae.programs.tracing import draws_plate

W = [[1.3, 0.4], [-0.2, 0.9], [0.5, -1.1], [0.8, 0.6]]


def measure(*args, **options):
    return annealed_importance(*args, progress=False, **options)


def errors(found, log_p):
    return [found[name].values - log_p for name in ("log_likelihood", "upper")]


# --- the linear model -----------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "number"), [("prior", 150), ("guide", 200)])
def test_both_bounds_reach_the_closed_form(start, number):
    """To 0.02 nats: three standard errors of the mean over 150 data, which are asked for too.

    Importance sampling from the same guide, two standard deviations off, is wrong by 0.2.
    """
    linear = Linear(W, size=150, noise=1.0)
    guide = linear.guide(families.mean_only, shift=2.0)
    options = {"start": start, "latents": linear.true, "num_temperatures": number}
    found = measure(linear.model, guide, linear.x, **options)
    for error in errors(found, linear.log_p):
        assert abs(error.mean()) < 0.02
        assert error.std() / math.sqrt(150) < 0.0067 and abs(error).max() < 0.4
    assert found.ess.min() > 12 and 0.7 < found.acceptance.mean() < 1
    if start == "guide":
        sampled = evaluate(linear.model, guide, linear.x, num_samples=512)
        assert (sampled.log_likelihood.values - linear.log_p).mean() < -0.15
    assert found.attrs == {"num_temperatures": number, "num_chains": 16, "start": start}


def test_the_bounds_enclose_and_close_in():
    """Means over 60 data; those of few temperatures are off by far more than their errors.

    With one temperature, the upper bound is log p(x | z): off by I(x; z), half of log det P.
    """
    linear = Linear(W, size=60, noise=0.1)
    options = {"start": "prior", "latents": linear.true}
    bounds = []
    for number in (1, 4, 16, 64):
        found = measure(linear.model, None, linear.x, num_temperatures=number, **options)
        bounds.append([error.mean() for error in errors(found, linear.log_p)])
    lower, upper = (list(column) for column in zip(*bounds, strict=True))
    assert lower[0] < -5 and upper[0] == pytest.approx(linear.P.logdet().item() / 2, abs=1.0)
    assert lower == sorted(lower) and upper == sorted(upper, reverse=True)
    assert -1 < lower[-1] < 0.05 and -0.05 < upper[-1] < 1


@pytest.mark.parametrize(("number", "vectorized"), [(1, True), (1, False), (5, True), (3, False)])
def test_with_the_exact_guide_every_weight_is_log_p(number, vectorized):
    """log p - log q is the same everywhere, whatever the chains do; minibatches of both kinds."""
    linear = Linear(W, size=10, noise=1.0)
    options = {"num_temperatures": number, "num_chains": 3, "latents": linear.true}
    options |= {"batch_size": 7, "vectorized": vectorized, "num_leapfrog": 1}
    found = measure(linear.model, linear.exact(), linear.x, **options)
    for error in errors(found, linear.log_p):
        assert abs(error).max() < 1e-10
    assert close(found.ess, 3, 1e-8) and found.sizes == {"datum": 10}
    assert found.acceptance.isnull().all() if number == 1 else found.acceptance.min() > 0
    model, guide = linear.model.float(), linear.exact().float()
    single = measure(model, guide, linear.x.float(), num_temperatures=number, num_chains=2)
    assert single.log_likelihood.dtype == "float64" and set(single) < set(found)
    assert close(single.log_likelihood, linear.log_p, 1e-4)  # rounding of sums of about 10


def test_one_temperature_is_importance_sampling():
    """By the delta method the log of a mean weight has variance 1/ess; two independent ones."""
    linear = Linear(W, noise=1.0)
    guide = linear.guide(families.mean_only)
    found = measure(linear.model, guide, linear.x, num_temperatures=1, num_chains=4000)
    sampled = evaluate(linear.model, guide, linear.x, num_samples=4000)
    error = (1 / found.ess + 1 / sampled.ess) ** 0.5
    assert (abs(found.log_likelihood - sampled.log_likelihood) < 5 * error).all()
    assert abs(found.ess.mean() / sampled.ess.mean() - 1) < 0.1


def test_the_path_and_its_weights():
    """Along any frozen path the weight is the sum of rise times log p - log q where the chain is.

    From prior to posterior of the linear model, with transitions too small to move. A path that is
    tuned goes from 0 to 1, rises throughout, and no step passes a quarter of a period.
    """
    linear = Linear(W, noise=1.0)
    guide = FamilyGuide(linear.model, families.noise_only)
    with opened(linear.model, guide, (linear.x,), seed=0) as runs:
        both = densities(runs, runs.args, draws_plate(linear.model, linear.x, draws=6), prior=True)
        start = both.at(both.draw())
        times = torch.tensor([0.0, 0.2, 0.7, 1.0])[:, None].expand(4, 20)
        schedule = Schedule(times, torch.full((4, 20, 2), 1e-12), 2)
        ticks = []
        forth, accepted = anneal(both, start, schedule, ticks.append)
        back, _ = anneal(both, start, schedule.reversed(), ticks.append)
        tuned = tune(both, 12, 3)
        frozen = both.at(start.state)
    x_given_z = dist.Normal(linear.model.decoder(start.state), 1.0).log_prob(linear.x).sum(-1)
    assert close(start.log_ratio, x_given_z.detach()) and close(frozen.log_p, start.log_p, 1e-12)
    assert close(forth, x_given_z.detach(), 1e-9) and close(back, -forth, 1e-9)
    assert ticks == [6] * 6 and close(accepted, 1.0, 1e-9)
    assert (start.state @ torch.ones(2) == (-start.slope_q) @ torch.ones(2)).all()  # of N(0, 1)
    middle = start.slope(torch.full((20,), 0.25))
    assert close(middle, 0.75 * start.slope_q + 0.25 * start.slope_p, 1e-12)
    times, steps, leapfrog = tuned
    assert times.shape == (13, 20) and steps.shape == (13, 20, 2) and leapfrog == 3
    assert (times[0] == 0).all() and close(times[-1], 1.0, 1e-12) and (times.diff(dim=0) > 0).all()
    assert (0 < steps).all() and (steps < 2 * math.pi / 2 / 3).all()


# --- other supports and layouts -------------------------------------------------------------------


def _two_sites(x):
    """A positive and a real latent, which the data correlate; the second depends on the first."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(0.0, 0.4))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(a + b, 0.5), obs=x)


def near(z):
    return dist.Normal(z, 0.5)


def prior(name):
    """A Gamma distribution, or a mixture with two modes."""
    if name == "gamma":
        return dist.Gamma(2.0, 1.0)
    kind = dist.Normal if name == "normals" else dist.LogNormal
    parts = kind(torch.tensor([0.1, 1.3]), torch.tensor([0.3, 0.2]))
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), parts)


def by_quadrature(name, x):
    """Log p(x) by the midpoint rule, in the logarithm of a positive latent.

    The second latent of `_two_sites` integrates out: x | a ~ N(2a, 1 + 0.5^2).
    """
    u, x = torch.linspace(-12, 5, 20_001), x[:, None]
    z, slope = (u, 0.0) if name == "normals" else (u.exp(), u)
    if name == "two sites":
        log_p = dist.LogNormal(0.0, 0.4).log_prob(z)
        log_p = log_p + dist.Normal(2 * z, math.sqrt(1.25)).log_prob(x)
    else:
        log_p = prior(name).log_prob(z) + near(z).log_prob(x)
    return ((log_p + slope).logsumexp(-1) + math.log(17 / 20_000)).numpy()


@pytest.mark.parametrize(
    ("name", "family", "vectorized"),
    [
        ("gamma", None, True),
        ("gamma", "mean_scale", False),
        ("two sites", "full_rank", True),
        ("two sites", "auto", True),
        ("normals", "mean_scale", True),
        ("log-normals", "mean_scale", True),
    ],
)
def test_positive_latents_several_sites_and_mixtures(name, family, vectorized, plain_pyro):
    """Means over independent data, within 5 standard errors and the bias of a logarithm.

    That is half the variance of what the logarithm is taken of, while it is small.
    """
    model = _two_sites if name == "two sites" else local(prior(name), near)
    (x,), latents = simulate(model, torch.zeros(60), seed=3)
    guide = AutoNormal(model, init_scale=0.6) if family == "auto" else None
    if family in families.LADDER:
        guide = FamilyGuide(model, families.LADDER[family], Column()).setup(x)
        for head in guide.heads.values():  # exp(1) and not exp(0), which is its own slope
            head.loc.linear.bias.data += 1.0
    options = {"start": "prior" if guide is None else "guide", "vectorized": vectorized}
    options |= {"num_temperatures": 60, "num_chains": 8 if vectorized else 1}
    found = measure(model, guide, x, latents=latents, **options)
    for error in errors(found, by_quadrature(name, x)):
        assert abs(error.mean()) < 5 * error.std() / math.sqrt(60) + error.var()
        assert error.std() < 0.6
    assert found.acceptance.min() > 0.3


DRAWN = [name for name in CASES if name != "own rows"]
KINDS = ["noise_only", "mean_scale", "full_rank", "flow", "student_t"]


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize(("case", "family"), in_turn(DRAWN, KINDS, 2))
def test_the_densities_at_given_latents_are_those_of_the_draw(case, family, chained):
    """The guide's own draws, given back; and log p - log q is the same in unconstrained space."""
    case = cases()[case]
    guide = FamilyGuide(case.model, families.LADDER[family], case.encoder)
    draws = draws_plate(case.model, *case.args, draws=3) if chained else None
    with private_modules(), opened(case.model, guide, case.args) as runs:
        drawn = terms(*runs.traces)
        latents = {name: runs.traces[1].nodes[name]["value"] for name in case.latents}
        again = terms_at(case.model, guide, case.args, latents, None)
        assert torch.allclose(drawn.log_q, again.log_q, atol=1e-6)
        assert torch.allclose(drawn.log_joint, again.log_joint, atol=1e-6)
        if case.encoder is None:
            return
        pair = runs.pair(runs.args, draws)
        both = densities(runs, runs.args, draws)
        state = both.layout.free({n: pair[0].nodes[n]["value"] for n in case.latents})
        point = both.at(state)
        assert state.shape[:2] == (3 if chained else 1, 6)
        assert torch.allclose(point.log_ratio, terms(*pair).log_weight.double(), atol=1e-8)
        if family == "noise_only":
            alone = densities(runs, runs.args, draws, prior=True).at(state)
            assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(alone, point, strict=True))


# --- what is refused ------------------------------------------------------------------------------


CONTINUOUS = "model: expected continuous latents that a bijection .* got {}.* for 'z'"
MODELS = [
    (dist.ProjectedNormal(torch.ones(3)), CONTINUOUS.format("Sphere")),
    (dist.Poisson(0.5), CONTINUOUS.format("Integer")),
    (
        dist.ImproperUniform(dist.constraints.real, (), ()),
        "model: expected priors that can be drawn from",
    ),
]


@pytest.mark.parametrize(("prior", "message"), MODELS)
def test_models_that_have_no_such_estimate(prior, message):
    def observe(z):
        return near(z.sum(-1) if prior.event_shape else z)

    with pytest.raises(ValueError, match=message):
        measure(local(prior, observe), None, torch.zeros(3), start="prior", num_temperatures=2)


def _no_inverse(x):
    flow = dist.transforms.Planar(2)
    with pyro.plate("data", len(x)):
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))


def _hidden(event, draw):
    """A guide that draws z by way of another draw h, which is no coordinate of z."""

    def guide(x):
        with pyro.plate("data", len(x)):
            fn = dist.Normal(torch.zeros(2), 1.0).to_event(1) if event else dist.Normal(0.0, 1.0)
            pyro.sample("z", draw(pyro.sample("h", fn, infer={"is_auxiliary": True})))

    return guide


_spread = _hidden(False, lambda h: dist.Normal(h[..., None] + torch.zeros(2), 1.0).to_event(1))
_double = _hidden(True, lambda h: dist.Delta(2 * h, event_dim=1))
GUIDES = [
    (None, "guide: expected a guide"),
    ("deterministic", r"guide: expected a density, got a point at \['z'\]"),
    (_no_inverse, "guide: expected a density that can be evaluated at given latents"),
    (_spread, r"guide: expected auxiliary draws .* at \['h'\]"),
    (_double, r"guide: expected auxiliary draws .* at \['h'\]"),
]


@pytest.mark.parametrize(("guide", "message"), GUIDES)
def test_guides_that_chains_cannot_start_from(guide, message, plain_pyro):
    linear = Linear(W)
    if guide == "deterministic":
        guide = FamilyGuide(linear.model, families.deterministic, torch.nn.Identity())
    with pytest.raises(ValueError, match=message + ".*start=.(prior|guide)"):
        measure(linear.model, guide, linear.x, num_temperatures=2)
