"""Where the draws, the data and the coordinates of latent sites are in the values of a trace.

A `Place` reads one site, a `Layout` all latent sites of a model. Both turn values into arrays of
shape `(draws, datum, coordinates)` and back, in the space of the site or in unconstrained space.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae.families.rules import support_of
from ppvae.programs.nodes import Node, latent_nodes
from ppvae.programs.plates import is_inside, plates_of
from ppvae.programs.supports import from_reals, is_real, space_of


class Place(NamedTuple):
    """How the values of one site become arrays with the draws and the data in front, and back.

    Attributes:
        name: of the site.
        support: the constraint on its values.
        batch: shape of the plates, with the draws in front: one draw, where there is no plate.
        datum: which dim of `batch` is the data plate; None if the site belongs to all the data.
        plates: the dims of `batch` that are other plates, or hold more than one value.
        event: shape of one event.
        drawn: whether the values have a dim of draws.
    """

    name: str
    support: Any
    batch: torch.Size
    datum: int | None
    plates: tuple[int, ...]
    event: torch.Size
    drawn: bool

    @classmethod
    def of(cls, node: Node, plate: Any, draws: Any = None, *, events: int | None = None) -> "Place":
        """Reads a place off a node of a trace.

        Args:
            node: a sample statement.
            plate: the data plate, or None.
            draws: the plate of draws that the trace was made in, or None.
            events: number of event dims, if the distribution does not say it.
        """
        fn, shape = node["fn"], node["value"].shape
        events = len(fn.event_shape) if events is None else events
        batch = shape[: len(shape) - events]
        if events == len(fn.event_shape):  # a plate around a replay expands only the value
            batch = torch.broadcast_shapes(fn.batch_shape, batch)
        frames = plates_of(node).values()
        deepest = max([-frame.dim for frame in frames], default=0)
        batch = torch.Size([1] * (deepest - len(batch))) + batch
        if draws is None:
            batch = torch.Size([1]) + batch
        sizes = {len(batch) + frame.dim: frame.size for frame in frames}
        # a value that its plates have not broadcast stands for as many equal ones
        batch = torch.Size([sizes.get(dim, n) if n == 1 else n for dim, n in enumerate(batch)])
        datum = len(batch) + plate.dim if is_inside(node, plate) else None
        others = {dim for dim in range(1, len(batch)) if batch[dim] > 1} | set(sizes)
        plates = sorted(others - {datum})
        event = shape[len(shape) - events :]
        told = batch, datum, tuple(plates), event, draws is not None
        return cls(node["name"], support_of(fn), *told)

    @property
    def space(self) -> torch.Size:
        """Shape of one event in unconstrained space.

        Raises:
            ValueError: the site is discrete, or no bijection from the reals reaches its support.
        """
        try:
            if not self.support.is_discrete:
                return space_of(from_reals(self.support), self.batch, self.event)
        except NotImplementedError:
            pass
        raise ValueError(
            f"model: expected continuous latents that a bijection from the reals reaches, got "
            f"{self.support} for {self.name!r}"
        )

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates of a datum."""
        others = [n for dim, n in enumerate(self.batch) if dim not in (0, self.datum)]
        return (torch.Size(others) + self.space).numel()

    @property
    def labels(self) -> list[str]:
        """Names of the coordinates of a datum: `z[0]`, `w[2,1]`, or the site's for a scalar."""
        sizes = [self.batch[dim] for dim in self.plates] + list(self.event)
        indices = product(*(range(size) for size in sizes))
        return [f"{self.name}[{','.join(map(str, i))}]" if i else self.name for i in indices]

    def inside(self, draws: Any) -> "Place":
        """The place of the same site, read off a trace without draws, in a plate of draws."""
        between = -draws.dim - len(self.batch)
        batch = torch.Size([draws.size] + [1] * between) + self.batch[1:]
        datum = None if self.datum is None else self.datum + between
        plates = tuple(dim + between for dim in self.plates)
        return self._replace(batch=batch, datum=datum, plates=plates, drawn=True)

    def front(self, value: Tensor, events: int | None = None) -> Tensor:
        """Shapes a value as `(draws, datum, *others, *event)`; a site of all data has datum 1.

        Args:
            value: of shape `(*batch, *event)`, or one that broadcasts to it.
            events: number of its event dims; by default that of the site.
        """
        cut = value.dim() - (len(self.event) if events is None else events)
        value = value.expand(self.batch[not self.drawn :] + value.shape[cut:])
        value = value if self.drawn else value[None]
        return value.unsqueeze(1) if self.datum is None else value.movedim(self.datum, 1)

    def flat(self, value: Tensor, events: int | None = None) -> Tensor:
        """Shapes a value as `(draws, datum, coordinates)`; see `front`."""
        value = self.front(value, events)
        return value.reshape(*value.shape[:2], -1)

    def back(self, flat: Tensor, event: torch.Size | None = None) -> Tensor:
        """Shapes `(draws, datum, coordinates)` as a value of any number of draws and data."""
        event = self.event if event is None else event
        others = [size for dim, size in enumerate(self.batch) if dim not in (0, self.datum)]
        value = flat.reshape(*flat.shape[:2], *others, *event)
        value = value.squeeze(1) if self.datum is None else value.movedim(1, self.datum)
        return value if self.drawn else value.squeeze(0)


@dataclass(frozen=True)
class Layout:
    """The coordinates of the latent sites of a model, one site behind the other.

    Attributes:
        places: site -> its place, in the order of the model.
    """

    places: dict[str, Place]

    @classmethod
    def of(cls, trace: Any, plate: Any, draws: Any = None) -> "Layout":
        """Reads the layout off a trace of the model; arguments as those of `Place.of`.

        Raises:
            ValueError: the model has no latent sites.
        """
        places = {node["name"]: Place.of(node, plate, draws) for node in latent_nodes(trace)}
        expect(places, "model", "latent sites", "none")
        return cls(places)

    def inside(self, draws: Any) -> "Layout":
        """The same sites in a plate of draws; see `Place.inside`. None changes nothing."""
        if draws is None:
            return self
        return Layout({name: place.inside(draws) for name, place in self.places.items()})

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Site -> its coordinates in unconstrained space.

        Raises:
            ValueError: a site is discrete, or no bijection from the reals reaches its support.
        """
        slices, start = {}, 0
        for name, place in self.places.items():
            slices[name] = slice(start, start + place.size)
            start += place.size
        return slices

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates of a datum."""
        return sum(place.size for place in self.places.values())

    @property
    def labels(self) -> list[Any]:
        """Names of all coordinates; those of a single latent vector are numbers."""
        places = list(self.places.values())
        labels = [label for place in places for label in place.labels]
        vector = len(places) == 1 and len(places[0].event) == 1 and not places[0].plates
        return list(range(len(labels))) if vector else labels

    @property
    def free_labels(self) -> list[str]:
        """Names of the unconstrained coordinates: those of the values, where they are as many."""
        labels = []
        for name, place in self.places.items():
            own = place.labels
            numbered = [f"{name}[{index}]" for index in range(place.size)]
            labels += own if len(own) == place.size else numbered
        return labels

    @property
    def bounded(self) -> dict[int, str]:
        """The numbers and the names of the coordinates of sites that cannot have any value."""
        labels = [(place, label) for place in self.places.values() for label in place.labels]
        return {n: label for n, (place, label) in enumerate(labels) if not is_real(place.support)}

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values by site as `(draws, datum, coordinates)`, in the spaces of the sites."""
        return torch.cat([place.flat(values[name]) for name, place in self.places.items()], -1)

    def back(self, flat: Tensor) -> dict[str, Tensor]:
        """Values by site from `(draws, datum, coordinates)`, in the spaces of the sites."""
        sizes = [len(place.labels) for place in self.places.values()]
        pieces = zip(self.places.items(), flat.split(sizes, -1), strict=True)
        return {name: place.back(piece) for (name, place), piece in pieces}

    def free(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values by site as `(draws, datum, coordinates)`, in unconstrained space."""
        pieces = []
        for name, place in self.places.items():
            free = from_reals(place.support).inv(values[name])
            pieces.append(place.flat(free, len(place.space)))
        return torch.cat(pieces, -1)

    def constrained(self, state: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Takes unconstrained coordinates back to the sites.

        Args:
            state: shape `(draws, datum, size)`.

        Returns:
            Values by site, and the log-determinant of the map that leads to each, of shape
            `(draws, datum)`.
        """
        values, log_dets = {}, {}
        for name, place in self.places.items():
            free = place.back(state[..., self.slices[name]], place.space)
            values[name], log_dets[name] = free, state.new_zeros(state.shape[:2])
            if not is_real(place.support):
                transform = from_reals(place.support)
                values[name] = value = transform(free)
                log_det = transform.log_abs_det_jacobian(free, value)
                events = log_det.dim() - (free.dim() - len(place.space))
                log_dets[name] = place.flat(log_det, events).sum(-1)
        return values, log_dets
