"""Groups of unequal sizes in one guide (two minutes; writes a picture to results/groups).

A regression whose intercept and slope differ between 20 groups of 3 to 30 rows. Global latents
(`mu`, `tau`, `noise`) and those of each group are in one guide, in five ways; beside it NUTS on the
same program. What is it worth to draw the groups given the globals, around the model's own prior of
them, or jointly with them? And what is it worth to pool the groups, beside least squares on each?

    python examples/groups.py
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from ppvae import Block, FamilyGuide, NarrowFamily, _look, evaluate, fit, from_pyro_svi
from ppvae.models import HierarchicalRegression

GROUPS, NOISE = 20, 1.0
GLOBALS = ("mu", "tau", "noise")
GIVEN = Block("mean_scale", given=["mu", "tau"])
AROUND = Block("mean_scale", prior="location_scale")
#: row -> what draws each site
ROWS: dict[str, Any] = {
    "mean field": "mean_scale",
    "globals jointly": {GLOBALS: "full_rank", "weight": "mean_scale"},
    "groups given globals": {GLOBALS: "full_rank", "weight": GIVEN},
    "groups around prior": {GLOBALS: "full_rank", "weight": AROUND},
    "all jointly": "full_rank",
}


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """X with a column of ones, the group of each row, and y."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(3, 30, GROUPS).long()
    group = torch.repeat_interleave(torch.arange(GROUPS), sizes)
    X = torch.ones(len(group), 2)
    X[:, 1] = torch.randn(len(group), generator=random)
    sds = torch.tensor([1.0, 0.4])
    weight = torch.tensor([1.0, 0.5]) + sds * torch.randn(GROUPS, 2, generator=random)
    noise = NOISE * torch.randn(len(group), generator=random)
    return X, group, (X * weight[group]).sum(-1) + noise


def alone(X: Tensor, group: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Slope of each group by least squares on its own rows, and its sd for the true noise."""
    slope, sd = [], []
    for g in range(GROUPS):
        rows = X[group == g]
        inverse = torch.linalg.inv(rows.T @ rows)
        slope.append((inverse @ rows.T @ y[group == g])[1])
        sd.append(NOISE * inverse[1, 1].sqrt())
    return np.array(slope), np.array(sd)


def intervals(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and the ends of the 90 % interval of draws `(draws, groups)`."""
    return (draws.mean(0), *np.quantile(draws, [0.05, 0.95], axis=0))


def picture(found: dict[str, tuple], sizes: np.ndarray, mean: float, path: Path) -> None:
    """The slope of each group, by each method."""
    figure = _look.empty(8, 3.4)
    axes = figure.subplots()
    axes.axhline(mean, color="0.6", linewidth=1, label="mean slope, by NUTS")
    for number, (name, (middle, low, high)) in enumerate(found.items()):
        at = np.arange(len(sizes)) + 0.24 * (number - 1)
        bars = [middle - low, high - middle]
        axes.errorbar(
            at, middle, bars, label=name, linestyle="", markersize=4, **_look.mark(number)
        )
    axes.set_xticks(np.arange(len(sizes)), sizes)
    axes.set(xlabel="rows of the group", ylabel="slope, with 90 % interval", ylim=(-1.2, 6.0))
    axes.legend(ncols=4, fontsize="small", loc="upper center", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="at most so many, by default as many as it takes")
    parser.add_argument(
        "--nuts", type=int, default=1000, help="draws, after half as many to warm up"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/groups"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = drawn(args.seed)
    sizes = data[1].bincount().numpy()
    print(f"{len(data[2])} rows in {GROUPS} groups of {sizes.min()} to {sizes.max()}\n")
    model = HierarchicalRegression(columns=2, groups=GROUPS)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    kernel = NUTS(model, max_tree_depth=7)
    chain = MCMC(kernel, args.nuts, args.nuts // 2, disable_progbar=True)
    chain.run(*data)
    seconds = time.perf_counter() - start
    nuts = {name: value.numpy() for name, value in chain.get_samples().items()}
    truth = np.concatenate([nuts["mu"], nuts["tau"]], 1)

    print(f"NUTS: {args.nuts} draws of the globals and all groups in {seconds:.0f} s\n", flush=True)
    warnings.simplefilter("ignore", NarrowFamily)  # the table says it: k-hat
    print(f"{'':24s}ELBO   log p(y)         k-hat  mean off   sd ratio   seconds")
    slopes = {}
    for name, family in ROWS.items():
        torch.manual_seed(args.seed)
        guide, start = FamilyGuide(model, family), time.perf_counter()
        fit(model, guide, data, num_epochs=args.steps, seed=args.seed, progress=name)
        seconds_of = time.perf_counter() - start
        told = evaluate(model, guide, *data, num_samples=4000, progress=False)
        tree = from_pyro_svi(model, guide, *data, num_samples=4000, seed=0)
        draws = {site: tree.posterior[site].values[0] for site in ("mu", "tau", "weight")}
        table = np.concatenate([draws["mu"], draws["tau"]], 1)
        off = abs(table.mean(0) - truth.mean(0)) / truth.std(0)
        ratio = table.std(0) / truth.std(0)
        slopes[name] = draws["weight"][..., 1]
        evidence = f"{told.log_evidence:.2f} ({told.log_evidence_se:.2f})"
        print(
            f"{name:22s}{told.total_elbo:8.2f} {evidence:>16s}{told.evidence_khat:7.2f}"
            f"{off.max():9.2f}{ratio.min():9.2f}-{ratio.max():.2f}{seconds_of:8.0f}",
            flush=True,
        )
    print("\nELBO and log p(y), by importance sampling with its error, in nats of all the data.")
    print("mean off: largest error of a mean of mu and tau, in posterior sds; sd ratio: of sds.")
    slope, sd = alone(*data)
    found = {"least squares, each alone": (slope, slope - 1.645 * sd, slope + 1.645 * sd)}
    found |= {"guide, all jointly": intervals(slopes["all jointly"])}
    found |= {"NUTS": intervals(nuts["weight"][..., 1])}
    few = sizes <= 6
    widths = [(high - low)[few].mean() for _, low, high in found.values()]
    print("\nMean width of the 90 % interval of a slope, in groups of 6 rows or fewer:")
    print(", ".join(f"{w:.2f} ({name})" for name, w in zip(found, widths, strict=True)))
    picture(found, sizes, nuts["mu"][:, 1].mean(), args.out / "slopes.png")
    print(f"The picture is in {args.out}")


if __name__ == "__main__":
    main()
