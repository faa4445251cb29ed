"""Names of variables, dims and coordinates: those that are made, those of tables, those given."""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from ppvae._checks import expect
from ppvae.data.adapters import Form
from ppvae.data.tables import labels_of
from ppvae.export.sites import Sites
from ppvae.families.rules import support_of
from ppvae.programs.nodes import is_data, latent_nodes
from ppvae.programs.plates import is_inside, plates_of
from ppvae.programs.supports import from_reals, space_of
from ppvae.programs.tracing import Args

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


def dims_of(sites: Sites) -> Dims:
    """Variable -> names of its dims behind `chain` and `draw`.

    Raises:
        ValueError: a site or a plate has a name that is taken.
    """
    nodes, plate = sites.nodes, sites.plate
    latents = latent_nodes(sites.trace)
    dims: Dims = {name: ["datum"] * sites.local for name in STATS}
    clash = [node["name"] for node in nodes if node["name"] in STATS]
    expect(not clash, "model", f"sites of other names than {STATS}", clash)
    data = getattr(plate, "name", None)
    frames = {frame.name for node in nodes for frame in plates_of(node).values()} - {data}
    clash = sorted(frames & {*DRAWN, "datum", "latent"})
    expect(not clash, "model", f"plates of other names than {[*DRAWN, 'datum', 'latent']}", clash)
    for node in nodes:
        name, plates = node["name"], sorted(plates_of(node).values(), key=lambda each: each.dim)
        dims[name] = ["datum"] * is_inside(node, plate) + [p.name for p in plates if p.name != data]
        if sites.events[name] == 1 and len(latents) == 1 and node is latents[0]:
            dims[name].append("latent")
        else:
            dims[name] += [f"{name}_dim_{i}" for i in range(sites.events[name])]
    return dims


def free_dims(sites: Sites, names: Dims) -> Dims:
    """The dims of latents on the reals, which have names of their own where these are others."""
    dims = {}
    for node in latent_nodes(sites.trace):
        name, fn = node["name"], node["fn"]
        if fn.support.is_discrete or name not in names:
            continue
        with suppress(NotImplementedError):
            space = space_of(from_reals(support_of(fn)), fn.batch_shape, fn.event_shape)
            if space != fn.event_shape:
                plates = names[name][: len(names[name]) - sites.events[name]]
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
    sites: Sites, names: Dims, renamed: Dims, args: Args, form: Form
) -> dict[str, Any]:
    """The names of the rows and columns of a table that is observed, by dim.

    Args:
        sites: the variables.
        names: variable -> dims.
        renamed: variable -> dims, as the user has them, who names their coordinates, too.
        args: the data as they came.
        form: of the data that the pair takes.
    """
    found: dict[str, Any] = {}
    for node in sites.nodes:
        name = node["name"]
        if is_data(node) and node["value"].dim() == 2 and name not in renamed:
            labels = labels_of(args, node["value"].shape, form)
            for dim, told in zip(names[name], (labels.rows, labels.columns), strict=False):
                if told is not None:
                    found[dim] = told
    return found


class Stack(NamedTuple):
    """Sites `z_0`, `z_1`, ... that are one variable, with a dim for the steps.

    Attributes:
        stem: the name of the variable.
        sites: their names, in the order of the steps.
        events: number of event dims of each, in front of which the steps go.
    """

    stem: str
    sites: list[str]
    events: int

    def put(self, groups: Groups) -> None:
        """Puts the arrays of the sites side by side, in each group that has any.

        Raises:
            ValueError: they are of several shapes.
        """
        for group, values in groups.items():
            arrays = [values.pop(site) for site in self.sites if site in values]
            if arrays:
                shapes = {array.shape for array in arrays}
                whole = len(arrays) == len(self.sites) and len(shapes) == 1
                wanted = f"sites {self.sites} of one shape in {group!r}"
                expect(whole, "stack", wanted, sorted(shapes))
                values[self.stem] = np.stack(arrays, arrays[0].ndim - self.events)


def stacks_of(
    names: Dims, events: Mapping[str, int], stack: Any
) -> tuple[list[Stack], Dims, dict[str, Any]]:
    """The sites that are to be one variable.

    Args:
        names: variable -> dims.
        events: number of event dims of each site.
        stack: from the stem of the names to the name of the dim, or None.

    Returns:
        The stacks, the names with the stems in place of their sites, and the steps as coordinates.

    Raises:
        ValueError: there are no such sites, or they have not the same dims.
    """
    stack = {} if stack is None else stack
    words = isinstance(stack, Mapping) and all(
        isinstance(word, str) for pair in stack.items() for word in pair
    )
    wanted = "a mapping from the stems of names of sites, as 'z' of z_0, to the names of dims"
    expect(words, "stack", wanted, repr(stack), TypeError)
    names, coords, stacks = dict(names), dict[str, Any](), []
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
        known = coords.setdefault(dim, steps)
        expect(known == steps, "stack", f"as many sites {stem!r} as others along {dim!r}", steps)
        stacks.append(Stack(stem, sites, events[sites[0]]))
    return stacks, names, coords
