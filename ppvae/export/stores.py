"""A tree that is written to a file while it is drawn, of which no more than a piece is held."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ppvae._checks import expect
from ppvae._files import as_path, replacing
from ppvae._scopes import without_warnings
from ppvae.export.files import replaced_store
from ppvae.export.pieces import Piece

_ENGINES: dict[str, Any] = {".nc": "h5netcdf", ".zarr": "zarr"}

#: from the name of a group and its arrays to the group, as in `dataset_of`
Describe = Callable[[str, Mapping[str, np.ndarray]], xr.Dataset]


class Store:
    """A file of groups, made by `stored`.

    Args:
        path: of the file.
        draws: number of draws in all.
        size: number of data in all.
        describe: lays out the arrays of a group.
    """

    def __init__(self, path: Path, draws: int, size: int, describe: Describe) -> None:
        self.path, self._draws, self._size, self._describe = path, draws, size, describe
        self._file: Any = None
        self._known: set[str] = set()

    def put(self, piece: Piece) -> None:
        """Writes a piece in its place."""
        for key, values in piece.groups.items():
            places = {n: piece.place(v, self._draws, self._size) for n, v in values.items()}
            if values and key not in self._known:
                self._begin(key, values, {name: shape for name, (shape, _) in places.items()})
            for name, value in values.items():
                self._open()[key][name][(0, *places[name][1])] = value

    def _begin(
        self, key: str, values: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Writes the coordinates of a group, and makes room for its variables."""
        empty = {n: np.broadcast_to(np.zeros((), v.dtype), shapes[n]) for n, v in values.items()}
        laid_out = self._describe(key, empty)
        self.write(key, laid_out.drop_vars(list(laid_out.data_vars)))
        group = self._open()[key]
        for name, variable in laid_out.data_vars.items():
            self._make(group, str(name), variable, (1, *values[str(name)].shape))
        self._known.add(key)

    def write(self, key: str | None, group: xr.Dataset) -> None:
        """Writes a group, or what is new of it; None is the root."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the file."""

    def finish(self) -> None:
        """Does what is left to do when all is written."""

    def _open(self) -> Any:
        raise NotImplementedError

    def _make(self, group: Any, name: str, variable: xr.DataArray, chunks: Any) -> None:
        raise NotImplementedError


class _Netcdf(Store):
    """A netCDF file."""

    def write(self, key: str | None, group: xr.Dataset) -> None:
        self.close()
        mode: Any = "w" if key is None else "a"
        group.to_netcdf(self.path, mode=mode, group=key, engine="h5netcdf")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self) -> Any:
        import h5netcdf

        self._file = h5netcdf.File(self.path, "a") if self._file is None else self._file
        return self._file

    def _make(self, group: Any, name: str, variable: xr.DataArray, chunks: Any) -> None:
        bits = variable.dtype == bool  # which netCDF lacks; xarray reads them by this attribute
        dtype = np.dtype(np.int8) if bits else variable.dtype
        made = group.create_variable(name, variable.dims, dtype)
        if bits:
            made.attrs["dtype"] = "bool"


class _Zarr(Store):
    """A Zarr store."""

    def write(self, key: str | None, group: xr.Dataset) -> None:
        mode: Any = "w" if key is None else "a"
        with without_warnings():  # of a part of the format that other readers may not know
            group.to_zarr(self.path, mode=mode, group=key, consolidated=False)

    def finish(self) -> None:
        import zarr

        with without_warnings():  # as above
            zarr.consolidate_metadata(self.path)

    def _open(self) -> Any:
        import zarr

        self._file = zarr.open_group(self.path, mode="a") if self._file is None else self._file
        return self._file

    def _make(self, group: Any, name: str, variable: xr.DataArray, chunks: Any) -> None:
        sizes = {"shape": variable.shape, "chunks": chunks, "dtype": variable.dtype}
        group.create_array(name, dimension_names=variable.dims, **sizes)


@contextmanager
def stored(path: Path, draws: int, size: int, describe: Describe) -> Iterator[Store]:
    """A store that takes the place of the file when the context ends, and is nothing until then.

    Args:
        path: a netCDF file, `.nc`, or a folder for a Zarr store, `.zarr`.
        draws: number of draws in all.
        size: number of data in all.
        describe: lays out the arrays of a group.
    """
    zarr = _is_zarr(path)
    with replaced_store(path) if zarr else replacing(path) as hidden:
        store: Store = (_Zarr if zarr else _Netcdf)(hidden, draws, size, describe)
        try:
            yield store
            store.finish()
        finally:
            store.close()


def store_path(path: Any) -> Path:
    """The path of a netCDF file or a Zarr store.

    Raises:
        TypeError, FileNotFoundError: see `as_path`.
        ValueError: its name does not say which of the two it is.
    """
    found = as_path("path", path, folder=True)
    known = found.suffix in _ENGINES
    expect(known, "path", "a name that ends in .nc (netCDF) or .zarr", found.name)
    return found if _is_zarr(found) else as_path("path", path)


def opened_tree(path: Path) -> xr.DataTree:
    """The tree of a file, whose values are read where they are wanted."""
    return xr.open_datatree(path, engine=_ENGINES[path.suffix])


def _is_zarr(path: Path) -> bool:
    return path.suffix == ".zarr"
