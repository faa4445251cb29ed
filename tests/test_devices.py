"""Public functions with a model, guide and data on a device: a GPU, and one that is pretended."""

import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import FAMILIES, LIKELIHOODS, LONG, PRIORS
from devices import pretended, there

import ppvae
from ppvae import VAE, FamilyGuide, families, likelihoods
from ppvae.evaluation import hmc
from ppvae.nn import mlp
from ppvae.objectives import IWAE
from ppvae.regression import LinearRegression

FEW: dict[str, Any] = {"num_samples": 4, "progress": False}
FIT: dict[str, Any] = {"num_epochs": 1, "batch_size": 5, "progress": False, "seed": 0}
FIT |= {"optimizer": torch.optim.Adam}  # the fused one is a device's own

#: what has a device of its own, or takes what is on none: results, trees, files
ON_NONE = {"concat_chains", "imputation_error", "loo", "nan_masked", "reading", "summary"}
ON_NONE |= {"to_netcdf", "to_zarr", "load_pair", "save_pair"}
GRAPHS = {"stage", "fit_replicates"}  # which a pretended device has none of


PRETENDED = "PPVAE_PRETENDED" in os.environ


@pytest.fixture
def device():
    """What puts tensors and modules on a device, and its name."""
    if PRETENDED:
        with pretended():
            yield there, "pretended"
    elif torch.cuda.is_available():
        yield lambda value: value.to("cuda"), "cuda"
    else:
        pytest.skip("no GPU")


@pytest.mark.skipif(PRETENDED, reason="inside of itself")
def test_on_a_pretended_device():
    """All of this file in a process of its own, which has that device from then on."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--no-header", __file__]
    environment = os.environ | {"PPVAE_PRETENDED": "1"}
    found = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) > 50


def build(put, family="mean_scale", likelihood=None, prior=None):
    torch.manual_seed(0)
    likelihood = likelihood or likelihoods.Normal(0.5)
    model = put(VAE(mlp(2, 4, out=likelihood.size(4)), 2, likelihood, prior))
    guide = FamilyGuide(model, FAMILIES[family], encoder=put(mlp(4, 4)))
    return model, put(guide)


def x():
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(1))


CALLS = {
    "account": lambda m, g, x, put: ppvae.account(
        m, g, x, families=["full_rank"], num_steps=1, num_samples=16, progress=False
    ),
    "annealed_importance": lambda m, g, x, put: ppvae.annealed_importance(
        m, g, x, num_temperatures=2, num_chains=1, progress=False
    ),
    "calibration": lambda m, g, x, put: ppvae.calibration(
        m, g, x, num_simulations=4, num_samples=9, progress=False
    ),
    "choose_family": lambda m, g, x, put: ppvae.choose_family(
        m, x, encoder=g.encoder, families=["mean_scale"], **COMPARED
    ),
    "compare_families": lambda m, g, x, put: ppvae.compare_families(
        lambda: (build(put)[0], put(mlp(4, 4))), ["mean_scale", "mean_only"], x, **COMPARED
    ),
    "encode": lambda m, g, x, put: ppvae.encode(m, g, x).mean,
    "evaluate": lambda m, g, x, put: ppvae.evaluate(m, g, x, **FEW),
    "fit": lambda m, g, x, put: ppvae.fit(m, g, x, validation=x[:3], **FIT),
    "fit_replicates": lambda m, g, x, put: ppvae.fit_replicates(
        [(m, g), build(put)], x, num_epochs=1, batch_size=3, progress=False
    ),
    "from_pyro_svi": lambda m, g, x, put: ppvae.from_pyro_svi(m, g, x, num_samples=4),
    "gaps": lambda m, g, x, put: ppvae.gaps(m, g, x, num_steps=3, num_samples=16, progress=False),
    "generate": lambda m, g, x, put: ppvae.generate(m, 3),
    "impute": lambda m, g, x, put: ppvae.impute(m, g, torch.where(x > 1, torch.nan, x)),
    "interpolate": lambda m, g, x, put: ppvae.interpolate(m, g, x[:1], x[1:2], steps=3),
    "linear_probe": lambda m, g, x, put: ppvae.linear_probe(
        ppvae.encode(m, g, x).mean, np.arange(9) % 2, folds=2
    ),
    "log_prob": lambda m, g, x, put: ppvae.log_prob(m, g, x, num_samples=4),
    "predict": lambda m, g, x, put: ppvae.predict(*regression(put), x[:2], num_samples=4),
    "reconstruct": lambda m, g, x, put: ppvae.reconstruct(m, g, x, num_samples=4),
    "refine": lambda m, g, x, put: ppvae.refine(
        m, g, x, num_steps=3, num_samples=16, progress=False
    ),
    "resample": lambda m, g, x, put: ppvae.resample(m, g, x, num_candidates=4, **FEW),
    "simulate": lambda m, g, x, put: ppvae.simulate(m, x),
    "stage": lambda m, g, x, put: ppvae.stage(m, g, x)(x),
    "two_sample": lambda m, g, x, put: ppvae.two_sample(x, ppvae.generate(m, 9), folds=2),
}
COMPARED = {**FIT, "num_seeds": 2, "num_samples": 4}


def regression(put):
    model = put(LinearRegression(4, noise=0.5))
    guide = FamilyGuide(model, families.mean_scale)
    guide.setup(put(x()), put(x()[:, 0]))
    return model, put(guide)


def test_every_public_function_is_here_or_on_no_device():
    functions = {n for n in ppvae.__all__ if inspect.isfunction(getattr(ppvae, n))}
    assert functions == set(CALLS) | ON_NONE


@pytest.mark.parametrize("name", CALLS)
def test_a_public_function(name, device, single, monkeypatch):
    put, kind = device
    monkeypatch.setattr(hmc, "_PILOT", (4, 4))  # of a path that is too rough, and is on the device
    monkeypatch.setattr(hmc, "_FIRST", 2)
    if kind == "pretended" and name in GRAPHS:
        pytest.skip("no graph of a pretended device")
    model, guide = build(put)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = CALLS[name](model, guide, put(x()), put)
    for part in (model, guide):
        assert {v.device.type for v in (*part.parameters(), *part.buffers())} <= {kind}
    if isinstance(found, torch.Tensor):
        assert found.device.type == kind and found.sum().isfinite()


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_a_likelihood(kind, device, single):
    model, guide = build(device[0], likelihood=LIKELIHOODS[kind].make())
    data = device[0](LIKELIHOODS[kind].draw(9, 4))
    trained(model, guide, data)
    assert ppvae.generate(model, 3).device.type == device[1]


@pytest.mark.parametrize("kind", PRIORS)
def test_a_prior(kind, device, single):
    model, guide = build(device[0], prior=PRIORS[kind][0]())
    trained(model, guide, device[0](x()))


@pytest.mark.parametrize("family", FAMILIES if LONG else ["deterministic", "student_t", "flow"])
def test_a_family(family, device, single):
    model, guide = build(device[0], family)
    trained(model, guide, device[0](x()), measured=LONG or family != "flow")
    if family not in ("deterministic", "zero"):
        assert ppvae.fit(model, guide, device[0](x()), objective=IWAE(2), **FIT).losses


@pytest.mark.parametrize("family", ["mean_scale", "full_rank"])
def test_global_latents(family, device, single):
    """Their losses are those of the CPU; at once, where there is `vmap`, and in steps."""
    X, ends = x(), []
    told = {"optimizer": torch.optim.Adam, "num_epochs": 5} if device[1] == "pretended" else {}
    for put in (device[0], lambda value: value):
        model = put(LinearRegression(4, noise=0.5))
        guide = put(FamilyGuide(model, families.LADDER[family]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ppvae.NarrowFamily)
            data = put(X), put(X.sum(1))
            ends.append(ppvae.fit(model, guide, data, seed=0, progress=False, **told).losses[-1])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def trained(model, guide, data, *, measured=LONG):
    """Two steps; what they are made of is evaluated for a few, and for all by `.ci/long`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(ppvae.fit(model, guide, data, **FIT).losses).all()
        assert not measured or "distortion" in ppvae.evaluate(model, guide, data, **FEW)
