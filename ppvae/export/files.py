"""Writes a tree to a file that is there whole, whatever happens."""

import itertools
import os
from pathlib import Path

import xarray as xr

from ppvae._checks import expect

_numbers = itertools.count()


def to_netcdf(tree: xr.DataTree | xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Writes a tree to a netCDF file; a file of that name is replaced only by the whole new one.

    The tree goes to a hidden file in the same folder first, and takes the name when it is on the
    disk. A program that is killed meanwhile leaves the old file as it was, and the hidden one,
    which can be deleted. The method of the same name of a tree writes into the old file.

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
    path = Path(path)
    target = path.resolve()  # a link stays one
    folder = target.parent
    expect(folder.is_dir(), "path", "a folder that exists", str(folder), FileNotFoundError)
    hidden = folder / f".{target.name}.{os.getpid()}.{next(_numbers)}"
    try:
        tree.to_netcdf(hidden)
        _flush(hidden, os.O_RDWR)
        os.replace(hidden, target)
    finally:
        hidden.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _flush(folder, os.O_RDONLY)
    return path


def _flush(path: Path, flags: int) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
