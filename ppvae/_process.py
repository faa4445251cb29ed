"""One call of the library at a time, and Ctrl-C where it does no harm.

Pyro's handlers, plates and parameters, and the random numbers of PyTorch, belong to the process. So
one thread at a time is inside of the library (the others wait), it finds Pyro's handlers as if
there were none, and whatever happens inside they are put back.

Inside, the first Ctrl-C waits for the next safe point, between two runs of a program; a training
ends its step and returns what it has. The second one raises at once.

Where several processes train together, `apart` is for what one of them does alone.
"""

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.poutine import runtime

from ppvae._checks import expect

P = ParamSpec("P")
R = TypeVar("R")


class _State:
    """What is known of the call that is inside; its thread holds the lock.

    Attributes:
        lock: is held by the thread that is inside.
        depth: calls of the library inside of one another.
        interrupts: how often Ctrl-C came since the outermost call began.
        deferred: whether someone inside sees to it, so that safe points let it be.
        terminated: whether SIGTERM came.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = self.interrupts = 0
        self.deferred = self.terminated = False


_state = _State()
_apart: ContextVar[bool] = ContextVar("apart", default=False)
os.register_at_fork(after_in_child=lambda: _state.__init__())  # type: ignore[misc]

#: Handlers that change no number, outside of which a call may stand.
_HARMLESS = (poutine.block_messenger.BlockMessenger, poutine.trace_messenger.TraceMessenger)


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a public function one that has the process for itself; see above.

    Raises:
        RuntimeError: it is called inside of a Pyro handler that would change its numbers.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _state.lock:
            if _state.depth:
                return function(*args, **kwargs)
            outside = [
                type(handler).__name__
                for handler in runtime._PYRO_STACK
                if not isinstance(handler, _HARMLESS)
            ]
            wanted = "a call outside of Pyro's handlers, which would change its numbers"
            expect(not outside, function.__name__, wanted, outside, RuntimeError)
            _state.interrupts = 0
            with _handled(signal.SIGINT, _on_interrupt), _put_back():
                result = function(*args, **kwargs)
            if _state.interrupts:  # it came behind the last safe point
                raise KeyboardInterrupt
            return result

    return call


@contextmanager
def apart() -> Iterator[None]:
    """Inside, `fit` trains in this process alone, and needs no other one, group or not.

    Example:
        >>> from ppvae.training import apart
        >>> with apart():  # each process may train something else, or nothing at all
        ...     pass
    """
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def is_apart() -> bool:
    """Whether this process is on its own, whatever group it is in."""
    return _apart.get()


def safe_point() -> None:
    """Raises the KeyboardInterrupt of a Ctrl-C that came, unless the training is to see to it."""
    if _state.interrupts and not _state.deferred:
        raise KeyboardInterrupt


def interrupted() -> bool:
    """Whether a training is to end its step and return: Ctrl-C or SIGTERM came."""
    return _state.terminated or _state.interrupts > 0


def answer_interrupt() -> bool:
    """Whether a training was interrupted; the caller's result says so, and nothing is raised."""
    came, _state.interrupts = interrupted(), 0
    return came


@contextmanager
def deferred_interrupts(*, terminate: bool = False) -> Iterator[None]:
    """Inside, `interrupted` tells of a Ctrl-C, and only a second one raises.

    Args:
        terminate: let SIGTERM wait, too; it ends the process behind this context.
    """
    before = _state.deferred
    handler: Any = _on_terminate if terminate else None
    try:
        with _handled(signal.SIGTERM, handler):
            _state.deferred = True
            yield
    finally:
        _state.deferred = before
        if _state.terminated:
            _state.terminated = False
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _put_back() -> Iterator[None]:
    """Hides Pyro's handlers inside, and leaves what belongs to the process as it was."""
    handlers, plates = [*runtime._PYRO_STACK], [*runtime._DIM_ALLOCATOR._stack]
    markov, settings = dict(vars(runtime._ENUM_ALLOCATOR)), pyro.settings.get()
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    runtime._PYRO_STACK.clear()
    runtime._DIM_ALLOCATOR._stack.clear()
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth = 0
        runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack[:] = handlers, plates
        vars(runtime._ENUM_ALLOCATOR).clear()
        vars(runtime._ENUM_ALLOCATOR).update(markov)
        if pyro.settings.get() != settings:
            pyro.settings.set(**settings)
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)


@contextmanager
def _handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Another handler of a signal inside; only in the main thread, and in place of the default."""
    default: Any = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    main = threading.current_thread() is threading.main_thread()
    if handler is None or not main or signal.getsignal(number) is not default[number]:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, default[number])


def _on_interrupt(*_: object) -> None:
    _state.interrupts += 1
    if _state.interrupts > 1:
        raise KeyboardInterrupt


def _on_terminate(*_: object) -> None:
    _state.terminated = True
