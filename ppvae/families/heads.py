"""Heads: the modules that turn features, or free parameters, into a distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import transform_to

Constraint = constraints.Constraint


# Where an argument starts, if not at zero before its transform: tails like those of a Gaussian; and
# narrow, as in Pyro's autoguides, where it is a free parameter.
_START = {"df": 30.0}


_FREE_START = {"scale": 0.1, "scale_tril": 0.1, "cov_diag": 0.01, **_START}


@dataclass(frozen=True)
class Channel:
    """Marks an argument as a channel, where its constraint or shape has to be said.

    Args:
        constraint: what the values must satisfy; by default what the distribution asks for.
        columns: last dimension of a matrix argument of shape `(size, columns)`, for arguments such
            as `cov_factor`; by default a matrix is square.
    """

    constraint: Constraint | None = None
    columns: int | None = None


@dataclass(frozen=True)
class Shared:
    """Marks an argument as learned and the same for all data and all coordinates.

    Args:
        constraint: what the value must satisfy; by default what the distribution asks for.
    """

    constraint: Constraint | None = None


class Argument(nn.Module):
    """One learned argument: a linear function of the features, or a free parameter."""

    linear: nn.Linear | None
    raw: nn.Parameter | None
    place: Tensor

    def __init__(
        self,
        constraint: Constraint,
        shape: torch.Size,
        features: int | None,
        start: float | None = None,
    ) -> None:
        super().__init__()
        self.constraint, self.shape = constraint, shape
        self.triangular = constraint is constraints.lower_cholesky
        raw_shape = torch.Size(transform_to(constraint).inverse_shape(shape))
        if self.triangular:  # only the entries that count, so that no parameter is idle
            rows, columns = torch.tril_indices(shape[-2], shape[-1])
            self.register_buffer("place", rows * shape[-1] + columns, persistent=False)
            raw_shape = rows.shape
        self.raw_shape = raw_shape
        self.linear = self.raw = None
        if features is not None:
            self.linear = nn.Linear(features, raw_shape.numel())
            if start is not None:
                shift = transform_to(constraint).inv(torch.full(shape, start))
                self.linear.bias.data += shift.reshape(-1)
            return
        raw = 0.01 * torch.randn(raw_shape)
        if start is not None and self.triangular:
            raw[rows == columns] += torch.tensor(start).log()
        elif start is not None:
            raw += transform_to(constraint).inv(torch.full(shape, start))
        self.raw = nn.Parameter(raw)

    def forward(self, features: Tensor | None) -> Tensor:
        """The argument inside its constraint: features `(*, features)` -> `(*, *shape)`."""
        if self.linear is None or features is None:
            value: Any = self.raw
        else:
            value = self.linear(features)
            value = value.reshape(value.shape[:-1] + self.raw_shape)
        if self.triangular:
            batch = value.shape[:-1]
            flat = value.new_zeros(batch + (self.shape.numel(),))
            flat = flat.scatter(-1, self.place.expand(value.shape), value)
            value = flat.reshape(batch + self.shape)
        return transform_to(self.constraint)(value)


class Head(nn.Module):
    """Applies the family's distribution to its arguments."""

    def __init__(self, family: Any, features: int | None, shape: torch.Size) -> None:
        super().__init__()
        self.family, self.shape = family, shape
        own = family.distribution.arg_constraints
        for name, rule in family.rules.items():
            if isinstance(rule, (Channel, Shared)):
                constraint = rule.constraint or own[name]
                if constraints.is_dependent(constraint):  # Delta's value: any real number
                    constraint = constraints.real
                size = _argument_shape(rule, own[name], shape, joint=family.joint)
                source = features if isinstance(rule, Channel) else None
                start = (_FREE_START if features is None else _START).get(name)
                self.add_module(name, Argument(constraint, size, source, start))
            else:
                value = fixed(rule, event_dim_of(own[name]), shape)
                self.register_buffer(name, value, persistent=False)

    def forward(self, features: Tensor | None = None) -> Any:
        """The distribution over `(*, *shape)`; the last dim is the event of a joint family."""
        values = {}
        for name in self.family.rules:
            value = getattr(self, name)
            values[name] = value(features) if isinstance(value, Argument) else value
        batch = features.shape[:-1] if features is not None else torch.Size()
        fn = self.family.distribution(**values)
        return fn.expand(batch if self.family.joint else batch + self.shape)


def fixed(value: Any, event_dim: int, shape: torch.Size) -> Tensor:
    """A fixed argument as a tensor; one number fills a vector, or the diagonal of a matrix."""
    tensor = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if tensor.dim() or event_dim == 0:
        return tensor
    return tensor.expand(shape) if event_dim == 1 else tensor * torch.eye(shape[-1])


def event_dim_of(constraint: Constraint) -> int:
    """Number of event dims of an argument; a constraint that depends on others counts as none."""
    return 0 if constraints.is_dependent(constraint) else constraint.event_dim


def _argument_shape(rule: Any, own: Constraint, shape: torch.Size, *, joint: bool) -> torch.Size:
    """Shape of a learned argument for a latent of the given shape."""
    event_dim = event_dim_of(own)
    if event_dim == 0:
        return torch.Size() if joint or isinstance(rule, Shared) else shape
    if event_dim == 1:
        return shape
    columns = getattr(rule, "columns", None) or shape[-1]
    return torch.Size([shape[-1], columns])
