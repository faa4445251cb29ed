"""The mean loss of draws that are held fixed as a surface, and what its curvature says of errors.

The curvature is found by differences of the losses and of their mean gradient, one coordinate moved
at a time.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ppvae.guides.chart import Chart
from ppvae.training.average import Average
from ppvae.training.descent import remembered

_ALONE = 100  # parameters of which nothing is known, which are looked at one by one
_MOVE = 1e-4  # in the units of a coordinate
_MANY = 1000  # coefficients, twice as many as are worth the work
EXCESS = 0.01  # nats: what few draws may cost, unless they are as many as there may be
ERROR = 0.1  # posterior sds: the Monte Carlo error of a mean that is let pass


class Surface:
    """The mean loss of some draws, in nats for all data, over the coordinates of a chart.

    Args:
        average: the losses of draws.
        chart: from coordinates to parameters; it stays as it is.
        normals: the normal numbers of the draws, shape `(draws, normals)`.

    Attributes:
        losses: at a place, the loss of each draw and the slope of their mean.
    """

    def __init__(self, average: Average, chart: Chart, normals: Tensor) -> None:
        self.average, self.chart, self.normals = average, chart, normals
        self.losses = remembered(self._losses)

    def __call__(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The slope, and the value."""
        losses, slope = self.losses(place)
        return slope, losses.mean()

    def _losses(self, place: Tensor) -> tuple[Tensor, Tensor]:
        return self.average.slope(self.chart, place, self.normals)

    def losses_beside(self, place: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """The same, a small move away along one coordinate."""
        moved = place.clone()
        moved[axis] += _MOVE
        return self._losses(moved)


def units_of(surface: Surface, place: Tensor, alone: Tensor) -> Tensor:
    """Lengths in which the curvature of parameters of which nothing is known is one."""
    base, units = surface(place)[0], []
    for index in alone.nonzero()[:, 0].tolist():
        steeper = surface.losses_beside(place, index)[1]
        units.append(((steeper - base)[index] / _MOVE).abs())
    curvature = torch.stack(units).nan_to_num(1.0, 1.0, 1.0) if units else torch.ones(0)
    lowest = 1e-8 * curvature.max().item() if units else 0.0
    return curvature.clamp_min(lowest + 1e-300).rsqrt()


@dataclass(frozen=True)
class Curvature:
    """The curvature near a minimum, along the locations and the parameters that are alone.

    Where many are alone, they are not looked at.

    Attributes:
        located: the coordinates of the locations.
        to_latents: from a slope along them to the step of the latents that it asks for.
        sd: of the latents.
        error: the largest Monte Carlo error of a mean, in posterior sds.
        excess: the nats that Monte Carlo errors are expected to cost; NaN if they are not known.
    """

    located: slice
    to_latents: Tensor
    sd: Tensor
    error: float
    excess: float

    @classmethod
    def at(cls, surface: Surface, place: Tensor, free: Tensor) -> "Curvature":
        """Looks at a surface near a place; coordinates on a kink are those of `free` that are 0."""
        chart = surface.chart
        located, alone = chart.located() or slice(0, 0), (~chart.known()).nonzero()[:, 0].tolist()
        number = located.stop - located.start
        axes = [*range(located.start, located.stop), *(alone if len(alone) <= _ALONE else [])]
        losses, slope = surface.losses(place)
        curvature, scores = torch.diag(1 - free[axes]), torch.zeros(len(axes), len(losses))
        for row, axis in enumerate(axes):
            there, steeper = surface.losses_beside(place, axis)
            curvature[row] += ((steeper - slope) * free)[axes] * free[axis] / _MOVE
            scores[row] = (there - losses) / _MOVE
        spread = torch.zeros_like(curvature)
        if len(losses) > 2 and axes:
            spread = spread_of(scores, surface.normals)
        inverse = _inverse(curvature[:number, :number])
        to_latents, among = chart.factor[:, :number] @ inverse, spread[:number, :number]
        sd = (to_latents @ chart.factor[:, :number].T).diagonal().clamp_min(1e-300).sqrt()
        error = (to_latents @ among @ to_latents.T).diagonal().clamp_min(0).sqrt() / sd
        # half for what was looked at, and half for the scales, which cost what the locations do
        excess = ((spread * _inverse(curvature)).sum() + (among * inverse).sum()).item() / 2
        return cls(located, to_latents, sd, error.max().item(), excess if axes else math.nan)

    @property
    def needed(self) -> int:
        """How many times as many draws make the errors small enough: a power of two."""
        times = max((self.error / ERROR) ** 2, self.excess / EXCESS)
        if times < 1:
            return 1
        return 2 ** max(1, math.ceil(math.log2(times))) if math.isfinite(times) else 2

    def step(self, slope: Tensor) -> tuple[float, int]:
        """The largest Newton step at a slope, in posterior sds, and the latent that it is in."""
        others = torch.cat([slope[: self.located.start], slope[self.located.stop :]])
        if self.located.stop == self.located.start:
            return others.abs().max().item(), 0
        step = (self.to_latents @ slope[self.located]).abs() / self.sd
        return max([step.max().item(), *(others.abs() / 2).tolist()]), int(step.argmax())


def spread_of(scores: Tensor, normals: Tensor) -> Tensor:
    """The covariance of the mean of some scores, each of shape `(draws,)`, over matched draws.

    Draws come in pairs of opposite sign, and the mean of a product of two numbers is exact: what
    follows it in the scores is no error, and is left out as far as the draws can tell.
    """
    pairs = scores.unflatten(1, (2, -1)).mean(1).T
    half = normals[: len(pairs)]
    size, exact = half.shape[1], torch.ones(len(half), 1)
    if size * (size + 1) < min(len(half), _MANY):
        rows, columns = torch.tril_indices(size, size)
        exact = torch.cat([exact, half[:, rows] * half[:, columns]], 1)
    elif 2 * size < len(half):
        exact = torch.cat([exact, half.square()], 1)
    axes = torch.linalg.qr(exact).Q
    left = pairs - axes @ (axes.T @ pairs)
    left = left / (1 - axes.square().sum(1, keepdim=True))  # each as if it had not been fitted
    return left.T @ left / len(pairs) ** 2


def _inverse(curvature: Tensor) -> Tensor:
    """The inverse along the axes that are curved at all."""
    return torch.linalg.pinv((curvature + curvature.T) / 2, hermitian=True, rtol=1e-12)
