"""A fit says why it is not run in a faster way, and warns where the user insisted."""

import warnings
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LONG
from pairs import branch, build, data, function, linear, made
from torch.utils.data import DataLoader, TensorDataset

import ppvae.staging.stride as graphs
from ppvae import FamilyGuide, fit, fit_replicates
from ppvae._checks import TROUBLE
from ppvae._scopes import unchecked
from ppvae.objectives import IWAE, negative_elbo
from ppvae.regression import LinearRegression
from ppvae.staging import NotStageable
from ppvae.training.execution import COMPILE, STAGE

TOLD = {"num_epochs": 2, "batch_size": 4, "seed": 3, "progress": False}
PAYS = "that pays from {:,} steps on (compile=True insists)"
MADE = graphs.Stride._made
COMPILER = "it takes a C++ compiler"
HOOKED = "torch.optim.Adam without weight decay, groups or hooks is"


def graph_only(stride, example):
    """Makes the graph of a loop, and no loop."""
    with unchecked(), torch.no_grad():
        stride._graph(example)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Graphs are taken and not compiled, as if a compiler had made them."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    monkeypatch.setattr(graphs.Stride, "_made", graph_only)


def ran(make, x=None, call=fit, **told):
    """How a fit ran, why, and what it warned of."""
    x = data(11) if x is None else x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if call is fit:
            result = fit(*made(make)[0], x, **{**TOLD, **told})
        else:
            told = {"seeds": [1, 2], **{k: v for k, v in TOLD.items() if k != "seed"}, **told}
            result, other = fit_replicates(made(make, 2), x, **told)
            assert result.execution_reason == other.execution_reason
    said = [str(each.message) for each in caught]
    assert all(each.filename == __file__ for each in caught if " not " in str(each.message))
    return result.execution, result.execution_reason, said


def half():
    model, guide = linear()
    return model.half(), guide.half()


def shared():
    """A buffer that is moved, in memory that another one has."""
    model, guide = linear()
    decoder = model.decoder
    decoder.register_buffer("moved", torch.zeros(3))
    decoder.register_buffer("read", decoder.moved[:])

    def move(module, _):
        module.moved.add_(0.1)

    decoder.register_forward_pre_hook(move)
    return model, guide


def squared(model, guide, *args, size=None, step=0):
    """A loss by which the graph of replicates is for one size of minibatch."""
    return negative_elbo(model, guide, *args, size=size) * (1.0 + 0.5 ** len(args[0]))


def uneven():
    """Minibatches of three sizes."""
    rows = [[0, 1, 2], [3, 4, 5, 6], [7, 8]]
    return DataLoader(TensorDataset(data(9, torch.float64)), batch_sampler=rows)


#: name -> how a pair is built, options, how it runs, why, and what a fit that insists adds; None
#: where it has nothing to add
REASONS: dict[str, Any] = {
    "optimizer": (
        linear, {"optimizer": torch.optim.AdamW}, "compiled",
        "not looped: the optimizer is not plain Adam", HOOKED,
    ),
    "noise": (
        partial(linear, "student_t"), {}, "compiled",
        "not looped: the loss draws random numbers that depend on others", None,
    ),
    "half": (
        half, {"x": data(12).half(), "check_support": False}, "compiled",
        "not looped: the parameters are not of single or double precision", "`model.float()`",
    ),
    "memory": (
        shared, {}, "compiled",
        "not looped: what a step moves is in memory that something else has, too", "`clone()`",
    ),
    "one datum": (
        linear, {"batch_size": 1}, "eager",
        "not staged: a minibatch of one datum is a case of its own", "a batch_size that leaves",
    ),
    "last datum": (
        linear, {"batch_size": 5, "optimizer": torch.optim.AdamW}, "compiled",
        "not looped: the optimizer is not plain Adam; minibatches of one datum run eagerly",
        "a batch_size that leaves two",
    ),
    "values": (
        partial(function, branch), {}, "eager",
        "not staged: model, guide: cannot be staged: a decision depends on the values of tensors",
        "(see ",
    ),
    "objective": (
        build, {"objective": IWAE(2, "doubly_reparametrized")}, "eager",
        "not staged: objective: doubly_reparametrized takes a derivative inside the loss", "(see ",
    ),
    "third size": (
        linear, {"objective": [squared] * 2, "x": uneven(), "batch_size": None,
                 "call": fit_replicates}, "compiled",
        "not looped: the graph is for minibatches of one size only; minibatches of a third size",
        "leave two sizes",
    ),
}  # fmt: skip


#: what is run without insisting, too: a step that is compiled, one that is eager, and a loss that
#: is not staged
UNASKED = ["optimizer", "one datum", "values"]


@pytest.mark.parametrize("name", REASONS)
def test_each_reason_is_told(name, monkeypatch):
    make, told, how, reason, hint = REASONS[name]
    if LONG or name in UNASKED:
        monkeypatch.setattr("ppvae.training.execution.COMPILE", 1)  # so many steps are compiled
        execution, unasked, said = ran(make, **told)
        assert (execution, said) == (how, []) and unasked.startswith(reason)
    execution, why, said = ran(make, compile=True, **told)
    assert execution == how and why.startswith(reason)
    assert not (LONG or name in UNASKED) or why == unasked
    if hint is None:
        assert said == []
    else:
        assert any(hint in each and each.startswith("fit") for each in said)
        assert len(said) == len({*said}) <= 2  # once each, in however many steps


def test_what_was_not_asked_for_is_told_in_the_result():
    fast, slow = ran(linear), ran(linear, compile=False)
    assert fast == ("eager", f"not staged: {PAYS.format(STAGE)}", [])
    assert slow == ("eager", "not staged: compile=False", [])
    many = ran(linear, num_epochs=1, batch_size=None, call=fit_replicates)
    assert many == ("staged", f"not compiled: {PAYS.format(COMPILE)}", [])


def test_a_result_prints_it_behind_the_verdict():
    result = fit(*linear(), data(), compile=False, **TOLD)
    assert repr(result).splitlines()[-1] == "not staged: compile=False"
    assert repr(result._replace(execution_reason="")).splitlines()[-1] == result.verdict


def test_a_compiler_that_fails_is_named(monkeypatch):
    def fails(*_, **__):
        raise OSError("no compiler\nfound")

    monkeypatch.setattr(graphs.Stride, "_made", MADE)
    monkeypatch.setattr(graphs, "compiled", fails)
    monkeypatch.setattr(torch, "compile", fails)
    how, why, said = ran(linear, compile=True)
    assert (how, why) == ("staged", "not compiled: OSError: no compiler")
    assert said == [f"fit: staged, not compiled; OSError: no compiler; {COMPILER} ({TROUBLE})"]
    how, why, said = ran(linear, compile=True, call=fit_replicates)
    assert (how, why) == ("staged", "not compiled: OSError: no compiler")
    assert [each.partition(":")[0] for each in said] == ["fit_replicates"]


def test_replicates_say_why_they_are_trained_one_after_the_other():
    how, why, said = ran(partial(function, branch), call=fit_replicates)
    reason = "one after the other: model, guide: cannot be staged: a decision depends on the values"
    assert how == "eager" and why.startswith(reason)
    assert why.endswith(f"; not staged: {PAYS.format(STAGE)}") and len(said) == 1
    how, why, said = ran(linear, call=fit_replicates, compile=True, optimizer=torch.optim.AdamW)
    assert (how, why) == ("compiled", "not looped: the optimizer is not plain Adam")
    assert [each.partition(":")[0] for each in said] == ["fit_replicates"] and HOOKED in said[0]


@pytest.mark.filterwarnings("ignore::ppvae.NotConverged", "ignore::ppvae.NarrowFamily")
def test_global_latents_say_that_few_steps_are_not_compiled():
    def make():
        model = LinearRegression(2)
        return model, FamilyGuide(model, "mean_scale")

    x = data(8)
    told = {"x": (x[:, :2], x[:, 2]), "batch_size": None, "num_epochs": 100}
    how, why, said = ran(make, **told)
    assert (how, why) == ("eager", "not staged: the optimum is found at once, in few steps")
    assert not [each for each in said if "eager" in each]
    *_, said = ran(make, compile=True, **told)
    (warned,) = [each for each in said if "eager" in each]
    assert "; an optimizer of your own takes steps, which are compiled (see " in warned


def test_what_is_loaded_from_a_checkpoint_has_its_reason(tmp_path):
    told = {"optimizer": torch.optim.AdamW, "compile": True, "checkpoint": tmp_path / "run.pt"}
    first = ran(linear, num_epochs=1, **told)
    done = ran(linear, num_epochs=1, **told)
    more = ran(linear, num_epochs=3, **told)
    assert first[:2] == done[:2] == more[:2] and first[1].startswith("not looped: the optimizer")


def test_what_is_not_stageable_has_a_way_out_or_none():
    assert NotStageable("so").way_out == "" and NotStageable("so", None).way_out is None
    assert str(NotStageable("so", "do")) == "so"


def folded(x):
    """A model that decides by the value of a draw."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(level if level > 0 else 0.5 * level, 1.0), obs=x)


@pytest.mark.filterwarnings("ignore::ppvae.NotConverged", "ignore::ppvae.NarrowFamily")
def test_draws_that_run_one_after_the_other_are_told():
    guide = FamilyGuide(folded, "mean_scale")
    result = fit(folded, guide, torch.tensor([1.0, 2.0]), num_epochs=2, progress=False)
    words = "draws are run one after the other: a decision depends on the values of tensors"
    assert words in result.execution_reason
