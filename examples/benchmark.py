"""What a step costs, with --quick (four minutes; writes nothing).

Pyro, hand-written PyTorch, and ppvae train side by side.

All have the same networks, initial weights, data, minibatches and Adam; all take a minibatch by
index and read the loss of every step, though those with a loop in them read all at its end.
Repetitions are interleaved: in each, every row takes some steps in turn, and ratios are taken
within a repetition, so that a busy machine hits all rows.
    python examples/benchmark.py              (--quick for a look; --json FILE for machines)
    python examples/benchmark.py --sizes 784-400-20 --tables steps --repetitions 60
"""

import argparse
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from benchmarks.costs import child, imports, paid, processes
from benchmarks.loops import Run, ours, replicates
from benchmarks.networks import BATCH, images, networks
from benchmarks.rows import (
    COMPILED,
    HAND,
    HAND_COMPILED,
    LOOPED,
    PYRO,
    STAGED,
    made,
    makers,
    measure,
    table,
)
from benchmarks.scaling import draw, scaling
from torch import Tensor

from ppvae import evaluate, fit

PRECISIONS = ("highest", "high", "medium")
LEGEND = """Medians over {repetitions} repetitions of {steps} steps, in brackets the quartiles.
A ratio below 1: faster. SVI.step has Pyro's own checks on, as they are by default."""


def steps(size: str, x: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    times = measure(made(makers(size, x, args)), args)
    ratios = {f"of {name}": dict.fromkeys(times, name) for name in (HAND, HAND_COMPILED, PYRO)}
    return table(f"{size}, batch {BATCH}", times, ratios)


def growth(size: str, x: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Ours with the batch (one graph for all), the latents, and K replicates."""
    rest, row, runs = size.rpartition("-")[0], args.best, {}
    base = makers(size, x, args)[row]()
    base(torch.arange(BATCH, device=args.device)[None])  # it is compiled for this size at first
    chosen: dict[str, Callable[[], Run]] = {row: lambda: base}
    for count in args.grow or (32, 64, 128, 256, 512, 1024):
        runs[f"batch {count}"] = lambda order, count=count: base(order[:, :count])
    for count in args.grow or (2, 4, 8, 16, 32, 64):
        chosen[f"latents {count}"] = makers(f"{rest}-{count}", x, args)[row]
    for count in args.grow or (1, 2, 4, 8, 16):
        chosen[f"K = {count}"] = lambda k=count: replicates(k, networks(size, args.device), x)
    for name, run in made(chosen).items():
        runs[name] = lambda order, run=run: run(order[:, :BATCH])
    times = measure(runs, args, max(BATCH, *(args.grow or [1024])))
    return table(f"{size}, growth", times, {f"of {row}": dict.fromkeys(times, row)})


def fits(size: str, x: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The precision of products of matrices, and what a step of a whole `fit` takes, all in."""
    how = args.best.split(", ")[1]
    runs = {p: ours(networks(size, args.device), x, how, p) for p in PRECISIONS}
    ratios = {"of highest": dict.fromkeys(PRECISIONS, "highest")}
    found = table(f"{size}, precision", measure(runs, args), ratios) | {"fits": {}}
    options = {"batch_size": BATCH, "num_epochs": args.epochs, "seed": 0, "progress": False}
    for name in (*PRECISIONS, None):
        pair, compiled = networks(size, args.device), bool(name) and not args.no_compile
        result = fit(*pair, x, compile=compiled, precision=name, **options)
        step = 1e3 * result.seconds / result.num_steps
        elbo = float(evaluate(*pair, x[:1024], num_samples=16, seed=0).objective.mean())
        label = f"{result.execution}, {name}" if name else result.execution
        found["fits"][label] = {"ms per step": step, "elbo": elbo}
        print(f"fit, {label:23s} {step:.3f} ms per step, ELBO {elbo:.4f} nats", flush=True)
    return found


TABLES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (steps, growth, processes, fits)}
ONCE = ("scaling",)  # tables that are not of one of the sizes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["64-256-8", "784-400-20", "conv-20"])
    add("--tables", nargs="+", default=[*TABLES, *ONCE], choices=[*TABLES, *ONCE])
    add("--repetitions", type=int, default=30)
    add("--steps", type=int, default=20, help="of every row in every repetition")
    add("--epochs", type=int, default=20, help="length of the fits")
    add("--grow", nargs="+", type=int, help="batches, latents and K for the table of growth")
    add("--threads", type=int, default=2)
    add("--device", default="cpu")
    add("--no-compile", action="store_true", help="leave out what needs a compiler")
    add("--quick", action="store_true", help="the first size only, few repetitions")
    add("--json", type=Path, help="file for all numbers")
    add("--plot", type=Path, help="file for a picture of the scaling")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.repetitions, args.steps, args.epochs = args.sizes[:1], 5, 10, 5
    if min(args.repetitions, args.steps, args.epochs, args.threads) < 1:
        parser.error("--repetitions, --steps, --epochs, --threads: expected at least 1")
    if not all(re.fullmatch(r"(conv|\d+(-\d+)+)-\d+", size) for size in args.sizes):
        parser.error("--sizes: expected INPUTS-HIDDEN-LATENT or conv-LATENT")
    compiled = COMPILED if args.device.startswith("cuda") else LOOPED
    args.best = STAGED if args.no_compile else compiled
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    with pyro.get_param_store().scope():
        if args.child:
            print(json.dumps(child(args.sizes[0], images(args.sizes[0], args.device), args)))
            return
        cuda = args.device.startswith("cuda")
        name = torch.cuda.get_device_name(args.device) if cuda else platform.machine()
        versions = {"torch": torch.__version__, "pyro": pyro.__version__, "cpus": os.cpu_count()}
        versions |= {"python": platform.python_version(), "device": name, "threads": args.threads}
        print(", ".join(f"{key} {value}" for key, value in versions.items()))
        print(LEGEND.format(**vars(args)))
        record: dict[str, Any] = {"versions": versions, "steps": args.steps, "sizes": {}}
        if "processes" in args.tables:
            record["imports"] = imports()
        for size in args.sizes:
            x, found = images(size, args.device), record["sizes"].setdefault(size, {})
            for key in filter(TABLES.get, args.tables):
                torch._dynamo.reset()  # it compiles a function eight times at most
                found[key] = TABLES[key](size, x, args)
            if {"steps", "processes"} <= set(found):
                found["paid"] = paid(found["steps"]["times"], found["processes"])
    if "scaling" in args.tables:
        record["scaling"] = scaling(args)
        if args.plot:
            draw(record["scaling"], args.plot)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
