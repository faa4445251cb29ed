"""Runs over seeds, side by side as the chains of one ArviZ tree."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from ppvae._checks import expect


def concat_chains(trees: Sequence[xr.DataTree]) -> xr.DataTree:
    """Puts runs over seeds side by side, as the chains of one tree.

    Latents of different runs need not mean the same (they can be turned and swapped); what can be
    compared are log-likelihoods, predictions, and `evaluation`, which gets a dim `chain` too.

    Args:
        trees: results of `from_pyro_svi` for the same data, one or more chains each.

    Returns:
        One tree; groups without draws (`observed_data`) are those of the first.

    Raises:
        ValueError: there are no trees, or their groups, variables, sizes or data differ.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, from_pyro_svi, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, torch.nn.Linear(5, 3))
        >>> x = torch.randn(20, 5)
        >>> trees = [from_pyro_svi(model, guide, x, num_samples=9, seed=seed) for seed in (0, 1)]
        >>> concat_chains(trees)["posterior"].sizes["chain"]
        2
    """
    several = isinstance(trees, (list, tuple))
    several = several and all(isinstance(tree, xr.DataTree) for tree in trees)
    expect(several, "trees", "a list of trees", type(trees).__name__, TypeError)
    expect(trees, "trees", "at least one tree", "none")
    wanted, groups = sorted(trees[0].children), {}
    for tree in trees:
        came = sorted(tree.children)
        expect(came == wanted, "trees", f"the groups {wanted}", came)
    for name in trees[0].children:
        pieces = [_with_chains(tree, name) for tree in trees]
        alike = all(_sizes(piece) == _sizes(pieces[0]) for piece in pieces)
        expect(alike, "trees", f"equal variables and sizes in {name!r}", "others")
        if "chain" in pieces[0].dims:
            joined = xr.concat(pieces, "chain", join="override", combine_attrs="drop_conflicts")
            groups[name] = joined.assign_coords(chain=np.arange(joined.sizes["chain"]))
        else:
            same = all(piece.equals(pieces[0]) for piece in pieces)
            expect(same, "trees", f"the same data in {name!r}", "others")
            groups[name] = pieces[0]
    joined_tree = xr.DataTree.from_dict(groups)
    joined_tree.attrs = dict(trees[0].attrs)
    return joined_tree


def _with_chains(tree: xr.DataTree, name: str) -> xr.Dataset:
    """A group of a tree; an evaluation without chains counts for each chain of the tree."""
    group = tree[name].to_dataset()
    if name == "evaluation" and "chain" not in group.dims:
        return group.expand_dims(chain=np.arange(tree["posterior"].sizes["chain"]))
    return group


def _sizes(data: xr.Dataset) -> dict[Any, dict[Any, int]]:
    """The size of each variable along its dims, `chain` left out."""
    return {
        name: {dim: size for dim, size in variable.sizes.items() if dim != "chain"}
        for name, variable in data.data_vars.items()
    }
