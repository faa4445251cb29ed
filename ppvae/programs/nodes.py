"""What a guide has to know of a model: its latent sites, their plates and their supports."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to


def latent_nodes(trace: Any) -> list[dict[str, Any]]:
    """The latent sample statements of a trace, without those that draw subsamples."""
    return [node for _, node in trace.iter_stochastic_nodes() if not site_is_subsample(node)]


def draws_its_rows(node: Any) -> bool:
    """Whether a node is that of a plate that draws a subsample; one told its rows has no size."""
    return site_is_subsample(node) and node["fn"].subsample_size not in (None, node["fn"].size)


def dtype_of(*values: Any) -> torch.dtype:
    """The widest floating dtype among some tensors; the default one, where there is none."""
    found = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return reduce(torch.promote_types, found) if found else torch.get_default_dtype()


def prototype(model: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A trace of the model, where an improper prior, which nothing can be drawn from, starts at 0.

    Zero means zero in unconstrained space. Nothing outside sees the run.
    """

    def start(site: dict[str, Any]) -> Tensor:
        fn = site["fn"]
        try:
            return fn.sample().detach()
        except NotImplementedError:
            transform = biject_to(fn.support)
            zeros = torch.zeros(transform.inverse_shape(fn.shape()), dtype=dtype_of(*args))
            return transform(zeros)

    with poutine.block(), torch.no_grad():
        return poutine.trace(InitMessenger(start)(model)).get_trace(*args, **kwargs)


def is_real(support: Any) -> bool:
    """Whether a support is all of the reals, in any number of dimensions."""
    return isinstance(_bare(support), type(constraints.real))  # a deep copy has one of its own


def same_support(one: Any, other: Any) -> bool:
    """Whether two supports are the same set, up to the number of event dimensions."""
    one, other = _bare(one), _bare(other)
    bounds = [
        {name: float(v) for name, v in vars(s).items() if isinstance(v, (int, float, Tensor))}
        for s in (one, other)
    ]
    return type(one) is type(other) and bounds[0] == bounds[1]


def _bare(support: Any) -> Any:
    """A support without its event dims, and a mixture's as that of its components."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def data_plate(trace: Any, plate: str | None = None) -> Any:
    """The plate whose members are the data: `plate`, or else `data`, or else the outermost one.

    Args:
        trace: a trace of the model.
        plate: its name.

    Raises:
        ValueError: there is no plate of that name.
    """
    frames: dict[str, Any] = {}
    for node in trace.nodes.values():
        if node["type"] == "sample" and node["is_observed"] and counts(node):
            for frame in node["cond_indep_stack"]:
                if frame.dim is not None and frame.name != "_draws":
                    frames.setdefault(frame.name, frame)
    if plate is not None and plate not in frames:
        raise ValueError(f"plate: expected one of {list(frames)}, got {plate!r}")
    wanted = plate or ("data" if "data" in frames else next(iter(frames), None))
    return frames.get(wanted) if wanted is not None else None


def counts(node: Any) -> bool:
    """Whether a sample statement carries a density: no subsampling, nothing deterministic."""
    return not (site_is_subsample(node) or node["infer"].get("_deterministic", False))


def log_prob(node: dict[str, Any]) -> Tensor:
    """Log density of a node's value by batch element; zero where it is masked."""
    return masked(node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"]), node)


def masked(value: Tensor, node: dict[str, Any]) -> Tensor:
    """A value by batch element, made zero where the node's mask is false."""
    mask = node["mask"]
    if mask is None:
        return value
    return torch.where(torch.as_tensor(mask, device=value.device), value, torch.zeros_like(value))


def per_datum(value: Tensor, node: dict[str, Any], frame: Any) -> Tensor:
    """Sums over all plates but those of the data and of the draws."""
    keep = {f.dim for f in node["cond_indep_stack"] if f.name == "_draws"}
    if frame is not None:
        keep.add(frame.dim)
    drop = [dim for dim in range(-value.dim(), 0) if dim not in keep]
    return value.sum(drop) if drop else value


def is_point(fn: Any) -> bool:
    """Whether a distribution is a point, which has no density."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def has_density(node: Any, trace: Any) -> bool:
    """Whether a site of a guide has a density, which a point has not.

    The points of Pyro's autoguides carry one: the log-determinant of the map that leads there from
    an auxiliary draw. Those of a `FamilyGuide` say that they are mere pieces of one.
    """
    if not is_point(node["fn"]):
        return True
    hidden = any(
        node["infer"].get("is_auxiliary") and not (node["is_observed"] or is_point(node["fn"]))
        for node in trace.nodes.values()
        if node["type"] == "sample"
    )
    return hidden and not node["infer"].get("is_piece")


def drawn_nodes(trace: Any) -> dict[str, Any]:
    """The latent sites of a trace that carry a density, auxiliary ones among them.

    All other latents (points, and the pieces of a joint draw) follow from these.
    """
    return {
        name: node
        for name, node in trace.iter_stochastic_nodes()
        if not (site_is_subsample(node) or is_point(node["fn"]))
    }


def _is_data(node: Any) -> bool:
    seen = node["type"] == "sample" and node["is_observed"]
    deterministic = seen and node["infer"].get("_deterministic")
    return seen and not (deterministic or isinstance(node["fn"], dist.Unit))
