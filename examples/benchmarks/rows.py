"""The rows of the table of steps, and how they are measured in turn."""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from benchmarks.loops import Run, ours, own_loop, replicates, timed
from benchmarks.networks import BATCH, DATA, RATE, HandWritten, networks
from benchmarks.rivals import numpyro_row, pythae_row
from ppvae import VAE, FamilyGuide, NotStageable, stage

QUARTILES = [0.5, 0.25, 0.75]
HAND, HAND_COMPILED, PYRO = "hand-written, eager", "hand-written, compiled", "SVI.step, Trace_ELBO"
EAGER, STAGED, COMPILED = "ppvae, eager", "ppvae, staged", "ppvae, compiled"
LOOPED = "ppvae, looped"  # many steps in a call


def makers(size: str, x: Tensor, args: argparse.Namespace) -> dict[str, Callable[[], Run]]:
    """What makes the rows of the table. To add a row, add a line."""

    def pair() -> tuple[VAE, FamilyGuide]:
        return networks(size, args.device)

    def hand(**options: str) -> Run:
        return own_loop(HandWritten(*pair()), x, **options)

    def svi(loss: Any) -> Run:
        return timed(SVI(*pair(), pyro.optim.Adam({"lr": RATE}), loss).step, x)

    found: dict[str, Callable[[], Run]] = {
        HAND: hand,
        HAND_COMPILED: lambda: hand(mode="default"),
        "hand-written, CUDA graphs": lambda: hand(mode="reduce-overhead"),
        PYRO: lambda: svi(Trace_ELBO()),
        "SVI.step, TraceMeanField": lambda: svi(TraceMeanField_ELBO()),
        EAGER: lambda: ours(pair(), x, "eager"),
        STAGED: lambda: ours(pair(), x, "staged"),
        COMPILED: lambda: ours(pair(), x, "compiled"),
        LOOPED: lambda: ours(pair(), x, "looped"),
        "stage, compiled, own loop": lambda: own_loop(stage(*pair(), x[:BATCH]), x, mode="default"),
        "ppvae, 4 replicates": lambda: replicates(4, pair(), x),
        "NumPyro, jitted update": lambda: numpyro_row(size, x, scanned=False),
        "NumPyro, scanned steps": lambda: numpyro_row(size, x, scanned=True),
        "pythae, eager": lambda: pythae_row(size, x),
    }
    out = ["CUDA"] * (not x.is_cuda) + ["compiled", "looped", "replicates"] * args.no_compile
    out += ["looped"] * x.is_cuda
    out += ["NumPyro"] * size.startswith("conv")  # it has no layers of its own
    return {name: make for name, make in found.items() if not any(word in name for word in out)}


def made(chosen: dict[str, Callable[[], Run]]) -> dict[str, Run]:
    """The rows that there can be here; says which are left out."""
    runs = {}
    for name, make in chosen.items():
        try:
            run = make()
        except (ImportError, NotStageable) as error:
            print(f"{name}: left out ({error})")
            continue
        runs[name] = run
    return runs


def measure(runs: dict[str, Run], args: argparse.Namespace, width: int = BATCH) -> dict[str, list]:
    """Milliseconds per step of every row in every repetition, in turn."""
    random, names = torch.Generator().manual_seed(0), list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-2, args.repetitions):  # the first two warm up
        order = torch.randint(DATA, (args.steps, width), generator=random).to(args.device)
        first = repetition % len(names)  # every row comes first, and after another row, in turn
        for name in names[first:] + names[:first]:
            seconds = runs[name](order)
            times[name] += [1e3 * seconds / args.steps] * (repetition >= 0)
    return times


def table(title: str, times: dict[str, list], ratios: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Prints one line per row; `ratios` has for each heading the row that each row is held to."""
    ratios = {head: to for head, to in ratios.items() if set(to.values()) <= set(times)}
    print(f"\n{title:28s}" + "".join(f"{head:>28s}" for head in [*ratios, "ms per step"]))
    found: dict[str, Any] = {head: {} for head in [*ratios, "ms per step"]}
    for row, values in times.items():
        line = f"{row:28s}"
        for head in found:
            base = times[ratios[head][row]] if head in ratios else 1.0
            found[head][row] = np.quantile(np.divide(values, base), QUARTILES).tolist()
            digits = 2 if head in ratios else 3
            text = "{:.{d}f} ({:.{d}f}-{:.{d}f})".format(*found[head][row], d=digits)
            line += f"{text:>28s}"
        print(line, flush=True)
    return {"times": times, "quartiles": found}
