"""The two examples that answer a question: their sums against identities, and runs of few steps."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import LONG
from scipy import stats

from ppvae import VAE, FamilyGuide, closed_form, data, families, fit, likelihoods, objectives
from ppvae.nn import mlp

EXACT = ["mean_only", "shared_scale", "mean_scale", "full_rank"]
VALUES = np.array([0.7, 0.5, 0.3, 0.12, 0.08, 0.02])


@pytest.fixture(scope="module")
def rate_distortion(load):
    return vars(load("rate_distortion.py"))


@pytest.fixture(scope="module")
def noise_help(load):
    return vars(load("when_does_noise_help.py"))


@pytest.mark.parametrize("name", EXACT)
def test_optimum(rate_distortion, name):
    """Where the level is the best noise variance, it is that of probabilistic PCA and its kin.

    From there it is found by the slope: d distortion / d rate = -beta along the optima, of three,
    four or two latents that are not idle, or of three where `shared_scale` alone keeps the third.
    """
    optimum, noise = rate_distortion["optimum"], rate_distortion["NOISE"]
    axes = torch.diag(torch.as_tensor(6 * VALUES).sqrt())
    best = closed_form.learned_decoder(torch.cat([axes, -axes]), 3, families.LADDER[name])
    level = best.noise**2
    rate, distortion = optimum(VALUES, 3, name, level / noise**2)
    error = (distortion - 3 * math.log(2 * math.pi * noise**2)) * 2 * noise**2
    expected = -rate - 3 * math.log(2 * math.pi * level) - error / (2 * level)
    assert math.isclose(rate, best.rate, abs_tol=1e-9)
    assert math.isclose(expected, best.objective, abs_tol=1e-9)
    for latent, beta in ((4, 0.5), (4, 1.0), (4, 4.5), (4, 7.0), (3, 0.6), (3, 6.4), (3, 9.0)):
        ends = [optimum(VALUES, latent, name, beta * s) for s in (0.9999, 1.0001)]
        (rate, distortion) = np.diff(ends, axis=0)[0]
        assert math.isclose(distortion / rate, -beta, rel_tol=1e-6)
    assert optimum(VALUES, 3, name, 40.0)[0] == 0.0


def test_bound_is_reverse_water_filling(rate_distortion):
    """Without a limit on the latents: rates sum (ln l / level)+ / 2 at errors min(l, level)."""
    noise = rate_distortion["NOISE"]
    for beta in (0.2, 1.0, 3.0, 20.0):
        rate, distortion = rate_distortion["optimum"](VALUES, len(VALUES), "full_rank", beta)
        level = beta * noise**2
        assert math.isclose(rate, np.log(np.maximum(VALUES / level, 1)).sum() / 2, abs_tol=1e-12)
        error = np.minimum(VALUES, level).sum()
        constant = len(VALUES) / 2 * math.log(2 * math.pi * noise**2)
        assert math.isclose(distortion, constant + error / (2 * noise**2))
        for name in EXACT:  # and no family, at whatever price, is below the line through it
            for other in (0.2, 1.0, 3.0, 20.0):
                point = rate_distortion["optimum"](VALUES, 3, name, other)
                assert point[1] + beta * point[0] >= distortion + beta * rate - 1e-12


@pytest.mark.parametrize("name", ["mean_only"] * LONG + ["mean_scale"])
def test_fitted_slope_is_minus_beta_within_five_per_cent(rate_distortion, name):
    torch.manual_seed(0)
    x = torch.randn(600, 6)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T, correction=0))).T
    x = x * torch.as_tensor(VALUES).sqrt()  # the covariance is diagonal, with these values
    model = VAE(mlp(2, out=6), 2, likelihoods.Normal(rate_distortion["NOISE"]))
    betas = np.array([3.0, 1.9, 1.2])
    stages = [(3e-2, 60), (6e-3, 40), (1e-3, 20)]
    rates, distortions, errors = rate_distortion["sweep"](
        name, model, torch.nn.Identity(), x, x, betas, stages, len(x)
    )
    slopes = np.diff(distortions) / np.diff(rates)
    assert np.allclose(slopes, -np.sqrt(betas[1:] * betas[:-1]), rtol=0.05)
    for beta, rate, distortion in zip(betas, rates, distortions, strict=True):
        best = rate_distortion["optimum"](VALUES, 2, name, beta)
        assert abs(rate - best[0]) < 0.05 and abs(distortion - best[1]) < 0.1
    assert (errors > 0).all()


def test_rate_distortion_runs(run, tmp_path):
    options = ["--steps", 2, "--epochs", 1, "--hidden", 8, "--latent", 3, "--out", tmp_path]
    functions = {"evaluate": {"num_samples": 8}}
    few = {} if LONG else {"FAMILIES": ["mean_only", "mean_only_bounded", "full_rank"]}
    out = run("rate_distortion.py", *options, rows=400, functions=functions, **few)
    lines = [line.split() for line in out.splitlines()]
    for name, rows in {"mean_only_bounded": 10, "full_rank": 10, "noise_only": 1}.items():
        assert sum(line[:1] == [name] for line in lines) == rows
    bounded = [line for line in lines if line[:1] == ["mean_only_bounded"] and "-" in line]
    assert len(bounded) == 5  # no closed form on the linear decoder
    assert "Largest difference of a slope" in out and "`deterministic` is left out" in out
    assert {path.stem for path in tmp_path.glob("*.png")} == {"linear", "digits"}


def test_a_flat_prior_is_beta_zero(noise_help):
    """The example's plain autoencoder takes the same steps as `deterministic` with beta = 0."""
    x, found = data.load("digits")[:200], []
    family, sd = noise_help["ROWS"]["autoencoder"]
    for prior, beta in ((sd, 1.0), (1.0, 0.0)):
        torch.manual_seed(0)
        prior = dist.Normal(torch.zeros(3), prior).to_event(1)
        model = VAE(mlp(3, 8, out=64), 3, likelihoods.Bernoulli(), prior)
        guide = FamilyGuide(model, family, mlp(64, 8))
        fit(model, guide, x, num_epochs=5, objective=objectives.ELBO(beta=beta), seed=0,
            batch_size=50, progress=False)  # fmt: skip
        found.append(model.decoder(torch.ones(1, 3)))
    assert torch.allclose(*found, atol=1e-4)
    assert family is families.deterministic


@pytest.mark.parametrize("key", ["clean", "labels"])
@pytest.mark.parametrize("shift", [-1.0, 0.05, 1.0])
def test_paired_differences_and_verdicts(noise_help, key, shift):
    """The interval is SciPy's for paired data; less is better in nats, more in per cent."""
    generator = np.random.default_rng(0)
    base = generator.normal(size=5)
    vae = base + shift + 0.2 * generator.normal(size=5)
    runs = {"autoencoder": [{key: v} for v in base], "VAE": [{key: v} for v in vae]}
    mean, half, word = noise_help["against"]("autoencoder", runs, key)
    interval = stats.ttest_rel(vae, base).confidence_interval(0.95)
    assert np.allclose([mean - half, mean + half], [interval.low, interval.high])
    better = {"clean": -1, "labels": 1}[key] * shift > 0
    assert word == ("no difference" if abs(shift) < 0.1 else "helps" if better else "hurts")


def test_when_does_noise_help_runs(run, tmp_path):
    options = ["--seeds", 2, "--epochs", 1, "--size", 200, "--few", 40, "--draws", 4]
    options += ["--data", "digits", "--hidden", 8, "--latent", 2, "--out", tmp_path]
    out = run("when_does_noise_help.py", *options, rows=400)
    table = [line for line in out.splitlines() if line.count("[") >= 2 and "], " not in line]
    assert sum(line.startswith(("reconstruction", "linear", "log p(x)")) for line in table) == 3
    assert len(table) == 10
    said = out[out.index("What this run found on digits") :]
    for word in ("helps", "hurts", "no difference"):  # the table's verdicts come back in words
        told = [line for line in table if line.rstrip().endswith(word)]
        assert told == [] or f"VAE against regularised, {word}" in said
    assert {path.stem for path in tmp_path.glob("*.png")} == {"digits", "digits_latents"}
