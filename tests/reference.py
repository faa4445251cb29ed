"""Writes the page that lists every public object with its own methods, from the code.

python tests/reference.py > examples/REFERENCE.md
"""

import inspect
from importlib import import_module

import ppvae

MODULES = (
    "models families likelihoods priors objectives nn data closed_form regression plots".split()
)
MODULES += ["regression.plots"]
HIDDEN = ["forward", "extra_repr", "get_extra_state", "set_extra_state"]  # for PyTorch to call
HIDDEN += ["begin", "exposed", "settings", "location_and_scale"]  # for a model and its likelihood
HEAD = """# Every public object

Each with its own methods, and what `help` says of it in one line; `help(ppvae.fit)` says the rest:
shapes, units, errors and sources. What a class inherits from PyTorch or Pyro is left out. This page
is written by `python tests/reference.py`, and a test holds it against the code.
"""


def summary(thing):
    """The first sentence of its docstring, in one line."""
    text = inspect.getdoc(thing) or ""
    return " ".join(text.split("\n\n")[0].split())


def signature(thing):
    """Its arguments with their defaults, without types."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return ""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    told = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    if [p.kind for p in told] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        return "()"  # a module that takes nothing
    bare = [p.replace(annotation=p.empty, default=default(p.default)) for p in told]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


def default(value):
    return value if value is inspect.Parameter.empty else Default(value)


class Default:
    """A default as it is printed: by its name, where it has one."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return getattr(self.value, "__name__", None) or repr(self.value)


def methods(thing, listed):
    """Name -> method or property, of the class and of its bases that are not listed themselves."""
    found = {}
    for base in reversed(thing.__mro__):
        own = base is thing or base.__name__ not in listed
        if base.__module__.startswith("ppvae") and own:
            for name, value in vars(base).items():
                bare = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
                shown = not name.startswith("_") and (
                    inspect.isfunction(bare) or isinstance(bare, property) or hasattr(bare, "func")
                )
                if shown and name not in HIDDEN:
                    found[name] = bare
    return found


def entry(name, thing, listed):
    """The lines of one object, where others are listed beside it."""
    if not inspect.isclass(thing) and not inspect.isroutine(thing):
        text = repr(thing)
        return [f"- `{name}`" + (f": `{text}`" if len(text) < 80 else "")]
    lines = [f"- `{name}{signature(thing)}`  \n  {summary(thing)}"]
    if inspect.isclass(thing):
        for own, method in methods(thing, listed).items():
            plain = isinstance(method, property) or hasattr(method, "func")
            lines.append(f"  - `.{own}{'' if plain else signature(method)}`: {summary(method)}")
    return lines


def page():
    lines = [HEAD]
    rooms = {"": ppvae, **{name: import_module(f"ppvae.{name}") for name in MODULES}}
    for room, module in rooms.items():
        full = ".".join(filter(None, ["ppvae", room]))
        lines += [f"## `{full}`", "", summary(module), ""]
        names = getattr(module, "__all__", None) or public(module)
        for name in sorted(names, key=str.lower):
            thing = getattr(module, name)
            if not inspect.ismodule(thing):
                lines += entry(name, thing, names)
        lines.append("")
    return "\n".join(lines)


def public(module):
    """What is defined in a module without `__all__`."""
    here = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    return [name for name in here if not name.startswith("_")]


if __name__ == "__main__":
    print(page(), end="")
