"""Latents whose true values are known: their coordinates, and what a guide says of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import biject_to

from ppvae._scopes import eval_mode, random_state
from ppvae.programs.nodes import data_plate, is_data, latent_nodes, prototype


class Layout:
    """The coordinates of a model's latents, and the simulations that they belong to.

    Attributes:
        frame: the data plate; its members are the simulations where `local` is true.
        plate: the name that the user gave.
        local: whether each datum is a simulation, and not the whole data set.
        outside: names of the sites outside the data plate.
        names: labels of the coordinates.
    """

    def __init__(self, model: Any, args: Any, plate: str | None, *, local: bool) -> None:
        with torch.no_grad(), eval_mode(model), random_state(None, keep=True):
            trace = prototype(model, args, {})
        self.plate, self.local, self.nodes = plate, local, latent_nodes(trace)
        if not self.nodes:
            raise ValueError("model: expected latent sites, got none")
        self.frame = data_plate(trace, plate)
        name = None if self.frame is None else self.frame.name
        nodes = self.nodes + [node for node in trace.nodes.values() if is_data(node)]
        stacks = {node["name"]: node["cond_indep_stack"] for node in nodes}
        self.outside = [n for n, stack in stacks.items() if name not in {f.name for f in stack}]
        if not (local and self.outside):
            self.names = [label for node in self.nodes for label in self._labels(node)]

    def _labels(self, node: dict[str, Any]) -> list[str]:
        shape, events = node["value"].shape, len(node["fn"].event_shape)
        plates = {f.dim for f in node["cond_indep_stack"]}
        plates -= {self.frame.dim} if self.local else set()
        kept = [shape[dim - events] for dim in range(events - len(shape), 0) if dim in plates]
        places = np.ndindex(*kept, *node["fn"].event_shape)
        return [f"{node['name']}[{','.join(map(str, p))}]" if p else node["name"] for p in places]

    def rows(
        self, values: Mapping[str, Tensor], like: Mapping[str, Tensor], draws: Any = None
    ) -> Tensor:
        """Values of the latent sites as `(draws, simulations, coordinates)`.

        Args:
            values: site -> value.
            like: site -> value of one draw, for the shapes.
            draws: the plate of draws that the values were made in; None for one draw.
        """
        pieces = []
        for node in self.nodes:
            name, events = node["name"], len(node["fn"].event_shape)
            value, shape = values[name], tuple(like[name].shape)
            if draws is None:
                value = value.expand(shape)[None]
            else:  # it stands to the left of all plates of the model, also of those not around here
                ones = (1,) * (events - draws.dim - 1 - len(shape))
                value = value.expand(draws.size, *ones, *shape).reshape(draws.size, *shape)
            value = value.movedim(self.frame.dim - events, 1) if self.local else value[:, None]
            pieces.append(value.reshape(*value.shape[:2], -1))
        return torch.cat(pieces, -1)

    def total(self, parts: Any, kind: str, size: tuple[int, int]) -> Tensor:
        """Terms of one kind summed over sites, and over the data of a set.

        Args:
            parts: the terms.
            kind: `log_likelihood`, `log_prior` or `log_guide`.
            size: `(draws, simulations)`, the shape of the result.
        """
        device = self.nodes[0]["value"].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for name, value in getattr(parts, kind).items():
            if not self.local:
                value = (value.sum(-1) if name in parts.local else value)[..., None]
            total = total + value
        return total.expand(size)

    def log_weight(self, parts: Any, size: tuple[int, int]) -> Tensor:
        """Log p(x, z) - log q(z | x), of that size."""
        log_p = self.total(parts, "log_likelihood", size) + self.total(parts, "log_prior", size)
        return log_p - self.total(parts, "log_guide", size)


class Place(NamedTuple):
    """How the values of one site become rows of shape `(chains, datum, coordinates)`, and back.

    Attributes:
        support: the constraint on the values.
        batch: shape of the plates, with the chains in front.
        datum: which of `batch` is the data plate.
        chained: whether the values have a plate of chains; without one there is one chain.
        space: shape of one event in unconstrained space.
    """

    support: Any
    batch: tuple[int, ...]
    datum: int
    chained: bool
    space: tuple[int, ...]

    @classmethod
    def of(cls, node: Any, frame: Any, draws: Any) -> Place:
        """Reads it off a latent node of a trace that was made in a plate of chains, or in none.

        Raises:
            ValueError: the site is discrete, or no bijection from the reals reaches its support.
        """
        fn, shape = node["fn"], node["value"].shape
        try:
            if fn.support.is_discrete:
                raise NotImplementedError
            space = biject_to(fn.support).inverse_shape(fn.event_shape)
        except NotImplementedError:
            raise ValueError(
                f"model: expected continuous latents that a bijection from the reals reaches, got "
                f"{fn.support} for {node['name']!r}"
            ) from None
        # a plate around a replay expands the value of a site, but not its distribution
        batch = torch.broadcast_shapes(fn.batch_shape, shape[: len(shape) - fn.event_dim])
        batch = batch if draws is not None else torch.Size([1]) + batch
        return cls(fn.support, batch, len(batch) + frame.dim, draws is not None, tuple(space))

    @property
    def transform(self) -> Any:
        """From the reals to the support."""
        return biject_to(self.support)

    @property
    def size(self) -> int:
        """Number of coordinates per datum."""
        return torch.Size(self.batch[1:] + self.space).numel() // self.batch[self.datum]

    def rows(self, value: Tensor) -> Tensor:
        """Shapes `(*plates, *any)` as `(chains, datum, coordinates)`."""
        plates = len(self.batch) - (not self.chained)
        value = value.expand(self.batch + value.shape[plates:]).movedim(self.datum, 1)
        return value.reshape(*value.shape[:2], -1)

    def shaped(self, rows: Tensor) -> Tensor:
        """Shapes `(chains, datum, coordinates)` as `(*plates, *space)`."""
        others = self.batch[1 : self.datum] + self.batch[self.datum + 1 :]
        value = rows.reshape(*rows.shape[:2], *others, *self.space).movedim(1, self.datum)
        return value if self.chained else value[0]


def drawn_rows(guide_trace: Any, latents: list[Any], frame: Any, dim: int | None) -> Tensor:
    """The draws of a run as `(draws, batch, coordinates)`, made in a plate of draws at `dim`."""
    rows = []
    for latent in latents:
        node = guide_trace.nodes[latent["name"]]
        value = in_front(node["value"], node, frame, dim)
        value = value[None] if dim is None else value
        rows.append(value.reshape(*value.shape[:2], -1))
    return torch.cat(rows, -1)


def in_front(value: Tensor, node: Any, frame: Any, dim: int | None = None) -> Tensor:
    """A value with the data in front, and the draws before them."""
    events = len(node["fn"].event_shape)
    if dim is None:
        return value.movedim(frame.dim - events, 0)
    return value.movedim((dim - events, frame.dim - events), (0, 1))


def labels(site: str, shape: torch.Size, *, single: bool) -> list[Any]:
    """Labels for the coordinates of one site."""
    if single and len(shape) == 1:
        return list(range(shape[0]))
    places = product(*(range(size) for size in shape))
    return [f"{site}[{','.join(map(str, place))}]" if place else site for place in places]
