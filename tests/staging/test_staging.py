"""Staged equals eager: the same numbers, to the last bit, for the same seed; and no trace left."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, FAMILIES, N, cases, world
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from ppvae import VAE, FamilyGuide, NotStageable, families, likelihoods, stage
from ppvae._scopes import private_modules
from ppvae.nn import conv_decoder, conv_encoder, mlp
from ppvae.objectives.elbo import ELBO, negative_elbo
from ppvae.objectives.iwae import IWAE
from ppvae.objectives.schedules import warm_up

#: one that draws coordinates, and one that draws all at once
FEW = ["mean_scale", "full_rank"]


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


def eager(model, guide, objective=negative_elbo, **kwargs):
    return lambda *args: objective(model, guide, *args, **kwargs)


def parameters_of(*programs):
    return [
        p for program in programs if isinstance(program, nn.Module) for p in program.parameters()
    ]


def hold(model, guide, *batches, **kwargs):
    """Stages with the first batch, and holds the graph of all of them against the program."""
    staged = stage(model, guide, *batches[0], **kwargs)
    parameters = parameters_of(model, guide)
    for batch in batches:
        assert staged.covers(*batch) == (len(batch[0]) > 1)
        want = outcome(eager(model, guide, **kwargs), parameters, *batch)
        assert same(outcome(staged, parameters, *batch), want)
    return staged


def guide_of(model, family, encoder, *args):
    """A guide whose late parameters have been made."""
    guide = FamilyGuide(model, family, encoder=encoder)
    with private_modules(), torch.no_grad():
        guide(*args)
    return guide


def base(x, shift=0.0):
    """A latent of length 2 and three numbers per datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) + shift, 0.5), obs=x[:, 0])


def data(rows=N, dtype=None):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(5), dtype=dtype)


def autoencoder(family="mean_scale", likelihood=None, **kwargs):
    likelihood = likelihood or likelihoods.Normal(0.5)
    model = VAE(mlp(2, 4, out=3), 2, likelihood, **kwargs)
    return model, FamilyGuide(model, families.LADDER[family], encoder=mlp(3, 4))


# ------------------------------------------------------------- models, families, likelihoods


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("name", CASES)
def test_every_model_gives_the_loss_and_the_gradients_of_the_program(name, family):
    case = cases()[name]
    guide = guide_of(case.model, FAMILIES[family], case.encoder, *case.args)
    hold(case.model, guide, case.args)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in families.LADDER])
def test_every_family_gives_the_loss_and_the_gradients_of_the_program(family):
    case = cases()["one vector"]
    guide = guide_of(case.model, FAMILIES[family], case.encoder, *case.args)
    hold(case.model, guide, case.args)


@pytest.mark.parametrize(
    ("name", "family"),
    [("regression", "student_t"), ("simplex", "noise_only"), ("hierarchy", "low_rank")],
)
def test_noise_that_is_no_normal_and_draws_of_the_model(name, family):
    case = cases()[name]
    guide = guide_of(case.model, FAMILIES[family], case.encoder, *case.args)
    hold(case.model, guide, case.args)


LIKELIHOODS = {
    "Bernoulli": likelihoods.Bernoulli,
    "Poisson": likelihoods.Poisson,
    "fixed scale": lambda: likelihoods.Normal(0.5),
    "learned scale": lambda: likelihoods.Normal(torch.ones(3), learned=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_in_both_precisions_and_at_every_batch_size(name, dtype):
    torch.set_default_dtype(dtype)
    try:
        model, guide = autoencoder(likelihood=LIKELIHOODS[name]())
        x = (data(dtype=dtype) > 0).to(dtype)
        staged = hold(model, guide, (x,), (x[:4],), (x[:2],), (x[:1],), (torch.cat([x, x]),))
        assert staged(x).dtype == dtype
    finally:
        torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("family", families.LADDER)
def test_an_autoencoder_with_every_family_of_the_ladder(family):
    model, guide = autoencoder(family)
    hold(model, guide, (data(),), (data(3),), (data(1),))


def test_float32_parameters_under_a_default_of_double():
    model, guide = autoencoder()
    x = data(dtype=torch.float32)
    hold(model.float(), guide.float(), (x,), (x[:3],), objective=ELBO(beta=2.0))


def test_convolutions():
    shape = (1, 8, 8)
    model = VAE(conv_decoder(2, shape, 2, 3), 2, likelihoods.Bernoulli())
    guide = FamilyGuide(model, families.mean_scale, encoder=conv_encoder(shape, 2, 3))
    x = torch.rand(5, *shape).round()
    hold(model, guide, (x,), (x[:3],), (x[:1],))


def test_a_prior_that_was_made_with_checks_outside_the_model():
    """Distributions keep their checks in `expand`; those must not end up in the graph."""
    model, guide = autoencoder(prior=dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    hold(model, guide, (data(),), (data(3),))


def test_plain_modules_and_autoguides_of_pyro():
    case = cases()["regression"]
    for made in (AutoNormal, AutoDiagonalNormal):
        guide = made(case.model)
        with private_modules():
            guide(*case.args)
        hold(case.model, guide, case.args, tuple(arg[:3] for arg in case.args))


def test_a_pyro_module_with_a_constrained_parameter():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Linear](3, 1)
            self.sigma = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                loc = self.net(x).squeeze(-1) + z.sum(-1)
                pyro.sample("x", dist.Normal(loc, self.sigma), obs=x[:, 0])

    model = Model()
    guide = guide_of(model, families.mean_scale, mlp(3, 4), data())
    staged = hold(model, guide, (data(),), (data(3),))
    assert any(p is model.sigma_unconstrained for p in staged.parameters())


def test_weights_that_are_random_in_pyros_own_way():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Linear](3, 1, bias=False)
            self.net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

        def forward(self, x):
            loc = self.net(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, 0])

    model = Model()
    guide = guide_of(model, families.mean_scale, None, data())
    hold(model, guide, (data(),), (data(3),))


def test_stretches_without_gradients_have_none_in_the_graph():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, 2.0]))

        def forward(self, x):
            with torch.no_grad():
                still = self.weight[0] * 3.0
                with torch.enable_grad():
                    moves = self.weight[1] * x.mean()
            base(x, still * self.weight[1] + moves)

    model = Model()
    guide = guide_of(model, families.mean_scale, mlp(3, 4), data())
    hold(model, guide, (data(),), (data(3),))
    assert model.weight.grad[0] == 0 != model.weight.grad[1]


# ------------------------------------------------------------------------ scales and objectives


def test_a_subsample_is_weighted_as_in_the_program():
    def regression(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((w * x).sum(-1), 1.0), obs=x[:, 0])

    guide = guide_of(regression, families.mean_scale, None, data())
    losses = []
    for size in (None, N, 1000):
        staged = hold(regression, guide, (data(),), (data(4),), size=size)
        losses.append(outcome(staged, [], data())[0])
    assert losses[0] == losses[1] != losses[2]  # the rate of w is shared among more data


def test_scales_and_masks_of_a_model():
    keep = data()[:, 1] > 0
    assert 0 < keep.sum() < N

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

    guide = guide_of(model, families.full_rank, Encoder(3, 4), data(), keep)
    staged = hold(model, guide, (data(), keep), (data()[:4], keep[:4]))
    losses = [outcome(staged, [], data(), mask)[0] for mask in (keep, ~keep)]
    assert losses[0] != losses[1]  # the mask is data, and no constant


OBJECTIVES = {
    "beta": ELBO(beta=2.0),
    "no rate": ELBO(beta=0.0),
    "free bits": ELBO(free_bits=0.5),
    "sampled": ELBO(kl="sampled"),
    "draws": ELBO(num_samples=3),
    "all": ELBO(beta=0.5, free_bits=0.2, kl="sampled", num_samples=2),
    "IWAE": IWAE(4),
}


@pytest.mark.parametrize(
    ("name", "vectorized"),
    [*((name, True) for name in OBJECTIVES), ("free bits", False), ("all", False), ("IWAE", False)],
)
def test_every_objective(name, vectorized):
    if vectorized:
        model, guide = autoencoder()
    else:
        model, guide = base, guide_of(base, families.mean_scale, mlp(3, 4), data())
    hold(model, guide, (data(),), (data(3),), objective=OBJECTIVES[name])


@pytest.mark.parametrize("free_bits", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_that_moves_with_the_steps_is_no_constant_of_the_graph(dtype, free_bits):
    model, guide = autoencoder()
    x, objective = data(dtype=dtype), ELBO(beta=warm_up(100, 0.5, 2.0), free_bits=free_bits)
    staged = stage(model.to(dtype), guide.to(dtype), x, objective=objective)
    parameters = parameters_of(model, guide)
    seen = set()
    for step in (0, 30, 100, 999):
        want = outcome(eager(model, guide, objective, step=step), parameters, x)
        got = outcome(staged, parameters, x, step=step)
        # a product with a tensor rounds once, one with a number of Python's twice
        bound = 1e-6 if dtype == torch.float32 else 1e-14
        for a, b in zip(want, got, strict=True):
            assert (a - b).abs().max() <= bound * a.abs().max()
        seen.add(float(got[0]))
    assert len(seen) == 3


def test_an_objective_of_ones_own_sees_the_step_as_a_tensor():
    def objective(model, guide, *args, size=None, step=0):
        return negative_elbo(model, guide, *args, size=size) * (1 + step)

    model, guide = autoencoder()
    staged = stage(model, guide, data(), objective=objective)
    losses = [outcome(staged, [], data(), step=step)[0] for step in (0, 1, 7)]
    assert losses[1] == 2 * losses[0] and losses[2] == 8 * losses[0]


@pytest.mark.parametrize("kind", ["function", "autoencoder"])
def test_a_gradient_inside_the_loss_is_refused(kind):
    """The graph would have the right loss, and wrong gradients."""
    if kind == "autoencoder":
        model, guide = autoencoder()
    else:
        model, guide = base, guide_of(base, families.mean_scale, mlp(3, 4), data())
    with pytest.raises(NotStageable, match="doubly_reparametrized") as caught:
        stage(model, guide, data(), objective=IWAE(4, "doubly_reparametrized"))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------- parameters of functions


def written(decoder, encoder):
    """A model and a guide as one writes them by hand."""

    def model(x):
        pyro.module("decoder", decoder)
        scale = pyro.param("user_scale", torch.tensor(0.7), constraint=constraints.positive)
        shift = pyro.param("user_shift", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z) + shift, scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc = encoder(x)
        scale = pyro.param("user_spread", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


@pytest.mark.parametrize("early", [True, False])
def test_statements_of_parameters(early):
    """Staged before or after a first call: the parameters are those of Pyro's param store."""
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)
    model, guide = written(decoder, encoder)
    names = ["user_scale", "user_shift", "user_spread"]
    if not early:
        with private_modules():
            negative_elbo(model, guide, data())
    staged = stage(model, guide, data())
    with private_modules():
        negative_elbo(model, guide, data())
    parameters = list(staged.parameters())
    assert len(parameters) == 7 and all(p.requires_grad for p in parameters)
    store = pyro.get_param_store()
    sites = [store[name].unconstrained() if name != "user_shift" else store[name] for name in names]
    here = [*decoder.parameters(), *encoder.parameters(), *sites]
    want = outcome(eager(model, guide), here, data(4))
    got = outcome(staged, parameters, data(4))
    assert torch.equal(want[0], got[0])
    for slope, place in zip(want[1:], here, strict=True):
        (same_memory,) = (p for p in parameters if p.data_ptr() == place.data_ptr())
        assert torch.equal(same_memory.grad, slope)
    before = {name: store[name].detach().clone() for name in names}
    torch.optim.SGD(parameters, lr=0.1).step()
    assert all((store[name] != value).all() for name, value in before.items())
    want = outcome(eager(model, guide), here, data(4))
    assert torch.equal(want[0], outcome(staged, parameters, data(4))[0])


# ------------------------------------------------------------------------ what a graph covers


def test_covers_what_has_the_dtype_the_number_of_dimensions_and_the_size_of_the_data():
    model, guide = autoencoder()
    x = data()
    staged = stage(model, guide, x)
    assert staged.covers(x) and staged.covers(x[:2]) and staged.covers(torch.cat([x, x]))
    others = [(x[:1],), (x.float(),), (x[:, :2],), (x[0],), (x, x), (), (x.numpy(),)]
    assert not any(staged.covers(*other) for other in others)
    for wrong in (x.float(), x[:, :2]):  # the error of the guide, as without staging
        with pytest.raises(ValueError, match="encoder: expected a module that takes"):
            staged(wrong)


def test_two_arguments_have_the_same_number_of_data():
    case = cases()["regression"]
    guide = guide_of(case.model, families.mean_scale, None, *case.args)
    staged = stage(case.model, guide, *case.args)
    x, y = case.args
    assert staged.covers(x[:3], y[:3]) and not staged.covers(x[:3], y[:4])


def test_a_plate_of_fixed_size_fixes_the_batch():
    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[:, 0])

    staged = hold(model, guide_of(model, families.mean_scale, mlp(3, 4), data()), (data(),))
    assert not staged.covers(data(N - 1))


def test_a_branch_on_the_number_of_data_is_taken_anew():
    def model(x):
        base(x, 1.0 if len(x) > 4 else 0.0)

    guide = guide_of(model, families.mean_scale, mlp(3, 4), data())
    staged = stage(model, guide, data())
    for rows in (2, 4, 5, 6):
        want = outcome(eager(model, guide), guide.parameters(), data(rows))
        assert same(outcome(staged, guide.parameters(), data(rows)), want)


def test_data_in_pairs():
    """Of one datum less the program can make nothing; that is no reason not to stage."""

    def model(x):
        base(x.reshape(-1, 2, 3).sum(1))

    encoder = nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(), mlp(6, 4))
    guide = guide_of(model, families.mean_scale, encoder, data())
    staged = stage(model, guide, data())
    want = outcome(eager(model, guide), guide.parameters(), data())
    assert same(outcome(staged, guide.parameters(), data()), want)


# -------------------------------------------------------------------- what cannot be staged


def branch(x):
    base(x, 1.0 if x.sum() > 0 else -1.0)


def number(x):
    base(x, float(x.mean().item() > 0))


class Counts:
    """A model that keeps a count in Python."""

    calls = 0

    def __call__(self, x):
        self.calls += 1
        base(x, float(self.calls))


@pytest.mark.parametrize("model", [branch, number, Counts()])
def test_what_cannot_be_staged_says_so_in_one_line(model, capfd):
    guide = guide_of(base, families.mean_scale, mlp(3, 4), data())
    with pytest.raises(NotStageable, match="model, guide: cannot be staged: ") as caught:
        stage(model, guide, data())
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    assert "torch.export.export" not in message  # nobody called it
    assert capfd.readouterr() == ("", "")  # no listing of a graph, no log


def test_a_discrete_latent_with_parameters():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x[:, 0])

    net = nn.Linear(3, 1)

    def guide(x):
        logits = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=logits))

    with pytest.raises(NotStageable, match="reparametrized"):
        stage(model, guide, data())


def test_a_number_that_is_read_from_the_data_may_be_data():
    """What becomes of an `item()` that leads to no decision is a number of the graph."""

    def model(x):
        base(x, x.mean().item())

    guide = guide_of(base, families.mean_scale, mlp(3, 4), data())
    hold(model, guide, (data(),), (data() + 1.0,), (data(3),))


def test_a_model_that_raises_raises_its_own_error():
    def model(x):
        raise KeyError("mine")

    guide = guide_of(base, families.mean_scale, mlp(3, 4), data())
    with pytest.raises(KeyError, match="mine"):
        stage(model, guide, data())


# --------------------------------------------------------------------- nothing is left behind


class _Net(nn.Sequential):
    """Running statistics and dropout."""

    def __init__(self, inputs, out):
        super().__init__(
            nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, out)
        )


def noisy():
    torch.manual_seed(0)
    model = VAE(_Net(2, 3), 2, likelihoods.Normal(0.5))
    return model, FamilyGuide(model, families.mean_scale, encoder=_Net(3, 4))


def content(*modules):
    state = [value.clone() for m in modules for value in [*m.parameters(), *m.buffers()]]
    modes = [part.training for m in modules for part in m.modules()]
    return state, modes


def untouched(before, after):
    return before[1] == after[1] and all(map(torch.equal, before[0], after[0]))


@pytest.mark.parametrize("training", [True, False])
def test_staging_leaves_no_trace(training):
    model, guide = noisy()
    model.train(training), guide.train(training)
    guide.encoder[2].train()  # one that is in a mode of its own
    before, inside = world(), content(model, guide)
    staged = stage(model, guide, data())
    assert world() == before
    assert untouched(inside, content(model, guide))
    assert all(p.grad is None for p in staged.parameters())


def test_a_staging_that_fails_leaves_no_trace():
    def raises(x):
        raise KeyError("mine")

    def late(x):  # raises when it is traced, and not before
        if isinstance(x, torch._subclasses.FakeTensor):
            raise KeyError("mine")
        base(x)

    guide = guide_of(base, families.mean_scale, _Net(3, 4), data())
    before, inside = world(), content(guide)
    for model in (branch, Counts(), raises, late):
        with pytest.raises((NotStageable, KeyError)):
            stage(model, guide, data())
        assert world() == before
        assert untouched(inside, content(guide))


def test_a_staged_call_draws_from_the_callers_stream_and_moves_nothing_else():
    model, guide = autoencoder("student_t")
    staged = stage(model, guide, data())
    torch.manual_seed(1)
    before = world()
    values = [staged(data()) for _ in range(2)]
    assert values[0] != values[1]
    assert world()[0] != before[0] and world()[1:] == before[1:]
    ahead = torch.random.get_rng_state()
    torch.manual_seed(1)
    with private_modules():
        for _ in range(2):
            negative_elbo(model, guide, data())
    assert torch.equal(torch.random.get_rng_state(), ahead)  # the streams stay side by side


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_and_dropout_are_those_of_the_program(training):
    (model, guide), (twin_model, twin_guide) = noisy(), noisy()
    for module in (model, guide, twin_model, twin_guide):
        module.train(training)
    staged = stage(model, guide, data())
    for seed, batch in enumerate([data(), data(4), data(1 + training), data()]):
        want = outcome(eager(twin_model, twin_guide), twin_guide.parameters(), batch, seed=seed)
        assert same(outcome(staged, guide.parameters(), batch, seed=seed), want)
    assert untouched(content(twin_model, twin_guide), content(model, guide))
    moved = guide.encoder[1].running_mean.abs().sum() > 0
    assert moved == training
    losses = {outcome(staged, [], data(), seed=seed)[0].item() for seed in (1, 1, 2)}
    assert len(losses) == 2


def test_parameters_are_shared_with_model_and_guide():
    model, guide = autoencoder()
    staged = stage(model, guide, data())
    assert set(staged.parameters()) == {*model.parameters(), *guide.parameters()}
    before = outcome(staged, [], data())[0]
    with torch.no_grad():
        guide.encoder[0].weight.mul_(2)
    after = outcome(staged, [], data())[0]
    assert after != before
    assert after == outcome(eager(model, guide), [], data())[0]
