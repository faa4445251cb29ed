"""What all functions that measure or draw promise: seeds, keywords, and that nothing moves."""

import inspect
import math
import platform
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from cases import LONG, cases, world
from linear import Column
from torch import nn

import ppvae
from ppvae import VAE, FamilyGuide, families, likelihoods
from ppvae.nn import mlp

SHORT = {
    "evaluate": {"num_samples": 6},
    "gaps": {"num_samples": 16, "num_steps": 4},
    "annealed_importance": {"num_temperatures": 1, "num_chains": 3},
    "calibration": {"num_samples": 9},
    "from_pyro_svi": {"num_samples": 3},
    "simulate": {},
}
MEASURES = list(SHORT)[:4]
FUNCTIONS = list(SHORT)[:5]  # of a model and a guide


def call(name, model, guide, *args, **options):
    function = getattr(ppvae, name)
    if name in MEASURES:
        options.setdefault("progress", False)
    programs = (model,) if name == "simulate" else (model, guide)
    return function(*programs, *args, **(SHORT[name] | options))


def arrays(result):
    """All numbers of a result."""
    if isinstance(result, xr.DataTree):
        groups = {key: group.to_dataset().data_vars for key, group in result.children.items()}
        return {f"{g}/{name}": v.values for g, vs in groups.items() for name, v in vs.items()}
    if isinstance(result, xr.Dataset):
        return {name: value.values for name, value in result.data_vars.items()}
    return {"x": result.args[0].numpy(), "z": result.latents["z"].numpy()}


def alike(one, other):
    one, other = arrays(one), arrays(other)
    same = [np.array_equal(one[k], other[k], equal_nan=one[k].dtype.kind == "f") for k in one]
    return one.keys() == other.keys() and all(same)


def build(family=families.mean_scale):
    model = VAE(mlp(2, 8, out=4), 2, likelihoods.Bernoulli())
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU()]
    guide = FamilyGuide(model, family, nn.Sequential(*layers))
    return model, guide, (torch.rand(9, 4) > 0.5).double()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", SHORT)
def test_nothing_moves(name, fails):
    """No weight, gradient, buffer, mode, hook or global state; also after an error in the midst."""
    model, guide, x = build(families.flow if name == "gaps" else families.mean_scale)
    modules = [*model.modules(), *guide.modules()]
    for parameter in guide.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    guide.encoder[2].eval()
    guide.eval = model.eval = None  # the modes are not to be set by way of these
    tensors = [t for m in (model, guide) for t in (*m.parameters(), *m.buffers())]
    tensors += [p.grad for p in guide.parameters()]
    before, modes = [t.clone() for t in tensors], [m.training for m in modules]
    outside, calls = world(), []

    def failing(*args):
        calls.append(args)
        if fails and len(calls) > 1:
            raise RuntimeError("in the midst")

    handle = model.decoder.register_forward_hook(failing)
    options = {} if fails or name == "simulate" else {"batch_size": 5}
    options |= {"num_temperatures": 2} if name == "annealed_importance" else {}
    with pytest.raises(RuntimeError, match="in the midst") if fails else nullcontext():
        call(name, model, guide, x, seed=3, **options)
    handle.remove()
    assert world() == outside and calls
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
    assert modes == [m.training for m in modules]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", SHORT)
def test_seeds(name):
    """Measures have seed 0 by default, draws come from the caller's stream; arrays will do."""
    model, guide, x = build()
    run = partial(call, name, model, guide)
    assert alike(run(x, seed=1), run(x.numpy(), seed=1))
    assert not alike(run(x, seed=1), run(x, seed=2))
    parameters = inspect.signature(getattr(ppvae, name)).parameters
    assert parameters["seed"].default == (0 if name in MEASURES else None)
    assert "progress" not in parameters or parameters["progress"].default is True
    torch.manual_seed(5)
    free = [run(x, seed=None) for _ in range(2)]
    torch.manual_seed(5)
    assert alike(free[0], run(x, seed=None)) and not alike(*free)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keywords_give_the_numbers_of_positional_arguments(name):
    """Tensors with a row for each datum are cut into the same minibatches, and others are not."""
    x, offset, weight, sizes = torch.randn(6, 3), torch.randn(6, 1), torch.randn(3), []

    def model(x, offset, weight):
        sizes.append((len(x), len(offset), len(weight)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + offset * weight, 0.5).to_event(1), obs=x)

    encoder = cases()["one vector"].encoder  # looks at x only
    guide = FamilyGuide(model, families.mean_scale, encoder).setup(x, offset, weight)
    run = partial(call, name, model, guide, vectorized=True, batch_size=4, seed=0)
    given = {"offset": offset.numpy(), "weight": weight}
    assert alike(run(x, offset, weight), run(x, kwargs=given))
    assert {*sizes} == {(6, 6, 3), (4, 4, 3), (2, 2, 3)}  # once all, to find the plate
    for wrong in (3, {1: offset}):
        with pytest.raises(TypeError, match="kwargs: expected a mapping from names to arguments"):
            run(x, kwargs=wrong)
    refused = "argument 1 is NaN in row 0, column 0, and is more than an obs"
    refused = "args: expected finite numbers, got 6" if name == "calibration" else refused
    with pytest.raises(ValueError, match=refused):
        run(x, kwargs={**given, "offset": offset * math.nan})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_with_fixed_plates_is_run_in_one_piece(name):
    """And one that cannot be vectorized, draw by draw."""

    def model(x):
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.dim() == 2
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    guide = FamilyGuide(model, families.full_rank, Column()).setup(torch.zeros(6))
    result = call(name, model, guide, torch.randn(6), batch_size=4, seed=0)
    sizes = (result.posterior if name == "from_pyro_svi" else result).sizes
    assert sizes["simulation" if name == "calibration" else "datum"] == 6


COUNTS = ["batch_size", "num_temperatures", "num_chains", "num_leapfrog"]
LEAST = {
    "evaluate": {"batch_size": 1, "num_samples": 2},
    "gaps": {"batch_size": 1, "num_samples": 16, "num_steps": 1},
    "annealed_importance": dict.fromkeys(COUNTS, 1),
    "calibration": {"batch_size": 1, "num_samples": 2, "num_simulations": 2},
    "from_pyro_svi": {"batch_size": 1, "num_samples": 1},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_counts(name):
    for option, least in LEAST[name].items():
        for value in (least - 1, least + 0.5):
            words = f"{option}: expected a whole number of at least {least}, got {value}"
            with pytest.raises(ValueError, match=words):
                call(name, *build(), **{option: value})


INSIDE = r"levels: expected numbers in \(0, 1\), at least one"
REFUSED = [
    *((name, {"plate": "rows"}, r"plate: .* one of \['data'\], got 'rows'") for name in FUNCTIONS),
    ("gaps", {"log_likelihood": np.zeros(3)}, r"expected 9 finite .* got shape \(3,\) with 0"),
    ("gaps", {"log_likelihood": [math.nan] * 9}, r"shape \(9,\) with 9 that are not finite"),
    ("from_pyro_svi", {"coords": {"data": [1]}}, r"coords: expected dims among .* \['data'\]"),
    ("from_pyro_svi", {"dims": {"y": ["a"]}}, r"dims: expected variables among .* got \['y'\]"),
    ("annealed_importance", {"start": "here"}, "start: expected one of .* got 'here'"),
    *(("calibration", {"levels": levels}, INSIDE) for levels in ((0.5, 1.0), (0.0,), ())),
]
LATENTS = [
    ({}, r"latents: expected values of \['z'\], got \[\]"),
    ({"z": torch.zeros(3, 2)}, r"latents: expected shape \(9, 2\) at 'z', got \(3, 2\)"),
    ({"z": torch.full((9, 2), math.inf)}, "latents: expected values in .* at 'z', got others"),
]
REFUSED += [("annealed_importance", {"latents": latents}, words) for latents, words in LATENTS]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        call(name, *build(), **options)


@pytest.mark.parametrize("name", SHORT)
def test_bad_data_and_models(name):
    model, guide, x = build()
    with pytest.raises(ValueError, match="args: expected finite numbers.*, got 36"):
        call(name, model, guide, torch.full_like(x, math.inf))
    if name in ("calibration", "simulate"):  # which draw whole data
        with pytest.raises(ValueError, match="args: expected finite numbers, got 36"):
            call(name, model, guide, x * math.nan)
    with pytest.raises(ValueError, match="args: expected at least one datum, got none"):
        call(name, model, guide, x[:0])
    if name == "simulate":
        return
    case = cases()["own rows"]
    guide = FamilyGuide(case.model, families.noise_only)
    with pytest.raises(ValueError, match="'data' draws a subsample of 4 in each run"):
        call(name, case.model, guide, *case.args)


class Noisy(nn.Linear):
    """An encoder that draws noise in every mode, and counts its calls."""

    scale, calls = 1.0, 0

    def forward(self, x):
        self.calls += 1
        noise = torch.randn(x.shape, dtype=x.dtype) if self.scale else 0.0
        return super().forward(x + self.scale * noise)


def test_an_encoder_is_run_once_for_the_draws_of_a_minibatch_unless_it_draws(monkeypatch):
    """The numbers are those of an encoder that is always run."""
    model, _, x = build()
    x[2, 1] = math.nan
    encoder = Noisy(4, 8).double()
    guide, model = FamilyGuide(model, families.mean_scale, encoder), model.double()
    evaluate = partial(ppvae.evaluate, model, guide, x, batch_size=4, progress=False)
    found, counts = [], []
    for scale in (0.0, 1.0):
        encoder.scale = scale
        evaluate(num_samples=2)
        for once in (True, False):
            if not once:
                monkeypatch.setattr("ppvae.evaluation.evaluation.encoded_once", nullcontext)
            encoder.calls = 0
            found.append(evaluate(num_samples=6, vectorized=False))
            counts.append(encoder.calls)
        monkeypatch.undo()
    draws = [3 * (6 + 9)]  # draws for the three minibatches, and of those for the information
    assert counts[1:] == 3 * [counts[1]] and counts[0] < counts[1] - draws[0], counts
    assert alike(found[0], found[1]) and alike(found[2], found[3])
    assert not alike(found[0], found[2])


KEEPS = """
import resource, torch
from ppvae.nn import mlp
from ppvae import VAE, FamilyGuide, evaluate, families, likelihoods
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
model = VAE(mlp(2, 500, out=500), latent=2, likelihood=likelihoods.Bernoulli())
guide = FamilyGuide(model, families.mean_scale, encoder=torch.nn.Linear(500, 8))
x = torch.zeros(200, 500)
evaluate(model, guide, x, num_samples=400, progress=False)
before = faults()
evaluate(model, guide, x, num_samples=1000, progress=False)
print(faults() - before)
"""


@pytest.mark.skipif(not LONG, reason="it runs for a while in a process of its own")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does")
def test_memory_of_a_run_is_there_for_the_next():
    """25 runs make several tensors each of 4 million numbers, 3,906 pages of 4 kB.

    Pages that the system clears anew for less than one of them are not those of every run. It is
    asked in a process of its own, in which nothing else was freed before.
    """
    words = [sys.executable, "-W", "ignore", "-c", KEEPS]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 25 * 3906
