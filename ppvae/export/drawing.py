"""All draws of a tree, in pieces."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ppvae.export.groups import integrated, pieces_of, predicted, small_numbers
from ppvae.export.names import Groups
from ppvae.export.pieces import Piece, gathered
from ppvae.programs.nodes import Node
from ppvae.programs.runs import Args, Runs


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn.

    Attributes:
        runs: the pair.
        nodes: the sites that are variables.
        events: number of event dims of each.
        local: whether all latents are those of a datum.
        wanted: names of groups.
        num_inner: see `pieces_of`.
        top: see `pieces_of`.
        by_element: see `pieces_of`.
        new: arguments for predictions, or None.
    """

    runs: Runs
    nodes: Sequence[Node]
    events: Mapping[str, int]
    local: bool
    wanted: Collection[str]
    num_inner: int | None
    top: Sequence[str]
    by_element: bool
    new: Args | None

    @property
    def batches(self) -> list[Args]:
        """The minibatches: all data together, where a latent belongs to all of them."""
        return self.runs.batches if self.local else [self.runs.args]

    def pieces(self, num_samples: int) -> Iterator[Piece]:
        """The draws, of one minibatch after the other."""
        start = 0
        for batch in self.batches:
            rows = None
            if len(self.batches) > 1:
                count = self._rows(batch)
                rows, start = range(start, start + count), start + count
            yield from self._of_batch(batch, rows, num_samples)
        if self.local and self.new is not None:
            runs = predicted(self.runs, self.new, num_samples, self.events)
            yield from self._cast(gathered(runs, None))

    def _rows(self, batch: Args) -> int:
        """How many data a minibatch has: it is cut from the arguments that have all of them."""
        size = self.runs.plate.size
        both = zip(self.runs.args, batch, strict=True)
        return next(len(cut) for arg, cut in both if getattr(arg, "shape", ())[:1] == (size,))

    def _of_batch(self, batch: Args, rows: range | None, num_samples: int) -> Iterator[Piece]:
        """The draws for a minibatch; behind them the likelihood that they give together."""
        runs = pieces_of(
            self.runs, batch, num_samples, self.events, self.wanted,
            num_inner=self.num_inner, top=self.top, by_element=self.by_element,
            new=None if self.local else self.new,
        )  # fmt: skip
        shown = {*self.wanted, "predictions"}
        weights: np.ndarray | None = None
        likelihood: dict[str, np.ndarray] = {}
        for piece in self._cast(gathered(runs, rows)):
            weight = piece.groups.get("sample_stats", {}).get("log_weight")
            if self.num_inner is not None and weight is not None and weight.ndim == 2:
                if weights is None:  # of each datum, whose likelihood is that of all its draws
                    weights = np.empty((num_samples, weight.shape[1]), weight.dtype)
                weights[piece.first : piece.first + len(weight)] = weight
                likelihood = piece.groups.pop("log_likelihood")
            kept: Groups = {k: v for k, v in piece.groups.items() if k in shown}
            yield piece._replace(groups=kept)
        if weights is not None and "log_likelihood" in self.wanted:
            groups = {"log_likelihood": integrated(likelihood, weights)}
            yield Piece(groups, 0, rows)

    def _cast(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            small_numbers(piece.groups, self.nodes)
            yield piece
