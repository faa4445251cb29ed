"""The optimum of the ELBO of global latents: found, and held against what an optimum must be.

With the random numbers of some draws held fixed the negative ELBO is a smooth deterministic
function (a sample-average approximation; Giordano, Ingram and Broderick, 2024; Burroni, Domke and
Sheldon, 2024). It is minimised in coordinates that are made from the mode of the posterior and the
curvature there, with more draws as long as their error is felt in a posterior mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ppvae._scopes import double_precision, kept_buffers, private_modules, random_state, unchecked
from ppvae.guides import FamilyGuide
from ppvae.guides.chart import Chart, pieces_of
from ppvae.objectives.elbo import ELBO
from ppvae.programs.layout import Layout
from ppvae.programs.potential import potential_of
from ppvae.training.average import Average, average_of, matched
from ppvae.training.mode import gaussian_near, lbfgs
from ppvae.training.task import Task

_FEWEST, _MOST = 32, 1024  # draws
_PARAMETERS = 500  # of which nothing is known beforehand: more would fit the draws
_LATENTS = 1000
_ANNEALED = 500  # steps of stochastic gradients, at most
_BLOCKS = 20  # of fresh draws, whose mean gradients are compared
_ROUNDS = 10  # a minimum with kinks takes a few
FRESH = 10_000  # draws by which an optimum is judged
ERROR = 0.1  # posterior sds: the Monte Carlo error of a mean that is let pass


def is_global(task: Task) -> bool:
    """Whether the parameters of a task are those of latents, one by one, and not of a network.

    Then, with the plain ELBO of all the data, it has an optimum that can be found and judged.
    """
    program = task.program
    plain = isinstance(program.objective, ELBO) and program.objective == ELBO()
    if not (plain and task.batches.whole and task.parameters):
        return False
    if not is_free(program.guide):
        (batch,) = task.batches
        with torch.no_grad(), random_state(None, keep=True), unchecked(), kept_buffers(program):
            terms = task.terms(batch)
        if {*terms.log_prior, *terms.log_guide} & terms.local:
            return False
    return True


def is_free(guide: Any) -> bool:
    """Whether all that a guide learns are free parameters, and not those of an encoder."""
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
        others: by how many nats other modes, that were met, are above the one it started from.
        layout: of the latents.
    """

    values: list[Tensor]
    losses: list[float]
    draws: int
    step: float
    site: str
    error: float
    others: list[float]
    layout: Layout


def optimise(task: Task, *, steps: int, seed: int) -> Optimum | None:
    """Minimises the objective over the parameters of a task, which are not moved.

    Args:
        task: one that `is_global`.
        steps: at most so many of the method in each round.
        seed: chooses starts and draws.

    Returns:
        The optimum; None if the objective is not smooth in normal numbers that are held fixed, or
        has too many parameters of which nothing is known.
    """
    with double_precision(), unchecked(), private_modules():
        average = average_of(task)
        (batch,) = task.batches
        potential = potential_of(task.program.model, batch)
        if potential.size > _LATENTS or not (average.smooth or average.at_once > 1):
            return None
        potential = replace(potential, args=average.batch)
        mean, factor, others = gaussian_near(potential, seed)
        if not average.normals:  # a point may lie on kinks, which are found along the axes
            factor = torch.diag(factor.square().sum(1).sqrt())
        chart = Chart(task.parameters, pieces_of(task.program.guide, mean, factor), factor)
        alone = ~chart.known()
        if alone.sum() > _PARAMETERS:
            return None
        place = torch.zeros(chart.size)
        losses: list[float] = []
        if not average.smooth:
            place = anneal(chart, average, place, steps, seed, losses)
            step, at = _drift(chart, average, place, seed)
            layout = potential.layout
            site = labels_of(layout)[at]
            return Optimum(chart(place), losses, 0, step, site, 0.0, others, layout)
        draws = max(_FEWEST, 2 * average.normals + 2) if average.normals else 1
        while True:
            normals = matched(draws, average.normals, seed) if draws > 1 else torch.zeros(1, 0)
            if not losses:
                chart.units[alone] = _units(chart, average, normals, place, alone)
            place = _minimise(chart, average, normals, place, steps, losses)
            step, at, error = _judge(chart, average, normals, place)
            most = max(_MOST, 8 * average.normals)
            if (
                draws == 1
                or draws >= most
                or (error < ERROR and _holds(average, chart(place), losses))
            ):
                break
            draws *= 2
        labels = labels_of(potential.layout)
        return Optimum(
            chart(place), losses, draws, step, labels[at], error, others, potential.layout
        )


def allowed_gap(latents: int) -> float:
    """By how many nats the loss of fresh draws may be above that of the draws held fixed.

    A Gaussian whose means are off by a sixth of an sd, and its sds by a tenth, is as far from the
    best one.
    """
    return max(0.1, 0.025 * latents)


def _holds(average: Average, values: list[Tensor], losses: list[float]) -> bool:
    """Whether fresh draws confirm what those say that were held fixed."""
    normals = torch.randn(FRESH, average.normals, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fresh = torch.cat([average.losses(values, c) for c in average.chunks(normals)])
    gap = fresh.mean().item() - losses[-1] * average.size
    error = fresh.std().item() / math.sqrt(FRESH)
    return gap < allowed_gap(average.normals) + 3 * error


def _minimise(
    chart: Chart, average: Average, normals: Tensor, start: Tensor, steps: int, losses: list[float]
) -> Tensor:
    """Minimises the mean loss of some draws; adds it, per datum, to `losses` after each step."""

    def descend(place: Tensor, free: Tensor) -> Tensor:
        def slope_and_value(moves: Tensor) -> tuple[Tensor, Tensor]:
            values, slope = average.slope(chart, place + free * moves, normals)
            return slope * free, values.mean()

        moves = lbfgs(
            slope_and_value,
            torch.zeros_like(place),
            steps=steps,
            tolerance=1e-6,
            values=lambda value: losses.append(value / average.size),
        )
        return place + free * moves

    def slope_at(place: Tensor) -> Tensor:
        return average.slope(chart, place, normals)[1]

    place = descend(start, torch.ones_like(start))
    if not losses:  # it started there
        losses.append(average.slope(chart, place, normals)[0].mean().item() / average.size)
    for _ in range(_ROUNDS if len(normals) == 1 else 0):
        # a kink (a Laplace prior has one at zero) stops the method short: put the parameters that
        # belong on one there, and go on with the others
        before = place
        place, free = on_kinks(slope_at, place)
        place = descend(place, free)
        if torch.allclose(before, place, rtol=0.0, atol=1e-9):
            break
    return place


def anneal(
    chart: Chart, average: Average, start: Tensor, steps: int, seed: int, losses: list[float]
) -> Tensor:
    """Stochastic gradients, with fresh draws in each step and steps that become small.

    For families whose draws are no smooth function of numbers that could be held fixed. Adam, its
    rate falling from a tenth to a thousandth of an sd; the last quarter of the way is averaged.

    Returns:
        The mean loss per datum in each step, and where it ends.
    """
    steps = min(steps, _ANNEALED)
    place = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([place], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / steps))
    mean, last = torch.zeros_like(start), max(1, steps // 4)
    for step in range(steps):
        normals = matched(_FEWEST, average.normals, seed + step)
        values, place.grad = average.slope(chart, place, normals, seed + step)
        losses.append(values.mean().item() / average.size)
        if not torch.isfinite(place.grad).all():
            place.grad = torch.zeros_like(place)  # one draw too far out: the step is left out
        optimizer.step()
        scheduler.step()
        if step >= steps - last:
            mean += place.detach() / last
    return mean


def _drift(chart: Chart, average: Average, place: Tensor, seed: int) -> tuple[float, int]:
    """The step that the mean gradient of fresh draws asks for, in posterior sds, and where.

    In the coordinates of a chart the curvature is near one. What the gradient may be by chance,
    two of its standard errors, is taken off.
    """
    located = chart.located()
    slopes = []
    for number in range(_BLOCKS):
        normals = matched(FRESH // 10 // _BLOCKS * 2, average.normals, seed + 7919 + number)
        slopes.append(average.slope(chart, place, normals, seed + 7919 + number)[1])
    mean, error = torch.stack(slopes).mean(0), torch.stack(slopes).std(0) / _BLOCKS**0.5
    step = (mean.abs() - 2 * error).clamp_min(0)
    at = int(step[located].argmax()) if located is not None else 0
    return step.max().item(), at


def _units(chart: Chart, average: Average, normals: Tensor, place: Tensor, alone: Tensor) -> Tensor:
    """Lengths in which the curvature of parameters of which nothing is known is one."""
    move, base = 1e-4, average.slope(chart, place, normals)[1]
    units = []
    for index in alone.nonzero()[:, 0].tolist():
        moved = place.clone()
        moved[index] += move
        slope = average.slope(chart, moved, normals)[1]
        units.append(((slope - base)[index] / move).abs())
    curvature = torch.stack(units).nan_to_num(1.0, 1.0, 1.0) if units else torch.ones(0)
    lowest = 1e-8 * curvature.max().item() if units else 0.0
    return curvature.clamp_min(lowest + 1e-300).rsqrt()


def _judge(
    chart: Chart, average: Average, normals: Tensor, place: Tensor
) -> tuple[float, int, float]:
    """The Newton step and the Monte Carlo error of the locations, in posterior sds.

    By differences of the losses and of their mean gradient, the location moved along each axis.

    Returns:
        The largest step, the coordinate that it is in, and the largest error.
    """
    losses, slope = average.slope(chart, place, normals)
    located, move = chart.located(), 1e-4
    if located is None:
        return slope.abs().max().item(), 0, 0.0
    others = torch.cat([slope[: located.start], slope[located.stop :]]) / 2
    curvature, scores = [], []
    for index in range(located.start, located.stop):
        moved = place.clone()
        moved[index] += move
        there, steeper = average.slope(chart, moved, normals)
        curvature.append((steeper - slope)[located] / move)
        scores.append((there - losses) / move)
    hessian = torch.stack(curvature)
    inverse = torch.linalg.pinv((hessian + hessian.T) / 2, hermitian=True)
    spread = torch.zeros_like(inverse)
    if len(normals) > 2:
        pairs = torch.stack(scores).unflatten(1, (2, -1)).mean(1)  # draws of opposite sign
        spread = torch.cov(pairs).reshape(inverse.shape) / pairs.shape[1]
    to_latents = chart.factor @ inverse
    sd = (to_latents @ chart.factor.T).diagonal().clamp_min(1e-300).sqrt()
    step = (to_latents @ slope[located]).abs() / sd
    error = (to_latents @ spread @ to_latents.T).diagonal().clamp_min(0).sqrt() / sd
    largest = max(step.max().item(), others.abs().max().item() if len(others) else 0.0)
    return largest, int(step.argmax()), error.max().item()


def on_kinks(slope: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each parameter whose best place, the others held, is a kink nearby onto that kink.

    Returns:
        The parameters, and which of them are not on a kink, as ones.
    """
    start, free = start.clone(), torch.ones_like(start)
    for index in range(len(start)):

        def at(place: float, index: int = index) -> float:
            moved = start.clone()
            moved[index] = place
            return slope(moved)[index].item()

        middle = start[index].item()
        low, high = middle - 0.5, middle + 0.5
        below, above = at(low), at(high)
        if not below < 0 < above:
            continue
        while high - low > 1e-11:
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle) < 0 else (low, middle)
        if at(high) - at(low) > 1e-3 * (above - below):  # the slope jumps
            start[index], free[index] = high if abs(high) < abs(low) else low, 0.0
    return start, free


def labels_of(layout: Layout) -> list[str]:
    """Names of the unconstrained coordinates: those of the values, where they are as many."""
    labels = []
    for name, place in layout.places.items():
        own = place.labels
        numbered = [f"{name}[{index}]" for index in range(place.size)]
        labels += own if len(own) == place.size else numbered
    return labels
