"""Annealed importance sampling against closed forms, quadrature and identities."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import cases
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from ppvae import VAE, FamilyGuide, closed_form, evaluate, families, likelihoods, simulate
from ppvae._scopes import private_modules
from ppvae.evaluation.annealing import annealed_importance
from ppvae.evaluation.path import densities
from ppvae.nn import mlp
from ppvae.objectives.trace_terms import terms
from ppvae.programs.runs import draws_plate, trace_pair

LOCAL = [name for name, case in cases().items() if case.encoder and name != "own rows"]


def anneal(*args, **options):
    return annealed_importance(*args, progress=False, **options)


class Linear:
    """x = W z + mu + noise with simulated data, of which the posterior and log p(x) are known."""

    def __init__(self, size=20, scale=1.0):
        torch.manual_seed(0)
        W, self.mu = torch.randn(4, 2), torch.randn(4)
        decoder = torch.nn.Linear(2, 4)
        decoder.weight.data, decoder.bias.data = W, self.mu
        self.model = VAE(decoder, 2, likelihoods.Normal(scale))
        (self.x,), self.latents = simulate(self.model, torch.zeros(size, 4), seed=1)
        best = closed_form.fixed_decoder(self.x, W, self.mu, scale, families.full_rank)
        self.log_p, self.covariance = best.log_likelihood.numpy(), best.covariance
        self.gain = best.covariance @ W.T / scale**2

    def guide(self, family, shift=0.0):
        """A guide with the posterior mean, shifted, and its covariance, if the family has one."""
        guide = FamilyGuide(self.model, family, torch.nn.Identity())
        head = guide.heads["z"]
        head.loc.linear.weight.data = self.gain
        head.loc.linear.bias.data = shift - self.gain @ self.mu
        if family is families.full_rank:
            rows, columns = torch.tril_indices(2, 2)
            raw = torch.linalg.cholesky(self.covariance)[rows, columns]
            raw = torch.where(rows == columns, raw.abs().log(), raw)
            head.scale_tril.linear.weight.data.zero_()
            head.scale_tril.linear.bias.data = raw
        return guide


def errors(found, log_p):
    return [found[name].values - log_p for name in ("log_likelihood", "upper")]


# --- the linear model -----------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "number"), [("prior", 200), ("guide", 300)])
def test_both_bounds_reach_the_closed_form(start, number):
    """To 0.01 nats: three standard errors of the mean over 300 data, which are asked for too."""
    linear = Linear(size=300)
    guide = linear.guide(families.mean_only, shift=1.5)
    options = {"start": start, "latents": linear.latents, "num_temperatures": number}
    found = anneal(linear.model, guide, linear.x, **options)
    for error in errors(found, linear.log_p):
        assert abs(error.mean()) < 0.01
        assert error.std() / math.sqrt(300) < 0.0036 and abs(error).max() < 0.4
    assert found.ess.min() > 12 and 0.7 < found.acceptance.mean() < 1
    if start == "guide":
        sampled = evaluate(linear.model, guide, linear.x, num_samples=512)
        assert (sampled.log_likelihood.values - linear.log_p).mean() < -0.05
    assert found.attrs == {"num_temperatures": number, "num_chains": 16, "start": start}


def test_the_bounds_enclose_and_close_in():
    """Means over 60 data; those of few temperatures are off by far more than their errors.

    With one temperature, the upper bound is log p(x | z): off by I(x; z), which is 6.6 nats.
    """
    linear = Linear(size=60, scale=0.1)
    lower, upper = [], []
    for number in (1, 4, 16, 64):
        found = anneal(
            linear.model,
            None,
            linear.x,
            start="prior",
            latents=linear.latents,
            num_temperatures=number,
        )
        below, above = errors(found, linear.log_p)
        lower.append(below.mean())
        upper.append(above.mean())
    assert lower[0] < -10 and upper[0] > 5
    assert lower == sorted(lower) and upper == sorted(upper, reverse=True)
    assert -1 < lower[-1] < 0.05 and -0.05 < upper[-1] < 1


@pytest.mark.parametrize(("number", "vectorized"), [(1, True), (1, False), (7, True), (3, False)])
def test_with_the_exact_guide_every_weight_is_log_p(number, vectorized):
    """log p - log q is the same everywhere, whatever the chains do; minibatches of both kinds."""
    linear = Linear()
    guide = linear.guide(families.full_rank)
    found = anneal(
        linear.model,
        guide,
        linear.x,
        num_temperatures=number,
        num_chains=5,
        batch_size=7,
        latents=linear.latents,
        vectorized=vectorized,
    )
    for error in errors(found, linear.log_p):
        assert abs(error).max() < 1e-10
    assert abs(found.ess.values - 5).max() < 1e-8
    assert found.acceptance.isnull().all() if number == 1 else found.acceptance.min() > 0


def test_one_temperature_is_importance_sampling():
    """By the delta method the log of a mean weight has variance 1/ess; two independent ones."""
    linear = Linear()
    guide = linear.guide(families.mean_only)
    found = anneal(linear.model, guide, linear.x, num_temperatures=1, num_chains=4000)
    sampled = evaluate(linear.model, guide, linear.x, num_samples=4000)
    error = (1 / found.ess + 1 / sampled.ess) ** 0.5
    assert (abs(found.log_likelihood - sampled.log_likelihood) < 5 * error).all()
    assert abs(found.ess.mean() / sampled.ess.mean() - 1) < 0.1


# --- other supports and layouts -------------------------------------------------------------------


def _gamma(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def _two_sites(x):
    """A positive and a real latent, which the data correlate; the second depends on the first."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(0.0, 0.4))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(a + b, 0.5), obs=x)


def _by_quadrature(model, x):
    """Log p(x) by the midpoint rule in the logarithm of the positive latent.

    The second latent of `_two_sites` integrates out: x | a ~ N(2a, 1 + 0.5^2).
    """
    u = torch.linspace(-12, 5, 20_001)
    a, x = u.exp(), x[:, None]
    if model is _gamma:
        log_p = dist.Gamma(2.0, 1.0).log_prob(a) + dist.Normal(a, 0.5).log_prob(x)
    else:
        log_p = dist.LogNormal(0.0, 0.4).log_prob(a)
        log_p = log_p + dist.Normal(2 * a, math.sqrt(1.25)).log_prob(x)
    return ((log_p + u).logsumexp(-1) + math.log(17 / 20_000)).numpy()


class _Column(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(1, 8)

    def forward(self, x):
        return 0.5 * self.net(x[:, None]).tanh()


@pytest.mark.parametrize(
    ("model", "name", "vectorized"),
    [
        (_gamma, "prior", True),
        (_gamma, "mean_scale", True),
        (_gamma, "prior", False),
        (_two_sites, "full_rank", True),
        (_two_sites, "auto", True),
    ],
)
def test_positive_latents_and_several_sites(model, name, vectorized, plain_pyro):
    """Means over independent data, within 5 standard errors and the bias of a logarithm.

    That is half the variance of what the logarithm is taken of, while it is small.
    """
    (x,), latents = simulate(model, torch.zeros(100), seed=3)
    guide = None
    if name == "auto":
        guide = AutoNormal(model, init_scale=0.6)
    elif name != "prior":
        guide = FamilyGuide(model, families.LADDER[name], _Column()).setup(x)
        for head in guide.heads.values():  # exp(1) and not exp(0), which is its own slope
            head.loc.linear.bias.data += 1.0
    found = anneal(
        model,
        guide,
        x,
        start="prior" if guide is None else "guide",
        latents=latents,
        num_temperatures=100,
        num_chains=8 if vectorized else 1,
        vectorized=vectorized,
    )
    for error in errors(found, _by_quadrature(model, x)):
        assert abs(error.mean()) < 5 * error.std() / 10 + error.var()
        assert error.std() < 0.5
    assert found.acceptance.min() > 0.3


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("family", ["noise_only", "mean_scale", "full_rank", "flow"])
@pytest.mark.parametrize("case", LOCAL)
def test_the_densities_are_those_of_importance_sampling(case, family, chained):
    """In unconstrained space log p - log q of a draw is what it is in constrained space."""
    case = cases()[case]
    guide = FamilyGuide(case.model, families.LADDER[family], case.encoder)
    draws = draws_plate(case.model, *case.args, draws=3) if chained else None
    with torch.no_grad(), private_modules():
        model_trace, guide_trace = trace_pair(case.model, guide, *case.args, draws=draws)
        parts = terms(model_trace, guide_trace)
        totals = [sum(t.values()) for t in (parts.log_likelihood, parts.log_prior, parts.log_guide)]
        both = densities(case.model, guide, case.args, draws=draws)
        state = both.layout.free({n: model_trace.nodes[n]["value"] for n in case.latents})
        point = both.at(state)
        assert state.shape[:2] == (3 if chained else 1, 6)
        assert torch.allclose(point.log_ratio, totals[0] + totals[1] - totals[2], atol=1e-8)
        if family == "noise_only":
            alone = densities(case.model, guide, case.args, draws=draws, prior=True).at(state)
            for one, other in zip(alone, point, strict=True):
                assert torch.allclose(one, other, atol=1e-10)


# --- what is left alone, and what is refused ------------------------------------------------------


def test_nothing_moves_and_arrays_will_do():
    torch.manual_seed(0)
    model = VAE(mlp(2, 8, out=4), 2, likelihoods.Bernoulli())
    encoder = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout()
    )
    guide = FamilyGuide(model, families.full_rank, encoder)
    (x,), latents = simulate(model, torch.zeros(9, 4), seed=0)
    before = [p.detach().clone() for m in (model, guide) for p in (*m.parameters(), *m.buffers())]
    state = torch.get_rng_state()
    arrays = {"z": latents["z"].numpy()}
    runs = [
        anneal(model, guide, x.numpy(), num_temperatures=5, latents=arrays, batch_size=6)
        for _ in range(2)
    ]
    assert torch.equal(state, torch.get_rng_state()) and guide.encoder.training
    after = [p for m in (model, guide) for p in (*m.parameters(), *m.buffers())]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)
    assert runs[0].identical(runs[1]) and runs[0].sizes == {"datum": 9}
    assert set(runs[0]) == {"log_likelihood", "ess", "acceptance", "upper"}


def test_single_precision():
    """The exact guide again; the weights are as exact as log densities of about 10 can be."""
    linear = Linear()
    guide = linear.guide(families.full_rank).float()
    found = anneal(linear.model.float(), guide, linear.x.float(), num_temperatures=5)
    assert found.log_likelihood.dtype == "float64"
    assert abs(found.log_likelihood.values - linear.log_p).max() < 1e-4


def _outside(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def _discrete(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _improper(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _no_plate(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)


def _no_bijection(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.ProjectedNormal(torch.ones(3)))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def _own_rows(x):
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_no_bijection, "model: expected continuous latents that a bijection .* for 'z'"),
        (_own_rows, "model: the plate 'data' draws a subsample of 2"),
        (_outside, "model: expected all sites in the plate 'data'; outside: 'w'"),
        (_discrete, "model: expected continuous latents .* got Boolean.* for 'z'"),
        (_improper, "model: expected priors that can be drawn from"),
        (_no_plate, "model: expected a plate over the data, got none"),
    ],
)
def test_models_that_have_no_such_estimate(model, message):
    with pytest.raises(ValueError, match=message):
        anneal(model, None, torch.zeros(3), start="prior")


def _no_inverse(x):
    flow = dist.transforms.Planar(2)
    with pyro.plate("data", len(x)):
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))


def _with_auxiliary(x):
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(h[..., None] + torch.zeros(2), 1.0).to_event(1))


def _doubled(x):
    with pyro.plate("data", len(x)):
        fn = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        h = pyro.sample("h", fn, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(2 * h, event_dim=1))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (None, "guide: expected a guide"),
        ("deterministic", r"guide: expected a density, got a point at \['z'\]"),
        (_no_inverse, "guide: expected a density that can be evaluated at given latents"),
        (_with_auxiliary, r"guide: expected auxiliary draws .* at \['h'\]"),
        (_doubled, r"guide: expected auxiliary draws .* at \['h'\]"),
        (AutoMultivariateNormal, "guide: expected all sites in the plate 'data'"),
    ],
)
def test_guides_that_chains_cannot_start_from(guide, message, plain_pyro):
    linear = Linear()
    if guide == "deterministic":
        guide = FamilyGuide(linear.model, families.deterministic, torch.nn.Identity())
    elif guide is AutoMultivariateNormal:
        guide = guide(linear.model)
    with pytest.raises(ValueError, match=message + ".*start=.(prior|guide)"):
        anneal(linear.model, guide, linear.x, num_temperatures=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_temperatures": 0}, "num_temperatures: expected a whole number of at least 1, got 0"),
        ({"num_chains": 1.5}, "num_chains"),
        ({"num_leapfrog": 0}, "num_leapfrog"),
        ({"batch_size": 0}, "batch_size"),
        ({"start": "posterior"}, "start: expected one of .* got 'posterior'"),
        ({"plate": "rows"}, "plate: expected one of"),
        ({"latents": {}}, r"latents: expected values of \['z'\], got \[\]"),
        ({"latents": {"z": torch.zeros(3, 2)}}, r"latents: expected shape \(20, 2\) at 'z'"),
        ({"latents": {"z": torch.full((20, 2), math.nan)}}, "latents: expected values in"),
    ],
)
def test_bad_options(options, message):
    linear = Linear()
    with pytest.raises(ValueError, match=message):
        anneal(linear.model, linear.guide(families.mean_only), linear.x, **options)


def test_bad_data():
    linear = Linear()
    with pytest.raises(ValueError, match="args: expected finite numbers"):
        anneal(linear.model, linear.guide(families.mean_only), linear.x * math.nan)
