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

Beside the ladder, `Banded(bandwidth)` is a `full_rank` of chains in time: a banded precision.

**To add a family**, write one line: `Family(dist.AsymmetricLaplace)`. For a head that is not the
application of one distribution to its arguments, see `GuideFamily`, which is the contract.
"""

from ppvae.families.banded import Banded
from ppvae.families.base import GuideFamily
from ppvae.families.family import Family
from ppvae.families.flows import Flow
from ppvae.families.ladder import LADDER, as_family
from ppvae.families.prior import Prior
from ppvae.families.rules import Channel, Shared, shared

deterministic = LADDER["deterministic"]
zero = LADDER["zero"]
noise_only = LADDER["noise_only"]
mean_only = LADDER["mean_only"]
mean_only_bounded = LADDER["mean_only_bounded"]
shared_scale = LADDER["shared_scale"]
mean_scale = LADDER["mean_scale"]
student_t = LADDER["student_t"]
low_rank = LADDER["low_rank"]
full_rank = LADDER["full_rank"]
flow = LADDER["flow"]

__all__ = [
    "LADDER",
    "Banded",
    "Channel",
    "Family",
    "Flow",
    "GuideFamily",
    "Prior",
    "Shared",
    "as_family",
    "deterministic",
    "flow",
    "full_rank",
    "low_rank",
    "mean_only",
    "mean_only_bounded",
    "mean_scale",
    "noise_only",
    "shared",
    "shared_scale",
    "student_t",
    "zero",
]
