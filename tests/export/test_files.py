"""A file holds a whole tree at any time, whatever happens to the process that writes it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from cases import LONG

from ppvae import to_netcdf

# Forks writers and kills them; says what the last of their trees was, and what the file holds.
KILLER = """
import os, signal, struct, sys, time
import numpy as np, xarray as xr
from ppvae.export.files import to_netcdf

path = sys.argv[1]

def write(pipe):
    for number in range(1, 10_000):
        values = xr.Dataset({"a": ("x", np.full(300_000, float(number)))})
        to_netcdf(xr.DataTree.from_dict({"posterior": values, "prior": values}), path)
        os.write(pipe, struct.pack("q", number))

for wait in np.linspace(0.0, 0.04, int(sys.argv[2])):
    out, into = os.pipe()
    writer = os.fork()
    if not writer:
        write(into)
    os.close(into)
    said = os.read(out, 8)
    time.sleep(wait)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    said += os.read(out, 8_000)
    with xr.open_datatree(path) as tree:
        found = np.concatenate([tree[name]["a"].values for name in ("posterior", "prior")])
    halfway = [name for name in os.listdir(os.path.dirname(path)) if name.startswith(".")]
    for name in halfway:
        os.unlink(os.path.join(os.path.dirname(path), name))
    print(struct.unpack("q", said[-8:])[0], int(found.min()), int(found.max()), len(halfway))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """The last tree that was reported or the one after; most writers are killed as they write."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    kills = 20 if LONG else 8
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "fit.nc"), str(kills)]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    rows = [[int(word) for word in line.split()] for line in told.stdout.splitlines()]
    assert len(rows) == kills and sum(row[-1] for row in rows) > kills / 6
    for last, lowest, highest, _ in rows:
        assert lowest == highest and highest in (last, last + 1)


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
