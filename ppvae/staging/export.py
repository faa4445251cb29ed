"""The graph of a call of a program, as `torch.export` records it."""

from __future__ import annotations

import builtins
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ppvae._scopes import param_store, random_state, unchecked
from ppvae.staging.program import Program

_ONE_AT_A_TIME = threading.RLock()  # what is replaced below is global


def export(program: Program, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The exported program of a call; the first dimension of tensors may vary where it can."""
    shapes = tuple(
        {0: torch.export.Dim.AUTO} if isinstance(arg, Tensor) and arg.dim() else None
        for arg in args
    )
    _load()
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)  # PyTorch's own reports: the caller gets an error
        for scope in (
            param_store(),
            unchecked(),
            random_state(None, keep=True),
            torch.enable_grad(),
        ):
            stack.enter_context(scope)
        with _symbolic_lengths(), _unsampled():
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
    """Loads, once in a process, what tracing loads late, some of which looks at the built-ins."""
    import torch._dynamo

    for name, shaped in _SHAPED.items():
        with suppress(RuntimeError):  # PyTorch has come to know it
            torch.library.register_fake(name)(shaped)
    torch.export.export(nn.Identity(), (torch.zeros(2),), strict=False)


@contextmanager
def _replaced(owner: Any, name: str, new: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _symbolic_lengths() -> Any:
    """Makes `len(x)` of a tensor that is traced its first size, as `x.shape[0]` is.

    Models say `pyro.plate("data", len(x))`. Python makes a whole number of whatever `__len__`
    returns, and the batch of the graph would be of that size for good. The name `len` is the only
    place to step in; PyTorch does the same with `max` and `min` while it exports. Nothing changes
    for tensors that are not traced, and in other threads.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    builtin, here = len, threading.get_ident()

    def length(x: Any, /) -> Any:
        traced = isinstance(x, FakeTensor) and x.dim() and threading.get_ident() == here
        return x.shape[0] if traced else builtin(x)

    return _replaced(builtins, "len", length)


def _unsampled() -> Any:
    """Leaves out the checks of values by distributions that were made before, with checks on.

    They look at values, of which a graph has none. Other threads go on to check theirs.
    """
    kind: Any = torch.distributions.Distribution
    check, here = kind._validate_sample, threading.get_ident()

    def look(self: Any, value: Any) -> None:
        if threading.get_ident() != here:
            check(self, value)

    return _replaced(kind, "_validate_sample", look)
