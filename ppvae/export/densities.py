"""Log densities of draws: the likelihood of each datum, the prior, and the weights of the draws."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae.export.names import JOINT, Groups
from ppvae.export.sites import Sites, as_array, front, shown, with_gaps
from ppvae.objectives.nested import inner_run
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.objectives.weights import log_mean_weight
from ppvae.programs.masks import counted_entries, log_prob
from ppvae.programs.nodes import Node, bare_distribution, is_data, latent_nodes, prototype
from ppvae.programs.plates import is_inside, per_datum, plates_of
from ppvae.programs.runs import Runs


def densities(
    runs: Runs, traces: tuple[Any, Any], draws: Any, num_inner: int | None, top: Iterable[str]
) -> Groups:
    """Log densities of one run; what no draw changes is repeated.

    Args:
        runs: the pair.
        traces: of the run.
        draws: the plate of draws, or None.
        num_inner: draws of the latents of each datum by which they are integrated out of its
            likelihood; None if they are not.
        top: the latents whose log prior is wanted.
    """
    plate = runs.plate
    parts = terms(*traces, None if plate is None else plate.name)

    def stacked(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        count = 1 if draws is None else draws.size
        rows = {k: v[None] if draws is None else v for k, v in values.items()}
        return {k: as_array(v.expand(count, *v.shape[1:])) for k, v in rows.items()}

    both = {**parts.log_likelihood, **parts.log_prior}
    scaled = {name: value * parts.scales[name] for name, value in both.items()}
    stats = {"log_p": parts.total(scaled)}
    if parts.log_guide:
        stats |= {"log_q": parts.log_q, "log_weight": parts.log_weight}
    elif not parts.log_prior:  # without latents each datum has its likelihood
        stats |= {"log_q": torch.zeros_like(stats["log_p"]), "log_weight": parts.log_joint}
    nodes = {name: traces[0].nodes[name] for name in parts.log_likelihood}
    seen = {name: _seen(node, plate) for name, node in nodes.items()}
    values = {k: torch.where(seen[k], v, math.nan) for k, v in parts.log_likelihood.items()}
    if num_inner is not None:
        own = [name for name in values if name in parts.local]
        inner = log_mean_weight(_inner_weights(runs, traces[1], parts, draws, num_inner))
        some = torch.stack(torch.broadcast_tensors(*(seen[name] for name in own))).any(0)
        outer = parts.part(local=False)
        values = {k: v for k, v in values.items() if k not in own}
        values[own[0] if len(own) == 1 else JOINT] = torch.where(some, inner, math.nan)
        if not parts.is_local:
            own_p = outer.total({k: v for k, v in scaled.items() if k not in parts.local})
            stats = {"log_p": own_p + inner.sum(-1), "log_q": outer.log_q}
            stats["log_weight"] = outer.log_weight + inner.sum(-1)
    priors = {name: _summed(parts.log_prior[name], draws) for name in top}
    groups = {"log_likelihood": stacked(values), "sample_stats": stacked(stats)}
    for name, node in nodes.items():  # data in plates of their own, of which each member counts
        if name not in parts.local and plates_of(node):
            value = torch.where(_any_counts(node), log_prob(node), math.nan)
            groups["log_likelihood"][name] = front(node, value, plate, draws, 0)
    return groups | {"log_prior": stacked(priors)}


def of_elements(sites: Sites, trace: Any, draws: Any) -> dict[str, np.ndarray]:
    """The log likelihood of each number that is observed, given all latents.

    Args:
        sites: the variables.
        trace: of the model.
        draws: the plate of draws, or None.

    Raises:
        ValueError: the numbers of a site are not independent.
    """
    found = {}
    for node in [each for each in shown(trace) if is_data(each)]:
        fn, name = bare_distribution(node["fn"]), node["name"]
        wanted = f"numbers of {name!r} that are independent given the latents"
        expect(not fn.event_shape, "pointwise", wanted, type(fn).__name__)
        value = with_gaps(node, fn.log_prob(node["value"]))
        found[name] = sites.front(node, value, draws)
    return found


def integrated(log_likelihood: Mapping[str, np.ndarray], log_weight: np.ndarray) -> Any:
    """The likelihood of each datum from the weights of all its draws, by the name of its site.

    It is the same in all draws, but for a share of 1e-10: were the numbers equal, ArviZ's `loo`
    would refuse them. It takes the tail of what minus the log likelihood leaves for that of
    weights; so this is where the weights of the draws go, and the Pareto k that it reports is
    theirs.

    Args:
        log_likelihood: that of any of the draws, which is NaN where a datum has none.
        log_weight: of shape `(draws, datum)`.
    """
    weight = torch.as_tensor(log_weight).double()
    whole = log_mean_weight(weight)
    share = (weight - weight.amax(0)).exp()
    even = torch.linspace(0.0, 1.0, len(share), dtype=share.dtype)[:, None]
    share = torch.where(share.amin(0) > 1 - 1e-5, even, share)
    value = as_array(whole - 1e-10 * (1 + whole.abs()) * share)
    ((name, some),) = log_likelihood.items()
    return {name: np.where(np.isnan(some[:1]), np.nan, value)}


def at_the_top(runs: Runs, parts: Terms) -> list[str]:
    """The global latents whose prior is the same in every draw, as it depends on no other latent.

    It is held against the prior given draws of the model's own.

    Args:
        runs: the pair.
        parts: its terms; there are none of them for a guide that is a point.
    """
    first, second = runs.traces[0], prototype(runs.model, runs.args, {})
    found = []
    for node in latent_nodes(first) if parts.log_guide else ():
        other = second.nodes[node["name"]]
        if not is_inside(node, parts.plate):
            again = log_prob({**other, "value": node["value"]})
            if torch.equal(log_prob(node).nan_to_num(), again.nan_to_num()):
                found.append(node["name"])
    return found


def _inner_weights(
    runs: Runs, guide_trace: Any, parts: Terms, draws: Any, num_inner: int
) -> Tensor:
    """Log weights of the latents of each datum given the globals, `(inner, *draws, datum)`."""
    weights = [parts.part(local=True).log_weight.double()]
    if not parts.is_local:
        more = (inner_run(runs, guide_trace, parts.plate, draws) for _ in range(num_inner - 1))
        weights += [run.log_weight for run in more]
    return torch.stack(torch.broadcast_tensors(*weights))


def _summed(value: Tensor, draws: Any) -> Tensor:
    """A term of a site summed over all but the draws."""
    return value.sum() if draws is None else value.reshape(len(value), -1).sum(-1)


def _seen(node: Node, plate: Any) -> Tensor:
    """Whether anything of each datum of a site is observed: one that is not has no likelihood."""
    inside = plate if is_inside(node, plate) else None
    return per_datum(_any_counts(node).int(), node, inside) > 0


def _any_counts(node: Node) -> Tensor:
    """Whether anything of each batch element of a site is observed."""
    entries, events = counted_entries(node), len(node["fn"].event_shape)
    if entries is None:
        return torch.ones((), dtype=torch.bool, device=node["value"].device)
    return entries.flatten(-events).any(-1) if events else entries
