"""Supports of distributions, and how a value in one is reached from the reals."""

from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from ppvae.families.rules import without_shift


def from_reals(support: Any) -> Any:
    """The bijection from the reals to a support; a mixture's is that of its components.

    Raises:
        NotImplementedError: there is none.
    """
    while isinstance(support, MixtureSameFamilyConstraint):
        support = support.base_constraint
    return without_shift(biject_to(support))


def space_of(transform: Any, batch: torch.Size, event: torch.Size) -> torch.Size:
    """Shape of an event in unconstrained space; bounds may have the shape of the batch, too."""
    return torch.Size(transform.inverse_shape(batch + event)[len(batch) :])


def is_real(support: Any) -> bool:
    """Whether a support is all of the reals, in any number of dimensions."""
    return isinstance(_bare(support), type(constraints.real))  # a deep copy has one of its own


def same_support(one: Any, other: Any) -> bool:
    """Whether two supports are the same set, up to the number of event dimensions."""
    one, other = _bare(one), _bare(other)
    kinds = (int, float, Tensor)
    bounds = [
        {name: torch.as_tensor(v).tolist() for name, v in vars(s).items() if isinstance(v, kinds)}
        for s in (one, other)
    ]
    return type(one) is type(other) and bounds[0] == bounds[1]


def has_tensor_bounds(support: Any) -> bool:
    """Whether a support has bounds that a program works out, and that may differ in other runs."""
    return any(isinstance(value, Tensor) for value in vars(_bare(support)).values())


def _bare(support: Any) -> Any:
    """A support without its event dims, and a mixture's as that of its components."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support
