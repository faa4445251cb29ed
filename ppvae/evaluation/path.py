"""The two log densities that an annealed run moves between, at any point of unconstrained space."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae.guides.score import Auxiliary, auxiliary_draws
from ppvae.programs.layout import Layout
from ppvae.programs.nodes import (
    Node,
    data_plate,
    drawn_nodes,
    is_inside,
    latent_nodes,
    log_prob,
    observed_nodes,
    per_datum,
)
from ppvae.programs.runs import given, run_trace, trace_pair

_ELSE = 'start="prior" needs no density of a guide'


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


@dataclass(frozen=True)
class Densities:
    """The log densities of one minibatch, for all its chains at once; made by `densities`.

    A state holds the unconstrained coordinates of the model's latent sites, in their order, shape
    `(chains, datum, coordinates)`. A guide that draws several sites by one auxiliary draw is scored
    at that draw, the entries of which are coordinates of the state.

    Attributes:
        model: a Pyro model.
        guide: the guide that the chains start from.
        args: their arguments.
        draws: the plate of chains; None is for one chain.
        traces: of model and guide, inside that plate.
        plate: the data plate.
        layout: of the latents.
        auxiliary: where the auxiliary draws of the guide are in a state; None if the guide is the
            prior, of which the model itself knows the density.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    draws: Any
    traces: tuple[Any, Any]
    plate: Any
    layout: Layout
    auxiliary: Auxiliary | None

    def draw(self) -> Tensor:
        """A state drawn from the guide."""
        trace, _ = trace_pair(self.model, self.guide, *self.args, draws=self.draws)
        return self.layout.free({n: trace.nodes[n]["value"] for n in self.layout.places})

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
        values, log_dets = self.layout.constrained(state)
        program = given(self.model, self.traces[0], values)
        trace = run_trace(program, self.args, self.draws)
        log_prior = zero + self._sum([trace.nodes[name] for name in values])
        log_prior = log_prior + sum(log_dets.values())
        log_p = log_prior + self._sum(observed_nodes(trace))
        if self.auxiliary is None:
            return log_prior, log_p
        for name, (place, numbers) in self.auxiliary.items():
            values[name] = place.back(state[..., numbers])
        program = given(self.guide, self.traces[1], values)
        drawn = drawn_nodes(run_trace(program, self.args, self.draws))
        try:
            log_q = zero + self._sum(drawn.values())
        except (NotImplementedError, KeyError) as error:  # a transform without an inverse
            raise ValueError(
                f"guide: expected a density that can be evaluated at given latents ({_ELSE}); "
                f"{error}"
            ) from error
        # an auxiliary draw is made in unconstrained space
        return log_q + sum(log_dets[name] for name in drawn if name in log_dets), log_p

    def _sum(self, nodes: Iterable[Node]) -> Any:
        """Log density of some nodes together; the values broadcast to `(chains, datum)`."""
        return sum(per_datum(log_prob(node), node, self.plate) for node in nodes)


def densities(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    plate: str | None = None,
    draws: Any = None,
    *,
    prior: bool = False,
) -> Densities:
    """Looks at a model and its guide and makes the log densities of a minibatch.

    Args:
        model: a Pyro model.
        guide: the guide that the chains start from.
        args: their arguments.
        plate: name of the data plate, see `data_plate`.
        draws: the plate of chains, made by `draws_plate`; None is for one chain.
        prior: whether the guide is the prior.

    Raises:
        ValueError: a site is outside the data plate, or discrete; or the guide has no density, or
            none that can be evaluated at given latents.
    """
    traces = trace_pair(model, guide, *args, draws=draws)
    frame = data_plate(traces[0], plate)
    expect(frame is not None, "model", "a plate over the data", "none")
    for node in latent_nodes(traces[0]) + observed_nodes(traces[0]):
        _check_inside("model", node, frame)
    layout = Layout.of(traces[0], frame, draws)
    expect(layout.size, "model", "latents with coordinates", "none")
    auxiliary = None
    if not prior:
        for node in drawn_nodes(traces[1]).values():
            _check_inside("guide", node, frame)
        try:
            auxiliary = auxiliary_draws(guide, traces[1], layout, args, frame, draws)
        except ValueError as error:
            raise ValueError(f"{error} ({_ELSE})") from None
    return Densities(model, guide, args, draws, traces, frame, layout, auxiliary)


def _check_inside(program: str, node: Node, plate: Any) -> None:
    if not is_inside(node, plate):
        raise ValueError(
            f"{program}: expected all sites in the plate {plate.name!r}; outside: {node['name']!r}"
            + (f" ({_ELSE})" if program == "guide" else "")
        )
