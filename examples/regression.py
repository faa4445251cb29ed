"""The same question in regression (forty seconds; writes 75 MB to results/regression).

Full Bayesian against regularised least squares, with the same families.

From a two-channel to a one-channel to a no-channel encoder is the same move as from the full
posterior of a weight, to a regularised point, to w = 0. Data: scikit-learn's diabetes, standardised
with the mean and sd of the 342 training rows; the last 100 rows test. Noise 0.7, prior sd 0.5.

    python examples/regression.py
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import arviz_base
import arviz_stats
import numpy as np
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso, Ridge, lasso_path
from sklearn.linear_model import LinearRegression as LeastSquares

from ppvae import FamilyGuide, families, fit, from_pyro_svi, to_netcdf
from ppvae.regression import (
    LinearRegression,
    evidence_maximum,
    exact_posterior,
    log_evidence_curve,
    objective,
    plots,
    predictive_scores,
)

NOISE, PRIOR = 0.7, 0.5
NORMAL, LAPLACE = dist.Normal(0.0, PRIOR), dist.Laplace(0.0, 0.1)
#: row -> (family, prior of the weights, what it is, its twin on the ladder of autoencoders)
ROWS: dict[str, tuple[Any, Any, str, str]] = {
    "least squares": (families.deterministic, None, "a point, flat prior", "autoencoder"),
    "ridge": (families.deterministic, NORMAL, "a point, Normal prior", "regularised autoencoder"),
    "lasso": (families.deterministic, LAPLACE, "a point, Laplace prior", "sparse autoencoder"),
    "zero": (families.zero, NORMAL, "w = 0", "decoder of nothing"),
    "noise_only": (families.noise_only, NORMAL, "w from its prior", "z = eps: nothing passes"),
    "mean_only": (families.mean_only, NORMAL, "mean, width one", "z = mu(x) + eps"),
    "shared_scale": (families.shared_scale, NORMAL, "mean, one width", "mu(x) + one learned scale"),
    "mean_scale": (families.mean_scale, NORMAL, "mean field", "the usual VAE"),
    "full_rank": (families.full_rank, NORMAL, "full covariance", "full-covariance encoder"),
}

HEAD = (
    "row           objective        gap  mean off    sd ratio     RMSE  log p(test)  cover"
    "  elpd_loo  max k   twin on the ladder of autoencoders"
)
FOOT = """
* a point: the log joint density at it, which is no bound on the evidence and depends on the prior.
mean off: largest distance of a mean from the exact one, in exact sds; sd ratio: smallest and
largest sd against the exact one (noise_only and NUTS: of their draws). RMSE, log p(test) in nats
per datum, cover (share inside the 90 % interval): on the 100 test rows. elpd_loo: by PSIS on the
training data; k above 0.7: not reliable.
"""


def load(rows: int) -> tuple[torch.Tensor, ...]:
    X, y = load_diabetes(return_X_y=True)
    X, y = ((a - a[:rows].mean(0)) / a[:rows].std(0) for a in (X, y))
    X, y = torch.as_tensor(X), torch.as_tensor(y)
    return X[:rows], y[:rows], X[rows:], y[rows:]


def loo(tree: Any, *, guide: bool = False) -> Any:
    with warnings.catch_warnings():  # Pareto k, printed in the table, says what they would say
        warnings.simplefilter("ignore")
        if not guide:
            return arviz_stats.loo(tree, var_name="y", pointwise=True)
        log_p, log_q = tree.sample_stats["log_p"], tree.sample_stats["log_q"]
        return arviz_stats.loo_approximate_posterior(
            tree, log_p, log_q, var_name="y", pointwise=True
        )


def run_nuts(X: torch.Tensor, y: torch.Tensor, draws: int) -> Any:
    """An independent witness: NUTS on the same Pyro program."""
    model = LinearRegression(X.shape[1], weight=NORMAL, noise=NOISE)
    sampler = MCMC(NUTS(model, full_mass=True), num_samples=draws, warmup_steps=draws // 2)
    sampler.run(X, y)
    weight = sampler.get_samples()["weight"].numpy()
    log_y = dist.Normal(torch.as_tensor(weight) @ X.T, NOISE).log_prob(y).numpy()
    groups = {"posterior": {"weight": weight[None]}, "log_likelihood": {"y": log_y[None]}}
    groups["observed_data"] = {"y": y.numpy()}
    dims = {"weight": ["feature"], "y": ["datum"]}
    return arviz_base.from_dict(groups, dims=dims)


def fit_rows(X: torch.Tensor, y: torch.Tensor, draws: int) -> dict[str, dict[str, Any]]:
    """Fits every row: its objective, draws, means, sds, ArviZ tree and leave-one-out."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (family, prior, _, _) in ROWS.items():
        model = LinearRegression(X.shape[1], weight=prior, noise=NOISE)
        guide = FamilyGuide(model, family)
        fit(model, guide, (X, y), num_epochs=500, progress=name)
        tree = from_pyro_svi(model, guide, X, y, num_samples=draws, seed=0)
        row = {"value": objective(model, guide, X, y), "tree": tree, "point": "*"}
        row["draws"] = tree.posterior["weight"].values[0]
        row |= {"mean": row["draws"].mean(0), "sd": row["draws"].std(0)}
        if guide.heads:
            fn = guide.heads["weight"](None)
            row |= {"mean": fn.mean.detach().numpy(), "sd": fn.stddev.detach().numpy()}
        if "log_q" in tree.sample_stats:
            row |= {"point": " ", "loo": loo(tree, guide=True)}
        rows[name] = row
    return rows


def check(rows: dict[str, dict[str, Any]], X: torch.Tensor, y: torch.Tensor) -> None:
    """Prints how far the three points are from scikit-learn's."""
    options = {"fit_intercept": False, "tol": 1e-14}
    theirs = {
        "least squares": LeastSquares(fit_intercept=False),
        "ridge": Ridge(NOISE**2 / PRIOR**2, **options),
        "lasso": Lasso(NOISE**2 / 0.1 / len(X), max_iter=10**5, **options),
    }
    for name, regression in theirs.items():
        away = abs(rows[name]["mean"] - regression.fit(X, y).coef_).max()
        print(f"{name}: largest difference from scikit-learn's weights {away:.1e}")


def show(rows: dict[str, dict[str, Any]], exact: Any, X: torch.Tensor, y: torch.Tensor) -> None:
    """Prints one line per row."""
    for name, row in rows.items():
        ratio = row["sd"] / exact.sd
        off = (abs(row["mean"] - exact.mean) / exact.sd).max()
        value = f"{row['value']:.4f}" if "value" in row else ""
        gap = f"{exact.log_evidence - row['value']:.4f}" if value and row["point"] == " " else ""
        scores = predictive_scores(X, y, row["draws"], NOISE)
        psis, twin = f"{'-':>9s} {'-':>6s}", ROWS[name][3] if name in ROWS else ""
        if "loo" in row and np.isfinite(row["loo"].elpd):
            psis = f"{row['loo'].elpd:9.2f} {row['loo'].pareto_k.max().item():6.2f}"
        print(
            f"{name:13s} {value:>9s}{row['point']} {gap:>9s} {off:9.3f} {ratio.min():5.2f}-"
            f"{ratio.max():5.2f} {scores.rmse:8.4f} {scores.log_density:12.4f} "
            f"{scores.coverage:6.2f} {psis}   {twin}"
        )
    error = max(rows[name]["value"].error for name in ROWS)
    print(f"{FOOT}Largest standard error of an objective: {error:.1e} nats.\n")


def draw(
    rows: dict[str, dict[str, Any]], exact: Any, X: torch.Tensor, y: torch.Tensor, out: Path
) -> None:
    """Draws the four pictures."""
    labels = list(load_diabetes().feature_names)
    ends = {n: np.quantile(row["draws"], [0.05, 0.95], axis=0) for n, row in rows.items()}
    intervals = {name: (row["mean"], *ends[name]) for name, row in rows.items()}
    penalties, unit = np.logspace(-2, 6, 60), dist.Normal(0.0, 1.0)
    scales = NOISE / np.sqrt(penalties)
    ridge = [exact_posterior(X, y, weight=unit, scale=s, noise=NOISE).mean for s in scales]
    evidence = log_evidence_curve(X, y, scales=scales, weight=unit, noise=NOISE)
    best = evidence_maximum(X, y, weight=unit, noise=NOISE)
    peak = (NOISE**2 / best.scale**2, best.log_evidence)
    alphas, path, _ = lasso_path(X.numpy(), y.numpy(), alphas=np.geomspace(1e-4, 1.0, 60))
    lasso = (alphas * len(X), path.T)
    correlation = exact.covariance / np.outer(exact.sd, exact.sd)
    pair = list(np.unravel_index(np.argmin(correlation), correlation.shape))
    regions = {
        name: (rows[name]["mean"][pair], np.cov(rows[name]["draws"][:, pair].T))
        for name in ("mean_scale", "full_rank", "exact", "NUTS")
    }
    grid, at = np.linspace(-4, 4, 50), labels.index("bmi")
    curves = {
        name: plots.band(np.outer(grid, rows[name]["draws"][:, at]), NOISE)
        for name in ("zero", "noise_only", "mean_only", "ridge", "mean_scale", "exact")
    }
    figures = {
        "forest": plots.forest(intervals, labels),
        "paths": plots.paths((penalties, np.array(ridge)), lasso, evidence, peak, labels),
        "bands": plots.bands(
            grid, curves, (X[:, at], y), "body mass index  [sd]", target="disease progression  [sd]"
        ),
        "overconfidence": plots.overconfidence(regions, (labels[pair[0]], labels[pair[1]])),
    }
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--nuts", type=int, default=500, help="draws of NUTS")
    parser.add_argument("--out", type=Path, default=Path("results/regression"))
    (args := parser.parse_args()).out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="prior and data disagree")  # along the path
    torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other
    X, y, X_test, y_test = load(342)
    rows = fit_rows(X, y, args.draws)
    exact = exact_posterior(X, y, weight=NORMAL, noise=NOISE)
    tree, nuts = exact.to_datatree(args.draws, seed=0), run_nuts(X, y, args.nuts)
    rows["exact"] = {"value": exact.log_evidence, "mean": exact.mean, "sd": exact.sd, "tree": tree}
    drawn = nuts.posterior["weight"].values[0]
    rows["NUTS"] = {"mean": drawn.mean(0), "sd": drawn.std(0), "tree": nuts}
    for name in ("exact", "NUTS"):
        tree = rows[name]["tree"]
        rows[name] |= {"draws": tree.posterior["weight"].values[0], "point": " ", "loo": loo(tree)}

    print(f"\nLog evidence of the {len(X)} training data: {exact.log_evidence:.4f} nats\n\n{HEAD}")
    show(rows, exact, X_test, y_test)
    check(rows, X, y)
    elpd = rows["exact"]["loo"].elpd
    print(f"Exact leave-one-out: {exact.loo().total:.4f}; by PSIS on exact draws: {elpd:.2f}")
    trusted = {
        name: row["loo"]
        for name, row in rows.items()
        if "loo" in row and row["loo"].pareto_k.max() < 0.7 and np.isfinite(row["loo"].elpd)
    }
    if len(trusted) > 1:
        print("\nArviZ's comparison, of the rows with k below 0.7")
        print(arviz_stats.compare(trusted).round(2))
    draw(rows, exact, X, y, args.out)
    for name, row in rows.items():
        to_netcdf(row["tree"], args.out / f"{name.replace(' ', '_')}.nc")
    print(f"\nPictures and ArviZ files are in {args.out}")


if __name__ == "__main__":
    main()
