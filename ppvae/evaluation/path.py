"""The two log densities that an annealed run moves between, at any point of unconstrained space."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae.guides.score import Auxiliary, auxiliary_draws
from ppvae.objectives.trace_terms import log_prob_of_guide, terms
from ppvae.programs.layout import Layout
from ppvae.programs.masks import log_prob
from ppvae.programs.nodes import Node, drawn_nodes, observed_nodes
from ppvae.programs.plates import per_datum
from ppvae.programs.runs import Runs
from ppvae.programs.tracing import Args, given, kept_nodes, run_model, run_trace


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
        runs: a model and the guide that the chains start from.
        args: the minibatch.
        plate: the data plate; None takes all the data as one.
        draws: the plate of chains; None is for one chain.
        traces: of model and guide, inside that plate.
        layout: of the latents.
        auxiliary: where the auxiliary draws of the guide are in a state; None if the guide is the
            prior, of which the model itself knows the density.
    """

    runs: Runs
    args: Args
    plate: Any
    draws: Any
    traces: tuple[Any, Any]
    layout: Layout
    auxiliary: Auxiliary | None

    def draw(self) -> Tensor:
        """A state drawn from the guide."""
        trace, _ = self.runs.pair(self.args, self.draws)
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
        known = kept_nodes(self.traces[0], values)
        trace = run_model(self.runs.model, known, self.args, self.draws)
        log_prior = zero + self._sum([trace.nodes[name] for name in values])
        log_prior = log_prior + sum(log_dets.values())
        log_p = log_prior + self._sum(observed_nodes(trace))
        if self.auxiliary is None:
            return log_prior, log_p
        for name, (place, numbers) in self.auxiliary.items():
            values[name] = place.back(state[..., numbers])
        program = given(self.runs.guide, self.traces[1], values)
        drawn = drawn_nodes(run_trace(program, self.args, self.draws))
        try:
            log_q = zero + self._of_guide(drawn, trace)
        except (NotImplementedError, KeyError) as error:  # a transform without an inverse
            raise ValueError(
                f"guide: expected a density that can be evaluated at given latents; {error}"
            ) from error
        # an auxiliary draw is made in unconstrained space
        return log_q + sum(log_dets[name] for name in drawn if name in log_dets), log_p

    def _of_guide(self, drawn: Mapping[str, Node], model_trace: Any) -> Any:
        """Log density of the guide's draws; what the model masks counts nothing."""
        cut = [model_trace.nodes[name] for name in self.layout.places if name not in drawn]
        values = {name: log_prob_of_guide(node, model_trace, cut) for name, node in drawn.items()}
        return self._total(per_datum(value, drawn[n], self.plate) for n, value in values.items())

    def _sum(self, nodes: Iterable[Node]) -> Any:
        """Log density of some nodes together; the values broadcast to `(chains, datum)`."""
        return self._total(per_datum(log_prob(node), node, self.plate) for node in nodes)

    def _total(self, values: Iterable[Tensor]) -> Any:
        total: Any = sum(values)
        return total if self.plate is not None else total.unsqueeze(-1)


def densities(runs: Runs, args: Args, draws: Any = None, *, prior: bool = False) -> Densities:
    """Runs a model and its guide once and makes the log densities of a minibatch.

    Args:
        runs: a model and the guide to start from; latents outside of the data plate make all the
            data one datum.
        args: the minibatch.
        draws: the plate of chains, made by `draws_plate`; None is for one chain.
        prior: whether the guide is the prior.

    Raises:
        ValueError: a latent is discrete, or the guide has no density that can be evaluated at given
            latents.
    """
    traces = runs.pair(args, draws)
    local = terms(*traces, None if runs.plate is None else runs.plate.name).is_local
    plate = runs.plate if local else None
    layout = Layout.of(traces[0], plate, draws)
    expect(layout.size, "model", "latents with coordinates", "none")
    auxiliary = None
    if not prior:
        auxiliary = auxiliary_draws(runs.guide, traces[1], layout, args, plate, draws)
    return Densities(runs, args, plate, draws, traces, layout, auxiliary)
