"""Guides that draw each site in its own way: held against models whose posterior is known."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import slowing
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn

from ppvae import Block, FamilyGuide, evaluate, families, fit, stage
from ppvae._scopes import private_modules
from ppvae.nn import Pool, mlp
from ppvae.objectives import ELBO, negative_elbo
from ppvae.objectives.trace_terms import terms
from ppvae.programs.tracing import draws_plate, trace_pair

T, S, N = 0.7, 0.5, 6  # sd of the local latents around their mean, and of the noise


def data(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X = data(N, 1)


def hierarchy(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, T))
        pyro.sample("x", dist.Normal(z[..., None], S).to_event(1), obs=x)


def evidence_of_hierarchy(x):
    covariance = (T**2 + S**2) * torch.eye(len(x)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x[:, 0]).item()


def ladder(x):
    """z_2 -> z_1 -> x, of which the guide goes the other way."""
    with pyro.plate("data", len(x)):
        above = pyro.sample("above", dist.Normal(0.0, 1.0))
        below = pyro.sample("below", dist.Normal(above, T))
        pyro.sample("x", dist.Normal(below[..., None], S).to_event(1), obs=x)


def put(head, weight, sd):
    """Makes a head of `mean_scale` a linear function with a constant scale."""
    with torch.no_grad():
        if head.loc.linear is None:
            head.loc.raw.fill_(weight)
            head.scale.raw.fill_(math.log(sd))
            return
        head.loc.linear.weight.copy_(torch.tensor([weight]))
        head.loc.linear.bias.zero_()
        head.scale.linear.weight.zero_()
        head.scale.linear.bias.fill_(math.log(sd))


def exact_hierarchy(x):
    by_site = {"z": Block("mean_scale", given=["mu"]), "*": "mean_scale"}
    guide = FamilyGuide(hierarchy, by_site, nn.Identity()).setup(x)
    local, top = 1 / T**2 + 1 / S**2, 1 + len(x) / (T**2 + S**2)
    put(guide.heads["z"], [1 / S**2 / local, 1 / T**2 / local], local**-0.5)
    put(guide.heads["mu"], x.sum().item() / (T**2 + S**2) / top, top**-0.5)
    return guide


def log_weights(model, guide, *args, draws=None):
    with private_modules(), torch.no_grad():
        plate = None if draws is None else draws_plate(model, *args, draws=draws)
        return terms(*trace_pair(model, guide, *args, draws=plate)).log_weight


@pytest.mark.parametrize("draws", [None, 5])
def test_a_local_latent_given_a_global_one_can_be_the_posterior(draws):
    guide, expected = exact_hierarchy(X), evidence_of_hierarchy(X)
    found = log_weights(hierarchy, guide, X, draws=draws)
    assert found.shape == (() if draws is None else (draws,))
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-12)


def test_fit_finds_that_posterior_from_minibatches_too():
    """In minibatches the bound of a mixed guide is that of all data, up to the noise of steps."""
    x = data(64, 1)
    expected = evidence_of_hierarchy(x) / 64
    for size, bound in ((64, 0.004), (16, 0.01)):
        by_site = {"z": Block("mean_scale", given=["mu"]), "*": "mean_scale"}
        torch.manual_seed(0)
        guide = FamilyGuide(hierarchy, by_site, nn.Identity()).setup(x)
        told = slowing(300, 0.1, 0.002) | {"num_epochs": 300 * size // 64, "batch_size": size}
        fit(hierarchy, guide, x, seed=0, progress=False, **told)
        found = log_weights(hierarchy, guide, x, draws=1000).mean() / 64
        assert expected - bound < found < expected + 1e-3


def test_a_guide_against_the_order_of_the_model_has_no_closed_divergence():
    """q(below | x) q(above | below): KL(q(below) || p(below | above)) would be wrong, since `above`
    is drawn given `below`. At the posterior every draw gives log p(x) exactly, or it is not used.
    """
    by_site = {"above": Block("mean_scale", given=["below"]), "below": "mean_scale"}
    guide = FamilyGuide(ladder, by_site, nn.Identity()).setup(X)
    assert [block.names for block in guide.blocks] == [("below",), ("above",)]
    top = 1 + 1 / T**2
    put(guide.heads["above"], [0.0, 1 / T**2 / top], top**-0.5)
    below = 1 / (1 + T**2) + 1 / S**2
    put(guide.heads["below"], [1 / S**2 / below], below**-0.5)
    expected = dist.Normal(0.0, (1 + T**2 + S**2) ** 0.5).log_prob(X).mean()
    assert torch.allclose(log_weights(ladder, guide, X).mean(), expected, rtol=1e-12)
    with private_modules():
        assert set(terms(*trace_pair(ladder, guide, X)).kl) == {"above"}
        losses = torch.stack([negative_elbo(ladder, guide, X).detach() for _ in range(500)])
    assert (losses.mean() + expected).abs() < 5 * losses.std() / 500**0.5
    measured = evaluate(ladder, guide, X, num_samples=3, progress=False)
    assert measured.log_likelihood.mean().item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_prior_itself_is_a_location_scale_guide_with_nothing_to_add():
    """A funnel, and a positive latent: with draws N(0, 1) around the prior, q is p."""

    def funnel(x):
        tau = pyro.sample("tau", dist.LogNormal(0.3, 0.8))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(1.0, tau))
            rate = pyro.sample("rate", dist.LogNormal(z, tau))
            pyro.sample("x", dist.Normal(rate, S), obs=x[:, 0])

    around = Block("mean_scale", prior="location_scale")
    guide = FamilyGuide(funnel, around).setup(X)
    for head in guide.heads.values():
        put(head, 0.0, 1.0)
    for draws in (None, 4):
        with private_modules(), torch.no_grad():
            plate = None if draws is None else draws_plate(funnel, X, draws=draws)
            found = terms(*trace_pair(funnel, guide, X, draws=plate))
        for name in ("tau", "z", "rate"):
            assert torch.allclose(found.log_prior[name], found.log_guide[name], rtol=1e-9)
    shifted = FamilyGuide(funnel, Block("mean_scale", prior="location")).setup(X)
    with private_modules():
        model_trace, guide_trace = trace_pair(funnel, shifted, X)
    expected = model_trace.nodes["z"]["fn"].loc + shifted.heads["z"](None).loc
    assert torch.allclose(guide_trace.nodes["z"]["fn"].loc, expected)
    assert torch.allclose(guide_trace.nodes["z"]["fn"].scale, torch.tensor(0.1), rtol=0.2)


def test_a_joint_family_around_the_prior_scores_its_draws():
    """log q of a full-rank draw around a prior, against the Gaussian it must be."""
    scale = torch.tensor([0.5, 2.0])

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        w = pyro.sample("w", dist.Normal(mu, scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w.sum(-1), S), obs=x[:, 0])

    by_site = {"mu": "mean_scale", "w": Block("full_rank", prior="location_scale")}
    guide = FamilyGuide(model, by_site).setup(X)
    with private_modules():
        _, trace = trace_pair(model, guide, X)
    fn, mu, w = guide.heads["w"](None), trace.nodes["mu"]["value"], trace.nodes["w"]["value"]
    tril = scale[:, None] * fn.scale_tril
    expected = dist.MultivariateNormal(mu + scale * fn.loc, scale_tril=tril).log_prob(w)
    assert torch.allclose(trace.nodes["w"]["fn"].log_prob(w), expected)


def chain(x, steps=4):
    """A random walk seen through noise; the posterior of a linear-Gaussian state-space model."""
    with pyro.plate("data", len(x)):
        z: object = 0.0
        for t in range(steps):
            z = pyro.sample(f"z_{t}", dist.Normal(z, T))
            pyro.sample(f"x_{t}", dist.Normal(z, S), obs=x[..., t])


def precision_of_chain(steps=4):
    difference = torch.eye(steps) - torch.diag(torch.ones(steps - 1), -1)
    return difference.T @ difference / T**2 + torch.eye(steps) / S**2


def evidence_of_chain(x, steps=4):
    walk = torch.tril(torch.ones(steps, steps))
    covariance = T**2 * walk @ walk.T + S**2 * torch.eye(steps)
    return dist.MultivariateNormal(torch.zeros(steps), covariance).log_prob(x)


def test_a_banded_precision_holds_the_posterior_of_a_chain():
    x = data(N, 4)
    guide = FamilyGuide(chain, families.Banded(1), nn.Identity()).setup(x)
    head, factor = guide.heads["joint"], torch.linalg.cholesky(precision_of_chain())
    diagonal = factor.diagonal()
    with torch.no_grad():
        head.loc.linear.weight.copy_(torch.linalg.inv(precision_of_chain()) / S**2)
        head.loc.linear.bias.zero_()
        for part, value in ((head.diagonal, diagonal.log()), (head.band, factor.diagonal(-1))):
            part.linear.weight.zero_()
            part.linear.bias.copy_(value if part is head.diagonal else value / diagonal.mean())
    assert torch.allclose(log_weights(chain, guide, x), evidence_of_chain(x), rtol=1e-10)
    fn = head(x[:1])
    whole = dist.MultivariateNormal(fn.loc, precision_matrix=precision_of_chain())
    value = data(1, 4)
    assert torch.allclose(fn.log_prob(value), whole.log_prob(value))
    assert torch.allclose(fn.entropy(), whole.entropy())
    assert torch.allclose(fn.variance, whole.variance)
    assert torch.allclose(fn.covariance_matrix, whole.covariance_matrix)
    assert torch.allclose(fn.expand([3]).log_prob(value), whole.log_prob(value).expand(3))
    torch.manual_seed(0)
    draws = fn.rsample([20_000])[:, 0]  # the error of a covariance is below 2 / sqrt(draws) here
    assert (draws.T.cov() - whole.covariance_matrix[0]).abs().max() < 5 * 2 / 20_000**0.5 * 0.3


class Steps(nn.Module):
    """Features `(batch, steps, 2)`: what is known at each step, of the steps behind and ahead."""

    def forward(self, x):
        return torch.stack([x, x.flip(-1).cumsum(-1).flip(-1)], -1)


def test_steps_of_a_chain_share_one_head_that_sees_the_step_before():
    x = data(N, 4)
    block = Block("mean_scale", given="previous")
    guide = FamilyGuide(chain, {"z_*": block}, Steps()).setup(x)
    assert list(guide.heads) == ["z_0"] and guide.heads["z_0"].loc.linear.in_features == 3
    torch.manual_seed(1)
    with private_modules():
        _, trace = trace_pair(chain, guide, x)
    features, before = Steps()(x), torch.zeros(N)
    for t in range(4):
        row = torch.cat([features[:, t], before[:, None]], -1)
        fn, node = guide.heads["z_0"](row), trace.nodes[f"z_{t}"]
        assert torch.allclose(node["fn"].loc, fn.loc) and torch.allclose(node["fn"].scale, fn.scale)
        before = node["value"]
    assert log_weights(chain, guide, x, draws=3).shape == (3, N)


def test_members_of_an_inner_plate_take_a_step_each(plain_pyro):
    def words(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("words", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), S), obs=x)

    x = data(N, 4)
    guide = FamilyGuide(words, "mean_scale", Steps()).setup(x)
    assert guide.heads["z"].loc.linear.weight.shape == (2, 2)
    with private_modules():
        _, trace = trace_pair(words, guide, x)
    assert torch.allclose(trace.nodes["z"]["fn"].base_dist.loc, guide.heads["z"](Steps()(x)).loc)
    assert guide(data(2, 7))["z"].shape == (2, 7, 2)  # one head for any number of words


GROUPS = torch.tensor([0, 0, 1, 2, 2, 2])


def grouped(x, group):
    """A hierarchy of two levels: a mean for each group, and data in them."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(mu, T))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta[..., group], T))
        pyro.sample("x", dist.Normal(z, S), obs=x[:, 0])


class Members(nn.Module):
    def forward(self, x, group):
        return x


def test_a_plate_of_groups_has_parameters_or_an_encoder_of_its_members(plain_pyro):
    pool = Pool(nn.Identity(), 3)
    for encoder in ({"z": Members()}, {"z": Members(), "theta": pool}):
        guide = FamilyGuide(grouped, {"*": "mean_scale"}, encoder).setup(X, GROUPS)
        with private_modules():
            _, trace = trace_pair(grouped, guide, X, GROUPS)
        head, fn = guide.heads["theta"], trace.nodes["theta"]["fn"]
        if "theta" in encoder:
            mean = torch.stack([X[GROUPS == g].mean() for g in range(3)])
            size = torch.tensor([2.0, 1.0, 3.0]).log1p()
            assert torch.allclose(pool(X, GROUPS), torch.stack([mean, size], -1))
            assert torch.allclose(fn.loc, head(pool(X, GROUPS)).loc)
        else:
            assert head.loc.raw.shape == (3,) and torch.equal(fn.loc, head.loc.raw)
        assert guide(data(4, 1), torch.tensor([0, 1, 1, 2]))["z"].shape == (4,)
    with pytest.raises(ValueError, match="labels: expected labels from 0 to 2, got 3 in row 1"):
        pool(X[:2], torch.tensor([0, 3]))


def test_parameters_may_be_shared_over_a_plate(plain_pyro):
    guide = FamilyGuide(grouped, {"theta": Block("mean_scale", source="shared"), "*": "mean_scale"})
    guide.setup(X, GROUPS)
    assert guide.heads["theta"].loc.raw.shape == () and guide.heads["z"].loc.raw.shape == (N,)
    with private_modules():
        _, trace = trace_pair(grouped, guide, X, GROUPS)
    assert trace.nodes["theta"]["value"].unique().numel() == 3  # draws are of each its own
    every = FamilyGuide(hierarchy, {"z": Block("mean_scale", source="shared"), "mu": "mean_scale"})
    for size in (6, 2, 9):  # what is shared fits any number of data
        assert every.setup(X)(data(size, 1))["z"].shape == (size,)


def _own_rows(x):
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, S).to_event(1), obs=x[rows])


def _told_rows(x, rows):
    with pyro.plate("data", len(x), subsample=rows):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, S).to_event(1), obs=x[rows])


@pytest.mark.parametrize("family", ["deterministic", "full_rank"])
@pytest.mark.parametrize("model", [_own_rows, _told_rows])
def test_a_datum_that_is_subsampled_keeps_its_own_parameters(family, model):
    x = data(N, 2)
    told = () if model is _own_rows else (torch.tensor([4, 1]),)
    guide = FamilyGuide(model, family).setup(x, *told)
    joint = family == "full_rank"
    loc = guide.heads["joint"].loc if joint else guide.heads["z"].v
    with torch.no_grad():
        loc.raw.copy_(torch.arange(12.0).reshape(loc.raw.shape))
        if joint:
            guide.heads["joint"].scale_tril.raw.fill_(0.0)
            rows, columns = torch.tril_indices(12, 12)
            guide.heads["joint"].scale_tril.raw[rows == columns] = -30.0
    with private_modules():
        model_trace, guide_trace = trace_pair(model, guide, x, *told)
    rows = model_trace.nodes["data"]["value"]
    expected = torch.arange(12.0).reshape(6, 2)[rows]
    assert torch.allclose(guide_trace.nodes["z"]["value"], expected, atol=1e-9)


FLOW = families.Flow(layers=2, hidden=4, bins=4)
BY_SITE = {
    "a family for all": ("mean_scale", nn.Identity()),
    "a flow for all": (FLOW, nn.Identity()),
    "jointly": ({"*": "full_rank"}, nn.Identity()),
    "given": ({"z": Block("mean_scale", given="mu"), "*": "student_t"}, {"z": nn.Identity()}),
    "prior": ({"z": Block("mean_scale", prior="location"), "*": "full_rank"}, nn.Identity()),
    "drawn by the model": ({"z": "mean_scale", "*": "noise_only"}, nn.Identity()),
    "flow given": ({"z": Block(FLOW, given="upstream"), "*": "mean_scale"}, nn.Identity()),
    "reversed": ({"mu": "mean_scale", "z": Block("low_rank", given="mu")}, nn.Identity()),
}


@pytest.mark.parametrize("kind", list(BY_SITE))
def test_every_kind_serves_plain_pyro_and_a_graph(kind, plain_pyro, tmp_path):
    families_, encoder = BY_SITE[kind]
    guide = FamilyGuide(hierarchy, families_, copy.deepcopy(encoder)).setup(X)
    for objective in (Trace_ELBO(), TraceMeanField_ELBO()):
        svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 1e-3}), objective)
        assert all(math.isfinite(svi.step(x)) for x in (X, X[:3], data(8, 1)))
    drawn = Predictive(hierarchy, guide=guide, num_samples=3)(X)
    assert drawn["z"].shape[:2] == (3, N) or drawn["z"].shape[0] == 3
    fitted = fit(hierarchy, guide, X, num_epochs=2, learning_rate=1e-3, progress=False)
    assert math.isfinite(fitted.losses[-1])
    loss = stage(hierarchy, guide, X)
    for x in (X, data(4, 1)):
        torch.manual_seed(5)
        staged = loss(x)
        torch.manual_seed(5)
        assert torch.allclose(staged, ELBO()(hierarchy, guide, x), rtol=1e-9)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    other = FamilyGuide(hierarchy, families_, copy.deepcopy(encoder))
    other.load_state_dict(torch.load(tmp_path / "guide.pt"))
    torch.manual_seed(6)
    expected = guide(X)
    torch.manual_seed(6)
    assert torch.equal(other(X)["z"], expected["z"])
    same = copy.deepcopy(guide)
    torch.manual_seed(6)
    assert torch.equal(same(X)["mu"], expected["mu"])


def test_in_a_list_with_an_autoguide_of_pyros(plain_pyro):
    guide = AutoGuideList(grouped)
    guide.append(AutoNormal(poutine.block(grouped, expose=["mu"])))
    local = {"z": Block("mean_scale", given="theta"), "theta": "mean_scale"}
    guide.append(FamilyGuide(poutine.block(grouped, hide=["mu"]), local, {"z": Members()}))
    svi = SVI(grouped, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert all(math.isfinite(svi.step(X, GROUPS)) for _ in range(3))


def test_sites_come_in_the_order_in_which_they_are_wanted():
    """A name counts before a pattern, patterns in their order, and joint heads keep the rest."""
    by_site = {"*": "mean_scale", "th*": "student_t", "mu": "full_rank"}
    guide = FamilyGuide(grouped, by_site, {"z": Members()}).setup(X, GROUPS)
    assert {b.names: b.family.name for b in guide.blocks} == {
        ("mu",): "full_rank",
        ("theta",): "student_t",
        ("z",): "mean_scale",
    }
    guide = FamilyGuide(grouped, {("mu", "theta"): "full_rank", "z": "mean_scale"}, Members())
    assert guide.setup(X, GROUPS).heads["joint"].loc.raw.shape == (4,)
    assert guide.family.channels == ("loc", "scale_tril", "scale")
    assert guide.family.name == "mu, theta: full_rank; z: mean_scale"


def _args(families_, encoder=None, **options):
    return lambda: FamilyGuide(grouped, families_, encoder, **options).setup(X, GROUPS)


Z = {"z": "mean_scale"}
REST = {"*": "mean_scale"}
BAD = {
    r"an entry for every latent site .*none for 'mu' among \[\('z',\)\]": _args(Z, Members()),
    r"family: expected names or patterns of .*'theta', 'z'\], got v_\*": _args(
        REST | {"v_*": "flow"}
    ),
    "family: expected a family for every latent site, got none": _args({}),
    "family: expected a mapping from names .* got 3": _args({3: "flow"}),
    "family: expected a guide family or one of": _args({"z": "bayes"}),
    r"encoder: expected names or patterns .* got w": _args(REST, {"w": Members()}),
    r"encoder: expected features of shape \(6, features\), as the plate 'data', got 3": _args(
        REST, {"z": Pool(nn.Identity(), 3)}
    ),
    "encoder: expected latent sites in a plate, got 'mu'": _args(REST, {"mu": Members()}),
    r"family: expected a group \('mu', 'z'\) of sites that one": _args(
        {("mu", "z"): "full_rank", "*": "flow"}, Members()
    ),
    "encoder: expected an encoder for 'mu', and": _args(
        REST | {"mu": Block("flow", source="encoder")}, Members()
    ),
    r"given: expected names of latent sites .* got w": _args(
        REST | {"z": Block("flow", given="w")}
    ),
    "depend on one another": _args(
        {
            "z": Block("flow", given="mu"),
            "mu": Block("mean_scale", given="theta"),
            "theta": Block("mean_scale", given="mu"),
        }
    ),
    "given: expected sites of which every member has its own": _args(
        REST | {"mu": Block("mean_scale", given="z")}, Members()
    ),
    "given: expected another word for a joint family": _args(
        {"*": Block("flow", given="previous")}
    ),
    "plate: expected the plate whose members share .* 'mu': one of": _args(
        REST | {"mu": Block("flow", source="shared")}
    ),
    "prior: expected a site by itself: a vector for a joint family": _args(
        {("mu", "theta"): Block("full_rank", prior="location"), "z": "flow"}, Members()
    ),
    "encoder: expected 4 sites, one for each step": lambda: FamilyGuide(
        ladder, "mean_scale", Steps()
    ).setup(data(N, 4)),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "bayes"}, "family: expected a guide family"),
        ({"source": "encode"}, "source: expected one of"),
        ({"prior": "mean"}, "prior: expected one of"),
        ({"plate": 3}, "plate: expected a name, got 3"),
        ({"source": "free", "plate": "data"}, "plate: expected none for a free block"),
        ({"given": 3}, "given: expected names of latent sites, got 3"),
        ({"given": [3]}, r"given: expected names of latent sites, got \[3\]"),
        ({"family": "noise_only", "given": "mu"}, "family: expected one with heads"),
    ],
)
def test_a_block_checks_what_it_is_told(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Block(**{"family": "mean_scale"} | options)


def test_a_plate_that_changes_its_size_is_named():
    guide = FamilyGuide(hierarchy, "mean_scale").setup(X)
    wanted = "model: expected the plate 'data' of 6 members, which have parameters, got one of 4"
    with private_modules(), pytest.raises(ValueError, match=wanted):
        guide(data(4, 1))
    guide = FamilyGuide(grouped, "mean_scale").setup(X, GROUPS)
    with private_modules(), pytest.raises(ValueError, match=r"'data' of 6 members"):
        guide(X[:3], GROUPS[:3])


def test_parameters_for_each_datum_are_no_match_for_minibatches():
    with pytest.raises(ValueError, match="guide: expected an encoder, or shared parameters"):
        fit(hierarchy, FamilyGuide(hierarchy, "mean_scale"), X, batch_size=3, progress=False)


def test_a_state_from_before_families_went_by_site_is_read():
    """Then it held the length of the features, and the shapes of the heads."""
    guide = FamilyGuide(ladder, "mean_scale", mlp(1, 4)).setup(X)
    state = guide.state_dict()
    shapes = {key: [] for key in guide.heads}
    state["_extra_state"] = {"features": 4, "shapes": shapes, "family": "mean_scale"}
    other = FamilyGuide(ladder, "mean_scale", mlp(1, 4))
    other.load_state_dict(state)
    with private_modules():
        torch.manual_seed(6)
        expected = guide(X)
        torch.manual_seed(6)
        assert torch.equal(other(X)["above"], expected["above"])


@pytest.mark.parametrize("kind", list(BY_SITE))
def test_under_autocast(kind):
    """Under autocast a loss is near that in full precision."""
    families_, encoder = BY_SITE[kind]
    x = X.float()
    torch.set_default_dtype(torch.float32)
    try:
        with private_modules():
            guide = FamilyGuide(hierarchy, families_, copy.deepcopy(encoder)).setup(x)
            torch.manual_seed(2)
            full = negative_elbo(hierarchy, guide, x)
            torch.manual_seed(2)
            with torch.autocast("cpu", torch.bfloat16):
                half = negative_elbo(hierarchy, guide, x)
    finally:
        torch.set_default_dtype(torch.float64)
    assert torch.isfinite(half) and abs(half - full) < 0.1 * (1 + abs(full))


@pytest.mark.parametrize("names", [("a.b", "a_b"), ("keys", "keys_"), ("u", "v")])
def test_every_site_has_a_head_of_its_own_whatever_its_name(names):
    def model(x):
        for name in names:
            pyro.sample(name, dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])

    guide = FamilyGuide(model, "mean_scale").setup(X)
    keys = [block.key for block in guide.blocks]
    assert len(set(keys)) == 2 == len(guide.heads)
    joint = FamilyGuide(model, {names[0]: "full_rank", names[1]: "full_rank"}).setup(X)
    assert len(joint.heads) == 2


@pytest.mark.parametrize("family", ["mean_scale", "full_rank", "flow"])
def test_bounds_that_are_tensors_count_each_member_once(family):
    """Uniform(0, 1) in a plate of 3 is three latents, however its bounds are given."""

    def model(low, high):
        with pyro.plate("p", 3):
            s = pyro.sample("s", dist.Uniform(low, high))
        pyro.sample("o", dist.Normal(s.sum(), 1.0), obs=torch.tensor(1.0))

    losses = []
    for low, high in ((torch.tensor(0.0), torch.tensor(1.0)), (torch.zeros(3), torch.ones(3))):
        torch.manual_seed(0)
        guide = FamilyGuide(model, family).setup(low, high)
        with private_modules():
            assert guide(low, high)["s"].shape == (3,)
            torch.manual_seed(1)
            losses.append(negative_elbo(model, guide, low, high))
    assert torch.allclose(*losses, rtol=1e-9)


def test_supports_that_move_are_refused():
    def dependent(x):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        s = pyro.sample("s", dist.Uniform(0.0, top))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(s, 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match="support of 's' that does not depend on other latents"):
        FamilyGuide(dependent, "mean_scale").setup(X)

    def each(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Uniform(x[:, 0], x[:, 0] + 1))
            pyro.sample("x", dist.Normal(s, 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match="support of 's' that all members of 'data' share"):
        FamilyGuide(each, "mean_scale", nn.Identity()).setup(X)


def test_a_global_site_given_those_of_a_plate_has_its_own_shape():
    """And the ELBO of such a guide is a bound on log p(y), which is known."""

    def model(y):
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("g", 2):
            th = pyro.sample("th", dist.Normal(m[..., 0:1] + m[..., 1:2], 1.0))
        pyro.sample("o", dist.Normal(th.sum(-1), 1.0), obs=y)

    y = torch.tensor(0.0)
    guide = FamilyGuide(model, {"th": "full_rank", "m": Block("full_rank", given=["th"])}).setup(y)
    with private_modules():
        drawn = guide(y)
        assert drawn["th"].shape == (2,) and drawn["m"].shape == (2,)
    joint = FamilyGuide(model, {"th": "full_rank", "m": Block("mean_scale", given=["th"])}).setup(y)
    with private_modules():
        assert joint(y)["m"].shape == (2,)
        torch.manual_seed(0)
        losses = torch.stack([negative_elbo(model, guide, y).detach() for _ in range(400)])
    exact = dist.Normal(0.0, math.sqrt(4 * 2 + 2 + 1)).log_prob(y)
    assert -losses.mean() < exact + 5 * losses.std() / 400**0.5


def test_a_prior_without_a_location_is_named_and_a_transformed_one_is_read():
    def cholesky(x):
        pyro.sample("L", dist.LKJCholesky(3, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])

    guide = FamilyGuide(cholesky, Block("mean_scale", prior="location")).setup(X)
    with (
        private_modules(),
        pytest.raises(ValueError, match="prior: expected a prior of 'L' with a"),
    ):
        guide(X)

    def moved(x):
        shift = dist.transforms.AffineTransform(3.0, 2.0)
        pyro.sample("w", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [shift]))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])

    guide = FamilyGuide(moved, Block("mean_scale", prior="location")).setup(X)
    with private_modules():
        fn = poutine.trace(guide).get_trace(X).nodes["w"]["fn"]
    assert torch.allclose(fn.loc, 3.0 + guide.heads["w"](None).loc)
