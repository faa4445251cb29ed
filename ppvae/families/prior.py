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

from ppvae.families.base import Value


class Prior(Value):
    """The family whose only member is the prior itself: no information passes to the latent.

    The guide then samples from the model's own latent statements, so the prior may be learned,
    hierarchical or of any support, and the KL divergence is zero exactly.
    """

    channels: tuple[str, ...] = ()
    joint = False

    def _parts(self) -> Any:
        return ()

    def __repr__(self) -> str:
        return "Prior()"
