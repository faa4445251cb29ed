"""Whether a fit is right, and knows it (five minutes; writes results/does_it_converge).

Five posteriors, fitted by one call each, beside NUTS or the exact one.

The models are ordinary Pyro programs with global latents, their data as they come. `fit` is called
with its defaults; what it says is printed beside what is true: the largest error of a mean, in
posterior sds, and the ratios of the sds. The truth is exact where it can be (a linear regression),
else it is Pyro's NUTS.

    python examples/does_it_converge.py            # some minutes, most of them for NUTS
    python examples/does_it_converge.py --nuts 200 --families full_rank
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from ppvae import FamilyGuide, NarrowFamily, NotConverged, families, fit
from ppvae.regression import exact_posterior

SAMPLES = 4000  # draws of a guide


def eight_schools(effect: Tensor, error: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
    with pyro.plate("schools", len(effect)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * z, error), obs=effect)


def logistic(X: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=X @ w), obs=y)


def linear(X: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 100.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(torch.tensor(100.0)))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, noise), obs=y)


def hierarchical(group: Tensor, x: Tensor, y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfNormal(torch.tensor(2.0)))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(torch.tensor(2.0)))
    with pyro.plate("groups", 20):
        level = pyro.sample("level", dist.Normal(mean, spread))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(level[..., group.long()] + slope * x, noise), obs=y)


def poisson(X: Tensor, counts: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 3.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("counts", dist.Poisson((X @ w).exp()), obs=counts)


def posteriors() -> dict[str, tuple]:
    """Name -> model and data."""
    from sklearn.datasets import load_breast_cancer, load_diabetes

    random = torch.Generator().manual_seed(0)
    effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    X, y = map(np.float32, load_breast_cancer(return_X_y=True))
    cancer = torch.tensor((X - X.mean(0)) / X.std(0)), torch.tensor(y)
    raw = map(np.float32, load_diabetes(return_X_y=True, scaled=False))  # mg/dl, years, ...
    group, x = torch.arange(400.0) % 20, torch.randn(400, generator=random)
    level = torch.randn(20, generator=random)[group.long()]
    y = level + 0.5 * x + 0.3 * torch.randn(400, generator=random)
    design = torch.cat([torch.ones(200, 1), torch.randn(200, 9, generator=random)], 1)
    counts = torch.poisson((design @ torch.linspace(-0.3, 0.5, 10)).exp(), generator=random)
    return {
        "eight schools": (eight_schools, (effect, error)),
        "breast cancer": (logistic, cancer),
        "raw diabetes": (linear, tuple(map(torch.tensor, raw))),
        "20 groups": (hierarchical, (group, x, y)),
        "counts": (poisson, (design, counts)),
    }


def columns(draws: dict[str, Tensor]) -> np.ndarray:
    """Draws by site as a table with a column for each number."""
    parts = [value.detach().double().reshape(len(value), -1) for _, value in sorted(draws.items())]
    return torch.cat(parts, 1).numpy()


def truth(name: str, model, data: tuple, number: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Means and sds of the posterior, and where they come from."""
    start = time.perf_counter()
    if name == "raw diabetes":
        prior = {"weight": dist.Normal(0.0, 100.0), "noise": dist.HalfNormal(100.0)}
        exact = exact_posterior(*(v.double() for v in data), **prior)
        order = [-1, *range(data[0].shape[1])]  # the noise, then the weights
        return exact.mean[order], exact.sd[order], "exact"
    chain = MCMC(NUTS(model, max_tree_depth=8), number, warmup_steps=number, disable_progbar=True)
    chain.run(*data)
    table = columns(chain.get_samples())
    return table.mean(0), table.std(0), f"NUTS, {time.perf_counter() - start:.1f} s"


def picture(found: dict[str, dict], path: Path) -> None:
    """For each posterior the means and sds of each family, in units of the true ones."""
    import matplotlib.pyplot as plt

    plt.style.use("seaborn-v0_8-colorblind")
    figure, panels = plt.subplots(len(found), 1, figsize=(9, 2.1 * len(found)), squeeze=False)
    for axes, (name, rows) in zip(panels[:, 0], found.items(), strict=True):
        axes.axhspan(-1, 1, color="0.9", label="true mean and sd")
        for number, (family, (off, ratio)) in enumerate(rows.items()):
            at = np.arange(len(off)) + 0.2 * (number - (len(rows) - 1) / 2)
            style = {"fmt": "os^D"[number % 4], "markersize": 4, "color": f"C{number}"}
            axes.errorbar(at, off, ratio, label=family, **style)
        axes.set(title=name, ylabel="true sds", xticks=[], ylim=(-2.2, 2.2))
    panels[0, 0].legend(ncols=len(found) + 1, fontsize="small", loc="upper right")
    panels[-1, 0].set_xlabel("latents: mean and sd of each, less the true mean, over the true sd")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=["mean_scale", "low_rank", "full_rank"])
    parser.add_argument("--nuts", type=int, default=500, help="draws, after as many to warm up")
    parser.add_argument("--out", type=Path, default=Path("results/does_it_converge"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", NotConverged)  # the table says what they say
    warnings.simplefilter("ignore", NarrowFamily)
    found: dict[str, dict] = {}
    print(
        f"{'posterior':15s}{'family':12s}{'mean off':>10s}{'sd ratio':>16s}{'seconds':>9s}  verdict"
    )
    for name, (model, data) in posteriors().items():
        pyro.set_rng_seed(0)
        mean, sd, source = truth(name, model, data, args.nuts)
        print(f"{name:15s}{source}")
        for family in args.families:
            guide, start = FamilyGuide(model, getattr(families, family)), time.perf_counter()
            result = fit(model, guide, data, seed=0, progress=False)
            seconds = time.perf_counter() - start
            draws = [guide(*data) for _ in range(SAMPLES)]
            table = columns({site: torch.stack([d[site] for d in draws]) for site in draws[0]})
            off, ratio = (table.mean(0) - mean) / sd, table.std(0) / sd
            found.setdefault(name, {})[family] = off, ratio
            ratios = f"{ratio.min():.2f}-{ratio.max():.2f}"
            numbers = f"{abs(off).max():8.2f}{ratios:>16s}{seconds:9.1f}"
            print(f"{'':15s}{family:12s}{numbers}  {result.verdict}", flush=True)
    picture(found, args.out / "posteriors.png")
    print(f"\nmean off: the largest error of a mean, in sds. The picture is in {args.out}")


if __name__ == "__main__":
    main()
