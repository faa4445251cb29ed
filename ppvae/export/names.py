"""Names of variables, dims and coordinates: those that are made, those of tables, those given."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ppvae._checks import expect
from ppvae.data.adapters import Form
from ppvae.data.tables import labels_of
from ppvae.families.rules import support_of
from ppvae.programs.nodes import (
    Node,
    from_reals,
    is_data,
    is_inside,
    latent_nodes,
    plates_of,
    space_of,
)
from ppvae.programs.runs import Args

Dims = dict[str, list[str]]
Groups = dict[str, dict[str, np.ndarray]]

#: the groups that can be asked for
GROUPS = (
    "posterior",
    "unconstrained_posterior",
    "posterior_predictive",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
)
DRAWN = ["chain", "draw"]  # the dims that every variable of a draw has
STATS = ["log_p", "log_q", "log_weight"]  # the variables that are no sites
JOINT = "joint"  # the log likelihood of several sites together


def mapping(name: str, given: Any) -> dict[str, Any]:
    """`coords` or `dims`, where each name comes with a sequence, and a word is none."""
    given = {} if given is None else given
    fits = isinstance(given, Mapping) and all(np.ndim(values) == 1 for values in given.values())
    expect(fits, name, "a mapping from names to sequences", repr(given), TypeError)
    return dict(given)


def chosen(groups: Any) -> frozenset[str]:
    """The names of groups that are asked for, all of them by None."""
    if groups is None:
        return frozenset(GROUPS)
    words = isinstance(groups, (list, tuple, set, frozenset))
    words = words and all(isinstance(name, str) for name in groups)
    expect(words, "groups", "a list of names of groups", repr(groups), TypeError)
    unknown = [name for name in groups if name not in GROUPS]
    expect(not unknown, "groups", f"names among {[*GROUPS]}", unknown)
    return frozenset(groups)


def dims_of(
    nodes: Sequence[Node], trace: Any, plate: Any, events: Mapping[str, int], *, local: bool
) -> Dims:
    """Variable -> names of its dims behind `chain` and `draw`.

    Args:
        nodes: the sites that are variables.
        trace: of the model.
        plate: the data plate.
        events: number of event dims of each site.
        local: whether the densities are those of each datum.
    """
    latents = latent_nodes(trace)
    dims: Dims = {name: ["datum"] * local for name in STATS}
    clash = [node["name"] for node in nodes if node["name"] in STATS]
    expect(not clash, "model", f"sites of other names than {STATS}", clash)
    frames = {f.name for node in nodes for f in plates_of(node).values()} - {
        getattr(plate, "name", None)
    }
    clash = sorted(frames & {*DRAWN, "datum", "latent"})
    expect(not clash, "model", f"plates of other names than {[*DRAWN, 'datum', 'latent']}", clash)
    for node in nodes:
        name, plates = node["name"], sorted(plates_of(node).values(), key=lambda each: each.dim)
        inside, data = is_inside(node, plate), getattr(plate, "name", None)
        dims[name] = ["datum"] * inside + [p.name for p in plates if p.name != data]
        if events[name] == 1 and len(latents) == 1 and node is latents[0]:
            dims[name].append("latent")
        else:
            dims[name] += [f"{name}_dim_{i}" for i in range(events[name])]
    return dims


def free_dims(trace: Any, names: Dims, events: Mapping[str, int]) -> Dims:
    """The dims of latents on the reals, which have names of their own where these are others."""
    dims = {}
    for node in latent_nodes(trace):
        name, fn = node["name"], node["fn"]
        if fn.support.is_discrete or name not in names:
            continue
        with suppress(NotImplementedError):
            space = space_of(from_reals(support_of(fn)), fn.batch_shape, fn.event_shape)
            if space != fn.event_shape:
                plates = names[name][: len(names[name]) - events[name]]
                dims[name] = [*plates, *(f"{name}_free_{i}" for i in range(len(space)))]
    return dims


def check_names(names: Dims, coords: Mapping[str, Any], dims: Dims) -> None:
    """Refuses names that ArviZ would ignore, or that xarray would take for others."""
    unknown = [name for name in dims if name not in names]
    expect(not unknown, "dims", f"variables among {list(names)}", unknown)
    for name, given in dims.items():
        twice = [dim for dim in given if [*DRAWN, *given].count(dim) > 1]
        expect(not twice, "dims", f"names for {name!r} that differ, also from {DRAWN}", twice)
        right = len(given) == len(names[name])
        expect(right, "dims", f"{len(names[name])} names for {name!r}", list(given))
    used = {*DRAWN}.union(*{**names, **dims}.values())
    unknown = [dim for dim in coords if dim not in used]
    expect(not unknown, "coords", f"dims among {sorted(used)}", unknown)
    sites = [name for name in names if name not in STATS]
    clash = [name for name in sites if name in used]
    expect(not clash, "model", f"sites of other names than the dims {sorted(used)}", clash)
    paths = [name for name in [*sites, *used] if "/" in name]
    expect(not paths, "model", "names without '/', which separates the groups of a tree", paths)


def table_coords(
    nodes: Sequence[Node], args: Args, form: Form, names: Dims, renamed: Dims
) -> dict[str, Any]:
    """The names of the rows and columns of a table that is observed, by dim."""
    found: dict[str, Any] = {}
    for node in nodes:
        name = node["name"]
        if is_data(node) and node["value"].dim() == 2 and name not in renamed:
            labels = labels_of(args, node["value"].shape, form)
            for dim, told in zip(names[name], (labels.rows, labels.columns), strict=False):
                if told is not None:
                    found[dim] = told
    return found


def stacked(
    groups: Groups, names: Dims, events: Mapping[str, int], stack: Any
) -> tuple[Groups, Dims, dict[str, Any]]:
    """Puts sites `z_0`, `z_1`, ... side by side, as one variable with a dim for the steps.

    Args:
        groups: arrays by group and variable, with the dims of `names` last.
        names: variable -> dims.
        events: number of event dims of each site, in front of which the steps go.
        stack: from the stem of the names to the name of the dim.

    Returns:
        Groups and names in which the stems stand for the sites, and the steps as coordinates.
    """
    words = isinstance(stack, Mapping) and all(
        isinstance(word, str) for pair in stack.items() for word in pair
    )
    wanted = "a mapping from the stems of names of sites, as 'z' of z_0, to the names of dims"
    expect(words, "stack", wanted, repr(stack), TypeError)
    names, coords = dict(names), dict[str, Any]()
    for stem, dim in stack.items():
        found = {int(m[1]): m[0] for m in (re.fullmatch(rf"{stem}_(\d+)", n) for n in names) if m}
        steps = sorted(found)
        expect(steps, "stack", f"a stem of the sites {list(names)}", stem)
        sites = [found[step] for step in steps]
        alone = stem not in names or stem in sites
        expect(alone, "stack", f"a stem that is no site itself, in {list(names)}", stem)
        dims = [[d.replace(site, stem, 1) for d in names.pop(site)] for site in sites]
        alike = all(each == dims[0] for each in dims)
        expect(alike, "stack", f"sites {sites} in the same plates, of one shape", dims)
        before = len(dims[0]) - events[sites[0]]
        names[stem] = [*dims[0][:before], dim, *dims[0][before:]]
        for group, values in groups.items():
            arrays = [values.pop(site) for site in sites if site in values]
            if arrays:
                shapes = {array.shape for array in arrays}
                whole = len(arrays) == len(sites) and len(shapes) == 1
                expect(whole, "stack", f"sites {sites} of one shape in {group!r}", sorted(shapes))
                axis = arrays[0].ndim - events[sites[0]]
                groups[group][stem] = np.stack(arrays, axis)
        known = coords.setdefault(dim, steps)
        expect(known == steps, "stack", f"as many sites {stem!r} as others along {dim!r}", steps)
    return groups, names, coords


def by_number(groups: Groups, names: Dims, nodes: Sequence[Node]) -> tuple[Groups, Dims]:
    """Puts the numbers of data that are vectors, or stand in several plates, along one dim."""
    names = dict(names)
    for name in [node["name"] for node in nodes if is_data(node)]:
        if len(names.get(name, [])) < 2:
            continue
        names[name] = [f"{name}_element"]
        for group in groups.values():
            if name in group:
                group[name] = group[name].reshape(len(group[name]), -1)
    return groups, names
