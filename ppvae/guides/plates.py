"""The plates of a guide: those of its model, with the length of the batch at hand."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppvae._checks import expect
from ppvae.guides.sites import Site
from ppvae.programs.nodes import draws_its_rows


class Plates(NamedTuple):
    """What the model's plates looked like when the guide was set up.

    Attributes:
        frames: the plates around latent sites, by name.
        data: name of the plate that the encoder's batch runs along; None without an encoder.
        drawn: names of the plates that draw their own subsample; to others the model gives theirs.
        sees_all: whether the encoder saw all the data, and not just the subsample.
    """

    frames: Mapping[str, Any] = {}
    data: str | None = None
    drawn: frozenset[str] = frozenset()
    sees_all: bool = True

    def make(
        self, features: Tensor | None, given: dict[str, Any], rows_in_model: Callable[[str], Tensor]
    ) -> dict[str, Any]:
        """The plates for one call.

        Args:
            features: the encoder's output in this call, if there is an encoder.
            given: plates to be taken as they are, by name.
            rows_in_model: finds the rows that the model takes in a plate of this name.

        Returns:
            The plates by name.
        """
        plates = dict(given)
        for name, frame in self.frames.items():
            if name in given:
                continue
            full, size = frame.full_size or frame.size, frame.size
            rows = None
            if features is not None and name == self.data:
                if full == size:
                    full = size = len(features)
                elif self.sees_all:
                    full, size = len(features), min(size, len(features))
                    rows = None if name in self.drawn else rows_in_model(name)
                else:
                    size = len(features)
            if name in self.drawn:
                plates[name] = pyro.plate(name, full, subsample_size=size, dim=frame.dim)
                continue
            with poutine.block():  # the guide must not choose the model's rows
                rows = torch.arange(size) if rows is None else rows
                plates[name] = pyro.plate(name, full, subsample=rows, dim=frame.dim)
        return plates

    def rows(self, features: Tensor, plates: dict[str, Any]) -> Tensor:
        """The features of the data in the plate.

        Raises:
            ValueError: the encoder's batch is neither that of the plate nor all the data.
        """
        plate, count = plates[str(self.data)], len(features)
        expected = (
            f"features of shape ({plate.subsample_size}, features), as the plate {plate.name!r} (a "
            "guide list keeps the sizes of its first call, unless it is given `create_plates`)"
        )
        fits = count in (plate.subsample_size, plate.size)
        expect(fits, "encoder", expected, tuple(features.shape))
        return features if count == plate.subsample_size else features[plate.indices]

    def align(self, features: Tensor | None, *, right: bool) -> Tensor | None:
        """Puts the batch where the data plate is; `right`: the head makes the dims beyond it."""
        if features is None:
            return None
        ones = 0 if right else -self.frames[str(self.data)].dim - 1
        return features.reshape(len(features), *[1] * ones, features.shape[-1])

    def shape(self, piece: Tensor, site: Site) -> Tensor:
        """Shapes `(*draws, batch, size)` as `(*draws, *left, batch, *right, *event)`."""
        batch = piece.shape[:-1]
        if self.data is None:
            draws = batch[: max(len(batch) - len(site.right), 0)]
            return piece.reshape(draws + site.right + site.space)
        dim = self.frames[self.data].dim
        at = len(batch) + dim
        draws, rows = batch[: max(at - len(site.left), 0)], batch[at : at + 1]
        right = site.right or torch.Size([1] * (-dim - 1))
        value = piece.reshape(draws + rows + site.left + right + site.space)
        return value.movedim(len(draws), len(draws) + len(site.left))


def read_plates(trace: Any, nodes: list[Any], data: Any, features: Tensor | None) -> Plates:
    """Reads the plates off a trace of the model.

    Args:
        trace: the trace.
        nodes: its latent nodes.
        data: the plate that the encoder's batch runs along, or None.
        features: the encoder's output, or None.
    """
    return Plates(
        frames={frame.name: frame for node in nodes for frame in node["cond_indep_stack"]},
        data=None if data is None else data.name,
        drawn=frozenset(name for name, node in trace.nodes.items() if draws_its_rows(node)),
        sees_all=features is None or len(features) == data.full_size,
    )
