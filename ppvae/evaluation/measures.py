"""The numbers of `evaluate`, one function each.

**To add a number per datum**, write a function of a `Sample` that returns one value for each datum,
under `@per_datum(unit)`; for one per coordinate of the latents, a function of the arrays of
`Coordinates`, under `@per_latent(unit)`. `evaluate` then returns it under the function's name.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from ppvae.evaluation.coordinates import Coordinates
from ppvae.objectives import weights

ACTIVE = 0.01  # variance of the mean of q over the data, above which a latent is in use


_Number = TypeVar("_Number", bound=Callable[..., np.ndarray])


class Sample(NamedTuple):
    """The draws for the data of one minibatch, summed up.

    Attributes:
        log_weight: log p(x, z) - log q(z | x) of the draws, shape `(draws, datum)`, in float64.
        terms: site -> its part of the objective, averaged over the draws, shape `(datum,)`.
        observed: names of the observed sites.
        point: whether the guide is a point, without a density.
        coordinates: of the latents.
    """

    log_weight: Tensor
    terms: dict[str, np.ndarray]
    observed: tuple[str, ...]
    point: bool
    coordinates: Coordinates


class Measure(NamedTuple):
    """A number of `evaluate`.

    Attributes:
        function: of a `Sample`, or of the arrays of `Coordinates`.
        unit: of what it returns.
        density: whether it needs a guide with a density; for a point it is NaN then.
    """

    function: Callable[[Any], np.ndarray]
    unit: str
    density: bool


PER_DATUM: dict[str, Measure] = {}
PER_LATENT: dict[str, Measure] = {}


def _measure(
    registry: dict[str, Measure], unit: str, *, density: bool = False
) -> Callable[[_Number], _Number]:
    """Registers a number under the function's name; with `density`, one that a point lacks."""

    def register(function: _Number) -> _Number:
        registry[function.__name__] = Measure(function, unit, density)
        return function

    return register


per_datum, per_latent = partial(_measure, PER_DATUM), partial(_measure, PER_LATENT)


@per_datum("nats per datum")
def distortion(sample: Sample) -> np.ndarray:
    """-E log p(x | z)."""
    return -sum(sample.terms[name] for name in sample.observed)  # type: ignore[return-value]


@per_datum("nats per datum")
def rate(sample: Sample) -> np.ndarray:
    """KL(q(z | x) || p(z)); of a point the penalty -log p(z)."""
    latent = [value for name, value in sample.terms.items() if name not in sample.observed]
    return -sum(latent)  # type: ignore[return-value]


@per_datum("nats per datum")
def objective(sample: Sample) -> np.ndarray:
    """-(distortion + rate): the ELBO, or the penalised log-likelihood of a point."""
    return -(distortion(sample) + rate(sample))


@per_datum("nats per datum", density=True)
def elbo(sample: Sample) -> np.ndarray:
    """The objective, where it is a bound on log p(x)."""
    return objective(sample)


@per_datum("nats per datum", density=True)
def log_likelihood(sample: Sample) -> np.ndarray:
    """Log p(x) from below, by importance sampling."""
    return weights.log_mean_weight(sample.log_weight).cpu().numpy()


@per_datum("draws", density=True)
def ess(sample: Sample) -> np.ndarray:
    """The effective number of draws."""
    return weights.effective_sample_size(sample.log_weight).cpu().numpy()


@per_datum("", density=True)
def khat(sample: Sample) -> np.ndarray:
    """The Pareto shape of the tail of the weights."""
    return weights.khat(sample.log_weight).numpy()


def _away(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Squared distances of the means from their mean over the data, less what is noise of draws."""
    mean = arrays["mean"]
    return (mean - mean.mean(0)) ** 2 - arrays["error"]


@per_latent("squares of the latent")
def mean_variance(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The variance over the data of the mean of q."""
    return np.maximum(_away(arrays).mean(0), 0.0)


@per_latent("squares of the latent")
def mean_variance_se(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Its standard error over the data."""
    away = _away(arrays)
    return away.std(0) / math.sqrt(len(away))


@per_latent("")
def active(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Whether the latent is in use (Burda, Grosse, Salakhutdinov, 2016)."""
    return _away(arrays).mean(0) > ACTIVE


@per_latent("nats")
def kl(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """KL(q || p) of the coordinate, NaN where the divergence does not split."""
    return arrays["kl"].mean(0)
