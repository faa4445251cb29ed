"""The modules that a program uses: those that it can reach, and those that it calls.

A Pyro program may be a plain function, which has its networks in a closure, a global name, a
default argument, or in the object that it is a method of. It can be read where they are
(`reached`), and seen which ones run (`watched`).
"""

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

_CONTAINERS = (list, tuple, set, frozenset)
_MANY = 1000
#: Where no module is that a user made, nor a name of one.
_LIBRARIES = frozenset({"builtins", "math", "numpy", "pandas", "ppvae", "pyro", "scipy", "torch"})
#: The same of what is a module of Python or a function: an assert in a test calls some of pytest's.
_TOOLS = _LIBRARIES | sys.stdlib_module_names | {"_pytest", "pytest"}


def reached(*programs: Any) -> list[nn.Module]:
    """The outermost modules that can be reached from some programs, without a call of them.

    From a function these are its closure, its defaults, the global names and attributes in its
    code, the functions in it or that it wraps, and what it is a method of; from any other object
    its attributes, and from a container what is in it. A module is not looked into, and of one of
    Python, which has names of much else, only the names that the code asks for are read.
    """
    found: dict[int, nn.Module] = {}
    seen: dict[int, Any] = {}
    left = [*programs]
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing  # which keeps it, so that no other one gets its number
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        elif not _is_of_a_library(thing):
            left += _parts(thing)
    return [*found.values()]


def _parts(thing: Any) -> list[Any]:
    """What stands in a thing that is no module."""
    if isinstance(thing, (dict, *_CONTAINERS)):  # a long one holds data
        return [*(thing.values() if isinstance(thing, dict) else thing)][:_MANY]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        parts = [*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        return [*parts, *vars(thing).values(), *_named(thing.__code__, thing.__globals__, parts)]
    if isinstance(thing, (type, types.ModuleType)) or not hasattr(thing, "__dict__"):
        return []
    own = vars(thing)
    places = [each for each in own.values() if isinstance(each, types.ModuleType)]
    spaces = [vars(each) for each in places if not _is_of_a_library(each)]  # for any method
    calls = [vars(kind).get("__call__") for kind in type(thing).__mro__]
    calls = [call for call in calls if isinstance(call, types.FunctionType)]
    return [*own.values(), *spaces, *calls]


def _named(code: types.CodeType, names: Mapping[str, Any], held: list[Any]) -> list[Any]:
    """The values of global names in some code, and of attributes that it asks of modules of Python.

    A name of an attribute may stand for a global one, too, which is then one too many. The modules
    of Python are those of global names, those among what the function holds otherwise, and those in
    such modules.
    """
    found = [names[name] for name in code.co_names if name in names]
    places = [each for each in (*found, *held) if isinstance(each, types.ModuleType)]
    for place in places:  # which become more on the way
        if not _is_of_a_library(place):
            more = [vars(place)[name] for name in code.co_names if name in vars(place)]
            places += [each for each in more if _is_new_place(each, places)]
            found += more
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return [*found, *(value for each in inner for value in _named(each, names, held))]


def _is_new_place(thing: Any, places: list[Any]) -> bool:
    return isinstance(thing, types.ModuleType) and not any(thing is each for each in places)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a name that has no value yet
        return False


def _is_of_a_library(thing: Any) -> bool:
    """Whether a thing is of a library and holds none of the user's: a handler, say, holds some."""
    if isinstance(thing, (types.MethodType, functools.partial, dict, *_CONTAINERS)):
        return False
    libraries = _TOOLS if isinstance(thing, (types.ModuleType, types.FunctionType)) else _LIBRARIES
    if isinstance(thing, types.ModuleType):
        where, holds = thing.__name__, False
    elif isinstance(thing, types.FunctionType):  # a decorator's has the user's in its closure
        where, holds = f"{thing.__module__}", bool(thing.__closure__ or vars(thing))
    else:
        where, holds = f"{type(thing).__module__}", callable(thing) and not isinstance(thing, type)
    return not holds and where.partition(".")[0] in libraries


@contextmanager
def watched(see: Callable[[nn.Module], None]) -> Iterator[None]:
    """Calls a function on each module before it is called inside, in this thread.

    Calls within what `torch.compile` has made are not seen.
    """
    here = threading.get_ident()

    def before(module: nn.Module, _: Any) -> None:
        if not torch.compiler.is_compiling() and threading.get_ident() == here:
            see(module)

    handle = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
