"""The benchmark, with tiny sizes: the same work for all, and numbers that fit together.

What it compiles is left out: `test_contract` holds that against the program.
"""

import argparse
import contextlib
import copy
import io
import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from benchmarks import costs, loops, networks, rows, scaling
from cases import LONG

from ppvae.objectives.elbo import negative_elbo
from ppvae.staging.gradients import Gradients

SMALL = ["--sizes", "12-8-2", "--no-compile", "--repetitions", 3, "--steps", 2, "--threads", 1]
ROWS = [
    "hand-written, eager",
    "SVI.step, Trace_ELBO",
    "SVI.step, TraceMeanField",
    "ppvae, eager",
    "ppvae, staged",
]


@pytest.fixture
def benchmark(single, plain_pyro, load, monkeypatch):
    """The program as a module, in single precision, as it runs, and with fewer data."""
    for module in (networks, rows):
        monkeypatch.setattr(module, "DATA", 512)
    return load("benchmark.py")


@pytest.fixture
def run(benchmark, tmp_path, capsys):
    def call(*options):
        path = tmp_path / "all.json"
        benchmark.main([*map(str, [*SMALL, *options]), "--json", str(path)])
        return capsys.readouterr().out, json.loads(path.read_text())

    return call


@pytest.mark.parametrize("size", ["12-8-2", "12-8-6-2", "conv-3"])
def test_hand_written_is_the_same_loss(benchmark, size):
    pair, x = networks.networks(size, "cpu"), networks.images(size, "cpu")[:16]
    assert set(x.unique().tolist()) == {0.0, 1.0}
    losses = []
    for loss in (networks.HandWritten(*pair), lambda batch: negative_elbo(*pair, batch)):
        torch.manual_seed(1)
        losses.append(loss(x).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # rounding, in sums of 784 numbers


def test_all_rows_train_alike(benchmark, monkeypatch):
    """After the same steps, measured in turn, all have come as far as the hand-written loop."""
    args = argparse.Namespace(device="cpu", no_compile=True, steps=20, repetitions=3)
    x, pairs, make = networks.images("12-8-2", "cpu"), [], networks.networks
    for module in (loops, rows):
        monkeypatch.setattr(module, "RATE", 1e-2)
    monkeypatch.setattr(rows, "networks", lambda *how: pairs.append(make(*how)) or pairs[-1])
    monkeypatch.setattr(copy, "deepcopy", lambda parts: parts)  # so that pairs train
    makers = rows.makers("12-8-2", x, args)
    assert list(makers)[:5] == ROWS
    runs = {row: makers[row]() for row in ROWS}
    rows.measure(runs, args)
    with torch.no_grad():
        start = negative_elbo(*make("12-8-2", "cpu"), x).item()
        losses = [negative_elbo(*pair, x).item() for pair in pairs]
    # they gain 0.66 nats in 100 steps; their draws differ, by a hundredth of a nat in the end
    gain = start - max(losses)
    assert len(losses) == 5 and gain > 0.5 and np.ptp(losses) < 0.1 * gain


def test_tables_and_ratios(run, interpreted, monkeypatch):
    monkeypatch.setattr(Gradients, "_compiled", lambda gradients, graph, *_: graph)
    out, record = run("--tables", "steps", "growth", "fits", "--grow", 4, "--epochs", 1)
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["threads"] == 1
    assert record["versions"]["pyro"] == pyro.__version__ and record["steps"] == 2
    found = record["sizes"]["12-8-2"]
    names = list(found["steps"]["times"])
    assert names[:5] == ROWS and not any("compiled" in name for name in names)
    heads = ["of hand-written, eager", "of SVI.step, Trace_ELBO", "ms per step"]
    assert list(found["steps"]["quartiles"]) == heads  # ratios first; none to what is left out
    names = ["batch 4", "ppvae, staged", "latents 4", "K = 4"]
    assert list(found["growth"]["times"]) == names
    assert list(found["fits"]["times"]) == ["highest", "high", "medium"]
    lines = out.splitlines()
    for table in ("steps", "growth", "fits"):
        times = found[table]["times"]
        for head, values in found[table]["quartiles"].items():
            for row, numbers in values.items():
                base = times[head.removeprefix("of ")] if head.startswith("of ") else np.ones(3)
                ratios = np.array(times[row]) / base
                assert len(ratios) == 3 and (ratios > 0).all()
                assert numbers == pytest.approx(np.quantile(ratios, [0.5, 0.25, 0.75]).tolist())
                digits = 2 if head.startswith("of ") else 3
                assert any(
                    ln.startswith(row) and f" {numbers[0]:.{digits}f} (" in ln for ln in lines
                )
    fits = found["fits"]["fits"]
    assert list(fits) == ["eager, highest", "eager, high", "eager, medium", "eager"]
    assert all(fit["ms per step"] > 0 for fit in fits.values())
    assert fits["eager, highest"]["elbo"] == fits["eager"]["elbo"] < 0


def test_processes_and_when_staging_has_paid(run, benchmark, monkeypatch):
    commands = []

    def in_this_process(command, *, check, env=None, stdout=None, stderr=None):
        if "importtime" in command:  # as Python prints it: its own time, all, and the module
            seconds = {"import pyro": 2, "import ppvae": 3}[command[-1]]
            return SimpleNamespace(stderr=f"a: 1 | 5 | x\nb: 7 | {seconds}000000 | y".encode())
        commands.append(command)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            benchmark.main([*command[2:], "--no-compile"])
        return SimpleNamespace(stdout=said.getvalue().encode())

    monkeypatch.setattr(subprocess, "run", in_this_process)
    out, record = run("--tables", "steps", "processes")
    found = record["sizes"]["12-8-2"]
    assert list(found["processes"]) == ["hand-written, eager", "ppvae, eager", "ppvae, staged"]
    assert all(command[1] == costs.PROGRAM for command in commands)
    for values in found["processes"].values():
        assert values["peak"] >= values["before"] > 50  # MB: PyTorch is loaded
        assert values["ready"] > 0 and values["first step"] > 0
    times, staged = found["steps"]["times"], found["processes"]["ppvae, staged"]
    saved = np.median(np.subtract(times["ppvae, eager"], times["ppvae, staged"]))
    spent = 1e3 * (staged["ready"] + staged["first step"]) - np.median(times["ppvae, staged"])
    wanted = spent / saved if saved > 0 else np.inf
    assert found["paid"] == {"ppvae, staged": pytest.approx(wanted)}
    assert "has paid after" in out and "ppvae                3.00 s (3.00-3.00)" in out
    assert record["imports"] == {"pyro": [2.0] * 5, "ppvae": [3.0] * 5}


def test_scaling(run, benchmark, monkeypatch, tmp_path):
    """One case of a kind, in a process of its own; the memory is that of no file.

    Two processes, which are four that start, are for the long run.
    """
    small = {"width": 4, "hidden": 4, "latents": 2, "batch": 8, "sites": 2, "rows": 100}
    told = {"rows": ([300], small)} | ({"processes": ([2], small)} if LONG else {})
    monkeypatch.setattr(scaling, "CASES", told)
    out, record = run("--tables", "scaling", "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
    for kind, ((value,), _) in told.items():
        case = record["scaling"][kind][str(value)]
        assert case["execution"] == "eager" and 0 <= case["memory"] < 200
        assert case["seconds"] > 0 and f"{kind} {value} " in out
