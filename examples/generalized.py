"""Bits, counts, outliers and classes (three minutes; writes a picture to results/generalized).

One linear predictor, four likelihoods, and the ladder on each: the penalised maximum likelihood
that everybody uses (a point), mean field, full rank, and NUTS on the same program; and a posterior
that knows not even how large the weights are. What is each worth on data that were left out, is the
guide good enough, and how does one know? Columns are standardised by the training rows.

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
from statsmodels.datasets import grunfeld, randhie
from torch import Tensor
from torch.nn.functional import one_hot

from ppvae import FamilyGuide, NarrowFamily, _look, evaluate, fit, from_pyro_svi, likelihoods
from ppvae.regression import GeneralizedLinear, objective

UNIT = {"weight": dist.Normal(0.0, 1.0), "intercept": dist.Normal(0.0, 5.0)}
FURTHER = dist.HalfNormal(2.0)  # of the dispersion, and of the noise in sds of y
#: name -> what it is, how many rows to learn from, likelihood, further priors
DATA: dict[str, tuple[str, int, Any, Any]] = {
    "bits": ("breast cancer", 100, likelihoods.Bernoulli(), {}),
    "counts": ("visits to doctors", 200, likelihoods.NegativeBinomial(), {"dispersion": FURTHER}),
    "outliers": ("investments of firms", 40, likelihoods.StudentT(4.0), {"noise": FURTHER}),
    "classes": ("three wines", 40, likelihoods.Categorical(3), {}),
}
#: row -> family, and the factor of the prior sd of the weights
ROWS: dict[str, tuple[str, Any]] = {
    "point": ("deterministic", None),
    "mean field": ("mean_scale", None),
    "full rank": ("full_rank", None),
    "scale, too": ("full_rank", dist.HalfNormal(3.0)),
}
FOOT = """
* the log joint density at the point, which is no bound. Nats of all the training data; log p(y) by
importance sampling; errors in brackets. sd ratio: smallest and largest sd of a weight against that
of NUTS. log p(test): nats per datum that was left out. Brier: the lower, the better; cover: the
share of these data inside their 90 % intervals. scale, too: weights N(0, t^2), t unknown."""


def load(name: str, seed: int) -> list[Tensor]:
    """X and y to learn from and of at most 1,000 other rows, standardised by the first."""
    if name in ("bits", "classes"):
        X, y = (load_wine if name == "classes" else load_breast_cancer)(return_X_y=True)
    else:
        source, target = (randhie, "mdvis") if name == "counts" else (grunfeld, "invest")
        table = source.load_pandas().data.drop(columns="firm", errors="ignore")
        X, y = table.drop(columns=target).to_numpy(float), table[target].to_numpy(float)
    rows = DATA[name][1]
    order = np.random.default_rng(seed).permutation(len(X))[: rows + 1000]
    X, y = X[order], y[order] / (y[order][:rows].std() if name == "outliers" else 1.0)
    X = (X - X[:rows].mean(0)) / X[:rows].std(0)
    return [torch.as_tensor(part).double() for part in (X[:rows], y[:rows], X[rows:], y[rows:])]


def predicted(model: Any, draws: dict[str, Tensor], X: Tensor, y: Tensor) -> tuple[Tensor, float]:
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
        return log_density, (mean - one_hot(y.long())).square().sum(1).mean().item()
    low, high = np.quantile(torch.stack(values), [0.05, 0.95], axis=0)
    return log_density, np.mean((low <= y.numpy()) & (y.numpy() <= high))


def ladder(name: str, args: argparse.Namespace) -> dict[str, Tensor]:
    """Prints the table of some data; returns the log density of each datum left out, by row."""
    (words, _, likelihood, further), densities = DATA[name], {}
    X, y, *test = load(name, args.seed)
    priors, start = UNIT | further, time.perf_counter()
    model = GeneralizedLinear(X.shape[1], likelihood, **priors)
    chain = MCMC(NUTS(model, max_tree_depth=6), args.nuts, args.nuts // 2, disable_progbar=True)
    chain.run(X, y)
    nuts, seconds = chain.get_samples(), time.perf_counter() - start
    print(f"\n{name}: {words}, {X.shape[1]} columns, {len(X)} rows, {len(test[1])} to predict")
    score = "Brier" if name in ("bits", "classes") else "cover"
    print(f"{'objective':>26s}{'log p(y)':>16s}  k-hat   sd ratio  log p(test)  {score}    sec")
    for row, (family, scale) in ROWS.items():
        start = time.perf_counter()
        model = GeneralizedLinear(X.shape[1], likelihood, **priors, scale=scale)
        guide = FamilyGuide(model, family)
        found = fit(model, guide, (X, y), num_epochs=args.steps, seed=args.seed, progress=False)
        took, value = time.perf_counter() - start, objective(model, guide, X, y)
        tree = from_pyro_svi(model, guide, X, y, num_samples=args.nuts, seed=0)
        draws = {site: torch.tensor(v.values[0]) for site, v in tree.posterior.data_vars.items()}
        shown = f"{value:9.2f}*{'':41s}"
        if row != "point":
            told = evaluate(model, guide, X, y, num_samples=4000, progress=False)
            ratio = draws["weight"].std(0) / nuts["weight"].std(0)
            shown = f"{value:9.2f} ({value.error:.2f}) {told.log_evidence:9.2f}"
            shown += f" ({told.log_evidence_se:.2f}){told.evidence_khat:7.2f}"
            shown += f"  {ratio.min():4.2f}-{ratio.max():4.2f}"
        densities[row], share = predicted(model, draws, *test)
        verdict = "narrow" if "narrow" in found.verdict else "optimum" if found.converged else "no"
        print(f"{row:11s}{shown}{densities[row].mean():13.4f}{share:7.3f}{took:7.1f}  {verdict}")
    densities["NUTS"], share = predicted(model, nuts, *test)
    print(f"{'NUTS':11s}{'':51s}{densities['NUTS'].mean():13.4f}{share:7.3f}{seconds:7.1f}")
    return densities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--nuts", type=int, default=600, help="draws, as many as of each guide")
    parser.add_argument("--steps", type=int, help="of a fit; by default as many as it takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/generalized"))
    (args := parser.parse_args()).out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    warnings.simplefilter("ignore", NarrowFamily)  # the table says it
    found = {name: ladder(name, args) for name in args.data}
    figure = _look.empty(6.4, 3.2)
    axes = figure.subplots()
    axes.axhline(0.0, color="0.6", linewidth=1)
    for number, row in enumerate([*ROWS, "NUTS"][1:]):
        gains = [(each[row] - each["point"]).numpy() for each in found.values()]
        errors = [gain.std() / len(gain) ** 0.5 for gain in gains]
        at, means = np.arange(len(gains)) + 0.15 * (number - 1.5), [gain.mean() for gain in gains]
        axes.errorbar(at, means, errors, label=row, linestyle="", **_look.mark(number))
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("gain over the point, data left out\n[nats per datum, with its error]")
    axes.legend(frameon=False)
    figure.savefig(args.out / "gains.png", dpi=120)
    print(f"{FOOT}\n\nThe picture is in {args.out}")


if __name__ == "__main__":
    main()
