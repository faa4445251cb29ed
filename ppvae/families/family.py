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
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import Normal, constraints
from torch import Tensor, nn
from torch.distributions import transform_to

from ppvae.families.base import Value
from ppvae.families.heads import Channel, Head, Shared, event_dim_of, fixed

Constraint = constraints.Constraint


shared = Shared()


class Family(Value):
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

    def _parts(self) -> Any:
        return self.distribution, self.rules

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


def cap(family: Any) -> float:
    r"""The most that one latent coordinate can carry, in nats; infinite where there is no limit.

    A mean inside an interval with a fixed scale is an amplitude-limited Gaussian channel. With `A`
    half the interval in units of the scale, up to A = 1.66 two points at the ends are the best
    input (Smith, 1971), and carry `A^2 - E log cosh(A^2 + A eps)`: 0.3368 nats for
    `mean_only_bounded`. Above, the smaller of two upper bounds is given: `log(1 + 2 A / sqrt(2 pi
    e))` and `log(1 + A^2) / 2` (McKellips, 2004). A family without channels carries nothing.
    """
    if not family.channels:
        return 0.0
    rules: Any = getattr(family, "rules", {})
    loc, scale = rules.get("loc"), rules.get("scale")
    normal = getattr(family, "distribution", None) is Normal
    if not (normal and isinstance(loc, Channel) and isinstance(scale, (int, float))):
        return math.inf
    interval: Any = loc.constraint
    if not isinstance(interval, constraints.interval):
        return math.inf
    A = (interval.upper_bound - interval.lower_bound) / 2 / scale
    if A > 1.66:
        return min(math.log1p(2 * A / math.sqrt(2 * math.pi * math.e)), math.log1p(A**2) / 2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    log_cosh = np.logaddexp(A**2 + A * nodes, -(A**2) - A * nodes) - math.log(2)
    return A**2 - float(weights @ log_cosh) / math.sqrt(2 * math.pi)
