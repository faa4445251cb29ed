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

import inspect
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import transform_to

from ppvae.heads import Channel, FlowHead, Head, Shared, event_dim_of, fixed

__all__ = [
    "LADDER",
    "Channel",
    "Family",
    "Flow",
    "Prior",
    "Shared",
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

Constraint = constraints.Constraint

shared = Shared()


class Family:
    r"""A guide family: a distribution and, for each of its arguments, where the value comes from.

    A number (or tensor) fixes an argument; a constraint makes it a channel inside that constraint;
    the marker `shared` makes it one learned number; left out, it is a channel under the
    distribution's own constraint. Of alternatives (`probs` or `logits`; `covariance_matrix`,
    `precision_matrix` or `scale_tril`) the one that is named counts, otherwise the last.

    Args:
        distribution: a class from `pyro.distributions`.
        **arguments: rules for the arguments of the distribution, as above.

    Raises:
        TypeError: `distribution` is no class of `pyro.distributions`, or a rule has a wrong type.
        ValueError: the distribution has no argument of that name, or no value can satisfy the rule.

    Example:
        >>> import pyro.distributions as dist
        >>> Family(dist.AsymmetricLaplace).channels
        ('loc', 'scale', 'asymmetry')
        >>> Family(dist.Normal, scale=0.5)
        Family(Normal, scale=0.5)
    """

    def __init__(self, distribution: Callable[..., Any], **arguments: Any) -> None:
        if not (
            inspect.isclass(distribution)
            and issubclass(distribution, dist.torch_distribution.TorchDistributionMixin)
        ):
            raise TypeError(
                f"distribution: expected a class of pyro.distributions, got {distribution!r}"
            )
        self.distribution = distribution
        self.arguments = arguments
        self.rules = _rules(distribution, arguments)

    @property
    def name(self) -> str:
        """The name in the ladder, or the expression that builds the family."""
        return _ladder_name(self) or repr(self)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the arguments that carry information to the latent."""
        return tuple(name for name, rule in self.rules.items() if isinstance(rule, Channel))

    @property
    def joint(self) -> bool:
        """Whether one distribution spans several coordinates, which it can then correlate."""
        own = self.distribution.arg_constraints
        return any(event_dim_of(own[name]) > 0 for name in self.rules)

    def head(self, features: int | None, shape: torch.Size) -> nn.Module:
        """Builds the module that makes the distribution.

        Args:
            features: length of the encoder's output; None makes the channels free parameters.
            shape: shape of the latent; one dimension for a joint family.

        Returns:
            A module; its forward takes features of shape `(*, features)` (or None) and returns a
            distribution over `(*, *shape)`, whose last dimension is the event of a joint family.
        """
        return Head(self, features, torch.Size(shape))

    def __repr__(self) -> str:
        given = [f", {name}={_show(rule)}" for name, rule in self.arguments.items()]
        return f"Family({self.distribution.__name__}{''.join(given)})"


class Prior:
    """The family whose only member is the prior itself: no information passes to the latent.

    The guide then samples from the model's own latent statements, so the prior may be learned,
    hierarchical or of any support, and the KL divergence is zero exactly.
    """

    channels: tuple[str, ...] = ()
    joint = False
    name = "noise_only"

    def __repr__(self) -> str:
        return "Prior()"


class Flow:
    r"""A conditional normalizing flow: `z = loc + scale * T(eps)`, all of it from the features.

    `T` chains affine couplings (which bend and correlate) and one elementwise spline (which
    reshapes the marginals). All parts have closed-form inverses, so both sampling and scoring cost
    one pass. It starts near the identity: the family contains `mean_scale` and begins there.

    Args:
        layers: number of affine couplings; used in pairs of opposite order, so an even number.
        hidden: width of the networks of the couplings and the spline.
        bins: segments of the spline in each coordinate, on (-3, 3).

    Raises:
        ValueError: `layers` is odd or negative, or `hidden` or `bins` is too small.

    Dinh et al., Density estimation using Real NVP, 2017; Dolatabadi et al., Invertible generative
    modeling using linear rational splines, 2020.
    """

    channels = ("loc", "scale", "shape")
    joint = True

    def __init__(self, *, layers: int = 2, hidden: int = 64, bins: int = 8) -> None:
        if layers < 0 or layers % 2:
            raise ValueError(f"layers: expected an even number of at least 0, got {layers}")
        if hidden < 1 or bins < 2:
            raise ValueError(f"hidden, bins: expected at least 1 and 2, got {hidden} and {bins}")
        self.layers, self.hidden, self.bins = layers, hidden, bins

    @property
    def name(self) -> str:
        """The name in the ladder, or the expression that builds the family."""
        return _ladder_name(self) or repr(self)

    def head(self, features: int | None, shape: torch.Size) -> nn.Module:
        """Builds the flow's module; arguments and result as those of `Family.head`."""
        return FlowHead(self, features, shape[0])

    def __repr__(self) -> str:
        return f"Flow(layers={self.layers}, hidden={self.hidden}, bins={self.bins})"


def _rules(distribution: Any, given: dict[str, Any]) -> dict[str, Any]:
    """One rule (a `Channel`, a `Shared` or a fixed value) for each argument that is used."""
    own = distribution.arg_constraints
    if isinstance(own, property):
        raise TypeError(
            f"distribution: expected arguments with constraints of their own; those of "
            f"{distribution.__name__} depend on one another"
        )
    signature = inspect.signature(distribution.__init__).parameters
    names = [name for name in signature if name in own]
    for name, rule in given.items():
        if name not in names:
            raise ValueError(
                f"{name}: {distribution.__name__} has no such argument; it has {', '.join(names)}"
            )
        if not isinstance(rule, (int, float, Tensor, Constraint, Channel, Shared)):
            raise TypeError(
                f"{name}: expected a number, a tensor, a constraint, `Channel` or `shared`, "
                f"got {type(rule).__name__}"
            )
    alternatives = [name for name in names if signature[name].default is None]
    chosen = [name for name in alternatives if name in given] or alternatives[-1:]
    rules: dict[str, Any] = {}
    for name in names:
        if name in alternatives and name not in chosen:
            continue
        rule = given.get(name, 0.0 if name == "log_density" else Channel())
        if isinstance(rule, Constraint):
            rule = Channel(rule)
        if not isinstance(rule, (Channel, Shared)):
            _check_fixed(name, rule, own[name])
        elif not constraints.is_dependent(own[name]) and own[name].is_discrete:
            raise ValueError(f"{name}: expected a fixed number, since it is discrete; got {rule}")
        elif rule.constraint is not None:
            _check_inside(name, rule.constraint, own[name])
        rules[name] = rule
    return rules


def _check_fixed(name: str, value: Any, constraint: Constraint) -> None:
    tensor = fixed(value, event_dim_of(constraint), torch.Size([1]))
    ok = torch.isfinite(tensor).all()
    if not constraints.is_dependent(constraint):
        ok = ok and constraint.check(tensor).all()
    if not ok:
        raise ValueError(f"{name}: expected a finite value in {constraint}, got {value}")


def _check_inside(name: str, inner: Constraint, outer: Constraint) -> None:
    """Raises unless the values of one constraint satisfy the other, as far as some can tell."""
    if event_dim_of(inner) or event_dim_of(outer) > 1 or constraints.is_dependent(outer):
        return
    values = transform_to(inner)(torch.linspace(-5.0, 5.0, 11))
    if not outer.check(values).all():
        raise ValueError(f"{name}: expected a constraint inside {outer}, got {inner}")


def _show(rule: Any) -> str:
    return "shared" if rule == shared else f"{rule}"


def _ladder_name(family: Any) -> str | None:
    return next((name for name, member in LADDER.items() if member is family), None)


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
