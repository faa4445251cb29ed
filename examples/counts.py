"""Counts, or zeros of their own (a minute; writes a picture to results/counts).

Poisson, negative binomial and zero-inflated likelihoods by log p(x) of data that were not trained
on: first on gene counts drawn here, where the right one is known, with the library size of each
cell as its exposure; then on visits to the doctor in the RAND health insurance experiment, with
covariates as the context.

    python examples/counts.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import statsmodels.api as sm
import torch
from torch import nn

from ppvae import VAE, FamilyGuide, families, fit, likelihoods, log_prob
from ppvae.nn import Concatenate, Log1p, Standardize, mlp

NAMES = ("Poisson", "negative binomial", "zero-inflated NB")


def made(name: str, x: np.ndarray, exposure: np.ndarray | None = None) -> Any:
    """The likelihood of that name, started at the data."""
    if name == "Poisson":
        return likelihoods.Poisson.of(x, exposure=exposure)
    if name == "negative binomial":
        return likelihoods.NegativeBinomial.of(x, exposure=exposure)
    counts = likelihoods.NegativeBinomial()
    return likelihoods.ZeroInflated.of(x, exposure=exposure, counts=counts)


def verdict(scores: dict[str, np.ndarray]) -> None:
    """Each likelihood against the simpler one before it, by paired differences."""
    for name in NAMES:
        print(f"  {name:20s}{scores[name].mean():10.3f}")
    for simple, rich in zip(NAMES, NAMES[1:], strict=False):
        away = scores[rich] - scores[simple]
        mean, se = away.mean(), away.std(ddof=1) / len(away) ** 0.5
        word = "worth it" if mean > 3 * se and mean > 0.01 else "not worth it"
        print(f"  {rich} over {simple}: {mean:+.3f} +- {se:.3f} nats per row, {word}")


def genes(args: argparse.Namespace, dropout: float) -> tuple[np.ndarray, np.ndarray]:
    """Counts of known mean, dispersion and share of extra zeros; returns both dispersions."""
    rng = np.random.default_rng(1)
    cells, columns, kinds = args.cells, 40, 4
    rates = rng.gamma(0.8, 1.0, (kinds, columns))
    kind = rng.integers(0, kinds, cells)
    library = rng.lognormal(5.0, 0.4, cells)
    mean = library[:, None] * (rates / rates.sum(1, keepdims=True))[kind]
    dispersion = rng.lognormal(-1.0, 0.5, columns)
    x = rng.poisson(rng.gamma(1 / dispersion, mean * dispersion)).astype(float)
    x[rng.random(x.shape) < dropout] = 0.0
    train, test = slice(0, cells * 4 // 5), slice(cells * 4 // 5, None)
    print(f"\n{cells} cells, {columns} genes, {dropout:.0%} of the entries set to zero")
    print(f"{'  log p(x) of cells not trained on':35s}[nats per cell]")
    scores, found = {}, None
    for name in NAMES:
        torch.manual_seed(0)
        likelihood = made(name, x[train], library[train])
        model = VAE(mlp(4, 64, out=likelihood.size(columns)), 4, likelihood)
        encoder = nn.Sequential(Log1p(), Standardize.of(torch.tensor(x[train]).log1p()).float())
        guide = FamilyGuide(model, families.mean_scale, nn.Sequential(encoder, mlp(columns, 64)))
        told: dict[str, Any] = {"kwargs": {"exposure": library[train]}}
        fit(
            model, guide, x[train], num_epochs=args.epochs, batch_size=128, learning_rate=3e-3,
            seed=0, progress=name, **told,
        )  # fmt: skip
        told["kwargs"] = {"exposure": library[test]}
        scores[name] = log_prob(model, guide, x[test], **told).log_likelihood.values
        if name == "negative binomial":
            found = likelihood.dispersion.detach().numpy()
    verdict(scores)
    return dispersion, found


def visits(args: argparse.Namespace) -> None:
    """Visits to the doctor, given nine covariates."""
    table = sm.datasets.randhie.load_pandas()
    x, covariates = table.endog.to_numpy(float)[:, None], table.exog.to_numpy(float)
    covariates = (covariates - covariates.mean(0)) / covariates.std(0)
    rows = np.random.default_rng(0).permutation(len(x))[: args.rows]
    x, c = x[rows], covariates[rows]
    train, test = slice(0, len(x) * 4 // 5), slice(len(x) * 4 // 5, None)
    print(f"\nVisits to the doctor: {len(x)} persons, {c.shape[1]} covariates")
    design = sm.add_constant(c)
    witness = sm.NegativeBinomial(x[train][:, 0], design[train]).fit(disp=0, maxiter=200)
    *slopes, alpha = witness.params
    log_mean = torch.as_tensor(design[train] @ slopes)[:, None]
    ours = likelihoods.NegativeBinomial(alpha).double()(log_mean).log_prob(torch.tensor(x[train]))
    print(f"  statsmodels' log-likelihood of its negative binomial regression: {witness.llf:.6f}")
    print(f"  that of likelihoods.NegativeBinomial at the same numbers:        {ours.sum():.6f}")
    own = sm.NegativeBinomial(x[test][:, 0], design[test]).loglikeobs(witness.params)
    print(f"{'  log p(x | covariates) of persons not trained on':50s}[nats per person]")
    print(f"  {'(the regression':20s}{own.mean():10.3f})")
    scores = {}
    for name in NAMES:
        torch.manual_seed(0)
        likelihood = made(name, x[train])
        decoder = mlp(1 + c.shape[1], 32, out=likelihood.size(1))
        model = VAE(decoder, 1, likelihood, context=c.shape[1])
        encoder = _First(Concatenate(mlp(1 + c.shape[1], 32)))
        guide = FamilyGuide(model, families.mean_scale, encoder)
        fit(
            model, guide, (x[train], c[train]), num_epochs=args.epochs,
            batch_size=min(256, len(x[train])), learning_rate=3e-3, seed=0, progress=name,
        )  # fmt: skip
        scores[name] = log_prob(model, guide, x[test], c[test]).log_likelihood.values
    verdict(scores)
    print("  A latent per person is a random effect, which makes counts vary more by itself.")


class _First(nn.Module):
    """Takes the logarithm of the counts, the first argument, for an encoder of both."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.log, self.encoder = Log1p(), encoder

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Counts and covariates -> features."""
        return self.encoder(self.log(x), context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("results/counts"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    true, found = genes(args, dropout=0.0)
    genes(args, dropout=0.2)
    visits(args)
    figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
    ends = [min(true.min(), found.min()) / 1.3, max(true.max(), found.max()) * 1.3]
    axes.plot(ends, ends, color="0.7", linewidth=1)
    axes.scatter(true, found, s=18)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1"])
        axis.set_minor_formatter("")
    axes.set(xlim=ends, ylim=ends, xlabel="true dispersion of a gene", ylabel="learned dispersion")
    figure.savefig(args.out / "dispersions.png", dpi=150)
    print(f"\nThe picture, learned dispersions beside the true ones, is in {args.out}")


if __name__ == "__main__":
    main()
