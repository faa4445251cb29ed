"""Runs the example programs as they are, in single precision, on as few rows as a test wants."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ppvae import NarrowFamily, NotConverged, data

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys, plain_pyro, guard):
    def call(name, *options, rows=None):
        load = data.load
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        torch.set_default_dtype(torch.float32)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            # a run of few steps is not at the optimum, and some families are narrow on purpose
            warnings.simplefilter("ignore", NotConverged)
            warnings.simplefilter("ignore", NarrowFamily)
            patch.setattr(data, "load", lambda *args, **how: load(*args, **how)[:rows])
            try:
                runpy.run_path(str(EXAMPLES / name), run_name="__main__")
            finally:
                torch.set_default_dtype(torch.float64)
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def example():
    """The names in an example program, which is not run."""
    return lambda name: runpy.run_path(str(EXAMPLES / name))
