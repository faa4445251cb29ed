r"""Fitting global latents: a sample-average approximation of the ELBO, and a quasi-Newton method.

With the random numbers held fixed the negative ELBO of K draws is a smooth deterministic function,
and L-BFGS finds its minimum to many digits where stochastic gradients would wander. The draws are
*moment-matched*: the standard normal numbers behind them have mean zero and identity covariance
over the draws, exactly. The average of any quadratic function is then its expectation, so for a
Gaussian family on a Gaussian model the minimum is that of the ELBO itself; elsewhere it differs by
O(1/K).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from ppvae._scopes import random_state, unchecked
from ppvae.objectives.matched import average_loss
from ppvae.objectives.trace_terms import terms
from ppvae.programs.runs import is_vectorized, trace_pair

_MOST = 500  # parameters: one more evaluation of the slope for each, to find the units


_ROUNDS = 10  # a smooth minimum takes one or two, one with kinks (a Laplace prior) more


_LARGEST = 50_000_000  # draws times data


def draws_needed(
    model: Any, guide: Any, batch: tuple[Tensor, ...], parameters: list[Tensor]
) -> int:
    """How many draws this method would hold fixed; 0 where it does not apply.

    It applies to vectorized models with global latents, where there are few parameters (many, as
    those of a flow, would fit the few draws instead of the posterior) and the draws fit in memory.
    A point needs one draw.
    """
    if not is_vectorized(model) or not 0 < sum(p.numel() for p in parameters) <= _MOST:
        return 0
    with torch.no_grad(), random_state(None, keep=True), unchecked():
        parts = terms(*trace_pair(model, guide, *batch))
    latents = {**parts.log_prior, **parts.log_guide}
    if any(name in parts.local for name in latents):
        return 0
    if not parts.log_guide:
        return 1
    draws = max(256, 2 * sum(p.numel() for p in parameters))
    return draws if draws * len(batch[0]) <= _LARGEST else 0


def minimise(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: tuple[Tensor, ...],
    parameters: list[Tensor],
    *,
    steps: int,
    seed: int,
    draws: int,
) -> list[float]:
    """Moves the parameters to the minimum; returns the loss in nats per datum after each step.

    Args:
        model: a vectorized Pyro model.
        guide: its guide, with global latents.
        batch: all the data.
        parameters: what to move.
        steps: at most so many steps.
        seed: chooses the random numbers.
        draws: how many draws are held fixed.
    """
    loss = average_loss(model, guide, batch, draws=draws, seed=seed)
    size = len(batch[0])
    sizes = [p.numel() for p in parameters]
    start = torch.cat([p.detach().reshape(-1) for p in parameters]).double()

    def place(flat: Tensor) -> None:
        with torch.no_grad():
            for parameter, piece in zip(parameters, flat.split(sizes), strict=True):
                parameter.copy_(piece.reshape(parameter.shape))

    def at(flat: Tensor) -> tuple[float, Tensor]:
        """The loss and its slope, the parameters moved there."""
        place(flat)
        try:
            value = loss()
        except torch.linalg.LinAlgError:  # a step too far for a Cholesky factor
            return math.nan, torch.full((sum(sizes),), math.nan, dtype=torch.float64)
        slopes = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return value.item(), torch.cat([slope.reshape(-1) for slope in slopes]).double()

    def slope_at(flat: Tensor) -> Tensor:
        return at(flat)[1]

    history: list[float] = []
    free = torch.ones_like(start, dtype=torch.bool)
    for _ in range(_ROUNDS):
        unit = _units(slope_at, start) * free
        top = at(start)[0] * size + 1

        def scaled(
            move: np.ndarray, start: Tensor = start, unit: Tensor = unit, top: float = top
        ) -> tuple[float, np.ndarray]:
            value, slope = at(start + unit * torch.as_tensor(move, device=start.device))
            if not (math.isfinite(value) and torch.isfinite(slope).all()):
                return top + move @ move, 2 * move  # a slope that leads the line search back
            return value * size, (slope * unit).cpu().numpy() * size

        result = scipy.optimize.minimize(
            scaled,
            np.zeros(len(start)),
            jac=True,
            method="L-BFGS-B",
            callback=lambda intermediate_result: history.append(intermediate_result.fun / size),
            options={"maxiter": steps, "maxcor": 50, "ftol": 1e-15, "gtol": 1e-10},
        )
        start = start + unit * torch.as_tensor(result.x, device=start.device)
        flat = np.abs(result.jac).max() < 1e-5
        if flat and free.all():
            break
        if draws > 1:  # an average over draws has no kinks: once more, with units that fit here
            if top - 1 - result.fun <= 1e-12 * abs(result.fun):
                break
            continue
        # a kink (a Laplace prior has one at zero) stops the method short: put the parameters that
        # belong on one there, and go on with the others
        before = start
        start, free = _on_kinks(slope_at, start)
        if flat and torch.allclose(before, start, rtol=0.0, atol=1e-10):
            break
    place(start)
    return [float(value) for value in history] or [float(result.fun) / size]


def _on_kinks(slope: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each parameter whose best place, the others held, is a kink nearby onto that kink.

    Returns:
        The parameters, and which of them are not on a kink.
    """
    start, free = start.clone(), torch.ones_like(start, dtype=torch.bool)
    for index in range(len(start)):

        def at(place: float, index: int = index) -> float:
            moved = start.clone()
            moved[index] = place
            return slope(moved)[index].item()

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


def _units(slope: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Lengths in which the curvature of each parameter is one, by differences of the slope."""
    step, base = 1e-4, slope(start)
    curvature = torch.empty_like(start)
    for index in range(len(start)):
        moved = start.clone()
        moved[index] += step
        curvature[index] = ((slope(moved)[index] - base[index]) / step).abs()
    curvature = curvature.nan_to_num(1.0, 1.0, 1.0)
    return curvature.clamp_min(1e-8 * curvature.max().item() + 1e-300).rsqrt()
