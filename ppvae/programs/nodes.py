"""Reads the nodes of a trace: which are latent or observed, in which plates, on which support."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import reduce
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.hmm import HiddenMarkovModel
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from ppvae._checks import check_choice, expect
from ppvae.families.rules import support_of, without_shift

Node = dict[str, Any]

#: The name of the plate that the draws of one vectorized run stand in.
DRAWS = "_draws"


def values_outside(frame: Any, *traces: Any) -> dict[str, Tensor]:
    """The values of all that traces draw outside of a plate, but for subsamples."""
    nodes = [node for trace in traces for _, node in trace.iter_stochastic_nodes()]
    drawn = [node for node in nodes if not site_is_subsample(node)]
    return {node["name"]: node["value"] for node in drawn if not is_inside(node, frame)}


def latent_nodes(trace: Any) -> list[Node]:
    """The latent sample statements of a trace.

    Without those that draw subsamples, and without the entries that an `obs_mask` says are missing:
    they are drawn by the model, given the latents, and so integrated out.
    """
    nodes = [node for _, node in trace.iter_stochastic_nodes() if not site_is_subsample(node)]
    return [node for node in nodes if not _is_missing(node, trace)]


def _is_missing(node: Node, trace: Any) -> bool:
    """Whether a site is that of the missing entries, of those that `obs_mask` makes of one."""
    name = node["name"].removesuffix("_unobserved")
    observed = trace.nodes.get(f"{name}_observed")
    return name != node["name"] and observed is not None and observed["is_observed"]


def observed_nodes(trace: Any) -> list[Node]:
    """The observed sample statements of a trace, factors among them."""
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
    return [node for node in nodes if node["is_observed"] and counts(node)]


def is_finite_discrete(fn: Any) -> bool:
    """Whether a distribution has finitely many values, all of which can be listed."""
    try:
        return bool(fn.has_enumerate_support) and not hasattr(fn, "log_factor")
    except (AttributeError, NotImplementedError):
        return False


def summed_nodes(trace: Any) -> list[Node]:
    """The finite discrete latents of a plain trace, which an objective sums out.

    Among them are those that `obs_mask` makes of labels some of which are missing.
    """
    nodes = [node for _, node in trace.iter_stochastic_nodes() if not site_is_subsample(node)]
    return [node for node in nodes if is_finite_discrete(node["fn"])]


def is_data(node: Node) -> bool:
    """Whether a sample statement is observed, or was until its observation was taken off."""
    if not counts(node) or isinstance(node["fn"], dist.Unit):
        return False
    return node["is_observed"] or node["infer"].get("was_observed", False)


def draws_its_rows(node: Any) -> bool:
    """Whether a node is that of a plate that draws a subsample; one told its rows has no size."""
    return site_is_subsample(node) and node["fn"].subsample_size not in (None, node["fn"].size)


def dtype_of(*values: Any) -> torch.dtype:
    """The widest floating dtype among some tensors; the default one, where there is none."""
    dtypes = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()


def prototype(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    init: Callable[[dict[str, Any]], Tensor] | None = None,
) -> Any:
    """A trace of the model, where an improper prior, which nothing can be drawn from, starts at 0.

    Zero means zero in unconstrained space; `init` chooses all values, as Pyro's `init_to_median`
    does. Nothing outside sees the run.
    """

    def start(site: dict[str, Any]) -> Tensor:
        fn = site["fn"]
        try:
            return fn.sample().detach()
        except NotImplementedError:
            transform = from_reals(support_of(fn))
            zeros = torch.zeros(transform.inverse_shape(fn.shape()), dtype=dtype_of(*args))
            return transform(zeros)

    def program(*args: Any, **kwargs: Any) -> None:
        with InitMessenger(init or start):  # around the call, since a wrapped model takes no `fn=`
            model(*args, **kwargs)

    with poutine.block(), torch.no_grad():
        return trace_of(program, args, kwargs)


def trace_of(program: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
    """A trace of a call of a program.

    An error of the program's own keeps its words and its traceback, with a note on the call, where
    `get_trace` of Pyro's appends a table of all shapes.
    """
    messenger, kwargs = poutine.trace_messenger.TraceMessenger(), dict(kwargs or {})
    with messenger:
        call = {"type": "args", "args": args, "kwargs": kwargs}
        messenger.trace.add_node("_INPUT", name="_INPUT", **call)
        try:
            program(*args, **kwargs)
        except Exception as error:
            if not hasattr(error, "__notes__"):
                came = ", ".join(map(_in_words, args))
                error.add_note(f"in a run of model or guide on these arguments: {came}")
            raise
    return messenger.get_trace()


def _in_words(arg: Any) -> str:
    """The shape and the dtype of a tensor, and the type of what is none."""
    tensor = isinstance(arg, Tensor)
    return f"{tuple(arg.shape)} of {arg.dtype}" if tensor else type(arg).__name__


def from_reals(support: Any) -> Any:
    """The bijection from the reals to a support; a mixture's is that of its components.

    Raises:
        NotImplementedError: there is none.
    """
    while isinstance(support, MixtureSameFamilyConstraint):
        support = support.base_constraint
    return without_shift(biject_to(support))


def space_of(transform: Any, batch: torch.Size, event: torch.Size) -> torch.Size:
    """Shape of an event in unconstrained space; bounds may have the shape of the batch, too."""
    return torch.Size(transform.inverse_shape(batch + event)[len(batch) :])


def is_real(support: Any) -> bool:
    """Whether a support is all of the reals, in any number of dimensions."""
    return isinstance(_bare(support), type(constraints.real))  # a deep copy has one of its own


def same_support(one: Any, other: Any) -> bool:
    """Whether two supports are the same set, up to the number of event dimensions."""
    one, other = _bare(one), _bare(other)
    kinds = (int, float, Tensor)
    bounds = [
        {name: torch.as_tensor(v).tolist() for name, v in vars(s).items() if isinstance(v, kinds)}
        for s in (one, other)
    ]
    return type(one) is type(other) and bounds[0] == bounds[1]


def has_tensor_bounds(support: Any) -> bool:
    """Whether a support has bounds that a program works out, and that may differ in other runs."""
    return any(isinstance(value, Tensor) for value in vars(_bare(support)).values())


def _bare(support: Any) -> Any:
    """A support without its event dims, and a mixture's as that of its components."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def plates_of(node: Node) -> dict[str, Any]:
    """The vectorized plates around a node by name, outermost first, those of draws left out."""
    stack = node["cond_indep_stack"]
    return {f.name: f for f in stack if f.dim is not None and f.name != DRAWS}


def depth_of(node: Node) -> int:
    """How far to the left the plates around a node reach."""
    return max((-f.dim for f in node["cond_indep_stack"] if f.dim is not None), default=0)


def is_inside(node: Node, plate: Any) -> bool:
    """Whether a node lies in a plate; nothing lies in None."""
    return plate is not None and any(f.name == plate.name for f in node["cond_indep_stack"])


def data_plate(trace: Any, plate: str | None = None) -> Any:
    """Finds the plate whose members are the data, by the one rule of the library.

    A name that is given decides. Else it is the plate `data`; else, of the plates around observed
    sites, those of the length of the data (the first tensor among the arguments of the trace), or
    all if none has it; of several the one that all latent sites share, and then the outermost.

    Args:
        trace: a trace of the model.
        plate: its name.

    Returns:
        The frame of the plate, or None if nothing is observed in a plate.

    Raises:
        ValueError: there is no plate of that name.
    """
    frames: dict[str, Any] = {}
    for node in observed_nodes(trace):
        frames |= {name: f for name, f in plates_of(node).items() if name not in frames}
    latents = [plates_of(node) for node in latent_nodes(trace)]
    shared = {name for name in frames if latents and all(name in plates for plates in latents)}
    call = trace.nodes.get("_INPUT", {"args": (), "kwargs": {}})
    inputs = [*call["args"], *call["kwargs"].values()]
    return choose_plate(frames, length_of(inputs), plate, shared)


def length_of(args: Iterable[Any]) -> int | None:
    """Length of the first argument that is a tensor with a dimension; None if there is none."""
    return next((arg.shape[0] for arg in args if isinstance(arg, Tensor) and arg.dim()), None)


def choose_plate(
    frames: dict[str, Any], length: int | None, plate: str | None, preferred: Collection[str] = ()
) -> Any:
    """The rule of `data_plate` for plates by name, outermost first, and the length of the data."""
    if plate is not None:
        check_choice("plate", plate, list(frames))
        return frames[plate]
    if "data" in frames:
        return frames["data"]
    fitting = [name for name, f in frames.items() if length in (f.size, f.full_size)]
    names = fitting or list(frames)
    names = [name for name in names if name in preferred] or names
    return frames[names[0]] if names else None


def check_observed(trace: Any, name: str = "data", start: int = 0) -> None:
    """Raises unless a model observes something, and its data are such as its sites can produce.

    Supports that depend on latents, as that of a uniform distribution, do not count: there a draw
    may leave the data out, and the density says so. A distribution whose support is worked out, but
    is always the same, says so by an attribute `fixed_support`.

    Args:
        trace: a trace of the model on data.
        name: of the argument that the data came as.
        start: the number of their first row.

    Raises:
        TypeError: what is observed is no tensor of real numbers.
        ValueError: nothing is observed, or data are outside of a support.
    """
    for node in numbers_observed(trace, name):
        value, site, fn = node["value"], node["name"], bare_distribution(node["fn"])
        support = getattr(type(fn), "support", None)
        known = fn.has_enumerate_support or getattr(fn, "fixed_support", False)
        if isinstance(support, property) and known:
            support = fn.support
        if not isinstance(support, property) and support is not None:
            outside = ~support.check(value)
            if isinstance(fn, (dist.NanMaskedNormal, dist.NanMaskedMultivariateNormal)):
                gone = value.isnan()
                outside &= ~(gone.any(-1) if support.event_dim else gone)
            depth = len(node["fn"].event_shape) - support.event_dim
            each, outside = outside, outside.flatten(-depth).any(-1) if depth else outside
            outside = masked(outside, node)
            count = f"{int(outside.sum())} of {outside.numel()} data outside"
            if outside.any():
                first = tuple(outside.nonzero()[0].tolist())
                count += f", first in row {start + (first[-1] if first else 0)}"
                missing = value[first].isnan().any() if value.is_floating_point() else False
                column = (value[first].isnan() if missing else each[first]).nonzero()[0].tolist()
                count += f", column {', '.join(map(str, column))}" if column else ""
                count += ": NaN, which this distribution cannot leave out" if missing else ""
            expect(not outside.any(), name, f"values in the support of {site!r}, {support}", count)


def numbers_observed(trace: Any, name: str = "data") -> list[Node]:
    """The observed sample statements of a trace without factors, which all observe real numbers.

    Raises:
        TypeError: what is observed is no tensor, or one of complex numbers or of True and False.
        ValueError: nothing is observed.
    """
    nodes = observed_nodes(trace)
    none = "none (is an `obs=` missing, or are model and guide the wrong way round?)"
    expect(nodes, "model", "observed sites", none)
    observed = [node for node in nodes if not isinstance(bare_distribution(node["fn"]), dist.Unit)]
    for node in observed:
        value = node["value"]
        real = isinstance(value, Tensor) and not value.is_complex() and value.dtype != torch.bool
        came = getattr(value, "dtype", type(value).__name__)
        expect(real, name, f"real numbers in a tensor at {node['name']!r}", came, TypeError)
    return observed


#: Factors, points, and chains that know their length by the data alone.
_OWN_SHAPES = dist.Unit, dist.Delta, HiddenMarkovModel


def check_shapes(trace: Any) -> None:
    """Raises a ValueError if data and the distribution that they are observed at do not fit.

    Each would be broadcast to the other, and every datum be held against all: PyTorch computes
    numbers of `(n, 1)` and data of `(n,)` to a density of `(n, n)`. One number for all is no fault,
    be it for all numbers of a datum, nor is a dimension that is no plate, if data and distribution
    both have it.

    Args:
        trace: a plain trace of the model, in which no discrete latent is summed out.
    """
    for node in observed_nodes(trace):
        fn, value, name = node["fn"], node["value"], node["name"]
        if not isinstance(value, Tensor) or isinstance(bare_distribution(fn), _OWN_SHAPES):
            continue
        events = len(fn.event_shape)
        cut = max(value.dim() - events, 0)
        shapes = f"data of shape {tuple(value.shape)} at {name!r}, and distributions of shape "
        shapes += f"{tuple(fn.batch_shape)} of events of shape {tuple(fn.event_shape)}"
        wanted = f"data and distribution at {name!r} of one shape"
        event = value.shape[cut:]
        fits = len(event) == events
        fits = fits and all(n in (1, size) for n, size in zip(fn.event_shape, event, strict=True))
        expect(fits, "model", wanted, shapes)
        plates = {frame.dim: frame.size for frame in plates_of(node).values()}
        depth = max(cut, len(fn.batch_shape))
        both = value.shape[:cut], fn.batch_shape
        one, other = ([1] * (depth - len(shape)) + [*shape] for shape in both)
        outside = [dim for dim in range(depth) if dim - depth not in plates]
        repeated = any(one[dim] == 1 < other[dim] for dim in outside) and math.prod(one) > 1
        crossed = any(other[dim] == 1 < one[dim] for dim in outside)
        crossed = crossed and any(one[dim] == 1 < other[dim] for dim in range(depth))
        whole = events and math.prod(one) == 1 and 1 < event[0] in plates.values()
        expect(not (repeated or crossed or whole), "model", wanted, shapes)


def check_densities(trace: Any) -> None:
    """Raises a ValueError if a density of the data is NaN."""
    for node in observed_nodes(trace):
        density = node["fn"].log_prob(node["value"])
        bad = int(masked(density.isnan(), node).sum())
        wanted, came = f"a density of {node['name']!r}", f"NaN for {bad} of {density.numel()}"
        expect(not bad, "model", wanted, came + _first_missing(trace))


def _first_missing(trace: Any) -> str:
    """Says where the first missing entry of the arguments of a trace is, if there is one."""
    for number, arg in enumerate(trace.nodes["_INPUT"]["args"]):
        if isinstance(arg, Tensor) and arg.is_floating_point() and arg.isnan().any():
            row, *column = arg.isnan().nonzero()[0].tolist() or [0]
            where = f"row {row}" + (f", column {', '.join(map(str, column))}" if column else "")
            return f"; argument {number} is NaN in {where}, and is more than an observation"
    return ""


def counts(node: Any) -> bool:
    """Whether a sample statement carries a density: no subsampling, nothing deterministic."""
    return not (site_is_subsample(node) or node["infer"].get("_deterministic", False))


def log_prob(node: Node) -> Tensor:
    """Log density of a node's value by batch element; zero where it is masked."""
    return masked(node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"]), node)


def mask_of(node: Node) -> Any:
    """The mask of a node, by handlers around it or by its distribution; None if there is none."""
    mask, fn = node["mask"], node["fn"]
    while isinstance(fn, dist.MaskedDistribution):
        mask, fn = fn._mask if mask is None else mask & fn._mask, fn.base_dist
    return mask


def common_mask(masks: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """The one mask of latents that are cut from a joint draw; None if none is masked.

    Args:
        masks: site -> its mask, or None.
        shape: of the log density of the draw.

    Raises:
        ValueError: they are masked differently, so that the density of a part would be wanted.
    """
    hidden = {name: mask for name, mask in masks.items() if mask is not None}
    if not hidden:
        return None
    known = [torch.as_tensor(mask) for mask in hidden.values()]
    first, *others = known
    alike = len(known) == len(masks)
    alike = alike and all(mask is first or torch.equal(mask, first) for mask in others)
    if alike and torch.broadcast_shapes(first.shape, shape) == shape:
        return first
    if all(bool(mask.all()) for mask in known):
        return None
    wanted = "latents drawn one by one where the model masks some, as mean_scale draws them"
    raise ValueError(f"guide: expected {wanted}; got a joint draw of {[*hidden]} and others")


def counted_entries(node: Node) -> Tensor | None:
    """Which numbers of a node's value count, of its shape: those that no mask leaves out.

    None, if all do. What is missing among data is masked, too.
    """
    found = _masks_in(node["fn"])
    if node["mask"] is not None:
        found = [*found, (node["mask"], len(node["fn"].event_shape))]
    if not found:
        return None
    value = node["value"]
    seen = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    for mask, events in found:
        part = torch.as_tensor(mask, device=value.device)
        seen = seen & part.reshape(part.shape + (1,) * events)
    return seen


def _masks_in(fn: Any) -> list[tuple[Any, int]]:
    """The masks in a distribution, and how many event dims are to the right of each."""
    found = []
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            found.append((fn._mask, len(fn.event_shape)))
        fn = fn.base_dist
    return found


def masked(value: Tensor, node: Node) -> Tensor:
    """A value by batch element, made zero where the node's mask is false."""
    mask = mask_of(node)
    if mask is None:
        return value
    return torch.where(torch.as_tensor(mask, device=value.device), value, torch.zeros_like(value))


def per_datum(value: Tensor, node: Node, frame: Any) -> Tensor:
    """Sums over all plates but those of the data and of the draws."""
    keep = {f.dim for f in node["cond_indep_stack"] if f.name == DRAWS}
    if frame is not None:
        keep.add(frame.dim)
    drop = [dim for dim in range(-value.dim(), 0) if dim not in keep]
    return value.sum(drop) if drop else value


def base_of(fn: Any) -> Any:
    """A distribution without the event dims that `to_event` has added to it."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def bare_distribution(fn: Any) -> Any:
    """A distribution without its event dims and masks."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """Whether a distribution is a point, which has no density."""
    return isinstance(bare_distribution(fn), dist.Delta)


def has_density(node: Node, trace: Any) -> bool:
    """Whether a site of a guide has a density, which a point has not.

    The points of Pyro's autoguides carry one: the log-determinant of the map that leads there from
    an auxiliary draw. Those of a `FamilyGuide` say that they are mere pieces of one.
    """
    if not is_point(node["fn"]):
        return True
    hidden = any(other["infer"].get("is_auxiliary") for other in drawn_nodes(trace).values())
    return hidden and not node["infer"].get("is_piece")


def drawn_nodes(trace: Any) -> dict[str, Any]:
    """The latent sites of a trace that carry a density, auxiliary ones among them.

    All other latents (points, and the pieces of a joint draw) follow from these.
    """
    return {node["name"]: node for node in latent_nodes(trace) if not is_point(node["fn"])}
