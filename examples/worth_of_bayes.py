"""Is being Bayesian worth it over regularised least squares? (two minutes; writes two pictures).

First for diabetes: all 442 patients, by five folds; and 30 of them, by which the others are
predicted. Then a map of where it pays: regressions of 20 columns, whose weights are drawn anew each
time, with few rows for each column or many, and little noise or much. Gain: nats per datum of the
held-out log density of the full posterior over that of the best point, which is chosen with
hindsight among least squares and three ridge regressions.

    python examples/worth_of_bayes.py
    python examples/worth_of_bayes.py --sparse   # three of the 20 weights are not zero
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_diabetes

from ppvae import _look
from ppvae.regression import plots, worth_of_bayes
from ppvae.regression.worth import BY_EVIDENCE, FULL, POINTS

COLUMNS, SIGNIFICANT = 20, 3
PER_COLUMN = [0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0]
NOISES = [0.2, 0.7, 2.0]
TEST = 300


def patients(args: argparse.Namespace) -> None:
    X, y = load_diabetes(return_X_y=True, scaled=False)
    print("Diabetes, all patients\n")
    print(worth_of_bayes(X, y, seed=args.seed))
    order = np.random.default_rng(args.seed).permutation(len(y))
    few, others = order[: args.few], order[args.few :]
    print("\n\nDiabetes, few patients\n")
    found = worth_of_bayes(X[few], y[few], test=(X[others], y[others]), guides=True, seed=args.seed)
    print(found)
    plots.worth(found).savefig(args.out / "diabetes.png", dpi=110)


def draw(rows: int, noise: float, generator: np.random.Generator, *, sparse: bool) -> tuple:
    """Data whose signal has the variance 1, on average."""
    X = generator.standard_normal((rows, COLUMNS))
    weight = generator.standard_normal(COLUMNS) / np.sqrt(COLUMNS)
    if sparse:
        weight[SIGNIFICANT:] = 0.0
        weight *= np.sqrt(COLUMNS / SIGNIFICANT)
    return X, X @ weight + noise * generator.standard_normal(rows)


def cell(rows: int, noise: float, args: argparse.Namespace) -> dict[str, float | str]:
    """Means over data sets, of which each has weights of its own."""
    generator = np.random.default_rng([args.seed, rows, int(10 * noise)])
    scores: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.repeats):
        X, y = draw(rows + TEST, noise, generator, sparse=args.sparse)
        found = worth_of_bayes(X[:rows], y[:rows], test=(X[rows:], y[rows:]))
        for name, method in found.methods.items():
            pair = method.log_density.mean(), method.coverage
            scores.setdefault(name, []).append(pair)
    tables = {name: np.array(pairs) for name, pairs in scores.items()}
    best = max((n for n in POINTS if n in tables), key=lambda n: tables[n][:, 0].mean())
    gains = tables[FULL][:, 0] - tables[best][:, 0]
    over = {
        name: (tables[FULL] - tables[name])[:, 0].mean() if name in tables else np.nan
        for name in ("least squares", BY_EVIDENCE)
    }
    return {
        "gain": gains.mean(),
        "error": gains.std(ddof=1) / np.sqrt(args.repeats),
        "best": best,
        "point": tables[best][:, 1].mean(),
        "full": tables[FULL][:, 1].mean(),
        **over,
    }


def picture(cells: dict[tuple[float, float], dict], args: argparse.Namespace) -> None:
    """Three maps over rows per column and noise."""
    figure = _look.empty(13.0, 3.6)
    panels = figure.subplots(1, 3, sharey=True)
    maps = {
        "gain": ("Gain over the best point [nats per datum]", "Blues", (0.0, 0.15), ".3f"),
        "point": ("Share of data in 90 % intervals, best point", "PuOr", (0.7, 1.1), ".0%"),
        "full": ("The same, full posterior", "PuOr", (0.7, 1.1), ".0%"),
    }
    for panel, (key, (title, colors, limits, form)) in zip(panels, maps.items(), strict=True):
        table = np.array([[cells[noise, each][key] for each in PER_COLUMN] for noise in NOISES])
        panel.imshow(table, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
        far = 0.6 * (limits[1] - limits[0])
        for (row, column), value in np.ndenumerate(table):
            dark = value > limits[0] + far if key == "gain" else abs(value - 0.9) > 0.13
            shade = "white" if dark else "black"
            told = f"{value + 0.0:{form}}".replace("-0.000", "0.000")
            panel.text(column, row, told, ha="center", va="center", color=shade, fontsize=8)
        panel.set_xticks(range(len(PER_COLUMN)), [f"{each:g}" for each in PER_COLUMN])
        panel.set_yticks(range(len(NOISES)), [f"{noise:g}" for noise in NOISES])
        panel.set(title=title, xlabel="rows per column")
    panels[0].set_ylabel("noise sd (the signal's is 1)")
    truth = f"{SIGNIFICANT} of them not zero" if args.sparse else "drawn from a Normal"
    figure.suptitle(f"Where the full posterior pays: {COLUMNS} weights, {truth}")
    figure.savefig(args.out / "map.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", type=int, default=30, help="patients that predict the others")
    parser.add_argument("--repeats", type=int, default=40, help="data sets of each cell of the map")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/worth_of_bayes"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    patients(args)
    print(f"\n\nThe map: {args.repeats} data sets in each cell, {TEST} new data for each\n")
    print("                              gain over:             posterior    90 % have:")
    print("noise  rows/column           best point  least sq.  by evid.  point   full  best point")
    cells = {}
    for noise in NOISES:
        for each in PER_COLUMN:
            found = cells[noise, each] = cell(round(each * COLUMNS), noise, args)
            gain = f"{found['gain']:.4f} ({found['error']:.4f})"
            least = f"{found['least squares']:.4f}".replace("nan", "-")
            print(
                f"{noise:5g}{each:13g}{gain:>21s}{least:>11s}{found[BY_EVIDENCE]:10.4f}"
                f"{found['point']:7.0%}{found['full']:7.0%}  {found['best']}"
            )
    picture(cells, args)
    print(f"\nPictures are in {args.out}")


if __name__ == "__main__":
    main()
