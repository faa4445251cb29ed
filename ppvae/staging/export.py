"""The graph of a call of a program, as `torch.export` records it."""

import copy
import linecache
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ppvae._scopes import kept_buffers, param_store, random_state, unchecked, without_reports
from ppvae.staging.program import Program

_ONE_AT_A_TIME = threading.RLock()  # what is replaced below is global


def export(program: Program, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The exported program of a call; the first dimension of tensors may vary where it can."""
    free = {0: torch.export.Dim.AUTO}
    shapes = {"args": tuple(free if isinstance(v, Tensor) and v.dim() else None for v in args)}
    _load()
    with (
        _ONE_AT_A_TIME,
        param_store(),
        unchecked(),
        random_state(None, keep=True),
        without_reports(),
        torch.enable_grad(),
        _UncheckedSites(),
        _symbolic_lengths(program, args),
        _sources_forgotten(),
        without_stack_traces(),
        warnings.catch_warnings(),
    ):
        # recurrent layers keep their parameters in a list, too, which is put back
        warnings.filterwarnings("ignore", r"The tensor attributes? .*\._flat_weights")
        exported = torch.export.export(program, args, dynamic_shapes=shapes, strict=False)
        _let_go(exported)
        return exported


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Has PyTorch note no stack trace for each operation that it records, an eighth of the time."""
    import torch.fx.config as settings

    name = "do_not_emit_stack_traces"
    before = getattr(settings, name, None)  # older versions have no such setting
    try:
        setattr(settings, name, True)
        yield
    finally:
        setattr(settings, name, before)


@contextmanager
def _sources_forgotten() -> Iterator[None]:
    """Drops the source of each graph that is made inside, which PyTorch keeps for tracebacks."""
    from torch.fx.graph_module import _loader

    kept: tuple[dict[str, Any], ...] = (_loader.eval_cache, linecache.cache)
    before = set(_loader.eval_cache)
    try:
        yield
    finally:
        for name in _loader.eval_cache.keys() - before:
            for sources in kept:
                sources.pop(name, None)


def _let_go(exported: torch.export.ExportedProgram) -> None:
    """Breaks the circle by which the shapes of a trace would live as long as the process.

    They hold the tensors that were traced, and these hold them, through C++, where the garbage
    collector does not see it. Caches of their class, some without a bound, hold them too.
    """
    nodes = exported.graph.nodes
    modes: set[Any] = {getattr(node.meta.get("val"), "fake_mode", None) for node in nodes}
    traced: set[Any] = {getattr(mode, "shape_env", None) for mode in modes}
    for shapes in traced - {None}:
        shapes.tracked_fakes = None
        for method in vars(type(shapes)).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()


# Operations of which PyTorch does not say the shape of the result, so that it cannot trace them.
_SHAPED: dict[str, Any] = {
    "aten::_standard_gamma_grad": lambda concentration, value: torch.empty_like(value),
    "aten::_sample_dirichlet": lambda alpha, generator=None: torch.empty_like(alpha),
    "aten::_dirichlet_grad": lambda value, concentration, total: torch.empty_like(value),
}


@cache
def _load() -> None:
    """Loads, once in a process, what tracing loads late."""
    import torch._dynamo

    for name, shaped in _SHAPED.items():
        with suppress(RuntimeError):  # PyTorch has come to know it
            torch.library.register_fake(name)(shaped)
    torch.export.export(nn.Identity(), (torch.zeros(2),), strict=False)


@contextmanager
def _symbolic_lengths(program: Program, args: tuple[Any, ...]) -> Iterator[None]:
    """Makes `len(x)` of a tensor that is traced its first size, as `x.shape[0]` is.

    Models say `pyro.plate("data", len(x))`. Python makes a whole number of whatever `__len__`
    returns, and the batch of the graph would be of that size for good. The name `len` is the only
    place to step in: it is given to the modules whose code the program runs, for as long as the
    program is traced. Nothing changes for tensors that are not traced, and in other threads.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    here = threading.get_ident()

    def length(x: Any, /) -> Any:
        traced = isinstance(x, FakeTensor) and x.dim() and threading.get_ident() == here
        return x.shape[0] if traced else len(x)

    modules = [module for module in _modules_of(program, args) if "len" not in module]
    try:
        for module in modules:
            module["len"] = length
        yield
    finally:
        for module in modules:
            module.pop("len", None)


def _modules_of(program: Program, args: tuple[Any, ...]) -> list[dict[str, Any]]:
    """The namespaces whose functions a call of a program runs, but for PyTorch's and this one."""
    seen: dict[int, dict[str, Any]] = {}

    def see(frame: Any, event: str, _: Any) -> None:
        torchs = str(frame.f_globals.get("__name__")).split(".")[0] == "torch"
        if event == "call" and not torchs:
            seen[id(frame.f_globals)] = frame.f_globals

    before: Any = sys.getprofile()
    with torch.no_grad(), kept_buffers(program):
        sys.setprofile(see)
        try:
            program(*args)
        finally:
            if hasattr(before, "enable"):  # a profiler in C, which is no function
                before.enable()
            else:
                sys.setprofile(before)
    return [module for module in seen.values() if module is not globals()]


class _UncheckedSites(Messenger):
    """Takes the checks off distributions at sample sites that were made before, with checks on.

    They look at values, of which a graph has none.
    """

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _unchecked(msg["fn"])


def _unchecked(fn: Any) -> Any:
    """A copy of a distribution, and of those that it is made of, without checks of values."""
    if not isinstance(fn, torch.distributions.Distribution):
        return fn
    fn = copy.copy(fn)
    parts = {name: _unchecked(part) for name, part in vars(fn).items()}
    vars(fn).update(parts, _validate_args=False)
    return fn
