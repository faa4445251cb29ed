"""The negative ELBO of each datum, as a function of its own place in the family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ppvae._scopes import random_state
from ppvae.families.heads import Argument, Head
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.matched_normals import MatchedNormals
from ppvae.programs.nodes import drawn_nodes
from ppvae.programs.runs import draw_runs, trace_pair

_RATE = 0.2  # first step size of a search, in the unconstrained space of an argument


_FEATURE_RATE = 0.03  # the same for features, on which all of a network's output depends


class Offsets:
    """Numbers for each datum, added to what the encoder says of it: at zero, its answer.

    They are added to the output of every `Argument` that has a linear layer and so reach all values
    of a channel. A head that is more than a distribution of its arguments (a flow, or one of the
    user's own) gets others on the features that go into the rest of it. All together have shape
    `(data, size)`.

    Args:
        model: a Pyro model.
        guide: a `FamilyGuide`; its heads are held to while `attached`.
        args: their arguments.
        plate: name of the data plate.
        vectorized: run many draws at once.
    """

    def __init__(
        self, model: Any, guide: Any, args: tuple[Any, ...], plate: str | None, *, vectorized: bool
    ) -> None:
        self.model, self.guide, self.args, self.plate = model, guide, args, plate
        self.vectorized = vectorized
        self._first: dict[str, Tensor] = {}  # zeros like what each piece is added to
        self._pieces: dict[str, Tensor] = {}
        self._runs: dict[int, list[tuple[int, Any]]] = {}

    @contextmanager
    def attached(self) -> Iterator[Offsets]:
        """Holds the heads to the offsets; afterwards the guide is what it was."""
        with ExitStack() as stack:
            for handle in self._hooks():
                stack.callback(handle.remove)
            self._look()
            yield self

    def _hooks(self) -> Iterator[Any]:
        for key, head in self.guide.heads.items():
            plain = type(head) is Head
            if not plain:
                yield head.register_forward_pre_hook(self._before(key))
            for name, layer in head.named_modules():
                if isinstance(layer, Argument) and layer.linear is not None:
                    if not plain:  # it has an offset of its own, and sees the true features
                        yield layer.register_forward_pre_hook(self._before(key, sign=-1))
                    yield layer.linear.register_forward_hook(self._after(f"{key}.{name}"))

    def _before(self, key: str, sign: int = 1) -> Callable[..., Any]:
        return lambda _, given: (self._shifted(key, given[0], sign), *given[1:])

    def _after(self, key: str) -> Callable[..., Any]:
        return lambda _, given, output: self._shifted(key, output, 1)

    def _shifted(self, key: str, value: Tensor, sign: int) -> Tensor:
        if key not in self._first:
            self._first[key] = torch.zeros_like(value)
        return value + sign * self._pieces[key] if key in self._pieces else value

    def _look(self) -> None:
        """One run, which tells the shapes."""
        model_trace, guide_trace = trace_pair(self.model, self.guide, *self.args)
        self.frame = terms(model_trace, guide_trace, self.plate).plate
        drawn = drawn_nodes(guide_trace)
        for name, node in drawn.items():
            if self._first and not node["fn"].has_rsample:
                raise ValueError(
                    f"guide: expected reparametrized draws; {name!r} is drawn from {node['fn']}"
                )
        values = [node["value"] for node in drawn.values()]
        self._widest = max(v.numel() for v in [*values, *self.args] if isinstance(v, Tensor))
        #: coordinates of the latents of one datum
        self.coordinates = sum(value.numel() for value in values) // self.frame.size
        rows = [zeros.reshape(self.frame.size, -1) for zeros in self._first.values()]
        #: offsets of zero
        self.zero = torch.cat(rows, 1) if rows else values[0].new_zeros(self.frame.size, 0)
        self._lengths = [row.shape[1] for row in rows]

    def step_sizes(self) -> Tensor:
        """With what step size to begin a search, for each column."""
        rates = [_FEATURE_RATE if key in self.guide.heads else _RATE for key in self._first]
        return torch.tensor(rates).repeat_interleave(torch.tensor(self._lengths)).to(self.zero)

    def place(self, offsets: Tensor) -> None:
        """Sets the offsets, of shape `(data, size)`."""
        cut = offsets.split(self._lengths, 1) if self._first else ()
        pairs = zip(self._first.items(), cut, strict=True)
        self._pieces = {key: piece.reshape(zeros.shape) for (key, zeros), piece in pairs}

    def terms(self, draws: int, seed: int, match: str | None = None) -> list[tuple[Terms, int]]:
        """The terms, from runs that together make so many draws, and the draws of each run.

        Args:
            draws: how many.
            seed: equal seeds mean equal draws.
            match: match the moments over the draws, for each "datum", or in "common" numbers.
        """
        if draws not in self._runs:  # before the seed, since this looks at the model
            widest = self._widest if self.vectorized else None
            self._runs[draws] = list(draw_runs(self.model, self.args, draws, widest))
        found, first = [], 0
        numbers = MatchedNormals(draws, common=match == "common")
        with random_state(seed), ExitStack() as stack:
            if match is not None:
                stack.enter_context(numbers)
                stack.enter_context(numbers.places(self.frame))
            for count, plate in self._runs[draws]:
                numbers.start_run(first, count, single=plate is None)
                pair = trace_pair(self.model, self.guide, *self.args, draws=plate)
                found.append((terms(*pair, self.plate), count))
                first += count
        return found

    def loss(self, offsets: Tensor, draws: int, seed: int, match: str = "datum") -> Tensor:
        """The negative ELBO of each datum, averaged over matched draws; shape `(data,)`."""
        self.place(offsets)
        size = self.frame.size
        sums = [
            (parts.distortion + parts.rate).expand(count, size).sum(0)
            for parts, count in self.terms(draws, seed, match)
        ]
        return torch.stack(sums).sum(0) / draws

    def slope(self, offsets: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """The loss and its slope; not finite where some matrix had no Cholesky factor."""
        offsets = offsets.detach().requires_grad_()
        try:
            with torch.enable_grad():
                loss = self.loss(offsets, draws, seed, "common")
                # one datum's loss depends on its own offsets only
                (slope,) = torch.autograd.grad(loss.sum(), offsets)
        except torch.linalg.LinAlgError:
            return torch.full_like(offsets[:, 0], math.inf), torch.full_like(offsets, math.nan)
        return loss.detach(), slope


Slope = Callable[[Tensor], tuple[Tensor, Tensor]]


_BETAS, _EPSILON = (0.9, 0.99), 1e-8


_LAST = 0.003  # the last step size of Adam, relative to the first


_MEMORY = 10  # pairs of steps and changes of the slope


_FIRST_STEP = 0.1  # length of the first step, before anything is known of the curvature


_SHRINK = 0.4  # of a step that did not descend


def adam(slope: Slope, x: Tensor, steps: int, learning_rate: Tensor | float) -> Tensor:
    """Adam with steps that shrink by a constant factor; the slopes may be noisy.

    A row whose slope is not finite gets a slope of zero in that step.

    Args:
        slope: from places `(rows, size)` to values `(rows,)` and slopes `(rows, size)`.
        x: where to start.
        steps: number of evaluations.
        learning_rate: the first step size; it broadcasts to `(rows, size)`.

    Returns:
        The last places.

    Kingma and Ba, Adam: a method for stochastic optimization, 2015.
    """
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(steps):
        gradient = slope(x)[1]
        gradient = torch.where(torch.isfinite(gradient).all(1, keepdim=True), gradient, 0.0)
        mean = _BETAS[0] * mean + (1 - _BETAS[0]) * gradient
        square = _BETAS[1] * square + (1 - _BETAS[1]) * gradient**2
        ahead = mean / (1 - _BETAS[0] ** (step + 1))
        scale = (square / (1 - _BETAS[1] ** (step + 1))).sqrt() + _EPSILON
        x = x - learning_rate * _LAST ** (step / steps) * ahead / scale
    return x


def quasi_newton(slope: Slope, x: Tensor, steps: int) -> Tensor:
    """L-BFGS for each row by itself, with one evaluation of all rows in each step.

    A row whose step does not descend takes it back and shortens it, while the others go on.

    Args:
        slope: as for `adam`, but without noise; a value that is not finite means a step too far.
        x: where to start.
        steps: at most so many evaluations.

    Returns:
        The best places that were found.

    Liu and Nocedal, On the limited memory BFGS method for large scale optimization, 1989.
    """
    value, gradient = slope(x)
    memory: list[tuple[Tensor, Tensor, Tensor]] = []
    unit = _FIRST_STEP / _norm(gradient).clamp_min(1e-12)
    direction, length = -unit * gradient, torch.ones_like(unit)
    rounding = 10 * torch.finfo(x.dtype).eps
    for _ in range(steps - 1):
        descent = length[:, 0] * (gradient * direction).sum(1)
        active = -descent > rounding * (1 + value.abs())
        if not active.any():
            break
        there = x + length * direction
        new_value, new_gradient = slope(there)
        finite = torch.isfinite(new_value) & torch.isfinite(new_gradient).all(1)
        low = new_value <= value + 1e-4 * descent + rounding * value.abs()
        accepted = (active & finite & low)[:, None]
        step, change = there - x, new_gradient - gradient
        product = (step * change).sum(1, keepdim=True)
        convex = accepted & (product > 1e-10 * _norm(step) * _norm(change))
        # a pair of zeros says nothing of the curvature
        step, change, inverse = (torch.where(convex, t, 0.0) for t in (step, change, 1 / product))
        memory = [*memory[1 - _MEMORY :], (step, change, inverse)]
        unit = torch.where(convex, product / change.square().sum(1, keepdim=True), unit)
        x = torch.where(accepted, there, x)
        value = torch.where(accepted[:, 0], new_value, value)
        gradient = torch.where(accepted, new_gradient, gradient)
        direction = torch.where(accepted, _direction(gradient, memory, unit), direction)
        length = torch.where(accepted, 1.0, _SHRINK * length)
    return x


def _direction(
    gradient: Tensor, memory: list[tuple[Tensor, Tensor, Tensor]], unit: Tensor
) -> Tensor:
    """Minus the inverse curvature times the slope."""
    weights = []
    for step, change, inverse in reversed(memory):
        weights.append(inverse * (step * gradient).sum(1, keepdim=True))
        gradient = gradient - weights[-1] * change
    gradient = gradient * unit
    for (step, change, inverse), weight in zip(memory, reversed(weights), strict=True):
        gradient = gradient + step * (weight - inverse * (change * gradient).sum(1, keepdim=True))
    return -gradient


def _norm(rows: Tensor) -> Tensor:
    return rows.norm(dim=1, keepdim=True)
