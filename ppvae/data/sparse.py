"""Matrices of which most entries are zero, and of which only minibatches are made dense."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae._checks import expect

_MOST = 500_000_000  # numbers of a matrix that is made dense as a whole


def is_sparse(item: Any) -> bool:
    """Whether something is a sparse matrix of SciPy's."""
    return type(item).__module__.startswith("scipy.sparse") and hasattr(item, "tocsr")


def as_dense(name: str, matrix: Any) -> Any:
    """A sparse matrix as an array, where it is not too large.

    Raises:
        ValueError: it is.
    """
    size = int(np.prod(matrix.shape))
    expect(
        size <= _MOST, name, f"at most {_MOST:,} numbers when dense; take some rows", f"{size:,}"
    )
    return matrix.toarray()


class SparseMatrix:
    """The rows of a sparse matrix, which come as dense tensors when they are asked for.

    Args:
        name: of the argument, for the messages.
        matrix: a sparse matrix of SciPy's.
        dtype: of the tensors.

    Attributes:
        shape: of the matrix.
        dtype: of what comes.
        missing: whether there are NaN among the entries.

    Raises:
        TypeError: they are no real numbers.
        ValueError: one is infinite, or one that the dtype cannot hold.
    """

    def __init__(self, name: str, matrix: Any, dtype: torch.dtype) -> None:
        self.matrix = matrix.tocsr()
        self.dtype, self.device = dtype, torch.device("cpu")
        self.shape = torch.Size(self.matrix.shape)
        kind = self.matrix.dtype
        expect(kind.kind in "biuf", name, "real numbers in a sparse matrix", kind, TypeError)
        values = torch.as_tensor(self.matrix.data.astype(float)).to(dtype)
        bad = int(torch.isinf(values).sum())
        expect(not bad, name, f"finite numbers of {dtype}, or NaN", f"{bad} infinite")
        self.missing = bool(torch.isnan(values).any())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Some of the rows, dense."""
        chosen = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
        dense = self.matrix[chosen].toarray().astype(float, copy=False)
        return torch.from_numpy(dense).to(self.device, self.dtype)

    def dim(self) -> int:
        """Number of dimensions: two."""
        return 2

    @property
    def nbytes(self) -> int:
        """What it would take if it were dense."""
        return self.shape.numel() * self.dtype.itemsize

    def to(self, device: torch.device) -> "SparseMatrix":
        """Rows are moved to a device from now on."""
        self.device = device
        return self
