"""Whether the loss of a stochastic training was still falling at its end."""

import math
from collections.abc import Sequence

import numpy as np

_FEWEST = 12  # epochs, below which there is nothing to compare


def falling(losses: Sequence[float]) -> str:
    """One sentence on the last half of the losses: by how much they fell in an epoch.

    The mean of the last quarter is held against that of the quarter before. What noise alone would
    make of the difference is read off differences of successive epochs, in which a fall that is
    slow does not count.

    Args:
        losses: of each epoch, in nats per datum.

    Example:
        >>> falling([2.0 ** -epoch for epoch in range(40)])
        'after 40 epochs the loss no longer fell, within 1.9e-08 nats per datum and epoch'
        >>> falling([float(-epoch) for epoch in range(40)])
        'after 40 epochs the loss was still falling, by 1 nats per datum and epoch: train longer'
    """
    count, quarter = len(losses), len(losses) // 4
    if count < _FEWEST:
        return f"after {count} epochs there are too few to say whether the loss has stopped falling"
    last, before = np.array(losses[-quarter:]), np.array(losses[-2 * quarter : -quarter])
    fall = (before.mean() - last.mean()) / quarter
    steps = np.diff(np.concatenate([before, last]))
    noise = (steps - steps.mean()).std() / math.sqrt(2)
    error = noise * math.sqrt(2 / quarter) / quarter
    if fall > 2 * error and fall > 1e-6 * (1 + abs(last.mean())):
        words = f"the loss was still falling, by {fall:.2g} nats per datum and epoch: train longer"
    else:
        within = max(2 * error, abs(fall))
        words = f"the loss no longer fell, within {within:.2g} nats per datum and epoch"
    return f"after {count} epochs {words}"
