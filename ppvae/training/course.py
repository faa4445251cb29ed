"""The course of a loss over the epochs: whether it still falls, and when training may end.

Losses of a stochastic training fall ever more slowly and are noisy, so that the fall from one epoch
to the next is no measure. A line is drawn through the last quarter of them instead, and the fall
along it tells what is still to come. A loss that falls with the logarithm of the epochs would fall
log 3 / log(4/3) = 3.8 times as far if it were trained three times as long, and one that falls like
1 / epoch never more than three times as far.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_FEWEST = 16  # epochs, below which a quarter makes no line
_FLAT = 0.1  # nats per datum: what three times as many epochs may gain where training ends
_STEPS = 1_000  # of the optimizer, before which nothing is flat
_LOWERED = 0.01  # share of the learning rate at which training ends


class Fall(NamedTuple):
    """The fall of a loss over the last part of its epochs, in nats per datum.

    Attributes:
        size: how far it fell along a line; negative, if it rose.
        error: the standard error of that.
        noise: standard deviation of the loss of an epoch about the line.
        part: the line is through the last epochs, one of so many parts of all.
    """

    size: float
    error: float
    noise: float
    part: int

    @property
    def to_come(self) -> float:
        """What three times as many epochs would gain at most, two standard errors included."""
        return self._times * (max(self.size, 0.0) + 2 * self.error)

    @property
    def expected(self) -> float:
        """What three times as many epochs would gain by the line."""
        return self._times * self.size

    @property
    def bounds(self) -> str:
        """What three times as many epochs would gain, in words, by two standard errors."""
        error = 2 * self._times * self.error
        return f"{self.expected:.2g} +- {error:.2g} nats per datum"

    @property
    def _times(self) -> float:
        return math.log(3) / math.log(self.part / (self.part - 1))


def last_fall(losses: Sequence[float], part: int = 4) -> Fall:
    """Measures the fall over the last quarter, or half; NaN for less than 16 epochs.

    Args:
        losses: of each epoch, in nats per datum.
        part: 4 for the last quarter; 2 for the last half, which knows less of the end, but that
            with less noise.
    """
    count = len(losses) // part
    if len(losses) < _FEWEST:
        return Fall(math.nan, math.nan, math.nan, part)
    epochs, last = np.arange(count) - (count - 1) / 2, np.array(losses[-count:])
    slope = float(epochs @ last / (epochs @ epochs))
    noise = math.sqrt(np.square(last - last.mean() - slope * epochs).sum() / (count - 2))
    return Fall(-slope * count, noise / math.sqrt(epochs @ epochs) * count, noise, part)


def flatness(losses: Sequence[float], steps: int) -> tuple[bool, Fall]:
    """Whether losses are flat, and the fall that tells.

    They are flat when three times as many epochs would gain less than 0.1 nats per datum, or less
    than half of what the loss of an epoch moves by chance.

    Args:
        losses: of each epoch, in nats per datum.
        steps: of the optimizer in all; before 1,000 nothing is flat.
    """
    quarter, half = (last_fall(losses, part) for part in (4, 2))
    best = min(quarter, half, key=lambda fall: fall.to_come)
    flat = best.to_come < max(_FLAT, best.noise / 2) and steps >= _STEPS
    return flat, best if flat else quarter


def course(losses: Sequence[float], steps: int) -> tuple[bool | None, str]:
    """Whether a training has come to its end, None if that cannot be seen, and a sentence on it.

    Args:
        losses: of each epoch, in nats per datum.
        steps: of the optimizer in all.

    Example:
        >>> course([7.0] * 40, 4000)[0], course([7.0] * 40, 40)[0]
        (True, None)
        >>> course([float(-epoch) for epoch in range(40)], 4000)
        (False, 'after 40 epochs the loss was still falling, by 1 nats per datum and epoch, and \
three times as many would gain some 38: train longer')
    """
    flat, fall = flatness(losses, steps)
    after, more = f"after {len(losses)} epochs", "three times as many would gain"
    if math.isnan(fall.size):
        return None, f"{after} there are too few to say whether the loss has stopped falling"
    if flat:
        gain = f"less than {fall.to_come:.2g} nats per datum"
        return True, f"{after} the loss was flat: {more} {gain}"
    if fall.size > 2 * fall.error and fall.expected > _FLAT:
        pace = f"by {fall.size / (len(losses) // 4):.2g} nats per datum and epoch"
        words = f"{after} the loss was still falling, {pace}, and {more} some {fall.expected:.2g}"
        return False, f"{words}: train longer"
    return None, f"{after} it cannot be seen whether the loss is flat: {more} {fall.bounds}"


class Ending:
    """Ends a training by itself: when its loss is flat, after the learning rate was lowered.

    The rate falls exponentially to a hundredth, over a quarter as many epochs again, which takes
    out what its steps were too long for. (Averages of the iterates gained less than that wherever
    both were tried.)

    Attributes:
        max_epochs: a bound on the epochs, of which the last fifth are for the lowering.
        flat: whether the loss was flat; None until the lowering begins.
        factor: what the learning rate is to be multiplied with before the next epoch.
    """

    def __init__(self, max_epochs: int) -> None:
        self.max_epochs, self.factor = max_epochs, 1.0
        self.flat: bool | None = None
        self._losses: list[float] = []
        self._epochs, self._next, self._before, self._left = 0, 0, 0, 0
        self._fall = last_fall([])

    def go_on(self, loss: float | None, steps: int) -> bool:
        """Whether there is another epoch, before which the rate is multiplied with `factor`.

        Args:
            loss: of the epoch that has ended; None if the objective moved in it, so that the losses
                before it were those of another.
            steps: how many steps of the optimizer there were.
        """
        self._epochs += 1
        if loss is None:
            self._losses.clear()
        else:
            self._losses.append(loss)
        if self.flat is None:
            latest = self.max_epochs - self.max_epochs // 5
            if self._epochs < min(self._next, latest):
                return True
            self._next = self._epochs + 1 + self._epochs // 50  # a look takes longer each time
            flat, self._fall = flatness(self._losses, steps)
            if not flat and self._epochs < latest:
                return True
            self.flat, self._before = flat, self._epochs
            self._left = min(math.ceil(self._epochs / 4), self.max_epochs - self._epochs)
            self.factor = _LOWERED ** (1 / max(self._left, 1))
        self._left -= 1
        return self._left >= 0

    def state_dict(self) -> dict[str, Any]:
        """All that its later answers depend on, as plain numbers."""
        return {**vars(self), "_losses": [*self._losses], "_fall": [*self._fall]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on as the one that was saved."""
        vars(self).update(state)
        self._losses, self._fall = [*state["_losses"]], Fall(*state["_fall"])

    @property
    def words(self) -> str:
        """What is to be said of the end, in one sentence."""
        lowered = "the learning rate was lowered to a hundredth"
        if self.flat:
            return (
                f"flat after {self._before} epochs: three times as many would gain less than "
                f"{self._fall.to_come:.2g} nats per datum; then {lowered}"
            )
        if math.isnan(self._fall.size):
            return f"not flat: {self._before} epochs before {lowered} are too few to say"
        fell = f"the loss fell by {self._fall.size:.2g} nats per datum in their last quarter"
        return (
            f"not flat after {self._before} epochs, when {lowered} since there are at most "
            f"{self.max_epochs}: {fell}, and three times as many would gain some "
            f"{self._fall.expected:.2g}; give it more epochs, or a higher learning rate, "
            "or see by validation data whether that is worth it"
        )
