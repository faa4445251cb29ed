"""Trainings of several processes; `python together.py` starts such processes as it is told."""

import atexit
import os
import pickle
import signal
import subprocess
import sys
import traceback
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as group
from cases import cases
from pairs import KINDS, Normed, build, data, linear, values
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import ppvae.training.execution as running
from ppvae import FamilyGuide, compare_families, families, fit
from ppvae.nn import mlp
from ppvae.objectives import ELBO, IWAE, negative_elbo, trace_pair, warm_up
from ppvae.regression import LinearRegression
from ppvae.training import apart

TOLD: dict[str, Any] = {
    "num_epochs": 2, "batch_size": 8, "learning_rate": 0.02, "seed": 4, "progress": False,
}  # fmt: skip


def family(name, **told):
    return lambda: (*build(name), data(25), {"compile": False, **told})


def case(name):
    def make():
        model, args, encoder, _ = cases()[name]
        torch.manual_seed(1)
        pair = model, FamilyGuide(model, families.mean_scale, encoder=encoder)
        return *pair, args, {"batch_size": None, "compile": False, "optimizer": torch.optim.Adam}

    return make


class Mixed(nn.Module):
    """A global latent, and one for each datum."""

    def forward(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 0.5).to_event(1), obs=x)


def mixed():
    model = Mixed()
    guide = FamilyGuide(model, families.mean_scale, encoder=mlp(3, 4))
    return model, guide, data(25), {"compile": False}


def regression():
    x = data(25)
    model = LinearRegression(3, noise=0.5)
    return model, FamilyGuide(model, families.full_rank), (x, x.sum(1) + 1), {"compile": False}


def dropout():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.Tanh())
    return *build(encoder=encoder), data(25), {"compile": False}


class Noisy(nn.Module):
    """An encoder with something of its own, beside or behind a layer."""

    def __init__(self, noise):
        super().__init__()
        self.first, self.last, self.noise = nn.Linear(3, 4), nn.Linear(4, 4), noise
        self.codes = nn.Embedding(9, 4, sparse=True)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        if self.noise == "moves a buffer" and self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
        codes = self.codes((3 * x[:, 0]).long().clamp(0, 8)) if self.noise == "sparse" else 0.0
        x = self.first(x) + codes
        if self.noise == "columns":  # which lie in memory one after the other
            x = nn.functional.dropout(x.T.contiguous().T, 0.4) + torch.randn_like(x.T).T
        if self.noise == "permuted":
            torch.randperm(len(x))
        return self.last(x)


def encoded(make, *args, **told):
    return lambda: (*build(encoder=make(*args)), data(25), {"compile": False, **told})


def matched(since):
    """A loss that looks, from a step on, at all the data of a minibatch: a little."""

    def objective(model, guide, *args, size=None, step=0):
        loss = negative_elbo(model, guide, *args, size=size)
        z = trace_pair(model, guide, *args)[1].nodes["z"]["value"]
        return loss + (1e-4 * z.mean(0).square().sum() if since <= step < 100 else 0.0)

    return objective


def scaled():
    """A model in a handler of Pyro's, whose words would tell where in memory it is."""
    model, guide = build()
    return pyro.poutine.scale(model, 0.3), guide, data(25), {"compile": False}


def normed():
    return *build(encoder=Normed(dropout=False)), data(26), {"compile": False}


def loader():
    shuffled = DataLoader(TensorDataset(data(25)), 8, shuffle=True)
    return *build(), shuffled, {"compile": False, "batch_size": None}


def beside():
    """Rows that come by keyword are cut with the data."""

    def model(x, side):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + side, 0.5), obs=x[:, 0])

    guide = FamilyGuide(model, families.mean_scale, encoder=Sided())
    return model, guide, data(25), {"compile": False, "kwargs": {"side": torch.arange(25.0)}}


class Sided(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 5)

    def forward(self, x, side):
        return self.net(torch.cat([x, side[:, None]], -1))


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)


def searched(parameters, lr):
    """An optimizer that asks for the loss several times in a step."""
    return torch.optim.LBFGS(parameters, lr=lr, max_iter=3, line_search_fn="strong_wolfe")


HELD_OUT = {"validation": data(11) + 0.1, "batch_size": 4}

#: name -> what makes a model, its guide, data and options; 25 data by eight: the last batch is one
WAYS: dict[str, Any] = {
    **{name: family(name) for name in KINDS if name != "none"},
    "staged": family("mean_scale", compile="auto"),
    "staged student_t": family("student_t", compile="auto"),
    "IWAE": family("mean_scale", objective=IWAE(3)),
    "warm-up, clip": family("mean_scale", objective=ELBO(beta=warm_up(5)), clip=0.5),
    "free bits": family("mean_scale", objective=ELBO(free_bits=0.1)),
    "L-BFGS": family("mean_scale", optimizer=searched, batch_size=None),
    "all at once": family("mean_scale", batch_size=None),
    "one or two rows": family("mean_scale", batch_size=3),
    "validation": family(
        "mean_scale", **HELD_OUT, patience=1, num_epochs=9, learning_rate=0.3, scheduler=plateau
    ),
    "until flat": family("mean_scale", num_epochs=None, max_epochs=8),
    "dropout": dropout,
    "loader": loader,
    "rows by keyword": beside,
    "columns": encoded(Noisy, "columns"),
    "sparse": encoded(Noisy, "sparse", optimizer=lambda p, lr: torch.optim.SGD(p, lr)),
    "mixed": mixed,
    "scaled": scaled,
    "regression by minibatches": regression,
    **{name: case(name) for name in cases()},
    "normed": normed,
    "moves a buffer": encoded(Noisy, "moves a buffer"),
    "permuted": encoded(Noisy, "permuted"),
    "matched": family("mean_scale", objective=matched(0)),
    "matched later": family("mean_scale", objective=matched(4)),
    "compiled": lambda: (*linear(), data(25), {"compile": True}),
}
WHOLE = {  # which cannot be divided
    "own rows", "normed", "free bits", "moves a buffer", "permuted", "matched", "matched later",
}  # fmt: skip


def train(name, **more):
    """What comes of a training: its course, and where it led."""
    torch.manual_seed(6)
    model, guide, x, told = WAYS[name]()
    running.STAGE, before = 2, running.STAGE
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = fit(model, guide, x, **{**TOLD, **told, **more})
    finally:
        running.STAGE = before
    said = [str(each.message) for each in caught]
    told = result._replace(seconds=0.0, objective=None, optimizer=None)._asdict()
    return told, values(model, guide), said


@cache
def server():
    """The process that all others are copies of: what they import is imported once."""
    here = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = subprocess.Popen([sys.executable, __file__], env=here, text=True, **pipes)
    atexit.register(started.kill)
    return started


def together(count, folder, *names, **told):
    """What each of some processes returns of each training, or the error that it raises."""
    folder = Path(folder)
    (folder / "told").write_bytes(pickle.dumps((names, told)))
    print(count, folder, file=server().stdin, flush=True)
    assert server().stdout.readline() == "ended\n"
    found = [folder / f"found{rank}" for rank in range(count)]
    said = [(folder / f"said{rank}").read_text() for rank in range(count)]
    assert any(path.exists() for path in found), said
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in found]


def serve():
    """Starts so many processes in a folder for each line, and says when all have ended."""
    torch.export.export(nn.Linear(1, 1), (torch.ones(2, 1),))  # imports what takes a second
    for line in sys.stdin:
        count, folder = line.rstrip("\n").split(" ", 1)
        children = []
        for rank in range(int(count)):
            child = os.fork()
            if not child:
                begin(rank, int(count), folder)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        print("ended", flush=True)


def begin(rank, count, folder):
    """One process, from its beginning to its end; after a quarter of an hour it is ended."""
    signal.alarm(900)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may have another
    code, said = 1, os.open(f"{folder}/said{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        main(rank, count, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(rank, count, folder):
    torch.set_default_dtype(torch.float64)
    store = group.FileStore(f"{folder}/store", count)
    group.init_process_group("gloo", store=store, rank=rank, world_size=count)
    names, told = pickle.loads(Path(folder, "told").read_bytes())
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = PROGRAMS[name](rank, **told) if name in PROGRAMS else train(name, **told)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    Path(folder, f"found{rank}").write_bytes(pickle.dumps(found))


def dies(rank, checkpoint):
    """The second process ends, without a word, behind the second epoch."""

    def callback(row):
        if rank == 1 and row["epoch"] == 1:
            os._exit(1)

    return train("mean_scale", num_epochs=6, checkpoint=checkpoint, callback=callback)


def told_to_stop(rank):
    """The second process is told to stop in the third epoch."""

    def callback(row):
        if rank == 1 and row["epoch"] == 2:
            signal.raise_signal(signal.SIGINT)

    return train("mean_scale", num_epochs=6, callback=callback)


def one_stops(rank):
    return train("mean_scale", num_epochs=6, callback=lambda row: rank == 1 and row["epoch"] == 2)


def other_data(rank):
    model, guide = build()
    fit(model, guide, data(25) + rank, **TOLD)


def cut_twice(rank):
    model, guide = build()
    rows = TensorDataset(data(24))
    loader = DataLoader(rows, 8, sampler=DistributedSampler(rows))
    fit(model, guide, loader, **{**TOLD, "batch_size": None})


class Own(IterableDataset):
    """Data of which each process has others."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        return iter(data(25) + self.rank)


def own_shards(rank):
    model, guide = build()
    fit(model, guide, Own(rank), size=25, **TOLD)


def one_fails(rank):
    """The callback of one process raises an error, from which its program goes on."""

    def callback(row):
        if rank == 1 and row["epoch"] == 1:
            raise LookupError("mine")

    return train("mean_scale", callback=callback)


def one_refuses(rank):
    return train("mean_scale", num_epochs=1 - rank)


def one_compares(rank):
    """The first process alone does what trains within."""
    if rank == 0:
        told = {"num_epochs": 1, "num_samples": 2, "num_seeds": 2, "progress": False}
        both, x = ["mean_only", "mean_scale"], data(9)
        compare_families(lambda: (build()[0], mlp(3, 4)), both, x, x, **told)


def other_start(rank):
    torch.manual_seed(rank)
    model, guide = build()
    fit(model, guide, data(25), **{**TOLD, "seed": None})
    return values(model, guide)


def no_checkpoint(rank):
    return train("mean_scale", checkpoint=__file__)


def on_their_own(rank):
    with apart():
        return train("mean_scale", seed=rank, num_epochs=rank + 1)


def other_draws(rank):
    torch.manual_seed(0)
    return train("mean_scale", callback=lambda row: torch.randn(rank) is None)


PROGRAMS = {
    "cut_twice": cut_twice,
    "dies": dies,
    "no_checkpoint": no_checkpoint,
    "own_shards": own_shards,
    "one_compares": one_compares,
    "one_fails": one_fails,
    "one_refuses": one_refuses,
    "on_their_own": on_their_own,
    "one_stops": one_stops,
    "other_data": other_data,
    "other_draws": other_draws,
    "other_start": other_start,
    "told_to_stop": told_to_stop,
}

if __name__ == "__main__":
    serve()
