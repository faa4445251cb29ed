"""Runs the example programs in single precision, on as few rows as a test wants."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest

from ppvae import NarrowFamily, NotConverged, data

EXAMPLES = Path(__file__).parents[2] / "examples"


def program(name):
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(function, told):
    return lambda *args, **given: function(*args, **{**given, **told})


@pytest.fixture
def run(monkeypatch, capsys, plain_pyro, single):
    """Calls `main` of a program, with other constants, and its functions with other arguments."""

    def call(name, *options, rows=None, functions=None, **constants):
        module, load = program(name), data.load
        told = {key: changed(vars(module)[key], args) for key, args in (functions or {}).items()}
        vars(module).update(constants, **told)
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        with monkeypatch.context() as patch, warnings.catch_warnings():
            # a run of few steps is not at the optimum, and some families are narrow on purpose
            warnings.simplefilter("ignore", NotConverged)
            warnings.simplefilter("ignore", NarrowFamily)
            patch.setattr(data, "load", lambda *args, **how: load(*args, **how)[:rows])
            module.main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="session")
def change():
    """Makes a function that has other arguments, whatever it is called with."""
    return changed


@pytest.fixture(scope="session")
def load():
    """Makes a module of an example program, which is not run."""
    return program
