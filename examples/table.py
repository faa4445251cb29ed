"""Tables with gaps and mixed columns (two minutes; writes pictures to results/table).

Half of the entries of the breast cancer table are hidden and filled in again, by a VAE and by the
imputers of scikit-learn. Then the penguins of Palmer station as they came: numbers, categories and
gaps; a few more entries are hidden, so that there is something to judge by.

    python examples/table.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from torch import nn

from ppvae import (
    VAE,
    FamilyGuide,
    encode,
    families,
    fit,
    generate,
    imputation_error,
    impute,
    likelihoods,
    linear_probe,
    log_prob,
    objectives,
    plots,
    two_sample,
)
from ppvae.data import to_frame
from ppvae.nn import FillMissing, Standardize, mlp


def cancer(args: argparse.Namespace) -> None:
    """Half of the entries are missing at random, as in Mattei and Frellsen's MIWAE (2019)."""
    table = load_breast_cancer()
    x = (table.data - table.data.mean(0)) / table.data.std(0)
    np.random.seed(1234)  # theirs
    hidden = np.zeros(x.size, dtype=bool)
    hidden[np.random.choice(x.size, x.size // 2, replace=False)] = True
    hidden = hidden.reshape(x.shape)
    gaps = np.where(hidden, np.nan, x)
    print(f"Breast cancer: {x.shape[0]} rows, {x.shape[1]} columns, half of the entries hidden")
    others = {
        "column means": SimpleImputer(),
        "KNNImputer": KNNImputer(),
        "IterativeImputer": IterativeImputer(max_iter=30, random_state=0, tol=1e-2),
    }
    print(f"{'mean squared error of what was hidden':42s}{'':>8s}")
    for name, imputer in others.items():
        error = (imputer.fit_transform(gaps) - x)[hidden]
        print(f"  {name:40s}{np.mean(error**2):8.3f}")
    found = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        likelihood = likelihoods.StudentT.of(gaps, per_datum=True)
        model = VAE(mlp(10, 128, 128, out=likelihood.size(30)), 10, likelihood)
        guide = FamilyGuide(model, families.mean_scale, encoder=mlp(30, 128, 128))
        result = fit(
            model, guide, gaps, num_epochs=args.epochs, batch_size=32, learning_rate=args.rate,
            objective=objectives.IWAE(20), seed=seed, progress=f"cancer, seed {seed}",
        )  # fmt: skip
        filled = impute(model, guide, gaps, num_samples=2000)
        found.append(imputation_error(filled, x).loc["all"])
        print(f"  {f'VAE, seed {seed}':40s}{found[-1].nrmse ** 2:8.3f}", end="")
        print(f"   (train loss {result.losses[-1]:.2f}; its 90 % intervals hold", end=" ")
        print(f"{found[-1].coverage:.0%})")
    codes = encode(model, guide, gaps).mean
    print(f"A linear classifier finds the diagnosis from the codes: {_right(codes, table.target)}")
    names = table.target_names[table.target]
    figure = plots.latents({"breast cancer, half hidden": codes}, names)
    figure.savefig(args.out / "cancer.png", dpi=150)


def penguins(args: argparse.Namespace) -> None:
    """Numbers, categories and gaps, as they come."""
    from palmerpenguins import load_penguins

    frame = load_penguins().drop(columns="year")
    for name in ("species", "island", "sex"):
        frame[name] = frame[name].astype("category")
    rng = np.random.default_rng(0)
    more = pd.DataFrame(rng.random(frame.shape) < 0.1, frame.index, frame.columns) & frame.notna()
    gaps = frame.mask(more)
    came, hid = int(frame.isna().sum().sum()), int(more.sum().sum())
    print(f"\nPenguins: {len(frame)} rows; {came} entries are missing, and {hid} more are hidden")
    parts: dict = {tuple(frame.select_dtypes("number")): likelihoods.Normal(learned=True)}
    for name in ("species", "island", "sex"):
        parts[name] = likelihoods.Categorical(frame[name].nunique())
    torch.manual_seed(0)
    likelihood = likelihoods.Mixed.of(gaps, parts=parts)
    model = VAE(mlp(3, 32, out=likelihood.size()), 3, likelihood)
    inner = nn.Sequential(Standardize.of(gaps), mlp(frame.shape[1], 64))
    guide = FamilyGuide(model, families.mean_scale, encoder=FillMissing.of(gaps, inner))
    fit(
        model, guide, gaps, num_epochs=10 * args.epochs, batch_size=64, learning_rate=2e-3,
        seed=0, objective=objectives.IWAE(8), progress="penguins",
    )  # fmt: skip
    filled = impute(model, guide, gaps)
    truth = pd.DataFrame({n: _numbers(frame[n]) for n in frame})
    judged = filled.assign(missing=(filled.missing.dims, more.to_numpy()))
    errors = imputation_error(judged, truth.where(more, filled.value.values))
    plain = pd.DataFrame({n: _plain(gaps[n], frame[n], more[n]) for n in frame}).T
    shown = pd.DataFrame({
        "hidden": errors.missing.astype(int),
        "error": errors.nrmse.fillna(errors.wrong),
        "mean or mode": plain.nrmse.fillna(plain.wrong),
        "in its 90 % interval": errors.coverage,
    })  # fmt: skip
    print("Error: root of the mean square in sds of the column; of categories the share of wrong")
    print(shown.drop(index="all").round(2).to_string())
    print("\nThe first rows with gaps, filled in:")
    print(to_frame(filled.value, frame)[frame.isna().any(axis=1)].head(3).round(1).to_string())
    drawn = generate(model, len(frame), seed=0)
    score = two_sample(truth, drawn)
    print(f"\nA classifier tells {len(drawn)} drawn penguins from real ones: area {score}")
    print("(0.5: it cannot; of independent columns the area is", end=" ")
    alone = np.stack([rng.permutation(truth[name]) for name in truth], 1)
    print(f"{two_sample(truth, alone)})")
    evidence = log_prob(model, guide, gaps).log_likelihood
    print(f"log p of what is observed of a row: {float(evidence.mean()):.2f} nats")
    codes = encode(model, guide, gaps).mean
    figure = plots.latents({"penguins": codes}, frame.species.astype(str))
    figure.savefig(args.out / "penguins.png", dpi=150)


def _right(codes: torch.Tensor, labels: np.ndarray) -> str:
    score = linear_probe(codes, labels)
    return f"{100 * score.value:.1f} +- {100 * score.se:.1f} % right"


def _numbers(column: pd.Series) -> pd.Series:
    """A column as numbers; categories are their codes."""
    if hasattr(column, "cat"):
        return column.cat.codes.astype(float).where(column.notna())
    return column.astype(float)


def _plain(gaps: pd.Series, truth: pd.Series, hidden: pd.Series) -> dict[str, float]:
    """The error of the column's mean, or of its most frequent category."""
    if hasattr(truth, "cat"):
        wrong = (truth[hidden] != gaps.mode()[0]).mean()
        return {"nrmse": np.nan, "wrong": wrong}
    error = (truth[hidden] - gaps.mean()) / truth.std(ddof=0)
    return {"nrmse": float(np.sqrt((error**2).mean())), "wrong": np.nan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; theirs is 2e-4")
    parser.add_argument("--out", type=Path, default=Path("results/table"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cancer(args)
    penguins(args)
    print(f"\nPictures are in {args.out}")


if __name__ == "__main__":
    main()
