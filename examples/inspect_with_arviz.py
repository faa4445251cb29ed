"""From a fitted guide to ArviZ (half a minute; writes 28 MB to results/arviz).

A summary, a predictive check, seeds as chains, leave-one-out, how much the prior says, a file.

Two models: a VAE on the digits, whose latents are local to each image, and a linear regression,
whose weights are global.

    python examples/inspect_with_arviz.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_diabetes

from ppvae import (
    VAE,
    FamilyGuide,
    concat_chains,
    data,
    evaluate,
    families,
    fit,
    from_pyro_svi,
    likelihoods,
    loo,
    reading,
    to_netcdf,
)
from ppvae.nn import mlp


def regression(X: torch.Tensor, y: torch.Tensor) -> None:
    """Linear regression with unknown noise."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(X.shape[-1]), 0.5).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal((weight * X).sum(-1), noise), obs=y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("results/arviz"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    print("A VAE on the digits, from two seeds, which become the chains of one tree")
    train, test = data.split(data.load("digits"))
    trees = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = VAE(mlp(4, 256, out=64), latent=4, likelihood=likelihoods.Bernoulli())
        guide = FamilyGuide(model, families.mean_scale, encoder=mlp(64, 256))
        fit(
            model, guide, train, num_epochs=args.epochs, batch_size=128, learning_rate=2e-3,
            seed=seed, progress=f"seed {seed}",
        )  # fmt: skip
        found = evaluate(model, guide, test)
        tree = from_pyro_svi(model, guide, test[:50], num_samples=500, seed=0, evaluation=found)
        trees.append(tree)
    tree = concat_chains(trees)
    print(reading(found))
    elbo = tree["evaluation"]["elbo"].mean("datum").values
    print(f"The ELBO of the two seeds: {elbo[0]:.2f} and {elbo[1]:.2f} nats per image.")
    held = arviz_stats.compare({f"seed {n}": loo(each) for n, each in enumerate(trees)})
    print("Their log p(x) of the 50 images, in which the codes are integrated out:")
    print(held[["elpd", "se", "elpd_diff", "dse"]].round(1))

    print("\nWhat the second seed knows of the codes of the first two test images")
    first = tree.posterior["z"].sel(chain=[1], datum=[0, 1])
    print(arviz_stats.summary(first.to_dataset(), kind="stats", round_to=2))
    ink = tree.observed_data["x"].sum("x_dim_0")
    drawn = tree.prior_predictive["x"].sum("x_dim_0")
    low, high = np.quantile(drawn, [0.05, 0.95])
    inside = float(((ink >= low) & (ink <= high)).mean())
    print(f"\nImages whose number of black pixels lies in the model's 90 % interval: {inside:.0%}")
    to_netcdf(tree, args.out / "fit.nc")
    print(f"Everything is kept in {args.out / 'fit.nc'}\n")

    print("A regression on the diabetes data: two guides, compared by leave-one-out")
    X, y = load_diabetes(return_X_y=True)
    X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    X, y = torch.as_tensor(X, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)
    for name in ("mean_scale", "full_rank"):
        guide = FamilyGuide(regression, families.LADDER[name])
        print(f"\n{fit(regression, guide, (X, y), seed=0, progress=name)}")
        tree = from_pyro_svi(regression, guide, X, y, num_samples=1000, seed=0)
        print(f"{name}: sd of the first three weights", end=" ")
        print(tree.posterior["weight"].std(("chain", "draw")).values[:3].round(3))
        left_out, words = loo(tree), tree.posterior.attrs
        print(f"elpd_loo {left_out.elpd:.2f} (se {left_out.se:.2f}), largest Pareto k", end=" ")
        print(f"{float(left_out.pareto_k.max()):.2f} (above 0.7: not to be trusted)")
        print(f"log evidence {words['log_evidence']:.2f} nats, k-hat {words['khat']:.2f}")
    print("\nWhere the prior has more than 5 % of the say (power-scaling, of the full-rank guide)")
    said = arviz_stats.psense_summary(tree, var_names=["weight", "noise"])
    print(said[said["prior"].astype(float) > 0.05][["prior", "likelihood"]])


if __name__ == "__main__":
    main()
