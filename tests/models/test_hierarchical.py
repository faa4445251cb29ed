"""Hierarchical regression: held against the Gaussian posterior that it has with known sds."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from ppvae import Block, FamilyGuide, evaluate, fit, from_pyro_svi, predict, simulate
from ppvae._scopes import private_modules
from ppvae.models import HierarchicalRegression
from ppvae.programs.tracing import draws_plate, trace_pair

GROUPS, COLUMNS, SIZES = 4, 2, (1, 2, 5, 12)
TAU, NOISE, SPREAD = torch.tensor([0.8, 0.4], dtype=torch.float64), 0.5, 2.0
QUIET = {"progress": False}


def data():
    """Unequal groups, with an intercept and a slope each."""
    generator = torch.Generator().manual_seed(4)
    group = torch.repeat_interleave(torch.arange(GROUPS), torch.tensor(SIZES))
    x = torch.randn(len(group), generator=generator, dtype=torch.float64)
    X = torch.stack([torch.ones_like(x), x], 1)
    weight = torch.randn(GROUPS, 2, generator=generator, dtype=torch.float64) * TAU
    weight = weight + torch.tensor([1.0, -0.5])
    noise = NOISE * torch.randn(len(x), generator=generator, dtype=torch.float64)
    return X, group, (X * weight[group]).sum(-1) + noise


def known():
    return HierarchicalRegression(
        COLUMNS, GROUPS, mu=dist.Normal(0.0, SPREAD), tau=TAU, noise=NOISE
    )


def exact(X, group, y):
    """Mean and covariance of (mu, weights) given y, and log p(y), by one Gaussian of everything."""
    member = torch.nn.functional.one_hot(group, GROUPS).to(X)
    shift = torch.eye(COLUMNS).repeat(GROUPS + 1, 1)  # mu in itself and in each group
    own = torch.block_diag(torch.zeros(COLUMNS, COLUMNS), *[torch.diag(TAU**2)] * GROUPS)
    prior = SPREAD**2 * shift @ shift.T + own
    design = torch.cat(
        [torch.zeros(len(X), COLUMNS), (member[:, :, None] * X[:, None]).reshape(len(X), -1)], 1
    )
    of_y = design @ prior @ design.T + NOISE**2 * torch.eye(len(X))
    gain = torch.linalg.solve(of_y, design @ prior).T
    log_p = dist.MultivariateNormal(torch.zeros(len(X)), of_y).log_prob(y)
    return gain @ y, prior - gain @ design @ prior, log_p.item()


def test_fit_finds_the_posterior_and_the_evidence_of_known_sds():
    """The posterior is Gaussian, so a full covariance holds it, and at it every draw has the same
    weight: what is left is the tolerance of the optimizer, of which the bound sees the square.
    """
    X, group, y = data()
    mean, covariance, log_p = exact(X, group, y)
    model = known()
    guide = FamilyGuide(model, "full_rank")
    fit(model, guide, (X, group, y), num_epochs=1000, **QUIET)
    fn = guide.heads["joint"](None)
    sds = covariance.diagonal().sqrt()
    assert torch.allclose(fn.mean / sds, mean / sds, atol=1e-3)
    assert torch.allclose(
        fn.covariance_matrix / sds / sds[:, None], covariance / sds / sds[:, None], atol=1e-3
    )
    found = evaluate(model, guide, X, group, y, num_samples=64, **QUIET)
    assert found.total_elbo.item() == pytest.approx(log_p, abs=1e-2)
    assert found.log_evidence.item() == pytest.approx(log_p, abs=1e-3)


def test_groups_given_mu_have_a_bound_and_the_same_evidence():
    """The true posterior has a correlation of intercept and slope in each group, which the guide
    has not; importance sampling has a standard error, of which five are allowed.
    """
    X, group, y = data()
    log_p, model = exact(X, group, y)[2], known()
    guide = FamilyGuide(model, {"mu": "full_rank", "weight": Block("mean_scale", given=["mu"])})
    fit(model, guide, (X, group, y), **QUIET)
    found = evaluate(model, guide, X, group, y, num_samples=4000, **QUIET)
    assert found.evidence_khat < 0.7
    assert abs(found.log_evidence - log_p) < 5 * found.log_evidence_se
    assert log_p - 0.5 < found.total_elbo < log_p


PRIORS = {
    "default": {},
    "per column": {
        "mu": dist.StudentT(4.0, torch.zeros(2), torch.ones(2)),
        "tau": dist.LogNormal(torch.zeros(2), 0.5),
    },
    "known sds": {"tau": TAU, "noise": NOISE},
    "all known but the groups": {"mu": 0.5, "tau": 1, "noise": torch.tensor(0.3)},
}


@pytest.mark.parametrize("name", PRIORS)
def test_densities_are_those_written_out_also_of_many_draws_at_once(name):
    """Draw by draw, group by group and row by row."""
    (X, group, y), draws, known = data(), 5, PRIORS[name]
    model = HierarchicalRegression(COLUMNS, GROUPS, **known)
    guide = FamilyGuide(model, "mean_scale").setup(X, group, y)
    with private_modules(), torch.no_grad():
        plate = draws_plate(model, X, group, y, draws=draws)
        trace, _ = trace_pair(model, guide, X, group, y, draws=plate)
    trace.compute_log_prob()
    latents = {n: node for n, node in trace.nodes.items() if n in ("mu", "tau", "noise", "weight")}
    numbers = {n for n, given in known.items() if not isinstance(given, dist.Distribution)}
    assert set(latents) == {"mu", "tau", "noise", "weight"} - numbers
    value = {n: torch.as_tensor(known[n], dtype=y.dtype).expand(draws, 2) for n in numbers}
    value |= {n: node["value"].reshape(draws, -1) for n, node in latents.items()}
    mu, tau, noise, weight = (value[n] for n in ("mu", "tau", "noise", "weight"))
    for d in range(draws):
        for g in range(GROUPS):
            log_p = dist.Normal(mu[d], tau[d]).log_prob(weight[d, 2 * g : 2 * g + 2]).sum()
            assert torch.allclose(latents["weight"]["log_prob"][d, g], log_p)
        for row, (x, g) in enumerate(zip(X, group.tolist(), strict=True)):
            fn = dist.Normal(x @ weight[d, 2 * g : 2 * g + 2], noise[d, 0])
            assert torch.allclose(trace.nodes["y"]["log_prob"][d, row], fn.log_prob(y[row]))


def test_evaluate_gives_the_same_one_draw_at_a_time():
    X, group, y = data()
    model = HierarchicalRegression(COLUMNS, GROUPS)
    guide = FamilyGuide(model, "mean_scale").setup(X, group, y)
    with torch.no_grad():  # narrow draws, of which each has about the same weight
        for head in guide.heads.values():
            head.scale.raw.fill_(-6.0)
    both = [
        evaluate(model, guide, X, group, y, num_samples=300, vectorized=v, **QUIET)
        for v in (True, False)
    ]
    error = math.hypot(*(float(found.total_elbo_se) for found in both))
    assert abs(both[0].total_elbo - both[1].total_elbo) < 5 * error
    assert np.allclose(both[0].distortion, both[1].distortion, rtol=0.05)


def test_what_people_do_with_it(plain_pyro):
    X, group, y = data()
    model = HierarchicalRegression(COLUMNS, GROUPS)
    guide = FamilyGuide(model, {("mu", "tau", "noise"): "full_rank", "weight": "mean_scale"})
    fit(model, guide, (X, group, y), num_epochs=5, batch_size=7, **QUIET)
    (_, same, drawn), latents = simulate(model, X, group, y, seed=0)
    assert torch.equal(same, group) and drawn.shape == y.shape
    assert latents["weight"].shape == (GROUPS, COLUMNS)
    tree = from_pyro_svi(model, guide, X, group, y, num_samples=6, seed=0)
    assert tree.posterior["weight"].shape == (1, 6, GROUPS, COLUMNS)
    assert predict(model, guide, X[:3], group[:3], num_samples=4).y.shape == (4, 3)
    far = predict(model, guide, X[:3], group[:3].double(), num_samples=4, seed=0)
    assert np.array_equal(far.y, predict(model, guide, X[:3], group[:3], num_samples=4, seed=0).y)
    other = HierarchicalRegression(COLUMNS, GROUPS)
    again = FamilyGuide(other, {("mu", "tau", "noise"): "full_rank", "weight": "mean_scale"})
    again.load_state_dict(guide.state_dict())
    told = {"num_samples": 20, **QUIET}
    expected = evaluate(model, guide, X, group, y, **told)
    assert evaluate(other, again, X, group, y, **told).equals(expected)


def test_pyro_makes_it_non_centred():
    """Which changes the program and not what it says of y."""
    X, group, y = data()
    model = HierarchicalRegression(COLUMNS, GROUPS)
    around = poutine.reparam(model, {"weight": LocScaleReparam(0.0)})
    with private_modules():
        trace = poutine.trace(around).get_trace(X, group, y)
    mu, tau = (trace.nodes[name]["value"] for name in ("mu", "tau"))
    offset = trace.nodes["weight_decentered"]["value"]
    assert torch.allclose(trace.nodes["weight"]["value"], mu + tau * offset)


def _call(X=None, group=None, y=None):
    good = data()
    given = [a if b is None else b for a, b in zip(good, (X, group, y), strict=True)]
    return lambda: HierarchicalRegression(COLUMNS, GROUPS)(*given)


def _model(**given):
    return lambda: HierarchicalRegression(**{"columns": 2, "groups": 3} | given)


BAD = [
    (_model(columns=0), ValueError, "columns: expected a whole number of at least 1"),
    (_model(groups=1.5), ValueError, "groups: expected a whole number of at least 1"),
    (_model(tau=-1.0), ValueError, "tau: expected finite numbers"),
    (_model(mu=math.nan), ValueError, "mu: expected finite numbers"),
    (_model(noise=[1.0, 2.0]), ValueError, r"noise: expected a prior, or numbers of shape \(\)"),
    (_model(noise="much"), TypeError, "noise: expected real numbers"),
    (_model(tau=dist.Normal(0.0, 1.0)), ValueError, "tau: expected a prior of"),
    (_model(mu=dist.Poisson(1.0)), ValueError, "mu: expected a continuous prior"),
    (_model(mu=dist.Normal(torch.zeros(3), 1.0)), ValueError, r"mu: .* or \(2,\)"),
    (_model(mu=dist.Normal(torch.zeros(2), 1.0).to_event(1)), ValueError, "mu: .* event shape"),
    (_model(mu=torch.distributions.Normal(0.0, 1.0)), TypeError, "mu: .* pyro.distributions"),
    (_call(X=torch.zeros(20, 3)), ValueError, r"X: expected shape \(rows, 2\)"),
    (_call(X=torch.zeros(20, 2).long()), TypeError, "X: expected a tensor of real numbers"),
    (_call(X=[[1.0, 2.0]]), TypeError, "X: expected a tensor of real numbers, .* got list"),
    (_call(y=torch.zeros(20, 1)), ValueError, r"y: expected shape \(20,\)"),
    (_call(group=torch.zeros(19).long()), ValueError, r"group: expected shape \(20,\)"),
    (_call(group=torch.full((20,), 4)), ValueError, r"group: .* 0 to 3, got 4 in row 0"),
    (_call(group=torch.full((20,), 0.5)), ValueError, r"group: expected whole .* got 0.5 in row 0"),
    (_call(group=torch.full((20,), -1)), ValueError, r"group: .* got -1 in row 0"),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()
