"""Keyword arguments of a model and its guide, made positional at the outer door.

All that runs a pair inside the library hands over a tuple: data in minibatches, inputs of a graph.
A call with keyword arguments becomes such a tuple here, once, and is taken apart again around the
programs themselves.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ppvae._checks import expect
from ppvae.data.adapters import form_of, items_of, prepared
from ppvae.data.labels import check_aligned, with_numbers


class Wrapper(nn.Module):
    """A program that is called in another way.

    It holds the program, if that is a module, so that parameters and modes are found in it.

    Args:
        program: a Pyro model or guide.
    """

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    @property
    def vectorized(self) -> bool:
        """Whether the program may run inside further plates to the left of its own."""
        return bool(getattr(self.program, "vectorized", False))


class WithKeywords(Wrapper):
    """A program that takes its keyword arguments behind the others, in a fixed order.

    Args:
        program: a Pyro model or guide.
        names: of the keyword arguments, in their order.
    """

    def __init__(self, program: Any, names: tuple[str, ...]) -> None:
        super().__init__(program)
        self.names = names

    def forward(self, *args: Any) -> Any:
        """Calls the program."""
        cut = len(args) - len(self.names)
        return self.program(*args[:cut], **dict(zip(self.names, args[cut:], strict=True)))


def bare(program: Any) -> Any:
    """The program as it was given, where it is called in another way."""
    while isinstance(program, Wrapper):
        program = program.program
    return program


def has_keywords(program: Any) -> bool:
    """Whether the last arguments of a program are its keyword arguments, however it is wrapped."""
    while isinstance(program, Wrapper) and not isinstance(program, WithKeywords):
        program = program.program
    return isinstance(program, WithKeywords)


def check_programs(model: Any, guide: Any) -> None:
    """Raises a TypeError unless model and guide can be called."""
    for name, program in {"model": model, "guide": guide}.items():
        expect(callable(program), name, "a function or module", type(program).__name__, TypeError)


def with_keywords(
    model: Any,
    guide: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    missing: bool = True,
    data: Any = (),
) -> tuple[Any, Any, tuple[Any, ...]]:
    """Model, guide and arguments without keywords; unchanged where there are none.

    Numbers among them may be `missing`, which is NaN. Tables have the row labels of the `data`.

    Raises:
        TypeError: `kwargs` is no mapping from names, or model or guide cannot be called.
        ValueError: rows have other labels, see `check_aligned`.
    """
    check_programs(model, guide)
    if kwargs is None:
        return model, guide, args
    named = isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs)
    expect(named, "kwargs", "a mapping from names to arguments", kwargs, TypeError)
    if not kwargs:
        return model, guide, args
    check_aligned(**with_numbers("data", items_of(data)), **kwargs)
    names = tuple(kwargs)
    form = replace(form_of(model, guide), programs=())
    values = prepared(tuple(kwargs.values()), form, missing=missing)
    return WithKeywords(model, names), WithKeywords(guide, names), (*args, *values)


def prepared_call(
    model: Any,
    guide: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    missing: bool = True,
) -> tuple[Any, Any, tuple[Any, ...]]:
    """Model, guide and arguments without keywords; arrays and tables among these are tensors.

    See `prepared` and `with_keywords`, also for the errors.
    """
    ready = prepared(args, form_of(model, guide), missing=missing)
    return with_keywords(model, guide, ready, kwargs, missing=missing, data=args)
