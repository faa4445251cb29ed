"""The potential of a model: minus its log density as a function of unconstrained latents."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae._scopes import as_they_are, private_modules, random_state, unchecked
from ppvae.programs.layout import Layout
from ppvae.programs.mapped import UNMAPPED, many
from ppvae.programs.masks import log_prob
from ppvae.programs.nodes import counts, latent_nodes, prototype, summed_nodes
from ppvae.programs.runs import BUDGET, largest_tensor
from ppvae.programs.tracing import Args, kept_nodes, run_model


@dataclass(frozen=True)
class Potential:
    """Minus log p(x, z), in nats, of all latents of a model together; made by `potential_of`.

    The latents are given as one vector of unconstrained coordinates, and the log-determinants of
    the maps to their supports are counted, so that this is the density in the space of the vector.

    Attributes:
        model: a Pyro model.
        args: its arguments.
        trace: of the model, which tells its sites.
        layout: of the latents.
    """

    model: Any
    args: Args
    trace: Any
    layout: Layout

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self.layout.size

    def __call__(self, state: Tensor) -> Tensor:
        """The potential at a state of shape `(size,)`; goes under `torch.func`'s transforms."""
        values, log_dets = self.layout.constrained(state.reshape(1, 1, -1))
        with private_modules(), as_they_are(), unchecked():
            trace = run_model(self.model, kept_nodes(self.trace, values), self.args)
        total = torch.stack([log_det.sum() for log_det in log_dets.values()]).sum()
        for node in trace.nodes.values():
            if node["type"] == "sample" and counts(node):
                total = total + (log_prob(node) * node["scale"]).sum()
        return -total

    def slope_and_value(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient and the potential; not finite where a matrix has no Cholesky factor."""
        state = state.detach().requires_grad_()
        try:
            value = self(state)
        except torch.linalg.LinAlgError:  # a step too far
            return torch.full_like(state, math.nan), state.new_tensor(math.inf)
        return torch.autograd.grad(value, state)[0], value.detach()

    def values(self, states: list[Tensor]) -> list[float]:
        """The potential at some states as numbers; infinite where it is none."""
        at_once = max(1, BUDGET // largest_tensor(self.args))
        with torch.no_grad():
            try:
                found = [many(self, some) for some in torch.stack(states).split(at_once)]
            except UNMAPPED:
                found = [self._value(state) for state in states]
        return [math.inf if math.isnan(value) else value for value in torch.cat(found).tolist()]

    def _value(self, state: Tensor) -> Tensor:
        """The potential at one state, of shape `(1,)`; infinite without a Cholesky factor."""
        try:
            return self(state).reshape(1)
        except torch.linalg.LinAlgError:
            return state.new_full((1,), math.inf)

    def prior_draws(self, count: int, seed: int) -> list[Tensor]:
        """States drawn from the prior, each of shape `(size,)`.

        What nothing can be drawn from, an improper prior, is at zero in unconstrained space.
        """
        states = []
        with random_state(seed), private_modules(), as_they_are(), unchecked():
            for _ in range(count):
                trace = prototype(self.model, self.args, {})
                values = {name: trace.nodes[name]["value"] for name in self.layout.places}
                states.append(self.layout.free(values).flatten())
        return [state for state in states if state.isfinite().all()]

    def hessian(self, state: Tensor) -> Tensor:
        """The second derivatives, by differences where a program cannot be differentiated twice.

        Nor can it where its slope is known and theirs is not, as that of `torch.logaddexp` far out.
        """
        with suppress(RuntimeError, NotImplementedError):
            found = torch.func.hessian(self)(state)
            if torch.isfinite(found).all():
                return found
        moves = 1e-4 * torch.eye(len(state), dtype=state.dtype)
        ends = [[self.slope_and_value(state + s * m)[0] for s in (1, -1)] for m in moves]
        return torch.stack([(after - before) / 2e-4 for after, before in ends])


def potential_of(model: Any, args: Args) -> Potential:
    """Looks at a model once and makes its potential.

    Raises:
        ValueError: there are no latents, or one is discrete or not reached from the reals.
    """
    trace = prototype(model, args, {})
    summed = {node["name"] for node in summed_nodes(trace)}
    values = {n["name"]: n["value"] for n in latent_nodes(trace) if n["name"] not in summed}
    trace = run_model(model, kept_nodes(trace, values), args)
    layout = Layout.of(trace, None)
    _ = layout.slices  # raises, if a site cannot be reached
    return Potential(model, args, trace, layout)
