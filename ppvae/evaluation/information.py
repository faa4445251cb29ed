r"""What a latent tells of its datum: mutual information, the aggregate posterior, and their limit.

With the aggregate posterior `q(z) = mean_n q(z | x_n)` of the data at hand, the rate splits into
`mean_n KL(q(z | x_n) || p(z)) = I(x; z) + KL(q(z) || p(z))` (Hoffman and Johnson, ELBO surgery,
2016). All values are in nats per datum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppvae.objectives.trace_terms import log_density, terms
from ppvae.programs.layout import Layout, Place
from ppvae.programs.nodes import drawn_nodes
from ppvae.programs.runs import BUDGET, Runs, draws_plate, given, run_trace

_PAIRS = 10_000_000  # of a draw and a datum; with more data fewer draws are compared with them


class Draws(NamedTuple):
    """Draws of the latents of a minibatch: one of each datum, then the next of each.

    Attributes:
        values: of all sites of the guide, shape `(draws, coordinates)`.
        log_guide: log q(z | x) of each draw, shape `(draws,)`.
        log_prior: log p(z) of each draw, shape `(draws,)`.
        size: number of data.
    """

    values: Tensor
    log_guide: Tensor
    log_prior: Tensor
    size: int


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


def draws_of(pairs: Sequence[tuple[Any, Any]], plate: Any) -> Draws:
    """Reads the draws off some pairs of traces of model and guide on one minibatch."""
    parts = [terms(*pair, plate.name) for pair in pairs]
    size, layout = parts[0].plate.size, _layout(pairs[0][1], plate)
    values = [{name: trace.nodes[name]["value"] for name in layout.places} for _, trace in pairs]
    log_guide = torch.cat([each.log_q.expand(size) for each in parts])
    log_prior = torch.cat([each.total(each.log_prior).expand(size) for each in parts])
    return Draws(torch.cat([layout.flat(v)[0] for v in values]), log_guide, log_prior, size)


def _layout(guide_trace: Any, plate: Any) -> Layout:
    """Of all that a guide draws, auxiliary sites among it."""
    nodes = drawn_nodes(guide_trace)
    return Layout({name: Place.of(node, plate) for name, node in nodes.items()})


def information(
    runs: Runs, draws: Sequence[Draws], rate: np.ndarray, channels: tuple[str, ...] | None
) -> Information:
    r"""Mutual information and aggregate KL, from a draw of each datum against all the data.

    `log q(z | x_n) - log q(z)` has mean I and is never above log N, since q(z) holds the draw's
    own `q(z | x_n) / N`. `log q(z | x_n) - log p(z)` less the known rate has mean zero; it is used
    as a control variate, with the coefficient that regression finds. Of very many data, evenly
    spaced ones give the draws.

    Args:
        runs: a model and its guide, which has local latents.
        draws: of each minibatch; none of a point, of which nothing is known.
        rate: KL(q(z | x) || p(z)) per datum, shape `(N,)`.
        channels: of the guide's family, if it is of one.
    """
    if not draws:
        return Information(*[math.nan] * 4)
    # a family with channels never runs its model, and so can run inside a plate of draws; one
    # without runs it, decoder and all, and then fewer pairs must do
    inside, size = bool(runs.vectorized or channels), len(rate)
    pairs = _PAIRS if inside and channels != () else _PAIRS // 100
    points = min(size, max(1, pairs // size))
    chosen = np.zeros(size, dtype=bool)
    chosen[np.arange(points) * size // points] = True
    datum, first = np.zeros(0, dtype=int), 0
    for each in draws:
        datum = np.append(datum, first + np.arange(len(each.log_guide)) % each.size)
        first += each.size
    rows = np.flatnonzero(chosen[datum])
    columns = zip(*((each.values, each.log_guide, each.log_prior) for each in draws), strict=True)
    values, log_own, log_prior = (torch.cat(column)[rows] for column in columns)
    log_q = _log_sum(runs, values, inside) - math.log(size)
    log_own, log_prior, log_q = torch.stack([log_own, log_prior, log_q]).double().cpu().numpy()
    datum = datum[rows]
    gain, control = log_own - log_q, log_own - log_prior - rate[datum]
    spread = control.var()
    if spread > 0 and len(datum) > 20:
        gain = gain - np.cov(gain, control, ddof=0)[0, 1] / spread * control
    counts = np.bincount(datum, minlength=size)[chosen]
    per_datum = np.bincount(datum, gain, size)[chosen] / counts
    mutual = min(float(per_datum.mean()), math.log(size))
    rest = rate[chosen] - per_datum
    return Information(mutual, _error(per_datum), float(rate.mean()) - mutual, _error(rest))


def _error(values: np.ndarray) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _log_sum(runs: Runs, values: Tensor, inside: Any) -> Tensor:
    """Log of the sum over all data of q(z | x_n), for each row z of `values`.

    `inside` says whether the guide can run inside a plate of draws.
    """
    total = torch.full((len(values),), -math.inf)
    for batch in runs.batches:
        trace = run_trace(runs.guide, batch)
        layout = _layout(trace, runs.plate)
        rows = next(place.batch[place.datum] for place in layout.places.values() if place.datum)
        chunks = values.split(max(1, BUDGET // (rows * values.shape[1])) if inside else 1)
        log_sums = []
        for chunk in chunks:
            draws = draws_plate(runs.model, *batch, draws=len(chunk)) if inside else None
            spread = layout.inside(draws).back(chunk[:, None].expand(-1, rows, -1))
            scored = run_trace(given(runs.guide, trace, spread), batch, draws)
            log_q = log_density(scored, runs.plate).expand(len(chunk), rows)
            log_sums.append(log_q.logsumexp(-1))
        total = torch.logaddexp(total.to(log_sums[0]), torch.cat(log_sums))
    return total
