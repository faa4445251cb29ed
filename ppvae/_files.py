"""Files that are whole at any moment, whatever ends the process that writes them."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppvae._checks import expect

_numbers = itertools.count()


def as_path(name: str, value: Any, *, folder: bool = False) -> Path:
    """The path of a file, or of a folder, from text or a path.

    Raises:
        TypeError: it is neither.
        ValueError: there is a folder, where a file is wanted, or what is neither, as a device.
        FileNotFoundError: the folder in which it would be is not there.
    """
    fits = isinstance(value, (str, os.PathLike))
    wanted = f"the path of a {'folder' if folder else 'file'}"
    expect(fits, name, wanted, repr(value), TypeError)
    path = Path(value)
    expect(folder or not path.is_dir(), name, wanted, f"that of a folder, {str(path)!r}")
    other = path.exists() and not (path.is_file() or path.is_dir())
    expect(not other, name, wanted, f"that of a device or pipe, {str(path)!r}")
    parent = path.resolve().parent
    expect(parent.is_dir(), name, "a folder that exists", str(parent), FileNotFoundError)
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path of a hidden file beside another, and puts what is written there in its place.

    Until then the old file is there, and afterwards the new one, also if the machine stops. An
    error inside leaves the old one. What a killed process left half-written is removed by the next
    that writes the same file.

    Raises:
        OSError: no file can be written there.
    """
    target = path.resolve()  # a link stays one
    for left in target.parent.glob(f".{target.name}.*.part"):
        if not _is_alive(left.name.split(".")[-3]):
            left.unlink(missing_ok=True)
    hidden = target.with_name(f".{target.name}.{os.getpid()}.{next(_numbers)}.part")
    try:
        hidden.touch()
    except OSError as error:
        words = f"expected a place where files can be written ({error.strerror})"
        raise type(error)(error.errno, words, str(path)) from None
    try:
        yield hidden
        _flush(hidden, os.O_RDWR)
        hidden.replace(target)
    finally:
        hidden.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _flush(target.parent, os.O_RDONLY)


def _is_alive(process: str) -> bool:
    """Whether there is a process of that number, as far as that can be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # there is, and it is another user's
        return True
    return True


def _flush(path: Path, flags: int) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
