"""From a Pyro model and its guide to ArviZ: draws, predictions and densities in one tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import arviz_base
import numpy as np
import pyro
import pyro.distributions as dist
import xarray as xr
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._checks import check_count
from ppvae.objectives.trace_terms import terms
from ppvae.programs.layout import Place
from ppvae.programs.nodes import Node, is_data, is_inside, latent_nodes, plates_of, prototype
from ppvae.programs.runs import Runs, opened, run_trace
from ppvae.programs.simulation import Uncondition

Groups = dict[str, dict[str, np.ndarray]]


def from_pyro_svi(
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

    - `posterior`: draws of the guide, and the model's deterministic sites;
    - `posterior_predictive`: the observed sites drawn anew, given those draws;
    - `log_likelihood`: log p(x | z) per datum, in nats;
    - `sample_stats`: `log_p` = log p(x, z) and `log_q` = log q(z) of the draws, per datum where all
      latents are local and one number per draw otherwise, as `loo_approximate_posterior` wants them
      (there is no `log_q` for a point guide, which has no density);
    - `prior` and `prior_predictive`: draws of the model alone, its observations taken off (left
      out where a prior is improper);
    - `observed_data`, without the two dims;
    - `evaluation`, without the two dims: the result of `evaluate`, if it is given.

    The data plate is the dim `datum`, and the coordinates of a single latent vector `latent`.
    Local latents are drawn in minibatches. Nothing is trained or changed.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments.
        num_samples: number of draws, at least 1.
        coords: coordinate values by dim.
        dims: names of the dims after `chain` and `draw` by variable, in place of the names above.
        batch_size: data per run, where all latents are local.
        vectorized: run many draws at once, which the model must be written for (all operations
            leave leading dims alone); by default only where the model says so, as `VAE` does.
        seed: seeds the draws, without a trace outside; None uses the caller's stream.
        plate: name of the data plate; by default `data`, or else the outermost one.
        kwargs: keyword arguments of model and guide; tensors with as many rows as the data plate
            are cut into the same runs.
        evaluation: what `evaluate` found, to join the tree; of any data.

    Returns:
        A tree in ArviZ's schema; on arviz 0.x, `arviz.from_datatree` gives `InferenceData`.

    Raises:
        ValueError: an argument is out of its range, the data are not finite, guide and model do not
            fit, or the model draws its own subsample.
    """
    num_samples = check_count("num_samples", num_samples)
    options: dict[str, Any] = {"kwargs": kwargs, "batch_size": batch_size, "vectorized": vectorized}
    with opened(model, guide, args, seed=seed, plate=plate, **options) as runs:
        latents = latent_nodes(runs.traces[0])
        local = terms(*runs.traces, plate).is_local
        batches = runs.batches if local else [runs.args]
        pieces = [_draw_batch(runs, batch, num_samples, plate) for batch in batches]
        names = _dims(runs, latents, local=local)
    data = _joined(pieces)
    names |= {key: list(value) for key, value in (dims or {}).items()}
    attrs = {"/": {"inference_library": "pyro-ppl", "inference_library_version": pyro.__version__}}
    tree = arviz_base.from_dict(data, coords=dict(coords or {}), dims=names, attrs=attrs)
    if evaluation is not None:
        tree["evaluation"] = xr.DataTree(evaluation)
    return tree


def _dims(runs: Runs, latents: list[Node], *, local: bool) -> dict[str, list[str]]:
    """Variable -> names of its dims behind `chain` and `draw`."""
    dims: dict[str, list[str]] = {}
    for node in runs.traces[0].nodes.values():
        if node["type"] != "sample" or not _is_shown(node):
            continue
        name, plates = node["name"], plates_of(node).values()
        inside, events = is_inside(node, runs.plate), _event_dims(node)
        others = [f for f in plates if not inside or f.name != runs.plate.name]
        dims[name] = ["datum"] if inside else []
        dims[name] += [f.name for f in sorted(others, key=lambda f: f.dim)]
        if events == 1 and len(latents) == 1 and node is latents[0]:
            dims[name].append("latent")
        else:
            dims[name] += [f"{name}_dim_{i}" for i in range(events)]
    if local:
        dims |= {"log_p": ["datum"], "log_q": ["datum"]}
    return dims


def _draw_batch(runs: Runs, args: tuple[Any, ...], num_samples: int, plate: str | None) -> Groups:
    """All groups for one minibatch, from as many runs as the draws need."""
    open_model = Uncondition()(runs.model)
    observed = prototype(runs.model, args, {})
    pieces: list[Groups] = []
    for _, draws in runs.draws(args, num_samples, [observed]):
        traces = runs.pair(args, draws)
        again = run_trace(poutine.replay(open_model, trace=traces[1]), args, draws)
        try:
            prior = run_trace(open_model, args, draws)
        except NotImplementedError:  # an improper prior has nothing to draw from
            prior = poutine.Trace()
        groups = {
            "posterior": _values(traces[0], runs.plate, draws, data=False),
            "posterior_predictive": _values(again, runs.plate, draws, data=True),
            "prior": _values(prior, runs.plate, draws, data=False),
            "prior_predictive": _values(prior, runs.plate, draws, data=True),
        }
        pieces.append(groups | _densities(traces, plate, draws))
    joined = {
        group: {name: np.concatenate([piece[group][name] for piece in pieces]) for name in values}
        for group, values in pieces[0].items()
    }
    values = _values(observed, runs.plate, None, data=True)
    return joined | {"observed_data": {name: value[0] for name, value in values.items()}}


def _values(trace: Any, plate: Any, draws: Any, *, data: bool) -> dict[str, np.ndarray]:
    """Site -> values as `(draws, datum, *other plates, *event)`, of data or of all else."""
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample" and _is_shown(node)]
    return {node["name"]: _array(node, plate, draws) for node in nodes if is_data(node) == data}


def _array(node: Node, plate: Any, draws: Any) -> np.ndarray:
    """The value of a node, without dims that belong to no plate."""
    place = Place.of(node, plate, draws, events=_event_dims(node))
    value = place.front(node["value"])
    datum = [] if place.datum is None else [place.batch[place.datum]]
    plates = [place.batch[dim] for dim in place.plates]
    return value.reshape([len(value), *datum, *plates, *place.event]).cpu().numpy()


def _densities(traces: tuple[Any, Any], plate: str | None, draws: Any) -> Groups:
    """Log densities of one run; what no draw changes is repeated."""
    parts = terms(*traces, plate)

    def stacked(value: Tensor) -> np.ndarray:
        value = value[None] if draws is None else value.expand(draws.size, *value.shape[1:])
        return value.cpu().numpy()

    stats = {"log_p": stacked(parts.log_joint)}
    if parts.log_guide:
        stats["log_q"] = stacked(parts.log_q)
    log_likelihood = {name: stacked(value) for name, value in parts.log_likelihood.items()}
    return {"log_likelihood": log_likelihood, "sample_stats": stats}


def _joined(pieces: list[Groups]) -> Groups:
    """Puts the minibatches together along `datum`, and a chain in front."""
    data: Groups = {}
    for group in pieces[0]:
        sampled = group != "observed_data"
        data[group] = {}
        for name in pieces[0][group]:
            arrays = [piece[group][name] for piece in pieces]
            whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, int(sampled))
            data[group][name] = whole[None] if sampled else whole
    return {group: values for group, values in data.items() if values}


def _is_shown(node: Any) -> bool:
    """Whether a sample site is a variable: no subsample and no factor."""
    return not (site_is_subsample(node) or isinstance(node["fn"], dist.Unit))


def _event_dims(node: Node) -> int:
    """Number of event dims; a deterministic site says nothing of them, so its plates tell."""
    events, depth = len(node["fn"].event_shape), node["value"].dim()
    if node["infer"].get("_deterministic") and events >= depth:
        deepest = max((-f.dim for f in node["cond_indep_stack"] if f.dim is not None), default=0)
        return max(depth - deepest, 0)
    return events
