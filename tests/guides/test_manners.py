"""What Pyro's autoguides offer: held against them at the same parameters, and by their usage."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, FAMILIES, LONG, cases
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_mean,
    init_to_median,
    init_to_value,
)
from torch.distributions import biject_to

from ppvae import Block, FamilyGuide, families, fit
from ppvae._scopes import private_modules
from ppvae.nn import mlp
from ppvae.programs.tracing import draws_plate

pytestmark = pytest.mark.usefixtures("plain_pyro")

LEVELS = [0.05, 0.5, 0.9]


def scale_and_location(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(mu.sum(-1), tau), obs=x)


def local_and_global(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


X = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)


def random_values(*modules):
    torch.manual_seed(3)
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.4)


def test_quantiles_and_median_are_those_of_pyro_at_the_same_parameters():
    guide, theirs = FamilyGuide(scale_and_location, "mean_scale"), AutoNormal(scale_and_location)
    guide(X), theirs(X)
    random_values(theirs.locs)
    for name in ("mu", "tau"):
        with torch.no_grad():
            guide.heads[name].loc.raw.copy_(getattr(theirs.locs, name))
            scale = getattr(theirs.scales, name).detach()
            guide.heads[name].scale.raw.copy_(guide.heads[name].scale.raw_at(scale))
    mine, known = guide.quantiles(LEVELS, X), theirs.quantiles(LEVELS, X)
    for name in ("mu", "tau"):
        assert mine[name].shape == (3, *guide(X)[name].shape)
        assert torch.allclose(mine[name], known[name], rtol=1e-12)
        assert torch.allclose(guide.median(X)[name], theirs.median(X)[name], rtol=1e-12)


def test_the_posterior_and_its_quantiles_are_those_of_pyro_at_the_same_parameters():
    guide = FamilyGuide(scale_and_location, {("mu", "tau"): "full_rank"})
    theirs = AutoMultivariateNormal(scale_and_location)
    guide(X), theirs(X)
    random_values(guide.heads)
    found = guide.get_posterior(X)
    with torch.no_grad():
        theirs.loc.copy_(found.loc)
        theirs.scale = found.scale_tril.diagonal()
        theirs.scale_tril = found.scale_tril / theirs.scale[:, None]
    known = theirs.get_posterior()
    assert torch.allclose(found.covariance_matrix, known.covariance_matrix, rtol=1e-12)
    assert found.event_shape == (3,)
    mine, known = guide.quantiles(LEVELS, X), theirs.quantiles(LEVELS, X)
    assert all(torch.allclose(mine[name], known[name], rtol=1e-12) for name in ("mu", "tau"))


@pytest.mark.parametrize("split", ["mean_scale", {"mu": "full_rank", "tau": "mean_scale"}])
def test_the_posterior_of_several_blocks_scores_their_draws(split):
    guide = FamilyGuide(scale_and_location, split).setup(X)
    random_values(guide.heads)
    trace = poutine.trace(guide).get_trace(X)
    values = {name: trace.nodes[name]["value"] for name in ("mu", "tau")}
    free = torch.cat([values["mu"], values["tau"].log()[None]])
    log_q = trace.log_prob_sum() + values["tau"].log()  # of the unconstrained vector
    assert torch.allclose(guide.get_posterior(X).log_prob(free), log_q, rtol=1e-10)


#: whose quantiles are those of draws, whatever the model: one of each layout, unless there is time
DRAWN = {
    "flow": ["one scalar", "positive", "hierarchy"],
    "big_flow": ["regression"],
    "asymmetric_laplace": ["simplex", "right of steps"],
}
#: of each way to the quantile of a head one family with all models, and others with a third of them
WAYS = ["mean_scale", "full_rank", "noise_only", "deterministic"]
TURNS = {f: CASES if f in WAYS else CASES[n % 3 :: 3] for n, f in enumerate(FAMILIES)} | DRAWN
QUANTILES = [(f, c) for f in FAMILIES for c in CASES if LONG or c in TURNS[f]]


@pytest.mark.parametrize(("family", "case"), QUANTILES)
def test_quantiles_are_those_of_draws(family, case):
    """The share of 2,000 draws below a quantile p is p within five of its standard errors.

    Each is at most sqrt(p (1 - p) (1 / 2000 + 1 / 1000)): the second for quantiles that are
    themselves those of 1,000 draws. About 10,000 comparisons: a chance of 0.01 in all. The draws
    are made in a plate, where they are like single ones.
    """
    own_rows, case = case == "own rows", cases()[case]
    torch.manual_seed(1)
    guide = FamilyGuide(case.model, FAMILIES[family], case.encoder).setup(*case.args)
    if own_rows:  # each draw is of other rows
        with pytest.raises(ValueError, match=r"all their members, got subsamples of \['data'\]"):
            guide.quantiles(LEVELS, *case.args)
        return
    before = torch.get_rng_state()
    found = guide.quantiles(LEVELS, *case.args)
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad(), private_modules(), draws_plate(case.model, *case.args, draws=2000):
        draws = guide(*case.args)
    for site in guide.sites:
        name, transform = site.name, biject_to(site.support)
        values = draws[name].reshape(2000, *case.latents[name])
        assert found[name].shape == (3, *values.shape[1:])
        assert site.support.check(found[name]).all()
        for number, level in enumerate(LEVELS):
            free, at = transform.inv(values), transform.inv(found[name][number])
            share = (free <= at).double().mean(0)
            if (free.std(0) < 1e-12).all():  # a point
                assert torch.allclose(values[0], found[name][number])
                continue
            bound = 5 * (level * (1 - level) * (1 / 2000 + 1 / 1000)) ** 0.5
            wanted = 1 - level if _falls(transform) else level
            assert (share - wanted).abs().max() <= bound


def _falls(transform):
    try:
        return bool(torch.as_tensor(transform.sign < 0).any())
    except NotImplementedError:
        return False


@pytest.mark.parametrize("family", ["mean_scale", "flow"])
def test_a_map_that_falls_turns_the_levels(family):
    """Below zero through minus exp: the 5 % quantile is the 95 % one of the coordinate."""

    def model():
        below = dist.ImproperUniform(constraints.less_than(0.0), (), ())
        return pyro.sample("z", below)

    guide = FamilyGuide(model, {("z",): family} if family == "flow" else family).setup()
    low, middle, high = guide.quantiles(LEVELS)["z"]
    assert low < middle < high < 0
    draws = torch.stack([guide()["z"] for _ in range(500)])
    assert abs((draws < low).double().mean() - 0.05) < 5 * (0.0475 * (1 / 500 + 1 / 1000)) ** 0.5


def test_quantiles_of_sites_that_depend_on_others_are_marginal():
    """z given mu is exactly mu + 0.1 noise: its variance is that of mu and 0.01."""
    by_site = {("mu", "tau"): "mean_scale", "z": Block("mean_scale", given=["mu"])}
    guide = FamilyGuide(local_and_global, by_site, encoder=mlp(1, 4)).setup(X[:, None])
    for argument, value in {"loc": 0.0, "scale": 0.1}.items():
        linear = getattr(guide.heads["z"], argument).linear
        with torch.no_grad():
            linear.weight.zero_()
            linear.weight[0, -1] = float(argument == "loc")
            linear.bias.copy_(getattr(guide.heads["z"], argument).raw_at(torch.tensor(value)))
    with torch.no_grad():
        mu = guide.heads["mu"]
        mu.loc.raw.fill_(0.5)
        mu.scale.raw.copy_(mu.scale.raw_at(torch.tensor(2.0)))
    sd = (4 + 0.01) ** 0.5
    low, high = guide.quantiles([0.05, 0.95], X[:, None])["z"]
    error = sd * (0.05 * 0.95 / 1000) ** 0.5 / 0.1031  # of a quantile: sqrt(p q / n) / density
    known = dist.Normal(0.5, sd).icdf(torch.tensor([0.05, 0.95]))
    assert (low - known[0]).abs().max() < 5 * error
    assert (high - known[1]).abs().max() < 5 * error


@pytest.mark.parametrize("family", ["noise_only", Block("mean_scale", prior="location")])
def test_quantiles_of_a_model_that_has_no_room_for_another_plate(family):
    """What the model draws itself, or is asked for, is drawn one by one."""

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        tau = pyro.sample("tau", dist.LogNormal(mu[0], 1.0) if mu.dim() == 1 else None)
        assert tau.dim() == 0

    low, high = FamilyGuide(model, family).quantiles([0.1, 0.9])["tau"]
    assert low.shape == high.shape == () and 0 < low < high


class Noise(torch.nn.Module):
    """An encoder of one feature, which is noise with an sd of 5."""

    def forward(self, x):
        return 5 * torch.randn(len(x), 1)


def test_quantiles_see_the_noise_of_an_encoder():
    """A flow that is near the identity at first: z is the feature and a normal number."""
    by_site = {("mu", "tau"): "mean_scale", "z": "flow"}
    guide = FamilyGuide(local_and_global, by_site, Noise()).setup(X[:, None])
    with torch.no_grad():
        for name, argument in guide.heads["joint"].named_children():
            if name in ("loc", "scale"):
                argument.linear.weight.fill_(float(name == "loc"))
    low, high = guide.quantiles([0.05, 0.95], X[:, None])["z"]
    # 2 * 1.645 * sqrt(26), and the error of the ends, each sd * sqrt(0.05 * 0.95 / 1000) / 0.103
    assert ((high - low - 16.8).abs() < 5 * 2 * 5.1 * 0.067).all()
    assert not guide.encoder._forward_hooks and not guide.encoder._forward_pre_hooks


def test_bad_levels_and_posteriors_are_named():
    guide = FamilyGuide(scale_and_location, "mean_scale")
    for bad in ([1.5], 0.5, [float("nan")]):
        with pytest.raises(ValueError, match="quantiles: expected"):
            guide.quantiles(bad, X)
    with pytest.raises(ValueError, match=r"a density of every latent"):
        FamilyGuide(scale_and_location, "deterministic").get_posterior(X)
    with pytest.raises(ValueError, match=r"depend on nothing else, got \['z'\]"):
        FamilyGuide(local_and_global, "mean_scale", mlp(1, 3)).get_posterior(X[:, None])
    with pytest.raises(TypeError, match=r"init_loc_fn: expected a function"):
        FamilyGuide(scale_and_location, "mean_scale", init_loc_fn=3)


# Initial values


@pytest.mark.parametrize(
    "family",
    [
        "deterministic",
        "mean_only",
        "mean_scale",
        "student_t",
        "low_rank",
        "full_rank",
        "flow",
        families.Banded(1),
    ],
)
def test_locations_start_where_they_are_told(family):
    wanted = {"mu": torch.tensor([3.0, -2.0]), "tau": torch.tensor(0.25)}
    guide = FamilyGuide(scale_and_location, family, init_loc_fn=init_to_value(values=wanted))
    found = guide.median(X) if family != "flow" else None
    if family == "flow":  # near the identity at first, so that its location is its median
        loc = next(iter(guide.setup(X).heads.values())).loc.raw
        found = {"mu": loc[:2], "tau": loc[2].exp()}
    assert all(torch.allclose(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("init", [init_to_median, init_to_mean])
def test_they_are_those_of_pyro(init):
    torch.manual_seed(0)
    theirs = AutoDelta(scale_and_location, init_loc_fn=init)
    guide = FamilyGuide(scale_and_location, "deterministic", init_loc_fn=init)
    torch.manual_seed(0)
    known = theirs(X)
    torch.manual_seed(0)
    found = guide(X)
    assert all(torch.allclose(found[name], known[name]) for name in known)


def test_members_share_a_start_or_have_their_own():
    values = torch.tensor([1.0, 2.0, 3.0])

    def model(rows=None):
        with pyro.plate("groups", 3, subsample=rows, dim=-1):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    start = init_to_value(values={"b": values})
    assert torch.equal(FamilyGuide(model, "mean_scale", init_loc_fn=start).median()["b"], values)
    shared = FamilyGuide(model, Block("mean_scale", source="shared"), init_loc_fn=start)
    assert torch.equal(shared.median()["b"], torch.full((3,), 2.0))
    rows = torch.tensor([0, 2])
    part = init_to_value(values={"b": values[rows]})
    thin = FamilyGuide(model, "mean_scale", init_loc_fn=part).setup(rows)
    assert torch.equal(thin.heads["b"].loc.raw, torch.full((3,), 2.0))


def test_a_loaded_state_is_kept_and_bad_starts_are_named():
    start = init_to_value(values={"mu": torch.ones(2), "tau": torch.tensor(2.0)})
    guide = FamilyGuide(scale_and_location, "mean_scale").setup(X)
    again = FamilyGuide(scale_and_location, "mean_scale", init_loc_fn=start)
    again.load_state_dict(guide.state_dict())
    assert torch.equal(again.median(X)["mu"], guide.median(X)["mu"])
    outside = init_to_value(values={"mu": torch.ones(2), "tau": torch.tensor(-2.0)})
    with pytest.raises(ValueError, match=r"init_loc_fn: expected a value in the support of 'tau'"):
        FamilyGuide(scale_and_location, "mean_scale", init_loc_fn=outside).setup(X)


def test_fit_goes_to_the_mode_that_the_start_is_near():
    """Two modes at -3 and 3, of equal depth but for a slope that favours the one above."""

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 100.0))
        pyro.factor("two", torch.logaddexp(-50 * (m - 3) ** 2, -50 * (m + 3) ** 2) + 0.1 * m)

    for mode in (-3.0, 3.0):
        start = init_to_value(values={"m": torch.tensor(mode - 0.4)})
        guide = FamilyGuide(model, "mean_scale", init_loc_fn=start)
        result = fit(model, guide, progress=False)
        assert abs(guide.median()["m"] - mode) < 0.05
        side = "below" if mode < 0 else "above"  # 0.6 nats, by the slope
        assert f"there is another mode, 0.6 nats {side} this one" in result.verdict


# Usage


OBJECTIVES = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": TraceEnum_ELBO,
    "RenyiELBO": RenyiELBO,
}
MIXED = {("mu", "tau"): "full_rank", "z": Block("mean_scale", given=["mu"])}
LATE = {("mu", "tau"): "full_rank", "z": Block("mean_scale", prior="location")}


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("assignment", ["mean_scale", "flow", MIXED, LATE], ids=str)
def test_every_objective_of_pyro(assignment, objective, vectorize):
    guide = FamilyGuide(local_and_global, assignment, encoder=mlp(1, 4))
    elbo = OBJECTIVES[objective](
        num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1
    )
    svi = SVI(local_and_global, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    losses = [svi.step(X[:, None]), svi.step(X[:3, None]), svi.evaluate_loss(X[:, None])]
    assert torch.isfinite(torch.tensor(losses)).all()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("assignment", ["mean_scale", "full_rank", MIXED, LATE], ids=str)
def test_predictive_and_call_with_other_sizes(assignment, parallel):
    guide = FamilyGuide(local_and_global, assignment, encoder=mlp(1, 4))
    for x in (X[:, None], X[:2, None]):
        predictive = Predictive(local_and_global, guide=guide, num_samples=5, parallel=parallel)
        assert predictive(x)["z"].shape == (5, len(x))
        mu, tau, z = guide.call(x)  # by name
        assert (mu.shape, tau.shape, z.shape) == ((), (), (len(x),))


@pytest.mark.parametrize("how", ["hide", "expose"])
def test_parts_of_a_model_in_a_guide_list(how):
    rest = {"hide": ["mu", "tau"]} if how == "hide" else {"expose": ["z"]}
    guide = AutoGuideList(local_and_global)
    guide.append(AutoNormal(poutine.block(local_and_global, hide=["z"])))
    guide.append(FamilyGuide(poutine.block(local_and_global, **rest), "mean_scale", mlp(1, 4)))
    svi = SVI(local_and_global, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert torch.isfinite(torch.tensor([svi.step(X[:, None]) for _ in range(2)])).all()
    found, at = guide.median(X[:, None]), guide.quantiles(LEVELS, X[:, None])
    assert {name: value.shape for name, value in found.items()} == {"mu": (), "tau": (), "z": (6,)}
    assert torch.allclose(at["z"][1], found["z"])


def test_starts_that_do_not_fit_are_named():
    def start(**values):
        told = {"mu": torch.zeros(2), "tau": torch.tensor(1.0), **values}
        return init_to_value(values=told)

    for values, message in (
        ({"mu": torch.tensor(1.0)}, r"init_loc_fn: expected shape \(2,\) for 'mu', got \(\)"),
        ({"mu": torch.zeros(3)}, r"init_loc_fn: expected shape \(2,\) for 'mu', got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            FamilyGuide(scale_and_location, "mean_scale", init_loc_fn=start(**values)).setup(X)
    bounded = FamilyGuide(
        scale_and_location, "mean_only_bounded", init_loc_fn=start(mu=torch.full((2,), 4.0))
    )
    with pytest.raises(ValueError, match=r"init_loc_fn: expected values of \['mu'\] that a loc"):
        bounded.setup(X)
    with pytest.raises(ValueError, match="guide: expected latents with free parameters, got noi"):
        FamilyGuide(scale_and_location, "noise_only").get_posterior(X)


def test_the_median_is_the_middle_quantile_of_a_flow():
    guide = FamilyGuide(scale_and_location, "flow")
    found, median = guide.quantiles([0.1, 0.5], X), guide.median(X)
    assert all(torch.equal(found[name][1], median[name]) for name in median)
