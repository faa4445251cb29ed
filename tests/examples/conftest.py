"""Runs the example programs in single precision, on as few rows as a test wants."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ppvae import NarrowFamily, NotConverged, data

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(function, told):
    return lambda *args, **given: function(*args, **{**given, **told})


@pytest.fixture
def run(monkeypatch, capsys, plain_pyro, guard):
    """Calls `main` of a program, with other constants, and its functions with other arguments."""

    def call(name, *options, rows=None, functions=None, **constants):
        module, load_data = load(name), data.load
        told = {key: changed(vars(module)[key], args) for key, args in (functions or {}).items()}
        vars(module).update(constants, **told)
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        torch.set_default_dtype(torch.float32)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            # a run of few steps is not at the optimum, and some families are narrow on purpose
            warnings.simplefilter("ignore", NotConverged)
            warnings.simplefilter("ignore", NarrowFamily)
            patch.setattr(data, "load", lambda *args, **how: load_data(*args, **how)[:rows])
            try:
                module.main()
            finally:
                torch.set_default_dtype(torch.float64)
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="package")
def example():
    """The names in an example program, which is not run."""
    return lambda name: vars(load(name))
