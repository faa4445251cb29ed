"""A file holds a whole tree at any time, whatever happens to the process that writes it."""

import os
import signal
import struct
import time
from functools import partial

import numpy as np
import pytest
import xarray as xr
from cases import LONG
from forked import ended, forked

from ppvae import to_netcdf


def writes(path, pipe):
    """Trees one after the other, and their numbers into a pipe."""
    for number in range(1, 10_000):
        values = xr.Dataset({"a": ("x", np.full(300_000, float(number)))})
        to_netcdf(xr.DataTree.from_dict({"posterior": values, "prior": values}), path)
        os.write(pipe, struct.pack("q", number))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """The last tree that was reported or the one after; most writers are killed as they write."""
    kills, halfway, path = 20 if LONG else 8, 0, tmp_path / "fit.nc"
    for wait in np.linspace(0.0, 0.04, kills):
        out, into = os.pipe()
        writer = forked(partial(writes, path, into))
        os.close(into)
        said = os.read(out, 8)
        time.sleep(wait)
        os.kill(writer, signal.SIGKILL)
        assert ended(writer) == -signal.SIGKILL
        said += os.read(out, 8_000)
        os.close(out)
        with xr.open_datatree(path) as tree:
            found = np.concatenate([tree[name]["a"].values for name in ("posterior", "prior")])
        (last,) = struct.unpack("q", said[-8:])
        assert found.min() == found.max() and found.max() in (last, last + 1)
        for half in tmp_path.glob(".*"):
            half.unlink()
            halfway += 1
    assert halfway > kills / 6


def test_a_writer_that_fails_leaves_the_file_and_nothing_else(tmp_path):
    path, link = tmp_path / "a.nc", tmp_path / "link.nc"
    link.symlink_to(path)
    assert to_netcdf(xr.Dataset({"a": 1.0}), str(link)) == link
    assert link.is_symlink() and xr.load_dataset(path).a == 1.0
    mode = path.stat().st_mode
    with pytest.raises((TypeError, ValueError)):
        to_netcdf(xr.Dataset({"a": 2.0, "b": ((), np.array(object(), dtype=object))}), path)
    assert xr.load_dataset(path).a == 1.0 and sorted(tmp_path.iterdir()) == [path, link]
    to_netcdf(xr.Dataset({"a": 3.0}), path)
    assert xr.load_dataset(path).a == 3.0 and path.stat().st_mode == mode
    with pytest.raises(TypeError, match="tree: expected a DataTree or a Dataset, got dict"):
        to_netcdf({}, path)
    with pytest.raises(FileNotFoundError, match="path: expected a folder that exists, got "):
        to_netcdf(xr.Dataset(), tmp_path / "none" / "a.nc")
    with pytest.raises(OSError, match="expected a place where files can be written .File name too"):
        to_netcdf(xr.Dataset(), tmp_path / f"{'a' * 250}.nc")
