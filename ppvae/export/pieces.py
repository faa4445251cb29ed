"""Groups of arrays, piece by piece: where the pieces belong, and memory that holds them all."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ppvae.export.names import Groups

_HELD = 2**24  # bytes of draws that are gathered before they are put anywhere


class Piece(NamedTuple):
    """Some draws of groups, for some of the data.

    Attributes:
        groups: arrays by group and variable, with the draws in front.
        first: the number of the first draw.
        rows: which of the data; None if these are not cut.
    """

    groups: Groups
    first: int
    rows: range | None

    def place(self, value: np.ndarray, draws: int, size: int) -> Any:
        """The shape of the whole of which an array of the piece is a part, and its index in that.

        Args:
            value: the array; if the data are cut, its second axis runs along them, and perhaps
                along several numbers of each.
            draws: number of draws in all.
            size: number of data in all.
        """
        shape, index = [draws, *value.shape[1:]], [slice(self.first, self.first + len(value))]
        if self.rows is not None:
            each = value.shape[1] // len(self.rows)
            shape[1] = each * size
            index.append(slice(each * self.rows.start, each * self.rows.stop))
        return tuple(shape), tuple(index)


def gathered(runs: Iterable[Groups], rows: range | None) -> Iterator[Piece]:
    """Pieces of some size, from the groups of one run after the other."""
    held: list[Groups] = []
    first = draws = size = 0
    for groups in runs:
        held.append(groups)
        arrays = [array for values in groups.values() for array in values.values()]
        size += sum(array.nbytes for array in arrays)
        draws += max((len(array) for array in arrays), default=0)
        if size > _HELD:
            yield Piece(_joined(held), first, rows)
            held, first, size = [], draws, 0
    if held:
        yield Piece(_joined(held), first, rows)


def _joined(pieces: list[Groups]) -> Groups:
    if len(pieces) == 1:
        return pieces[0]
    return {
        key: {name: np.concatenate([piece[key][name] for piece in pieces]) for name in group}
        for key, group in pieces[0].items()
    }


def side_by_side(pieces: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of all data from those of minibatches."""
    if len(pieces) == 1:
        return dict(pieces[0])
    return {name: np.concatenate([piece[name] for piece in pieces], 1) for name in pieces[0]}


class Memory:
    """Groups in memory.

    Attributes:
        groups: the arrays by group and variable.
    """

    def __init__(self, draws: int, size: int) -> None:
        self.groups: Groups = {}
        self._draws, self._size = draws, size

    def put(self, piece: Piece) -> None:
        """Puts a piece in its place."""
        for key, values in piece.groups.items():
            group = self.groups.setdefault(key, {})
            for name, value in values.items():
                shape, index = piece.place(value, self._draws, self._size)
                if shape == value.shape:
                    group[name] = value
                    continue
                if name not in group:
                    group[name] = np.empty(shape, value.dtype)
                group[name][index] = value
