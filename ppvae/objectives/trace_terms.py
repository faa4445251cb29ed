"""The terms of the objective, read from the traces of a model and its guide, in nats.

`terms` is the one place that turns a pair of traces into numbers; training, evaluation and export
all use it.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae.objectives.divergence import closed_kl
from ppvae.programs.masks import common_mask, log_prob, mask_of, masked
from ppvae.programs.nodes import Node, has_density, is_point, latent_nodes, observed_nodes
from ppvae.programs.plates import data_plate, is_inside, per_datum


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
        return -_sum(self.log_likelihood)

    @property
    def rate(self) -> Tensor:
        """KL(q || p) where it is closed, else its estimate log q(z) - log p(z).

        For a point it is -log p(z): a penalty, and not a divergence.
        """
        sampled = {k: -v for k, v in self.log_prior.items() if k not in self.kl}
        guide = {k: v for k, v in self.log_guide.items() if k not in self.kl}
        return _sum(self.kl) + _sum(sampled) + _sum(guide)

    @property
    def is_local(self) -> bool:
        """Whether all latent sites are in the data plate, so that each datum has its own draws."""
        return self.plate is not None and set(self.log_prior) | set(self.log_guide) <= self.local

    @property
    def is_dense(self) -> bool:
        """Whether the guide has a density for every latent, so that its objective is a bound."""
        joint = set(self.log_guide) - set(self.log_prior)
        return bool(joint) or set(self.log_prior) <= set(self.log_guide)

    @property
    def log_joint(self) -> Tensor:
        """Log p(x, z): `(*draws, batch)` if `is_local`, else of all data together, `(*draws,)`."""
        return self.total({**self.log_likelihood, **self.log_prior})

    @property
    def log_q(self) -> Tensor:
        """Log q(z), of the shape of `log_joint`; zero for a point."""
        return self.total(self.log_guide)

    @property
    def log_weight(self) -> Tensor:
        """Log p(x, z) - log q(z): the log of the importance weight of a draw."""
        return self.log_joint - self.log_q

    def total(self, values: dict[str, Tensor]) -> Tensor:
        """The sum of one kind of term over sites, of the shape of `log_joint`."""
        whole = not self.is_local
        return _sum({k: v.sum(-1) if whole and k in self.local else v for k, v in values.items()})

    def part(self, *, local: bool) -> "Terms":
        """The terms of the sites in the data plate, or those of the others."""
        kinds: dict[str, Any] = {
            kind: {n: v for n, v in getattr(self, kind).items() if (n in self.local) == local}
            for kind in ("log_likelihood", "log_prior", "log_guide", "kl")
        }
        return self._replace(**kinds) if local else self._replace(**kinds, plate=None)

    def check_local(self) -> None:
        """Raises a ValueError unless all sites are in the data plate."""
        expect(self.plate is not None, "model", "a plate over the data", "none")
        plate = f"the plate {self.plate.name!r}"
        outside = sorted({*self.log_prior, *self.log_likelihood} - self.local)
        if outside:
            advice = "; `log_prob` and `from_pyro_svi` take such models"
            raise ValueError(f"model: expected all sites in {plate}; outside: {outside}{advice}")
        joint = sorted(self.log_guide.keys() - self.local)
        got = f"{joint} of all data at once (a joint family without an encoder?)"
        expect(not joint, "guide", f"draws per datum, in {plate}", got)


def _sum(values: dict[str, Tensor]) -> Tensor:
    return sum(values.values(), start=torch.zeros(()))


def terms(model_trace: Any, guide_trace: Any, plate: str | None = None) -> Terms:
    """Reads the terms of the objective from the traces of a model and its guide.

    Args:
        model_trace: trace of the model, replayed against the guide.
        guide_trace: trace of the guide.
        plate: name of the data plate, see `data_plate`.
    """
    frame = data_plate(model_trace, plate)
    log_prior, log_guide, kl = {}, {}, {}
    scales: dict[str, Any] = {}
    local = set()

    def read(node: Node, value: Tensor) -> Tensor:
        inside = is_inside(node, frame)
        if inside:
            local.add(node["name"])
        thinned = frame.full_size / frame.size if inside and frame.full_size else 1.0
        scales.setdefault(node["name"], node["scale"] / thinned)
        return per_datum(value, node, frame if inside else None)

    order = {name: number for number, name in enumerate(guide_trace.nodes)}
    last = -1  # of the latents that the prior of the next may depend on
    for node in latent_nodes(model_trace):
        name = node["name"]
        log_prior[name] = read(node, log_prob(node))
        # A latent that the guide draws later may depend on this one, which its prior depends on:
        # then the divergence given that latent is no mean over draws of this one
        mean_field, last = order[name] > last, max(last, order[name])
        exact = closed_kl(guide_trace.nodes[name]["fn"], node["fn"]) if mean_field else None
        if exact is not None:
            kl[name] = read(node, masked(exact, node))
    observed = observed_nodes(model_trace)
    log_likelihood = {node["name"]: read(node, log_prob(node)) for node in observed}
    points = [name for name in log_prior if is_point(guide_trace.nodes[name]["fn"])]
    cut = [model_trace.nodes[name] for name in points]
    for node in _dense_nodes(guide_trace):
        log_guide[node["name"]] = read(node, log_prob_of_guide(node, model_trace, cut))
    pieces = common_scale([scales[name] for name in log_prior if name not in log_guide])
    if pieces is not None:
        scales |= {name: pieces for name in log_guide if name not in log_prior}
    return Terms(log_likelihood, log_prior, log_guide, kl, frame, frozenset(local), scales)


def log_prob_of_guide(node: Node, model_trace: Any, cut: list[Node]) -> Tensor:
    """Log density of a guide's node by batch element; what the model masks counts nothing here.

    Args:
        node: the node.
        model_trace: the trace of the model.
        cut: the latents of the model that the guide cuts from joint draws.
    """
    value = log_prob(node)
    owner = model_trace.nodes.get(node["name"]) or _masked_alike(cut, value)
    return value if owner is None else masked(value, owner)


def has_masked_latents(model_trace: Any) -> bool:
    """Whether the model masks some of its latents, so that these are none of some data."""
    masks = [mask_of(node) for node in latent_nodes(model_trace)]
    return any(mask is not None and not torch.as_tensor(mask).all() for mask in masks)


def _masked_alike(nodes: list[Node], value: Tensor) -> Node | None:
    """One of the latents that are cut from a joint draw, which are all masked as it is.

    Args:
        nodes: the latents.
        value: the log density of the draw.

    Returns:
        The latent; None if none is masked.

    Raises:
        ValueError: they are masked differently, so that the density of a part would be wanted.
    """
    masks = {node["name"]: mask_of(node) for node in nodes}
    return None if common_mask(masks, value.shape) is None else nodes[0]


def _dense_nodes(trace: Any) -> list[Node]:
    """The sample statements of a guide's trace that have a density."""
    nodes = [*latent_nodes(trace), *observed_nodes(trace)]
    return [node for node in nodes if has_density(node, trace)]


def common_scale(scales: list[Any]) -> Any:
    """The one scale, a number or tensor, that all of some scales are; None if there is none."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return a is b or bool(torch.as_tensor(a == b).all())
        return math.isclose(a, b)  # the order of multiplying may differ

    return scales[0] if scales and all(same(scales[0], other) for other in scales[1:]) else None


def data_size(terms: Terms, size: int | None) -> int:
    """Number of data in all: `size`, or where that is None the size of the data plate."""
    return size or (1 if terms.plate is None else terms.plate.full_size or terms.plate.size)


def log_density(trace: Any, frame: Any) -> Tensor:
    """Log q of all latents of a guide's trace, in nats, as one number per datum and draw.

    What lies outside of the plate `frame`, or all if that is None, is one number per draw.
    """
    total = torch.zeros(())
    for node in _dense_nodes(trace):
        plate = frame if is_inside(node, frame) else None
        total = total + per_datum(log_prob(node), node, plate)
    return total
