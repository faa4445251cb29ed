"""What `import ppvae` brings into a process, and what its names are."""

import subprocess
import sys

import pytest

import ppvae


def test_a_fresh_process_gets_nothing_heavy_all_modules_and_no_name_of_others():
    """Heavy: what Pyro itself does not import, and takes a tenth of a second or much more."""
    heavy = "arviz_base arviz_stats matplotlib pandas scipy.optimize scipy.stats sympy xarray"
    names = "families likelihoods nn objectives data models plots closed_form regression".split()
    code = (
        "import importlib, sys, ppvae\n"
        f"print('heavy:', *[m for m in {heavy.split()} if m in sys.modules])\n"
        f"print(*[importlib.import_module('ppvae.' + n).__name__ for n in {names}])\n"
        "nn = data = 1\nfrom ppvae import *\nprint(nn, data, fit.__name__, plots.__name__)"
    )
    told = [sys.executable, "-c", code]
    found = subprocess.run(told, capture_output=True, text=True, check=True).stdout.split()
    modules = [f"ppvae.{name}" for name in names]
    assert found == ["heavy:", *modules, "1", "1", "fit", "ppvae.plots"]


def test_every_public_name_is_there_and_no_other():
    for name in ppvae.__all__:
        assert getattr(ppvae, name) is not None
        assert name in dir(ppvae)
    with pytest.raises(AttributeError, match="no attribute 'autoencoder'"):
        ppvae.autoencoder  # noqa: B018
