"""Bits, counts, outliers and classes (two minutes; writes a picture to results/generalized).

One linear predictor, four likelihoods, and the ladder on each: the penalised maximum likelihood
that everybody uses (a point), mean field, full rank, and NUTS on the same program. What is the
posterior worth on data that were left out, is the guide good enough for it, and how does one know?
Columns are standardised by the training rows; weights are N(0, 1) beforehand.

    python examples/generalized.py
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from sklearn.datasets import load_breast_cancer, load_wine
from statsmodels.datasets import ccard, randhie
from torch import Tensor

from ppvae import (
    FamilyGuide,
    NarrowFamily,
    _look,
    annealed_importance,
    evaluate,
    fit,
    from_pyro_svi,
    likelihoods,
)
from ppvae.regression import GeneralizedLinear, objective

Draws = dict[str, Tensor]
PRIORS: Any = {"weight": dist.Normal(0.0, 1.0), "intercept": dist.Normal(0.0, 5.0)}
FURTHER = dist.HalfNormal(2.0)  # of the dispersion, and of the noise in sds of y
#: name -> what it is, how many rows to learn from, likelihood, priors
DATA: dict[str, tuple[str, int, Any, Any]] = {
    "bits": ("breast cancer", 100, likelihoods.Bernoulli(), {}),
    "counts": ("visits to doctors", 200, likelihoods.NegativeBinomial(), {"dispersion": FURTHER}),
    "outliers": ("bills of credit cards", 40, likelihoods.StudentT(4.0), {"noise": FURTHER}),
    "classes": ("three wines", 40, likelihoods.Categorical(3), {}),
}
ROWS = {"point": "deterministic", "mean field": "mean_scale", "full rank": "full_rank"}
FOOT = """
* the log joint density at the point, which is no bound. Nats of all the training data; log p(y) by
importance sampling; errors in brackets. sd ratio: smallest and largest sd of the guide against
NUTS. log p(test): nats per datum that was left out. Brier: the lower, the better; cover: the share
of these data inside their 90 % intervals."""


def load(name: str, seed: int) -> list[Tensor]:
    """X and y to learn from and of at most 1,000 other rows, standardised by the first."""
    if name in ("bits", "classes"):
        X, y = (load_wine if name == "classes" else load_breast_cancer)(return_X_y=True)
    else:
        source, target = (randhie, "mdvis") if name == "counts" else (ccard, "AVGEXP")
        table = source.load_pandas().data
        X, y = table.drop(columns=target).to_numpy(), table[target].to_numpy(float)
    rows = DATA[name][1]
    order = np.random.default_rng(seed).permutation(len(X))[: rows + 1000]
    X, y = X[order], y[order] / (y[order][:rows].std() if name == "outliers" else 1.0)
    X = torch.tensor((X - X[:rows].mean(0)) / X[:rows].std(0))
    y = torch.tensor(y).to(X)
    return [X[:rows], y[:rows], X[rows:], y[rows:]]


def predicted(model: Any, draws: Draws, X: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Log density of each datum given the draws, and the Brier score or the cover."""
    logs, chances, values = [], [], []
    for number in range(len(draws["weight"])):
        one = {name: value[number] for name, value in draws.items()}
        fn = poutine.trace(poutine.condition(model, one)).get_trace(X).nodes["y"]["fn"]
        logs.append(fn.log_prob(y))
        values.append(fn.sample())
        chances.append(getattr(fn, "probs", None))
    log_density = torch.stack(logs).logsumexp(0) - np.log(len(logs))
    if chances[0] is not None:
        mean = torch.stack(chances).mean(0)
        mean = mean if mean.dim() == 2 else torch.stack([1 - mean, mean], 1)
        hit = torch.nn.functional.one_hot(y.long())
        return log_density, (mean - hit).square().sum(1).mean().item()
    low, high = np.quantile(torch.stack(values), [0.05, 0.95], axis=0)
    return log_density, np.mean((low <= y.numpy()) & (y.numpy() <= high))


def flat(draws: Draws) -> np.ndarray:
    """All latents beside each other, the positive ones by their logarithms."""
    parts = (v.log() if n in ("noise", "dispersion") else v for n, v in draws.items())
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1).numpy()


def ladder(name: str, args: argparse.Namespace) -> dict[str, Tensor]:
    """Prints the table of some data; returns the log density of each test datum by row."""
    words, _, likelihood, priors = DATA[name]
    X, y, X_test, y_test = load(name, args.seed)
    print(f"\n{name}: {words}, {X.shape[1]} columns, {len(X)} rows, {len(X_test)} to predict")
    score = "Brier" if name in ("bits", "classes") else "cover"
    print(f"{'':10s}{'objective':>15s}{'log p(y)':>16s}  k-hat   sd ratio  log p(test)  {score}  s")
    model = GeneralizedLinear(X.shape[1], likelihood, **PRIORS, **priors)
    start = time.perf_counter()
    chain = MCMC(NUTS(model, max_tree_depth=6), args.nuts, args.nuts // 2, disable_progbar=True)
    chain.run(X, y)
    nuts, densities = chain.get_samples(), {}
    seconds = time.perf_counter() - start
    for row, family in ROWS.items():
        start = time.perf_counter()
        guide = FamilyGuide(model, family)
        found = fit(model, guide, (X, y), num_epochs=args.steps, seed=args.seed, progress=False)
        took, value = time.perf_counter() - start, objective(model, guide, X, y)
        tree = from_pyro_svi(model, guide, X, y, num_samples=args.nuts, seed=0)
        draws = {site: torch.tensor(tree.posterior[site].values[0]) for site in nuts}
        shown = f"{value:9.2f}*{'':15s}{'':26s}"
        if row != "point":
            said, sds = evaluate(model, guide, X, y, num_samples=4000, progress=False), flat(draws)
            ratio = sds.std(0) / flat(nuts).std(0)
            shown = f"{value:9.2f} ({value.error:.2f}) {said.log_evidence:9.2f}"
            shown += f" ({said.log_evidence_se:.2f}){said.evidence_khat:7.2f}"
            shown += f"  {ratio.min():4.2f}-{ratio.max():4.2f}"
        densities[row], share = predicted(model, draws, X_test, y_test)
        verdict = "narrow" if "narrow" in found.verdict else {True: "optimum"}.get(found.converged)
        print(f"{row:10s}{shown}{densities[row].mean():13.4f}{share:7.3f}{took:5.1f} {verdict}")
    densities["NUTS"], share = predicted(model, nuts, X_test, y_test)
    print(f"{'NUTS':10s}{'':51s}{densities['NUTS'].mean():13.4f}{share:7.3f}{seconds:5.1f}")
    told = {"num_temperatures": args.temperatures, "num_chains": 64, "progress": False}
    better = annealed_importance(model, guide, X, y, **told)
    error = max(1 / better.ess.item() - 1 / 64, 0.0) ** 0.5
    print(f"log p(y) by annealing, from full rank: {better.log_evidence.item():.2f} ({error:.2f})")
    return densities


def picture(found: dict[str, dict[str, Tensor]], path: Path) -> None:
    """What each row gains over the point on the data left out, with the error of that."""
    figure = _look.empty(6.4, 3.2)
    axes = figure.subplots()
    axes.axhline(0.0, color="0.6", linewidth=1)
    for number, row in enumerate(("mean field", "full rank", "NUTS")):
        gains = [each[row] - each["point"] for each in found.values()]
        at = np.arange(len(gains)) + 0.15 * (number - 1)
        errors = [gain.std().item() / len(gain) ** 0.5 for gain in gains]
        means = [gain.mean().item() for gain in gains]
        axes.errorbar(at, means, errors, label=row, linestyle="", **_look.mark(number))
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("gain over the point, data left out\n[nats per datum, with its error]")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--nuts", type=int, default=600, help="draws, as many as of each guide")
    parser.add_argument("--steps", type=int, help="of a fit; by default as many as it takes")
    parser.add_argument("--temperatures", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/generalized"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    warnings.simplefilter("ignore", NarrowFamily)  # the table says it
    picture({name: ladder(name, args) for name in args.data}, args.out / "gains.png")
    print(f"{FOOT}\n\nThe picture is in {args.out}")


if __name__ == "__main__":
    main()
