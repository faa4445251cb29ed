"""Compiled code that is kept in files, so that no process compiles what another one has."""

import hashlib
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ppvae._checks import expect
from ppvae._files import replacing
from ppvae._scopes import without_reports, without_warnings
from ppvae.staging.export import without_stack_traces

_MEGABYTES, _DAY = 256, 24 * 3600
_NAME = re.compile(r"[0-9a-f]{32}\.pt2")  # as `_digest` makes them

Compiled = Callable[[list[Tensor]], list[Tensor]]

# What PyTorch's compiler is told: all in C++, without checks of sizes that are checked before. It
# is to try no instructions that the processor says it has, to precompile no headers for a single
# use, and to spend nothing on the code around the kernels; each of these takes seconds.
_OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "cpp.vec_isa_ok": True,
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
}


def folder() -> Path:
    """Where compiled code is kept: `$PPVAE_CACHE`, or `ppvae` in the user's folder for caches.

    Each file is for one machine and one version of PyTorch, which are part of its name; a file that
    is not there is made again. Files may be copied from one such folder to another.

    All of them take 256 MB at most, some 140 loops, or as many megabytes as `$PPVAE_CACHE_MB` says:
    where a new one goes beyond that, those that were not used for longest are removed.
    """
    given = os.environ.get("PPVAE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppvae"


def compiled(what: list[str], graph: Callable[[], tuple[fx.GraphModule, list[Tensor]]]) -> Compiled:
    """The compiled code of a graph, from its file if there is one.

    Args:
        what: all that the graph depends on, in words.
        graph: makes the graph, and inputs of the kind that it takes.

    Returns:
        A function from a list of tensors to a list of tensors; it draws no random numbers.

    Raises:
        Exception: whatever a compiler may raise.
    """
    name = f"{_digest(*what, *_here(), f'threads {torch.get_num_threads()}')}.pt2"
    path, most = folder() / name, _bound()
    try:
        if path.is_file():
            run = _loaded(path)
            with suppress(OSError):  # of a folder that may only be read
                os.utime(path)  # the time of the last use
            return run
    except Exception:  # a file that is cut short, or that may not be read, is made again
        pass
    with _instructions_asked():
        made = graph()
    files = _compile(*made)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as beside:
            _pack(files, beside)
        _prune(path.parent, most, kept=path)
        return _loaded(path)
    except (OSError, RuntimeError):  # it cannot be kept, or another process has removed it
        with tempfile.TemporaryDirectory() as place:
            return _loaded(_pack(files, Path(place) / name))


def _prune(place: Path, most: int, kept: Path) -> None:
    """Removes the files of a folder that were not used for longest, down to the bound on all.

    Another process may do so at the same time, or have a file loaded that is removed here: what is
    loaded stays (it was unpacked elsewhere), and what is gone is made again.

    Args:
        place: the folder, of which other files are left alone.
        most: bytes that they may take.
        kept: a file that stays.
    """
    for path in place.glob(".*.pt2.*.part"):  # what a killed process was writing
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _DAY:
                path.unlink()
    found = []
    for path in filter(lambda path: _NAME.fullmatch(path.name), place.iterdir()):
        with suppress(OSError):  # another process has removed it
            told = path.stat()
            found.append((path != kept, -told.st_mtime, told.st_size, path))
    for is_other, _, size, path in sorted(found):
        most -= size
        if most < 0 and is_other:
            with suppress(OSError):
                path.unlink()


def _bound() -> int:
    """The bytes that all files may take."""
    told = os.environ.get("PPVAE_CACHE_MB") or f"{_MEGABYTES}"
    wanted = "a number of megabytes, 0 or more"
    expect(told.isdecimal(), "PPVAE_CACHE_MB", wanted, repr(told))
    return int(told) * 10**6


def _compile(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """The files of a graph, as PyTorch's compiler makes them."""
    import torch._inductor

    try:
        with without_warnings(), without_reports(), _side_by_side(), without_stack_traces():
            return torch._inductor.aot_compile(graph, tuple(inputs), options=_OPTIONS)
    except Exception:
        _forget_instructions()
        raise


@contextmanager
def _instructions_asked() -> Iterator[None]:
    """Has PyTorch ask the compiler for instructions beside what is done inside, a second or more.

    It keeps the answers; where something goes wrong, it asks again by itself.
    """
    from torch._inductor import config, cpu_vec_isa

    def ask() -> None:
        with config.patch({"cpp.vec_isa_ok": _OPTIONS["cpp.vec_isa_ok"]}), suppress(Exception):
            cpu_vec_isa.valid_vec_isa_list()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask)
        yield


@contextmanager
def _side_by_side() -> Iterator[None]:
    """Has the kernels compiled beside the code that calls them, where there is a second core.

    PyTorch compiles one after the other; what links them waits for both.
    """
    from torch._inductor import codecache

    builder: Any = codecache.CppBuilder
    with ThreadPoolExecutor() as pool:
        begun: list[Future[None]] = []

        class Builder(builder):  # type: ignore[misc]
            def build(self) -> None:
                if self.get_target_file_path().endswith((".wrapper.o", ".kernel.o")):
                    begun.append(pool.submit(super().build))
                    return
                for each in begun:
                    each.result()
                super().build()

        codecache.CppBuilder = Builder  # type: ignore[misc]
        try:
            yield
        finally:
            codecache.CppBuilder = builder  # type: ignore[misc]


def _forget_instructions() -> None:
    """Has PyTorch ask again which instructions there are, of which a compiler may not know all."""
    from torch._inductor import cpu_vec_isa

    known: list[Any] = [getattr(kind, "__bool__", None) for kind in vars(cpu_vec_isa).values()]
    for remembered in (cpu_vec_isa.valid_vec_isa_list, *known):
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()


def _pack(files: Any, path: Path) -> Path:
    from torch._inductor.package import package_aoti

    with path.open("wb") as file:
        package_aoti(file, files)
    return path


def _loaded(path: Path) -> Compiled:
    import torch._inductor

    loader = torch._inductor.aoti_load_package(path).loader
    run: Compiled = loader.boxed_run  # empties the list, so that nothing is held longer than needed
    return lambda inputs: run([*inputs])


@cache
def _here() -> tuple[str, ...]:
    """This machine, PyTorch, and the code of this package, in words."""
    processor = Path("/proc/cpuinfo")
    told = processor.read_text().split("\n\n")[0] if processor.is_file() else platform.processor()
    lines = [line for line in told.splitlines() if line.startswith(("model name", "flags"))]
    sources = [file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return platform.platform(), torch.__version__, *(lines or [told]), *sources


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
