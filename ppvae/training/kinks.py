"""Minima on kinks: a Laplace prior has one at zero, where a slope jumps over zero."""

from collections.abc import Callable

import torch
from torch import Tensor

from ppvae.training.mode import SlopeAndValue

_NEARBY = 0.5  # in the units of the coordinates: how far away a kink is looked for


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
        while high - low > 1e-11:
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle) < 0 else (low, middle)
        if at(high) - at(low) > 1e-3 * (above - below):  # the slope jumps
            start[index], free[index] = high if abs(high) < abs(low) else low, 0.0
    return start, free
