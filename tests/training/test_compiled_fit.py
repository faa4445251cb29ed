"""`fit` runs a graph where it can: the same training, one line where it cannot, no trace left."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import world
from pyro.distributions import constraints
from torch import nn

from ppvae import VAE, FamilyGuide, families, fit, likelihoods, stage
from ppvae._scopes import private_modules, unchecked
from ppvae.nn import mlp
from ppvae.objectives.elbo import ELBO
from ppvae.objectives.schedules import warm_up
from ppvae.staging.gradients import Gradients
from ppvae.training.single import COMPILE, STAGE, how_to_run
from ppvae.training.snapshots import Diverged

#: torch, on itself, while it compiles; an error would be taken for one of the compiler
pytestmark = pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")


def build(family=families.mean_scale, likelihood=None):
    torch.manual_seed(0)
    model = VAE(mlp(2, 4, out=3), 2, likelihood or likelihoods.Normal(0.5))
    return model, FamilyGuide(model, family, encoder=mlp(3, 4))


def data(rows):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(5))


def quiet(*args, **kwargs):
    return fit(*args, **{"seed": 1, "batch_size": 4, "progress": False, **kwargs})


def weights(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def both(build_one, x, **kwargs):
    """Results and weights of the same training, eager and compiled."""
    told = []
    for compile in (False, True):
        model, guide = build_one()
        result = quiet(model, guide, x, compile=compile, **kwargs)
        modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
        told.append((result, weights(*modules)))
    return told


def hold(told, rel=1e-5):
    (eager, before), (compiled, after) = told
    assert (eager.execution, compiled.execution) == ("eager", "compiled")
    assert compiled.num_steps == eager.num_steps
    assert compiled.losses == pytest.approx(eager.losses, rel=rel)
    for a, b in zip(before, after, strict=True):
        assert (a - b).abs().max() <= rel


# ------------------------------------------------------------------------------------ compiled


COMPILED: dict[str, Any] = {
    **{name: families.LADDER[name] for name in ("mean_scale", "student_t", "full_rank")},
    "flow": families.Flow(layers=0, hidden=4, bins=3),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_gradients_are_those_of_autograd(name):
    """The same graph and noise through a compiler that may reorder sums: equal up to rounding."""
    model, guide = build(COMPILED[name])
    staged = stage(model, guide, data(8))
    function = Gradients(staged, compiled=True)
    for rows in (8, 5):
        x = data(rows)
        torch.manual_seed(2)
        want = staged(x)
        state = staged.state()
        wanted = [state[at] for at in staged.trained()]
        slopes = torch.autograd.grad(want, wanted)
        torch.manual_seed(2)
        loss, found = function(state, staged.data((x,), staged.program.settings(0)))
        assert loss.item() == pytest.approx(want.item(), rel=1e-12)
        assert {id(p) for p in wanted} == {id(p) for p in staged.parameters()}
        assert function.execution == "compiled"
        for a, b in zip(slopes, found, strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() <= 1e-11 * a.abs().max()


@pytest.mark.parametrize(
    ("rows", "objective"), [(10, ELBO(beta=warm_up(8))), (9, None)], ids=["2 left", "1 left"]
)
def test_compiled_training_is_eager_training(rows, objective):
    """Batches of four: the last has two, or one. Nothing is compiled a second time."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        hold(both(build, data(rows), num_epochs=5, objective=objective))


def test_running_statistics_move_as_in_eager_training():
    found = []
    for compile, epochs in [
        (False, 3),
        (True, 3),
        (False, STAGE // 3 + 1),
        ("auto", STAGE // 3 + 1),
    ]:
        model, _ = build()
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        guide = FamilyGuide(model, families.mean_scale, encoder=net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whether it compiles is another question
            result = quiet(model, guide, data(10), num_epochs=epochs, compile=compile)
        norm = net[1]
        assert norm.num_batches_tracked == 3 * epochs
        found.append((result.losses, norm.running_mean, norm.running_var))
    for (losses, *some), (others, *same) in (found[:2], found[2:]):
        assert some[0].abs().min() > 0
        assert others == pytest.approx(losses, rel=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(some, same, strict=True))


def test_a_staged_loss_compiles_as_one_graph_and_goes_into_a_loop_of_ones_own():
    model, guide = build()
    staged = stage(model, guide, data(8))
    with unchecked():  # torch.compile switches validation off for good
        compiled = torch.compile(staged, fullgraph=True, options={"fallback_random": True})
        for rows in (8, 5, 3):
            torch.manual_seed(2)
            want = torch.autograd.grad(staged(data(rows)), list(staged.parameters()))
            torch.manual_seed(2)
            found = torch.autograd.grad(compiled(data(rows)), list(staged.parameters()))
            for a, b in zip(want, found, strict=True):
                assert (a - b).abs().max() <= 1e-11 * a.abs().max()


def test_parameters_of_statements_are_trained_in_the_store(plain_pyro):
    def model(x):
        scale = pyro.param("user_scale", torch.tensor(3.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=x[:, 0])

    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        guide = FamilyGuide(model, families.mean_scale, encoder=mlp(3, 4))
        torch.manual_seed(0)
        for p in guide.parameters():
            nn.init.normal_(p, 0.0, 0.1)
        result = quiet(model, guide, data(8), num_epochs=10, learning_rate=0.01, compile=compile)
        found.append((result.losses, pyro.param("user_scale").item()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert abs(found[0][1] - 3.0) > 0.05


# ---------------------------------------------------------------------------- auto, and staged


def test_staged_training_is_eager_training_to_the_last_bit():
    results = []
    for compile in (False, "auto"):
        model, guide = build(families.student_t)
        result = quiet(model, guide, data(9), num_epochs=STAGE // 3 + 1, compile=compile)
        results.append((result, weights(model, guide)))
    (eager, before), (staged, after) = results
    assert (eager.execution, staged.execution) == ("eager", "staged")
    assert eager.num_steps == staged.num_steps >= STAGE
    assert eager.losses == staged.losses
    assert all(map(torch.equal, before, after))


def test_when_to_stage_and_when_to_compile():
    assert how_to_run("auto", STAGE - 1, 4) == "eager"
    assert how_to_run("auto", STAGE, 4) == "staged"
    assert how_to_run("auto", COMPILE - 1, 4) == "staged"
    assert how_to_run("auto", COMPILE, 4) == "compiled"
    assert how_to_run(False, COMPILE, 4) == "eager"
    assert how_to_run(True, 1, 4) == "compiled"
    assert how_to_run(True, COMPILE, 1) == "eager"  # nothing to tell the batch by
    model, guide = build()
    assert quiet(model, guide, data(8), num_epochs=1).execution == "eager"


def test_a_plate_of_fixed_size_is_trained_by_whatever_way():
    """A graph for that size alone, or none; but never an error that eager training has not."""

    def model(x):
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[:, 0])

    losses = []
    for compile in (False, "auto"):
        torch.manual_seed(0)
        guide = FamilyGuide(model, families.mean_scale, encoder=mlp(3, 4))
        told = {"num_epochs": STAGE, "batch_size": None, "compile": compile}
        losses.append(quiet(model, guide, data(6), **told).losses)
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------ what cannot be staged


def branch(x):
    shift = 1.0 if x.sum() > 0 else -1.0
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) + shift, 0.5), obs=x[:, 0])


@pytest.mark.parametrize("compile", [True, "auto"])
def test_a_model_that_cannot_be_staged_trains_eagerly_and_says_why_once(compile):
    epochs = STAGE if compile == "auto" else 3
    losses = []
    for way in (False, compile):
        torch.manual_seed(0)
        guide = FamilyGuide(branch, families.mean_scale, encoder=mlp(3, 4))
        before = world()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = quiet(branch, guide, data(4), num_epochs=epochs, compile=way)
        assert world() == before
        assert result.execution == "eager"
        losses.append(result.losses)
        said = [str(w.message) for w in caught]
        if way is False:
            assert not said
        else:
            (line,) = said
            assert line.startswith("fit: runs eagerly; model, guide: cannot be staged: ")
            assert "\n" not in line and len(line) < 300
            assert caught[0].filename == __file__  # the caller of fit
    assert losses[0] == losses[1]


def test_a_compiler_that_fails_leaves_the_training_staged(monkeypatch):
    def fails(*args, **kwargs):
        def run(*args):
            raise OSError("no compiler\nfound")

        return run

    monkeypatch.setattr(torch, "compile", fails)
    model, guide = build()
    with pytest.warns(UserWarning, match="^fit: staged, not compiled; OSError: no compiler$"):
        result = quiet(model, guide, data(10), num_epochs=3, compile=True)
    assert result.execution == "staged"
    assert result.losses == quiet(*build(), data(10), num_epochs=3, compile=False).losses


# ------------------------------------------------------------------------- nothing left behind


@pytest.mark.parametrize("compile", [False, True])
def test_a_training_that_diverges_leaves_no_trace(compile):
    model, guide = build()
    guide.encoder[0].eval()  # a mode of its own
    modes = [part.training for m in (model, guide) for part in m.modules()]
    before = world()
    with pytest.raises(Diverged):
        told = {"learning_rate": 1e200, "precision": "medium", "num_epochs": 5}
        quiet(model, guide, data(8), compile=compile, **told)
    assert world() == before
    assert [part.training for m in (model, guide) for part in m.modules()] == modes
    assert all(p.isfinite().all() for m in (model, guide) for p in m.parameters())


def test_precision_is_set_inside_and_put_back():
    seen = []

    def objective(model, guide, *args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return ELBO()(model, guide, *args, **kwargs)

    before = torch.get_float32_matmul_precision()
    for precision in ("medium", "high", "highest", None):
        quiet(*build(), data(4), num_epochs=1, precision=precision, objective=objective)
        assert set(seen) == {precision or before}
        seen.clear()
        assert torch.get_float32_matmul_precision() == before


def test_a_model_that_raises_raises_the_same_error_by_every_way():
    guide = build()[1]

    def model(x):
        raise KeyError("mine")

    for compile in (False, True, "auto"):
        before = world()
        with pytest.raises(KeyError, match="mine"):
            quiet(model, guide, data(4), num_epochs=STAGE, compile=compile)
        assert world() == before


# ------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compile": "yes"}, "compile: expected \"auto\", True or False, got 'yes'"),
        ({"compile": None}, 'compile: expected "auto", True or False, got None'),
        ({"compile": 1}, 'compile: expected "auto", True or False, got 1'),
        (
            {"precision": "low"},
            'precision: expected "highest", "high" or "medium", got \'low\'',
        ),
        ({"precision": 16}, 'precision: expected "highest", "high" or "medium", got 16'),
    ],
)
def test_bad_arguments(arguments, message):
    model, guide = build()
    before = weights(model, guide)
    with pytest.raises(ValueError) as caught:
        quiet(model, guide, data(4), num_epochs=1, **arguments)
    assert str(caught.value) == message
    assert all(map(torch.equal, before, weights(model, guide)))


def test_the_store_is_used_privately():
    model, guide = build()
    with private_modules():
        staged = stage(model, guide, data(4))
    staged(data(4))
    assert not list(pyro.get_param_store().keys())
