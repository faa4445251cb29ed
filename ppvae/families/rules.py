"""Rules: where each argument of a family's distribution gets its value from."""

import inspect
import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform

from ppvae._checks import check_count, check_real, expect

Constraint = constraints.Constraint

#: Where arguments of these names start if their rule does not say: with tails like those of a
#: Gaussian; and a guide without encoder starts narrow, as Pyro's autoguides do.
STARTS = {"df": 30.0}
FREE_STARTS = {"df": 30.0, "scale": 0.1, "scale_tril": 0.1, "cov_diag": 0.01}


@dataclass(frozen=True)
class Rule:
    """What `Channel` and `Shared` say of a learned argument; all of it may be left out.

    Args:
        constraint: what the values must satisfy; by default what the distribution asks for.
        columns: last dimension of a matrix argument of shape `(size, columns)`, for arguments such
            as `cov_factor`; by default a matrix is square.
        start: the value before training (of an argument that an encoder fills: where the encoder's
            output is zero). One number fills a vector, or the diagonal of a matrix. By default the
            argument is zero before the transform to its constraint; but `df` is 30, and without an
            encoder `scale` and `scale_tril` are 0.1 and `cov_diag` 0.01, where they may be.
    """

    constraint: Constraint | None = None
    columns: int | None = None
    start: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.columns is not None:
            object.__setattr__(self, "columns", check_count("columns", self.columns))


class Channel(Rule):
    """Marks an argument as a channel, where more has to be said of it; arguments as of `Rule`."""


class Shared(Rule):
    """Marks an argument as learned and the same for all data, and for all coordinates of a scalar.

    The arguments are those of `Rule`; `shared` is the marker without any.
    """


shared = Shared()


def constraints_of(distribution: Any) -> dict[str, Constraint]:
    """The constraint on each argument of a distribution; one that depends on others is dropped.

    That is the value of `Delta`, which may be any real number.
    """
    return {
        name: constraints.real if constraints.is_dependent(constraint) else constraint
        for name, constraint in distribution.arg_constraints.items()
    }


def rules_of(distribution: Any, given: dict[str, Any]) -> dict[str, Any]:
    """One complete rule for each argument of a distribution that is in use.

    Args:
        distribution: a class from `pyro.distributions`.
        given: rules by argument, as `Family` takes them.

    Returns:
        For each argument a `Channel`, a `Shared` or a fixed value.

    Raises:
        TypeError: a rule has a type that no rule has.
        ValueError: there is no argument of a given name, or no value can satisfy its rule.
    """
    own = constraints_of(distribution)
    signature = inspect.signature(distribution.__init__).parameters
    names = [name for name in signature if name in own]
    for name in given:
        theirs = f"an argument of {distribution.__name__}; it has {', '.join(names)}"
        expect(name in names, "arguments", theirs, name)
    # of alternatives, such as probs and logits, the named ones count, and else the last
    alternatives = [name for name in names if signature[name].default is None]
    chosen = [name for name in alternatives if name in given] or alternatives[-1:]
    rules = {"log_density": 0.0, **given}  # the density of a point is never a channel
    return {
        name: _rule(name, rules.get(name, Channel()), own[name])
        for name in names
        if name not in alternatives or name in chosen
    }


def _rule(name: str, rule: Any, own: Constraint) -> Any:
    """A rule or a fixed value, checked, from what was given."""
    if isinstance(rule, (Real, Tensor)) and not isinstance(rule, bool):
        _check_value(name, rule, own)
        return rule if isinstance(rule, Tensor) else float(rule)
    rule = Channel(rule) if isinstance(rule, Constraint) else rule
    kinds = "a number, a tensor, a constraint, `Channel` or `shared`"
    expect(isinstance(rule, Rule), name, kinds, type(rule).__name__, TypeError)
    expect(not own.is_discrete, name, "a fixed number, since it is discrete", rule)
    inside = rule.constraint is None or _is_inside(rule.constraint, own)
    expect(inside, name, f"a constraint inside {own}", rule.constraint)
    if rule.start is not None:
        one = check_real(name, rule.start).numel() == 1
        expect(one, name, "one number as its start", rule.start)
        _check_value(name, rule.start, rule.constraint or own)
    return rule


def _check_value(name: str, value: Any, constraint: Any) -> None:
    check_real(name, value)
    tensor = fixed(value, constraint.event_dim, torch.Size([1]))
    ok = torch.isfinite(tensor).all() and constraint.check(tensor).all()
    expect(ok, name, f"a finite value in {constraint}", value)


def _is_inside(inner: Constraint, outer: Constraint) -> bool:
    """Whether values inside a constraint differ, and satisfy another, as far as some can tell."""
    try:
        transform = transform_to(inner)
        shape = shape_before(transform, torch.Size([2] * outer.event_dim))
        values = transform(torch.linspace(-5.0, 5.0, 11 * shape.numel()).reshape(11, *shape))
        satisfied = inner.check(values).all() and outer.check(values).all()
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return bool(satisfied) and inner.event_dim <= outer.event_dim and len(values.unique(dim=0)) > 1


def shape_before(transform: Any, shape: torch.Size) -> torch.Size:
    """The shape that a transform takes to give another one.

    Of one that takes number by number, by what it gives: that of `inverse_shape` loads SymPy.
    """
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if transform.domain.event_dim:
        return torch.Size(transform.inverse_shape(shape))
    return transform.inv(torch.zeros(shape)).shape


def fixed(value: Any, event_dim: int, shape: torch.Size) -> Tensor:
    """A fixed argument as a tensor; one number fills a vector, or the diagonal of a matrix."""
    tensor = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if tensor.dim() or event_dim == 0:
        return tensor
    return tensor.expand(shape) if event_dim == 1 else tensor * torch.eye(*shape[-2:])


#: One turn, from which angles are drawn.
TURN = constraints.interval(-math.pi, math.pi)


_WRAPS = torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution


def support_of(fn: Any) -> Any:
    """The set that a distribution, or a class of such, draws from.

    It is the support that it names, but for angles: the density of a von Mises distribution is
    periodic and named on all of the reals, where it has no integral, and no ELBO is a bound. It is
    drawn from one turn.
    """
    kind = torch.distributions.VonMises
    if isinstance(fn, type):
        return TURN if issubclass(fn, kind) else getattr(fn, "support", None)
    bare: Any = fn
    while isinstance(bare, (*_WRAPS, torch.distributions.MixtureSameFamily)):
        bare = bare.base_dist if isinstance(bare, _WRAPS) else bare.component_distribution
    if not isinstance(bare, kind):
        return fn.support
    events = len(fn.event_shape)
    return constraints.independent(TURN, events) if events else TURN


def without_shift(transform: Any) -> Any:
    """A bijection without the shift by zero that PyTorch puts behind that to positive numbers."""
    parts = transform.parts if isinstance(transform, ComposeTransform) else []
    if len(parts) == 2 and isinstance(parts[1], AffineTransform):
        shift = parts[1].loc, parts[1].scale
        if all(type(number) in (int, float) for number in shift) and shift == (0, 1):
            return parts[0]
    return transform


def comparable(part: Any) -> Any:
    """Turns a rule into something that `==` and `hash` take by value; its start does not count.

    Numbers count as tensors of one element, and constraints as their class and their bounds.
    """
    if isinstance(part, Rule):
        return type(part), comparable(part.constraint), part.columns
    if isinstance(part, Constraint):
        return type(part), *(comparable(held) for held in vars(part).values())
    if isinstance(part, (int, float, Tensor)):
        tensor = torch.as_tensor(part, dtype=torch.float64)
        return tuple(tensor.shape), tuple(tensor.reshape(-1).tolist())
    return part
