"""Reads the nodes of a trace: which are latent or observed, in which plates, on which support."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae.families.rules import support_of
from ppvae.programs.supports import from_reals

Node = dict[str, Any]
#: The name of the plate that the draws of one vectorized run stand in.
DRAWS = "_draws"


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


def counts(node: Any) -> bool:
    """Whether a sample statement carries a density: no subsampling, nothing deterministic."""
    return not (site_is_subsample(node) or node["infer"].get("_deterministic", False))


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
