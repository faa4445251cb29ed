"""Writes a tree to a file that is there whole, whatever happens."""

import os
from pathlib import Path

import xarray as xr

from ppvae._checks import expect
from ppvae._files import as_path, replacing


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
    known = isinstance(tree, (xr.DataTree, xr.Dataset))
    expect(known, "tree", "a DataTree or a Dataset", type(tree).__name__, TypeError)
    path = as_path("path", path)
    with replacing(path) as beside:
        tree.to_netcdf(beside, engine="h5netcdf")  # the one that is among the requirements
    return path
