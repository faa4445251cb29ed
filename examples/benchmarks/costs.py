"""What it costs to begin: imports, staging, compilers, memory, each in a new process."""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.loops import now
from benchmarks.networks import BATCH
from benchmarks.rows import COMPILED, EAGER, HAND, LOOPED, QUARTILES, STAGED, makers
from benchmarks.scaling import memory

PROGRAM = str(Path(__file__).parents[1] / "benchmark.py")


def peak() -> float:
    """The most memory so far in MB, of the GPU or else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    most = memory("VmHWM")  # `ru_maxrss` would be that of the parent, where that is larger
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 if np.isnan(most) else most


def child(size: str, x: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """What a row costs in this process, which has made the networks and taken an eager step."""
    make, order = makers(size, x, args), torch.arange(BATCH).repeat(args.steps, 1).to(args.device)
    make[EAGER if args.child.startswith("ppvae") else HAND]()(order[:1])
    values, marks = {"before": peak()}, [now()]
    for _ in range(2):
        run = make[args.child]()
        marks.append(now())
    values |= dict(zip(("ready", "again"), np.diff(marks).tolist(), strict=True))
    values["first step"] = run(order[:1])
    run(order)
    return values | {"peak": peak()}


def processes(size: str, x: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Memory and latency in new processes; the last finds what the one before has compiled."""
    found: dict[str, Any] = {}
    columns = ("peak", "before", "ready", "again", "first step")
    heads = "".join(f"{head:>13s}" for head in ("peak MB", "before MB", *columns[2:]))
    print(f"\n{size + ', seconds':28s}{heads}")
    with tempfile.TemporaryDirectory() as cache:
        places = ("TORCHINDUCTOR_CACHE_DIR", "TMPDIR", "PPVAE_CACHE")
        environment = os.environ | dict.fromkeys(places, cache)
        compiled = [] if args.no_compile else [COMPILED, COMPILED, LOOPED, LOOPED]
        for row in [HAND, EAGER, STAGED, *compiled]:
            command = [sys.executable, PROGRAM, "--child", row, "--sizes", size]
            for name in ("steps", "threads", "device"):
                command += [f"--{name}", str(getattr(args, name))]
            out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            name = f"{row}, cached" if row in found else row
            found[name] = values = json.loads(out.stdout.splitlines()[-1])
            numbers = [f"{values[c]:13.{0 if c in columns[:2] else 2}f}" for c in columns]
            print(f"{name:28s}" + "".join(numbers), flush=True)
    return found


def imports() -> dict[str, list[float]]:
    """Seconds in which Pyro, and this library with it, are imported: new processes, in turn."""
    found: dict[str, list[float]] = {"pyro": [], "ppvae": []}
    for name in [*found] * 5:
        command = [sys.executable, "-X", "importtime", "-c", f"import {name}"]
        lines = subprocess.run(command, stderr=subprocess.PIPE, check=True).stderr.splitlines()
        found[name].append(int(lines[-1].split(b"|")[1]) / 1e6)
    for name, seconds in found.items():
        print(
            "import {:21s}{:.2f} s ({:.2f}-{:.2f})".format(name, *np.quantile(seconds, QUARTILES))
        )
    return found


def paid(times: dict[str, list], found: dict[str, Any]) -> dict[str, float]:
    """Steps after which staging and compiling have paid for themselves, held to eager steps."""
    after = {}
    for name, values in found.items():
        row = name.removesuffix(", cached")
        if row in (STAGED, COMPILED, LOOPED):
            saved = float(np.median(np.subtract(times[EAGER], times[row])))
            spent = 1e3 * (values["ready"] + values["first step"]) - float(np.median(times[row]))
            after[name] = spent / saved if saved > 0 else float("inf")
            print(f"{name:28s} saves {saved:.3f} ms a step: has paid after {after[name]:,.0f}")
    return after
