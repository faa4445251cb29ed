"""Writes a tree to a file that is there whole, whatever happens."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xarray as xr

from ppvae._checks import expect
from ppvae._files import as_path, replacing
from ppvae._scopes import without_warnings


def to_netcdf(tree: xr.DataTree | xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Writes a tree to a netCDF file; a file of that name is replaced only by the whole new one.

    The tree goes to a hidden file in the same folder first, and takes the name when it is on the
    disk. A program that is killed meanwhile leaves the old file as it was. (The method of that name
    that a tree has writes into the old file.)

    Args:
        tree: a tree as `from_pyro_svi` and `ExactPosterior.to_datatree` give, or a data set as
            `evaluate` does.
        path: of the file, in a folder that exists.

    Returns:
        The path.

    Raises:
        TypeError: `tree` is something else.
        FileNotFoundError: there is no such folder.

    Example:
        >>> import tempfile, xarray
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = to_netcdf(xarray.Dataset({"a": 3.0}), Path(folder) / "a.nc")
        ...     xarray.load_dataset(path).a.item()
        3.0
    """
    _check_tree(tree)
    path = as_path("path", path)
    with replacing(path) as beside:
        tree.to_netcdf(beside, engine="h5netcdf")  # the one that is among the requirements
    return path


def to_zarr(tree: xr.DataTree | xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Writes a tree to a Zarr store, a folder; one of that name is replaced by the whole new one.

    The tree is written under a hidden name in the same folder, and takes the name when it is whole;
    the old store goes then. `xarray.open_datatree(path, engine="zarr")` reads it. Wants the package
    `zarr`.

    Args:
        tree: a tree as `from_pyro_svi` and `ExactPosterior.to_datatree` give, or a data set as
            `evaluate` does.
        path: of the store, in a folder that exists.

    Returns:
        The path.

    Raises:
        ImportError: `zarr` is not installed.
        TypeError: `tree` or `path` is something else.
        ValueError: there is something of that name that is no Zarr store.
        FileNotFoundError: the folder in which it would be is not there.

    Example:
        >>> import tempfile, xarray
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = to_zarr(xarray.Dataset({"a": 3.0}), Path(folder) / "a.zarr")
        ...     xarray.open_zarr(path).a.item()
        3.0
    """
    _check_tree(tree)
    path = as_path("path", path, folder=True)
    with replaced_store(path) as new, without_warnings():  # of a part of the format that other
        tree.to_zarr(new)  # readers may not know
    return path


@contextmanager
def replaced_store(path: Path) -> Iterator[Path]:
    """Gives a hidden place for a Zarr store, and puts what is written there in its place.

    Raises:
        ImportError: `zarr` is not installed.
        ValueError: there is something of that name that is no Zarr store.
    """
    store = not path.exists() or (path / "zarr.json").exists()
    expect(store, "path", "that of a Zarr store, or of nothing", str(path))
    wanted = find_spec("zarr") is not None
    expect(wanted, "to_zarr", "the package zarr (pip install zarr)", "none", ImportError)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.resolve().parent) as hidden:
        new, old = Path(hidden) / "new", Path(hidden) / "old"
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)


def _check_tree(tree: Any) -> None:
    """Raises a TypeError unless something is a tree, or a data set."""
    known = isinstance(tree, (xr.DataTree, xr.Dataset))
    expect(known, "tree", "a DataTree or a Dataset", type(tree).__name__, TypeError)
