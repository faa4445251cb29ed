"""The graph of a call of a program, as `torch.export` records it."""

import builtins
import logging
import threading
from contextlib import AbstractContextManager, suppress
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ppvae._scopes import param_store, random_state, unchecked
from ppvae.staging.program import Program

_ONE_AT_A_TIME = threading.RLock()  # what is replaced below is global


def export(program: Program, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The exported program of a call; the first dimension of tensors may vary where it can."""
    free = {0: torch.export.Dim.AUTO}
    shapes = {"args": tuple(free if isinstance(v, Tensor) and v.dim() else None for v in args)}
    _load()
    with _ONE_AT_A_TIME, param_store(), unchecked(), random_state(None, keep=True):
        logged = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # PyTorch's own reports: the caller gets an error
        try:
            with torch.enable_grad(), _symbolic_lengths(), _unsampled():
                return torch.export.export(program, args, dynamic_shapes=shapes, strict=False)
        finally:
            logging.disable(logged)


# Operations of which PyTorch does not say the shape of the result, so that it cannot trace them.
_SHAPED: dict[str, Any] = {
    "aten::_standard_gamma_grad": lambda concentration, value: torch.empty_like(value),
    "aten::_sample_dirichlet": lambda alpha, generator=None: torch.empty_like(alpha),
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


def _symbolic_lengths() -> AbstractContextManager[Any]:
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

    return patch.object(builtins, "len", length)


def _unsampled() -> AbstractContextManager[Any]:
    """Leaves out the checks of values by distributions that were made before, with checks on.

    They look at values, of which a graph has none. Other threads go on to check theirs.
    """
    kind: Any = torch.distributions.Distribution
    check, here = kind._validate_sample, threading.get_ident()

    def look(self: Any, value: Any) -> None:
        if threading.get_ident() != here:
            check(self, value)

    return patch.object(kind, "_validate_sample", look)
