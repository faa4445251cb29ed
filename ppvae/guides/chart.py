"""Coordinates for the parameters of a guide in which a nearly Gaussian posterior is a round bowl.

At the mode of a posterior, with the curvature there, one knows where the members of most families
will end up, and in which directions the objective is steep. A `Chart` starts the parameters there
and stretches the directions, so that a method that knows nothing of either sees a bowl: columns of
a regression in years, grams or dollars make no difference to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppvae.families.heads import Argument
from ppvae.guides.family_guide import FamilyGuide
from ppvae.programs.supports import is_real


@dataclass(frozen=True)
class Piece:
    """Some parameters, and how they follow from their own coordinates.

    Attributes:
        parameters: the parameters.
        size: number of coordinates.
        values: from the coordinates to the values of the parameters, one for each.
        located: whether the coordinates move the location of the latents, in units of the factor.
        scaled: whether a step of one is neither long nor short, by what is known of the posterior.
    """

    parameters: list[Tensor]
    size: int
    values: Callable[[Tensor], list[Tensor]]
    located: bool = False
    scaled: bool = True


class Chart:
    """Takes one vector of coordinates, zero at the start, to the values of all parameters.

    Args:
        parameters: all parameters that are moved, in their order.
        pieces: those of which something is known; each of the others moves by itself.
    """

    def __init__(
        self, parameters: Sequence[Tensor], pieces: Sequence[Piece], factor: Tensor
    ) -> None:
        self.parameters, self.factor = list(parameters), factor
        known = {id(parameter) for piece in pieces for parameter in piece.parameters}
        others = [_alone(p) for p in self.parameters if id(p) not in known]
        self.pieces = [*pieces, *others]
        self.size = sum(piece.size for piece in self.pieces)
        self.units = torch.ones(self.size, dtype=torch.float64)

    def slices(self) -> list[slice]:
        """The coordinates of each piece."""
        ends = torch.tensor([piece.size for piece in self.pieces]).cumsum(0).tolist()
        return [slice(end - piece.size, end) for piece, end in zip(self.pieces, ends, strict=True)]

    def located(self) -> slice | None:
        """The coordinates of the locations of the latents, or None."""
        places = zip(self.pieces, self.slices(), strict=True)
        return next((at for piece, at in places if piece.located), None)

    def known(self) -> Tensor:
        """Which coordinates have units that are known, and which are those of a parameter alone."""
        flags = [torch.full((p.size,), p.scaled) for p in self.pieces]
        return torch.cat(flags) if flags else torch.zeros(0, dtype=torch.bool)

    def __call__(self, place: Tensor) -> list[Tensor]:
        """The values of all parameters, in their order, at coordinates of shape `(size,)`."""
        values: dict[int, Tensor] = {}
        for piece, at in zip(self.pieces, self.slices(), strict=True):
            new = piece.values(place[at] * self.units[at])
            values |= {id(p): value for p, value in zip(piece.parameters, new, strict=True)}
        return [values[id(parameter)] for parameter in self.parameters]


def _alone(parameter: Tensor) -> Piece:
    start = parameter.detach().double()
    return Piece(
        [parameter], start.numel(), lambda u: [start + u.reshape(start.shape)], scaled=False
    )


def pieces_of(guide: Any, mean: Tensor, factor: Tensor) -> list[Piece]:
    """The pieces of a guide's parameters that a Gaussian says something of.

    Args:
        guide: a guide; of one that is no `FamilyGuide` without encoder, nothing is said.
        mean: of the unconstrained latents, in the order of the model, shape `(size,)`.
        factor: lower Cholesky factor of their covariance.
    """
    if not isinstance(guide, FamilyGuide) or guide.encoder is not None:
        return []
    sd = torch.cholesky_inverse(factor).diagonal().rsqrt()  # with the other latents held
    places, start = {}, 0
    for site in guide.sites:
        size = site.seen_from(None)
        places[site.name] = torch.arange(start, start + size)
        start += size
    pieces: list[Piece] = []
    locations: list[_Location] = []
    for block in guide.blocks:
        if block.frame is not None or block.prior or block.from_model:
            continue  # not a parameter for each coordinate
        at = torch.cat([places[name] for name in block.names])
        seen = torch.cat([at[:0], *(places[name] for name in block.given)])
        arguments = dict(guide.heads[block.key].named_children()) if block.over_reals else {}
        for name, argument in arguments.items():
            if not isinstance(argument, Argument):
                continue
            whole = argument.shape.numel() == len(at)
            located = name in ("loc", "v") and is_real(argument.constraint) and whole
            size = argument.raw_shape.numel()
            slope = _slope(factor, at, seen) if located else factor.new_zeros(size, len(seen))
            if argument.linear is not None:
                pieces.append(_weight(argument.linear.weight, slope))
            if located:
                locations.append(_Location(_own(argument), at, seen, slope))
            elif name in ("loc", "v") and whole:
                near = _moved(argument, argument.raw_at(mean[at].reshape(argument.shape)))
                pieces.append(replace(near, scaled=False))
            elif name == "scale":
                pieces.append(_scale(argument, sd[at]))
            elif name == "scale_tril" and argument.triangular:
                pieces.append(_triangle(argument, _factor_of(factor, at)))
            elif name == "cov_factor":
                pieces.append(_loading(argument, _factor_of(factor, at), sd[at]))
            elif name == "cov_diag":
                pieces.append(_scale(argument, sd[at].square()))
    if locations:
        pieces.insert(0, _location(locations, mean, factor))
    return pieces


class _Location(NamedTuple):
    """A parameter that is the location of some coordinates, beside a slope in others."""

    raw: nn.Parameter
    at: Tensor
    seen: Tensor
    slope: Tensor


def _location(locations: list[_Location], mean: Tensor, factor: Tensor) -> Piece:
    """The locations of all latents, moved together along the axes of the posterior."""

    def values(u: Tensor) -> list[Tensor]:
        moved = mean + factor @ u
        return [(moved[p.at] - p.slope @ moved[p.seen]).reshape(p.raw.shape) for p in locations]

    return Piece([place.raw for place in locations], len(mean), values, located=True)


def _own(argument: Argument) -> nn.Parameter:
    """The free parameter of an argument: all of it, or what it is where its inputs are zero."""
    raw: Any = argument.raw if argument.linear is None else argument.linear.bias
    return raw


def _slope(factor: Tensor, at: Tensor, seen: Tensor) -> Tensor:
    """The regression of some latents on others, `(at, seen)`."""
    covariance = factor @ factor.T
    slope: Tensor = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, at]).mT
    return slope


def _weight(weight: Tensor, slope: Tensor) -> Piece:
    """The weights of an argument on the latents that it is given; more inputs are padding."""
    start = slope.new_zeros(weight.shape)
    start[:, : slope.shape[1]] = slope
    return Piece([weight], start.numel(), lambda u: [start + u.reshape(start.shape)], scaled=False)


def _factor_of(factor: Tensor, at: Tensor) -> Tensor:
    """The Cholesky factor of the covariance of some latents, with the others held."""
    if len(at) == len(factor) and bool((at[1:] > at[:-1]).all()):
        return factor
    precision = torch.cholesky_inverse(factor)[at][:, at]
    return torch.linalg.cholesky(torch.linalg.inv(precision))


def _scale(argument: Argument, sd: Tensor) -> Piece:
    """Positive arguments; one that several coordinates share starts at their geometric mean."""
    value = sd.reshape(argument.shape) if argument.shape.numel() == len(sd) else None
    if value is None:
        value = sd.log().mean().exp().expand(argument.shape)
    transform: Any = torch.distributions.transform_to(argument.constraint)
    return _moved(argument, transform.inv(value))


def _moved(argument: Argument, start: Tensor) -> Piece:
    raw = _own(argument)
    start = start.reshape(raw.shape)
    usable = torch.where(torch.isfinite(start), start, raw.detach().double())
    return Piece([raw], usable.numel(), lambda u: [usable + u.reshape(usable.shape)])


def _triangle(argument: Argument, factor: Tensor) -> Piece:
    """A Cholesky factor, which is `factor` times one that starts at the identity."""
    raw = _own(argument)
    rows, columns = torch.tril_indices(*factor.shape)
    diagonal = rows == columns

    def values(u: Tensor) -> list[Tensor]:
        inner = torch.zeros_like(factor).index_put(
            (rows, columns), torch.where(diagonal, u.exp(), u)
        )
        outer = (factor @ inner)[rows, columns]
        safe = torch.where(diagonal, outer, 1.0)
        return [torch.where(diagonal, safe.log(), outer)]

    return Piece([raw], len(rows), values)


def _loading(argument: Argument, factor: Tensor, sd: Tensor) -> Piece:
    """The factor of a low rank: along the largest axes of the correlations."""
    raw = _own(argument)
    scaled = factor / sd[:, None]
    sizes, vectors = torch.linalg.eigh(scaled @ scaled.T)
    number = argument.shape[-1]
    start = torch.zeros(argument.shape, dtype=factor.dtype)
    most = min(number, len(sd))
    size = (sizes[-most:] - 1).clamp_min(0.01).sqrt()
    start[:, :most] = vectors[:, -most:] * size * sd[:, None]

    def values(u: Tensor) -> list[Tensor]:
        return [(start + sd[:, None] * u.reshape(start.shape)).reshape(raw.shape)]

    return Piece([raw], start.numel(), values)
