"""Heads: the modules that turn features, or free parameters, into a distribution."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import transform_to

from ppvae.families.gaussians import LowRankMultivariateNormal, MultivariateNormal
from ppvae.families.rules import (
    FREE_STARTS,
    STARTS,
    Channel,
    Rule,
    Shared,
    constraints_of,
    fixed,
    shape_before,
    without_shift,
)
from ppvae.families.student import StudentT

#: What a head makes in place of a distribution of Pyro's.
STABLE: dict[Any, Any] = {
    dist.MultivariateNormal: MultivariateNormal,
    dist.LowRankMultivariateNormal: LowRankMultivariateNormal,
    dist.StudentT: StudentT,
}

# An argument in an interval that starts further out, before its transform (the sigmoid), has no
# slope left to move by.
_FARTHEST = 30.0
_INSIDE = 0.05  # a share of the length of an interval


class Argument(nn.Module):
    """One learned argument of a distribution: a linear function of the features, or a parameter.

    Args:
        constraint: what the values satisfy.
        shape: shape of one value.
        features: length of the features; None makes a free parameter.
        start: where it starts, see `Channel`; None is zero before the transform.
    """

    linear: nn.Linear | None
    raw: nn.Parameter | None
    place: Tensor

    def __init__(
        self,
        constraint: Any,
        shape: torch.Size,
        features: int | None,
        start: float | None = None,
    ) -> None:
        super().__init__()
        self.constraint, self.shape = constraint, shape
        self.transform = transform = without_shift(transform_to(constraint))
        shift = torch.zeros(shape_before(transform, shape))
        if start is not None:
            shift = transform.inv(fixed(start, constraint.event_dim, shape).expand(shape))
            limit = _FARTHEST if isinstance(constraint, constraints.interval) else math.inf
            shift = torch.where(shift.abs() < limit, shift, 0.0)  # nan: outside the constraint
        # by class, since a copy of a family has a copy of the constraint
        self.triangular = isinstance(constraint, type(constraints.lower_cholesky))
        if self.triangular:  # only the entries that count, so that no parameter is idle
            rows, columns = torch.tril_indices(shape[-2], shape[-1])
            self.register_buffer("place", rows * shape[-1] + columns, persistent=False)
            shift = shift[rows, columns]
        self.raw_shape = shift.shape
        self.linear = self.raw = None
        if features is not None:
            self.linear = nn.Linear(features, shift.numel())
            self.linear.bias.data += shift.reshape(-1)
        else:
            self.raw = nn.Parameter(0.01 * torch.randn(shift.shape) + shift)

    def raw_at(self, value: Tensor) -> Tensor:
        """What stands before the transform where the argument has a value, `(*, *shape)`.

        In an interval it stays a share of the length away from the ends, where it could not move.
        """
        transform: Any = transform_to(self.constraint)
        if isinstance(self.constraint, constraints.interval):
            low, high = self.constraint.lower_bound, self.constraint.upper_bound
            share = ((value - low) / (high - low)).clamp(_INSIDE, 1 - _INSIDE)
            value = low + share * (high - low)
        raw: Tensor = transform.inv(value)
        return raw.flatten(-2)[..., self.place] if self.triangular else raw

    def forward(self, features: Tensor | None = None) -> Tensor:
        """The argument inside its constraint: features `(*, features)` -> `(*, *shape)`."""
        if self.linear is None or features is None:
            return self.inside(self.raw)
        value = self.linear(features)
        return self.inside(value.reshape(value.shape[:-1] + self.raw_shape))

    def inside(self, raw: Any) -> Tensor:
        """What stands before the transform, `(*, *raw_shape)`, taken inside the constraint."""
        if self.triangular:
            batch = raw.shape[:-1]
            flat = raw.new_zeros(batch + (self.shape.numel(),))
            flat = flat.scatter(-1, self.place.expand(raw.shape), raw)
            raw = flat.reshape(batch + self.shape)
        value: Tensor = self.transform(raw)
        return value


class Head(nn.Module):
    """Computes the arguments of a distribution from features, and returns the distribution.

    Args:
        family: a `Family`, whose rules say where each argument comes from.
        features: length of the features; None makes all learned arguments free parameters.
        shape: shape of the latent.
    """

    def __init__(self, family: Any, features: int | None, shape: torch.Size) -> None:
        super().__init__()
        self.family, self.shape = family, shape
        own = constraints_of(family.distribution)
        for name, rule in family.rules.items():
            event_dim = own[name].event_dim
            if not isinstance(rule, Rule):
                self.register_buffer(name, fixed(rule, event_dim, shape), persistent=False)
                continue
            size = torch.Size([shape[-1], rule.columns or shape[-1]]) if event_dim == 2 else shape
            if event_dim == 0 and (family.joint or isinstance(rule, Shared)):
                size = torch.Size()
            source = features if isinstance(rule, Channel) else None
            start = (FREE_STARTS if features is None else STARTS).get(name)
            start = start if rule.start is None else rule.start
            constraint = rule.constraint or own[name]
            self.add_module(name, Argument(constraint, size, source, start))

    def forward(
        self, features: Tensor | None = None, rows: Sequence[tuple[int, Tensor]] = ()
    ) -> Any:
        """The distribution over `(*, *shape)`; the last dim is the event of a joint family.

        Args:
            features: shape `(*, features)`; None for free parameters.
            rows: pairs of a dim of `shape` and the indices that are wanted along it, of a head of
                free parameters of an elementwise family.
        """
        values, shape = {}, list(self.shape)
        for name in self.family.rules:
            value = getattr(self, name)
            whole = isinstance(value, Argument) and value.shape == self.shape
            value = value(features) if isinstance(value, Argument) else value
            for dim, index in rows:
                value = value.index_select(dim, index) if whole else value
                shape[dim] = len(index)
            values[name] = value
        batch = features.shape[:-1] if features is not None else torch.Size()
        kind = self.family.distribution
        fn = STABLE.get(kind, kind)(**values)
        batch = batch if self.family.joint else batch + torch.Size(shape)
        return fn if fn.batch_shape == batch else fn.expand(batch)
