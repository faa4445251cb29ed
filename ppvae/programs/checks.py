"""What a model and its data must be, before any number is made of them."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.hmm import HiddenMarkovModel
from torch import Tensor

from ppvae._checks import expect
from ppvae._scopes import random_state
from ppvae.programs.enumeration import SummedTrace
from ppvae.programs.masks import log_prob, mask_of, masked
from ppvae.programs.nodes import (
    Node,
    bare_distribution,
    counts,
    latent_nodes,
    observed_nodes,
    prototype,
)
from ppvae.programs.plates import plates_of
from ppvae.programs.tracing import Args, Program, kept_nodes, run_model


def check_model(model: Program, trace: Any, args: Args, name: str = "data", start: int = 0) -> None:
    """Raises unless a model and its data fit each other; no random number is drawn.

    Args:
        model: a Pyro model.
        trace: of the model on the data, at draws of its guide.
        args: the arguments of the model.
        name: of the argument that the data came as.
        start: the number of their first row.

    Raises:
        TypeError: what is observed is no tensor of real numbers.
        ValueError: nothing is observed; data are outside of a support, or of another shape than
            their distribution; or a mask leaves out what other densities depend on.
    """
    check_observed(trace, name, start)
    with random_state(None, keep=True):
        # what is summed out has other shapes than its site
        check_shapes(prototype(model, args, {}) if isinstance(trace, SummedTrace) else trace)
        check_masked(model, trace, args)


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


def check_masked(model: Program, trace: Any, args: Args) -> None:
    """Raises a ValueError if latents that a model masks change what it does not mask.

    What is masked counts nothing, in the model and in the guide: it is not there. A latent that is
    there, and whose prior alone is masked, would have no entropy and shrink to a point.

    Args:
        model: a Pyro model.
        trace: of the model, at draws of its guide.
        args: the arguments of the model.
    """
    nodes = latent_nodes(trace)
    values = {node["name"]: node["value"].detach() for node in nodes}
    hidden: dict[str, Tensor] = {}
    for node in nodes:
        mask = mask_of(node)
        if mask is not None and values[node["name"]].is_floating_point():
            gone = ~torch.as_tensor(mask, device=node["value"].device)
            if gone.any():
                hidden[node["name"]] = gone.reshape(gone.shape + (1,) * len(node["fn"].event_shape))
    if not hidden:
        return
    with torch.enable_grad():
        moved = {name: values[name].requires_grad_() for name in hidden}
        again = run_model(model, kept_nodes(trace, values), args)
        parts = [node for node in again.nodes.values() if node["type"] == "sample" and counts(node)]
        total = torch.stack([log_prob(node).sum() for node in parts]).sum()
        if not total.requires_grad:
            return
        slopes = torch.autograd.grad(total, list(moved.values()), allow_unused=True)
    for (name, gone), slope in zip(hidden.items(), slopes, strict=True):
        free = slope is None or not (gone & (slope.nan_to_num() != 0)).any()
        wanted = "latents that a mask leaves out to change nothing else (a flat prior is an "
        wanted += "ImproperUniform)"
        expect(free, "model", wanted, f"{name!r}, on which other densities depend")
