"""Finds the best member of a family for each datum, by shifts of the encoder's channels.

A shift is added to what the encoder says of one datum: at a shift of zero the guide is as it was.
The shifts of different data do not act on each other, so all are searched for side by side.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae._scopes import random_state
from ppvae.families.heads import Argument, Head
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.matched_normals import MatchedNormals
from ppvae.programs.nodes import drawn_nodes
from ppvae.programs.runs import Args, Runs

_RATE = 0.2  # first step size of a search, in the unconstrained space of an argument
_FEATURE_RATE = 0.03  # the same for features, on which all of a network's output depends

# Adam
_BETAS = 0.9, 0.99
_LAST = 0.003  # the last step size, relative to the first

# L-BFGS
_MEMORY = 10  # pairs of steps and changes of the slope
_FIRST_STEP = 0.1  # length of the first step, before anything is known of the curvature
_SHRINK = 0.4  # of a step that did not descend

Slope = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ShiftedGuide:
    """The negative ELBO of each datum as a function of its shifts; made by `shifted_guide`.

    Shifts have shape `(data, size)`, with the columns of one channel after those of another.

    Attributes:
        runs: a model and its `FamilyGuide`.
        heads: of the guide.
        args: a minibatch.
        traces: of model and guide on the minibatch.
        start: shifts of zero, where the guide is the encoder's.
        step_sizes: with what to begin a search, for each column.
        columns: channel -> number of its columns.
        coordinates: number of coordinates of the latents of one datum.
    """

    runs: Runs
    heads: nn.ModuleDict
    args: Args
    traces: tuple[Any, Any]
    start: Tensor
    step_sizes: Tensor
    columns: dict[str, int]
    shapes: dict[str, torch.Size]
    coordinates: int

    def pieces(self, shifts: Tensor) -> dict[str, Tensor]:
        """Shifts by channel, each of the shape of what a head says in one draw."""
        pieces = zip(self.columns, shifts.split([*self.columns.values()], 1), strict=True)
        return {key: piece.reshape(self.shapes[key]) for key, piece in pieces}

    def _runs(
        self, shifts: Tensor, draws: int, seed: int, match: str | None
    ) -> list[tuple[Terms, torch.Size]]:
        """The terms of runs that together make so many draws, and the shape of each."""
        pieces = self.pieces(shifts)
        numbers, first = MatchedNormals(draws, common=match == "common"), 0
        results = []
        with ExitStack() as stack:
            stack.enter_context(random_state(seed))
            stack.enter_context(with_shifts(self.heads, lambda key, _: pieces[key]))
            if match is not None:
                stack.enter_context(numbers)
                stack.enter_context(numbers.places(self.runs.plate))
            for count, plate in self.runs.draws(self.args, draws, self.traces):
                numbers.start_run(first, count, single=plate is None)
                sites = terms(*self.runs.pair(self.args, plate), self.runs.plate.name)
                results.append((sites, torch.Size([count, len(shifts)])))
                first += count
        return results

    def log_weight(self, shifts: Tensor, draws: int, seed: int) -> Tensor:
        """Log importance weights of independent draws, shape `(draws, data)`."""
        runs = self._runs(shifts, draws, seed, None)
        return torch.cat([sites.log_weight.expand(size) for sites, size in runs])

    def loss(self, shifts: Tensor, draws: int, seed: int, match: str = "datum") -> Tensor:
        """The negative ELBO of each datum, averaged over matched draws; shape `(data,)`.

        Args:
            shifts: of all channels, shape `(data, size)`.
            draws: number of draws.
            seed: equal seeds mean equal draws.
            match: "datum" matches the moments of the numbers of each datum; "common" those of
                numbers that all data share.
        """
        runs = self._runs(shifts, draws, seed, match)
        sums = [(sites.distortion + sites.rate).expand(size).sum(0) for sites, size in runs]
        return torch.stack(sums).sum(0) / draws

    def slope(self, shifts: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """The loss and its slope; not finite where some matrix had no Cholesky factor."""
        shifts = shifts.detach().requires_grad_()
        try:
            with torch.enable_grad():
                loss = self.loss(shifts, draws, seed, "common")
                # one datum's loss depends on its own shifts only
                (slope,) = torch.autograd.grad(loss.sum(), shifts)
        except torch.linalg.LinAlgError:
            return torch.full_like(shifts[:, 0], math.inf), torch.full_like(shifts, math.nan)
        return loss.detach(), slope


def shifted_guide(runs: Runs, heads: nn.ModuleDict, args: Args) -> ShiftedGuide:
    """Runs a model and its `FamilyGuide` once, to see what can be shifted.

    Args:
        runs: a model and its `FamilyGuide`.
        heads: of the guide.
        args: a minibatch.

    Raises:
        ValueError: there is something to shift, but no gradient reaches it through a draw.
    """
    zeros: dict[str, Tensor] = {}
    with with_shifts(heads, lambda key, value: zeros.setdefault(key, torch.zeros_like(value))):
        traces = runs.pair(args)
    drawn = drawn_nodes(traces[1])
    rough = {name: node["fn"] for name, node in drawn.items() if not node["fn"].has_rsample}
    expect(not (zeros and rough), "guide", "reparametrized draws", rough)
    size = terms(*traces, runs.plate.name).plate.size
    coordinates = sum(node["value"].numel() for node in drawn.values()) // size
    columns = {channel: zero.numel() // size for channel, zero in zeros.items()}
    start, step_sizes = torch.zeros(size, 0), torch.zeros(0)
    if zeros:
        start = torch.cat([zero.reshape(size, -1) for zero in zeros.values()], 1)
        rates = torch.tensor([_RATE if "." in key else _FEATURE_RATE for key in columns])
        step_sizes = rates.repeat_interleave(torch.tensor(list(columns.values()))).to(start)
    shapes = {channel: zero.shape for channel, zero in zeros.items()}
    return ShiftedGuide(runs, heads, args, traces, start, step_sizes, columns, shapes, coordinates)


@contextmanager
def with_shifts(heads: nn.ModuleDict, shift: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Adds `shift(channel, value)` to what the heads see, by hooks that are gone afterwards.

    It is added to the output of every `Argument` that has a linear layer (`z.loc`), and so reaches
    all values of a channel. A head that is more than a distribution of its arguments (a flow, or
    one of the user's own) gets another shift on the features that go into the rest of it (`z`).
    """

    def on_features(key: str, sign: int) -> Callable[..., Any]:
        def hook(_: Any, inputs: Any) -> Any:
            free = inputs[0] is None  # parameters: no answer to a datum, and not searched
            return None if free else (inputs[0] + sign * shift(key, inputs[0]), *inputs[1:])

        return hook

    def on_output(key: str) -> Callable[..., Any]:
        return lambda _, inputs, output: output + shift(key, output)

    handles = []
    try:
        for key, head in heads.items():
            plain = type(head) is Head
            if not plain:
                handles.append(head.register_forward_pre_hook(on_features(key, 1)))
            for name, layer in head.named_modules():
                if isinstance(layer, Argument) and layer.linear is not None:
                    if not plain:  # it has a shift of its own, and sees the true features
                        handles.append(layer.register_forward_pre_hook(on_features(key, -1)))
                    handles.append(layer.linear.register_forward_hook(on_output(f"{key}.{name}")))
        yield
    finally:
        for handle in handles:
            handle.remove()


def adam(slope: Slope, x: Tensor, steps: int, learning_rate: Tensor | float) -> Tensor:
    """Adam with steps that shrink by a constant factor; the slopes may be noisy.

    A row whose slope is not finite gets a slope of zero in that step.

    Args:
        slope: from points `(rows, size)` to values `(rows,)` and slopes `(rows, size)`.
        x: where to start.
        steps: number of evaluations.
        learning_rate: the first step size; it broadcasts to `(rows, size)`.

    Returns:
        The last points.

    Kingma and Ba, Adam: a method for stochastic optimization, 2015.
    """
    moves = torch.zeros_like(x)  # in units of the first step size, which columns differ in
    optimizer = torch.optim.Adam([moves], betas=_BETAS)
    for step in range(steps):
        gradient = slope(x + learning_rate * moves)[1]
        moves.grad = torch.where(torch.isfinite(gradient).all(1, keepdim=True), gradient, 0.0)
        optimizer.param_groups[0]["lr"] = _LAST ** (step / steps)
        optimizer.step()
    return x + learning_rate * moves


def quasi_newton(slope: Slope, x: Tensor, steps: int) -> Tensor:
    """L-BFGS for each row by itself, with one evaluation of all rows in each step.

    A row whose step does not descend takes it back and shortens it, while the others go on.

    Args:
        slope: as for `adam`, but without noise; a value that is not finite marks a step that was
            too long.
        x: where to start.
        steps: at most so many evaluations.

    Returns:
        The best points.

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
        ahead = x + length * direction
        new_value, new_gradient = slope(ahead)
        finite = torch.isfinite(new_value) & torch.isfinite(new_gradient).all(1)
        low = new_value <= value + 1e-4 * descent + rounding * value.abs()
        accepted = (active & finite & low)[:, None]
        step, change = ahead - x, new_gradient - gradient
        product = (step * change).sum(1, keepdim=True)
        convex = accepted & (product > 1e-10 * _norm(step) * _norm(change))
        # a pair of zeros says nothing of the curvature
        step, change, inverse = (torch.where(convex, t, 0.0) for t in (step, change, 1 / product))
        memory = [*memory[1 - _MEMORY :], (step, change, inverse)]
        unit = torch.where(convex, product / change.square().sum(1, keepdim=True), unit)
        x = torch.where(accepted, ahead, x)
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
