"""The mode of a posterior and its curvature there: a Gaussian to start from."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppvae._process import interrupted
from ppvae.programs.mapped import UNMAPPED, many
from ppvae.programs.matched_normals import matched
from ppvae.programs.potential import Potential
from ppvae.training.descent import FAR, lbfgs, remembered

_DRAWS = 24  # of the prior, of which the best that is far from the mode is one more start
_CANDIDATES = 20  # points on the way, of which the best is taken where there is no mode
_APART = 3.0  # sds between two modes that are not the same
_WIDE = 0.3  # sd of the latents, in unconstrained space, where nothing is known of them
_STEPS = 100  # of natural gradients, at most


class Mode(NamedTuple):
    """A mode beside the one that was taken, in unconstrained space.

    Attributes:
        above: by how many nats the potential there is above that of the one that was taken.
        weight: the mass around it over that of the one that was taken, as far as the curvatures
            at both tell.
        mean: where it is, of shape `(size,)`.
        sds: of each coordinate, by the curvature, of shape `(size,)`.
    """

    above: float
    weight: float
    mean: Tensor
    sds: Tensor


class Gaussian(NamedTuple):
    """A Gaussian near a posterior, in unconstrained space.

    Attributes:
        mean: shape `(size,)`.
        factor: lower Cholesky factor of the covariance.
        others: other modes that were met.
    """

    mean: Tensor
    factor: Tensor
    others: list[Mode]


def gaussian_near(potential: Potential, seed: int, start: Tensor | None = None) -> Gaussian:
    """The Laplace approximation at the mode with the most mass, of those met from several starts.

    The starts are the middle of the unconstrained space, a point on either side of it, and a draw
    of the prior far from the mode that is met from there. Where a start is given, it is the mode
    that is met from there, whether or not it is the best.

    An interrupt ends the search where it stands.

    A density may have no mode, or have it where there is no mass (a funnel). Then the point on the
    way is taken at which the Gaussian of the local curvature has the highest ELBO; and from there,
    and from a wide Gaussian at the start, the best Gaussian that natural gradients find.
    """
    generator = torch.Generator().manual_seed(seed)
    away = torch.randn(potential.size, generator=generator, device="cpu")
    away = away.to(torch.get_default_device())
    starts = (0 * away if start is None else start, away, -away)
    ends = [_descent(potential, begin) for begin in starts]
    first = min(ends, key=lambda each: each[0] if math.isfinite(each[0]) else FAR)
    lowest, end, way = first if start is None or not math.isfinite(ends[0][0]) else ends[0]
    mode, factor, found = _newton(potential, end)
    if not found:
        way = way[-1:] if interrupted() else way
        few = way[:: max(1, len(way) // _CANDIDATES)] + [end]
        local = [(place, _factor(potential.hessian(place))) for place in few]
        best = max(local, key=lambda each: _elbo(potential, *each))
        wide = way[0], _WIDE * torch.eye(potential.size)
        improved = [natural_gradients(potential, *each, seed) for each in (best, wide)]
        return Gaussian(*max([best, *improved], key=lambda each: _elbo(potential, *each)), [])
    modes = [_Found(potential.slope_and_value(mode)[1].item(), mode, factor)]
    far = None if interrupted() else _far_draw(potential, modes[0], seed)
    for value, place, _ in ends if far is None else [*ends, _descent(potential, far)]:
        if interrupted():
            break
        if not (math.isfinite(value) and all(each.is_far(place) for each in modes)):
            continue
        place, factor, found = _newton(potential, place)
        if found and all(each.is_far(place) for each in modes):
            modes.append(_Found(potential.slope_and_value(place)[1].item(), place, factor))
    taken = modes[0] if start is not None else max(modes, key=_Found.log_mass)
    others = [each.beside(taken) for each in modes if each is not taken]
    return Gaussian(taken.mean, taken.factor, others)


class _Found(NamedTuple):
    """A mode: the potential there, its place, and the Cholesky factor of the covariance."""

    value: float
    mean: Tensor
    factor: Tensor

    def is_far(self, place: Tensor) -> bool:
        """Whether a place is so many sds away that it is not this mode."""
        away = (place - self.mean)[:, None]
        return bool(torch.linalg.solve_triangular(self.factor, away, upper=False).norm() > _APART)

    def log_mass(self) -> float:
        """The log of the mass around it by the curvature, up to a constant."""
        return self.factor.diagonal().log().sum().item() - self.value

    def beside(self, taken: "_Found") -> Mode:
        """What is told of it, where another one is taken."""
        weight = math.exp(min(self.log_mass() - taken.log_mass(), 700.0))
        sds = self.factor.square().sum(1).sqrt()
        return Mode(self.value - taken.value, weight, self.mean, sds)


def _descent(potential: Potential, begin: Tensor) -> tuple[float, Tensor, list[Tensor]]:
    """The potential where L-BFGS ends, the place, and the way there."""
    way, slope_and_value = [begin], remembered(potential.slope_and_value)

    def after(place: Tensor, _: float) -> bool:
        way.append(place)
        return interrupted()

    end = lbfgs(slope_and_value, begin, steps=500, tolerance=1e-8, after=after)
    return slope_and_value(end)[1].item(), end, way


def _far_draw(potential: Potential, mode: _Found, seed: int) -> Tensor | None:
    """The most likely of some draws of the prior that are far from a mode; None, if none is."""
    far = [state for state in potential.prior_draws(_DRAWS, seed) if mode.is_far(state)]
    if not far:
        return None
    values = potential.values(far)
    best = min(range(len(far)), key=values.__getitem__)
    return far[best] if math.isfinite(values[best]) else None


def natural_gradients(
    potential: Potential, mean: Tensor, factor: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Moves a Gaussian towards the one of the highest ELBO, by the draws of one seed.

    There its precision is the mean curvature and the mean slope is zero. Both come from the slopes
    at the draws, the curvature by Stein's identity. A step goes a share of the way and is taken if
    the ELBO grows; what a program cannot be mapped over draws for is left as it is.

    Args:
        potential: the potential.
        mean: shape `(size,)`.
        factor: lower Cholesky factor of the covariance.
        seed: of the draws.

    Returns:
        Mean and factor.

    Opper and Archambeau, The variational Gaussian approximation revisited, 2009; Khan and Rue, The
    Bayesian learning rule, 2023.
    """
    normals = matched(max(64, 4 * len(mean)), len(mean), seed)
    slopes_of = torch.func.grad_and_value(potential)

    def measured(mean: Tensor, factor: Tensor) -> tuple[Tensor, float]:
        slopes, values = many(slopes_of, mean + normals @ factor.T)
        elbo = (factor.diagonal().log().sum() - values.mean()).item()
        return slopes, elbo if math.isfinite(elbo) else -FAR

    try:
        slopes, elbo = measured(mean, factor)
    except UNMAPPED:
        return mean, factor
    share = 0.5
    for _ in range(_STEPS):
        curvature = torch.linalg.solve_triangular(factor.T, normals.T @ slopes, upper=True)
        relative = factor.T @ (curvature + curvature.T) @ factor / (2 * len(normals))
        gain = 0.0
        while share > 1e-3 and not gain > 0:
            mixed = (1 - share) * torch.eye(len(mean)) + share * relative
            if not torch.isfinite(mixed).all():
                return mean, factor
            sizes, axes = torch.linalg.eigh((mixed + mixed.T) / 2)
            inner = axes @ torch.diag(1 / sizes.clamp(0.25, 4.0)) @ axes.T  # a step not too far
            new = factor @ torch.linalg.cholesky((inner + inner.T) / 2)
            move = -share * inner @ (factor.T @ slopes.mean(0))
            longest = 2 * math.sqrt(len(mean))
            move = move * min(1.0, longest / max(move.norm().item(), 1e-300))
            place = mean + factor @ move
            after, higher = measured(place, new)
            gain = higher - elbo
            if gain > 0:
                mean, factor, slopes, elbo = place, new, after, higher
            share = min(1.0, 1.5 * share) if gain > 0 else share / 2
        if not gain > 1e-2 or interrupted():
            break
    return mean, factor


def _newton(potential: Potential, state: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Newton's method, damped.

    Returns:
        Where it ends, a Cholesky factor of the covariance there, and whether that is a mode.
    """
    slope, value = potential.slope_and_value(state)
    for _ in range(100):
        curvature = potential.hessian(state)
        if not torch.isfinite(curvature).all():
            return state, torch.eye(len(state)), False
        factor = _factor(curvature)
        step = -(factor @ (factor.T @ slope))
        gain, share, moved = -(slope @ step).item(), 1.0, False
        while gain > 1e-10 and share > 1e-10 and not moved:
            new_slope, new = potential.slope_and_value(state + share * step)
            moved = bool(torch.isfinite(new) and new <= value - 1e-4 * share * gain)
            if moved:
                state, slope, value = state + share * step, new_slope, new
            share /= 2
        if not moved or interrupted():
            stays = gain <= 1e-6 and _is_bowl(curvature)
            # where it is as good as flat, a Gaussian has no mass that counts
            return state, factor, stays and _elbo(potential, state, factor) > -FAR
    return state, factor, False


def _is_bowl(curvature: Tensor) -> bool:
    """Whether a stationary point with this curvature is a minimum, and no saddle."""
    return bool((torch.linalg.eigvalsh(curvature) > 0).all())


def _factor(curvature: Tensor) -> Tensor:
    """A Cholesky factor of the inverse of a curvature, the signs of which are left out.

    It is worked out in the units of each coordinate, so that these make no difference.
    """
    if not torch.isfinite(curvature).all():
        return torch.eye(len(curvature))
    units = curvature.diagonal().abs().clamp_min(1e-300).rsqrt()
    units = torch.where(units < 1e100, units, 1.0)  # a coordinate that nothing depends on
    sizes, axes = torch.linalg.eigh(units[:, None] * curvature * units)
    sizes = sizes.abs().clamp_min(1e-12 * sizes.abs().max().item() + 1e-300)
    covariance = axes @ torch.diag(1 / sizes) @ axes.T
    covariance = (covariance + covariance.T) / 2
    factor = torch.linalg.cholesky(covariance + 1e-14 * torch.diag(covariance.diagonal()))
    return units[:, None] * factor


def _elbo(potential: Potential, mean: Tensor, factor: Tensor) -> float:
    """The ELBO of a Gaussian, up to a constant, by a few draws."""
    states = mean + matched(32, len(mean), seed=0) @ factor.T
    values = torch.tensor(potential.values([*states]))
    elbo = factor.diagonal().log().sum().item() - values.mean().item()
    return elbo if math.isfinite(elbo) else -FAR
