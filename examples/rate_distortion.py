"""Rate against distortion (two minutes; writes two pictures to results/rate_distortion).

Every family is swept over beta, on a linear decoder beside the exact bound.

A fit minimises distortion + beta * rate: beta is the price of a nat of rate, and along the best
fits d distortion / d rate = -beta. First a linear decoder with fixed noise: its optimum is known.
    python examples/rate_distortion.py
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppvae import VAE, FamilyGuide, data, evaluate, families, fit, likelihoods, objectives, plots
from ppvae.nn import mlp

FAMILIES = ("mean_only", "mean_only_bounded", "shared_scale", "mean_scale", "full_rank")
BETAS = [0.25, 0.5, 1.0, 2.0, 4.0]  # on the digits
NOISE = 0.05**0.5  # of the linear decoder, on pixels in [0, 1]
FOOT = """
Nats per image. Each fit starts from the one above; slope and -beta (a geometric mean) span the two.
ELBO: -rate - distortion, whatever beta was; +-: its standard error. `deterministic` is left out:
a point has no rate, and -log p(z) in its place is no cost of a code.
"""


def optimum(values: np.ndarray, latent: int, family: str, beta: float) -> tuple[float, float]:
    """Rate and distortion of the best linear-Gaussian model at a price beta, in nats per datum.

    But for a constant, distortion + beta * rate is beta times the negative ELBO at noise variance
    beta * NOISE^2, the level, whose optimum is known (probabilistic PCA): with r_i^2 an eigenvalue
    of the covariance over the level, a direction with r_i > 1 costs ln r_i and leaves an error of
    one level. No guide does better on a linear decoder, and, if `latent` is no limit, nothing does
    on Gaussian data: reverse water-filling (Cover and Thomas, Elements of information theory, 10.3)
    """
    level, size = beta * NOISE**2, len(values)
    r = np.sqrt(values[:latent] / level)
    kept = int((r > 1).sum())
    rate, left = np.log(r[:kept]).sum(), np.ones(kept)  # left: error over level
    if family == "mean_only":
        rate, left = (r[:kept] - 1).sum() / 2, r[:kept]
    elif family == "shared_scale":  # an idle latent pays for the scale s too, and more are kept
        for kept in range(latent, -1, -1):
            total, idle = r[:kept].sum(), latent - kept
            s = 2 * latent / (total + math.sqrt(total**2 + 4 * idle * latent))
            if kept == 0 or r[kept - 1] > s:
                break
        left = s * r[:kept]
        rate = (left.sum() + idle * s**2 - latent) / 2 - latent * math.log(s)
    error = level * left.sum() + values[kept:].sum()
    return float(rate), size / 2 * math.log(2 * math.pi * NOISE**2) + error / (2 * NOISE**2)


def sweep(
    name: str, model: VAE, encoder: Any, x: Any, test: Any, betas: Any, stages: Any, batch: int
) -> np.ndarray:
    """Rates, distortions and standard errors of the ELBO of one family, fitted at each beta."""
    guide, found = FamilyGuide(model, families.LADDER[name], encoder), []
    for number, beta in enumerate(betas):
        for learning_rate, epochs in stages:
            fit(
                model, guide, x, objective=objectives.ELBO(beta=beta), seed=number,
                num_epochs=epochs if number else 4 * epochs, batch_size=batch,
                learning_rate=learning_rate, progress=f"{name}, beta {beta:.3g}",
            )  # fmt: skip
        got = evaluate(model, guide, test, num_samples=16)
        error = got.elbo.std(ddof=1) / len(test) ** 0.5
        found.append(list(map(float, (got.rate.mean(), got.distortion.mean(), error))))
    return np.array(found).T


def draw(curves: dict[str, Any], betas: Any, path: Path, title: str, **more: Any) -> None:
    """The curves, with the price of a nat at the marks of two of them; the others' come in turn."""
    words = [f"beta {beta:.2g}" for beta in betas]
    labels = {"mean_only": words, "full_rank": words}
    plots.rate_distortion_curves(curves, labels=labels, title=title, **more).savefig(path, dpi=150)


def linear_part(latent: int, steps: int, out: Path) -> None:
    """The linear decoder: fitted beside exact, and the slope beside -beta."""
    x, _ = data.split(data.load("digits", binary=False))
    values, vectors = np.linalg.eigh(np.cov(x.T.double(), bias=True))
    values, vectors = values[::-1].clip(0), torch.as_tensor(vectors[:, ::-1].copy(), dtype=x.dtype)
    x = (x - x.mean(0)) @ vectors  # a rotation: fits converge sooner, to the same numbers
    betas = np.geomspace(4, 4 / 2 ** (8 / 3), 5)
    prices = np.sqrt(betas[1:] * betas[:-1])  # by minimality the slope lies between the two betas
    print(f"\nLinear decoder, noise variance {NOISE**2:.2g}, {latent} latents, {len(x)} images")
    print("family              beta    rate   exact  distortion    exact   slope   -beta")
    stages = [(3e-2, steps // 2 + 1), (6e-3, steps // 3 + 1), (1e-3, steps // 6 + 1)]
    curves, off = {}, []
    for name in FAMILIES:
        torch.manual_seed(0)
        model = VAE(mlp(latent, out=len(values)), latent, likelihoods.Normal(NOISE))
        rates, distortions, _ = sweep(name, model, torch.nn.Identity(), x, x, betas, stages, len(x))
        curves[name] = rates, distortions
        known = name != "mean_only_bounded"
        slopes = np.diff(distortions) / np.diff(rates)
        off += list(abs(slopes / prices + 1)) if known else []
        for k, beta in enumerate(betas):
            best = optimum(values, latent, name, beta) if known else (math.nan, math.nan)
            line = f"{rates[k]:7.3f} {best[0]:7.3f} {distortions[k]:11.3f} {best[1]:8.3f}"
            line += f" {slopes[k - 1]:7.3f} {-prices[k - 1]:7.3f}" if k else ""
            print(f"{name:18s} {beta:5.2f} {line}".replace("nan", "  -"))
    print(f"Largest difference of a slope from -beta, where the optimum is known: {max(off):.1%}")
    grid = np.geomspace(betas[-1] / 2, values[0] / NOISE**2, 200)
    bounds = {}
    for n in (latent, len(values)):
        line = [optimum(values, n, "full_rank", beta) for beta in grid]
        bounds[f"bound, {n} latents"] = np.array(line).T
    curves["noise_only"] = np.array([optimum(values, 0, "noise_only", 1.0)]).T
    draw(curves, betas, out / "linear.png", "Linear, fixed noise", bounds=bounds)


def digits_part(latent: int, hidden: int, epochs: int, out: Path) -> None:
    """A decoder with a hidden layer on the binarised digits, measured on the test set."""
    x, test = data.split(data.load("digits"))
    print(f"\nHidden layer, Bernoulli, {latent} latents; {len(x)} images, {len(test)} to test on")
    print("family              beta    rate  distortion     ELBO    +-")
    curves = {}
    for name in (*FAMILIES, "noise_only"):
        torch.manual_seed(0)
        model = VAE(mlp(latent, hidden, out=x.shape[1]), latent, likelihoods.Bernoulli())
        encoder, stages = mlp(x.shape[1], hidden), [(8e-3, epochs), (1e-3, epochs // 2 + 1)]
        betas = BETAS if name != "noise_only" else [1.0]  # no rate, no price
        found = sweep(name, model, encoder, x, test, betas, stages, 128)
        curves[name] = found[0], found[1]
        for beta, rate, distortion, error in zip(betas, *found, strict=True):
            line = f"{rate:7.3f} {distortion:11.3f} {-rate - distortion:8.3f} {error:5.2f}"
            print(f"{name:18s} {beta:5.2f} {line}")
    draw(curves, BETAS, out / "digits.png", "Binary digits")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--latent", type=int, default=8, help="length of the latent")
    add("--hidden", type=int, default=128, help="width of the hidden layers")
    add("--steps", type=int, default=120, help="steps of the linear model at each beta")
    add("--epochs", type=int, default=14, help="epochs on the binarised digits at each beta")
    add("--out", type=Path, default=Path("results/rate_distortion"), help="folder to write to")
    add("--threads", type=int, default=1, help="small networks are faster with one")
    args = parser.parse_args(argv)
    if min(args.latent, args.hidden, args.steps, args.epochs, args.threads) < 1:
        parser.error("expected numbers of at least 1")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    linear_part(args.latent, args.steps, args.out)
    digits_part(args.latent, args.hidden, args.epochs, args.out)
    print(f"{FOOT}\nThe pictures are in {args.out}")


if __name__ == "__main__":
    main()
