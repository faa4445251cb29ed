"""How an epoch grows: with processes, rows of a memory map, latents and sites.

Each case runs in new processes, which start this file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ppvae import FamilyGuide, families, fit
from ppvae.nn import mlp

#: what grows -> the values, and what all of its cases have
CASES: dict[str, tuple[list[int], dict[str, int]]] = {
    # in the first steps several processes look whether they may share them
    "processes": (
        [1, 2],
        {"rows": 8192, "width": 784, "hidden": 400, "latents": 20, "epochs": 15},
    ),
    "rows": ([10**4, 10**5, 10**6, 10**7], {"width": 16, "hidden": 32, "latents": 4}),
    "latents": ([2, 8, 32, 128, 512], {"rows": 8192, "width": 64, "hidden": 256}),
    "sites": ([1, 5, 20, 50], {"rows": 8192, "width": 64, "hidden": 256, "latents": 2}),
}
BATCHES = {"processes": 1024, "rows": 1024, "latents": 128, "sites": 128}
BLOCK = 10**5  # rows that are written at a time


def scaling(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of an epoch and memory for every case; prints a line for each."""
    found: dict[str, dict[str, Any]] = {}
    print(f"\n{'scaling':28s}{'s per epoch':>14s}{'ms per step':>14s}{'MB of its own':>16s}  runs")
    for kind, (values, common) in CASES.items():
        found[kind] = {}
        for value in values[: 2 if args.quick else None]:
            told = {"processes": 1, "sites": 1, "batch": BATCHES[kind], "epochs": 3}
            told |= {**common, kind: value}
            told |= {"compile": not args.no_compile, "threads": args.threads}
            if kind == "processes":
                told["threads"] = 1
            result = found[kind][str(value)] = run(told)
            numbers = "{seconds:14.3f}{step:14.3f}{memory:16.0f}  {execution}".format(**result)
            print(f"{kind + ' ' + format(value, ','):28s}{numbers}", flush=True)
    return found


def run(told: dict[str, Any]) -> dict[str, Any]:
    """What one case costs, in processes of its own, on data in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.npy")
        shape = told["rows"], told["width"]
        x = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        random = np.random.default_rng(0)
        for start in range(0, len(x), BLOCK):
            block = x[start : start + BLOCK]
            block[:] = random.random(block.shape) < random.random((len(block), 1))
        x.flush()
        command = [sys.executable]
        if told["processes"] > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(told["processes"])]
        command += [__file__, json.dumps(told | {"data": str(path)})]
        environment = os.environ | {"OMP_NUM_THREADS": str(told["threads"])}
        out = subprocess.run(command, env=environment, capture_output=True, check=False)
    if out.returncode:
        raise RuntimeError(out.stderr.decode())
    return json.loads(out.stdout.splitlines()[-1])


def pair(told: dict[str, Any]) -> tuple[Any, FamilyGuide]:
    """An autoencoder with some sites, of so many latents each."""
    torch.manual_seed(0)
    sites, latents, width, hidden = (told[n] for n in ("sites", "latents", "width", "hidden"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = mlp(sites * latents, hidden, out=width)

        def forward(self, x: torch.Tensor) -> None:
            prior = dist.Normal(x.new_zeros(latents), 1.0).to_event(1)
            with pyro.plate("data", len(x)):
                z = torch.cat([pyro.sample(f"z{site}", prior) for site in range(sites)], -1)
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    model = Model()
    return model, FamilyGuide(model, families.mean_scale, encoder=mlp(width, hidden))


def child(told: dict[str, Any]) -> dict[str, Any]:
    """The median epoch after the first, and the most memory that no file is behind."""
    torch.set_num_threads(told["threads"])
    x = np.load(told["data"], mmap_mode="r")
    seconds: list[float] = []
    most, done = [memory()], threading.Event()
    watch = threading.Thread(target=watched, args=(most, done))
    before = most[0]
    watch.start()
    try:
        result = fit(
            *pair(told),
            x,
            num_epochs=told["epochs"],
            batch_size=told["batch"],
            seed=0,
            compile=told["compile"],
            callback=lambda row: seconds.append(row["seconds"]),
            progress=False,
        )
    finally:
        done.set()
    epoch = float(np.median(np.diff(seconds)))
    steps = result.num_steps / told["epochs"]
    values = {"seconds": epoch, "step": 1e3 * epoch / steps, "memory": most[0] - before}
    return values | {"execution": result.execution}


def memory(kind: str = "RssAnon") -> float:
    """Memory of this process in MB, as Linux tells it; NaN elsewhere.

    Args:
        kind: "RssAnon", what is no copy of a file, or "VmHWM", the most that it ever had.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(n.split()[1]) / 1e3 for n in lines if n.startswith(kind)), float("nan"))


def watched(most: list[float], done: threading.Event) -> None:
    while not done.is_set():
        most[0] = max(most[0], memory())
        sleep(0.02)


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """A panel for each thing that grows: seconds of an epoch, and memory beside rows."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), squeeze=False, figsize=(12, 3), layout="constrained")
    for axis, (kind, cases) in zip(axes[0], found.items(), strict=True):
        values = [int(value) for value in cases]
        seconds = [case["seconds"] for case in cases.values()]
        axis.plot(values, seconds, "o-", color="C0")
        axis.plot(values, growth(kind, values, seconds), ":", color="0.5")
        axis.set(xlabel=kind, ylabel="seconds per epoch")
        if kind == "processes":
            axis.set_ylim(0)
        else:
            axis.set(xscale="log", yscale="log")
        if kind == "rows":
            held = axis.twinx()
            held.plot(values, [case["memory"] for case in cases.values()], "s--", color="C1")
            held.set_ylabel("memory, MB (dashed)")
            held.set_ylim(0)
        slant = 30 if kind == "rows" else 0
        axis.set_xticks(values, [format(value, ",") for value in values], rotation=slant)
        axis.minorticks_off()
    figure.suptitle("One epoch, as one thing grows; dotted: in proportion, or its inverse")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def growth(kind: str, values: list[int], seconds: list[float]) -> list[float]:
    """What would be in proportion to rows, latents and sites, and inverse to processes."""
    power = -1 if kind == "processes" else 1
    return [seconds[0] * (value / values[0]) ** power for value in values]


if __name__ == "__main__":
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    outcome = child(json.loads(sys.argv[1]))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(outcome))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
