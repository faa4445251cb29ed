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

from ppvae.families.family import Family, cap, shared
from ppvae.families.flows import Flow, FlowHead
from ppvae.families.heads import Argument, Channel, Head, Shared, event_dim_of, fixed
from ppvae.families.ladder import (
    LADDER,
    deterministic,
    flow,
    full_rank,
    low_rank,
    mean_only,
    mean_only_bounded,
    mean_scale,
    noise_only,
    shared_scale,
    student_t,
    zero,
)
from ppvae.families.prior import Prior

__all__ = [
    "Argument",
    "Channel",
    "Family",
    "Flow",
    "FlowHead",
    "Head",
    "LADDER",
    "Prior",
    "Shared",
    "cap",
    "deterministic",
    "event_dim_of",
    "fixed",
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
