"""A Pyro model, its guide and an objective as one module, and the graph of a call of it."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae._scopes import random_state, unchecked
from ppvae.staging.program import Program


def export(program: Program, args: tuple[Any, ...]) -> Any:
    """The exported program of a call; the first dimension of tensors may vary where it can."""
    shapes = tuple(
        {0: torch.export.Dim.AUTO} if isinstance(arg, Tensor) and arg.dim() else None
        for arg in args
    )
    with own_store(), unchecked(), random_state(None, keep=True), torch.enable_grad():
        _load()
        with _symbolic_lengths(), _unsampled(), _silent():
            return torch.export.export(program, args, dynamic_shapes={"args": shapes}, strict=False)


# Operations of which PyTorch does not say the shape of the result, so that it cannot trace them.
_SHAPED: dict[str, Any] = {
    "aten::_standard_gamma_grad": lambda concentration, value: torch.empty_like(value),
    "aten::_sample_dirichlet": lambda concentration, generator=None: concentration.new_empty(
        concentration.shape
    ),
    "aten::_dirichlet_grad": lambda value, concentration, total: torch.empty_like(value),
}


@cache
def _load() -> None:
    """Loads, once in a process, the modules that tracing loads late, before `len` is replaced."""
    import torch._dynamo

    for name, shaped in _SHAPED.items():
        with suppress(RuntimeError):  # PyTorch has come to know it
            torch.library.register_fake(name)(shaped)
    torch.export.export(nn.Identity(), (torch.zeros(2),), strict=False)


@contextmanager
def own_store() -> Iterator[None]:
    """Pyro's param store as it is inside, and as it was outside, whatever is traced."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        yield
    dict(store.items())  # reading a parameter restores the weak reference that get_state takes off


@contextmanager
def _symbolic_lengths() -> Iterator[None]:
    """Makes `len(x)` of a tensor its first size, which may be a symbol, as `x.shape[0]` is.

    Python itself asks for a number, which would fix the batch that is traced. For tensors that are
    not being traced nothing changes.
    """
    before = builtins.len

    def length(value: Any, /) -> Any:
        return value.shape[0] if isinstance(value, Tensor) and value.dim() else before(value)

    builtins.len = length  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.len = before


@contextmanager
def _unsampled() -> Iterator[None]:
    """Turns off the checks of values of distributions that were made before, with checks."""
    kind: Any = torch.distributions.Distribution
    before = kind._validate_sample
    kind._validate_sample = lambda self, value: None
    try:
        yield
    finally:
        kind._validate_sample = before


@contextmanager
def _silent() -> Iterator[None]:
    """Without PyTorch's own reports on what it cannot trace: the caller gets an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
