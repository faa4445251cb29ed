"""Process state, left as it was found: random numbers, modes, buffers, Pyro's store and checks."""

import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Self

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ppvae._checks import check_seed
from ppvae._reach import reached, watched

_numbers = itertools.count()


class UniquelyNamed(PyroModule):
    """A module with a name of its own, and so has every copy of it.

    In Pyro's param store parameters of equal names are one parameter.

    Args:
        name: what a base class, as `AutoGuide`, would call the module; not used.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__(name=self._unique_name())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pyro_name = self._unique_name()

    def _unique_name(self) -> str:
        return f"{type(self).__name__}_{next(_numbers)}"


@contextmanager
def private_modules() -> Iterator[None]:
    """Keeps the parameters of modules out of Pyro's param store, and off each other.

    Inside a module's call, Pyro registers its parameters by name in one store for the process, and
    two modules with equal names are then taken for one. Here they live in a store of their own.
    Plain `pyro.param` statements of a model are the user's and go through, in and out.
    """
    store = pyro.get_param_store()
    with store.scope(_plain(store.get_state())) as inside, warnings.catch_warnings():
        # Pyro remarks on parameters that do not want a gradient: they are meant not to
        warnings.filterwarnings("ignore", message=".* was not registered in the param store")
        yield
    store.set_state(_plain(inside))
    dict(store.items())  # reading a parameter restores the weak reference that get_state takes off


class as_they_are(Messenger):
    """Inside, the parameters of modules are what the modules hold, and no store hears of them.

    Pyro's store asks its parameters for a gradient, which the transforms of `torch.func` forbid.
    """

    def _pyro_param(self, msg: Any) -> None:
        value = msg["args"][1] if len(msg["args"]) > 1 else None
        if value is not None and not msg["done"]:
            msg["value"], msg["done"] = value() if not isinstance(value, Tensor) else value, True


def _plain(state: Any) -> Any:
    """The part of a store's state that was made by `pyro.param` and not by a module."""
    params = {
        name: value
        for name, value in state["params"].items()
        if not (isinstance(value, nn.Parameter) or "$$$" in name)  # as `pyro.module` names them
    }
    return {"params": params, "constraints": {k: state["constraints"][k] for k in params}}


@contextmanager
def param_store(*, copies: bool = False) -> Iterator[None]:
    """Pyro's param store as it is inside, and as it was outside, whatever happens to it.

    Args:
        copies: give `pyro.param` statements copies of their parameters, which are dropped.
    """
    store = pyro.get_param_store()
    state = store.get_state()
    if copies:
        params = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in state["params"].items()
        }
        state = {"params": params, "constraints": dict(state["constraints"])}
    with store.scope(state):
        yield
    dict(store.items())  # reading a parameter restores the weak reference that get_state takes off


@contextmanager
def random_state(seed: int | None, *, keep: bool = False) -> Iterator[None]:
    """Seeds the random numbers inside; outside they go on as if nothing had been drawn.

    Args:
        seed: the seed; None draws from the caller's stream, which then moves on.
        keep: with no seed, leave the caller's stream where it was all the same.

    Raises:
        TypeError: the seed is no whole number.
        ValueError: it is out of range.
    """
    if seed is None and not keep:
        yield
        return
    seed = None if seed is None else check_seed(seed)
    before = random_numbers()
    try:
        if seed is not None:
            # `torch.manual_seed` has a GPU begin with the seed that is first used afterwards
            for generator in _generators():
                generator.manual_seed(seed)
        yield
    finally:
        set_random_numbers(before)


def random_numbers() -> list[Tensor]:
    """Where the default generators stand: that of the CPU, then of each GPU that is in use."""
    return [generator.get_state() for generator in _generators()]


def set_random_numbers(states: Sequence[Tensor]) -> None:
    """Moves the default generators to where they stood when `random_numbers` was called."""
    for generator, state in zip(_generators(), states, strict=False):  # a GPU may have come since
        generator.set_state(state)


def _generators() -> list[torch.Generator]:
    gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *gpus]


@contextmanager
def eval_mode(*programs: Any) -> Iterator[None]:
    """Evaluation mode for the modules of programs; at the end modes and buffers are as they were.

    These are the programs themselves, where they are modules, what they reach, and whatever else is
    called inside, as a network that a plain function closes over.
    """
    with ExitStack() as scopes, warnings.catch_warnings():
        # a module that PyTorch compiles is in evaluation mode then, which is all that is wanted
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global")
        seen: set[nn.Module] = set()

        def quiet(module: nn.Module) -> None:
            if module not in seen:
                parts = [part for part in module.modules() if part not in seen]
                seen.update(parts)
                scopes.enter_context(_mode(parts, training=False))
                scopes.enter_context(_kept_buffers(parts))

        for module in reached(*programs):
            quiet(module)
        with watched(quiet):
            yield


@contextmanager
def train_mode(*programs: Any) -> Iterator[None]:
    """Training mode for those programs that are modules; their modes come back at the end."""
    modules = [m for p in programs if isinstance(p, nn.Module) for m in p.modules()]
    with _mode(modules, training=True):
        yield


@contextmanager
def _mode(modules: list[nn.Module], *, training: bool) -> Iterator[None]:
    before = [m.training for m in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def kept_buffers(*programs: Any) -> AbstractContextManager[None]:
    """Puts back the buffers of those programs that are modules: a call may move or replace them."""
    return _kept_buffers([m for p in programs if isinstance(p, nn.Module) for m in p.modules()])


@contextmanager
def _kept_buffers(modules: list[nn.Module]) -> Iterator[None]:
    homes = [(part._buffers, name, b) for part in modules for name, b in part._buffers.items()]
    before = [None if buffer is None else buffer.clone() for *_, buffer in homes]
    try:
        yield
    finally:
        with torch.no_grad():
            for (home, name, buffer), value in zip(homes, before, strict=True):
                home[name] = buffer
                # one that was expanded cannot be written to
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Products of float32 matrices in another precision inside; None leaves it as it is."""
    before = torch.get_float32_matmul_precision()
    try:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class double_precision(TorchFunctionMode):
    """All that is computed inside is float64: the default dtype, and operands that were narrower.

    A tensor that a program holds in its closure would otherwise pull a result down to its own
    dtype, or be refused by a product of matrices.

    Args:
        device: where tensors are made inside.

    Attributes:
        needed: whether an operand was narrower.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device)
        self.needed, self._looks = False, False

    def __enter__(self) -> Self:
        """Enters; the default dtype is remembered."""
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        if self.device.type != "cpu":
            self.device.__enter__()
        self._looks = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Leaves; the default dtype is what it was."""
        self.look_no_more()
        if self.device.type != "cpu":
            self.device.__exit__(*error)
        torch.set_default_dtype(self.before)

    def look_no_more(self) -> None:
        """Leaves operands as they are from now on: to look at them takes as long as small ones do.

        No other mode may have been entered that is not left yet.
        """
        if self._looks:
            self._looks = False
            super().__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the function on doubles; what is asked of a tensor, or written to it, stays."""
        name = getattr(func, "__name__", "")
        if name != "__get__" and name not in _VIEWS:
            kept = 1 if name == "__setitem__" or name.endswith("_") and name[:2] != "__" else 0
            args = (*args[:kept], *map(self._doubled, args[kept:] if kept else args))
        return func(*args, **(kwargs or {}))

    def _doubled(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dtype not in _NARROW:
                return value
            self.needed = True
            return value.double()
        if type(value) in (list, tuple):
            return type(value)(self._doubled(each) for each in value)
        return value


#: Methods that give a view of a tensor, to which may be written. What reads it makes doubles of it.
_VIEWS = frozenset(
    "__getitem__ chunk diagonal expand expand_as flatten movedim narrow permute reshape select "
    "split squeeze swapaxes swapdims t transpose unbind unflatten unfold unsqueeze view view_as"
    "".split()
)

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})


def unchecked() -> AbstractContextManager[Any]:
    """Pyro's and PyTorch's argument checks are off inside, for speed."""
    names = ["poutine", "infer", "distributions_pyro", "distributions_torch"]
    return pyro.settings.context(**{f"validate_{name}": False for name in names})


def without_warnings() -> AbstractContextManager[Any]:
    """No warnings inside, as those of a compiler on its own code."""
    return warnings.catch_warnings(action="ignore")


@contextmanager
def without_reports() -> Iterator[None]:
    """Nothing is logged inside, as PyTorch does of a graph that fails: the caller gets an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def stacklevel() -> int:
    """The `stacklevel` by which a warning points at the caller outside of this library."""
    frame, level = sys._getframe(1), 1
    inside = ("ppvae", "pyro", "torch", "contextlib")
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    return level
