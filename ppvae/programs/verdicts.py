"""What a fit said of a guide, for as long as model and guide are what the fit left."""

import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from torch import nn


class _Said(NamedTuple):
    """A verdict, and what it is of: a model, and the versions that parameters had."""

    model: Any
    versions: list[tuple[int, int]]
    words: Mapping[str, str]
    converged: bool | None


_SAID: weakref.WeakKeyDictionary[Any, _Said] = weakref.WeakKeyDictionary()


def remember(model: Any, guide: Any, *, words: Mapping[str, str], converged: bool | None) -> None:
    """Keeps what a fit says, its verdict and its objective, beside the guide.

    Those of plain functions are not kept: what their `pyro.param` statements will mean later is
    not known.
    """
    versions = _versions(model, guide)
    if versions:
        with suppress(TypeError):  # what has no weak references is forgotten
            _SAID[guide] = _Said(weakref.ref(model), versions, words, converged)


def said_of(model: Any, guide: Any) -> dict[str, Any]:
    """What the last fit said, as attributes of a data set.

    They are `verdict`, `objective` in words, and `converged` where it is known.

    Empty if there was no fit, or a parameter was written to since.
    """
    try:
        said = _SAID.get(guide)
    except TypeError:
        return {}
    if said is None or said.model() is not model or said.versions != _versions(model, guide):
        return {}
    known = {} if said.converged is None else {"converged": int(said.converged)}
    return {**said.words, **known}


def verdict_of(model: Any, guide: Any) -> dict[str, Any]:
    """The verdict alone, for `evaluate`, whose `objective` is a number."""
    said = said_of(model, guide)
    return {name: value for name, value in said.items() if name != "objective"}


def _versions(*programs: Any) -> list[tuple[int, int]]:
    """Which parameters there are, and how often each was written to."""
    modules = [program for program in programs if isinstance(program, nn.Module)]
    return [(id(p), p._version) for module in modules for p in module.parameters()]
