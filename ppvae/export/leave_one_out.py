"""Leave-one-out from draws of a guide: weighted by the posterior, and not taken for it."""

from typing import Any

import xarray as xr

from ppvae._checks import check_choice, expect
from ppvae._scopes import without_warnings

_FEWEST = 30  # draws: a tail of six, the fewest that every version of ArviZ fits


def loo(tree: xr.DataTree, *, var_name: str | None = None) -> Any:
    """The expected log density of a new datum by leave-one-out, of a tree of `from_pyro_svi`.

    Draws of global latents come from the guide, and not from the posterior: Pareto-smoothed weights
    correct for both the guide and the datum that is left out (`arviz_stats.loo`, and `compare` of
    trees, take the draws for those of the posterior). Where all latents are local, they are
    integrated out of the likelihood already, and the Pareto k is that of their weights.

    Results of several models are compared by `arviz_stats.compare`.

    Args:
        tree: a tree, with the `log_likelihood` of each datum.
        var_name: the observed site, if there are several.

    Returns:
        ArviZ's `ELPDData`, in nats of all data, with the value and the Pareto k of each datum;
        above 0.7 it is not to be trusted.

    Raises:
        TypeError: `tree` is no tree.
        ValueError: it has no likelihood of each datum, or the latents of a datum are in it; it has
            fewer than 30 draws; or there is no such site.

    Vehtari, Gelman, Gabry, Practical Bayesian model evaluation using leave-one-out
    cross-validation, 2017; Magnusson et al., Bayesian leave-one-out cross-validation for large
    data, 2019 (draws of an approximation).

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, from_pyro_svi, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, torch.nn.Linear(5, 3))
        >>> tree = from_pyro_svi(model, guide, torch.randn(20, 5), num_samples=200, seed=0)
        >>> loo(tree).elpd_i.sizes["datum"]
        20
    """
    import arviz_stats  # takes half a second

    known = isinstance(tree, xr.DataTree)
    expect(known, "tree", "a result of from_pyro_svi", type(tree).__name__, TypeError)
    known = {"log_likelihood", "sample_stats"} <= {*tree.children}
    expect(known, "tree", "a result of from_pyro_svi", f"one of {[*tree.children]}")
    stats, data = tree["sample_stats"], tree["log_likelihood"]
    dense = "log_q" in stats
    expect(dense, "tree", "draws of a guide with a density", "those of a point")
    local = "datum" in stats["log_q"].dims
    whole = data.attrs.get("pointwise") == "datum"
    inside = local and whole and data.attrs.get("latents") != "integrated out"
    what = "the likelihood given the latents of each datum, in a model with a scale"
    expect(not inside, "tree", "latents of each datum that are integrated out", what)
    count = stats["log_q"].sizes["chain"] * stats["log_q"].sizes["draw"]
    expect(count >= _FEWEST, "tree", f"at least {_FEWEST} draws", count)
    names = [str(name) for name, each in data.data_vars.items() if each.ndim > 2]
    if var_name is None:
        expect(len(names) == 1, "var_name", f"one of {names}, which have data in a plate", None)
        (var_name,) = names
    check_choice("var_name", var_name, names)
    tree = _observed(tree, var_name)
    how: dict[str, Any] = {"var_name": var_name, "pointwise": True}
    with without_warnings():  # the Pareto k says how far to trust it
        if local:
            return arviz_stats.loo(tree, **how)
        return arviz_stats.loo_approximate_posterior(tree, stats["log_p"], stats["log_q"], **how)


def _observed(tree: xr.DataTree, name: str) -> xr.DataTree:
    """The tree without the data that have no likelihood, of which nothing is observed."""
    values = tree["log_likelihood"][name]
    dims = [dim for dim in values.dims if dim not in ("chain", "draw")]
    seen = values.notnull().all(["chain", "draw"])
    if bool(seen.all()):
        return tree
    rows = values.stack(left=dims).isel(left=seen.stack(left=dims).values)  # noqa: PD013
    rows = rows.reset_index("left", drop=True).rename(left=f"{name}_seen")
    groups = {"posterior": tree["posterior"], "sample_stats": tree["sample_stats"]}
    return xr.DataTree.from_dict({**groups, "log_likelihood": xr.Dataset({name: rows})})
