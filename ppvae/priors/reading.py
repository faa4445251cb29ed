"""Reads a prior, whether it is a module or a distribution, and moves one that is no module."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Distribution
from torch import Tensor, nn
from torch.distributions import Transform

from ppvae._checks import expect
from ppvae._scopes import eval_mode, random_state


def distribution_of(prior: Any) -> Any:
    """Returns the prior's distribution over one latent, with its present parameters."""
    return prior() if isinstance(prior, nn.Module) else prior


def as_prior(prior: Any, latent: int) -> Any:
    """Checks that a prior is one of a latent of this length, and returns it.

    Args:
        prior: a module without arguments whose forward returns a Pyro distribution, or one itself.
        latent: length of the latent.

    Raises:
        TypeError: it is neither.
        ValueError: its distribution is one over something else.
    """
    kind = "a Pyro distribution, or a module without arguments whose forward returns one"
    with torch.no_grad(), random_state(None, keep=True), eval_mode(prior):
        try:
            fn = distribution_of(prior)
        except TypeError as error:  # it asks for arguments
            raise TypeError(f"prior: expected {kind}, got {prior!r}: {error}") from error
    expect(isinstance(fn, Distribution), "prior", kind, repr(prior), TypeError)
    shapes = tuple(fn.event_shape), tuple(fn.batch_shape)
    expected = f"event shape ({latent},) and batch shape ()"
    expect(shapes == ((latent,), ()), "prior", expected, f"{shapes[0]} and {shapes[1]}")
    return prior


def moved(part: Any, move: Callable[[Tensor], Tensor], **attributes: Any) -> Any:
    """Copies a distribution and applies a function to all its tensors, at any depth.

    Args:
        part: a distribution; the recursion also passes the values of its attributes.
        move: the function, such as `lambda tensor: tensor.to("cuda")`.
        **attributes: attributes to set on the copies of all distributions and transforms, such as
            `_validate_args=False`.

    Returns:
        The copy; what is neither a tensor nor holds one is shared with the original.
    """
    if isinstance(part, Tensor):
        return move(part)
    if isinstance(part, (list, tuple)):
        return type(part)(moved(each, move, **attributes) for each in part)
    if isinstance(part, (torch.distributions.Distribution, Transform)):
        held = {name: moved(value, move, **attributes) for name, value in vars(part).items()}
        part = copy.copy(part)
        part.__dict__ = held | attributes
    return part


def parts_of(part: Any) -> list[Any]:
    """The names of the classes that a distribution is made of and their numbers, at any depth.

    Args:
        part: a distribution; the recursion also passes what it holds.
    """
    if isinstance(part, (int, float, Tensor)):
        return [torch.as_tensor(part).detach().cpu()]
    if isinstance(part, (list, tuple)):
        return [each for one in part for each in parts_of(one)]
    if not isinstance(part, (torch.distributions.Distribution, Transform)):
        return []
    if isinstance(part, Transform):  # what begins with a line is memory of its last call
        held = [value for name, value in vars(part).items() if not name.startswith("_")]
    else:  # its attributes may be memory too, but not its arguments
        kinds = (list, torch.distributions.Distribution)
        held = [value for value in vars(part).values() if isinstance(value, kinds)]
        held += [getattr(part, name) for name in sorted(part.arg_constraints)]
    return [type(part).__name__, *parts_of(held)]
