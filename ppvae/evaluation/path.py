"""The two log densities that an annealed run moves between, at any point of unconstrained space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae.programs.layout import Place
from ppvae.programs.nodes import (
    counts,
    data_plate,
    drawn_nodes,
    is_real,
    latent_nodes,
    log_prob,
    per_datum,
)
from ppvae.programs.runs import given, run_trace, trace_pair

_ELSE = 'start="prior" needs no density of a guide'


_PROBE = 0.3  # a value that other maps than a copy change


class Point(NamedTuple):
    """The state of all chains, with both log densities there and their gradients.

    Attributes:
        state: the latents in unconstrained space, shape `(chains, datum, coordinates)`.
        log_q: log density of the start, shape `(chains, datum)`; log-determinants are counted.
        log_p: log p(x, z), of the same shape.
        slope_q: gradient of `log_q`, shaped like `state`.
        slope_p: gradient of `log_p`.
    """

    state: Tensor
    log_q: Tensor
    log_p: Tensor
    slope_q: Tensor
    slope_p: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """Log p(x, z) less the log density of the start, in double precision."""
        return self.log_p.double() - self.log_q.double()

    def log_density(self, temperature: Tensor) -> Tensor:
        """`(1 - b) log q + b log p` at temperatures of shape `(datum,)`."""
        return (1 - temperature) * self.log_q + temperature * self.log_p

    def slope(self, temperature: Tensor) -> Tensor:
        """Gradient of `log_density`, shaped like `state`."""
        temperature = temperature[:, None]
        return (1 - temperature) * self.slope_q + temperature * self.slope_p


class Densities:
    """The log densities of one minibatch, for all its chains at once.

    A state holds the unconstrained coordinates of the model's latent sites, in their order. A guide
    that draws several sites by one auxiliary draw is scored at that draw, the entries of which are
    coordinates of the state.

    Args:
        model: a Pyro model.
        guide: the guide that the chains start from.
        args: their arguments.
        plate: name of the data plate, see `data_plate`.
        draws: the plate of chains, made by `draws_plate`; None is for one chain.
        prior: whether the guide is the prior, of which the model itself knows the density.

    Raises:
        ValueError: a site is outside the data plate, or discrete; or the guide has no density, or
            none that can be evaluated at given latents.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        plate: str | None = None,
        draws: Any = None,
        *,
        prior: bool = False,
    ) -> None:
        self.model, self.guide, self.args = model, guide, args
        self.draws, self.prior = draws, prior
        self.model_trace, self.guide_trace = trace_pair(model, guide, *args, draws=draws)
        self.frame = data_plate(self.model_trace, plate)
        if self.frame is None:
            raise ValueError("model: expected a plate over the data, got none")
        nodes = latent_nodes(self.model_trace)
        if not nodes:
            raise ValueError("model: expected latent sites, got none")
        for node in nodes + _observed(self.model_trace):
            _check_inside("model", node, self.frame)
        self.places = {node["name"]: Place.of(node, self.frame, draws) for node in nodes}
        #: latent site -> its coordinates in a state of so many
        self.slices, self.size = {}, 0
        for name, place in self.places.items():
            self.slices[name] = slice(self.size, self.size + place.size)
            self.size += place.size
        #: auxiliary site -> its place, and the coordinates that it draws
        self.auxiliary = {} if prior else self._auxiliary()

    def draw(self) -> Tensor:
        """A state drawn from the guide."""
        trace, _ = trace_pair(self.model, self.guide, *self.args, draws=self.draws)
        return self.state({name: trace.nodes[name]["value"] for name in self.places})

    def state(self, values: Mapping[str, Tensor]) -> Tensor:
        """The state with given values of the latent sites."""
        places = self.places.items()
        return torch.cat([p.rows(p.transform.inv(values[name])) for name, p in places], -1)

    def at(self, state: Tensor) -> Point:
        """Evaluates both log densities and their gradients; no parameter gets one."""
        state = state.detach().requires_grad_()
        with torch.enable_grad():
            log_q, log_p = self._log_densities(state)
            (slope_q,) = torch.autograd.grad(log_q.sum(), state, retain_graph=True)
            (slope_p,) = torch.autograd.grad(log_p.sum(), state)
        return Point(state.detach(), log_q.detach(), log_p.detach(), slope_q, slope_p)

    def _log_densities(self, state: Tensor) -> tuple[Tensor, Tensor]:
        zero = state.new_zeros(state.shape[:2])
        values, log_dets = {}, {}
        for name, place in self.places.items():
            free = place.shaped(state[..., self.slices[name]])
            values[name] = value = place.transform(free)
            log_dets[name] = zero
            if not is_real(place.support):
                log_det = place.transform.log_abs_det_jacobian(free, value)
                log_dets[name] = place.rows(log_det).sum(-1)
        trace = run_trace(given(self.model, self.model_trace, values), self.args, self.draws)
        log_prior = zero + self._sum([trace.nodes[name] for name in self.places])
        log_prior = log_prior + sum(log_dets.values())
        log_p = log_prior + self._sum(_observed(trace))
        if self.prior:
            return log_prior, log_p
        for name, (place, numbers) in self.auxiliary.items():
            values[name] = place.shaped(state[..., numbers])
        trace = run_trace(given(self.guide, self.guide_trace, values), self.args, self.draws)
        drawn = drawn_nodes(trace)
        try:
            log_q = zero + self._sum(drawn.values())
        except (NotImplementedError, KeyError) as error:  # a transform without an inverse
            raise ValueError(
                f"guide: expected a density that can be evaluated at given latents ({_ELSE}); "
                f"{error}"
            ) from error
        # an auxiliary draw is made in unconstrained space
        return log_q + sum(log_dets[name] for name in drawn if name in log_dets), log_p

    def _sum(self, nodes: Iterable[Any]) -> Any:
        """Log density of some nodes together; the values broadcast to `(chains, datum)`."""
        return sum(per_datum(log_prob(node), node, self.frame) for node in nodes)

    def _auxiliary(self) -> dict[str, tuple[Place, Tensor]]:
        """Finds out which coordinates of the state the auxiliary draws of the guide are."""
        drawn = drawn_nodes(self.guide_trace)
        for node in drawn.values():
            _check_inside("guide", node, self.frame)
        own = [name for name in self.places if name in drawn]
        hidden = {name: node for name, node in drawn.items() if name not in own}
        points = [name for name in self.places if name not in own]
        if points and not hidden:
            raise ValueError(f"guide: expected a density, got a point at {points}; {_ELSE}")
        if not hidden:
            return {}
        found = self._copies({name: drawn[name]["value"] for name in own}, hidden)
        taken = [number for name in own for number in range(self.size)[self.slices[name]]]
        for _, numbers in found.values():
            taken += numbers.tolist()
        if sorted(taken) != list(range(self.size)):
            raise ValueError(
                "guide: expected auxiliary draws whose entries are unconstrained coordinates of "
                f"the latents; those at {list(hidden)} are not, and {_ELSE}"
            )
        return found

    def _copies(
        self, values: dict[str, Tensor], hidden: dict[str, Any]
    ) -> dict[str, tuple[Place, Tensor]]:
        """For each hidden draw its place, and the coordinates that copy its entries, else -1.

        Count the coordinates from 1: then the gradient of the sum of number times coordinate is, at
        each entry of a draw, the number of its copy. And where all entries are set to one value,
        that is what the copies are.
        """
        with torch.enable_grad():
            probes = {
                name: torch.full_like(node["value"], _PROBE).requires_grad_()
                for name, node in hidden.items()
            }
            program = given(self.guide, self.guide_trace, {**values, **probes})
            trace = run_trace(program, self.args, self.draws)
            state = self.state({name: trace.nodes[name]["value"] for name in self.places})
            total = (state * torch.arange(1, self.size + 1, device=state.device)).sum()
            total = total + sum(0 * probe.sum() for probe in probes.values())  # for one not copied
            slopes = torch.autograd.grad(total, list(probes.values()))
        found = {}
        for (name, node), slope in zip(hidden.items(), slopes, strict=True):
            place = Place.of(node, self.frame, self.draws)
            rows = place.rows(slope)
            numbers = rows[0, 0].round().long().clamp(1, self.size) - 1
            copied = (rows - numbers - 1).abs().amax((0, 1)) < 0.01
            copied &= (state[..., numbers] - _PROBE).abs().amax((0, 1)) < 0.001
            copied &= is_real(node["fn"].support)
            found[name] = place, torch.where(copied, numbers, -1)
        return found


def _observed(trace: Any) -> list[Any]:
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
    return [node for node in nodes if node["is_observed"] and counts(node)]


def _check_inside(program: str, node: Any, frame: Any) -> None:
    if frame.name not in {f.name for f in node["cond_indep_stack"]}:
        raise ValueError(
            f"{program}: expected all sites in the plate {frame.name!r}; outside: {node['name']!r}"
            + (f" ({_ELSE})" if program == "guide" else "")
        )
