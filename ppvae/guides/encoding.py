"""Runs an encoder on the arguments of a model, and checks what it puts out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae.programs.missing import is_nan_masked, takes_missing


def encode(
    encoder: nn.Module,
    args: tuple[Any, ...],
    width: int | None = None,
    rows: Sequence[int] = (),
    depths: Sequence[int] = (2, 3),
) -> Tensor:
    """The features of the data; an encoder no part of which takes NaN gets zeros in its place.

    Args:
        encoder: a module from the arguments to the features.
        args: the positional arguments of the model.
        width: length of the features; None takes any.
        rows: lengths of the batch beside those of the arguments, as those of a plate of groups.

        depths: how many dims the features may have: three, if they have steps.

    Returns:
        The features, of shape `(batch, features)` or `(batch, steps, features)`.

    Raises:
        TypeError: the features are no tensor, or complex or whole numbers.
        ValueError: the encoder does not take the arguments, or its output has another shape.
    """
    if is_nan_masked() and not takes_missing(encoder):
        args = tuple(map(_filled, args))
    came = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]
    try:
        features = encoder(*args)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"encoder: expected a module that takes {came}, got one that does not: {error}"
        ) from error
    kind = type(features).__name__
    dense = isinstance(features, Tensor) and features.layout is torch.strided
    expect(dense, "encoder", "features in a dense tensor", kind, TypeError)
    shape = tuple(features.shape)
    lengths = [length for a in args if isinstance(a, Tensor) for length in a.shape]
    fits = (
        len(shape) in depths
        and width in (None, shape[-1])
        and (not lengths or shape[0] in [*lengths, *rows])
    )
    steps = "" if 2 in depths else "steps, "
    wanted = (
        f"features of shape (batch, {steps}{width or 'features'}), with the batch of the arguments"
    )
    expect(fits, "encoder", f"{wanted} {came}", shape)
    expect(shape[0], "encoder", "features of at least one datum", "none")
    real = features.is_floating_point()
    expect(real, "encoder", "features that are real numbers", features.dtype, TypeError)
    return features


def _filled(arg: Any) -> Any:
    """An argument with zeros where entries are missing."""
    floating = isinstance(arg, Tensor) and arg.is_floating_point()
    return torch.where(torch.isnan(arg), 0.0, arg) if floating else arg
