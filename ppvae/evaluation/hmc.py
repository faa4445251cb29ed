"""Hamiltonian Monte Carlo along a path of temperatures, for many data and chains at once."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppvae.evaluation.path import Densities, Point

_TARGET = 0.8  # acceptance that the step sizes are tuned towards
_JITTER = 0.25  # each chain's step size is drawn anew, by up to this share larger or smaller
_GAIN = 0.5  # how fast the step sizes follow the acceptance
_MEMORY = 0.85  # of the running variances
_FIRST = 32  # draws of the start for the first variances, and moves for the first step sizes
_PILOT = 50, 200  # fewest and most temperatures of the pilot run
_QUANTILE = 0.75  # of the moves of log p - log q, that stands for their size
_SPREAD = 0.1  # share of the temperatures that stay where the pilot run had them


class Schedule(NamedTuple):
    """A frozen path for each datum: temperatures, and the step sizes of the transition at each.

    Attributes:
        temperatures: b from 0 (the start) to 1 (the posterior), shape `(T + 1, datum)`.
        steps: step sizes, shape `(T + 1, datum, coordinates)`; the ends have no transitions.
        num_leapfrog: leapfrog steps of a transition.
    """

    temperatures: Tensor
    steps: Tensor
    num_leapfrog: int

    def reversed(self) -> "Schedule":
        """The same path from the posterior to the start."""
        return Schedule(self.temperatures.flip(0), self.steps.flip(0), self.num_leapfrog)


def transition(
    densities: Densities, point: Point, temperature: Tensor, step: Tensor, num_leapfrog: int
) -> tuple[Point, Tensor]:
    """One Hamiltonian trajectory and one Metropolis decision, for each datum and chain.

    It leaves the density at the temperature as it is, and is its own reversal.

    Args:
        densities: the log densities.
        point: where the chains are.
        temperature: of the density, shape `(datum,)`.
        step: step sizes, shape `(datum, coordinates)`.
        num_leapfrog: leapfrog steps.

    Returns:
        Where the chains are then, and the acceptance probabilities, shape `(chains, datum)`.

    Neal, MCMC using Hamiltonian dynamics, 2011.
    """
    jitter = 1 + _JITTER * (2 * torch.rand_like(point.log_q)[..., None] - 1)
    step = step * jitter  # drawn before the move: for every size, the move is its own reversal
    before = torch.randn_like(point.state)
    momentum, new = before + step / 2 * point.slope(temperature), point
    for number in range(1, num_leapfrog + 1):
        new = densities.at(new.state + step * momentum)
        last = number == num_leapfrog
        momentum = momentum + (step / 2 if last else step) * new.slope(temperature)
    gain = new.log_density(temperature) - point.log_density(temperature)
    kinetic = (before.square() - momentum.square()).sum(-1) / 2
    probability = (gain + kinetic).clamp(max=0).exp().nan_to_num(0.0)  # a trajectory that blew up
    accepted = torch.rand_like(probability) < probability
    chosen = [
        torch.where(accepted if old.dim() == 2 else accepted[..., None], moved, old)
        for moved, old in zip(new, point, strict=True)
    ]
    return Point(*chosen), probability


def anneal(
    densities: Densities, point: Point, schedule: Schedule, tick: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """Runs all chains along a path; as `chains`, without where they end."""
    return chains(densities, point, schedule, tick)[1:]


def chains(
    densities: Densities, point: Point, schedule: Schedule, tick: Callable[[int], object]
) -> tuple[Point, Tensor, Tensor]:
    """Runs all chains along a path.

    Args:
        densities: the log densities.
        point: where the chains start: draws of the density at the first temperature.
        schedule: the path.
        tick: called with the number of chains after each temperature.

    Returns:
        Where the chains end, the log weights, and the mean acceptance over transitions; the last
        two `(chains, datum)`, in double precision. The mean of a weight is the ratio of the
        integrals of the densities at the last temperature and the first, and the ends with these
        weights are draws of the density at the last temperature.

    Neal, Annealed importance sampling, 2001.
    """
    temperatures, steps, num_leapfrog = schedule
    log_weight = torch.zeros_like(point.log_ratio)
    accepted, count = torch.zeros_like(log_weight), len(temperatures) - 1
    rises = temperatures.double().diff(dim=0)
    for number, rise in enumerate(rises, 1):
        log_weight = log_weight + rise * point.log_ratio
        if number < count:
            here = temperatures[number], steps[number], num_leapfrog
            point, probability = transition(densities, point, *here)
            accepted = accepted + probability
        tick(len(log_weight))
    return point, log_weight, accepted / (count - 1) if count > 1 else accepted * math.nan


def tune(densities: Densities, num_temperatures: int, num_leapfrog: int) -> Schedule:
    """Finds a path by a pilot run, the draws of which are thrown away.

    The step sizes of each datum follow the acceptance, and those of its coordinates their running
    standard deviation; none is so large that a trajectory passes a quarter of the period of a
    Gaussian of that width, for it would turn back. The temperatures of each datum are then placed
    so that log p - log q, of which the weights are made, differs about equally between any two.

    Args:
        densities: the log densities; a few chains suffice.
        num_temperatures: T, at least 1.
        num_leapfrog: leapfrog steps of a transition.
    """
    if num_temperatures == 1:  # importance sampling, without transitions
        like = densities.draw()[:1].expand(2, -1, -1)
        ends = like.new_tensor([0.0, 1.0])[:, None].expand(like.shape[:2])
        return Schedule(ends, torch.ones_like(like), num_leapfrog)
    count = min(max(num_temperatures, _PILOT[0]), _PILOT[1])
    point = densities.at(densities.draw())
    temperatures = torch.linspace(0, 1, count + 1).to(point.state) ** 4
    first = [densities.draw() for _ in range(math.ceil(_FIRST / len(point.state)))]
    mean, variance = torch.cat(first).mean(0), torch.cat(first).var(0)
    most = math.log(math.pi / 2 / num_leapfrog)
    log_step = torch.full_like(point.log_q[0], most)
    steps, moves = [], []
    for number, temperature in enumerate(temperatures[1:-1]):
        for _ in range(1 if number else _FIRST):
            step = log_step.exp()[:, None] * variance.sqrt()
            before, here = point, temperature.expand_as(log_step)
            point, probability = transition(densities, before, here, step, num_leapfrog)
            log_step = (log_step + _GAIN * (probability.mean(0) - _TARGET)).clamp(max=most)
            away = point.state - mean
            variance = torch.lerp(away.square().mean(0), variance, _MEMORY)
            mean = mean + (1 - _MEMORY) * away.mean(0)
        steps.append(log_step.exp()[:, None] * variance.sqrt())
        moves.append((point.log_ratio - before.log_ratio).abs().cpu().numpy())
    placed = _placed(temperatures.double().cpu().numpy(), np.stack(moves), num_temperatures)
    chosen = torch.as_tensor(placed).to(point.state)
    nearest = torch.searchsorted(temperatures[1:-1].contiguous(), chosen).clamp(max=count - 2)
    data = torch.arange(len(log_step), device=nearest.device)
    return Schedule(chosen, torch.stack(steps)[nearest, data], num_leapfrog)


def _placed(temperatures: np.ndarray, moves: np.ndarray, count: int) -> np.ndarray:
    """Temperatures for each datum, shape `(count + 1, datum)`, at equal distances.

    Args:
        temperatures: those of the pilot run, shape `(pilot + 1,)`.
        moves: how far log p - log q moved at each but the ends, `(pilot - 1, chains, datum)`.
        count: number of distances.
    """
    reach = min(10, len(moves) // 20)
    moves = np.nan_to_num(moves, posinf=0.0)
    # a quantile, since the moves of chains that start far out may be larger by orders of magnitude
    speeds = [
        np.quantile(moves[max(0, i - reach) : i + reach + 1], _QUANTILE, axis=(0, 1))
        for i in range(len(moves))
    ]
    speed = np.stack([speeds[0], *speeds, speeds[-1]])
    lengths = (speed[1:] + speed[:-1]) * np.diff(temperatures)[:, None]
    shares = lengths / np.maximum(lengths.sum(0), np.finfo(float).tiny)
    shares = (1 - _SPREAD) * shares + _SPREAD / len(shares)
    ends = np.concatenate([np.zeros((1, shares.shape[1])), shares.cumsum(0) / shares.sum(0)])
    wanted = np.linspace(0, 1, count + 1)
    return np.stack([np.interp(wanted, end, temperatures) for end in ends.T], -1)
