"""Every objective and model trains alike by the program, by its graph, and beside others."""

from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LONG, cases
from pairs import (
    KINDS,
    OBJECTIVES,
    Normed,
    branch,
    build,
    data,
    function,
    linear,
    made,
    one_warning,
    same,
    traceless,
    values,
    written,
)
from pyro.distributions import constraints
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ppvae import VAE, FamilyGuide, families, fit, fit_replicates, priors, stage
from ppvae import likelihoods as kinds
from ppvae._scopes import private_modules, unchecked
from ppvae.objectives import ELBO, IWAE, negative_elbo, warm_up
from ppvae.objectives.base import moving_fields
from ppvae.regression import LinearRegression
from ppvae.training import Diverged
from ppvae.training.execution import COMPILE, STAGE, how_to_run

#: torch, on itself, while it compiles; an error would be taken for one of the compiler
pytestmark = pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")

SEEDS = [11, 16, 21, 26]
TOLD = {"num_epochs": 2, "batch_size": 4, "learning_rate": 0.01, "progress": False}


def one_by_one(make, x, goals, **told):
    """Trains each pair by `fit`, and no two alike; returns the courses, and where they led."""
    courses, ends = [], []
    for parts, goal, seed in zip(made(make, len(goals)), goals, SEEDS, strict=False):
        before = values(*parts)
        courses.append(fit(*parts[:2], x, seed=seed, objective=goal, **{**TOLD, **told}))
        ends.append(values(*parts))  # late parameters are made in the run
        assert len(before) < len(ends[-1]) or not same(before, ends[-1], 1e-4)
    for one, other in pairwise(courses):
        assert one.losses != pytest.approx(other.losses, rel=1e-3)
    return courses, ends


def side_by_side(make, x, goals, courses, ends, execution="staged", bound=1e-9, **told):
    """Trains all pairs by `fit_replicates`: each as it was trained alone."""
    built = made(make, len(goals))
    pairs, seeds = [tuple(parts[:2]) for parts in built], SEEDS[: len(goals)]
    with traceless(*(program for parts in built for program in parts)):
        results = fit_replicates(pairs, x, seeds=seeds, objective=goals, **{**TOLD, **told})
    for result, goal, parts, alone, end in zip(results, goals, built, courses, ends, strict=True):
        assert result.execution == execution and goal in (None, result.objective)
        assert result.losses == pytest.approx(alone.losses, rel=bound, abs=0)
        held_out = pytest.approx(alone.validation_losses, rel=bound, abs=0)
        assert result.validation_losses == held_out
        assert same(values(*parts), end, bound)
        blank = {"losses": [], "seconds": 0.0, "optimizer": None}
        blank |= {"execution": "", "execution_reason": ""}
        blank["validation_losses"] = []
        assert result._replace(**blank) == alone._replace(**blank)


def falling(parameters, lr):
    """A schedule, as that of the ladder."""
    adam = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 9)
    adam.register_step_post_hook(lambda *_: schedule.step())
    return adam


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.1)


def autoencoder(family, likelihood=None, **told):
    def x():
        return (data() > 0).double() if likelihood is kinds.Bernoulli else data().abs().round()

    return lambda: build(family, likelihood and likelihood()), x, told


def site(name, family="mean_scale"):
    def make():
        model, _, encoder, _ = cases()[name]
        return model, FamilyGuide(model, KINDS[family], encoder=encoder)

    return make, lambda: cases()[name].args, {}


def learned():
    return kinds.Normal(torch.ones(3), learned=True)


def squared(model, guide, *args, size=None, step=0):
    """A loss by which the graph of replicates is for one size of minibatch."""
    return negative_elbo(model, guide, *args, size=size) * (1.0 + 0.5 ** len(args[0]))


def under(prior, family):
    """A guide and a prior with correlations."""
    return build(family, prior=prior())


def given():
    return dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 2.0]]))


def convolved():
    """A convolution on either side."""
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(-1, (2, 2)), nn.ConvTranspose1d(2, 1, 2))
    model = VAE(decoder, 2, kinds.Normal(0.5))
    encoder = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten())
    return model, FamilyGuide(model, families.mean_scale, encoder=encoder)


class Stepwise(nn.Module):
    """Makes its output one number after the other, as a model of a series does."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 3)

    def forward(self, z):
        steps, x = self.first(z), torch.zeros(*z.shape[:-1], 3)
        x[..., 0] = steps[..., 0]
        for t in range(1, 3):
            x[..., t] += 0.5 * x[..., t - 1] + steps[..., t]
        return x


def stepwise():
    model = VAE(Stepwise(), 2, kinds.Normal(0.5))
    return model, FamilyGuide(model, families.mean_scale, encoder=nn.Linear(3, 4))


def loader():
    return DataLoader(TensorDataset(data()), batch_size=4, shuffle=True)


#: ends each pair for itself, before the last epoch
HELD_OUT = data(20, torch.float64)[6:]
PATIENCE = {"validation": HELD_OUT, "patience": 2, "num_epochs": 30, "learning_rate": 0.1}
ALL = {"batch_size": None}  # one batch, which is one tensor for all replicates

#: name -> how pairs are built, the data, and options; batches of four, the last one of two
WAYS: dict[str, Any] = {
    **{name: (linear, data, {"objective": goals}) for name, goals in OBJECTIVES.items()},
    "all, not vectorized": (function, data, {"objective": OBJECTIVES["all"][1:] * 2}),
    "IWAE, not vectorized": (function, data, {"objective": [IWAE(2), IWAE(2)]}),
    "deterministic": autoencoder("deterministic", kinds.Bernoulli),
    "schedule": autoencoder("mean_scale", learned, **ALL, num_epochs=9, optimizer=falling),
    "full_rank": autoencoder("full_rank", kinds.Poisson, optimizer=sgd),
    "low_rank": autoencoder("low_rank", learned),
    "learned prior": (
        lambda: under(partial(priors.Learned, 2, "full_rank"), "full_rank"),
        data,
        {},
    ),
    "given prior": (lambda: under(given, "low_rank"), data, {}),
    "flow": autoencoder("flow", objective=[ELBO(free_bits=0.3)] * 2),
    "positive": site("positive"),
    "left of pixels": site("left of pixels", "mean_only"),
    "told rows": site("told rows"),
    "regression": (*site("regression")[:2], {"batch_size": 2}),
    "modules in functions": (written, data, {}),
    "stepwise": (stepwise, data, {}),
    "statistics": (lambda: build(encoder=Normed(dropout=False).eval()), data, {}),
    "loader": (build, loader, ALL),
    "each size": (linear, data, {"objective": [squared, squared]}),
    "patience": (lambda: build(encoder=Normed()), data, PATIENCE),
    "patience, warm-up": (linear, data, {**PATIENCE, "objective": [ELBO(beta=warm_up(9)), ELBO()]}),
}


#: what others of them have in two: several draws, sampled terms, free bits, a joint draw, users'
#: objectives, replicates that end for themselves, a prior with correlations, plates of
#: other places
AGAIN = ["IWAE, not vectorized", "sampled", "free bits", "low_rank", "user's", "patience, warm-up"]
AGAIN += ["all", "given prior", "told rows", "left of pixels"]

#: held by the tests of staging to have the same loss and gradients as the program
STAGED = ["low_rank", "flow", "positive", "left of pixels"]


@pytest.mark.parametrize("name", [name for name in WAYS if LONG or name not in AGAIN])
def test_eager_staged_and_replicated_training_are_the_same(name, monkeypatch):
    make, x, told = WAYS[name]
    x = x()
    goals = [*told.get("objective", [None, None])]
    told = {key: value for key, value in told.items() if key != "objective"}
    courses, ends = one_by_one(make, x, goals, **told)
    assert courses[0].execution == "eager" and goals[0] in (None, courses[0].objective)
    monkeypatch.setattr("ppvae.training.execution.STAGE", 1)  # so many steps, and a loss is staged
    several = [*zip(made(make, len(goals)), goals, SEEDS, courses, ends, strict=False)]
    alone = [] if name in STAGED else several if LONG else several[-1:]
    for parts, goal, seed, course, end in alone:
        staged = fit(*parts[:2], x, seed=seed, objective=goal, **{**TOLD, **told})
        # a product with a tensor rounds once, one with a number of Python's twice
        bound = 1e-13 if moving_fields([goal]) else 0.0
        assert staged.losses == pytest.approx(course.losses, rel=bound, abs=0)
        assert same(values(*parts), end, bound) and staged.execution == "staged"
    side_by_side(make, x, goals, courses, ends, **told)


def dropping():
    """Statistics and dropout, and little else."""
    model, _ = linear()
    encoder = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.3))
    return model, FamilyGuide(model, families.mean_scale, encoder=encoder)


#: name -> how pairs are built, the data, options, and how they run; batches of four and of two
COMPILED: dict[str, Any] = {
    "statistics, dropout, clip, weights of the rate": (
        dropping,
        data,
        {"clip": 0.5, "objective": [ELBO(beta=0.5), ELBO(), ELBO(beta=warm_up(5))]},
        "looped",
    ),
    "patience": (dropping, data, PATIENCE, "looped"),
    "in turn": (build, data, {"clip": 0.5, "objective": [ELBO(beta=0.5), ELBO()]}, "looped"),
    "full_rank": (lambda: linear("full_rank"), data, {"optimizer": sgd}, "compiled"),
    "low_rank": (lambda: linear("low_rank"), data, {}, "looped"),
    "convolution": (convolved, lambda: data()[:, None], {}, "looped"),
    "flow": (lambda: linear("flow"), data, {}, "looped"),
    "IWAE": (linear, data, {"objective": [IWAE(3), IWAE(3)]}, "looped"),
    "each size": (linear, data, {"objective": [squared, squared]}, "compiled"),
    "told rows": (*site("told rows")[:2], {}, "looped"),
    "regression": (*site("regression")[:2], {"batch_size": 2}, "looped"),
    "loader": (linear, loader, ALL, "looped"),
    "all data": (linear, data, ALL, "looped"),
}

#: those that take long to compile, or have most of others
LATER = ["in turn", "low_rank", "flow", "IWAE", "patience", "each size", "told rows", "regression"]
LATER += ["loader", "all data", "convolution"]


@pytest.mark.filterwarnings("ignore:fit(_replicates)?. compiled, not looped")
@pytest.mark.parametrize("name", [name for name in COMPILED if LONG or name not in LATER])
def test_compiled_replicates_are_trained_as_by_eager_steps(name, monkeypatch, interpreted):
    """The compiler may reorder sums; six steps multiply a difference in the last place by less
    than 1e6.
    """
    make, x, told, execution = COMPILED[name]
    if name == "in turn":  # as where parameters fill the cache
        monkeypatch.setattr("ppvae.training.stacked._MOST", 1)
    x, goals = x(), [*told.get("objective", [None, None])]
    told = {key: value for key, value in told.items() if key != "objective"}
    courses, ends = one_by_one(make, x, goals, **told)
    with torch._dynamo.config.patch(error_on_recompile=True):
        how = {"execution": execution, "compile": True, "bound": 1e-8}
        side_by_side(make, x, goals, courses, ends, **how, **told)


@pytest.mark.filterwarnings("ignore::ppvae.NarrowFamily", "ignore::ppvae.NotConverged")
def test_a_regression_is_fitted_by_the_quasi_newton_method_without_a_word():
    def make():
        model = LinearRegression(1)
        return model, FamilyGuide(model, families.mean_scale)

    x, told = data()[:, :1], {"batch_size": None, "num_epochs": 1000}
    args = (x, x[:, 0] + 0.1 * data()[:, 1] ** 2)
    courses, ends = one_by_one(make, args, [None, None], **told)
    assert courses[0].method == "L-BFGS"
    side_by_side(make, args, [None, None], courses, ends, "eager", 0.0, **told)
    fits = []
    for seeds in (None, None, [1, 1]):  # by default from the stream of the caller
        pairs = made(make, 2)
        torch.manual_seed(0)
        results = fit_replicates(pairs, args, seeds=seeds, **{**TOLD, "batch_size": None})
        fits.append([result.losses for result in results])
    assert fits[0] == fits[1] and fits[0][0] != fits[0][1]
    assert fits[2][0] == fits[2][1]


DREG = IWAE(4, "doubly_reparametrized")  # its graph would have the right loss, and wrong gradients

#: name -> how pairs are built, options, what the warning says, and whether one pair can be staged
NO_GRAPH: dict[str, Any] = {
    "branch": (
        lambda: function(branch),
        {},
        "model, guide: cannot be staged: a decision depends on the values of tensors",
        False,
    ),
    "derivative": (
        build,
        {"objective": [DREG, DREG]},
        "objective: doubly_reparametrized takes a derivative inside the loss",
        False,
    ),
    "kinds": (build, {"objective": [ELBO(), IWAE(2)]}, "objective: expected those that", True),
    "one left": (build, {"batch_size": 3}, "data: a batch of one datum", True),
}


@pytest.mark.parametrize("name", NO_GRAPH)
def test_what_no_graph_holds_is_trained_eagerly_and_one_after_the_other(name, monkeypatch, capfd):
    make, told, message, one_is_staged = NO_GRAPH[name]
    goals = told.get("objective", [None, None])
    told = {**TOLD, "batch_size": told.get("batch_size", 4)}
    courses, ends = one_by_one(make, data(), goals, **told)
    with one_warning(f"fit_replicates: one after the other; {message}"):
        side_by_side(make, data(), goals, courses, ends, "eager", 0.0, **told)
    monkeypatch.setattr("ppvae.training.execution.STAGE", 1)
    for compile in ("auto",) if one_is_staged else (True, "auto"):
        (pair,) = made(make)
        said = one_warning(f"fit: runs eagerly; {message}") if compile is True else nullcontext()
        with traceless(*pair), said:
            alone = fit(*pair, data(), seed=11, objective=goals[0], compile=compile, **told)
        assert alone.execution == ("staged" if one_is_staged else "eager")
        assert one_is_staged or alone.execution_reason.startswith(f"not staged: {message}")
        assert alone.losses == courses[0].losses and same(values(*pair), ends[0])
    assert capfd.readouterr() == ("", "")


def test_objectives_that_differ_in_more_than_a_schedule_have_no_common_graph():
    elbo, bits = ELBO(free_bits=0.5), OBJECTIVES["all"][0]
    for goals in ([elbo, IWAE(2)], [elbo, bits], [IWAE(2), IWAE(3)], [print, max]):
        with pytest.raises(ValueError, match="objective: expected those that differ in their"):
            moving_fields(goals)
    assert moving_fields([ELBO(beta=2.0)]) == moving_fields([torch.sin, torch.sin]) == ()
    assert moving_fields(OBJECTIVES["beta"]) == ("beta",)
    assert moving_fields(OBJECTIVES["sampled"]) == ("free_bits",)
    assert moving_fields([ELBO(beta=warm_up(4, 0.5, 2.0))]) == ("beta",)


def quiet(*args, **kwargs):
    return fit(*args, **{"seed": 1, "batch_size": 4, "progress": False, **kwargs})


@pytest.fixture
def early(monkeypatch):
    """Stages from the first step on."""
    monkeypatch.setattr("ppvae.training.execution.STAGE", 1)


def stored(x):
    """A model with a `pyro.param` statement."""
    scale = pyro.param("user_scale", torch.tensor(3.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=x[:, 0])


def test_the_parameter_of_a_statement_is_trained_in_the_store(plain_pyro, early):
    runs = []
    for compile in (False, "auto"):
        pyro.clear_param_store()
        (pair,) = made(lambda: function(stored))
        with private_modules():
            result = quiet(*pair, data(8), num_epochs=3, learning_rate=0.01, compile=compile)
        runs.append([*values(*pair), pyro.param("user_scale").detach().clone()])
    assert result.execution == "staged" and same(*runs)
    assert 0.01 < abs(runs[0][-1].item() - 3.0) < 0.1


def test_compiled_training_is_eager_training(traced_only):
    """Batches of four, four and two, with a schedule. Nothing is compiled a second time.

    The compiler may reorder sums; fifteen steps multiply a difference in the last place by far
    less than 1e6. The noise is of Gammas, too.
    """
    objective, runs = ELBO(beta=warm_up(8)), []
    for compile in (False, True):
        ((model, guide),) = made(lambda: build("student_t"))
        guide.encoder[0].eval()  # a mode of its own
        with traceless(model, guide), torch._dynamo.config.patch(error_on_recompile=True):
            result = quiet(model, guide, data(), num_epochs=5, objective=objective, compile=compile)
        runs.append((result, values(model, guide)))
    (eager, before), (compiled, after) = runs
    assert (eager.execution, compiled.execution) == ("eager", "compiled")
    assert compiled.num_steps == eager.num_steps == 15
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-9)
    assert same(before, after, 1e-9)


def test_a_staged_loss_compiles_as_one_graph_and_goes_into_a_loop_of_ones_own(traced_only):
    staged = stage(*build(), data(8))
    with unchecked():  # torch.compile switches validation off for good
        options = {"fallback_random": True}
        compiled = torch.compile(staged, fullgraph=True, dynamic=True, options=options)
        for rows in (8, 5, 3):
            torch.manual_seed(2)
            want = torch.autograd.grad(staged(data(rows)), list(staged.parameters()))
            torch.manual_seed(2)
            found = torch.autograd.grad(compiled(data(rows)), list(staged.parameters()))
            for a, b in zip(want, found, strict=True):
                assert (a - b).abs().max() <= 1e-11 * a.abs().max()


def test_a_compiler_that_fails_leaves_the_training_staged(monkeypatch):
    def fails(*args, **kwargs):
        def run(*args):
            raise OSError("no compiler\nfound")

        return run

    monkeypatch.setattr("ppvae.staging.stride.compiled", fails)
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.warns(
        UserWarning, match="^fit: staged, not compiled; OSError: no compiler; it takes a C.. comp"
    ):
        result = quiet(*made()[0], data(), num_epochs=3, compile=True)
    assert result.execution == "staged"
    assert result.losses == quiet(*made()[0], data(), num_epochs=3, compile=False).losses


def test_when_to_stage_and_when_to_compile():
    def how(*told, **more):
        return how_to_run(*told, **more).how

    assert how("auto", STAGE - 1, 4) == "eager"
    assert how("auto", STAGE, 4) == "staged"
    assert how("auto", COMPILE - 1, 4) == "staged"
    assert how("auto", COMPILE, 4) == "looped"
    assert how(False, COMPILE, 4) == "eager"
    assert how(True, 1, 2) == "looped"
    assert how(True, COMPILE, 1) == "eager"  # nothing to tell the batch by
    assert how("auto", 1, 2, graph=True) == how(False, 1, 2, graph=True) == "staged"
    assert quiet(*build(), data(8), num_epochs=1).execution == "eager"


@pytest.mark.parametrize("compile", [False, "auto"])
def test_a_first_loss_that_is_not_finite_is_divergence(compile, early):
    model, guide = build()
    fails = pytest.raises(Diverged, match="the loss is nan at step 0: the guide's scale of 'z'")
    with traceless(model, guide, moved=False), fails:
        quiet(model, guide, data(8) * 1e200, num_epochs=5, compile=compile)


def test_a_model_that_raises_raises_the_same_error_by_every_way(early):
    def model(x):
        raise KeyError("mine")

    guide = build()[1]
    for compile in (False, True, "auto"):
        with traceless(guide, moved=False), pytest.raises(KeyError, match="mine"):
            quiet(model, guide, data(4), num_epochs=1, compile=compile)


def test_precision_is_set_inside_and_put_back():
    seen = []

    def objective(model, guide, *args, size=None, step=0):
        seen.append(torch.get_float32_matmul_precision())
        return negative_elbo(model, guide, *args, size=size)

    before = torch.get_float32_matmul_precision()
    for precision in ("medium", "high", "highest", None):
        pair = build()
        with traceless(*pair):
            quiet(*pair, data(4), num_epochs=1, precision=precision, objective=objective)
        assert set(seen) == {precision or before}
        seen.clear()
