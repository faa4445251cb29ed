"""Numbers that move with the steps of the optimizer, for the settings of an objective."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppvae._checks import check_count, check_number


@dataclass(frozen=True)
class WarmUp:
    """A number that moves in a straight line with the steps of the optimizer; see `warm_up`."""

    steps: int
    start: float
    end: float

    def __call__(self, step: Any) -> Any:
        """The number at a step, counted from 0; a tensor, if the step is one."""
        share = step / self.steps
        share = share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0)
        return self.start + (self.end - self.start) * share


def warm_up(steps: int, start: float = 0.0, end: float = 1.0) -> WarmUp:
    """A schedule for a setting, as `beta`: in a straight line from `start` to `end`.

    Args:
        steps: steps of the optimizer until the end is reached, at least 1.
        start: the number at step 0, at least 0.
        end: the number from step `steps` on, at least 0.

    Returns:
        A function from a step to the number; it can be pickled.

    Raises:
        ValueError: an argument is out of its range.

    Bowman et al., Generating sentences from a continuous space, 2016; Sonderby et al., Ladder
    variational autoencoders, 2016.

    Example:
        >>> beta = warm_up(2000)
        >>> beta(0), beta(500), beta(9999)
        (0.0, 0.25, 1.0)
    """
    return WarmUp(
        check_count("steps", steps), check_number("start", start), check_number("end", end)
    )
