"""The plates of a guide: those of its model, with the length of the batch at hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppvae.guides.sites import Site
from ppvae.programs.nodes import prototype


class Plates(NamedTuple):
    """What the model's plates looked like at the first call.

    Attributes:
        frames: the plates around latent sites, by name.
        data: name of the plate that the encoder's batch runs along; None without an encoder.
        drawn: names of the plates that draw their own subsample; others may be told theirs.
        sees_all: whether the encoder saw all the data, and not just the subsample.
    """

    frames: dict[str, Any]
    data: str | None
    drawn: frozenset[str]
    sees_all: bool

    def make(
        self, model: Any, features: Tensor | None, args: Any, kwargs: Any, given: dict[str, Any]
    ) -> dict[str, Any]:
        """The plates for one call, those that are given kept; `model` is a tuple of one."""
        call = (args, kwargs)
        return {
            name: given[name] if name in given else self._plate(frame, model, features, call)
            for name, frame in self.frames.items()
        }

    def _plate(self, frame: Any, model: Any, features: Tensor | None, call: Any) -> Any:
        full, size = frame.full_size or frame.size, frame.size
        drawn, rows = frame.name in self.drawn, None
        if features is not None and frame.name == self.data:
            if full == size:
                full = size = len(features)
            elif self.sees_all:
                full, size = len(features), min(size, len(features))
                if not drawn:  # only the model knows which rows it was told
                    rows = prototype(model[0], *call).nodes[frame.name]["value"]
            else:
                size = len(features)
        if drawn:
            return pyro.plate(frame.name, full, subsample_size=size, dim=frame.dim)
        with poutine.block():  # the guide must not choose the model's rows
            rows = torch.arange(size) if rows is None else rows
            return pyro.plate(frame.name, full, subsample=rows, dim=frame.dim)

    def rows(self, features: Tensor, plates: dict[str, Any]) -> Tensor:
        """The features of the data in the plate.

        Raises:
            ValueError: the encoder's batch is neither that of the plate nor all the data.
        """
        plate = plates[str(self.data)]
        if len(features) == plate.subsample_size:
            return features
        if len(features) == plate.size:
            return features[plate.indices]
        raise ValueError(
            f"encoder: expected features of shape ({plate.subsample_size}, features), the first as "
            f"the plate {plate.name!r}; got {tuple(features.shape)}. A guide list keeps the sizes "
            "of its first call, unless it is given `create_plates`"
        )

    def align(self, features: Tensor, *, right: bool) -> Tensor:
        """Puts the batch where the data plate is; `right` keeps out the dims to its right."""
        ones = 0 if right or self.data is None else -self.frames[self.data].dim - 1
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
