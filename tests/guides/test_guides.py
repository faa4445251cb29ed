"""One guide for every family: identities that hold for every draw, over the whole registry."""

import copy
import warnings
from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, DENSITIES, FAMILIES, LONG, Own, cases, in_turn
from linear import local
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList
from torch import nn
from torch.distributions import biject_to

from ppvae import VAE, Family, FamilyGuide, HeavyTails, families, likelihoods
from ppvae._scopes import private_modules
from ppvae.nn import mlp
from ppvae.programs.tracing import draws_plate, trace_pair

FAMILY = pytest.mark.parametrize("family", list(FAMILIES))
CASE = pytest.mark.parametrize("case", CASES)


def build(family, case):
    torch.manual_seed(1)
    case = cases()[case]
    guide = FamilyGuide(case.model, FAMILIES[family], case.encoder)
    return case, guide.setup(*case.args)


def traces(model, guide, *args, draws=None):
    with private_modules():
        pair = trace_pair(model, guide, *args, draws=draws)
    for trace in pair:
        trace.compute_log_prob()
    return pair


def steps(model, guide, *args, objective=Trace_ELBO, number=2, rate=1e-3):
    """Losses of some steps of plain Pyro, all finite."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": rate}), objective())
    losses = torch.tensor([svi.step(*args) for _ in range(number)])
    assert torch.isfinite(losses).all()


@FAMILY
@CASE
def test_draws_every_site_in_its_support_and_learns_from_them(family, case):
    own_rows = case == "own rows"  # else the model has them, and the guide keeps out
    case, guide = build(family, case)
    model_trace, guide_trace = traces(case.model, guide, *case.args)
    assert ("data" in guide_trace.nodes) == own_rows
    if family in ("deterministic", "zero"):
        assert guide_trace.log_prob_sum() == 0
    for name, shape in case.latents.items():
        assert guide_trace.nodes[name]["value"].shape == shape
        prior = model_trace.nodes[name]["fn"]
        assert prior.support.check(guide_trace.nodes[name]["value"]).all()
    difference = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
    assert torch.isfinite(difference)
    if list(guide.heads.parameters()):  # else the family has no channels
        difference.backward()
        for name, parameter in guide.named_parameters():
            if guide.family.channels or "enc" not in name:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("family", list(DENSITIES))
@CASE
def test_log_density_is_that_of_the_head_less_the_log_determinant(family, case):
    """log q(value) = log q(u) - log |d value / d u|, with u found again from the values.

    `noise_only` has the density of the prior itself, to the last bit.
    """
    left = case == "right of steps"
    case, guide = build(family, case)
    model_trace, guide_trace = traces(case.model, guide, *case.args)
    if family == "noise_only":
        for name in case.latents:
            node = guide_trace.nodes[name]
            assert torch.equal(node["log_prob"], model_trace.nodes[name]["log_prob"])
        return
    features = None if case.encoder is None else case.encoder(*case.args)
    if "data" in guide_trace.nodes:
        features = features[guide_trace.nodes["data"]["value"]]
    expected, pieces = torch.tensor(0.0), {}
    for name in case.latents:
        transform = biject_to(model_trace.nodes[name]["fn"].support)
        value = guide_trace.nodes[name]["value"]
        u = transform.inv(value)
        expected = expected - transform.log_abs_det_jacobian(u, value).sum()
        pieces[name] = u.movedim(1, 0) if left else u
    if "joint" in guide.heads:
        rows = 1 if features is None else len(features)
        flat = torch.cat([u.reshape(rows, -1) for u in pieces.values()], -1)
        pieces = {"joint": flat if features is not None else flat[0]}
    for name, u in pieces.items():
        fn = guide.heads[name](features)
        expected = expected + fn.log_prob(u.reshape(fn.shape())).sum()
    scale = guide_trace.nodes[next(iter(case.latents))]["scale"]
    assert torch.allclose(guide_trace.log_prob_sum() / scale, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "case"), in_turn(FAMILIES, CASES, 4))
def test_plain_pyro_trains_and_predicts(family, case, plain_pyro):
    case, guide = build(family, case)
    # the networks of a flow move in the second step only, as they end in zeros to begin with
    for objective, number in ((Trace_ELBO, 2), (TraceMeanField_ELBO, 1)):
        before = {name: p.detach().clone() for name, p in guide.named_parameters()}
        steps(case.model, guide, *case.args, objective=objective, number=number)
        moved = {n for n, p in guide.named_parameters() if not torch.equal(p, before[n])}
        assert {name for name in before if name.startswith("heads")} <= moved
    draws = Predictive(case.model, guide=guide, num_samples=3)(*case.args)
    assert draws[next(iter(case.latents))].shape[0] == 3


#: heads of each kind; the others where there is time
HEADS = ["noise_only", "mean_only", "full_rank", "student_t", "flow"]


@pytest.mark.parametrize("family", list(DENSITIES) if LONG else HEADS)
def test_both_objectives_of_pyro_agree_in_the_mean(family, plain_pyro):
    """Analytic KL must not forget the log-determinant: 5 standard errors of 30 differences."""
    case, guide = build(family, "simplex")
    objectives = [TraceMeanField_ELBO(), Trace_ELBO()]
    values = torch.tensor(
        [[o.loss(case.model, guide, *case.args) for o in objectives] for _ in range(30)]
    )
    difference = values[:, 0] - values[:, 1]
    assert difference.mean().abs() < 5 * difference.std() / 30**0.5 + 1e-9


SEVERAL = ["one vector", "one scalar", "positive", "left of pixels", "regression", "hierarchy"]


@FAMILY
@pytest.mark.parametrize("case", SEVERAL)
def test_draws_in_a_plate_are_like_single_ones(family, case):
    case, guide = build(family, case)
    with private_modules():
        plate = draws_plate(case.model, *case.args, draws=5)
    _, guide_trace = traces(case.model, guide, *case.args, draws=plate)
    for name, shape in case.latents.items():
        value = guide_trace.nodes[name]["value"]
        assert value.shape[value.dim() - len(shape) :] == shape
        if family not in ("deterministic", "zero"):  # a latent without plates is set apart by ones
            assert value.shape == (5, *[1] * (value.dim() - 1 - len(shape)), *shape)
            assert not torch.equal(value[0], value[1])


@pytest.mark.parametrize(("family", "case"), in_turn(FAMILIES, CASES, 3))
def test_a_guide_built_anew_loads_before_its_first_call(family, case, tmp_path):
    case, guide = build(family, case)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    fresh = FamilyGuide(case.model, FAMILIES[family], copy.deepcopy(case.encoder))
    fresh.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    for (name, old), (_, new) in zip(
        guide.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert old == new if name == "_extra_state" else torch.equal(old, new), name
    values = []
    for each in (guide, fresh):
        torch.manual_seed(5)
        with private_modules():
            values.append(each(*case.args))
    assert all(torch.equal(values[0][name], values[1][name]) for name in case.latents)


@pytest.mark.parametrize("family", ["mean_only_bounded", "half_scale"])
def test_a_state_of_another_family_is_refused(family):
    """Equal shapes, another meaning: nothing is loaded. States that do not say load as before."""
    state = build("mean_only", "one vector")[1].state_dict()
    guide = build(family, "one vector")[1]
    before = [parameter.clone() for parameter in guide.parameters()]
    with pytest.raises(ValueError, match=r"family: expected a state of .*, got one of mean_only"):
        nn.ModuleList([guide]).load_state_dict({f"0.{name}": v for name, v in state.items()})
    assert all(map(torch.equal, guide.parameters(), before))
    del state["_extra_state"]["family"]
    guide.load_state_dict(state)
    other = build("mean_only", "one vector")[1]
    state["_extra_state"]["family"] = "Family(Normal, scale=1.0)"  # by its expression
    other.load_state_dict(state)
    assert all(map(torch.equal, guide.parameters(), other.parameters()))


def test_two_copies_of_a_guide_are_guides_of_their_own(plain_pyro, tmp_path):
    """With the model's copy if copied together; in Pyro's store no name stands for two."""
    model = VAE(mlp(2, 4, out=5), 2, likelihoods.Normal(0.5))
    for family in (families.noise_only, "mean_scale"):
        guide = FamilyGuide(model, family, mlp(5, 4))
        twin_model, twin = copy.deepcopy((model, guide))
        assert guide.model is model and twin.model is twin_model
        assert copy.deepcopy(guide).model is model
    assert [n for n, _ in guide.named_parameters()][-1] == "heads.z.scale.linear.bias"
    torch.save(guide, tmp_path / "guide.pt")
    loaded = torch.load(tmp_path / "guide.pt", weights_only=False)
    x, again = torch.randn(6, 5), FamilyGuide(model, "mean_scale", mlp(5, 4))
    assert loaded(x)["z"].shape == (6, 2) and guide.model is model
    assert type(loaded.model) is VAE and loaded.model is not model
    for pair in ((twin_model, twin), (model, guide), (model, again)):
        before = [p.detach().clone() for module in pair for p in module.parameters()]
        steps(*pair, x, objective=TraceMeanField_ELBO, rate=0.1)
        after = [p for module in pair for p in module.parameters()]
        assert not any(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_setup_uses_up_no_random_numbers_of_the_model_and_changes_no_buffer():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    case = cases()["one vector"]
    before = copy.deepcopy(encoder.state_dict())
    guide = FamilyGuide(case.model, families.noise_only, encoder)
    state = torch.get_rng_state()
    guide.setup(*case.args)
    assert torch.equal(state, torch.get_rng_state())
    FamilyGuide(case.model, families.mean_scale, encoder).setup(*case.args)
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in before.items())
    assert encoder.training


@pytest.mark.parametrize("kind", [lambda loc: loc, lambda loc: dist.Laplace(loc, 0.1)])
@pytest.mark.parametrize("case", ["one vector", "positive", "steps inside"])
def test_any_object_with_the_attributes_is_a_family(case, kind, plain_pyro):
    """Without a `support` a head for each site is asked for it; a tensor is a point."""
    case, family = cases()[case], Own(kind)
    guide = FamilyGuide(case.model, family, case.encoder).setup(*case.args)
    assert family.asked == [None] * len(case.latents) + [8] * len(case.latents)
    assert all(head.net[0].num_batches_tracked == 0 for head in guide.heads.values())
    steps(case.model, guide, *case.args)
    values = guide(*case.args)
    assert {name: value.shape for name, value in values.items()} == case.latents


class _First(nn.Module):
    """Its own first argument as features."""

    def forward(self, x, *rest):
        return x


def _indexed(x, rows):
    with pyro.plate("data", len(x), subsample=rows) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x[index])


@pytest.mark.parametrize("rows", [[7, 2, 5], [1, 0], list(range(9, 0, -1))])
def test_rows_that_the_model_was_told_meet_their_features(rows):
    """The encoder sees all the data, the model some: code and datum must be of one row."""
    x = torch.arange(20.0).reshape(10, 2)
    guide = FamilyGuide(_indexed, "deterministic", _First()).setup(x, torch.tensor([7, 2, 5]))
    linear = guide.heads["z"].v.linear
    linear.weight.data, linear.bias.data = torch.eye(2), torch.zeros(2)
    model_trace, guide_trace = traces(_indexed, guide, x, torch.tensor(rows))
    assert torch.equal(guide_trace.nodes["z"]["value"], x[rows])
    assert torch.equal(model_trace.nodes["x"]["value"], x[rows])
    assert guide_trace.nodes["z"]["scale"] == model_trace.nodes["z"]["scale"]


def test_batches_and_own_subsamples_may_have_any_size(plain_pyro):
    case, guide = build("mean_scale", "one vector")
    for size in (2, 11):
        assert guide(torch.randn(size, 3))["z"].shape == (size, 2)
    case, guide = build("deterministic", "own rows")
    for size in (6, 9, 4):
        x = torch.randn(size, 3)
        model_trace, guide_trace = trace_pair(case.model, guide, x)
        rows = guide_trace.nodes["data"]["value"]
        expected = guide.heads["z"](case.encoder(x)).v[rows]
        assert torch.equal(guide_trace.nodes["z"]["value"], expected)
        assert torch.equal(model_trace.nodes["data"]["value"], rows)


def _steps_and_rows(x):
    """Two vectorized plates around everything, none called `data`; the data are the inner one."""
    with pyro.plate("steps", 2, dim=-2), pyro.plate("rows", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x.T)


def _local_global(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z * w).sum(-1), 0.5), obs=x[:, 0])


def _global(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 0.5), obs=x[:, 0])


@FAMILY
@pytest.mark.parametrize("part", ["local", "global", "both"])
def test_every_family_in_a_guide_list(family, part, plain_pyro):
    ours = {"local": "z", "global": "w", "both": "zw"}[part]
    x, guide = torch.randn(5, 3), AutoGuideList(_local_global)
    for name in "wz":
        chosen = FAMILIES[family] if name in ours else families.mean_scale
        part_model = poutine.block(_local_global, expose=[name])
        guide.append(FamilyGuide(part_model, chosen, mlp(3, 8) if name == "z" else None))
    steps(_local_global, guide, x, objective=TraceMeanField_ELBO, rate=1e-2)


def test_a_guide_list_takes_other_sizes_if_it_is_given_its_plates(plain_pyro):
    def plates(x):
        return pyro.plate("data", len(x))

    for given in (plates, None):
        guide = AutoGuideList(_local_global, create_plates=given)
        guide.append(FamilyGuide(poutine.block(_local_global, hide=["z"]), "mean_scale"))
        guide.append(FamilyGuide(poutine.block(_local_global, hide=["w"]), "flow", mlp(3, 8)))
        draws = guide(torch.randn(5, 3))
        assert draws["w"].shape == (2,) and draws["z"].shape == (5, 2)
        if given is None:
            with pytest.raises(ValueError, match="unless it is given `create_plates`"):
                guide(torch.randn(4, 3))
        else:
            assert guide(torch.randn(4, 3))["z"].shape == (4, 2)


@pytest.mark.parametrize("family", ["noise_only", "mean_scale"])
def test_a_guide_list_draws_the_rows_once(family, plain_pyro):
    case = cases()["own rows"]
    guide = AutoGuideList(case.model)
    guide.append(FamilyGuide(poutine.block(case.model, expose=["z"]), family, case.encoder))
    for _ in range(2):
        model_trace, guide_trace = trace_pair(case.model, guide, *case.args)
        rows = [trace.nodes["data"]["value"] for trace in (model_trace, guide_trace)]
        assert torch.equal(*rows) and guide_trace.nodes["z"]["value"].shape == (4, 2)


def test_families_over_another_support(plain_pyro):
    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Dirichlet(torch.ones(3)))
            g = pyro.sample("g", dist.Gamma(2.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(s[..., 0] * g + k, 0.5), obs=x[:, 0])

    x, guide = torch.randn(5, 3), AutoGuideList(model)
    kinds = {"s": dist.Dirichlet, "g": dist.Gamma, "k": dist.Bernoulli}
    for name, kind in kinds.items():
        guide.append(FamilyGuide(poutine.block(model, expose=[name]), Family(kind), mlp(3, 8)))
    nodes = poutine.trace(guide).get_trace(x).nodes
    for name, kind in kinds.items():
        fn = nodes[name]["fn"]
        assert isinstance(getattr(fn, "base_dist", fn), kind)
    steps(model, guide, x, number=1)


def test_student_t_trains_on_positive_latents(plain_pyro):
    prior = dist.Gamma(torch.full((3,), 2.0), 1.0).to_event(1)
    model = local(prior, lambda z: dist.Normal(z, 0.1).to_event(1))
    steps(model, FamilyGuide(model, "student_t", mlp(3, 16)), torch.randn(200, 3), number=100)


def _model(fn, plates=("data",)):
    """A model with one latent, in plates as long as the data."""

    def model(x):
        with ExitStack() as stack:
            for number, plate in enumerate(plates):
                stack.enter_context(pyro.plate(plate, len(x), dim=number - len(plates)))
            z = 0.0 if fn is None else pyro.sample("z", fn)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    return model


def _sequential(x):
    for row in pyro.plate("data", len(x)):
        pyro.sample(f"z{row}", dist.Normal(0.0, 1.0))


class _Mixed(nn.Module):
    """An encoder whose first parameter has another dtype than its features."""

    def __init__(self, first, last=lambda features: features):
        super().__init__()
        self.first = nn.Parameter(torch.ones(3, dtype=first), requires_grad=False)
        self.net, self.last = mlp(3, 4), last

    def forward(self, x):
        return self.last(self.net(x * self.first.real))


@pytest.mark.parametrize("first", [torch.complex128, torch.float32, torch.int64])
def test_heads_have_the_dtype_of_the_last_layer(first):
    guide = FamilyGuide(ONE, "mean_scale", _Mixed(first)).setup(torch.randn(6, 3))
    assert {p.dtype for p in guide.heads.parameters()} == {torch.float64}
    with private_modules():
        assert guide(torch.randn(6, 3))["z"].dtype == torch.float64


TURNED = _Mixed(torch.float64, lambda features: features * 1j)
WHOLE = _Mixed(torch.float64, torch.Tensor.long)
ONE, PLATES = cases()["one vector"].model, _model(dist.Normal(0.0, 1.0), "ab")
FLAT, NINE = nn.Flatten(0), nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (9, 2)))
FEATURES = r"encoder: expected features of shape \(batch, features\).*"
BAD = {
    r"encoder: .*\(6, 3\)": (ONE, "mean_scale", mlp(7, 4)),
    FEATURES + r"\(18,\)": (ONE, "mean_scale", FLAT),
    FEATURES + r"\(6, 3\)\], got \(9, 2\)": (ONE, "mean_scale", NINE),
    r"latent sites in a plate, got 'w' in \[\]": (_global, "mean_scale", mlp(3, 4)),
    "full_rank cannot .* 'z'.*infinitely": (_model(dist.Poisson(3.0)), "full_rank", mlp(3, 4)),
    "cannot represent .* 'z'": (ONE, Family(dist.Gamma), mlp(3, 4)),
    r"plate: .*\['a', 'b'\], which all have 6": (PLATES, "mean_scale", mlp(3, 4)),
    "latent sites, got none": (_model(None), "mean_scale", mlp(3, 4)),
    "model: expected a vectorized plate .* 'z0'": (_sequential, "mean_scale", None),
    "family: expected a guide family": (ONE, "bayes", None),
    "encoder: expected a torch.nn.Module, or .* got 3": (ONE, "mean_scale", 3),
    "encoder: .* real numbers, got torch.complex": (ONE, "mean_scale", TURNED),
    "encoder: .* real numbers, got torch.int64": (ONE, "mean_scale", WHOLE),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input(message):
    model, family, encoder = BAD[message]
    encoder = encoder.double() if isinstance(encoder, nn.Module) else encoder
    with pytest.raises((ValueError, TypeError), match=message):
        FamilyGuide(model, family, encoder).setup(torch.randn(6, 3))


def test_complex_data_are_not_the_encoders_fault():
    with pytest.raises(TypeError, match="^data: expected real numbers, .* got torch.complex128"):
        FamilyGuide(ONE, "mean_scale", mlp(3, 4)).setup(torch.randn(6, 3) + 1j)


def test_a_plate_that_is_named_decides():
    x = torch.randn(6, 3)
    for plate in "ab":
        guide = FamilyGuide(PLATES, "mean_scale", mlp(3, 4), plate=plate).setup(x)
        assert guide._plates.data == plate
    with pytest.raises(ValueError, match=r"plate: expected one of \['a', 'b'\], got 'rows'"):
        FamilyGuide(PLATES, "mean_scale", mlp(3, 4), plate="rows").setup(x)
    with pytest.raises(ValueError, match=r"encoder: expected features of shape \(2, .*'steps'"):
        FamilyGuide(_steps_and_rows, "mean_scale", mlp(2, 4), plate="steps").setup(x[:, :2])


def test_other_shapes_than_before_are_refused():
    case, guide = build("mean_scale", "one vector")
    guide.encoder = mlp(3, 5)
    with private_modules(), pytest.raises(ValueError, match=r"\(batch, 8\)"):
        guide(*case.args)
    guide = FamilyGuide(lambda x: pyro.sample("w", dist.Normal(x, 1.0).to_event(1)), "mean_scale")
    guide.setup(torch.zeros(3))
    with pytest.raises(ValueError, match=r"model: expected a latent of shape \(3,\) .* got \(2,\)"):
        guide.setup(torch.zeros(2))


def test_a_fixed_tensor_fits_its_site_or_is_named():
    x, widths = torch.randn(6, 3), torch.tensor([0.1, 0.2])
    guide = FamilyGuide(ONE, Family(dist.Normal, scale=widths), mlp(3, 4)).setup(x)
    _, guide_trace = traces(ONE, guide, x)
    assert torch.equal(guide_trace.nodes["z"]["fn"].base_dist.scale, widths.expand(6, 2))
    with pytest.raises(ValueError, match=r"scale=\[1.* cannot represent .* 'z'"):
        FamilyGuide(ONE, Family(dist.Normal, scale=torch.ones(5)), mlp(3, 4)).setup(x)


def scale_and_location(x):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.sample("x", dist.Normal(torch.zeros(len(x)), scale).to_event(1), obs=x)


HEAVY = [dist.Laplace, dist.AsymmetricLaplace, dist.Cauchy, dist.Gumbel, dist.Logistic]


@pytest.mark.parametrize(
    ("family", "warned"),
    [(family, name == "student_t") for name, family in families.LADDER.items()]
    + [(Family(kind), True) for kind in HEAVY],
    ids=[*families.LADDER, *(kind.__name__ for kind in HEAVY)],
)
def test_tails_that_the_exponential_map_does_not_bear_are_named(family, warned):
    """Log densities that fall by the square alone are safe; over the reals all are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HeavyTails)
        FamilyGuide(scale_and_location, family).setup(torch.ones(3))
    words = [str(each.message) for each in caught if each.category is HeavyTails]
    assert len(words) == warned
    assert all(family.name in each and "['scale']" in each for each in words)
