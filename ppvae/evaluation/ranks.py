"""Ranks of true values among draws: are they uniform, and what do they say in words?"""

import math
from typing import Any

import numpy as np
import xarray as xr
from scipy import special

ALPHA = 0.01  # level of the verdict, shared among the latents
_INTERVALS = 50  # between their ends the cumulative distribution of the ranks is looked at


def uniformity(rank: np.ndarray, num_samples: int) -> np.ndarray:
    r"""P-values of uniform ranks on 0 to `num_samples`, exact, shape `(latent,)`.

    At each of some points the number of smaller ranks is binomial. The statistic is the smallest of
    the two-sided p-values there; its distribution follows from a recursion over the points.

    Args:
        rank: shape `(simulation, latent)`.
        num_samples: the largest rank possible.

    Säilynoja, Bürkner, Vehtari, Graphical test for discrete uniformity, 2022.
    """
    bounds, chances, tails = _points(len(rank), num_samples)
    statistic = np.take_along_axis(tails, _smaller(rank, bounds), 1).min(0)
    limits, index = np.unique(statistic, return_inverse=True)
    return np.array([_chance_outside(tails, chances, limit) for limit in limits])[index]


def ecdf_band(
    num_simulations: int, num_samples: int, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A band that holds the whole cumulative distribution of uniform ranks at a level.

    Args:
        num_simulations: number of ranks.
        num_samples: the largest rank possible.
        level: chance that the distribution stays inside at all points, at least.

    Returns:
        The points, as shares of the ranks, and the lower and upper end there.
    """
    _, chances, tails = _points(num_simulations, num_samples)
    low, high = math.log((1 - level) / (2 * len(chances))), math.log(1 - level)
    for _ in range(30):
        middle = (low + high) / 2
        inside = _chance_outside(tails, chances, math.exp(middle)) <= 1 - level
        low, high = (middle, high) if inside else (low, middle)
    first, last = _interval(tails, math.exp(low))
    return chances, first / num_simulations, last / num_simulations


def ecdf_of(rank: np.ndarray, num_samples: int) -> np.ndarray:
    """The cumulative distribution of ranks at the points of `ecdf_band`, shape `(points, *)`."""
    return _smaller(rank, _points(len(rank), num_samples)[0]) / len(rank)


def coverage(rank: np.ndarray, num_samples: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Share of the ranks in the central interval of a level, and its standard error.

    Each rank stands for an equal piece of the unit interval, and counts with the part of it that
    lies inside: uniform ranks are inside with a chance of exactly `level` for any number of draws.
    The error is binomial with one rank more inside and one outside, so that it is never zero.

    Args:
        rank: shape `(simulation, latent)`.
        num_samples: the largest rank possible.
        level: in (0, 1).
    """
    size = num_samples + 1
    start, end = (1 - level) / 2 * size, (1 + level) / 2 * size
    inside = np.minimum(rank + 1, end) - np.maximum(rank, start)
    share, count = np.clip(inside, 0, 1).mean(0), len(rank)
    smooth = (count * share + 1) / (count + 2)
    return share, np.sqrt(smooth * (1 - smooth) / (count + 2))


def verdict(result: xr.Dataset) -> str:
    """What a result of `calibration` says, in words."""
    p = result.uniformity_p.values
    failing = p * len(p) < ALPHA
    worth = _worth(result)
    if failing.any():
        failed = f"fails for {failing.sum()} of {len(p)} latents"
        return "; ".join([failed, *_faults(result, failing), worth])
    information, error = float(result.information), float(result.information_se)
    if information <= 2 * error + 0.005:
        same = abs(information) + error < 1e-9
        nothing = "is the prior" if same else "is no closer to the posterior than the prior is"
        return f"passes, and passes nothing: the guide {nothing} ({worth})"
    uniform = f"ranks are uniform in {result.sizes['simulation']} simulations"
    return f"passes: {uniform} (smallest p {p.min():.2g}; {worth})"


def _faults(result: xr.Dataset, failing: np.ndarray) -> list[str]:
    """The worst latent of each kind of fault, in standard errors that uniform ranks would have."""
    level = min(result.level.values.tolist(), key=lambda value: abs(value - 0.9))
    rank, count = result["rank"].values, result.sizes["simulation"]
    covered = result.coverage.sel(level=level).values
    above = (2 * rank > result.num_samples).mean(0)
    wide = (covered - level) * math.sqrt(count / (level * (1 - level)))
    low = (above - 0.5) * 2 * math.sqrt(count)
    kinds = [
        (-wide, "intervals too narrow: {level} intervals cover {covered} of {name}"),
        (wide, "intervals too wide: {level} intervals cover {covered} of {name}"),
        (low, "draws too low: {above} of the true values of {name} are above the median"),
        (-low, "draws too high: {above} of the true values of {name} are above the median"),
    ]
    faults = []
    for score, words in kinds:
        worst = int(np.where(failing, score, -math.inf).argmax())
        if score[worst] > 4:
            values = {"level": level, "covered": covered[worst], "above": above[worst]}
            shares = {key: f"{100 * value:.0f} %" for key, value in values.items()}
            faults.append(words.format(name=result.latent.values[worst], **shares))
    worst = int(result.uniformity_p.values.argmin())
    return faults or [f"the ranks of {result.latent.values[worst]} are not uniform"]


def _worth(result: xr.Dataset) -> str:
    """Information and gap, in words."""
    information, gap, upper = (float(result[k]) for k in ("information", "gap", "gap_upper"))
    if math.isnan(information):
        return f"information is not known: {result.note}"
    near = upper - gap <= 0.05 + 0.02 * abs(upper)
    width = _number(gap) if near else f"{_number(gap)} to {_number(upper)}"
    return f"information {_number(information)}, gap {width} {result.unit}"


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus before zero


def _poisson(number: Any, mean: Any) -> Any:
    """Probability of a Poisson number; it is zero below zero."""
    logs = special.xlogy(number, mean) - mean - special.gammaln(np.maximum(number, 0) + 1)
    return np.where(np.asarray(number) < 0, 0.0, np.exp(logs))


def _points(count: int, num_samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points where the cumulative distribution of so many ranks is looked at.

    Returns:
        The bound of each point, of which the number of smaller ranks is counted: about evenly
        spaced between 0 and `num_samples + 1`; the chance that a uniform rank is smaller; and the
        two-sided p-values of 0 to `count` smaller ranks, shape `(points, count + 1)`.
    """
    ends = np.linspace(0, num_samples + 1, min(_INTERVALS, num_samples + 1) + 1)
    bounds = ends[1:-1].round().astype(int)
    chances, numbers = bounds / (num_samples + 1), np.arange(count + 1)
    below = special.bdtr(numbers, count, chances[:, None])
    above = np.where(numbers > 0, special.bdtrc(numbers - 1, count, chances[:, None]), 1.0)
    return bounds, chances, np.minimum(1.0, 2 * np.minimum(below, above))


def _smaller(rank: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The number of ranks below each bound, shape `(points, *)`."""
    return np.stack([(rank < bound).sum(0) for bound in bounds])


def _interval(tails: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """At each point the smallest and largest number with a tail above the limit."""
    inside = tails > limit * (1 + 1e-9)  # a tail that equals it but for rounding is not above
    return inside.argmax(1), tails.shape[1] - 1 - inside[:, ::-1].argmax(1)


def _chance_outside(tails: np.ndarray, chances: np.ndarray, limit: float) -> float:
    """The chance that at some point the tail of uniform ranks is at most the limit.

    Numbers of ranks in separate intervals are independent Poisson ones, given their sum.
    """
    bound = limit * len(chances)
    if bound < 1e-9:  # the recursion has only rounding left
        return bound
    if limit >= tails.max(1).min():
        return 1.0
    count = tails.shape[1] - 1
    mass, start = np.ones(1), 0
    bounds = (*_interval(tails, limit), np.diff(chances, prepend=0.0))
    for first, last, chance in zip(*bounds, strict=True):
        steps = _poisson(np.arange(last - start + 1), count * chance)
        mass = np.convolve(mass, steps)[first - start : last - start + 1]
        start = first
    rest = _poisson(count - start - np.arange(len(mass)), count * (1 - chances[-1]))
    return max(0.0, 1 - float(mass @ rest) / _poisson(count, count))
