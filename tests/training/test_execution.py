"""`fit` runs a graph where it can: the same training, one line where it cannot, no trace left."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import Normed, branch, build, data, function, made, one_warning, same, traceless, values
from pyro.distributions import constraints

from ppvae import fit, stage
from ppvae._scopes import private_modules, unchecked
from ppvae.objectives import ELBO, negative_elbo, warm_up
from ppvae.staging.gradients import Gradients
from ppvae.training import Diverged
from ppvae.training.single import COMPILE, STAGE, how_to_run

#: torch, on itself, while it compiles; an error would be taken for one of the compiler
pytestmark = pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")


def quiet(*args, **kwargs):
    return fit(*args, **{"seed": 1, "batch_size": 4, "progress": False, **kwargs})


@pytest.fixture
def early(monkeypatch):
    """Stages from the first step on."""
    monkeypatch.setattr("ppvae.training.single.STAGE", 1)


# ------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("family", ["student_t", "full_rank"])
def test_compiled_gradients_are_those_of_autograd(family):
    """The same graph and noise through a compiler that may reorder sums: equal up to rounding."""
    ((model, guide),) = made(lambda: build(family))
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
            assert a.shape == b.shape and (a - b).abs().max() <= 1e-11 * a.abs().max()


def test_compiled_training_is_eager_training():
    """Batches of four, four and two, with a schedule. Nothing is compiled a second time."""
    objective, found = ELBO(beta=warm_up(8)), []
    for compile in (False, True):
        ((model, guide),) = made()
        guide.encoder[0].eval()  # a mode of its own
        with traceless(model, guide), torch._dynamo.config.patch(error_on_recompile=True):
            result = quiet(model, guide, data(), num_epochs=5, objective=objective, compile=compile)
        found.append((result, values(model, guide)))
    (eager, before), (compiled, after) = found
    assert (eager.execution, compiled.execution) == ("eager", "compiled")
    assert compiled.num_steps == eager.num_steps == 15
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert same(before, after, 1e-5)


def test_a_staged_loss_compiles_as_one_graph_and_goes_into_a_loop_of_ones_own():
    staged = stage(*build(), data(8))
    with unchecked():  # torch.compile switches validation off for good
        compiled = torch.compile(staged, fullgraph=True, options={"fallback_random": True})
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

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.warns(UserWarning, match="^fit: staged, not compiled; OSError: no compiler$"):
        result = quiet(*made()[0], data(), num_epochs=3, compile=True)
    assert result.execution == "staged"
    assert result.losses == quiet(*made()[0], data(), num_epochs=3, compile=False).losses


# -------------------------------------------------------------------------------------- staged


def stored(x):
    """A model with a `pyro.param` statement, and a plate that may be of a fixed size."""
    scale = pyro.param("user_scale", torch.tensor(3.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=x[:, 0])


def fixed(x):
    """A graph for that size alone, or none; but never an error that eager training has not."""
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[:, 0])


STAGED = {
    "one left": (build, 9, {}),  # a batch of one datum, for which there is no graph
    "running statistics": (lambda: build(encoder=Normed()), 10, {}),
    "statement": (lambda: function(stored), 8, {}),
    "fixed size": (lambda: function(fixed), 6, {"batch_size": None}),
}


@pytest.mark.parametrize("name", STAGED)
def test_staged_training_is_eager_training_to_the_last_bit(name, plain_pyro, early):
    make, rows, told = STAGED[name]
    found = []
    for compile in (False, "auto"):
        pyro.clear_param_store()
        (pair,) = made(make)
        with traceless() if name != "statement" else private_modules():
            result = quiet(
                *pair, data(rows), num_epochs=3, learning_rate=0.01, compile=compile, **told
            )
        store = [value.detach().clone() for value in pyro.get_param_store().values()]
        found.append((result, [*values(*pair), *store]))
    (eager, before), (staged, after) = found
    assert (eager.execution, staged.execution) == ("eager", "staged")
    assert eager.losses == staged.losses and same(before, after)
    if name == "statement":
        assert 0.01 < abs(before[-1].item() - 3.0) < 0.1
    if name == "running statistics":
        mean, _, count = before[-3:]
        assert mean.abs().min() > 0 and count == 9


def test_when_to_stage_and_when_to_compile():
    assert how_to_run("auto", STAGE - 1, 4) == "eager"
    assert how_to_run("auto", STAGE, 4) == "staged"
    assert how_to_run("auto", COMPILE - 1, 4) == "staged"
    assert how_to_run("auto", COMPILE, 4) == "compiled"
    assert how_to_run(False, COMPILE, 4) == "eager"
    assert how_to_run(True, 1, 2) == "compiled"
    assert how_to_run(True, COMPILE, 1) == "eager"  # nothing to tell the batch by
    assert quiet(*build(), data(8), num_epochs=1).execution == "eager"


@pytest.mark.parametrize("compile", [True, "auto"])
def test_a_model_that_cannot_be_staged_trains_eagerly_and_says_why_once(compile, early):
    ((model, guide),) = made(lambda: function(branch))
    before = quiet(model, guide, data(4), num_epochs=3, compile=False).losses
    ((model, guide),) = made(lambda: function(branch))
    with traceless(guide), one_warning("fit: runs eagerly; model, guide: cannot be staged: "):
        result = quiet(model, guide, data(4), num_epochs=3, compile=compile)
    assert result.execution == "eager" and result.losses == before


@pytest.mark.parametrize("compile", [False, "auto"])
def test_a_training_that_diverges_leaves_no_trace(compile, early):
    model, guide = build()
    guide.encoder[0].eval()  # a mode of its own
    told = {"learning_rate": 1e200, "precision": "medium", "num_epochs": 5, "compile": compile}
    with traceless(model, guide), pytest.raises(Diverged):
        quiet(model, guide, data(8), **told)
    assert all(p.isfinite().all() for p in values(model, guide))


@pytest.mark.parametrize("compile", [False, "auto"])
def test_a_first_loss_that_is_not_finite_is_divergence(compile, early):
    model, guide = build()
    fails = pytest.raises(Diverged, match=r"the loss is \w+ at step 0, from log_likelihood of 'x'")
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
        quiet(*build(), data(4), num_epochs=1, precision=precision, objective=objective)
        assert set(seen) == {precision or before}
        seen.clear()
        assert torch.get_float32_matmul_precision() == before


def test_the_store_is_used_privately():
    with private_modules():
        staged = stage(*build(), data(4))
    staged(data(4))
    assert not list(pyro.get_param_store().keys())
