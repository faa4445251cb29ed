"""The ladder: the families from no channel to a channel of any shape, and their names."""

import inspect
from typing import Any

import pyro.distributions as dist
from pyro.distributions import constraints

from ppvae._checks import expect
from ppvae.families.base import NAMES
from ppvae.families.family import Family
from ppvae.families.flows import Flow
from ppvae.families.prior import Prior
from ppvae.families.rules import Channel, shared

#: The ladder, from no channel to a channel of any shape: name -> family.
LADDER: dict[str, Any] = {
    "deterministic": Family(dist.Delta),
    "zero": Family(dist.Delta, v=0.0),
    "noise_only": Prior(),
    "mean_only": Family(dist.Normal, scale=1.0),
    "mean_only_bounded": Family(dist.Normal, loc=constraints.interval(-1.0, 1.0), scale=1.0),
    "shared_scale": Family(dist.Normal, scale=shared),
    "mean_scale": Family(dist.Normal),
    # df > 2: below, the variance is infinite, and with it the divergence from a Gaussian prior.
    # Above 1000 it is a Gaussian to a thousandth of a nat, and the log-gammas of the density, of
    # which only rounding is left, would be maximised in its place. (On a positive site the tails go
    # through an exponential, and means of the draws are infinite.)
    "student_t": Family(dist.StudentT, df=constraints.interval(2.0, 1000.0)),
    "low_rank": Family(dist.LowRankMultivariateNormal, cov_factor=Channel(columns=2)),
    "full_rank": Family(dist.MultivariateNormal),
    "flow": Flow(),
}

NAMES |= {family: name for name, family in LADDER.items()}


def as_family(value: Any, argument: str = "family") -> Any:
    """The guide family that a value is, or is the name of.

    Args:
        value: a guide family, or a name of the ladder such as "mean_scale".
        argument: what the error calls the value.

    Raises:
        TypeError: it is neither.

    Example:
        >>> as_family("mean_scale").channels
        ('loc', 'scale')
    """
    family = LADDER.get(value) if isinstance(value, str) else value
    asked = ("channels", "joint", "name", "head")
    known = not inspect.isclass(family) and all(hasattr(family, name) for name in asked)
    expect(known, argument, f"a guide family or one of {list(LADDER)}", repr(value), TypeError)
    return family
