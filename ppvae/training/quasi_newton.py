r"""Fitting global latents: a sample-average approximation of the ELBO, and a quasi-Newton method.

With the random numbers held fixed the negative ELBO of K draws is a smooth deterministic function
(`objectives/matched.py`), and L-BFGS finds its minimum to many digits where stochastic gradients
would wander.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae._scopes import kept_buffers, random_state, unchecked
from ppvae.objectives.elbo import ELBO
from ppvae.objectives.matched import average_loss
from ppvae.programs.runs import is_vectorized
from ppvae.training.loop import Fit
from ppvae.training.snapshots import Diverged, undone_by_errors
from ppvae.training.task import Task

_MOST = 500  # parameters: one more evaluation of the slope for each, to find the units
_ROUNDS = 10  # a smooth minimum takes one or two, one with kinks (a Laplace prior) more
_LARGEST = 50_000_000  # draws times data


def draws_needed(task: Task) -> int:
    """How many draws this method would hold fixed; 0 where it does not apply.

    It applies to the plain ELBO of all the data at once and to vectorized models with global
    latents, where there are few parameters (many, as those of a flow, would fit the few draws
    instead of the posterior) and the draws fit in memory. A point needs one draw.
    """
    size = sum(p.numel() for p in task.parameters)
    program = task.program
    plain = program.objective == ELBO()
    if not (plain and task.batches.whole and is_vectorized(program.model) and 0 < size <= _MOST):
        return 0
    (batch,) = task.batches
    with torch.no_grad(), random_state(None, keep=True), unchecked(), kept_buffers(program):
        terms = task.terms(batch)
    if {*terms.log_prior, *terms.log_guide} & terms.local:
        return 0
    draws = max(256, 2 * size) if terms.log_guide else 1
    return draws if draws == 1 or draws * len(batch[0]) <= _LARGEST else 0


def fit_at_once(task: Task, draws: int, seed: int, bar: Any) -> Fit:
    """Trains on all the data at once, for at most as many steps as the progress bar has.

    Args:
        task: a vectorized model with global latents, its guide, and all the data in one batch.
        draws: how many draws are held fixed, as `draws_needed` says.
        seed: chooses the draws.
        bar: a progress bar.

    Raises:
        Diverged: no step leads to a finite loss; the parameters are as they were before.
    """
    start = time.perf_counter()
    with undone_by_errors(task.parameters, [task.program]) as before:
        losses = minimise(task, steps=bar.total, draws=draws, seed=seed)
        if not math.isfinite(losses[-1]):
            before.put_back()
            raise Diverged(f"the loss is {losses[-1]} from the start; the parameters are unchanged")
    bar.update(len(losses))
    bar.set_postfix({"loss": f"{losses[-1]:.6g}"}, refresh=False)
    bar.close()
    seconds, steps = time.perf_counter() - start, len(losses)
    return Fit(losses, [], seconds, steps, steps - 1, "L-BFGS", task.program.objective, "eager")


def minimise(task: Task, *, steps: int, draws: int, seed: int) -> list[float]:
    """Moves the parameters to the minimum; returns the loss in nats per datum after each step.

    Args:
        task: a vectorized model with global latents, its guide, and all the data in one batch.
        steps: at most so many steps in each of some rounds.
        draws: how many draws are held fixed.
        seed: chooses the random numbers.
    """
    (batch,) = task.batches
    pair, plate = (task.program.model, task.program.guide), task.program.plate_name
    loss = average_loss(*pair, batch, draws=draws, seed=seed, plate=plate)
    surface = _Surface(loss, task.parameters, len(batch[0]))
    place = torch.cat([p.detach().reshape(-1) for p in task.parameters]).double()
    free = torch.ones_like(place, dtype=torch.bool)
    history: list[float] = []
    for _ in range(_ROUNDS):
        place, result, still = _descend(surface, place, free, steps, history)
        flat = np.abs(result.jac).max() < 1e-5
        if (flat and free.all()) or (draws > 1 and still):
            break
        # once more, with units that fit here. An average over draws has no kinks; but a single draw
        # has (a Laplace prior has one at zero), which stop the method short: put the parameters
        # that belong on one there, and go on with the others
        if draws == 1:
            before = place
            place, free = _on_kinks(surface, place)
            if flat and torch.allclose(before, place, rtol=0.0, atol=1e-10):
                break
    surface.move(place)
    return history or [float(result.fun) / surface.size]


class _Surface:
    """The loss of all the data, in nats, as a function of one vector of all parameters."""

    def __init__(self, loss: Callable[[], Tensor], parameters: list[Tensor], size: int) -> None:
        self.loss, self.parameters, self.size = loss, parameters, size

    def move(self, place: Tensor) -> None:
        """Gives the parameters the values of a vector."""
        with torch.no_grad():
            pieces = place.split([p.numel() for p in self.parameters])
            for parameter, piece in zip(self.parameters, pieces, strict=True):
                parameter.copy_(piece.reshape(parameter.shape))

    def at(self, place: Tensor) -> tuple[float, Tensor]:
        """The loss per datum and its slope; not finite where a matrix has no Cholesky factor."""
        self.move(place)
        try:
            value = self.loss()
        except torch.linalg.LinAlgError:  # a step too far
            return math.nan, torch.full_like(place, math.nan)
        slopes = torch.autograd.grad(value, self.parameters, materialize_grads=True)
        return value.item(), torch.cat([slope.reshape(-1) for slope in slopes]).double()


def _descend(
    surface: _Surface, start: Tensor, free: Tensor, steps: int, history: list[float]
) -> tuple[Tensor, Any, bool]:
    """One run of L-BFGS, in units of the curvature where it starts, on the parameters in `free`.

    It adds the loss per datum after each step to `history`.

    Returns:
        The place where it ends, the result of SciPy, and whether the loss has hardly fallen.
    """
    size = surface.size
    unit = _units(surface, start) * free
    top = surface.at(start)[0] * size + 1

    def scaled(move: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = surface.at(start + unit * torch.as_tensor(move, device=start.device))
        if not (math.isfinite(value) and torch.isfinite(slope).all()):
            return top + move @ move, 2 * move  # a slope that leads the line search back
        return value * size, (slope * unit).cpu().numpy() * size

    from scipy import optimize  # takes half a second to import

    result: Any = optimize.minimize(
        scaled,
        np.zeros(len(start)),
        jac=True,
        method="L-BFGS-B",
        callback=lambda intermediate_result: history.append(float(intermediate_result.fun) / size),
        options={"maxiter": steps, "maxcor": 50, "ftol": 1e-15, "gtol": 1e-10},
    )
    place = start + unit * torch.as_tensor(result.x, device=start.device)
    return place, result, bool(top - 1 - result.fun <= 1e-12 * abs(result.fun))


def _on_kinks(surface: _Surface, start: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each parameter whose best place, the others held, is a kink nearby onto that kink.

    Returns:
        The parameters, and which of them are not on a kink.
    """
    start, free = start.clone(), torch.ones_like(start, dtype=torch.bool)
    for index in range(len(start)):

        def at(place: float, index: int = index) -> float:
            moved = start.clone()
            moved[index] = place
            return surface.at(moved)[1][index].item()

        middle = start[index].item()
        low, high = middle - 0.05, middle + 0.05
        below, above = at(low), at(high)
        if not below < 0 < above:
            continue
        while high - low > 1e-11:
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle) < 0 else (low, middle)
        if at(high) - at(low) > 1e-3 * (above - below):  # the slope jumps
            start[index], free[index] = high if abs(high) < abs(low) else low, False
    return start, free


def _units(surface: _Surface, start: Tensor) -> Tensor:
    """Lengths in which the curvature of each parameter is one, by differences of the slope."""
    step, base = 1e-4, surface.at(start)[1]
    moves = step * torch.eye(len(start)).to(start)
    slopes = [surface.at(start + move)[1][index] for index, move in enumerate(moves)]
    curvature = ((torch.stack(slopes) - base) / step).abs().nan_to_num(1.0, 1.0, 1.0)
    return curvature.clamp_min(1e-8 * curvature.max().item() + 1e-300).rsqrt()
