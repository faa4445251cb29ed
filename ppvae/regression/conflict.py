"""Whether the priors of a regression and its data disagree."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from ppvae.regression.priors import Array, Unknown

if TYPE_CHECKING:
    from ppvae.regression.exact import ExactPosterior

# A weight is so many prior sds from its prior mean, and evidence or density so many nats too low.
_SDS, _NATS = 4.0, 8.0
# A known noise is off by so much where the data contradict it, too.
_TIMES = 2.0
# So wide are the priors that are compared, in sds of the one that was given.
_WIDER = np.linspace(0.0, 15.0, 151)
_SHOWN = 3


def warn_of_conflict(posterior: ExactPosterior) -> None:
    """Warns where the data contradict the priors.

    Weights are in conflict where one is several prior sds from its prior mean, or where wider
    priors, all by the same factor, have much more evidence at the noise that suits each best. The
    noise is in conflict where its prior density at the posterior mean is far below the highest, or
    where it is known and other values are far more probable.
    """
    words = [*_of_weights(posterior), *_of_noise(posterior)]
    if words:
        advice = 'standardise the data, add an intercept, or give scale="data" or a wider prior'
        told = f"prior and data disagree: {'; '.join(words)} ({advice})"
        warnings.warn(told, UserWarning, stacklevel=3)


def _of_weights(posterior: ExactPosterior) -> list[str]:
    problem, gaussian = posterior.problem, posterior.problem.gaussian
    numbers = problem.numbers
    if isinstance(numbers["scale"], Unknown) or not len(problem.weight.loc) or not gaussian.rows:
        return []
    first, words = gaussian.flat, []
    logs, shares = posterior.hyper.log_numbers, posterior.hyper.shares
    width = np.exp(shares @ gaussian.log_prior(logs["noise"], logs["scale"]))
    middle = posterior.mean[first : len(gaussian.loc)]
    away = (middle - problem.weight.loc) / (width * np.sqrt(problem.weight.variances))
    away = np.where(np.isfinite(away), away, 0.0)
    order = np.argsort(-np.abs(away))
    far = [int(j) for j in order if abs(away[j]) > _SDS]
    if far:
        names = posterior.names[first:]
        told = ", ".join(f"{names[j]} by {abs(away[j]):.1f}" for j in far[:_SHOWN])
        more = f" and {len(far) - _SHOWN} more" if len(far) > _SHOWN else ""
        words.append(f"posterior means are prior sds away from the prior's: {told}{more}")
    values = _profile(posterior, np.log(numbers["scale"]) + _WIDER)
    best = int(np.argmax(values))
    if values[best] - values[0] > _NATS:
        times = np.exp(_WIDER[best])
        gain = values[best] - values[0]
        words.append(f"weights {times:.2g} times as wide have {gain:.3g} nats more evidence")
    return words


def _profile(posterior: ExactPosterior, log_scales: Array) -> Array:
    """Log evidence at prior scales, at the known noise or at the best one for each."""
    gaussian, noise = posterior.problem.gaussian, posterior.problem.numbers["noise"]
    if not isinstance(noise, Unknown):
        return gaussian.log_evidence(np.full(len(log_scales), np.log(noise)), log_scales)
    center = float(posterior.hyper.shares @ posterior.hyper.log_numbers["noise"])
    grid = np.linspace(-20.0, 20.0, 161)
    values = np.empty((len(log_scales), len(grid)))
    for row, log_scale in enumerate(log_scales):
        values[row] = gaussian.log_evidence(center + grid, np.full(len(grid), log_scale))
    return values.max(1)


def _of_noise(posterior: ExactPosterior) -> list[str]:
    problem, hyper = posterior.problem, posterior.hyper
    noise, gaussian = problem.numbers["noise"], problem.gaussian
    log_scale = hyper.shares @ hyper.log_numbers["scale"]
    if gaussian.rows <= gaussian.flat:
        return []
    if isinstance(noise, Unknown):
        if noise.distribution is None:
            return []
        at = np.exp(hyper.shares @ hyper.log_numbers["noise"])
        places = np.linspace(-60.0, 60.0, 2401)
        spread = noise.unit * np.exp(places)
        inside = spread[(spread > noise.lower) & (spread < noise.upper)]
        numbers = np.append(at, inside)
        logs = noise.log_prob(numbers)
        # by the density of the number and by that of its log, as the first may grow towards zero
        below = min(_drop(logs), _drop(logs + np.log(numbers)))
        if below > _NATS:
            return [f"a noise near {at:.3g}, where its prior is {below:.3g} nats below its mode"]
        return []
    grid = np.linspace(-20.0, 20.0, 801)
    values = gaussian.log_evidence(np.log(noise) + grid, np.full(len(grid), log_scale))
    best = int(np.argmax(values))
    gain = values[best] - values[len(grid) // 2]
    if gain > _NATS and abs(grid[best]) > np.log(_TIMES):
        return [f"a known noise of {noise:.3g}, where {noise * np.exp(grid[best]):.3g} is likely"]
    return []


def _drop(logs: Array) -> float:
    """How far the first is below the highest of the others."""
    return float(logs[1:].max() - logs[0])
