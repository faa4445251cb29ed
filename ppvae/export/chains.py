"""Runs over seeds, side by side as the chains of one ArviZ tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr


def concat_chains(trees: Sequence[xr.DataTree]) -> xr.DataTree:
    """Puts runs over seeds side by side, as the chains of one tree.

    Latents of different runs need not mean the same (they can be turned and swapped); what can be
    compared are log-likelihoods, predictions, and `evaluation`, which gets a `chain` dim too.

    Args:
        trees: results of `from_pyro_svi` for the same data, one or more chains each.

    Returns:
        One tree; groups without draws (`observed_data`) are those of the first.

    Raises:
        ValueError: there are no trees, or their groups, variables or sizes differ.
    """
    if not trees:
        raise ValueError("trees: expected at least one tree, got none")
    first, groups = trees[0], {}
    counts = [tree["posterior"].sizes["chain"] for tree in trees]
    for name in first.children:
        pieces = []
        for tree, count in zip(trees, counts, strict=True):
            if set(tree.children) != set(first.children):
                raise ValueError(
                    f"trees: expected the groups {sorted(first.children)}, got "
                    f"{sorted(tree.children)}"
                )
            piece = tree[name].to_dataset()
            if name == "evaluation" and "chain" not in piece.dims:
                piece = piece.expand_dims(chain=np.arange(count))
            pieces.append(piece)
            if _sizes(pieces[0]) != _sizes(piece):
                raise ValueError(f"trees: expected equal variables and sizes in {name!r}")
        if "chain" in pieces[0].dims:
            joined = xr.concat(pieces, "chain", join="override", combine_attrs="drop_conflicts")
            groups[name] = joined.assign_coords(chain=np.arange(sum(counts)))
        else:
            groups[name] = pieces[0]
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = dict(first.attrs)
    return tree


def _sizes(data: xr.Dataset) -> dict[Any, dict[Any, int]]:
    """The size of each variable along its dims, `chain` left out."""
    return {
        name: {dim: size for dim, size in variable.sizes.items() if dim != "chain"}
        for name, variable in data.data_vars.items()
    }
