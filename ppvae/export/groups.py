"""The groups of a tree as arrays, from runs of a model and its guide."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._checks import expect
from ppvae._scopes import random_state
from ppvae.export.names import JOINT, Groups
from ppvae.export.pieces import side_by_side
from ppvae.families.rules import support_of
from ppvae.objectives.nested import inner_run
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.objectives.weights import log_mean_weight
from ppvae.programs.layout import Place
from ppvae.programs.nodes import (
    Node,
    bare_distribution,
    counted_entries,
    depth_of,
    from_reals,
    is_data,
    is_inside,
    is_real,
    latent_nodes,
    log_prob,
    per_datum,
    plates_of,
    prototype,
    space_of,
)
from ppvae.programs.runs import Args, Runs, run_trace, with_discrete
from ppvae.programs.simulation import Uncondition

_POSTERIOR = "posterior", "unconstrained_posterior", "posterior_predictive"


def pieces_of(
    runs: Runs,
    args: Args,
    num_samples: int,
    events: Mapping[str, int],
    wanted: Collection[str],
    *,
    num_inner: int | None,
    top: Iterable[str],
    by_element: bool,
    new: Args | None = None,
) -> Iterator[Groups]:
    """The groups of draws for one minibatch, run by run, with the draws in front.

    Args:
        runs: the pair.
        args: the minibatch.
        num_samples: number of draws.
        events: number of event dims of each site.
        wanted: names of groups; what none of them asks for is not run.
        num_inner: draws of the latents of each datum by which they are integrated out of its
            likelihood; None if they are not.
        top: the latents whose log prior is wanted.
        by_element: whether the likelihood is that of each number, given the latents.
        new: arguments for predictions, given the draws; None for none.
    """
    observed = prototype(runs.model, args, {})
    how: Any = {"num_inner": num_inner, "top": top, "by_element": by_element, "new": new}
    for _, draws in runs.draws(args, num_samples, [observed]):
        yield _of_run(runs, args, draws, events, wanted, **how)


def _of_run(
    runs: Runs,
    args: Args,
    draws: Any,
    events: Mapping[str, int],
    wanted: Collection[str],
    *,
    num_inner: int | None,
    top: Iterable[str],
    by_element: bool,
    new: Args | None,
) -> Groups:
    """The groups of the draws of one run; see `pieces_of`."""
    groups: Groups = {}
    open_model, plate = Uncondition()(runs.model), runs.plate
    of_prior = {"prior", "prior_predictive"} & {*wanted}
    densities = {"log_likelihood", "log_prior", "sample_stats"} & {*wanted}
    if densities or {*_POSTERIOR} & {*wanted} or new is not None:
        traces = runs.pair(args, draws)
        drawn, known = with_discrete(runs.model, traces, args, draws)
    if "posterior" in wanted:
        groups["posterior"] = values_of(drawn, plate, draws, events, data=False)
    if "posterior_predictive" in wanted:
        again = run_trace(poutine.replay(open_model, trace=known), args, draws)
        groups["posterior_predictive"] = values_of(again, plate, draws, events, data=True)
    if of_prior:
        try:
            prior = run_trace(open_model, args, draws)
        except NotImplementedError:  # an improper prior has nothing to draw from
            prior = poutine.Trace()
        groups["prior"] = values_of(prior, plate, draws, events, data=False)
        groups["prior_predictive"] = values_of(prior, plate, draws, events, data=True)
    if "unconstrained_posterior" in wanted:
        groups["unconstrained_posterior"] = _unconstrained(traces[0], plate, draws)
    if densities:
        groups |= _densities(runs, traces, draws, num_inner, top)
        if by_element:
            groups["log_likelihood"] = _of_elements(traces[0], plate, draws, events)
    if new is not None:
        groups["predictions"] = _predicted(runs, drawn, new, draws, events)
    return groups


def integrated(log_likelihood: Mapping[str, np.ndarray], log_weight: np.ndarray) -> Any:
    """The likelihood of each datum from the weights of all its draws, by the name of its site.

    Args:
        log_likelihood: that of any of the draws, which is NaN where a datum has none.
        log_weight: of shape `(draws, datum)`.
    """
    whole = _integrated(torch.as_tensor(log_weight).double())
    ((name, some),) = log_likelihood.items()
    return {name: np.where(np.isnan(some[:1]), np.nan, whole)}


def _integrated(log_weight: Tensor) -> np.ndarray:
    """Log p(x) of each datum from the weights of its draws, the same in all of them.

    But for a share of 1e-10: were the numbers equal, ArviZ's `loo` would refuse them. It takes the
    tail of what minus the log likelihood leaves for that of weights; so this is where the weights
    of the draws go, and the Pareto k that it reports is theirs.
    """
    whole = log_mean_weight(log_weight)
    share = (log_weight - log_weight.amax(0)).exp()
    even = torch.linspace(0.0, 1.0, len(share), dtype=share.dtype, device=share.device)[:, None]
    share = torch.where(share.amin(0) > 1 - 1e-5, even, share)
    return _array(whole - 1e-10 * (1 + whole.abs()) * share)


def predicted(
    runs: Runs, new: Args, num_samples: int, events: Mapping[str, int]
) -> Iterator[Groups]:
    """The observed sites for new arguments, of a model without global latents: drawn from it."""
    first = prototype(Uncondition()(runs.model), new, {})
    for _, draws in runs.draws(runs.args, num_samples, [*runs.traces, first]):
        yield {"predictions": _predicted(runs, poutine.Trace(), new, draws, events)}


def predicted_once(
    runs: Runs, known: Any, new: Args, events: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The observed sites for new arguments once, which tell their shapes; no random number is used.

    Args:
        runs: the pair.
        known: a trace of the model, with global latents.
        new: the new arguments.
        events: number of event dims of each site.
    """
    with random_state(None, keep=True):
        return _predicted(runs, known, new, None, events)


def observed_values(
    runs: Runs, batches: Iterable[Args], events: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The data of the observed sites, from those of minibatches, with one draw in front."""
    with random_state(None, keep=True):
        seen = [prototype(runs.model, batch, {}) for batch in batches]
    return side_by_side([values_of(each, runs.plate, None, events, data=True) for each in seen])


def _predicted(
    runs: Runs, known: Any, new: Args, draws: Any, events: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The observed sites for new arguments, given the global latents in a trace of the model.

    The latents of new data are drawn from the model.
    """
    names = [node["name"] for node in shown(runs.traces[0]) if is_data(node)]
    kept = poutine.Trace()  # of latents alone, as the plates have other rows
    for node in latent_nodes(known):
        if not is_inside(node, runs.plate):
            kept.add_node(node["name"], **node)
    try:
        trace = run_trace(poutine.replay(Uncondition()(runs.model), trace=kept), new, draws)
    except Exception as error:
        error.add_note(
            "from_pyro_svi: in a run for `predictions`, whose groups must be those known"
        )
        raise
    nodes = [trace.nodes[name] for name in names]
    frames = [frame for node in nodes for frame in node["cond_indep_stack"]]
    plate = next((f for f in frames if runs.plate and f.name == runs.plate.name), None)
    return {n["name"]: _front(n, n["value"], plate, draws, events) for n in nodes}


def small_numbers(groups: Groups, nodes: Iterable[Node]) -> None:
    """Makes bytes of bits and of codes of few categories, where none is missing."""
    few = [node for node in nodes if _fits_a_byte(bare_distribution(node["fn"]).support)]
    for group, name in _of_sites(groups, few):
        if np.isfinite(group[name]).all():
            group[name] = group[name].astype(np.int8)


def whole_numbers(groups: Groups, nodes: Iterable[Node]) -> None:
    """Makes whole numbers of the values of other discrete sites, where none is missing."""
    for group, name in _of_sites(groups, nodes):
        if group[name].dtype != np.int8 and np.isfinite(group[name]).all():
            small = abs(group[name]).max() < np.iinfo(np.int32).max
            group[name] = group[name].astype(np.int32 if small else np.int64)


def large_numbers(groups: Groups, nodes: Iterable[Node]) -> None:
    """Makes whole numbers of 64 bits of the values of other discrete sites, of some of the draws.

    Raises:
        ValueError: one is no number.
    """
    for group, name in _of_sites(groups, nodes):
        if group[name].dtype != np.int8:
            bad = int((~np.isfinite(group[name])).sum())
            expect(not bad, "model", f"draws of {name!r} that are whole numbers", f"{bad} others")
            group[name] = group[name].astype(np.int64)


def _of_sites(groups: Groups, nodes: Iterable[Node]) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """The groups that have values of the discrete ones of some sites, and the names of these."""
    names = {node["name"] for node in nodes if node["fn"].support.is_discrete}
    densities = "log_likelihood", "log_prior", "sample_stats"
    for group in [values for key, values in groups.items() if key not in densities]:
        for name in names & group.keys():
            yield group, name


def _fits_a_byte(support: Any) -> bool:
    """Whether a site has bits, or few categories that are known beforehand."""
    if support is constraints.boolean:
        return True
    bounds = [getattr(support, f"{end}_bound", None) for end in ("lower", "upper")]
    return all(isinstance(bound, int) and abs(bound) <= 127 for bound in bounds)


def values_of(
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
    for node in shown(trace):
        if is_data(node) == data:
            value = node["value"]
            value = _with_gaps(node, value) if node["is_observed"] and data else value
            arrays[node["name"]] = _front(node, value, plate, draws, events)
    return arrays


def _front(
    node: Node, value: Tensor, plate: Any, draws: Any, events: Mapping[str, int]
) -> np.ndarray:
    """A value of a site as `(draws, datum, *other plates, *event)`."""
    count = events[node["name"]]
    while value.dim() > count + depth_of(node) and len(value) == 1:  # a dim of no plate
        value = value[0]
    place = Place.of({**node, "value": value}, plate, draws, events=count)
    sizes = [place.batch[dim] for dim in (place.datum, *place.plates) if dim is not None]
    return _array(place.front(value).reshape(place.batch[0], *sizes, *place.event))


def _unconstrained(trace: Any, plate: Any, draws: Any) -> dict[str, np.ndarray]:
    """The latents where the model has them on the reals; none if they all are there already."""
    nodes = [node for node in latent_nodes(trace) if not node["fn"].support.is_discrete]
    if all(is_real(support_of(node["fn"])) for node in nodes):
        return {}
    free = {}
    for node in nodes:
        try:
            transform = from_reals(support_of(node["fn"]))
        except NotImplementedError:
            continue
        value = transform.inv(node["value"])
        batch = node["fn"].batch_shape
        count = len(space_of(transform, batch, node["fn"].event_shape))
        free[node["name"]] = _front(node, value, plate, draws, {node["name"]: count})
    return free


def _array(value: Tensor) -> np.ndarray:
    """A tensor as an array, in single precision where NumPy has not its dtype."""
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()


def _densities(
    runs: Runs, traces: tuple[Any, Any], draws: Any, num_inner: int | None, top: Iterable[str]
) -> Groups:
    """Log densities of one run; what no draw changes is repeated."""
    plate = runs.plate
    sites = terms(*traces, None if plate is None else plate.name)

    def stacked(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        count = 1 if draws is None else draws.size
        rows = {k: v[None] if draws is None else v for k, v in values.items()}
        return {k: _array(v.expand(count, *v.shape[1:])) for k, v in rows.items()}

    parts = {**sites.log_likelihood, **sites.log_prior}
    scaled = {name: value * sites.scales[name] for name, value in parts.items()}
    stats = {"log_p": sites.total(scaled)}
    if sites.log_guide:
        stats |= {"log_q": sites.log_q, "log_weight": sites.log_weight}
    elif not sites.log_prior:  # without latents each datum has its likelihood
        stats |= {"log_q": torch.zeros_like(stats["log_p"]), "log_weight": sites.log_joint}
    nodes = {name: traces[0].nodes[name] for name in sites.log_likelihood}
    seen = {name: _seen(node, plate) for name, node in nodes.items()}
    values = {k: torch.where(seen[k], v, math.nan) for k, v in sites.log_likelihood.items()}
    if num_inner is not None:
        own = [name for name in values if name in sites.local]
        inner = log_mean_weight(_inner_weights(runs, traces[1], sites, draws, num_inner))
        some = torch.stack(torch.broadcast_tensors(*(seen[name] for name in own))).any(0)
        outer = sites.part(local=False)
        values = {k: v for k, v in values.items() if k not in own}
        values[own[0] if len(own) == 1 else JOINT] = torch.where(some, inner, math.nan)
        if not sites.is_local:
            own_p = outer.total({k: v for k, v in scaled.items() if k not in sites.local})
            stats = {"log_p": own_p + inner.sum(-1), "log_q": outer.log_q}
            stats["log_weight"] = outer.log_weight + inner.sum(-1)
    priors = {name: _summed(sites.log_prior[name], draws) for name in top}
    groups = {"log_likelihood": stacked(values), "sample_stats": stacked(stats)}
    for name, node in nodes.items():  # data in plates of their own, of which each member counts
        if name not in sites.local and plates_of(node):
            value = torch.where(_any_counts(node), log_prob(node), math.nan)
            groups["log_likelihood"][name] = _front(node, value, plate, draws, {name: 0})
    return groups | {"log_prior": stacked(priors)}


def _of_elements(
    trace: Any, plate: Any, draws: Any, events: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The log likelihood of each number that is observed, given all latents."""
    found = {}
    for node in [each for each in shown(trace) if is_data(each)]:
        fn, name = bare_distribution(node["fn"]), node["name"]
        wanted = f"numbers of {name!r} that are independent given the latents"
        expect(not fn.event_shape, "pointwise", wanted, type(fn).__name__)
        value = _with_gaps(node, fn.log_prob(node["value"]))
        found[name] = _front(node, value, plate, draws, events)
    return found


def _with_gaps(node: Node, value: Tensor) -> Tensor:
    """Numbers of a site's shape, NaN where its own are missing or masked."""
    entries = counted_entries(node)
    return value if entries is None else torch.where(entries, value, math.nan)


def _inner_weights(
    runs: Runs, guide_trace: Any, sites: Terms, draws: Any, num_inner: int
) -> Tensor:
    """Log weights of the latents of each datum given the globals, `(inner, *draws, datum)`."""
    weights = [sites.part(local=True).log_weight.double()]
    if not sites.is_local:
        more = (inner_run(runs, guide_trace, sites.plate, draws) for _ in range(num_inner - 1))
        weights += [run.log_weight for run in more]
    return torch.stack(torch.broadcast_tensors(*weights))


def _summed(value: Tensor, draws: Any) -> Tensor:
    """A term of a site summed over all but the draws."""
    return value.sum() if draws is None else value.reshape(len(value), -1).sum(-1)


def at_the_top(runs: Runs, sites: Terms) -> list[str]:
    """The global latents whose prior is the same in every draw, as it depends on no other latent.

    It is held against the prior given draws of the model's own.

    Args:
        runs: the pair.
        sites: its terms; there are none of them for a guide that is a point.
    """
    first, second = runs.traces[0], prototype(runs.model, runs.args, {})
    found = []
    for node in latent_nodes(first) if sites.log_guide else ():
        other = second.nodes[node["name"]]
        if not is_inside(node, sites.plate):
            again = log_prob({**other, "value": node["value"]})
            if torch.equal(log_prob(node).nan_to_num(), again.nan_to_num()):
                found.append(node["name"])
    return found


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


def shown(trace: Any) -> list[Node]:
    """The sample sites that are variables: no subsamples and no factors."""
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
    return [n for n in nodes if not (site_is_subsample(n) or isinstance(n["fn"], dist.Unit))]


def event_dims(node: Node) -> int:
    """Number of event dims of a site.

    A deterministic one may say nothing of them. They are then what is right of its plates, where
    they have the sizes of its plates.
    """
    shape, events = node["value"].shape, len(node["fn"].event_shape)
    if not node["infer"].get("_deterministic") or events < len(shape):
        return events
    most = max(len(shape) - depth_of(node), 0)
    stack = plates_of(node).values()
    for events in range(most, -1, -1):
        batch = shape[: len(shape) - events]
        if all(batch[plate.dim :][:1] == (plate.size,) for plate in stack):
            return events
    return most
