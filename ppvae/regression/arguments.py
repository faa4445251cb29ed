"""Reads the priors of an exact posterior, in the units of the data where that is asked for."""

from typing import Any

from torch.distributions import Distribution

from ppvae._checks import check_choice, expect
from ppvae.regression.factors import Factor
from ppvae.regression.hyper import Problem, make_problem
from ppvae.regression.priors import NormalPrior, Number, Unknown, read_positive, weight_prior
from ppvae.regression.units import Units, rescaled_weight


def problem_of(
    factor: Factor, weight: Any, noise: Any, scale: Any, *, intercept: Any = False
) -> Problem:
    """Reads the priors of `exact_posterior` and checks them against the data.

    Args:
        factor: the data.
        weight: see `exact_posterior`; or a prior of all columns that has been read.
        noise: see `exact_posterior`.
        scale: see `exact_posterior`.
        intercept: see `exact_posterior`; whether it is flat has no effect here.

    Raises:
        TypeError: a prior is of a wrong kind.
        ValueError: a value is out of its range, shapes do not fit, or the posterior is improper.
    """
    of_data = isinstance(scale, str)
    if of_data:
        check_choice("scale", scale, ["data"])
    told = 'None or "data" with weight=None (flat)'
    expect(weight is not None or scale is None or of_data, "scale", told, scale)
    numbers: dict[str, Number] = {"noise": read_positive(noise, "noise")}
    numbers["scale"] = 1.0 if scale is None or of_data else read_positive(scale, "scale")
    count = factor.columns - factor.intercept
    if isinstance(weight, NormalPrior):
        return make_problem(factor, weight, numbers)
    prior = weight_prior(weight, count)
    if of_data:
        units = Units.of_factor(factor)
        sd, noise_sd = units.require_target(), numbers["noise"]
        prior = rescaled_weight(prior, units)
        numbers["noise"] = noise_sd.in_units(sd) if isinstance(noise_sd, Unknown) else noise_sd
    if isinstance(intercept, Distribution):
        prior = _with_intercept(prior, intercept, numbers["scale"])
    return make_problem(factor, prior, numbers)


def _with_intercept(prior: NormalPrior, intercept: Distribution, scale: Number) -> NormalPrior:
    """The prior of the intercept and the weights, of which `scale` multiplies the second only."""
    wanted = "True (flat) with a flat, conjugate or hierarchical prior of the weights"
    plain = len(prior.loc) and not prior.relative and isinstance(scale, float)
    expect(plain, "intercept", wanted, intercept)
    try:
        alone = weight_prior(intercept, 1)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("weight: ", "intercept: ", 1)) from None
    expect(not alone.relative, "intercept", "True or a Normal", intercept)
    assert isinstance(scale, float)
    return prior.after(alone.loc[0], alone.root.reshape(-1)[0] / scale)
