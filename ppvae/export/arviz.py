"""From a Pyro model and its guide to ArviZ: draws, predictions and densities in one tree."""

from __future__ import annotations

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

from ppvae._scopes import eval_mode, private_modules, random_state, unchecked
from ppvae.data.adapters import prepared
from ppvae.objectives.trace_terms import terms
from ppvae.programs.nodes import data_plate, latent_nodes, prototype
from ppvae.programs.runs import draw_runs, is_vectorized, minibatches, run_trace, trace_pair
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
        evaluation: what `evaluate` found, to join the tree; of any data.

    Returns:
        A tree in ArviZ's schema; on arviz 0.x, `arviz.from_datatree` gives `InferenceData`.

    Raises:
        ValueError: an argument is out of its range, the data are not finite, guide and model do not
            fit, or the model draws its own subsample.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(
            f"num_samples, batch_size: expected at least 1, got {num_samples} and {batch_size}"
        )
    args = prepared(args)
    vectorized = is_vectorized(model) if vectorized is None else vectorized
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model, guide):
        with unchecked():
            layout = _Layout(model, guide, args, plate, batch_size)
            pieces = [
                _draw_batch(model, guide, batch, num_samples, layout, vectorized=vectorized)
                for batch in layout.batches
            ]
    data = _joined(pieces, layout)
    names = {**layout.dims, **{key: list(value) for key, value in (dims or {}).items()}}
    attrs = {"/": {"inference_library": "pyro-ppl", "inference_library_version": pyro.__version__}}
    tree = arviz_base.from_dict(data, coords=dict(coords or {}), dims=names, attrs=attrs)
    if evaluation is not None:
        tree["evaluation"] = xr.DataTree(evaluation)
    return tree


class _Layout:
    """What the shape of the model says of the tree: the data plate, the batches, the dims."""

    def __init__(self, model: Any, guide: Any, args: Any, plate: str | None, size: int) -> None:
        trace, _ = trace_pair(model, guide, *args)
        self.frame = data_plate(trace, plate)
        self.plate = plate
        frame = self.frame
        latents = latent_nodes(trace)
        self.local = frame is not None and all(self.is_local(node) for node in latents)
        self.batches = [args]
        if frame is not None:
            cut = minibatches(model, guide, args, frame, size, plate)
            self.batches = cut if self.local else [args]
        single = len(latents) == 1
        self.dims: dict[str, list[str]] = {}
        for node in trace.nodes.values():
            if node["type"] != "sample" or not _is_shown(node):
                continue
            name, stack = node["name"], node["cond_indep_stack"]
            names = ["datum"] if self.is_local(node) else []
            names += [f.name for f in _sorted(stack) if frame is None or f.name != frame.name]
            events = _event_dims(node)
            if events == 1 and single and node is latents[0]:
                names.append("latent")
            else:
                names += [f"{name}_dim_{i}" for i in range(events)]
            self.dims[name] = names
        if self.local:
            self.dims |= {"log_p": ["datum"], "log_q": ["datum"]}

    def is_local(self, node: dict[str, Any]) -> bool:
        frame = self.frame
        return frame is not None and frame.name in {f.name for f in node["cond_indep_stack"]}

    def array(self, node: dict[str, Any], draws: int | None) -> np.ndarray:
        """A node's value as `(draws, datum, *other plates, *event)`, without idle dims."""
        value, stack = node["value"], node["cond_indep_stack"]
        events = _event_dims(node)
        batch = value.shape[: value.dim() - events]
        dims = {f.name: f.dim for f in stack if f.dim is not None}
        deepest = max((-dim for dim in dims.values()), default=0)
        if len(batch) < deepest:  # never broadcast by its plates
            batch = torch.Size([1] * (deepest - len(batch))) + batch
            value = value.reshape(batch + value.shape[value.dim() - events :])
        first = [dims[n] for n in ("_draws", getattr(self.frame, "name", None)) if n in dims]
        kept = [d for d in range(-len(batch), 0) if d in dims.values() or batch[d] > 1]
        order = first + [d for d in kept if d not in first]
        idle = [d for d in range(-len(batch), 0) if d not in order]
        at = [len(batch) + d for d in order + idle]
        value = value.permute([*at, *range(len(batch), value.dim())])
        shape = tuple(batch[d] for d in order) + tuple(value.shape[len(batch) :])
        if draws is None:
            shape = (1, *shape)
        return value.reshape(shape).cpu().numpy()


def _draw_batch(
    model: Any, guide: Any, args: Any, num_samples: int, layout: _Layout, *, vectorized: bool
) -> Groups:
    """All groups for one minibatch, from as many runs as the draws need."""
    open_model = Uncondition()(model)
    widest = None
    if vectorized:
        trace = prototype(model, args, {})
        values = [n["value"] for n in trace.nodes.values() if n["type"] == "sample"]
        widest = max(v.numel() for v in values if isinstance(v, Tensor))
    runs: list[Groups] = []
    for count, draws in draw_runs(model, args, num_samples, widest):
        traces = trace_pair(model, guide, *args, draws=draws)
        again = run_trace(poutine.replay(open_model, trace=traces[1]), args, draws)
        try:
            prior = run_trace(open_model, args, draws)
        except NotImplementedError:  # an improper prior has nothing to draw from
            prior = poutine.Trace()
        runs.append(_groups(traces, again, prior, layout, None if draws is None else count))
    joined: Groups = {}
    for group in runs[0]:
        joined[group] = {
            name: np.concatenate([run[group][name] for run in runs]) for name in runs[0][group]
        }
    observed = prototype(model, args, {})
    joined["observed_data"] = {
        node["name"]: layout.array(node, None)[0]
        for node in observed.nodes.values()
        if node["type"] == "sample" and _is_shown(node) and _is_data(node)
    }
    return joined


def _groups(traces: Any, again: Any, prior: Any, layout: _Layout, draws: int | None) -> Groups:
    """Reads the groups off the traces of one run."""
    model_trace, guide_trace = traces
    groups: Groups = {
        group: {}
        for group in (
            "posterior",
            "posterior_predictive",
            "log_likelihood",
            "sample_stats",
            "prior",
            "prior_predictive",
        )
    }
    for trace, latent, observed in (
        (model_trace, "posterior", None),
        (again, None, "posterior_predictive"),
        (prior, "prior", "prior_predictive"),
    ):
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or not _is_shown(node):
                continue
            group = observed if _is_data(node) else latent
            if group is not None:
                groups[group][name] = layout.array(node, draws)
    parts = terms(model_trace, guide_trace, layout.plate)

    def stacked(value: Tensor) -> np.ndarray:
        """Shape `(draws, ...)`; a value that no draw changes is repeated."""
        value = value if draws is None else value.expand(draws, *value.shape[1:])
        return (value[None] if draws is None else value).cpu().numpy()

    groups["log_likelihood"] = {k: stacked(v) for k, v in parts.log_likelihood.items()}
    totals = {"log_p": {**parts.log_likelihood, **parts.log_prior}, "log_q": parts.log_guide}
    for name, values in totals.items():
        if values:
            total: Any = 0.0
            for site, value in values.items():
                summed = site in parts.local and not layout.local
                total = total + (value.sum(-1) if summed else value)
            groups["sample_stats"][name] = stacked(total)
    return groups


def _joined(pieces: list[Groups], layout: _Layout) -> Groups:
    """Puts the minibatches together along `datum`, and a chain in front."""
    data: Groups = {}
    for group in pieces[0]:
        sampled = group != "observed_data"
        axis = 1 if sampled else 0
        data[group] = {}
        for name in pieces[0][group]:
            arrays = [piece[group][name] for piece in pieces]
            whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)
            data[group][name] = whole[None] if sampled else whole
    return {group: values for group, values in data.items() if values}


def _is_shown(node: Any) -> bool:
    """Whether a sample site is a variable: no subsample and no factor."""
    return not (site_is_subsample(node) or isinstance(node["fn"], dist.Unit))


def _event_dims(node: dict[str, Any]) -> int:
    """Number of event dims; a deterministic site says nothing of them, so its plates tell."""
    events, depth = len(node["fn"].event_shape), node["value"].dim()
    if node["infer"].get("_deterministic") and events >= depth:
        deepest = max((-f.dim for f in node["cond_indep_stack"] if f.dim is not None), default=0)
        return max(depth - deepest, 0)
    return events


def _is_data(node: dict[str, Any]) -> bool:
    """Whether a site is observed, or was until its observation was taken off."""
    if node["infer"].get("_deterministic"):
        return False
    return node["is_observed"] or node["infer"].get("was_observed", False)


def _sorted(stack: Any) -> list[Any]:
    """The plates from left to right, those of draws left out."""
    return sorted(
        (f for f in stack if f.dim is not None and f.name != "_draws"), key=lambda f: f.dim
    )
