"""Every function of ArviZ that applies, on trees of four models; plots where ArviZ has them."""

import warnings

import arviz_base
import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

from ppvae import (
    VAE,
    Block,
    FamilyGuide,
    calibration,
    concat_chains,
    evaluate,
    from_pyro_svi,
    likelihoods,
    loo,
    to_netcdf,
)
from ppvae.nn import mlp

ROWS, DRAWS = 25, 300


class Rows(torch.nn.Module):
    """An encoder of numbers, as rows of one column."""

    def __init__(self):
        super().__init__()
        self.net = mlp(1, 8)

    def forward(self, x):
        return self.net(x[:, None])


def regression(X, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(X), dim=-1):
        mu = pyro.deterministic("mu", (X * w).sum(-1))
        pyro.sample("y", dist.Normal(mu, s), obs=y)


def counts(X, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(X), dim=-1):
        rate = a + (X * w).sum(-1)
        pyro.sample("y", dist.Poisson(rate.exp()), obs=y)


def hierarchy(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


for program in (regression, counts):
    program.vectorized = True


def trees():
    """Name -> tree; the guides are as they are made, since it is names and shapes that count."""
    torch.manual_seed(0)
    X = torch.randn(ROWS, 2)
    y = X.sum(-1) + torch.randn(ROWS)
    told = {"seed": 0, "num_samples": DRAWS}
    guide = FamilyGuide(regression, {("w", "s"): "full_rank"}).setup(X, y)
    ranked = calibration(
        regression, guide, X, y, refit=lambda *_: None, num_simulations=5, num_samples=39,
        progress=False,
    )  # fmt: skip
    found = {
        "regression": from_pyro_svi(
            regression, guide, X, y, predictions=(torch.randn(4, 2), None), calibration=ranked,
            evaluation=evaluate(regression, guide, X, y, num_samples=40), **told,
        )
    }  # fmt: skip
    y = dist.Poisson(torch.exp(X.sum(-1) / 2)).sample()
    found["counts"] = from_pyro_svi(counts, FamilyGuide(counts, "full_rank"), X, y, **told)
    by_site = {("mu", "tau"): "full_rank", "z": Block("mean_scale", given=["mu"])}
    guide = FamilyGuide(hierarchy, by_site, Rows())
    found["hierarchy"] = from_pyro_svi(hierarchy, guide, X[:, 0], **{**told, "num_inner": 2})
    model = VAE(mlp(2, 8, out=4), 2, likelihoods.Bernoulli())
    x = (torch.rand(ROWS, 4) > 0.5).double()
    guides = [FamilyGuide(model, "mean_scale", mlp(4, 8)) for _ in range(2)]
    alone = [from_pyro_svi(model, guide, x, **told) for guide in guides]
    found |= {"vae": alone[0], "chains": concat_chains(alone)}
    found["numbers"] = from_pyro_svi(model, guides[0], x, pointwise="element", **told)
    return found


@pytest.fixture(scope="module")
def made():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield trees()
    torch.set_default_dtype(before)


EVERY = ["regression", "counts", "hierarchy", "vae", "chains", "numbers"]
GLOBAL = ["regression", "counts", "hierarchy"]
OF_NUMBERS = ["regression", "counts", "hierarchy", "numbers"]
DATA = {"regression": "y", "counts": "y"}

#: a function of ArviZ -> the trees that it is for, and its arguments beside the tree
CALLS = {
    "summary": (EVERY, {}),
    "ess": (EVERY, {}),
    "rhat": (EVERY, {}),
    "mcse": (EVERY, {}),
    "hdi": (EVERY, {}),
    "eti": (EVERY, {}),
    "qds": (EVERY, {}),
    "kde": (EVERY, {}),
    "histogram": (EVERY, {}),
    "mean": (EVERY, {}),
    "median": (EVERY, {}),
    "mode": (EVERY, {}),
    "std": (EVERY, {}),
    "var": (EVERY, {}),
    "mad": (EVERY, {}),
    "iqr": (EVERY, {}),
    "thin": (EVERY, {}),
    "ci_in_rope": (EVERY, {"rope": (-1, 1)}),
    "rhat_nested": (["chains"], {"superchain_ids": [0, 1]}),
    "diagnose": (EVERY, {}),
    "loo": (EVERY, {"pointwise": True}),
    "loo_expectations": (OF_NUMBERS, {}),
    "loo_metrics": (OF_NUMBERS, {}),
    "loo_pit": (OF_NUMBERS, {}),
    "loo_r2": (GLOBAL, {"var_name": None}),
    "loo_score": (OF_NUMBERS, {}),
    "loo_influence": (GLOBAL, {}),
    "metrics": (OF_NUMBERS, {}),
    "psense": (GLOBAL, {}),
    "psense_summary": (GLOBAL, {}),
    "get_log_likelihood": (EVERY, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(CALLS))
def test_every_function_takes_the_trees(name, made):
    function = getattr(arviz_stats, name, None)
    if function is None:
        pytest.skip("this ArviZ has no such function")
    takers, told = CALLS[name]
    for tree in takers:
        own = {k: DATA.get(tree, "x") if k == "var_name" else v for k, v in told.items()}
        function(made[tree], **own)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_trees_are_compared_extracted_and_kept(name, made, tmp_path):
    tree = made[name]
    assert len(arviz_stats.compare({"one": loo(tree), "other": loo(tree)})) == 2
    arviz_stats.compare({"one": tree, "other": tree})
    for function in (arviz_stats.kl_divergence, arviz_stats.wasserstein):
        function(tree, tree, num_samples=100)
    arviz_stats.loo_i(0, tree)
    arviz_stats.weight_predictions([tree, tree], weights=[0.5, 0.5])
    for group in ("prior", "posterior_predictive", "prior_predictive", "posterior"):
        assert arviz_base.extract(tree, group=group).sizes["sample"] >= DRAWS
    if name == "regression":
        assert arviz_base.extract(tree, group="predictions").sizes == {"datum": 4, "sample": DRAWS}
    to_netcdf(tree, tmp_path / "tree.nc")
    with xr.open_datatree(tmp_path / "tree.nc") as again:
        for group in tree.children:
            assert again[group].to_dataset().load().equals(tree[group].to_dataset())
            assert dict(again[group].attrs) == dict(tree[group].attrs)


def test_unconstrained_draws_are_those_on_the_reals(made):
    tree = made["regression"]
    assert np.allclose(tree.unconstrained_posterior["s"], np.log(tree.posterior["s"]))
    assert np.array_equal(tree.unconstrained_posterior["w"], tree.posterior["w"])
    assert "unconstrained_posterior" not in made["vae"].children
    if hasattr(arviz_base, "get_unconstrained_samples"):
        found = arviz_base.get_unconstrained_samples(tree, return_dataset=True)
        assert np.allclose(found["s"], np.log(tree.posterior["s"]))


#: those that draw one picture of a whole tree -> the trees and the arguments
PICTURES = {
    "plot_dist": (GLOBAL, "posterior"),
    "plot_forest": (GLOBAL, "posterior"),
    "plot_ridge": (GLOBAL, "posterior"),
    "plot_trace": (GLOBAL, "posterior"),
    "plot_trace_dist": (GLOBAL, "posterior"),
    "plot_rank": (["chains"], "one"),
    "plot_rank_dist": (["chains"], "one"),
    "plot_autocorr": (GLOBAL, "posterior"),
    "plot_ess": (GLOBAL, "posterior"),
    "plot_ess_evolution": (GLOBAL, "posterior"),
    "plot_mcse": (GLOBAL, "posterior"),
    "plot_pair": (GLOBAL, "posterior"),
    "plot_parallel": (GLOBAL, "posterior"),
    "plot_prior_posterior": (GLOBAL, "posterior"),
    "plot_psense_dist": (GLOBAL, "posterior"),
    "plot_psense_quantities": (GLOBAL, "posterior"),
    "plot_ecdf_pit": (["regression"], None),
    "plot_lm": (["regression"], "lm"),
    "plot_ppc_dist": (OF_NUMBERS, None),
    "plot_ppc_pit": (OF_NUMBERS, None),
    "plot_ppc_dist_pit": (OF_NUMBERS, None),
    "plot_ppc_interval": (OF_NUMBERS, None),
    "plot_ppc_tstat": (EVERY, None),
    "plot_ppc_rootogram": (["counts", "numbers"], None),
    "plot_ppc_pava": (["numbers"], None),
    "plot_loo_pit": (OF_NUMBERS, None),
    "plot_loo_interval": (OF_NUMBERS, None),
    "plot_loo_pava": (["numbers"], None),
    "plot_khat": (EVERY, "khat"),
}
SITES = {"regression": ["w", "s"], "counts": ["w", "a"], "hierarchy": ["mu", "tau"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(PICTURES))
def test_every_plot_takes_the_trees(name, made):
    plots = pytest.importorskip("arviz_plots", minversion="1.0")
    import matplotlib.pyplot as plt

    takers, how = PICTURES[name]
    for taker in takers:
        tree, told = made[taker], {"backend": "matplotlib"}
        if how == "posterior":
            told["var_names"] = SITES[taker]
        if how == "one":
            told |= {"var_names": ["z"], "coords": {"datum": [0]}}
        if how == "lm":
            tree = tree.assign({})
            tree["constant_data"] = xr.DataTree(
                xr.Dataset({"x": tree.constant_data["X"][:, 0].drop_vars("X_dim_1")})
            )
            told |= {"x": "x", "y": "y"}
        getattr(plots, name)(loo(tree) if how == "khat" else tree, **told)
        plt.close("all")
