r"""What a latent tells of its datum: mutual information, the aggregate posterior, and their limit.

With the aggregate posterior `q(z) = mean_n q(z | x_n)` of the data at hand, the rate splits into
`mean_n KL(q(z | x_n) || p(z)) = I(x; z) + KL(q(z) || p(z))` (Hoffman and Johnson, ELBO surgery,
2016). All values are in nats per datum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from ppvae.objectives.trace_terms import log_density
from ppvae.programs.layout import Place
from ppvae.programs.nodes import DRAWS, drawn_nodes
from ppvae.programs.runs import BUDGET, given, run_trace

_PAIRS = 10_000_000  # of a draw and a datum; with more data fewer draws are compared with them


class Draws(NamedTuple):
    """Draws of the latents of a minibatch, as many for each datum.

    Attributes:
        values: site of the guide -> values, shape `(draws, coordinates)`.
        log_guide: log q(z | x) of each draw, shape `(draws,)`.
        log_prior: log p(z) of each draw, shape `(draws,)`.
        datum: the datum of each draw, a number within the minibatch, shape `(draws,)`.
    """

    values: dict[str, Tensor]
    log_guide: Tensor
    log_prior: Tensor
    datum: Tensor


class Information(NamedTuple):
    """What the latents tell of the data, in nats per datum, with standard errors.

    Attributes:
        mutual_information: I(x; z) under the distribution of the data at hand; at most log N.
        mutual_information_se: its standard error.
        aggregate_kl: KL(q(z) || p(z)) of the aggregate posterior.
        aggregate_kl_se: its standard error.
    """

    mutual_information: float
    mutual_information_se: float
    aggregate_kl: float
    aggregate_kl_se: float


def draws_needed(size: int) -> int:
    """How many draws of each of so many data make a good estimate at a low price."""
    return max(1, min(32, _PAIRS // 10 // size**2))


def draws_of(runs: Sequence[tuple[Any, Any]]) -> Draws:
    """Reads the draws off some runs on one minibatch: the terms and the guide's trace of each."""
    parts, trace = runs[0]
    size, values = parts.plate.size, {}
    for name, node in drawn_nodes(trace).items():
        place = Place.of(node, parts.plate)
        values[name] = torch.cat([place.flat(run.nodes[name]["value"])[0] for _, run in runs])

    def total(which: str) -> Tensor:
        sums = [sum(getattr(p, which).values(), start=torch.zeros(())) for p, _ in runs]
        return torch.cat([value.expand(size) for value in sums])

    datum = torch.arange(size).repeat(len(runs))
    return Draws(values, total("log_guide"), total("log_prior"), datum)


def information(
    guide: Callable[..., Any],
    batches: Sequence[tuple[Any, ...]],
    draws: Sequence[Draws],
    rate: np.ndarray,
    plate: Any,
    dim: int | None,
    *,
    few: bool = False,
) -> Information:
    r"""Mutual information and aggregate KL, from a draw of each datum against all the data.

    `log q(z | x_n) - log q(z)` has mean I and is never above log N, since q(z) holds the draw's
    own `q(z | x_n) / N`. `log q(z | x_n) - log p(z)` less the known rate has mean zero; it is used
    as a control variate, with the coefficient that regression finds. Of very many data, evenly
    spaced ones give the draws.

    Args:
        guide: a guide with local latents and a density.
        batches: arguments in minibatches, of N data together.
        draws: a draw for each datum of each minibatch.
        rate: KL(q(z | x) || p(z)) per datum, shape `(N,)`.
        plate: the data plate.
        dim: where to put a plate of draws, for a guide that can run inside one; None runs one draw
            at a time.
        few: use a hundredth of the pairs, where each is dear.
    """
    size = len(rate)
    points = min(size, max(1, _PAIRS // (100 if few else 1) // size))
    chosen = np.zeros(size, dtype=bool)
    chosen[np.arange(points) * size // points] = True
    start, found = 0, []
    for some in draws:
        datum = start + some.datum.numpy()
        start += len(set(some.datum.tolist()))
        rows = torch.as_tensor(np.flatnonzero(chosen[datum]), device=some.log_guide.device)
        if len(rows):
            picked = {name: value[rows] for name, value in some.values.items()}
            log_q = _log_sum(guide, batches, picked, plate, dim) - math.log(size)
            columns = [some.log_guide[rows], some.log_prior[rows], log_q]
            table = torch.stack(columns).double().cpu().numpy()
            found.append(np.vstack([datum[rows.cpu().numpy()], table]))
    datum, log_own, log_prior, log_q = np.hstack(found)
    datum = datum.astype(int)
    told, control = log_own - log_q, log_own - log_prior - rate[datum]
    spread = control.var()
    if spread > 0 and len(datum) > 20:
        told = told - np.cov(told, control, ddof=0)[0, 1] / spread * control
    per_datum = (
        np.bincount(datum, told, size) / np.maximum(np.bincount(datum, minlength=size), 1)
    )[chosen]
    mutual = min(float(per_datum.mean()), math.log(size))
    rest = rate[chosen] - per_datum
    return Information(mutual, _error(per_datum), float(rate.mean()) - mutual, _error(rest))


def _error(values: np.ndarray) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _log_sum(
    guide: Any,
    batches: Sequence[tuple[Any, ...]],
    values: dict[str, Tensor],
    plate: Any,
    dim: int | None,
) -> Tensor:
    """Log of the sum over all data of q(z | x_n), for points z in front of `values`."""
    count = len(next(iter(values.values())))
    widest = max(value.shape[1] for value in values.values())
    total = torch.full((count,), -math.inf)
    for batch in batches:
        trace = run_trace(guide, batch)
        places = {name: Place.of(trace.nodes[name], plate) for name in values}
        rows = next(place.batch[place.datum] for place in places.values() if place.datum)
        at_once = 1 if dim is None else max(1, BUDGET // (rows * widest))
        pieces = []
        for start in range(0, count, at_once):
            number = min(at_once, count - start)
            draws = None if dim is None else pyro.plate(DRAWS, number, dim=dim)
            spread = {}
            for name, place in places.items():
                place = place if draws is None else place.inside(draws)
                some = values[name][start : start + number, None].expand(-1, rows, -1)
                spread[name] = place.back(some)
            scored = run_trace(given(guide, trace, spread), batch, draws)
            log_q = log_density(scored, plate)
            pieces.append(log_q.expand(number, rows).logsumexp(-1))
        total = torch.logaddexp(total.to(pieces[0]), torch.cat(pieces))
    return total
