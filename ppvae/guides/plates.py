"""The plates of a guide: those of its model, with the length of the batch at hand."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppvae._checks import expect
from ppvae.guides.blocks import Drawn
from ppvae.guides.sites import Site
from ppvae.programs.plates import draws_its_rows, length_of


class Plates(NamedTuple):
    """What the model's plates looked like when the guide was set up.

    Attributes:
        frames: the plates around latent sites, by name.
        encoded: the plates that the batch of an encoder runs along -> whether it saw all the data,
            and not just the subsample.
        drawn: names of the plates that draw their own subsample; to others the model gives theirs.
        held: names of the plates that have parameters for each of their members.
        length: of the first argument, which some plates follow; None if it has none.
    """

    frames: Mapping[str, Any] = {}
    encoded: Mapping[str, bool] = {}
    drawn: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    length: int | None = None

    @property
    def data(self) -> str | None:
        """Name of the one plate that the batch of an encoder runs along; None if there is none."""
        return next(iter(self.encoded), None)

    def make(
        self,
        lengths: Mapping[str, int],
        given: dict[str, Any],
        args: tuple[Any, ...],
        rows_in_model: Callable[[str], Tensor],
    ) -> dict[str, Any]:
        """The plates for one call.

        Args:
            lengths: plate -> number of rows that its encoder put out in this call.
            given: plates to be taken as they are, by name.
            args: the arguments of the call.
            rows_in_model: finds the rows that the model takes in a plate of this name.

        Returns:
            The plates by name.

        Raises:
            ValueError: a plate whose members have parameters has another size than before.
        """
        plates = dict(given)
        for name, frame in self.frames.items():
            if name in given:
                continue
            full, size = frame.full_size or frame.size, frame.size
            rows = None
            if name in lengths:
                if full == size:
                    full = size = lengths[name]
                elif self.encoded.get(name, True):
                    full, size = lengths[name], min(size, lengths[name])
                    rows = None if name in self.drawn else rows_in_model(name)
                else:
                    size = lengths[name]
            elif full != size and name in self.held:
                rows = None if name in self.drawn else rows_in_model(name)
                size = size if rows is None else len(rows)
            elif full == size == self.length != length_of(args):  # it may be that of the data
                full = size = len(rows_in_model(name))
                grown = f"the plate {name!r} of {frame.size} members, which have parameters"
                expect(
                    name not in self.held or size == frame.size, "model", grown, f"one of {size}"
                )
            if name in self.drawn:
                plates[name] = pyro.plate(name, full, subsample_size=size, dim=frame.dim)
                continue
            with poutine.block():  # the guide must not choose the model's rows
                rows = torch.arange(size) if rows is None else rows
                plates[name] = pyro.plate(name, full, subsample=rows, dim=frame.dim)
        return plates

    def rows(self, features: Tensor, plate: Any) -> Tensor:
        """The features of the data in a plate.

        Raises:
            ValueError: the encoder's batch is neither that of the plate nor all the data.
        """
        count = len(features)
        expected = (
            f"features of shape ({plate.subsample_size}, features), as the plate {plate.name!r} (a "
            "guide list keeps the sizes of its first call, unless it is given `create_plates`)"
        )
        fits = count in (plate.subsample_size, plate.size)
        expect(fits, "encoder", expected, tuple(features.shape))
        return features if count == plate.subsample_size else features[plate.indices]

    def shape(self, piece: Tensor, site: Site, frame: Any, plates: Mapping[str, Any]) -> Tensor:
        """Shapes `(*draws, batch, size)` as `(*draws, *left, batch, *right, *event)`.

        Of a plate that draws a subsample only those members are left.
        """
        batch = piece.shape[:-1]
        if frame is None:
            draws = batch[: max(len(batch) - len(site.right), 0)]
            value = piece.reshape(draws + site.right + site.space)
            for dim, name in site.thinned:
                rows = plates[name].indices.to(value.device)
                value = value.index_select(len(draws) + dim, rows)
            return value
        at = len(batch) + frame.dim
        draws, rows = batch[: max(at - len(site.left), 0)], batch[at : at + 1]
        right = site.right or torch.Size([1] * (-frame.dim - 1))
        value = piece.reshape(draws + rows + site.left + right + site.space)
        return value.movedim(len(draws), len(draws) + len(site.left))


def read_plates(
    trace: Any, nodes: Sequence[Any], blocks: Sequence[Drawn], encoded: Mapping[str, bool]
) -> Plates:
    """Reads the plates off a trace of the model.

    Args:
        trace: the trace.
        nodes: its latent nodes.
        blocks: what the guide draws.
        encoded: plate -> whether its encoder saw all the data.
    """
    held = {
        frame.name
        for block in blocks
        for site in block.sites
        for frame in site.frames
        if not block.from_model and frame != block.frame and not block.per_member
    }
    return Plates(
        frames={frame.name: frame for node in nodes for frame in node["cond_indep_stack"]},
        encoded=encoded,
        drawn=frozenset(name for name, node in trace.nodes.items() if draws_its_rows(node)),
        held=frozenset(held),
        length=length_of(trace.nodes["_INPUT"]["args"]),
    )
