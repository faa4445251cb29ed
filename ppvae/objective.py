r"""The terms of the objective, read from the traces, and the losses made of them.

Everything here is in nats. `terms` is the one place that turns a pair of traces into numbers;
training, evaluation and export all use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._context import eval_mode, random_state
from ppvae._divergence import closed_kl, has_density, is_point
from ppvae.sites import latent_nodes, prototype

__all__ = [
    "Terms",
    "check_reparametrized",
    "closed_kl",
    "common_scale",
    "data_plate",
    "data_size",
    "draws_plate",
    "is_point",
    "is_vectorized",
    "loss_of",
    "negative_elbo",
    "terms",
    "trace_pair",
]


_leftmost: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # dim of a model's leftmost plate


class Terms(NamedTuple):
    """The terms of the objective by site, unscaled, in nats; sums over event dims.

    Local terms have shape `(*draws, batch)`, global ones `(*draws,)`; `plate` is the data plate.

    Attributes:
        log_likelihood: observed site -> log p(x | z).
        log_prior: latent site -> log p(z).
        log_guide: guide site -> log q(z); absent for a point, which has no density.
        kl: latent site -> KL(q(z) || p(z)), where it has a closed form.
        plate: the frame of the data plate; None if the model has none.
        local: names of the sites inside the data plate.
        scales: site -> what a `poutine.scale` around it says, without the subsampling; the model's
            word counts for its latents, and for a joint draw of latents that are all scaled alike.
    """

    log_likelihood: dict[str, Tensor]
    log_prior: dict[str, Tensor]
    log_guide: dict[str, Tensor]
    kl: dict[str, Tensor]
    plate: Any
    local: frozenset[str]
    scales: dict[str, Any]

    @property
    def distortion(self) -> Tensor:
        """-log p(x | z), summed over sites."""
        return -_total(self.log_likelihood)

    @property
    def rate(self) -> Tensor:
        """KL(q || p) where it is closed, else its estimate log q(z) - log p(z).

        For a point it is -log p(z): a penalty, and not a divergence.
        """
        sampled = {k: -v for k, v in self.log_prior.items() if k not in self.kl}
        guide = {k: v for k, v in self.log_guide.items() if k not in self.kl}
        return _total(self.kl) + _total(sampled) + _total(guide)


def _total(parts: dict[str, Tensor]) -> Tensor:
    return sum(parts.values(), start=torch.zeros(()))


def trace_pair(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, draws: Any = None
) -> tuple[Any, Any]:
    """Runs the guide, then the model on its draws.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments.
        draws: a plate made by `draws_plate`, for many draws in one vectorized run.

    Returns:
        The traces of model and guide.

    Raises:
        ValueError: the guide misses a latent site of the model, or has one that the model lacks.
    """
    with draws if draws is not None else nullcontext():
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    check_sites(model_trace, guide_trace)
    return model_trace, guide_trace


def draws_plate(model: Callable[..., Any], *args: Any, draws: int) -> Any:
    """A plate of draws to the left of all plates of a model, which is looked at once."""
    if model not in _leftmost:
        with random_state(None, keep=True), eval_mode(model):
            trace = prototype(model, args, {})
        nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
        dims = [f.dim for node in nodes for f in node["cond_indep_stack"] if f.dim is not None]
        _leftmost[model] = min(dims, default=0)
    return pyro.plate("_draws", draws, dim=_leftmost[model] - 1)


def check_sites(model_trace: Any, guide_trace: Any) -> None:
    """Raises a ValueError unless model and guide have the same latent sites."""
    latent = {node["name"] for node in latent_nodes(model_trace)}
    drawn = {
        node["name"] for node in latent_nodes(guide_trace) if not node["infer"].get("is_auxiliary")
    }
    if latent - drawn:
        raise ValueError(f"guide: expected every latent site; it misses {sorted(latent - drawn)}")
    if drawn - latent:
        raise ValueError(
            f"guide: expected only latent sites of the model; it has {sorted(drawn - latent)}, of "
            f"which the model has none (its latent sites: {sorted(latent)})"
        )


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


def terms(model_trace: Any, guide_trace: Any, plate: str | None = None) -> Terms:
    """Reads the terms of the objective from the traces of a model and its guide.

    Args:
        model_trace: trace of the model, replayed against the guide.
        guide_trace: trace of the guide.
        plate: name of the data plate, see `data_plate`.
    """
    frame = data_plate(model_trace, plate)
    log_likelihood, log_prior, log_guide, kl = {}, {}, {}, {}
    scales: dict[str, Any] = {}
    local = set()

    def read(name: str, node: dict[str, Any], value: Tensor) -> Tensor:
        inside = frame is not None and any(f.name == frame.name for f in node["cond_indep_stack"])
        if inside:
            local.add(name)
        thinned = frame.full_size / frame.size if inside and frame.full_size else 1.0
        scales.setdefault(name, node["scale"] / thinned)
        return per_datum(value, node, frame if inside else None)

    for name, node in model_trace.nodes.items():
        if node["type"] != "sample" or not counts(node):
            continue
        if node["is_observed"]:
            log_likelihood[name] = read(name, node, log_prob(node))
            continue
        log_prior[name] = read(name, node, log_prob(node))
        exact = closed_kl(guide_trace.nodes[name]["fn"], node["fn"])
        if exact is not None:
            kl[name] = read(name, node, _masked(exact, node))
    for name, node in guide_trace.nodes.items():
        if node["type"] == "sample" and counts(node) and has_density(node, guide_trace):
            own = name in log_prior  # and not auxiliary: what the model masks counts nothing here
            value = log_prob(node)
            value = _masked(value, model_trace.nodes[name]) if own else value
            log_guide[name] = read(name, node, value)
    pieces = common_scale([scales[name] for name in log_prior if name not in log_guide])
    if pieces is not None:
        scales |= {name: pieces for name in log_guide if name not in log_prior}
    return Terms(log_likelihood, log_prior, log_guide, kl, frame, frozenset(local), scales)


def common_scale(scales: list[Any]) -> Any:
    """The one scale, a number or tensor, that all of some scales are; None if there is none."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return a is b or bool(torch.as_tensor(a == b).all())
        return math.isclose(a, b)  # the order of multiplying may differ

    return scales[0] if scales and all(same(scales[0], other) for other in scales[1:]) else None


def negative_elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    size: int | None = None,
    plate: str | None = None,
) -> Tensor:
    """The negative ELBO in nats per datum, from one draw, with closed KL where there is one.

    Local terms are averaged over the batch and global ones divided by the number of data, so that
    the value means the same at every batch size. A scale set by the model is kept. For a point
    guide this is the penalised negative log-likelihood, which is no bound.

    Args:
        model: a Pyro model.
        guide: its guide; every draw must be reparametrized.
        *args: their arguments: one minibatch.
        size: number of data in all; by default the size of the data plate.
        plate: name of the data plate, see `data_plate`.

    Returns:
        A scalar that can be differentiated.

    Raises:
        ValueError: sites do not match, or a draw of the guide is not reparametrized.
    """
    model_trace, guide_trace = trace_pair(model, guide, *args)
    parts = terms(model_trace, guide_trace, plate)
    check_reparametrized(parts, guide_trace)
    return loss_of(parts, size)


def check_reparametrized(parts: Terms, guide_trace: Any) -> None:
    """Raises a ValueError if the guide has parameters that no gradient reaches through a draw."""
    for name, value in parts.log_guide.items():
        fn = guide_trace.nodes[name]["fn"]
        if value.requires_grad and not fn.has_rsample:
            raise ValueError(
                f"guide: expected reparametrized draws; {name!r} is drawn from {fn}, for which "
                "pyro.infer.SVI with TraceGraph_ELBO can train this guide"
            )


def loss_of(parts: Terms, size: int | None = None) -> Tensor:
    """The negative ELBO in nats per datum of terms that were read."""
    size = data_size(parts, size)
    signed = [(name, -value) for name, value in parts.log_likelihood.items()]
    signed += [(name, value) for name, value in parts.kl.items()]
    signed += [(name, -v) for name, v in parts.log_prior.items() if name not in parts.kl]
    signed += [(name, v) for name, v in parts.log_guide.items() if name not in parts.kl]
    loss = torch.zeros(())
    for name, value in signed:
        value = value * parts.scales[name]
        loss = loss + (value.mean() if name in parts.local else value.mean() / size)
    return loss


def data_size(parts: Terms, size: int | None) -> int:
    """Number of data in all: as told, or by the data plate."""
    return size or (1 if parts.plate is None else parts.plate.full_size or parts.plate.size)


def is_vectorized(model: Any) -> bool:
    """Whether a model says that it can run inside further plates to the left of its own."""
    return bool(getattr(model, "vectorized", False))


def counts(node: Any) -> bool:
    """Whether a sample statement carries a density: no subsampling, nothing deterministic."""
    return not (site_is_subsample(node) or node["infer"].get("_deterministic", False))


def log_prob(node: dict[str, Any]) -> Tensor:
    return _masked(node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"]), node)


def _masked(value: Tensor, node: dict[str, Any]) -> Tensor:
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
