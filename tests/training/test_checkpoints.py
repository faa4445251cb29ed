"""What was stopped and goes on is what was never stopped, to the last bit; nothing is lost."""

import contextlib
import math
import os
import signal
import subprocess
import sys
from functools import partial, partialmethod
from pathlib import Path

import pyro
import pytest
import torch
from cases import LONG
from global_latents import labelled, logistic
from pairs import (
    Normed,
    branch,
    build,
    data,
    function,
    linear,
    made,
    same,
    traceless,
    values,
    written,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ppvae import FamilyGuide, families, fit, fit_replicates, likelihoods
from ppvae.nn import Standardize
from ppvae.objectives import ELBO, warm_up
from ppvae.training import Diverged, load_pair, save_pair
from ppvae.training.optimum import Way
from ppvae.training.steps import Steps

#: torch, on itself, while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")

TOLD = {"num_epochs": 4, "batch_size": 4, "learning_rate": 0.01, "progress": False}


@pytest.fixture
def stop_at(monkeypatch, ctrl_c):
    """Sends Ctrl-C in a step of the optimizer, or in the stride that it is in."""
    ways = {name: getattr(Steps, name) for name in ("take", "_stride")}

    def stop(number, times=1):
        def stopping(steps, what, way):
            before = steps.number
            taken = way(steps, what)
            if before < number <= steps.number:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return taken

        for name, way in ways.items():
            monkeypatch.setattr(Steps, name, partialmethod(stopping, way=way))

    return stop


def normed():
    return build(encoder=Normed())


def shuffled():
    """A loader with a generator of its own; three minibatches."""
    generator = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(data()), batch_size=4, shuffle=True, generator=generator)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


def groups(named_parameters, lr):
    """The guide learns faster."""
    own = [(n, p) for n, p in named_parameters if n.startswith("guide.")]
    others = [(n, p) for n, p in named_parameters if not n.startswith("guide.")]
    assert own and others
    return torch.optim.SGD([{"params": own, "lr": 2 * lr}, {"params": others}], lr=lr, momentum=0.9)


def lbfgs(parameters, lr):
    return torch.optim.LBFGS(parameters, lr=lr, max_iter=3)


HELD = {"validation": data(6, torch.float64) + 1.0, "patience": 2}

#: name -> how a pair is built, the data, and options
WAYS = {
    "shuffles and draws": (build, data, {}),
    "statistics, dropout, early stopping": (normed, data, {**HELD, "num_epochs": 7}),
    "warm-up": (linear, data, {**HELD, "objective": ELBO(beta=warm_up(5)), "num_epochs": 5}),
    "a loader": (build, shuffled, {"batch_size": None}),
    "scheduler": (build, data, {"scheduler": cosine, "clip": 0.5}),
    "plateau": (build, data, {"scheduler": plateau, **HELD, "patience": None}),
    "named": (build, data, {"optimizer": groups}),
    "L-BFGS": (build, data, {"optimizer": lbfgs, "batch_size": None, "num_epochs": 6}),
    "functions": (written, data, {}),
    "until flat": (linear, data, {"num_epochs": None, "max_epochs": 9}),
    "staged": (normed, data, {}),
    "compiled": (partial(linear, "student_t"), data, {"compile": True}),
    "a family without channels": (partial(build, "noise_only"), data, {}),
}


def all_values(parts):
    return values(*(part for part in parts if isinstance(part, nn.Module)))


#: the compiler takes its time: a graph that is staged is stopped and goes on in the same way
SLOW = pytest.mark.skipif(not LONG, reason="the compiler takes its time")
SOME = [pytest.param(name, marks=SLOW) if name == "compiled" else name for name in WAYS]


@pytest.mark.filterwarnings("ignore:fit. .*not flat")
@pytest.mark.parametrize("name", SOME)
def test_stopped_and_resumed_is_never_stopped(name, stop_at, tmp_path, monkeypatch):
    """At any step: in the first epoch, in the middle of one, and at its end."""
    make, x, told = WAYS[name]
    told = {**TOLD, **told}
    if name == "staged":
        monkeypatch.setattr("ppvae.training.execution.STAGE", 1)

    def run(seed, **more):
        torch.manual_seed(seed)  # another start, which the checkpoint replaces
        parts = make()
        return fit(*parts[:2], x(), seed=7, **told, **more), all_values(parts)

    whole, end = run(0)
    assert name not in ("staged", "compiled") or whole.execution == name
    for step in (1, 3, 5) if name not in ("staged", "compiled") else (2, 3) if LONG else (2,):
        stop_at(step)
        path = tmp_path / f"{step}.pt"
        part, _ = run(0, checkpoint=path)
        assert part.interrupted and part.num_steps == step and "interrupted" in part.verdict
        stop_at(-1)
        rest, there = run(1, checkpoint=path)
        blank = {"seconds": 0.0, "optimizer": None}
        assert rest._replace(**blank) == whole._replace(**blank) and not rest.interrupted
        assert same(there, end)
        again, there = run(2, checkpoint=path)  # a run that has ended
        assert again._replace(**blank) == whole._replace(**blank) and same(there, end)
        assert torch.load(path, weights_only=True)["format"] == 3


@pytest.mark.parametrize("held", [{}] * LONG + [{**HELD, "learning_rate": 0.1, "num_epochs": 12}])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=SLOW)])
def test_replicates_go_on(compiled, held, stop_at, tmp_path):
    """Side by side, in one file; noise, minibatches and statistics of each are its own, and so is
    the epoch in which it ends.
    """

    make = linear if compiled else normed

    def run(first, **more):
        pairs = made(make, first + 2)[first:]
        told = {**TOLD, "objective": [ELBO(), ELBO(beta=warm_up(7))], "compile": compiled, **held}
        results = fit_replicates(pairs, data(), seeds=[1, 2], **told, **more)
        return results, [v for pair in pairs for v in values(*pair)]

    whole, end = run(0)
    assert whole[0].execution == ("looped" if compiled else "staged")
    one, two = (result.num_steps for result in whole)
    assert (one < two) == bool(held)
    late = [one + 2] if held else []  # when one has ended
    # in the first epoch, after it, and in the third
    for step in (1, 3, 7, *late) if LONG else (late or [7]):
        path = tmp_path / f"{step}.pt"
        stop_at(step)
        parts, _ = run(0, checkpoint=path)
        going_on = [part for part in parts if part.interrupted or not held]
        # strides are as long as the clock wants, and end with an epoch of three steps at the latest
        last = math.ceil(step / 3) * 3 if compiled else step
        assert all(part.interrupted and step <= part.num_steps <= last for part in going_on)
        assert len({part.num_steps for part in going_on}) == 1
        assert parts[1].interrupted and parts[0].interrupted == (step <= one)
        assert parts[1].execution == whole[1].execution
        stop_at(-1)
        rest, there = run(1, checkpoint=path)
        blank = {"seconds": 0.0, "optimizer": None}
        pairs = zip(rest, whole, strict=True)
        assert all(r._replace(**blank) == w._replace(**blank) for r, w in pairs)
        assert same(there, end)


@pytest.mark.filterwarnings("ignore:fit_replicates. one after the other")
def test_replicates_one_after_the_other_have_files_of_their_own(stop_at, tmp_path):
    def run(**more):
        pairs = made(function, 2)  # a decision on values: no graph
        pairs = [(branch, guide) for _, guide in pairs]
        return fit_replicates(pairs, data(), seeds=[1, 2], **TOLD, **more)

    stop_at(5)
    one, two = run(checkpoint=tmp_path / "run.pt")
    assert one.interrupted and two.interrupted and two.losses == [] and "no loss" in repr(two)
    stop_at(-1)
    one, two = run(checkpoint=tmp_path / "run.pt")
    assert one.num_steps == two.num_steps == 12 and not two.interrupted
    assert {path.name for path in tmp_path.iterdir()} == {"run-0.pt", "run-1.pt"}


def test_global_latents_begin_anew_and_end_the_same(ctrl_c, tmp_path, monkeypatch):
    """Their method takes seconds; interrupted, what it has is in place."""
    told = {"seed": 0, "progress": False, "checkpoint": tmp_path / "run.pt"}
    guide = FamilyGuide(logistic, families.full_rank)
    whole = fit(logistic, guide, labelled(), **{**told, "checkpoint": None})
    add, start = Way.add, values(guide)

    def stopping(way, value):
        add(way, value)
        if len(way.losses) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Way, "add", stopping)
    torch.manual_seed(1)
    other = FamilyGuide(logistic, families.full_rank)
    part = fit(logistic, other, labelled(), **told)
    assert part.interrupted and part.converged is None and len(part.losses) == 2
    assert "interrupted after 2 steps" in part.verdict
    assert not same(values(other), start)
    monkeypatch.setattr(Way, "add", add)
    for _ in range(2):  # to the end, and once more
        rest = fit(logistic, other, labelled(), **told)
        assert rest.losses == whole.losses and rest.verdict == whole.verdict
        assert same(values(other), values(guide)) and rest.converged


def test_more_epochs_go_on_and_fewer_are_refused(tmp_path):
    told = {**TOLD, "seed": 3}
    short, long = made(build), made(build)
    fit(*short[0], data(), **told, checkpoint=tmp_path / "run.pt")
    more = {**told, "num_epochs": 7}
    went_on = fit(*short[0], data(), **more, checkpoint=tmp_path / "run.pt")
    assert went_on.losses == fit(*long[0], data(), **more).losses
    assert same(values(*short[0]), values(*long[0]))
    with traceless(*short[0], moved=False), pytest.raises(ValueError, match="num_epochs: .* 7"):
        fit(*short[0], data(), **told, checkpoint=tmp_path / "run.pt")


def scaled(scale):
    return lambda: build(likelihood=likelihoods.Normal(scale))


def told_by_a_constant(scale):
    return lambda: written(scale=scale)[:2]


#: name -> what it was made with, what it is resumed with, and what the message names
OTHERS = {
    "family": (partial(build, "mean_only"), partial(build, "mean_only_bounded"), {}, "guide"),
    "likelihood": (build, partial(build, likelihood=likelihoods.Poisson()), {}, "likelihood"),
    "scale": (scaled(1.0), scaled(3.0), {}, "likelihood"),
    "width": (build, linear, {}, "decoder"),
    "a constant": (told_by_a_constant(0.5), told_by_a_constant(0.6), {}, "give a loss of"),
    "data": (build, build, {"data": data(10, torch.float64) + 1.0}, "data"),
    "rate": (build, build, {"learning_rate": 0.02}, "learning_rate, which is 0.02 here"),
    "objective": (build, build, {"objective": ELBO(beta=2.0)}, "objective"),
    "optimizer": (build, build, {"optimizer": torch.optim.SGD}, "optimizer"),
    "seed": (build, build, {"seed": 4}, "seed"),
    "batch size": (build, build, {"batch_size": 5}, "batch_size"),
    "validation": (build, build, {"validation": data(3, torch.float64)}, "validation"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_training_is_refused(name, tmp_path):
    one, other, told, message = OTHERS[name]
    path, whole = tmp_path / "run.pt", {"data": data().abs().round(), **TOLD, "seed": 3}
    fit(*made(one)[0][:2], checkpoint=path, **whole)
    before, pair = path.read_bytes(), made(other)[0][:2]
    with traceless(*pair, moved=False), pytest.raises(ValueError, match=f"checkpoint.*{message}"):
        fit(*pair, checkpoint=path, **{**whole, "num_epochs": 6, **told})
    assert path.read_bytes() == before


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_not_trained_comes_from_the_file_with_a_warning_where_it_differs(seed, tmp_path):
    """A frozen decoder and the constants of a layer; what moves, as statistics, says nothing."""

    def frozen(seed):
        torch.manual_seed(seed)
        layer = Standardize(loc=torch.randn(3), scale=2.0)
        model, guide = build(encoder=nn.Sequential(layer, Normed()))
        model.decoder.requires_grad_(requires_grad=False)
        return model, guide

    told = {**TOLD, "seed": 3, "checkpoint": tmp_path / "run.pt"}
    first, other = frozen(0), frozen(seed)
    fit(*first, data(), **{**told, "num_epochs": 1})
    names = r"\['model.decoder.0.weight', .*loc.*\], which training does not move, were others"
    scope = pytest.warns(UserWarning, match=names) if seed else contextlib.nullcontext()
    with scope:
        fit(*other, data(), **told)
    fit(*first, data(), **told)
    assert same(values(*first), values(*other))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (3, TypeError, "checkpoint: expected the path of a file, got 3"),
        ("nowhere/run.pt", FileNotFoundError, "checkpoint: expected a folder that exists"),
        ("pipe.pt", ValueError, "checkpoint: expected the path of a file, got that of a device or"),
        ("text.pt", ValueError, "checkpoint: expected a file that was written here"),
        ("dict.pt", ValueError, "checkpoint: expected a file that was written here"),
    ],
)
def test_files_of_other_kinds_are_refused(path, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.pt").write_text("hello")
    os.mkfifo("pipe.pt")
    torch.save({"weights": torch.ones(2)}, "dict.pt")
    pair = build()
    with traceless(*pair, moved=False), pytest.raises(error, match=message):
        fit(*pair, data(), checkpoint=path, **TOLD)


def test_ctrl_c_keeps_what_was_trained_and_a_second_one_raises(stop_at):
    pair = build()
    stop_at(5)
    with traceless(*pair):
        part = fit(*pair, data(), seed=1, **TOLD)
    assert part.interrupted and part.num_steps == 5 and len(part.losses) == 2
    assert "interrupted in epoch 1, after 5 steps" in repr(part)
    assert part.optimizer.state[next(iter(pair[0].parameters()))]["step"] == 5
    before = values(*pair)
    stop_at(3, times=2)
    with traceless(*pair, moved=False), pytest.raises(KeyboardInterrupt):
        fit(*pair, data(), seed=1, **TOLD)
    assert same(values(*pair), before)  # the snapshot of step 0


def test_early_stopping_leaves_the_best_model_with_its_statistics():
    """The same pass over the validation data gives the lowest loss again, to the last bit."""
    model, guide = build(encoder=Normed())
    told = {**TOLD, "num_epochs": 40, "learning_rate": 0.05, "seed": 1}
    result = fit(model, guide, data(), validation=data(6) + 1.0, patience=2, **told)
    best = result.validation_losses[result.best_epoch]
    assert result.best_epoch < len(result.losses) - 1 and best == min(result.validation_losses)
    for norm in (part for part in guide.modules() if isinstance(part, nn.BatchNorm1d)):
        norm.momentum = 0.0  # so that an epoch of no steps moves nothing
    still = {**told, "num_epochs": 1, "optimizer": torch.optim.SGD, "learning_rate": 1e-300}
    again = fit(model, guide, data(), validation=data(6) + 1.0, **still)
    assert again.validation_losses == [best]


def test_a_validation_loss_that_is_not_finite_is_said(monkeypatch):
    pair, losses = build(), iter([1.0, 1.0, math.nan])
    far = data(4)
    far[1, 2] = 1e200
    with traceless(*pair, moved=False), pytest.raises(ValueError, match="validation: .* finite"):
        fit(*pair, data(), validation=far, **TOLD)
    monkeypatch.setattr("ppvae.training.task.Task.held_out_loss", lambda *_, **__: next(losses))
    with pytest.raises(Diverged, match="the validation loss is nan after epoch 1"):
        fit(*pair, data(), validation=data(4), **TOLD)


def test_a_callback_sees_each_epoch_and_may_stop():
    rows = []

    def callback(row):
        rows.append(row)
        return row["epoch"] == 1

    result = fit(*build(), data(), validation=data(4), callback=callback, seed=1, **TOLD)
    assert [row["epoch"] for row in rows] == [0, 1] and len(result.losses) == 2
    assert [row["loss"] for row in rows] == result.losses
    assert [row["validation_loss"] for row in rows] == result.validation_losses
    assert rows[-1]["num_steps"] == 6 and rows[-1]["learning_rate"] == 0.01
    assert rows[-1]["seconds"] > 0 and "stopped by the callback" in result.verdict
    pairs, losses = made(build, 2), []
    fit_replicates(pairs, data(), callback=lambda row: losses.append(row["loss"]), **TOLD)
    assert [len(each) for each in losses] == [2] * 4
    with pytest.raises(TypeError, match="callback: expected one that returns None, or True"):
        fit(*build(), data(), callback=lambda row: 3, **TOLD)
    told = {"seed": 0, "progress": False, "callback": lambda row: row["num_steps"] == 2}
    stopped = fit(logistic, FamilyGuide(logistic, families.full_rank), labelled(), **told)
    assert len(stopped.losses) == 2 and "stopped by the callback" in stopped.verdict


def test_gradients_are_clipped_for_each_replicate():
    """The step of plain descent is the rate times the gradient, whose norm is the bound."""
    pairs, before = made(linear, 2), []
    before = [values(*pair) for pair in pairs]
    told = {"num_epochs": 1, "learning_rate": 1.0, "optimizer": torch.optim.SGD, "clip": 1e-3}
    fit_replicates(pairs, data() * 10, progress=False, seeds=[1, 2], **told)
    for pair, start in zip(pairs, before, strict=True):
        moves = [now - was for now, was in zip(values(*pair), start, strict=True)]
        norm = math.sqrt(sum(move.square().sum() for move in moves))
        assert norm == pytest.approx(1e-3, rel=1e-4)  # 1e-6 over the norm of the gradient is added
    free, bound = made(linear, 2), {"clip": 1e9}
    same_seed = {"num_epochs": 2, "seed": 1, "progress": False}
    one = fit(*free[0], data(), **same_seed)
    assert one.losses == fit(*made(linear)[0], data(), **same_seed, **bound).losses


def test_a_scheduler_moves_the_rate_and_pyro_optimizers_are_translated():
    rates = []
    told = {**TOLD, "scheduler": cosine, "callback": lambda row: rates.append(row["learning_rate"])}
    fit(*build(), data(), **told)
    wanted = [0.01 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx(wanted)
    with pytest.raises(ValueError, match="scheduler: expected `num_epochs` beside it"):
        fit(*build(), data(), scheduler=cosine, progress=False)
    with pytest.raises(TypeError, match="scheduler: expected a function that returns a scheduler"):
        fit(*build(), data(), **{**TOLD, "scheduler": lambda _: 3})
    own = pyro.optim.Adam({"lr": 0.02})
    result = fit(*made(build)[0], data(), optimizer=own, seed=1, **TOLD)
    assert result.optimizer.param_groups[0]["lr"] == 0.02
    by_torch = fit(*made(build)[0], data(), seed=1, **{**TOLD, "learning_rate": 0.02})
    assert result.losses == pytest.approx(by_torch.losses, rel=1e-9)
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.1}
    for bad, message in [
        (pyro.optim.ExponentialLR(settings), "use `scheduler=`"),
        (pyro.optim.Adam(lambda name: {"lr": 0.1}), "`named_parameters`"),
        (pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}), "use `clip=`"),
    ]:
        with pytest.raises(TypeError, match=f"optimizer: expected .*{message}"):
            fit(*build(), data(), optimizer=bad, **TOLD)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(data())


def test_an_iterable_dataset_is_told_its_size():
    by_size = fit(*made(build)[0], Endless(), size=10, seed=1, **TOLD)
    loader = DataLoader(TensorDataset(data()), batch_size=4)
    in_order = fit(*made(build)[0], loader, seed=1, **{**TOLD, "batch_size": None})
    assert by_size.num_steps == 12 and by_size.losses == in_order.losses
    with pytest.raises(ValueError, match="size: expected the number of data beside"):
        fit(*build(), Endless(), **TOLD)
    with pytest.raises(ValueError, match="size: expected none beside data"):
        fit(*build(), data(), size=10, **TOLD)


def test_a_pair_is_saved_in_one_file_and_loaded_only_into_its_like(tmp_path):
    path = tmp_path / "pair.pt"
    one, other = made(partial(build, encoder=Normed()), 2)
    fit(*one, data(), **TOLD)
    save_pair(path, *one)
    load_pair(path, *other)
    assert same(values(*one), values(*other))
    for wrong in (build("mean_only"), scaled(1.0)(), build(likelihood=likelihoods.Poisson())):
        with traceless(*wrong, moved=False), pytest.raises(ValueError, match="path: expected one"):
            load_pair(path, *wrong)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        save_pair(path, logistic, one[1])
    with pytest.raises(FileNotFoundError):
        load_pair(tmp_path / "none.pt", *one)


# Forks a training again and again, and ends it at random moments; what is left goes on. Prints, for
# each end, the signal and the steps that were saved, and at last whether the weights are right.
KILLER = """
import os, random, signal, sys, time
import torch
from pairs import data, linear, same, values
from ppvae import fit

path, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
moments = random.Random(0)

def train(seed, **more):
    torch.manual_seed(seed)
    pair = linear()
    told = {"num_epochs": 30, "batch_size": 4, "seed": 5, "progress": False}
    fit(*pair, data(), **told, **more)
    return values(*pair)

train(0)
start = time.perf_counter()
whole = train(0)
seconds = time.perf_counter() - start

def fork():
    child = os.fork()
    if not child:
        start = 1 if os.path.exists(path) else 0  # other weights, which the file replaces
        torch.save(train(start, checkpoint=path), path + ".end")
        os._exit(0)
    return child

ended = 0
while kills:
    child, kind = fork(), moments.choice([signal.SIGKILL, signal.SIGTERM])
    time.sleep(moments.uniform(0.0, seconds))
    os.kill(child, kind)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:  # it was faster: the next one starts anew
        ended += 1
        assert same(torch.load(path + ".end"), whole), "other weights"
        os.unlink(path)
        continue
    assert status == -kind, status
    kills -= 1
    step = torch.load(path, weights_only=True)["state"]["step"] if os.path.exists(path) else 0
    print(kind.name, step, flush=True)
assert os.waitstatus_to_exitcode(os.waitpid(fork(), 0)[1]) == 0
assert same(torch.load(path + ".end"), whole), "other weights"
halves = [name for name in os.listdir(os.path.dirname(path)) if name.startswith(".")]
assert not halves, halves
print("right", ended + 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_killed_at_any_moment_it_goes_on(tmp_path):
    """By SIGKILL, or by SIGTERM, which waits for the file; it ends as one that was let be."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    kills = 100 if LONG else 5
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "run.pt"), str(kills)]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    *lines, end = told.stdout.splitlines()
    assert len(lines) == kills and end.startswith("right")
    steps = [int(line.split()[1]) for line in lines]
    assert len({*steps}) > kills // 4  # they were ended at different moments
    # SIGTERM in the middle of an epoch, which all of a few may miss
    assert kills < 100 or any(step % 3 for step in steps)
