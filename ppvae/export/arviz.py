"""From a Pyro model and its guide to ArviZ: draws, predictions and densities in one tree."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import arviz_base
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._checks import check_count, expect
from ppvae._process import exclusive
from ppvae.data.adapters import Form, form_of
from ppvae.data.tables import labels_of
from ppvae.objectives.trace_terms import terms
from ppvae.programs.layout import Place
from ppvae.programs.missing import observed_entries
from ppvae.programs.nodes import (
    Node,
    depth_of,
    is_data,
    is_inside,
    latent_nodes,
    per_datum,
    plates_of,
    prototype,
)
from ppvae.programs.runs import Args, Runs, opened, run_trace, with_discrete
from ppvae.programs.simulation import Uncondition
from ppvae.programs.verdicts import verdict_of

Groups = dict[str, dict[str, np.ndarray]]
Dims = dict[str, list[str]]

_DRAWN = ["chain", "draw"]  # the dims that every variable of a draw has
_STATS = ["log_p", "log_q"]  # the variables that are no sites


@exclusive
def from_pyro_svi(  # noqa: D417
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = None,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    evaluation: xr.Dataset | None = None,
) -> xr.DataTree:
    r"""Draws from a fitted guide and lays out what ArviZ works with.

    Works for every model and guide with local latents (in the data plate), global ones, or both.
    The groups of the tree, each with dims `chain` and `draw`:

    - `posterior`: draws of the guide, and the model's deterministic sites; its attributes
      `verdict` and `converged` are those of the last `fit`, if there was one;
    - `posterior_predictive`: the observed sites drawn anew, given those draws;
    - `log_likelihood`: log p(x | z) per datum, in nats, whatever `poutine.scale` says; NaN for one
      of which all entries are missing, which ArviZ's `loo` is to be told nothing of;
    - `sample_stats`: `log_p` = log p(x, z), in which `poutine.scale` counts, and `log_q` = log q(z)
      of the draws, per datum where all latents are local and one number per draw otherwise, as
      `loo_approximate_posterior` wants them (there is no `log_q` for a point guide, which has no
      density);
    - `prior` and `prior_predictive`: draws of the model alone, its observations taken off (left
      out where a prior is improper);
    - `observed_data`, without the two dims; NaN where an entry is missing;
    - `evaluation`, without the two dims: the result of `evaluate`, if it is given.

    The data plate is the dim `datum`, and the coordinates of a single latent vector `latent`. A
    table that is observed gives the names of its rows and columns as coordinates.
    Local latents are drawn in minibatches. Nothing is trained or changed.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments.
        num_samples: number of draws, at least 1.
        coords: coordinate values by dim.
        dims: names of the dims after `chain` and `draw` by variable, in place of the names above.
        seed: seeds the draws, and leaves the caller's stream where it was; None, as in all
            functions that draw, uses that stream.
        evaluation: a result of `evaluate`, of any data, to join the tree.
        batch_size, vectorized, plate, kwargs: as for `evaluate`.

    Returns:
        A tree in ArviZ's schema; on arviz 0.x, `arviz.from_datatree` gives `InferenceData`.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of its range, `coords` or `dims` have a name that is not in
            the tree, a site has the name of a dim or one with "/" in it, the data are not finite or
            not in the support of their likelihood, guide and model do not fit, or the model draws
            its own subsample.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, torch.nn.Linear(5, 3))
        >>> tree = from_pyro_svi(model, guide, torch.randn(20, 5), num_samples=100)
        >>> tree["posterior/z"].dims
        ('chain', 'draw', 'datum', 'latent')
    """
    num_samples = check_count("num_samples", num_samples)
    coords, renamed = (
        _named("coords", coords),
        {k: list(v) for k, v in _named("dims", dims).items()},
    )
    known = evaluation is None or isinstance(evaluation, xr.Dataset)
    got = type(evaluation).__name__
    expect(known, "evaluation", "a result of evaluate", got, TypeError)
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        local = terms(*runs.traces, plate).is_local
        batches = runs.batches if local else [runs.args]
        whole, _ = with_discrete(runs.model, runs.traces, runs.args)
        events = {node["name"]: _event_dims(node) for node in _shown(whole)}
        names = _dims(whole, runs.plate, events, local=local)
        _check_names(names, coords, renamed)
        coords = _labels(whole, args, form_of(model, guide), names, renamed) | coords
        pieces = [_draw_batch(runs, batch, num_samples, events) for batch in batches]
    groups = {
        group: {k: v[0] if group == "observed_data" else v[None] for k, v in values.items()}
        for group, values in _concatenated(pieces, 1).items()
        if values
    }
    library = {"inference_library": "pyro-ppl", "inference_library_version": pyro.__version__}
    attrs = {"/": library, "posterior": verdict_of(model, guide)}
    tree = arviz_base.from_dict(groups, coords=coords, dims=names | renamed, attrs=attrs)
    if evaluation is not None:
        tree["evaluation"] = xr.DataTree(evaluation)
    return tree


def _named(name: str, given: Any) -> dict[str, Any]:
    """`coords` or `dims`, where each name comes with a sequence, and a word is none."""
    given = {} if given is None else given
    fits = isinstance(given, Mapping) and all(np.ndim(values) == 1 for values in given.values())
    expect(fits, name, "a mapping from names to sequences", repr(given), TypeError)
    return dict(given)


def _check_names(names: Dims, coords: Mapping[str, Any], dims: Dims) -> None:
    """Refuses names that ArviZ would ignore, or that xarray would take for others."""
    unknown = [name for name in dims if name not in names]
    expect(not unknown, "dims", f"variables among {list(names)}", unknown)
    for name, given in dims.items():
        twice = [dim for dim in given if [*_DRAWN, *given].count(dim) > 1]
        expect(not twice, "dims", f"names for {name!r} that differ, also from {_DRAWN}", twice)
    used = {*_DRAWN}.union(*{**names, **dims}.values())
    unknown = [dim for dim in coords if dim not in used]
    expect(not unknown, "coords", f"dims among {sorted(used)}", unknown)
    sites = [name for name in names if name not in _STATS]
    clash = [name for name in sites if name in used]
    expect(not clash, "model", f"sites of other names than the dims {sorted(used)}", clash)
    paths = [name for name in [*sites, *used] if "/" in name]
    expect(not paths, "model", "names without '/', which separates the groups of a tree", paths)


def _labels(trace: Any, args: Args, form: Form, names: Dims, renamed: Dims) -> dict[str, Any]:
    """The names of the rows and columns of a table, by dim."""
    found: dict[str, Any] = {}
    for node in _shown(trace):
        name = node["name"]
        if is_data(node) and node["value"].dim() == 2 and name not in renamed:
            labels = labels_of(args, node["value"].shape, form)
            for dim, told in zip(names[name], (labels.rows, labels.columns), strict=False):
                if told is not None:
                    found[dim] = told
    return found


def _dims(trace: Any, plate: Any, events: Mapping[str, int], *, local: bool) -> Dims:
    """Variable -> names of its dims behind `chain` and `draw`."""
    latents = latent_nodes(trace)
    dims: Dims = {name: ["datum"] * local for name in _STATS}
    clash = [node["name"] for node in _shown(trace) if node["name"] in _STATS]
    expect(not clash, "model", f"sites of other names than {_STATS}", clash)
    for node in _shown(trace):
        name, plates = node["name"], sorted(plates_of(node).values(), key=lambda each: each.dim)
        inside, data = is_inside(node, plate), getattr(plate, "name", None)
        dims[name] = ["datum"] * inside + [p.name for p in plates if p.name != data]
        if events[name] == 1 and len(latents) == 1 and node is latents[0]:
            dims[name].append("latent")
        else:
            dims[name] += [f"{name}_dim_{i}" for i in range(events[name])]
    return dims


def _draw_batch(runs: Runs, args: Args, num_samples: int, events: Mapping[str, int]) -> Groups:
    """All groups for one minibatch, with the draws in front, from as many runs as they need."""
    open_model, pieces = Uncondition()(runs.model), []
    observed = prototype(runs.model, args, {})
    for _, draws in runs.draws(args, num_samples, [observed]):
        traces = runs.pair(args, draws)
        drawn, known = with_discrete(runs.model, traces, args, draws)
        again = run_trace(poutine.replay(open_model, trace=known), args, draws)
        try:
            prior = run_trace(open_model, args, draws)
        except NotImplementedError:  # an improper prior has nothing to draw from
            prior = poutine.Trace()
        groups = {
            "posterior": _values(drawn, runs.plate, draws, events, data=False),
            "posterior_predictive": _values(again, runs.plate, draws, events, data=True),
            "prior": _values(prior, runs.plate, draws, events, data=False),
            "prior_predictive": _values(prior, runs.plate, draws, events, data=True),
        }
        pieces.append(groups | _densities(traces, runs.plate, draws))
    values = _values(observed, runs.plate, None, events, data=True)
    return _concatenated(pieces, 0) | {"observed_data": values}


def _concatenated(pieces: list[Groups], axis: int) -> Groups:
    """Joins the arrays of all pieces along an axis, which those of a single piece may not have."""
    if len(pieces) == 1:
        return pieces[0]
    return {
        key: {name: np.concatenate([piece[key][name] for piece in pieces], axis) for name in group}
        for key, group in pieces[0].items()
    }


def _values(
    trace: Any, plate: Any, draws: Any, events: Mapping[str, int], *, data: bool
) -> dict[str, np.ndarray]:
    """Site -> values as `(draws, datum, *other plates, *event)`, of data or of all else.

    Args:
        trace: of the model.
        plate: the data plate.
        draws: the plate of draws, or None.
        events: number of event dims of each site.
        data: whether to take the observed sites, and not the others.
    """
    arrays = {}
    for node in _shown(trace):
        if is_data(node) == data:
            count, value = events[node["name"]], node["value"]
            entries = observed_entries(node) if node["is_observed"] else None
            value = value if entries is None else torch.where(entries, value, math.nan)
            while value.dim() > count + depth_of(node) and len(value) == 1:  # a dim of no plate
                value = value[0]
            place = Place.of({**node, "value": value}, plate, draws, events=count)
            sizes = [place.batch[dim] for dim in (place.datum, *place.plates) if dim is not None]
            value = place.front(value).reshape(place.batch[0], *sizes, *place.event)
            arrays[node["name"]] = _array(value)
    return arrays


def _array(value: Tensor) -> np.ndarray:
    """A tensor as an array, in single precision where NumPy has not its dtype."""
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()


def _densities(traces: tuple[Any, Any], plate: Any, draws: Any) -> Groups:
    """Log densities of one run; what no draw changes is repeated."""
    sites = terms(*traces, None if plate is None else plate.name)

    def stacked(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        count = 1 if draws is None else draws.size
        rows = {k: v[None] if draws is None else v for k, v in values.items()}
        return {k: _array(v.expand(count, *v.shape[1:])) for k, v in rows.items()}

    parts = {**sites.log_likelihood, **sites.log_prior}
    scaled = {name: value * sites.scales[name] for name, value in parts.items()}
    stats = {"log_p": sites.total(scaled)} | ({"log_q": sites.log_q} if sites.log_guide else {})
    nodes = {name: traces[0].nodes[name] for name in sites.log_likelihood}
    seen = {name: _seen(node, plate) for name, node in nodes.items()}
    values = {k: torch.where(seen[k], v, math.nan) for k, v in sites.log_likelihood.items()}
    return {"log_likelihood": stacked(values), "sample_stats": stacked(stats)}


def _seen(node: Node, plate: Any) -> Tensor:
    """Whether anything of each datum of a site is observed: one that is not has no likelihood."""
    entries = observed_entries(node)
    if entries is None:
        return torch.ones((), dtype=torch.bool, device=node["value"].device)
    inside = plate if is_inside(node, plate) else None
    events = len(node["fn"].event_shape)
    each = entries.flatten(-events).any(-1) if events else entries
    return per_datum(each.int(), node, inside) > 0


def _shown(trace: Any) -> list[Node]:
    """The sample sites that are variables: no subsamples and no factors."""
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
    return [n for n in nodes if not (site_is_subsample(n) or isinstance(n["fn"], dist.Unit))]


def _stack(node: Node) -> list[Any]:
    """The vectorized plates around a site, those of draws among them."""
    return [plate for plate in node["cond_indep_stack"] if plate.dim is not None]


def _event_dims(node: Node) -> int:
    """Number of event dims of a site.

    A deterministic one may say nothing of them. They are then what is right of its plates, where
    they have the sizes of its plates.
    """
    shape, events = node["value"].shape, len(node["fn"].event_shape)
    if not node["infer"].get("_deterministic") or events < len(shape):
        return events
    most = max(len(shape) - depth_of(node), 0)
    for events in range(most, -1, -1):
        batch = shape[: len(shape) - events]
        if all(batch[plate.dim :][:1] == (plate.size,) for plate in _stack(node)):
            return events
    return most
