"""Whether the priors of a regression and its data disagree."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ppvae.regression.hyper import HyperPosterior, Problem
from ppvae.regression.priors import Array, Unknown

# A weight is so many prior sds from its prior mean, and evidence or density so many nats too low.
_SDS, _NATS = 4.0, 8.0
# A known noise is off by so much where the data contradict it, too.
_TIMES = 2.0
# Logs of factors by which priors are wider.
_WIDER = np.linspace(0.0, 15.0, 61)
_SHOWN = 3


def warn_of_conflict(
    problem: Problem, hyper: HyperPosterior, names: Sequence[str], mean: Array
) -> None:
    """Warns where the data contradict the priors.

    Weights are in conflict where one is several prior sds from its prior mean, or where wider
    priors, all by the same factor, have much more evidence at the noise that suits each best. Where
    the scale of the priors is unknown, both are asked at the mean of its log in the posterior; and
    it is in conflict where its prior density there is far below the highest. So is the noise; or
    where it is known, or its prior has an upper end, and other values are far more probable.
    """
    words = [*_of_weights(problem, hyper, names, mean), *_of_noise(problem, hyper)]
    if words:
        advice = 'standardise the data, add an intercept, or give scale="data" or a wider prior'
        told = f"prior and data disagree: {'; '.join(words)} ({advice})"
        warnings.warn(told, UserWarning, stacklevel=3)


def _of_weights(
    problem: Problem, hyper: HyperPosterior, names: Sequence[str], mean: Array
) -> list[str]:
    gaussian, scale = problem.gaussian, problem.numbers["scale"]
    if not len(problem.weight.loc) or not gaussian.rows:
        return []
    first, words = gaussian.flat, []
    logs, shares = hyper.log_numbers, hyper.shares
    log_scale = float(shares @ logs["scale"])
    width = np.exp(shares @ gaussian.log_prior(logs["noise"], logs["scale"]))
    middle = mean[first : len(gaussian.loc)]
    away = (middle - problem.weight.loc) / (width * np.sqrt(problem.weight.variances))
    away = np.where(np.isfinite(away), away, 0.0)
    order = np.argsort(-np.abs(away))
    far = [int(j) for j in order if abs(away[j]) > _SDS]
    if far:
        told = ", ".join(f"{names[first + j]} by {abs(away[j]):.1f}" for j in far[:_SHOWN])
        more = f" and {len(far) - _SHOWN} more" if len(far) > _SHOWN else ""
        words.append(f"posterior means are prior sds away from the prior's: {told}{more}")
    times, gain = _wider(problem, hyper, log_scale)
    if gain > _NATS:
        words.append(f"weights {times:.2g} times as wide have {gain:.3g} nats more evidence")
    return words + (_improbable("scale", scale, log_scale) if isinstance(scale, Unknown) else [])


def _wider(problem: Problem, hyper: HyperPosterior, start: float) -> tuple[float, float]:
    """The best factor above one of the prior sds, and the evidence gained by it, in nats.

    Both over the scale whose log is `start`, with the noise that is known, or that suits each best;
    of an exact function of the columns with that of the posterior.
    """
    gaussian, noise = problem.gaussian, problem.numbers["noise"]
    # of an exact function of the columns the noise that suits best is zero
    if not isinstance(noise, Unknown) or gaussian.exact_fit > -np.inf:
        log_noise = np.full(len(_WIDER), hyper.shares @ hyper.log_numbers["noise"])
        values = gaussian.log_evidence(log_noise, start + _WIDER)
        best = int(np.argmax(values))
        return float(np.exp(_WIDER[best])), float(values[best] - values[0])
    if gaussian.rows <= gaussian.flat:
        return 1.0, 0.0
    ratios = np.linspace(-35.0, 35.0, 281)
    with np.errstate(divide="ignore", invalid="ignore"):  # of data that are zero
        log_noise, values = gaussian.best_noise(ratios)
        log_scales = gaussian.log_scale(log_noise, ratios)
    wider = np.flatnonzero((log_scales > start) & np.isfinite(values))
    if not len(wider):
        return 1.0, 0.0
    best = int(wider[np.argmax(values[wider])])
    gain = values[best] - _here(problem, hyper, start)
    return float(np.exp(log_scales[best] - start)), float(gain)


def _here(problem: Problem, hyper: HyperPosterior, log_scale: float) -> float:
    """The highest log evidence over the noise, at one prior scale."""
    from scipy import optimize

    points = hyper.log_numbers["noise"]
    places = np.sort(np.append(points, hyper.shares @ points + np.linspace(-35.0, 35.0, 281)))

    def log_evidence(log_noise: Array) -> Array:
        return problem.gaussian.log_evidence(log_noise, np.full(len(log_noise), log_scale))

    values = log_evidence(places)
    best = int(np.argmax(values))
    ends = places[max(best - 1, 0)], places[min(best + 1, len(places) - 1)]
    top = optimize.minimize_scalar(lambda each: -log_evidence(np.array([each]))[0], bounds=ends)
    return float(max(values[best], -top.fun))


def _of_noise(problem: Problem, hyper: HyperPosterior) -> list[str]:
    noise, gaussian = problem.numbers["noise"], problem.gaussian
    logs = hyper.log_numbers
    log_scale = hyper.shares @ logs["scale"]
    if gaussian.rows <= gaussian.flat:
        return []
    if isinstance(noise, Unknown):
        log_noise = float(hyper.shares @ logs["noise"])
        far = _improbable("noise", noise, log_noise)
        # a lower end alone keeps away from zero on purpose
        if far or noise.distribution is None or noise.upper == np.inf:
            return far
        at = float(np.exp(log_noise))
    else:
        at = noise
    # from a factor on, as of many data a known noise is always a little off
    grid = np.linspace(np.log(_TIMES), 20.0, 161)
    away = np.concatenate([[0.0], grid, -grid])
    values = gaussian.log_evidence(np.log(at) + away, np.full(len(away), log_scale))
    best, known = int(np.argmax(values)), values[0]
    if isinstance(noise, Unknown):  # at the end of its prior that is nearest
        numbers = at * np.exp(away)
        known = values[(numbers > noise.lower) & (numbers < noise.upper)].max(initial=known)
    if values[best] - known > _NATS:
        kind = "noise near" if isinstance(noise, Unknown) else "known noise of"
        return [f"a {kind} {at:.3g}, where {at * np.exp(away[best]):.3g} is likely"]
    return []


def _improbable(name: str, number: Unknown, log_number: float) -> list[str]:
    """Words of a number at which its prior density is far below the highest."""
    if number.distribution is None:
        return []
    at, spread = float(np.exp(log_number)), number.unit * np.exp(np.linspace(-60.0, 60.0, 2401))
    numbers = np.append(at, spread[(spread > number.lower) & (spread < number.upper)])
    densities = number.log_prob(numbers)
    # by the density of the number and by that of its log, as the first may grow towards zero
    below = min(_drop(densities), _drop(densities + np.log(numbers)))
    far = f"a {name} near {at:.3g}, where its prior is {below:.3g} nats below its mode"
    return [far] if below > _NATS else []


def _drop(logs: Array) -> float:
    """How far the first is below the highest of the others."""
    return float(logs[1:].max(initial=logs[0]) - logs[0])
