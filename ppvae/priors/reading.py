"""Reads a prior, whether it is a module or a distribution, and moves one that is no module."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Distribution
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

from ppvae._checks import expect
from ppvae._scopes import eval_mode, random_state


def distribution_of(prior: Any, context: Tensor | None = None) -> Any:
    """Returns the prior's distribution over one latent, with its present parameters.

    That of a conditional prior, one with an attribute `context`, is one for each row of a context.

    Raises:
        ValueError: it is one, and there is no context.
    """
    if not isinstance(prior, nn.Module):
        return prior
    if getattr(prior, "context", None) is None:
        return prior()
    expect(context is not None, "context", "one, which the prior depends on", None)
    return prior(context)


def as_prior(prior: Any, latent: int, context: int | None = None) -> Any:
    """Checks that a prior is one of a latent of this length, and returns it.

    Args:
        prior: a module without arguments whose forward returns a Pyro distribution, or one itself;
            or a conditional one, whose forward takes a context, and whose attribute `context` is
            how many numbers that is.
        latent: length of the latent.
        context: how many numbers the context of the model is.

    Raises:
        TypeError: it is neither.
        ValueError: its distribution is one over something else.
    """
    kind = "a Pyro distribution, or a module without arguments whose forward returns one"
    needed = getattr(prior, "context", None) if isinstance(prior, nn.Module) else None
    fits = needed in (None, context)
    expect(fits, "prior", f"one for a context of {context} numbers", f"one for {needed}")
    with torch.no_grad(), random_state(None, keep=True), eval_mode(prior):
        try:
            fn = distribution_of(prior, None if needed is None else torch.zeros(1, needed))
        except TypeError as error:  # it asks for arguments
            raise TypeError(f"prior: expected {kind}, got {prior!r}: {error}") from error
    expect(isinstance(fn, Distribution), "prior", kind, repr(prior), TypeError)
    shapes = tuple(fn.event_shape), tuple(fn.batch_shape)
    batch = () if needed is None else (1,)
    expected = f"event shape ({latent},) and batch shape {batch}"
    expect(shapes == ((latent,), batch), "prior", expected, f"{shapes[0]} and {shapes[1]}")
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
        held = dict(vars(part))
        if isinstance(part, Transform) and not isinstance(part, _InverseTransform):
            held["_inv"] = None  # which it keeps once it was asked for, and which holds it in turn
        held = {name: moved(value, move, **attributes) for name, value in held.items()}
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
