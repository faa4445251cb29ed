"""Staged equals eager: the same numbers, to the last bit, for the same seed; and no trace left."""

import builtins
import cProfile
import gc
import linecache
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, LIKELIHOODS, LONG, cases
from pairs import KINDS, Normed, branch, build, data, latents_and_data, traceless, written
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ppvae import VAE, FamilyGuide, NotStageable, families, likelihoods, stage
from ppvae._scopes import private_modules
from ppvae.nn import conv_decoder, conv_encoder, mlp
from ppvae.objectives import ELBO, negative_elbo

N = 10  # rows of `data()`


def outcome(loss, parameters, *args, seed=3, **kwargs):
    """The loss and the gradients at a seed; None for a parameter that the loss does not reach."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(seed)
    with private_modules():
        value = loss(*args, **kwargs)
    if value.requires_grad:
        value.backward()
    slopes = [None if p.grad is None else p.grad.clone() for p in parameters]
    return [value.detach(), *slopes]


def same(some, others):
    """Whether two outcomes are equal to the last bit."""
    assert len(some) == len(others)
    return all(
        a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(some, others, strict=True)
    )


def parameters_of(*programs):
    return [
        p for program in programs if isinstance(program, nn.Module) for p in program.parameters()
    ]


def agree(staged, model, guide, *batch, twins=None, seed=3, objective=negative_elbo, **options):
    """Whether the graph gives what the program does, which may be that of twins."""
    programs = twins or (model, guide)
    call = partial(objective, *programs, **options)
    want = outcome(call, parameters_of(*programs), *batch, seed=seed)
    return same(outcome(staged, parameters_of(model, guide), *batch, seed=seed), want)


def hold(model, guide, *batches, **options):
    """Stages with the first batch, and holds the graph of all of them against the program."""
    staged = stage(model, guide, *batches[0], **options)
    for batch in batches:
        assert staged.covers(*batch) == (len(batch[0]) > 1)
        assert agree(staged, model, guide, *batch, **options)
    return staged


def latent_guide(encoder=None, model=latents_and_data):
    return FamilyGuide(model, families.mean_scale, encoder or mlp(3, 4)).setup(data())


# ------------------------------------------------------------- models, families, likelihoods


def site(name, family="mean_scale"):
    case = cases()[name]
    return case.model, FamilyGuide(case.model, KINDS[family], case.encoder), case.args


def autoencoder(family):
    return *build(family), (data(),), (data(3),), (data(1),)


def single_in_double():
    """Under a default of double."""
    model, guide = build()
    x = data(dtype=torch.float32)
    return model.float(), guide.float(), (x,), (x[:3],)


def convolutions():
    shape = (1, 8, 8)
    model = VAE(conv_decoder(2, shape, 2, 3), 2, likelihoods.Bernoulli())
    guide = FamilyGuide(model, families.mean_scale, encoder=conv_encoder(shape, 2, 3))
    x = torch.rand(5, *shape).round()
    return model, guide, (x,), (x[:3],), (x[:1],)


def checked():
    """Distributions keep their checks in `expand`; those must not end up in the graph."""
    return *build(prior=dist.Normal(0.0, 1.0).expand([2]).to_event(1)), (data(),), (data(3),)


def autoguide(kind):
    case = cases()["regression"]
    guide = kind(case.model)
    with private_modules():
        guide(*case.args)
    return case.model, guide, case.args, tuple(arg[:3] for arg in case.args)


def numbered():
    """An `item()` of the data that leads to no decision is a number of the graph."""

    def model(x):
        latents_and_data(x, x.mean().item())

    return model, latent_guide(), (data(),), (data() + 1.0,), (data(3),)


def pyros_modules():
    """With a constrained parameter, and random weights."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Linear](3, 1, bias=False)
            self.net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.sigma = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

        def forward(self, x):
            loc = self.net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, self.sigma), obs=x[:, 0])

    model = Model()
    return model, FamilyGuide(model, families.mean_scale, None).setup(data()), (data(),), (data(3),)


def stretches_without_gradients():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, 2.0]))

        def forward(self, x):
            with torch.no_grad():
                still = self.weight[0] * 3.0
                with torch.enable_grad():
                    moves = self.weight[1] * x.mean()
            latents_and_data(x, still * self.weight[1] + moves)

    model = Model()
    return model, latent_guide(model=model), (data(),), (data(3),)


def scales_and_masks():
    """The mask is data, and no constant."""
    keep = data()[:, 1] > 0

    def model(x, keep):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.3):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.mask(mask=keep):
                pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[:, 0])
            pyro.sample("y", dist.Normal(z[..., 0], 0.5), obs=x[:, 1])

    class Encoder(nn.Linear):
        def forward(self, x, keep):
            return super().forward(x)

    guide = FamilyGuide(model, families.full_rank, Encoder(3, 4)).setup(data(), keep)
    return model, guide, (data(), keep), (data(), ~keep), (data()[:4], keep[:4])


SORTS = [single_in_double, convolutions, checked, numbered, pyros_modules]
SORTS += [stretches_without_gradients, scales_and_masks]
PROGRAMS = {
    **{name: partial(site, name) for name in CASES},
    **{f"joint {name}": partial(site, name, "full_rank") for name in ("positive", "steps inside")},
    # noise that is no normal, draws of the model, a factor of another shape
    "gammas": partial(site, "regression", "student_t"),
    "of the model": partial(site, "simplex", "noise_only"),
    "factor": partial(site, "hierarchy", "low_rank"),
    **{name: partial(autoencoder, name) for name in KINDS if name != "big_flow"},
    "AutoNormal": partial(autoguide, AutoNormal),
    "AutoDiagonalNormal": partial(autoguide, AutoDiagonalNormal),
    **{make.__name__: make for make in SORTS},
}


#: what has the expressions of others, and is for `.ci/long`: families that are `mean_scale` but for
#: a function, what there is of another model or jointly, and the simpler one of two autoguides
ALIKE = ["mean_only", "mean_only_bounded", "half_scale", "bounded", "asymmetric_laplace"]
ALIKE += ["student_t", "low_rank", "one vector", "one scalar", "positive", "steps inside"]
ALIKE += ["regression", "hierarchy", "AutoDiagonalNormal"]


@pytest.mark.parametrize("name", [name for name in PROGRAMS if LONG or name not in ALIKE])
def test_every_program_has_its_loss_and_its_gradients(name):
    hold(*PROGRAMS[name]())


@pytest.mark.parametrize("options", [{"size": 1000}, {"objective": ELBO(beta=2.0)}])
def test_a_graph_is_of_the_number_of_data_and_of_the_objective_that_it_was_made_with(options):
    model, guide, args = site("regression")
    hold(model, guide, args, tuple(arg[:4] for arg in args), **options)


#: what `mixed` is made of, or differs from another one by the shape of a scale; for `.ci/long`
PARTS = ["bernoulli", "normal", "categories", "learned", "per feature", "student"]


@pytest.mark.parametrize("name", [name for name in LIKELIHOODS if LONG or name not in PARTS])
def test_every_likelihood_in_single_precision_and_at_every_batch_size(name, single):
    made = LIKELIHOODS[name].make()
    model = VAE(mlp(2, 4, out=made.size(4)), 2, made)
    guide = FamilyGuide(model, families.mean_scale, mlp(4, 4))
    x = LIKELIHOODS[name].draw(10, 4).float()
    staged = hold(model, guide, (x,), (x[:4],), (x[:2],), (x[:1],), (torch.cat([x, x]),))
    assert staged(x).dtype == torch.float32


@pytest.mark.parametrize("early", [True, False])
def test_statements_of_parameters(early):
    """Staged before or after a first call: the parameters are those of Pyro's param store."""
    _, _, decoder, encoder = written()

    def model(x):
        scale = pyro.param("user_scale", torch.tensor(0.7), constraint=constraints.positive)
        shift = pyro.param("user_shift", torch.zeros(3))
        written(decoder, encoder, scale)[0](x - shift)

    def guide(x):
        written(decoder, encoder)[1](x * pyro.param("user_spread", torch.ones(3)))

    call, store = partial(negative_elbo, model, guide), pyro.get_param_store()
    if not early:
        outcome(call, [], data())
    staged = stage(model, guide, data())
    outcome(call, [], data())
    parameters = list(staged.parameters())
    assert len(parameters) == 7 and all(p.requires_grad for p in parameters)
    sites = [store["user_scale"].unconstrained(), store["user_shift"], store["user_spread"]]
    own = [*decoder.parameters(), *encoder.parameters(), *sites]
    places = {p.data_ptr(): p for p in parameters}
    for _ in range(2):
        before = [store[name].detach().clone() for name in store]
        want = outcome(call, own, data(4))
        ordered = [places[p.data_ptr()] for p in own]  # the same memory
        assert same(outcome(staged, ordered, data(4)), want)
        torch.optim.SGD(parameters, lr=0.1).step()
        assert all((store[name] != v).all() for name, v in zip(store, before, strict=True))


# ------------------------------------------------------------------------ what a graph covers


def test_covers_what_has_the_dtype_the_number_of_dimensions_and_the_size_of_the_data():
    model, guide = build()
    x = data()
    staged = stage(model, guide, x)
    assert staged.covers(x) and staged.covers(x[:2]) and staged.covers(torch.cat([x, x]))
    others = [(x[:1],), (x.float(),), (x[:, :2],), (x[0],), (x, x), (), (x.numpy(),)]
    assert not any(staged.covers(*other) for other in others)
    for wrong in (x.float(), x[:, :2]):  # the error of the guide, as without staging
        with pytest.raises(ValueError, match="encoder: expected a module that takes"):
            staged(wrong)


def test_arguments_of_every_sort_by_place_and_by_keyword():
    """Two tensors with the same number of data; others are parts of the graph."""

    def model(x, y, *, power=1, kind=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            fn = dist.Laplace if kind == "robust" else dist.Normal
            pyro.sample("y", fn((w * x).sum(-1) ** power, 1.0), obs=y)

    guide = FamilyGuide(model, families.mean_scale, None).setup(data(), data()[:, 0])
    kwargs = {"power": 2, "kind": "robust"}
    x, y = data(), data()[:, 1]
    staged = stage(model, guide, x, y, kwargs=kwargs)
    assert staged.covers(x[:3], y[:3], 2, "robust") and not staged.covers(x[:3], y[:4], 2, "robust")
    assert not staged.covers(x, y, 3, "robust") and not staged.covers(x, y, 2, None)
    for n, told in [(N, kwargs), (3, kwargs), (N, {"power": 1, "kind": None})]:
        twins = (partial(model, **told), guide)
        assert agree(partial(staged, **told), model, guide, x[:n], y[:n], twins=twins)
    by_name = stage(model, guide, x, kwargs={"y": y})
    assert agree(lambda x, y: by_name(x, y=y), model, guide, x[:4], y[:4])
    with pytest.raises(TypeError, match=r"kwargs: expected those of stage, \['y'\], got \['z'\]"):
        by_name(x, z=y)


#: words -> from good data to a tensor that is not dense
NOT_DENSE = {
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([*x]),
    "on meta": lambda x: x.to("meta"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("words", NOT_DENSE)
def test_a_tensor_that_is_not_dense_is_refused(words):
    """By `stage` and by what it makes, which is for others of the same shape."""
    model, guide = build()
    x, wrong = data(), NOT_DENSE[words](data())
    staged = stage(model, guide, x)
    assert staged.covers(x) and not staged.covers(wrong)
    for call in (partial(stage, model, guide), staged):
        with pytest.raises(TypeError, match=r"^args: expected real numbers in a dense .* layout "):
            call(wrong)


def test_a_plate_of_fixed_size_fixes_the_batch():
    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[:, 0])

    staged = hold(model, latent_guide(model=model), (data(),))
    assert not staged.covers(data(N - 1))


def by_size(x):
    latents_and_data(x, 1.0 if len(x) > 4 else 0.0)


def in_pairs(x):
    latents_and_data(x.reshape(-1, 2, 3).sum(1))


def test_a_branch_on_the_number_of_data_is_taken_anew_and_data_may_come_in_pairs():
    """Of one datum less a program may make nothing; that is no reason not to stage."""
    guide = latent_guide()
    staged = stage(by_size, guide, data())
    assert all(agree(staged, by_size, guide, data(rows)) for rows in (2, 4, 5, 6))
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(), mlp(6, 4))
    guide = FamilyGuide(in_pairs, families.mean_scale, encoder)
    assert agree(stage(in_pairs, guide, data(6)), in_pairs, guide, data(6))


# -------------------------------------------------------------------- what cannot be staged


def number(x):
    latents_and_data(x, float(x.mean().item() > 0))


class Counts:
    """A model that keeps a count in Python."""

    calls = 0

    def __call__(self, x):
        self.calls += 1
        latents_and_data(x, float(self.calls))


@pytest.mark.parametrize("model", [branch, number, Counts()])
def test_what_cannot_be_staged_says_so_in_one_line(model, capfd):
    with pytest.raises(NotStageable, match="model, guide: cannot be staged: ") as caught:
        stage(model, latent_guide(), data())
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    assert "torch.export.export" not in message  # nobody called it
    assert capfd.readouterr() == ("", "")  # no listing of a graph, no log


def test_a_loss_that_is_not_finite_is_staged_with_a_warning():
    """It is for training to refuse it; and NaN in a gradient is the same in the graph."""
    model, guide = build()
    said = "^stage: the loss is nan, so that graph and program could not be compared; are the data"
    with pytest.warns(UserWarning, match=said):
        staged = stage(model, guide, data() * 1e200)
    assert not staged(data() * 1e200).isfinite()
    assert agree(staged, model, guide, data())


# --------------------------------------------------------------------- nothing is left behind


def noisy():
    torch.manual_seed(0)
    model = VAE(Normed(2, 3), 2, likelihoods.Normal(0.5))
    return model, FamilyGuide(model, families.mean_scale, encoder=Normed())


@pytest.mark.parametrize("training", [True, False])
def test_staging_leaves_no_trace(training):
    model, guide = noisy()
    model.train(training), guide.train(training)
    guide.encoder[2].train()  # one that is in a mode of its own
    plain_model, plain_guide, *called = written(encoder=Normed())
    with traceless(model, guide, *called, moved=False):
        staged = stage(model, guide, data())
        stage(plain_model, plain_guide, data())
    assert all(p.grad is None for p in staged.parameters())


def test_a_staging_that_fails_leaves_no_trace():
    def raises(x):
        raise KeyError("mine")

    def late(x):  # raises when it is traced, and not before
        if isinstance(x, torch._subclasses.FakeTensor):
            raise KeyError("mine")
        latents_and_data(x)

    guide = latent_guide(Normed())
    for model in (branch, Counts(), raises, late):
        with traceless(guide, moved=False), pytest.raises((NotStageable, KeyError)) as caught:
            stage(model, guide, data())
        assert (caught.type is KeyError) == (model is raises)  # the program's own error


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_and_dropout_are_those_of_the_program(training):
    (model, guide), (twin_model, twin_guide) = noisy(), noisy()
    for module in (model, guide, twin_model, twin_guide):
        module.train(training)
    staged = stage(model, guide, data())
    for seed, batch in enumerate([data(), data(4), data(1 + training), data()]):
        assert agree(staged, model, guide, batch, twins=(twin_model, twin_guide), seed=seed)
    for module, twin in ((model, twin_model), (guide, twin_guide)):
        assert same(list(module.buffers()), list(twin.buffers()))
    assert (guide.encoder[1].running_mean.abs().sum() > 0) == training
    losses = {outcome(staged, [], data(), seed=seed)[0].item() for seed in (1, 1, 2)}
    assert len(losses) == 2


def test_nothing_of_the_process_is_replaced_while_a_loss_is_recorded():
    """The length of a batch is free in the graph, and `builtins.len` is Python's all the while."""
    seen, names, kind = [], dict(globals()), torch.distributions.Distribution
    now = (builtins.len, kind._validate_sample)

    def model(x):
        seen.append((builtins.len, kind._validate_sample))
        latents_and_data(x)

    staged = stage(model, FamilyGuide(model, families.mean_scale, encoder=mlp(3, 4)), data(6))
    assert staged.covers(data(5)) and len(seen) > 2 and {*seen} == {now}
    assert dict(globals()) == names


def test_nothing_of_a_trace_is_kept():
    """PyTorch's shapes, but for the last ones, and sources would live as long as the process."""

    def shapes():
        for _ in range(4):  # each lets go of what the next one finds
            gc.collect()
        return sum(type(each) is ShapeEnv for each in gc.get_objects())

    gc.collect()
    gc.freeze()  # what other tests left is looked at no more, which takes seconds
    try:
        stage(*build(), data(4))
        before, sources = shapes(), len(linecache.cache)
        for _ in range(3):
            stage(*build(), data(4))
        assert before and shapes() <= before
    finally:
        gc.unfreeze()
    assert len(linecache.cache) - sources <= 9  # of the graphs of three losses


def test_a_loss_is_staged_while_a_profiler_looks_on():
    profiler = cProfile.Profile()
    loss = profiler.runcall(stage, *build(), data(4))
    assert torch.isfinite(loss(data(4))) and sys.getprofile() is None
