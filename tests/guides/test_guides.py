"""One guide for every family: identities that hold for every draw, over the whole registry."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, DENSITIES, FAMILIES, cases
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList
from torch.distributions import biject_to

from ppvae import VAE, Family, FamilyGuide, families, likelihoods
from ppvae._scopes import private_modules
from ppvae.nn import mlp
from ppvae.programs.runs import draws_plate, trace_pair

FAMILY = pytest.mark.parametrize("family", list(FAMILIES))
CASE = pytest.mark.parametrize("case", CASES)


def build(family, case):
    torch.manual_seed(1)
    case = cases()[case]
    guide = FamilyGuide(case.model, FAMILIES[family], case.encoder)
    return case, guide.setup(*case.args)


@FAMILY
@CASE
def test_draws_every_site_in_its_support(family, case):
    case, guide = build(family, case)
    with private_modules():
        model_trace, guide_trace = trace_pair(case.model, guide, *case.args)
    for name, shape in case.latents.items():
        assert guide_trace.nodes[name]["value"].shape == shape
        prior = model_trace.nodes[name]["fn"]
        assert prior.support.check(guide_trace.nodes[name]["value"]).all()
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    assert torch.isfinite(guide_trace.log_prob_sum() + model_trace.log_prob_sum())


@pytest.mark.parametrize("family", [name for name in DENSITIES if name != "noise_only"])
@CASE
def test_log_density_is_that_of_the_head_less_the_log_determinant(family, case):
    """log q(value) = log q(u) - log |d value / d u|, with u found again from the values."""
    case, guide = build(family, case)
    with private_modules():
        model_trace, guide_trace = trace_pair(case.model, guide, *case.args)
    scale = guide_trace.nodes[next(iter(case.latents))]["scale"]
    drawn = guide_trace.log_prob_sum() / scale
    features = None if case.encoder is None else case.encoder(*case.args)
    if "data" in guide_trace.nodes:
        features = features[guide_trace.nodes["data"]["value"]]
    expected, pieces = torch.tensor(0.0), {}
    for name in case.latents:
        node = model_trace.nodes[name]
        transform = biject_to(node["fn"].support)
        value = guide_trace.nodes[name]["value"]
        u = transform.inv(value)
        expected = expected - transform.log_abs_det_jacobian(u, value).sum()
        if features is not None and "right of" in CASE_OF[id(case.model)]:
            u = u.movedim(1, 0)
        pieces[name] = u
    if "joint" in guide.heads:
        rows = 1 if features is None else len(features)
        flat = torch.cat([u.reshape(rows, -1) for u in pieces.values()], -1)
        fn = guide.heads["joint"](features)
        expected = expected + fn.log_prob(flat if features is not None else flat[0]).sum()
    else:
        for name, u in pieces.items():
            fn = guide.heads[name](features)
            expected = expected + fn.log_prob(u.reshape(fn.shape())).sum()
    assert torch.allclose(drawn, expected, rtol=1e-9, atol=1e-9)


CASE_OF = {id(case.model): name for name, case in cases().items()}


@CASE
def test_noise_only_is_the_prior(case):
    case, guide = build("noise_only", case)
    with private_modules():
        model_trace, guide_trace = trace_pair(case.model, guide, *case.args)
    for name in case.latents:
        value = guide_trace.nodes[name]["value"]
        log_q = guide_trace.nodes[name]["fn"].log_prob(value)
        assert torch.equal(log_q, model_trace.nodes[name]["fn"].log_prob(value))


@FAMILY
@CASE
def test_gradients_reach_every_parameter_in_use(family, case):
    case, guide = build(family, case)
    with private_modules():
        model_trace, guide_trace = trace_pair(case.model, guide, *case.args)
    if not list(guide.heads.parameters()):
        return  # a family without channels
    (model_trace.log_prob_sum() - guide_trace.log_prob_sum()).backward()
    used = [(n, p) for n, p in guide.named_parameters() if guide.family.channels or "enc" not in n]
    for name, parameter in used:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@FAMILY
@CASE
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_plain_pyro_trains_and_predicts(family, case, objective, plain_pyro):
    case, guide = build(family, case)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 1e-3}), objective())
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    losses = [svi.step(*case.args) for _ in range(2)]
    assert all(torch.isfinite(torch.tensor(losses)))
    moved = {n for n, p in guide.named_parameters() if not torch.equal(p, before[n])}
    heads = {name for name in before if name.startswith("heads")}
    assert heads <= moved
    draws = Predictive(case.model, guide=guide, num_samples=3)(*case.args)
    assert draws[next(iter(case.latents))].shape[0] == 3


@pytest.mark.parametrize("family", list(DENSITIES))
def test_both_objectives_of_pyro_agree_in_the_mean(family, plain_pyro):
    """Analytic KL must not forget the log-determinant: 5 standard errors of 400 differences."""
    case, guide = build(family, "simplex")
    objectives = [TraceMeanField_ELBO(), Trace_ELBO()]
    values = torch.tensor(
        [[o.loss(case.model, guide, *case.args) for o in objectives] for _ in range(400)]
    )
    difference = values[:, 0] - values[:, 1]
    assert difference.mean().abs() < 5 * difference.std() / 400**0.5 + 1e-9


@FAMILY
@pytest.mark.parametrize("case", ["one vector", "one scalar", "positive", "left of pixels"])
def test_draws_in_a_plate_are_like_single_ones(family, case):
    case, guide = build(family, case)
    with private_modules():
        draws = draws_plate(case.model, *case.args, draws=5)
        _, guide_trace = trace_pair(case.model, guide, *case.args, draws=draws)
    for name, shape in case.latents.items():
        value = guide_trace.nodes[name]["value"]
        assert value.shape[-len(shape) :] == shape
        if FAMILIES[family].name not in ("deterministic", "zero"):
            assert value.shape == (5, *shape)
            assert not torch.equal(value[0], value[1])


@FAMILY
@CASE
def test_a_guide_built_anew_loads_before_its_first_call(family, case, tmp_path):
    case, guide = build(family, case)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    fresh = FamilyGuide(case.model, FAMILIES[family], copy.deepcopy(case.encoder))
    fresh.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    for (name, old), (_, new) in zip(
        guide.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert name == "_extra_state" or torch.equal(old, new), name
    with private_modules():
        torch.manual_seed(5)
        old = guide(*case.args)
        torch.manual_seed(5)
        new = fresh(*case.args)
    assert all(torch.equal(old[name], new[name]) for name in case.latents)


def test_batches_may_have_any_size(plain_pyro):
    case, guide = build("mean_scale", "one vector")
    assert guide(case.args[0][:2])["z"].shape == (2, 2)
    assert guide(torch.randn(11, 3))["z"].shape == (11, 2)


def test_the_model_is_told_the_rows_and_the_guide_keeps_out():
    case, guide = build("mean_scale", "told rows")
    with private_modules():
        model_trace, guide_trace = trace_pair(case.model, guide, *case.args)
    assert torch.equal(model_trace.nodes["data"]["value"], case.args[1])
    assert guide_trace.nodes["z"]["scale"] == model_trace.nodes["z"]["scale"] == 4


def test_own_subsample_is_shared_and_picks_the_features():
    case, guide = build("deterministic", "own rows")
    with private_modules():
        model_trace, guide_trace = trace_pair(case.model, guide, *case.args)
        rows = guide_trace.nodes["data"]["value"]
        assert torch.equal(model_trace.nodes["data"]["value"], rows)
        expected = guide.heads["z"](case.encoder(*case.args))
    assert torch.equal(guide_trace.nodes["z"]["value"], expected.v[rows])


def test_local_and_global_latents_through_a_guide_list(plain_pyro):
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal((z * w).sum(-1), 0.5), obs=x[:, 0])

    x = torch.randn(5, 3)
    guide = AutoGuideList(model)
    local = FamilyGuide(poutine.block(model, hide=["w"]), families.full_rank, mlp(3, 8))
    guide.append(FamilyGuide(poutine.block(model, expose=["w"]), families.mean_scale))
    guide.append(local)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    assert all(torch.isfinite(torch.tensor([svi.step(x) for _ in range(3)])))
    draws = guide(x)
    assert draws["w"].shape == (2,) and draws["z"].shape == (5, 2)


def test_families_over_another_support(plain_pyro):
    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Dirichlet(torch.ones(3)))
            g = pyro.sample("g", dist.Gamma(2.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(s[..., 0] * g + k, 0.5), obs=x[:, 0])

    x = torch.randn(5, 3)
    parts = {"s": Family(dist.Dirichlet), "g": Family(dist.Gamma), "k": Family(dist.Bernoulli)}
    guide = AutoGuideList(model)
    for name, family in parts.items():
        guide.append(FamilyGuide(poutine.block(model, expose=[name]), family, mlp(3, 8)))
    trace = poutine.trace(guide).get_trace(x)
    for name, family in parts.items():
        assert isinstance(_bare(trace.nodes[name]["fn"]), family.distribution)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert torch.isfinite(torch.tensor(svi.step(x)))


def _bare(fn):
    return fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn


def test_parameters_of_two_guides_never_mix(plain_pyro):
    """In Pyro's store equal names would be one parameter; each guide trains its own."""
    case = cases()["one vector"]
    for _ in range(2):
        guide = FamilyGuide(case.model, families.mean_scale, mlp(3, 8))
        svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        svi.step(*case.args)
        before = [p.detach().clone() for p in guide.parameters()]
        svi.step(*case.args)
        assert not any(torch.equal(b, p) for b, p in zip(before, guide.parameters(), strict=True))


def test_setup_uses_up_no_random_numbers_of_the_model_and_changes_no_buffer():
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    case = cases()["one vector"]
    before = copy.deepcopy(encoder.state_dict())
    guide = FamilyGuide(case.model, families.noise_only, encoder)
    state = torch.get_rng_state()
    guide.setup(*case.args)
    assert torch.equal(state, torch.get_rng_state())
    FamilyGuide(case.model, families.mean_scale, encoder).setup(*case.args)
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in before.items())
    assert encoder.training


def test_guide_of_a_vae_has_its_parameters_at_once():
    model = VAE(mlp(2, 4, out=5), 2, likelihoods.Bernoulli())
    guide = FamilyGuide(model, families.mean_scale, mlp(5, 4))
    assert [n for n, _ in guide.named_parameters()][-1] == "heads.z.scale.linear.bias"


def test_a_learned_hierarchical_prior_is_followed_by_noise_only():
    class Prior(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor([10.0, -10.0]))

        def forward(self):
            return dist.Normal(self.loc, 0.01).to_event(1)

    model = VAE(mlp(2, out=5), 2, likelihoods.Bernoulli(), prior=Prior())
    guide = FamilyGuide(model, families.noise_only, mlp(5, 4))
    with private_modules():
        z = guide(torch.zeros(7, 5))["z"]
    assert z.shape == (7, 2) and (z[:, 0] > 9).all() and (z[:, 1] < -9).all()


def _no_plate(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def _discrete(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(k.to(x), 1.0), obs=x[:, 0])


def _two_plates(x):
    with pyro.plate("a", len(x), dim=-2), pyro.plate("b", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, :1])


def _nothing(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])


ONE = cases()["one vector"].model
BAD = {
    "no family": (ONE, "mean_scale", lambda: None, TypeError, "family: expected a guide family"),
    "no module": (
        ONE,
        families.mean_scale,
        lambda: 3,
        TypeError,
        "encoder: expected a torch.nn.Module",
    ),
    "encoder input": (
        ONE,
        families.mean_scale,
        lambda: mlp(7, 4),
        ValueError,
        r"encoder: .*\(6, 3\)",
    ),
    "encoder output": (
        ONE,
        families.mean_scale,
        lambda: torch.nn.Flatten(0),
        ValueError,
        r"encoder: expected features of shape \(batch, features\).*\(18,\)",
    ),
    "encoder rows": (
        ONE,
        families.mean_scale,
        lambda: torch.nn.Sequential(torch.nn.Flatten(0), torch.nn.Unflatten(0, (9, 2))),
        ValueError,
        r"encoder: expected features of shape \(batch, features\).*\(6, 3\)\]; got \(9, 2\)",
    ),
    "no plate": (
        _no_plate,
        families.mean_scale,
        lambda: mlp(3, 4),
        ValueError,
        "in one plate, got 'w' in",
    ),
    "discrete": (
        _discrete,
        families.full_rank,
        lambda: mlp(3, 4),
        ValueError,
        "full_rank cannot .* 'k'",
    ),
    "support": (ONE, Family(dist.Gamma), lambda: mlp(3, 4), ValueError, "cannot represent .* 'z'"),
    "plates": (
        _two_plates,
        families.mean_scale,
        lambda: mlp(3, 4),
        ValueError,
        r"plate: .*\['a', 'b'\]",
    ),
    "nothing": (
        _nothing,
        families.mean_scale,
        lambda: mlp(3, 4),
        ValueError,
        "latent sites, got none",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input(name):
    model, family, encoder, error, message = BAD[name]
    with pytest.raises(error, match=message):
        FamilyGuide(model, family, encoder()).setup(torch.randn(6, 3))


def test_an_encoder_of_another_width_is_refused_later():
    case, guide = build("mean_scale", "one vector")
    guide.encoder = mlp(3, 5)
    with private_modules(), pytest.raises(ValueError, match=r"\(batch, 8\)"):
        guide(*case.args)


class _First(torch.nn.Module):
    """Its own first argument as features."""

    def forward(self, x, *rest):
        return x


def _identity(guide):
    """Makes the code of a deterministic guide its features."""
    linear = guide.heads["z"].v.linear
    linear.weight.data, linear.bias.data = torch.eye(2), torch.zeros(2)


def _indexed(x, rows):
    with pyro.plate("data", len(x), subsample=rows) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x[index])


@pytest.mark.parametrize("rows", [[7, 2, 5], [1, 0], list(range(9, 0, -1))])
def test_rows_that_the_model_was_told_meet_their_features(rows):
    """The encoder sees all the data, the model some: code and datum must be of one row."""
    x = torch.arange(20.0).reshape(10, 2)
    guide = FamilyGuide(_indexed, families.deterministic, _First())
    guide.setup(x, torch.tensor([7, 2, 5]))
    _identity(guide)
    with private_modules():
        model_trace, guide_trace = trace_pair(_indexed, guide, x, torch.tensor(rows))
    assert torch.equal(guide_trace.nodes["z"]["value"], x[rows])
    assert torch.equal(model_trace.nodes["x"]["value"], x[rows])
    assert guide_trace.nodes["z"]["scale"] == model_trace.nodes["z"]["scale"]


def test_a_plate_with_its_own_subsample_may_change_its_size(plain_pyro):
    case, guide = build("deterministic", "own rows")
    for size in (6, 9, 3):
        x = torch.randn(size, 3)
        model_trace, guide_trace = trace_pair(case.model, guide, x) if size >= 4 else (None, None)
        if size >= 4:
            rows = guide_trace.nodes["data"]["value"]
            expected = guide.heads["z"](case.encoder(x)).v[rows]
            assert torch.equal(guide_trace.nodes["z"]["value"], expected)
            assert torch.equal(model_trace.nodes["data"]["value"], rows)


def _local_global(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z * w).sum(-1), 0.5), obs=x[:, 0])


@FAMILY
@pytest.mark.parametrize("part", ["local", "global", "both"])
def test_every_family_in_a_guide_list(family, part, plain_pyro):
    ours = {"local": "z", "global": "w", "both": "zw"}[part]
    x, guide = torch.randn(5, 3), AutoGuideList(_local_global)
    for name in "wz":
        chosen = FAMILIES[family] if name in ours else families.mean_scale
        part_model = poutine.block(_local_global, expose=[name])
        guide.append(FamilyGuide(part_model, chosen, mlp(3, 8) if name == "z" else None))
    svi = SVI(_local_global, guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    assert torch.isfinite(torch.tensor([svi.step(x) for _ in range(2)])).all()


def test_a_guide_list_takes_other_sizes_if_it_is_given_its_plates(plain_pyro):
    def plates(x):
        return pyro.plate("data", len(x))

    for given in (plates, None):
        guide = AutoGuideList(_local_global, create_plates=given)
        guide.append(FamilyGuide(poutine.block(_local_global, hide=["z"]), families.mean_scale))
        local = FamilyGuide(poutine.block(_local_global, hide=["w"]), families.flow, mlp(3, 8))
        guide.append(local)
        guide(torch.randn(5, 3))
        if given is None:
            with pytest.raises(ValueError, match="unless it is given `create_plates`"):
                guide(torch.randn(4, 3))
        else:
            assert guide(torch.randn(4, 3))["z"].shape == (4, 2)


def test_a_copy_is_a_guide_of_its_own(plain_pyro):
    model = VAE(mlp(2, 4, out=5), 2, likelihoods.Normal(0.5))
    guide = FamilyGuide(model, families.noise_only, mlp(5, 4))
    twin_model, twin = copy.deepcopy((model, guide))
    assert guide.model is model and twin.model is twin_model
    assert copy.deepcopy(guide).model is model
    guide = FamilyGuide(model, families.mean_scale, mlp(5, 4))
    twin_model, twin = copy.deepcopy((model, guide))
    x = torch.randn(6, 5)
    for pair in ((twin_model, twin), (model, guide)):
        before = [p.detach().clone() for module in pair for p in module.parameters()]
        SVI(*pair, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO()).step(x)
        after = [p for module in pair for p in module.parameters()]
        assert not any(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_pickle_keeps_the_parameters_and_says_that_it_leaves_out_the_model(tmp_path, plain_pyro):
    case, guide = build("mean_scale", "one vector")
    torch.save(guide, tmp_path / "guide.pt")
    again = torch.load(tmp_path / "guide.pt", weights_only=False)
    assert again(*case.args)["z"].shape == (6, 2) and guide.model is case.model
    with pytest.raises(RuntimeError, match="which pickle leaves out"):
        again.model  # noqa: B018


def test_a_mixture_is_a_prior_like_any_other():
    class Mixture(torch.nn.Module):
        def forward(self):
            parts = dist.Normal(torch.randn(3, 2), 1.0).to_event(1)
            return dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), parts)

    model = VAE(mlp(2, out=5), 2, likelihoods.Bernoulli(), prior=Mixture())
    for family in ("mean_scale", "full_rank", "flow", "deterministic"):
        guide = FamilyGuide(model, families.LADDER[family], mlp(5, 4))
        with private_modules():
            model_trace, _ = trace_pair(model, guide, torch.zeros(7, 5))
        assert torch.isfinite(model_trace.log_prob_sum())


def test_student_t_trains_on_positive_latents(plain_pyro):
    decoder = mlp(3, 16, out=5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.full((3,), 2.0), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.1).to_event(1), obs=x)

    x = torch.randn(200, 5)
    guide = FamilyGuide(model, families.student_t, mlp(5, 16))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    assert torch.isfinite(torch.tensor([svi.step(x) for _ in range(100)])).all()


def test_a_fixed_tensor_fits_its_site_or_is_named():
    x = torch.randn(6, 3)
    widths = torch.tensor([0.1, 0.2])
    guide = FamilyGuide(ONE, Family(dist.Normal, scale=widths), mlp(3, 4)).setup(x)
    with private_modules():
        _, guide_trace = trace_pair(ONE, guide, x)
    assert torch.equal(guide_trace.nodes["z"]["fn"].base_dist.scale, widths.expand(6, 2))
    with pytest.raises(ValueError, match=r"scale=tensor.* cannot represent .* 'z'"):
        FamilyGuide(ONE, Family(dist.Normal, scale=torch.ones(5)), mlp(3, 4)).setup(x)
