"""Finds the best member of a family for each datum, by shifts of the encoder's channels.

A shift is added to what the encoder says of one datum: at a shift of zero the guide is as it was.
The shifts of different data do not act on each other, so all are searched for side by side. An
argument that all data share stays where it is, or is freed for each datum, as the caller asks.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae._scopes import random_state
from ppvae.families.heads import Argument, Head
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.layout import Layout
from ppvae.programs.matched_normals import MatchedNormals
from ppvae.programs.nodes import drawn_nodes
from ppvae.programs.runs import Runs
from ppvae.programs.tracing import Args

_RATE = 0.2  # first step size of a search, in the unconstrained space of an argument
_FEATURE_RATE = 0.03  # the same for features, on which all of a network's output depends

# Adam
_BETAS = 0.9, 0.99
_LAST = 0.003  # the last step size, relative to the first

# L-BFGS
_MEMORY = 30  # pairs of steps and changes of the slope, enough for the latents of most models
_FIRST_STEP = 0.1  # length of the first step, before anything is known of the curvature
_SHRINK = 0.4  # of a step that did not descend
_FLAT = 1e-4  # nats that may still come, below which a search does not go on beyond its share

_DRAWS = 16  # in each step of the search
_SINGLE_DRAWS = 8  # the same where they are made one by one
_MOST = 64  # draws in a step, where a datum has many coordinates to match
_CHOICE = 64  # draws that choose between two answers of the search
_SEEDS = 1, 2  # of two sets of draws, which tell whether any would do
_ROUNDING = 100  # units of the last digit, by which two sums differ that are equal but for rounding

Slope = Callable[[Tensor], tuple[Tensor, Tensor]]


class Found(NamedTuple):
    """Where a search ended.

    Attributes:
        point: the best points, shape `(rows, size)`.
        left: how far each may still descend, shape `(rows,)`: a judgement, see `quasi_newton`; NaN
            where there is none.
    """

    point: Tensor
    left: Tensor


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
        shapes: channel -> shape of what a head says in one draw.
        coordinates: number of coordinates of the latents of one datum; 0 for a point, which has no
            random numbers.
        said: channel -> what a head says at shifts of zero.
        shared: whether arguments that all data share are freed for each datum, too.
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
    said: dict[str, Tensor]
    shared: bool = False

    def pieces(self, shifts: Tensor) -> dict[str, Tensor]:
        """Shifts by channel, each of the shape of what a head says in one draw."""
        pieces = zip(self.columns, shifts.split([*self.columns.values()], 1), strict=True)
        return {key: piece.reshape(self.shapes[key]) for key, piece in pieces}

    def _runs(
        self,
        shifts: Tensor,
        draws: int,
        seed: int,
        match: str | None,
        read: Callable[[Terms, tuple[Any, Any], Any], Tensor],
    ) -> list[Tensor]:
        """What is read off the terms, the traces and the plate of runs that make so many draws."""
        pieces = self.pieces(shifts)
        runs = _shifting(self.runs, self.heads, lambda key, _: pieces[key], shared=self.shared)
        numbers, first = MatchedNormals(draws, common=match == "common"), 0
        results = []
        with ExitStack() as stack:
            stack.enter_context(random_state(seed))
            if match is not None:
                stack.enter_context(numbers)
                stack.enter_context(numbers.places(self.runs.plate))
            for count, plate in self.runs.draws(self.args, draws, self.traces):
                numbers.start_run(first, count, single=plate is None)
                pair = runs.pair(self.args, plate)
                value = read(terms(*pair, self.runs.plate.name), pair, plate)
                results.append(value.expand(count, len(shifts), *value.shape[2:]))
                first += count
                del pair
        return results

    def log_weight(self, shifts: Tensor, draws: int, seed: int) -> Tensor:
        """Log importance weights of independent draws, shape `(draws, data)`."""
        runs = self._runs(shifts, draws, seed, None, lambda sites, *_: _rows(sites.log_weight))
        return torch.cat(runs)

    def loss(self, shifts: Tensor, draws: int, seed: int, match: str = "datum") -> Tensor:
        """The negative ELBO of each datum, averaged over matched draws; shape `(data,)`.

        Args:
            shifts: of all channels, shape `(data, size)`.
            draws: number of draws.
            seed: equal seeds mean equal draws.
            match: "datum" matches the moments of the numbers of each datum; "common" those of
                numbers that all data share.
        """

        def read(sites: Terms, *_: Any) -> Tensor:
            return _rows(sites.distortion + sites.rate)

        runs = self._runs(shifts, draws, seed, match, read)
        return torch.stack([values.sum(0) for values in runs]).sum(0) / draws

    def weighed(self, shifts: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """Log weights of matched draws, and log p(x | z) at each, both of shape `(draws, data)`."""

        def read(sites: Terms, *_: Any) -> Tensor:
            both = torch.broadcast_tensors(_rows(sites.log_weight), _rows(-sites.distortion))
            return torch.stack(both, -1)

        both = torch.cat(self._runs(shifts, draws, seed, "datum", read))
        return both[..., 0], both[..., 1]

    def moments(self, shifts: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """Mean and sd of each unconstrained coordinate of a datum, both `(data, coordinates)`.

        The coordinates are those of `Layout`. Of Gaussians they are exact.

        Raises:
            ValueError: a latent is discrete, or no bijection from the reals reaches it.
        """

        def read(_: Terms, pair: tuple[Any, Any], plate: Any) -> Tensor:
            layout = Layout.of(pair[0], self.runs.plate, plate)
            return layout.free({name: pair[0].nodes[name]["value"] for name in layout.places})

        free = torch.cat(self._runs(shifts, draws, seed, "datum", read))
        return free.mean(0), free.std(0, correction=0)

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


def _rows(value: Tensor) -> Tensor:
    """A term of one draw or of many, with a dim of draws in front."""
    return value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)


def shifted_guide(
    runs: Runs, heads: nn.ModuleDict, args: Args, *, shared: bool = False
) -> ShiftedGuide:
    """Runs a model and its `FamilyGuide` once, to see what can be shifted.

    Args:
        runs: a model and its `FamilyGuide`.
        heads: of the guide.
        args: a minibatch.
        shared: free the arguments that all data share for each datum, too.

    Raises:
        ValueError: there is something to shift, but no gradient reaches it through a draw.
    """
    zeros: dict[str, Tensor] = {}
    said: dict[str, Tensor] = {}

    def note(key: str, value: Tensor) -> Tensor:
        said.setdefault(key, value.detach())
        return zeros.setdefault(key, torch.zeros_like(value))

    traces = _shifting(runs, heads, note, shared=shared).pair(args)
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
    found = runs, heads, args, traces, start, step_sizes, columns, shapes, coordinates, said
    return ShiftedGuide(*found, shared)


def _shifting(
    runs: Runs, heads: nn.ModuleDict, shift: Callable[[str, Tensor], Tensor], *, shared: bool
) -> Runs:
    """The pair with shifts in the guide alone: a model may ask its heads, too, as a `VampPrior`."""

    def guide(*args: Any) -> Any:
        with with_shifts(heads, shift, shared=shared):
            return runs.guide(*args)

    return replace(runs, guide=guide)


@contextmanager
def with_shifts(
    heads: nn.ModuleDict, shift: Callable[[str, Tensor], Tensor], *, shared: bool = False
) -> Iterator[None]:
    """Adds `shift(channel, value)` to what the heads see, by hooks that are gone afterwards.

    It is added to the output of every `Argument` that has a linear layer (`z.loc`), and so reaches
    all values of a channel. A head that is more than a distribution of its arguments (a flow, or
    one of the user's own) gets another shift on the features that go into the rest of it (`z`).
    Where `shared` says so, an argument that all data share gets one for each datum, before its
    transform.
    """

    def on_features(key: str, sign: int) -> Callable[..., Any]:
        def hook(_: Any, inputs: Any) -> Any:
            free = inputs[0] is None  # parameters: no answer to a datum, and not searched
            return None if free else (inputs[0] + sign * shift(key, inputs[0]), *inputs[1:])

        return hook

    def on_output(key: str) -> Callable[..., Any]:
        return lambda _, inputs, output: output + shift(key, output)

    def on_shared(key: str, head: Head) -> Callable[..., Any]:
        def hook(layer: Any, inputs: Any, _: Any) -> Any:
            if inputs[0] is None:
                return None
            number = not layer.raw_shape and not head.family.joint
            each = [1] * len(head.shape) if number else []  # beside arguments of the whole shape
            raw = layer.raw.expand(*inputs[0].shape[:-1], *each, *layer.raw_shape)
            return layer.inside(raw + shift(key, raw))

        return hook

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
                elif isinstance(layer, Argument) and isinstance(head, Head) and plain and shared:
                    handles.append(layer.register_forward_hook(on_shared(f"{key}.{name}", head)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def best_shifts(shifted: ShiftedGuide, start: Tensor, steps: int, tick: Callable[[], Any]) -> Found:
    """The shifts of the best member for each datum, by a search from some start.

    First Adam on fresh draws; then L-BFGS on a few fixed ones. That may fit those draws, and then
    the answer of Adam is kept, of which nothing is judged; with more unknowns than random numbers
    it would, so it is left out. Where the draws are exact, as on linear-Gaussian models, L-BFGS
    does it alone, in a tenth of the evaluations: from where it starts to where it ends the loss is
    the same for any draws.

    Args:
        shifted: a guide.
        start: shifts to begin with, shape `(data, size)`.
        steps: number of evaluations; where the last of them still bring something, up to two
            thirds as many follow.
        tick: is called before each, but for those that follow.
    """
    if not start.shape[1]:
        return Found(start, start.new_zeros(len(start)))
    draws = max(_DRAWS if shifted.runs.vectorized else _SINGLE_DRAWS, shifted.coordinates + 2)
    draws = draws if draws <= _MOST else 2 * _DRAWS
    point = not shifted.coordinates
    draws = 1 if point else draws

    left_over = iter(range(steps))

    def slope(shifts: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        if next(left_over, None) is not None:
            tick()
        return shifted.slope(shifts, draws, new_seed() if seed is None else seed)

    last_steps = steps // 3 if point or start.shape[1] <= draws * shifted.coordinates else 0
    if last_steps and not point and _is_exact(shifted, start, draws):
        most = 2 * steps - steps // 3
        found = quasi_newton(lambda shifts: slope(shifts, _SEEDS[0]), start, steps, most)
        if _is_exact(shifted, found.point, draws):
            return found
        left_over = iter(range(steps))
    best = adam(slope, start, steps - last_steps, shifted.step_sizes)
    best = better_of(shifted, start, best)
    found = Found(best, best.new_full((len(best),), math.nan))
    if last_steps:
        seed = new_seed()
        last = quasi_newton(lambda shifts: slope(shifts, seed), best, last_steps, steps)
        found = better_found(shifted, found, last)
    return found


def _is_exact(shifted: ShiftedGuide, shifts: Tensor, draws: int) -> bool:
    """Whether so many matched draws give the loss without an error, whichever they are."""
    one, other = (shifted.loss(shifts, draws, seed, "common") for seed in _SEEDS)
    rounding = _ROUNDING * torch.finfo(one.dtype).eps * (1 + one.abs())
    return bool(((one - other).abs() <= rounding).all())


def better_of(shifted: ShiftedGuide, one: Tensor, other: Tensor) -> Tensor:
    """For each datum the better of two shifts, on draws of their own."""
    return torch.where(_is_better(shifted, other, one)[:, None], other, one)


def better_found(shifted: ShiftedGuide, one: Found, other: Found) -> Found:
    """For each datum the better of what two searches found, on draws of their own."""
    better = _is_better(shifted, other.point, one.point)
    point = torch.where(better[:, None], other.point, one.point)
    return Found(point, torch.where(better, other.left, one.left))


def _is_better(shifted: ShiftedGuide, one: Tensor, other: Tensor) -> Tensor:
    draws, seed = _CHOICE if shifted.coordinates else 1, new_seed()
    return shifted.loss(one, draws, seed) < shifted.loss(other, draws, seed)


def new_seed() -> int:
    """A seed from the stream of random numbers at hand."""
    return int(torch.randint(2**62, ()))


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


def quasi_newton(slope: Slope, x: Tensor, steps: int, most: int = 0) -> Found:
    """L-BFGS for each row by itself, with one evaluation of all rows in each step.

    A row whose step does not descend takes it back and shortens it, while the others go on.

    What may still come is judged by what came in the last quarter of the evaluations: a value that
    falls like 1 / evaluation, or faster, has at most three times as far to go.

    Args:
        slope: as for `adam`, but without noise; a value that is not finite marks a step that was
            too long.
        x: where to start.
        steps: so many evaluations, or fewer where no row descends any more.
        most: if some row is not yet at rest, it goes on until all are, to at most so many.

    Returns:
        The best points, and how far they may still descend.

    Liu and Nocedal, On the limited memory BFGS method for large scale optimization, 1989.
    """
    value, gradient = slope(x)
    memory: list[tuple[Tensor, Tensor, Tensor]] = []
    unit = _FIRST_STEP / _norm(gradient).clamp_min(1e-12)
    direction, length = -unit * gradient, torch.ones_like(unit)
    rounding = 10 * torch.finfo(x.dtype).eps
    values = [value]

    def left() -> Tensor:
        quarter = max(1, len(values) // 4)
        return 3 * (values[-1 - quarter] - value) if len(values) > quarter else value * math.nan

    active = torch.ones_like(value, dtype=torch.bool)
    while len(values) < max(steps, most):
        if len(values) >= steps and not (left() > _FLAT).any():
            break
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
        values.append(value)
    return Found(x, torch.where(active, left(), 0.0))


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
