"""Minimisation of many independent functions at once, one for each datum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["adam", "quasi_newton"]

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
