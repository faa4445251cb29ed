"""Ways down to a minimum: L-BFGS where a function is smooth, and over its kinks where it is not.

A Laplace prior has a kink at zero, where the slope jumps over zero.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

FAR = 1e30  # the value of what is not finite
_NEARBY = 0.5  # in the units of the coordinates: how far away a kink is looked for

SlopeAndValue = Callable[[Tensor], tuple[Tensor, Tensor]]


def remembered(function: SlopeAndValue) -> SlopeAndValue:
    """A function that is not worked out again at the place where it was asked last."""
    last: list[Any] = []

    def at(place: Tensor) -> tuple[Tensor, Tensor]:
        if not (last and torch.equal(last[0], place)):
            last[:] = place.detach().clone(), function(place)
        found: tuple[Tensor, Tensor] = last[1]
        return found

    return at


def lbfgs(
    slope_and_value: SlopeAndValue,
    start: Tensor,
    *,
    steps: int,
    tolerance: float,
    after: Callable[[Tensor, float], Any] | None = None,
) -> Tensor:
    """Goes down from a start by SciPy's L-BFGS.

    Args:
        slope_and_value: of what is minimised; it need not be finite everywhere.
        start: where to begin.
        steps: at most so many.
        tolerance: of the gradient.
        after: is called with place and value after each step; what is true ends the descent.
    """
    from scipy import optimize  # takes half a second to import

    slope_and_value = remembered(slope_and_value)  # SciPy asks at the start again
    top = slope_and_value(start)[1].item()
    top = top if math.isfinite(top) else FAR

    def at(place: np.ndarray) -> tuple[float, np.ndarray]:
        slope, value = slope_and_value(torch.as_tensor(place, device=start.device))
        if not (torch.isfinite(value) and torch.isfinite(slope).all()):
            away = place - start.numpy(force=True)  # a slope that leads the line search back
            return top + 1 + away @ away, 2 * away
        return value.item(), slope.numpy(force=True)

    def callback(intermediate_result: Any) -> None:
        place = torch.as_tensor(intermediate_result.x, device=start.device).clone()
        if after is not None and after(place, float(intermediate_result.fun)):
            raise StopIteration

    result: Any = optimize.minimize(
        at,
        start.numpy(force=True),
        jac=True,
        method="L-BFGS-B",
        callback=callback,
        options={"maxiter": steps, "maxcor": 50, "ftol": 1e-14, "gtol": tolerance},
    )
    return torch.as_tensor(result.x, device=start.device)


def descend_over_kinks(
    slope_and_value: SlopeAndValue, descend: Callable[[Tensor, Tensor], Tensor], place: Tensor
) -> tuple[Tensor, Tensor]:
    """Goes on where a method for smooth functions was stopped short by kinks.

    Coordinates that belong on a kink are put there, and the others are minimised again.

    Args:
        slope_and_value: of what is minimised.
        descend: the method, from a place, along the coordinates that are free.
        place: where it was stopped.

    Returns:
        The minimum, and which coordinates are free, as ones: those that are on no kink.
    """
    free = torch.ones_like(place)
    for _ in range(10):
        before = place
        place, free = _put_on_kinks(lambda at: slope_and_value(at)[0], place)
        place = descend(place, free)
        if torch.allclose(before, place, rtol=0.0, atol=1e-9):
            break
    return place, free


def _put_on_kinks(slope: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each coordinate whose best place, the others held, is a kink nearby onto that kink."""
    start, free = start.clone(), torch.ones_like(start)
    for index in range(len(start)):

        def at(place: float, index: int = index) -> float:
            moved = start.clone()
            moved[index] = place
            return slope(moved)[index].item()

        middle = start[index].item()
        low, high = middle - _NEARBY, middle + _NEARBY
        below, above = at(low), at(high)
        if not below < 0 < above:
            continue
        jump = 1e-3 * (above - below)  # less than that within a part of the way: it is smooth
        while high - low > 1e-11 and above - below > jump:
            middle = (low + high) / 2
            slope_there = at(middle)
            if slope_there < 0:
                low, below = middle, slope_there
            else:
                high, above = middle, slope_there
        if above - below > jump:
            start[index], free[index] = high if abs(high) < abs(low) else low, 0.0
    return start, free
