"""What `import ppvae` brings into a process, and what its names are."""

import subprocess
import sys

import pytest

import ppvae


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def test_importing_takes_nothing_that_is_heavy_along_and_a_star_leaves_others_names_alone():
    """Heavy: what Pyro itself does not import, and takes a tenth of a second or much more."""
    heavy = "'arviz_base arviz_stats matplotlib pandas scipy.optimize scipy.stats xarray'.split()"
    found = run(
        f"import sys, ppvae\nprint('heavy:', *[m for m in {heavy} if m in sys.modules])\n"
        "nn = data = 1\nfrom ppvae import *\nprint(nn, data, fit.__name__, plots.__name__)"
    )
    assert found == ["heavy:", "1", "1", "fit", "ppvae.plots"]


def test_every_public_name_is_there_and_no_other():
    for name in ppvae.__all__:
        assert getattr(ppvae, name) is not None
        assert name in dir(ppvae)
    with pytest.raises(AttributeError, match="no attribute 'autoencoder'"):
        ppvae.autoencoder  # noqa: B018


def test_public_modules_can_be_imported_as_modules():
    names = "families likelihoods nn objectives data plots closed_form regression".split()
    found = run(
        f"import importlib as i; [print(i.import_module('ppvae.' + n).__name__) for n in {names}]"
    )
    assert found == [f"ppvae.{name}" for name in names]
