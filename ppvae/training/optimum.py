"""The optimum of the ELBO of global latents: found, and held against what an optimum must be.

With the random numbers of some draws held fixed the negative ELBO is a smooth deterministic
function (a sample-average approximation; Giordano, Ingram and Broderick, 2024; Burroni, Domke and
Sheldon, 2024). It is minimised in coordinates that are made from the mode of the posterior and the
curvature there, with more draws as long as their error is felt in a posterior mean.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ppvae._process import interrupted
from ppvae._scopes import double_precision, kept_buffers, private_modules, random_state, unchecked
from ppvae.guides import FamilyGuide
from ppvae.guides.chart import Chart, pieces_of
from ppvae.guides.start import starting_values
from ppvae.objectives.elbo import ELBO
from ppvae.programs.keywords import bare
from ppvae.programs.layout import Layout
from ppvae.programs.matched_normals import matched
from ppvae.programs.potential import Potential, potential_of
from ppvae.training.average import Average, average_of, without_fallback_warnings
from ppvae.training.blame import first_culprit
from ppvae.training.descent import descend_over_kinks, lbfgs
from ppvae.training.mode import Mode, gaussian_near
from ppvae.training.snapshots import Diverged
from ppvae.training.surface import EXCESS, Curvature, Surface, spread_of, units_of
from ppvae.training.task import Task

_FEWEST, _MOST = 32, 1024  # draws
_MORE = 8  # times as many, since parameters of which nothing is known are soon fitted to the draws
_PARAMETERS = 500  # of which nothing is known beforehand: more would fit the draws
_LATENTS = 1000
_ROUGH = 1e-2  # slope of a minimum that is good enough to ask how many draws are needed
_ANNEALED = 500  # steps of stochastic gradients, at most
_BLOCKS = 20  # of fresh draws, whose mean gradients are compared
_CONFIRMING = 2_000  # fresh draws that confirm those held fixed
_ONE_BY_ONE = 302  # draws, where each is a run of the program
FRESH = 10_000  # draws by which an optimum is judged


def is_global(task: Task) -> bool:
    """Whether the parameters of a task are those of latents, one by one, and not of a network.

    Then, with the plain ELBO of all the data, it has an optimum that can be found and judged.
    """
    program = task.program
    if not (program.objective == ELBO() and task.batches.whole and task.parameters):
        return False
    frame = program.plate
    if frame is not None and frame.full_size not in (None, frame.size):
        return False  # each run draws other rows
    (batch,) = task.batches
    with (
        torch.no_grad(),
        private_modules(),
        unchecked(),
        kept_buffers(program),
        random_state(None, keep=True),
    ):
        terms = task.terms(batch)
    latent = {*terms.log_prior, *terms.log_guide}
    return bool(latent) and (is_free(program.guide) or not latent & terms.local)


def is_free(guide: Any) -> bool:
    """Whether all that a guide learns are free parameters, and not those of an encoder."""
    guide = bare(guide)
    if not isinstance(guide, AutoGuide):
        return False
    families = [part for part in guide.modules() if isinstance(part, FamilyGuide)]
    return not any(
        part.encoder is not None or getattr(part.family, "from_model", False) for part in families
    )


@dataclass(frozen=True)
class Optimum:
    """Where a minimisation ended.

    Attributes:
        values: of the parameters, in doubles.
        losses: the objective in nats per datum, after each step.
        draws: how many were held fixed in the end; 1 if the guide draws a point.
        step: the largest Newton step that is left, in posterior sds.
        site: the coordinate whose step that is.
        error: the largest Monte Carlo error of a mean, in posterior sds.
        excess: the nats by which the objective is short of its optimum since the draws are few;
            NaN where that is not known.
        others: modes that were met beside the one it started from.
        layout: of the latents.
        chosen: whether the mode is the one near a start that was asked for.
        one_by_one: why draws were run one after the other; empty where they were not.
    """

    values: list[Tensor]
    losses: list[float]
    draws: int
    step: float
    site: str
    error: float
    excess: float
    others: list[Mode]
    layout: Layout
    chosen: bool = False
    one_by_one: str = ""


class Way:
    """The way to an optimum: the losses in nats per datum after each step, and whether to go on.

    Args:
        size: the number of data.
        stops: is told of each step, as a callback of `fit`, and returns True to end the way.
    """

    def __init__(self, size: int, stops: Callable[[dict[str, Any]], bool]) -> None:
        self.size, self.losses, self.stopped, self.stops = size, list[float](), False, stops
        self._start = time.perf_counter()

    def add(self, value: float) -> None:
        """Adds the loss of all data in nats, after a step."""
        epoch, loss = len(self.losses), value / self.size
        self.losses.append(loss)
        seconds = time.perf_counter() - self._start
        row = {"epoch": epoch, "loss": loss, "num_steps": epoch + 1, "seconds": seconds}
        self.stopped = self.stops(row) or self.stopped

    @property
    def ended(self) -> bool:
        """Whether the callback or an interrupt has ended it."""
        return self.stopped or interrupted()


def optimise(task: Task, way: Way, *, steps: int, seed: int) -> Optimum | None:
    """Minimises the objective over the parameters of a task, which are not moved.

    Args:
        task: one that `is_global`.
        way: is told of each step; where it ends, so does the minimisation, where it stands.
        steps: at most so many of the method in each round.
        seed: chooses starts and draws.

    Returns:
        The optimum; None if there are too many latents.
    """
    with (
        double_precision(task.parameters[0].device) as doubles,
        unchecked(),
        private_modules(),
        without_fallback_warnings(),
    ):
        average = average_of(task)
        (batch,) = task.batches
        potential = potential_of(task.program.model, batch)
        if potential.size > _LATENTS:
            return None
        potential = replace(potential, args=average.batch)
        if not average.mixed:
            doubles.look_no_more()
        start = _start(task, potential)
        near = gaussian_near(potential, seed, start)
        value = potential.slope_and_value(near.mean)[1].item()
        if not math.isfinite(value):
            why = f"minus the log density of the model is {value} wherever it was tried"
            raise Diverged(
                f"{why}, from {first_culprit(task, batch)}; the parameters are unchanged"
            )
        factor = near.factor
        if not average.normals:  # a point may lie on kinks, which are found along the axes
            factor = torch.diag(factor.square().sum(1).sqrt())
        chart = Chart(
            task.parameters, pieces_of(bare(task.program.guide), near.mean, factor), factor
        )
        few = (~chart.known()).sum() <= _PARAMETERS
        method = _with_fixed_draws if average.smooth and few else _with_fresh_draws
        told = potential.layout, near.others
        found = method(average, chart, way, steps, seed, *told)
        return replace(found, chosen=start is not None, one_by_one=average.why_not)


def _start(task: Task, potential: Potential) -> Tensor | None:
    """Where the guide was told to start, in the coordinates of a potential; None if nowhere."""
    init = getattr(bare(task.program.guide), "init_loc_fn", None)
    if init is None:
        return None
    values = starting_values(init, task.program.model, potential.args, {})
    return potential.layout.free(values).flatten().to(torch.get_default_dtype())


def _with_fixed_draws(
    average: Average,
    chart: Chart,
    way: Way,
    steps: int,
    seed: int,
    layout: Layout,
    others: list[Mode],
) -> Optimum:
    """Minimises the mean loss of draws that are held fixed, with more, until they are enough."""
    place, free = torch.zeros(chart.size), torch.ones(chart.size)
    draws = max(_FEWEST, 2 * average.normals + 2) if average.normals else 1
    if draws > 1 and average.at_once > 1 and not chart.known().all():
        draws *= _MORE
    most = max(_MOST, 8 * average.normals)
    while True:
        normals = matched(draws, average.normals, seed) if draws > 1 else torch.zeros(1, 0)
        alone = ~chart.known()
        if not way.losses and alone.any():
            chart.units[alone] = units_of(Surface(average, chart, normals), place, alone)
        surface = Surface(average, chart, normals)  # one that has seen these units only
        descend = partial(_descend, surface, steps + len(way.losses), way)
        place = descend(place, free, tolerance=_ROUGH)
        if way.ended:
            if not way.losses:
                way.add(surface(place)[1].item())
            ends = draws, math.nan, "", math.nan, math.nan
            return Optimum(chart(place), way.losses, *ends, others, layout)
        curvature = Curvature.at(surface, place, free)
        if 1 < draws < most and curvature.needed > 1:
            draws = min(draws * curvature.needed, most)
            continue
        place = descend(place, free)
        if not way.losses:  # it started at the optimum
            way.add(surface(place)[1].item())
        if draws == 1 and surface(place)[0].abs().max() > 1e-4:
            place, free = descend_over_kinks(surface, descend, place)
            curvature = Curvature.at(surface, place, free)
        if draws == 1 or draws >= most or _holds(surface, place, way.losses[-1]):
            break
        draws *= 2
    step, at = curvature.step(surface(place)[0] * free)
    ends = draws, step, layout.free_labels[at], curvature.error, curvature.excess
    return Optimum(chart(place), way.losses, *ends, others, layout)


def _descend(
    surface: Surface,
    last: int,
    way: Way,
    place: Tensor,
    free: Tensor,
    tolerance: float = 1e-6,
) -> Tensor:
    """L-BFGS along the free coordinates, up to the step `last` or where the way is ended."""
    if len(way.losses) >= last or way.ended:
        return place

    def slope_and_value(moves: Tensor) -> tuple[Tensor, Tensor]:
        slope, value = surface(place + free * moves)
        return slope * free, value

    def after(_: Tensor, value: float) -> bool:
        way.add(value)
        return way.ended

    moves = lbfgs(
        slope_and_value,
        torch.zeros_like(place),
        steps=last - len(way.losses),
        tolerance=tolerance,
        after=after,
    )
    return place + free * moves


def _with_fresh_draws(
    average: Average,
    chart: Chart,
    way: Way,
    steps: int,
    seed: int,
    layout: Layout,
    others: list[Mode],
) -> Optimum:
    """Stochastic gradients, with fresh draws in each step and steps that become small.

    For families whose draws are no smooth function of numbers that could be held fixed, or which
    would fit those (a flow). Adam, its rate falling from a tenth to a thousandth of an sd; the last
    quarter of the way is averaged. It never ends worse than it began: at the Gaussian of the mode,
    or, where draws can be held fixed, at the best one, with all else as it was.
    """
    steps, draws = min(steps, _ANNEALED), _FEWEST if average.at_once > 1 else 8
    chart.units[~chart.known()] = 0.1  # weights of networks: smaller steps
    start = torch.zeros(chart.size)
    if average.smooth and average.normals and chart.located():
        surface = Surface(average, chart, matched(_MORE * draws, average.normals, seed))
        first = Way(average.size, way.stops)
        start = _descend(surface, steps, first, start, chart.known().double(), tolerance=_ROUGH)
    place = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([place], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / steps))
    mean, last = torch.zeros(chart.size), max(1, steps // 4)
    for step in range(steps):
        normals = matched(draws, average.normals, seed + step)
        values, place.grad = average.slope(chart, place, normals, seed + step)
        way.add(values.mean().item())
        if not torch.isfinite(place.grad).all():
            place.grad = torch.zeros_like(place)  # one draw too far out: the step is left out
        optimizer.step()
        scheduler.step()
        if step >= steps - last:
            mean += place.detach() / last
        if way.ended:
            ends = 0, math.nan, "", math.nan, math.nan
            return Optimum(chart(place.detach()), way.losses, *ends, others, layout)
    before, after = (_fresh_loss(average, chart(end), FRESH)[0] for end in (start, mean))
    mean = mean if after < before else start
    drift, at = _drift(average, chart, mean, seed)
    site = layout.free_labels[at]
    return Optimum(chart(mean), way.losses, 0, drift, site, 0.0, math.nan, others, layout)


def _drift(average: Average, chart: Chart, place: Tensor, seed: int) -> tuple[float, int]:
    """The step that the mean gradient of fresh draws asks for, in posterior sds, and where.

    In the coordinates of a chart the curvature is near one. What the gradient may be by chance,
    two of its standard errors, is taken off.
    """
    slopes, known = [], chart.known()
    draws = 2 * _FEWEST if average.at_once > 1 else 8
    for number in range(seed + 7919, seed + 7919 + _BLOCKS):
        normals = matched(draws, average.normals, number)
        slopes.append(average.slope(chart, place, normals, number)[1][known])
    mean, error = torch.stack(slopes).mean(0), torch.stack(slopes).std(0) / _BLOCKS**0.5
    step = (mean.abs() - 2 * error).clamp_min(0)
    located = chart.located()
    at = 0 if located is None else int(step[: located.stop - located.start].argmax())
    return step.max().item() if len(step) else math.nan, at


def allowed_gap(latents: int) -> float:
    """By how many nats the loss of fresh draws may be above that of the draws held fixed.

    A Gaussian whose means are off by a sixth of an sd, and its sds by a tenth, is as far from the
    best one.
    """
    return max(0.1, 0.025 * latents)


def _holds(surface: Surface, place: Tensor, fixed: float) -> bool:
    """Whether fresh draws confirm the loss per datum of those that were held fixed.

    Parameters of which nothing is known are fitted to draws soon, and errors that are found near
    where they went say little of it.
    """
    average, known = surface.average, surface.chart.known().all()
    fresh, error = _fresh_loss(average, surface.chart(place), _CONFIRMING if known else FRESH)
    allowed = allowed_gap(average.normals) if known else 2 * EXCESS
    return fresh - fixed * average.size < allowed + 3 * error


def affordable(average: Average, draws: int) -> int:
    """So many draws, or fewer where each is a run of the program; an even number."""
    return draws if average.at_once > 1 else min(draws, _ONE_BY_ONE)


def _fresh_loss(average: Average, values: list[Tensor], draws: int) -> tuple[float, float]:
    """The mean loss of fresh draws in nats, and its standard error."""
    normals = matched(affordable(average, draws), average.normals, seed=1)
    with torch.no_grad():
        fresh = torch.cat([average.losses(values, c) for c in average.chunks(normals)])
    return fresh.mean().item(), spread_of(fresh.unsqueeze(0), normals).item() ** 0.5
