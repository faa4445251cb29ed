"""Families of one distribution, and what the channels of a family can carry at most."""

import inspect
import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae.families.base import GuideFamily, check_head
from ppvae.families.heads import Head
from ppvae.families.rules import Channel, comparable, constraints_of, rules_of, shared, support_of


class Family(GuideFamily):
    r"""A guide family: a distribution and, for each of its arguments, where the value comes from.

    A number (or tensor) fixes an argument; a constraint makes it a channel inside that constraint;
    the marker `shared` makes it one learned number; left out, it is a channel under the
    distribution's own constraint. `Channel` and `Shared` say more, such as where training starts.
    Of alternatives (`probs` or `logits`; `covariance_matrix`, `precision_matrix` or `scale_tril`)
    the one that is named counts, otherwise the last.

    Args:
        distribution: a class from `pyro.distributions`.
        **arguments: rules for the arguments of the distribution, as above.

    Raises:
        TypeError: `distribution` is no class of `pyro.distributions`, or cannot be made from
            learned arguments alone, or a rule has a wrong type.
        ValueError: the distribution has no argument of that name, or no value can satisfy the rule.

    Example:
        >>> import pyro.distributions as dist
        >>> Family(dist.AsymmetricLaplace).channels
        ('loc', 'scale', 'asymmetry')
        >>> Family(dist.Normal, scale=0.5)
        Family(Normal, scale=0.5)
        >>> Family(dist.Normal, scale=1.0).name
        'mean_only'
        >>> Family(dist.Bernoulli).channels, Family(dist.Bernoulli, probs=Channel()).channels
        (('logits',), ('probs',))
        >>> Family(dist.MultivariateNormal, covariance_matrix=1.0).channels
        ('loc',)
        >>> fn = Family(dist.Normal, scale=shared).head(features=4, shape=[3])(torch.randn(5, 4))
        >>> fn.batch_shape, len(fn.scale.unique())
        (torch.Size([5, 3]), 1)
    """

    def __init__(self, distribution: Any, **arguments: Any) -> None:
        base = dist.torch_distribution.TorchDistributionMixin
        known = inspect.isclass(distribution) and issubclass(distribution, base)
        known = known and not isinstance(distribution.arg_constraints, property)
        wanted = "a class of pyro.distributions whose arguments have constraints that do not "
        wanted += "depend on one another"
        expect(known, "distribution", wanted, repr(distribution), TypeError)
        self.distribution, self.arguments = distribution, arguments
        self.rules = rules_of(distribution, arguments)
        self.channels = tuple(n for n, rule in self.rules.items() if isinstance(rule, Channel))
        own = constraints_of(distribution)
        self.joint = any(own[name].event_dim > 0 for name in self.rules)
        support = constraints.real if distribution is dist.Delta else support_of(distribution)
        self.support = None if isinstance(support, property) else support
        # a tensor may fit only some latents, which a guide will see; the Gaussian as it comes is
        # known to draw, and would load SymPy for its shape
        tensors = any(isinstance(rule, Tensor) for rule in self.rules.values())
        if not tensors and (arguments or distribution is not dist.MultivariateNormal):
            _check_draws(self)

    def head(self, features: int | None, shape: torch.Size) -> nn.Module:
        """Builds the module that makes the distribution; arguments as for `GuideFamily.head`.

        Example:
            >>> import pyro.distributions as dist
            >>> head = Family(dist.Normal, scale=0.5).head(features=4, shape=torch.Size([2]))
            >>> head.loc.linear
            Linear(in_features=4, out_features=2, bias=True)
            >>> head(torch.zeros(3, 4))
            Normal(loc: torch.Size([3, 2]), scale: torch.Size([3, 2]))
        """
        return Head(self, *check_head(self, features, shape))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Family) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        rules = tuple((name, comparable(rule)) for name, rule in self.rules.items())
        return type(self), self.distribution, rules

    def __repr__(self) -> str:
        given = [f", {name}={_show(rule)}" for name, rule in self.arguments.items()]
        return f"Family({self.distribution.__name__}{''.join(given)})"


def _check_draws(family: Family) -> None:
    """Raises unless a head, tried once, returns a distribution over a vector with a density."""
    try:
        with torch.random.fork_rng(devices=()), torch.no_grad():
            fn = family.head(None, torch.Size([2]))(None)
            shape = fn.shape()
            fn.log_prob(fn.sample())
        if shape != (2,):
            raise ValueError(f"for a latent of shape (2,) it draws shape {tuple(shape)}")
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"distribution: expected one that learned arguments alone can make, got "
            f"{family.distribution.__name__}: {error}"
        ) from error


def _show(rule: Any) -> str:
    """A rule as it was given; tensors rounded, so that the text does not depend on their dtype."""
    if isinstance(rule, Tensor):
        return np.array2string(rule.numpy(force=True), precision=6, separator=", ")
    return "shared" if rule == shared else f"{rule}"


def cap(family: Any) -> float:
    r"""The most that one latent coordinate can carry, in nats; infinite where there is no limit.

    A mean inside an interval with a fixed scale is an amplitude-limited Gaussian channel. With `A`
    half the interval in units of the scale, up to A = 1.66 two points at the ends are the best
    input (Smith, 1971), and carry `A^2 - E log cosh(A^2 + A eps)`: 0.3368 nats for
    `mean_only_bounded`. Above, the smaller of two upper bounds is given: `log(1 + 2 A / sqrt(2 pi
    e))` and `log(1 + A^2) / 2` (McKellips, 2004). A family without channels carries nothing.

    Args:
        family: any guide family.

    Example:
        >>> import pyro.distributions as dist
        >>> bounded = Family(dist.Normal, loc=constraints.interval(-1.0, 1.0), scale=1.0)
        >>> round(cap(bounded), 4)
        0.3368
    """
    if not family.channels:
        return 0.0
    normal = isinstance(family, Family) and family.distribution is dist.Normal
    loc, scale = (family.rules["loc"], family.rules["scale"]) if normal else (None, None)
    interval = loc.constraint if isinstance(loc, Channel) else None
    if not (isinstance(interval, constraints.interval) and isinstance(scale, float)):
        return math.inf
    A = (interval.upper_bound - interval.lower_bound) / 2 / scale
    if A > 1.66:
        return min(math.log1p(2 * A / math.sqrt(2 * math.pi * math.e)), math.log1p(A**2) / 2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    log_cosh = np.logaddexp(A**2 + A * nodes, -(A**2) - A * nodes) - math.log(2)
    return A**2 - float(weights @ log_cosh) / math.sqrt(2 * math.pi)
