"""Runs an encoder on the arguments of a model, and checks what it puts out."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae.programs.missing import is_nan_masked, takes_missing

_known: list[dict[Any, Any]] = []  # what `encoded_once` keeps, the innermost last


@contextmanager
def encoded_once() -> Iterator[None]:
    """Inside, an encoder that draws no random numbers is run once on the same tensors.

    For measurements in which no parameter moves; where gradients are recorded, it is always run.
    """
    _known.append({})
    try:
        yield
    finally:
        _known.pop()


def _features(encoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an encoder puts out, or what it did before."""
    if not _known or torch.is_grad_enabled():
        return _run(encoder, args, kwargs)
    key = encoder, *map(id, args), *((name, id(arg)) for name, arg in kwargs.items())
    if key not in _known[-1]:
        before = torch.get_rng_state()
        found = _run(encoder, args, kwargs)
        on_cpu = isinstance(found, Tensor) and found.device.type == "cpu"
        if not on_cpu or not torch.equal(before, torch.get_rng_state()):
            return found
        _known[-1][key] = found, args, kwargs  # which keep their ids as long as they are here
    return _known[-1][key][0]


def _run(encoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs an encoder; one no part of which takes NaN gets zeros in its place."""
    if is_nan_masked() and not takes_missing(encoder):
        args = tuple(map(_filled, args))
        kwargs = {name: _filled(arg) for name, arg in kwargs.items()}
    return encoder(*args, **kwargs)


def keywords_of(encoder: nn.Module) -> tuple[str, ...]:
    """The arguments that the `forward` of an encoder names, and so can be given by keyword.

    Modules of PyTorch's and of this library name none: their `input` or `x` means any.
    """
    forward = getattr(encoder, "_orig_mod", encoder).forward  # of a compiled module
    if (getattr(forward, "__module__", None) or "").split(".")[0] in ("torch", "ppvae"):
        return ()
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # no function of Python's
        return ()
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return tuple(each.name for each in parameters if each.kind in named)


def encode(
    encoder: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    width: int | None = None,
    rows: Sequence[int] = (),
    depths: Sequence[int] = (2, 3),
) -> Tensor:
    """The features of the data; an encoder no part of which takes NaN gets zeros in its place.

    Args:
        encoder: a module from the arguments to the features.
        args: the positional arguments of the model.
        kwargs: the keyword arguments of the model that the encoder names.
        width: length of the features; None takes any.
        rows: lengths of the batch beside those of the arguments, as those of a plate of groups.
        depths: how many dims the features may have: three, if they have steps.

    Returns:
        The features, of shape `(batch, features)` or `(batch, steps, features)`.

    Raises:
        TypeError: the features are no tensor, or complex or whole numbers.
        ValueError: the encoder does not take the arguments, or its output has another shape.
    """
    try:
        features = _features(encoder, args, kwargs)
    except (RuntimeError, TypeError) as error:
        given = [*args, *kwargs.values()]
        kinds = (each.dtype for each in given if isinstance(each, Tensor) and each.is_complex())
        odd = next(kinds, None)
        expect(odd is None, "data", "real numbers, which the encoder takes", odd, TypeError)
        takes = f"a module that takes {_in_words(args, kwargs)}"
        raise ValueError(f"encoder: expected {takes}, got one that does not: {error}") from error
    kind = type(features).__name__
    dense = isinstance(features, Tensor) and features.layout is torch.strided
    expect(dense, "encoder", "features in a dense tensor", kind, TypeError)
    shape = tuple(features.shape)
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    lengths = [length for tensor in tensors for length in tensor.shape]
    fits = len(shape) in depths and width in (None, shape[-1])
    if not fits or (lengths and shape[0] not in [*lengths, *rows]):
        steps = "" if 2 in depths else "steps, "
        wanted = f"features of shape (batch, {steps}{width or 'features'}), with the batch of the"
        came = _in_words(args, kwargs)
        raise ValueError(f"encoder: expected {wanted} arguments {came}, got {shape}")
    expect(shape[0], "encoder", "features of at least one datum", "none")
    real = features.is_floating_point()
    expect(real, "encoder", "features that are real numbers", features.dtype, TypeError)
    return features


def _in_words(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The shapes of arguments, and the types of those that are no tensors."""
    every = [*args, *kwargs.values()]
    came = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in every]
    named = [f"{n}={shape}" for n, shape in zip(kwargs, came[len(args) :], strict=True)]
    return " and ".join([f"{came[: len(args)]}", *([", ".join(named)] if named else [])])


def _filled(arg: Any) -> Any:
    """An argument with zeros where entries are missing."""
    floating = isinstance(arg, Tensor) and arg.is_floating_point()
    return torch.where(torch.isnan(arg), 0.0, arg) if floating else arg
