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
import copy
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ppvae import VAE, FamilyGuide, NotStageable, evaluate, families, fit, likelihoods, stage
from ppvae._scopes import matmul_precision, private_modules
from ppvae.data.batches import batches_of
from ppvae.nn import conv_decoder, conv_encoder, mlp
from ppvae.training.options import Options
from ppvae.training.single import single
from ppvae.training.stacked import stacked
from ppvae.training.steps import Steps
from ppvae.training.task import task_of

DATA, BATCH, RATE, PRECISIONS = 4096, 128, 1e-3, ("highest", "high", "medium")
QUARTILES = [0.5, 0.25, 0.75]
HAND, HAND_COMPILED, PYRO = "hand-written, eager", "hand-written, compiled", "SVI.step, Trace_ELBO"
EAGER, STAGED, COMPILED = "ppvae, eager", "ppvae, staged", "ppvae, compiled"
LOOPED = "ppvae, looped"  # many steps in a call
LEGEND = """Medians over {repetitions} repetitions of {steps} steps, in brackets the quartiles.
A ratio below 1: faster. SVI.step has Pyro's own checks on, as they are by default."""

Run = Callable[[Tensor], float]  # takes a step for each row of a matrix of indices; returns seconds


def networks(size: str, device: str) -> tuple[VAE, FamilyGuide]:
    """Model and guide: `inputs-hidden-latent`, or `conv-latent` for images of 28 x 28."""
    torch.manual_seed(0)
    first, *hidden, latent = size.split("-")
    if first == "conv":
        image = (1, 28, 28), 16, 32
        encoder, decoder = conv_encoder(*image), conv_decoder(int(latent), *image)
    else:
        widths = [int(width) for width in hidden]
        encoder = mlp(int(first), *widths)
        decoder = mlp(int(latent), *widths[::-1], out=int(first))
    model = VAE(decoder, int(latent), likelihoods.Bernoulli()).to(device)
    return model, FamilyGuide(model, families.mean_scale, encoder.to(device)).to(device)


def images(size: str, device: str) -> Tensor:
    """Binary data, drawn from a linear model with eight latents."""
    first, random = size.split("-")[0], torch.Generator().manual_seed(0)
    shape = (1, 28, 28) if first == "conv" else (int(first),)
    z, w = torch.randn(DATA, 8, generator=random), torch.randn(8, *shape, generator=random)
    chance = torch.sigmoid(torch.tensordot(z, w, 1) - 1)
    return (torch.rand(chance.shape, generator=random) < chance).float().to(device)


class HandWritten(nn.Module):
    """The negative ELBO per datum in plain PyTorch, with a copy of our networks."""

    def __init__(self, model: VAE, guide: FamilyGuide) -> None:
        super().__init__()
        head = guide.heads["z"]
        parts = guide.encoder, head.loc.linear, head.scale.linear, model.decoder
        self.encoder, self.loc, self.log_scale, self.decoder = copy.deepcopy(parts)

    def forward(self, x: Tensor) -> Tensor:
        """The loss of a batch."""
        features = self.encoder(x)
        loc, log_scale = self.loc(features), self.log_scale(features)
        scale = log_scale.exp()
        logits = self.decoder(loc + scale * torch.randn_like(loc))
        distortion = binary_cross_entropy_with_logits(logits, x, reduction="sum")
        rate = (0.5 * (loc.square() + scale.square() - 1) - log_scale).sum()
        return (distortion + rate) / len(x)


def now() -> float:
    """Seconds, when the GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()


def timed(step: Callable[[Tensor], Any], x: Tensor, inside: Callable[[], Any] = nullcontext) -> Run:
    """Steps one by one, in a context that training enters once and that is off the clock."""

    def run(order: Tensor) -> float:
        with inside():
            start = now()
            for rows in order:
                step(x[rows])
            return now() - start

    return run


def own_loop(module: nn.Module, x: Tensor, loss: Any = None, **options: Any) -> Run:
    """The loop that one writes oneself, around a module that returns the loss."""
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE, fused=True)
    loss = loss or (torch.compile(module, **options) if options else module)

    def step(batch: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss(batch)
        value.backward()
        optimizer.step()
        return value.item()

    return timed(step, x)


def ours(pair: Any, x: Tensor, how: str, precision: str | None = None) -> Run:
    """The step of `fit`, put together as `fit` does it."""

    @contextmanager
    def inside():
        with private_modules(), matmul_precision(precision):
            yield

    with inside():
        task = task_of(*pair, None, batches_of("data", x, BATCH, training=True))
        engine = single(task, how)
        steps = Steps(engine, Options(learning_rate=RATE))

    def run(order: Tensor) -> float:
        with inside():
            start = now()
            minibatches = iter(order) if how == "looped" else ((x[rows],) for rows in order)
            for _ in steps.through(minibatches):
                if engine.execution != how:
                    raise RuntimeError(f"asked to run {how}, it ran {engine.execution}")
            return now() - start

    return run


def replicates(count: int, pair: Any, x: Tensor) -> Run:
    """The step of `fit_replicates` for so many, each on minibatches of its own."""
    how = "compiled" if x.is_cuda else "looped"  # a loop is for the CPU
    with private_modules():
        batches = batches_of("data", x, BATCH, training=True)
        tasks = [task_of(*copy.deepcopy(pair), None, batches) for _ in range(count)]
        engine = stacked(tasks, range(count), how)
        steps = Steps(engine, Options(learning_rate=RATE))

    def run(order: Tensor) -> float:
        rows = torch.stack([order.roll(k, 0) for k in range(count)], 1)
        start = now()
        for _ in steps.through(rows):
            if engine.execution != how:
                raise RuntimeError(f"asked to run {how}, it ran {engine.execution}")
        return now() - start

    return run


def numpyro_row(size: str, x: Tensor, *, scanned: bool) -> Run:
    """NumPyro with the same networks: a jitted update, or all steps as one program."""
    import jax
    import numpyro
    from numpyro import distributions as dist

    device = jax.devices("gpu" if x.is_cuda else "cpu")[0]
    start: dict[str, list] = {}
    for part, module in HandWritten(*networks(size, "cpu")).named_children():
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        start[part] = [tuple(p.detach().numpy().T for p in layer.parameters()) for layer in linear]
    start = jax.device_put(start, device)
    data = jax.device_put(x.cpu().numpy(), device)

    def through(name: str, value: Any, *, bent: bool = False) -> Any:
        *layers, (weight, bias) = numpyro.param(name, start[name])
        for w, b in layers:
            value = jax.nn.relu(value @ w + b)
        value = value @ weight + bias
        return jax.nn.relu(value) if bent else value

    def model(batch: Any) -> None:
        with numpyro.plate("data", len(batch)):
            zeros = jax.numpy.zeros(int(size.split("-")[-1]))
            z = numpyro.sample("z", dist.Normal(zeros, 1).to_event(1))
            fn = dist.Bernoulli(logits=through("decoder", z)).to_event(1)
            numpyro.sample("x", fn, obs=batch)

    def guide(batch: Any) -> None:
        features = through("encoder", batch, bent=True)
        loc, scale = through("loc", features), jax.numpy.exp(through("log_scale", features))
        with numpyro.plate("data", len(batch)):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    loss = numpyro.infer.TraceMeanField_ELBO()
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(RATE), loss)
    state = svi.init(jax.random.PRNGKey(0), data[:BATCH])

    def update(state: Any, rows: Any) -> Any:
        return svi.update(state, data[rows])

    go = jax.jit((lambda state, order: jax.lax.scan(update, state, order)) if scanned else update)

    def run(order: Tensor) -> float:
        nonlocal state
        rows = jax.device_put(order.cpu().numpy(), device)
        parts, begin = [rows] if scanned else list(rows), perf_counter()
        for some in parts:
            state, losses = go(state, some)
            losses.block_until_ready()
        return perf_counter() - begin

    return run


def pythae_row(size: str, x: Tensor) -> Run:
    """The module of pythae with the same networks, in the loop of the hand-written one."""
    from pythae.models import VAE as Pythae
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    hand = HandWritten(*networks(size, x.device.type))

    class Encoder(BaseEncoder):
        def forward(self, x: Tensor) -> Any:
            h = hand.encoder(x)
            return ModelOutput(embedding=hand.loc(h), log_covariance=2 * hand.log_scale(h))

    class Decoder(BaseDecoder):
        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=hand.decoder(z).sigmoid())

    shape, latent = tuple(x.shape[1:]), int(size.split("-")[-1])
    config = VAEConfig(input_dim=shape, latent_dim=latent, reconstruction_loss="bce")
    other = Pythae(config, Encoder(), Decoder())
    return own_loop(hand, x, loss=lambda batch: other({"data": batch}).loss)


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


def peak() -> float:
    """The most memory so far in MB, of the GPU or else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` would be that of the parent, where that is larger
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


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
            command = [sys.executable, __file__, "--child", row, "--sizes", size]
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


TABLES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (steps, growth, processes, fits)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["64-256-8", "784-400-20", "conv-20"])
    add("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    add("--repetitions", type=int, default=30)
    add("--steps", type=int, default=20, help="of every row in every repetition")
    add("--epochs", type=int, default=20, help="length of the fits")
    add("--grow", nargs="+", type=int, help="batches, latents and K for the table of growth")
    add("--threads", type=int, default=2)
    add("--device", default="cpu")
    add("--no-compile", action="store_true", help="leave out what needs a compiler")
    add("--quick", action="store_true", help="the first size only, few repetitions")
    add("--json", type=Path, help="file for all numbers")
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
            for key in args.tables:
                torch._dynamo.reset()  # it compiles a function eight times at most
                found[key] = TABLES[key](size, x, args)
            if {"steps", "processes"} <= set(found):
                found["paid"] = paid(found["steps"]["times"], found["processes"])
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
