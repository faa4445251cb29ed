r"""Guide families: distributions of which some arguments are channels.

A *channel* is an argument that carries information to the latent: from the datum, through an
encoder, or, for a global latent, from a free parameter. Every other argument is fixed, or shared.

===================== ========================== ==================
family                expression                 channels
===================== ========================== ==================
`deterministic`       `Delta(v)`                 v
`zero`                `Delta(0)`                 none
`noise_only`          the prior itself           none
`mean_only`           `Normal(loc, 1)`           loc
`mean_only_bounded`   `Normal(loc in (-1,1), 1)` loc
`shared_scale`        `Normal(loc, sigma)`       loc
`mean_scale`          `Normal(loc, scale)`       loc, scale
`student_t`           `StudentT(df, loc, scale)` df, loc, scale
`low_rank`            `LowRankMultivariate...`   loc, two factors
`full_rank`           `MultivariateNormal`       loc, scale_tril
`flow`                a normalizing flow         loc, scale, shape
===================== ========================== ==================

**To add a family**, write one line: `Family(dist.AsymmetricLaplace)`. For a head that is not the
application of one distribution to its arguments, give an object with the attributes `channels`,
`joint`, `name` and a method `head(features, shape)` that builds a module whose forward returns a
distribution (see `Flow`).
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.distributions import constraints

from ppvae.families.base import NAMES
from ppvae.families.family import Family, shared
from ppvae.families.flows import Flow
from ppvae.families.heads import Channel
from ppvae.families.prior import Prior

deterministic = Family(dist.Delta)


zero = Family(dist.Delta, v=0.0)


noise_only = Prior()


mean_only = Family(dist.Normal, scale=1.0)


mean_only_bounded = Family(dist.Normal, loc=constraints.interval(-1.0, 1.0), scale=1.0)


shared_scale = Family(dist.Normal, scale=shared)


mean_scale = Family(dist.Normal)


# df > 2: below, the variance is infinite, and with it the divergence from a Gaussian prior. Above
# 1000 it is a Gaussian to a thousandth of a nat, and the log-gammas of the density, of which only
# rounding is left, would be maximised in its place. (On a positive site the tails go through an
# exponential, and means of the draws are infinite.)
student_t = Family(dist.StudentT, df=constraints.interval(2.0, 1000.0))


low_rank = Family(dist.LowRankMultivariateNormal, cov_factor=Channel(columns=2))


full_rank = Family(dist.MultivariateNormal)


flow = Flow()


#: The ladder, from no channel to a channel of any shape: name -> family.
LADDER: dict[str, Any] = {
    "deterministic": deterministic,
    "zero": zero,
    "noise_only": noise_only,
    "mean_only": mean_only,
    "mean_only_bounded": mean_only_bounded,
    "shared_scale": shared_scale,
    "mean_scale": mean_scale,
    "student_t": student_t,
    "low_rank": low_rank,
    "full_rank": full_rank,
    "flow": flow,
}

NAMES |= {family: name for name, family in LADDER.items()}
