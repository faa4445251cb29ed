"""What the arrays of a tree are called, and how they are laid out as its groups."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from ppvae.export.constants import Constants
from ppvae.export.names import Dims, Groups, Stack, check_names, free_dims, stacks_of
from ppvae.export.sites import Sites
from ppvae.export.tree import dataset_of
from ppvae.programs.nodes import is_data


@dataclass(frozen=True)
class Description:
    """What the arrays of a tree are called; made by `described`.

    Attributes:
        dims: variable -> dims behind the draws.
        own: group -> dims of its variables, where they are others.
        given: variable -> dims, as the user has them.
        coords: dim -> coordinates.
        stacks: sites that are one variable.
        flat: observed sites whose numbers run along one dim.
        attrs: group -> attributes.
    """

    dims: Dims
    own: Mapping[str, Dims]
    given: Dims
    coords: Mapping[str, Any]
    stacks: list[Stack]
    flat: list[str]
    attrs: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def arranged(self, groups: Groups) -> Groups:
        """Arrays by group and variable, from those by site."""
        for stack in self.stacks:
            stack.put(groups)
        for group in groups.values():
            for name in self.flat:
                if name in group:
                    group[name] = group[name].reshape(len(group[name]), -1)
        return groups

    def dataset(self, group: str, values: Mapping[str, np.ndarray]) -> xr.Dataset:
        """A group of the tree; see `dataset_of`."""
        dims = {**self.own.get(group, self.dims), **self.given}
        return dataset_of(group, values, dims, self.coords, self.attrs)

    def datasets(self, groups: Groups) -> dict[str, xr.Dataset]:
        """The groups that have anything."""
        return {key: self.dataset(key, values) for key, values in groups.items() if values}


def described(
    sites: Sites,
    names: Dims,
    constants: Mapping[str, Constants],
    tables: Mapping[str, Any],
    coords: Mapping[str, Any],
    dims: Dims,
    stack: Any,
    *,
    by_element: bool,
) -> Description:
    """Names all variables and dims of a tree.

    Args:
        sites: the variables.
        names: site -> dims; see `dims_of`.
        constants: group -> what it has of arguments, of which the later ones count.
        tables: dim -> coordinates, of tables that are observed.
        coords: dim -> coordinates, as the user has them.
        dims: variable -> dims, as the user has them.
        stack: which sites are one variable; see `stacks_of`.
        by_element: whether the numbers of data run along one dim.

    Raises:
        TypeError, ValueError: a name is unknown, or taken.
    """
    stacks, names, steps = stacks_of(names, sites.events, stack)
    flat = []
    if by_element:  # of data that are vectors, or stand in several plates
        seen = [node["name"] for node in sites.nodes if is_data(node)]
        flat = [name for name in seen if len(names.get(name, [])) > 1]
        names |= {name: [f"{name}_element"] for name in flat}
    own = {key: each.dims for key, each in constants.items()}
    check_names(_merged([*own.values(), names]), coords, dims)
    own["unconstrained_posterior"] = names | free_dims(sites, names)
    known = _merged([*(each.coords for each in constants.values()), tables, steps, coords])
    return Description(names, own, dims, known, stacks, flat)


def _merged(mappings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All that mappings have, of which the later ones count."""
    return {key: value for each in mappings for key, value in each.items()}
