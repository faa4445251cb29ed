r"""What a latent tells of its datum: mutual information, the aggregate posterior, and their limit.

With the aggregate posterior `q(z) = mean_n q(z | x_n)` of the data at hand, the rate splits into
`mean_n KL(q(z | x_n) || p(z)) = I(x; z) + KL(q(z) || p(z))` (Hoffman and Johnson, ELBO surgery,
2016). All values are in nats per datum.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae.objectives.trace_terms import log_density, terms
from ppvae.programs.layout import Layout, Place
from ppvae.programs.nodes import drawn_nodes
from ppvae.programs.runs import BUDGET, Runs
from ppvae.programs.tracing import draws_plate, given, run_trace

_PAIRS = 10_000_000  # of a draw and a datum; with more data fewer draws are compared with them
_TOTALS = "mutual_information", "mutual_information_se", "aggregate_kl", "aggregate_kl_se"


def draws_needed(size: int) -> int:
    """How many draws of each of so many data make a good estimate at a low price."""
    return max(1, min(32, _PAIRS // 10 // size**2))


def draws_of(pairs: Sequence[tuple[Any, Any]], plate: Any) -> list[Tensor]:
    """Reads the draws off some pairs of traces of model and guide on one minibatch.

    Returns:
        The values of all sites of the guide, shape `(draws, datum, coordinates)`; log q(z | x) of
        each draw, and its log p(z), both of shape `(draws, datum)`.
    """
    layout = _layout(pairs[0][1], plate)
    draws = []
    for pair in pairs:
        sites = terms(*pair, plate.name)
        values = layout.flat({name: pair[1].nodes[name]["value"] for name in layout.places})[0]
        log_prior = sites.total(sites.log_prior)
        draws.append((values, sites.log_q.expand(len(values)), log_prior.expand(len(values))))
    return [torch.stack(column) for column in zip(*draws, strict=True)]


def _layout(guide_trace: Any, plate: Any) -> Layout:
    """The coordinates of all that a guide draws, auxiliary sites among it."""
    nodes = drawn_nodes(guide_trace)
    return Layout({name: Place.of(node, plate) for name, node in nodes.items()})


def information(
    runs: Runs, draws: Sequence[list[Tensor]], rate: np.ndarray, channels: tuple[str, ...] | None
) -> dict[str, float]:
    r"""Mutual information and aggregate KL, from draws for each datum against all the data.

    `log q(z | x_n) - log q(z)` has mean I and is never above log N, since q(z) holds the draw's
    own `q(z | x_n) / N`. `log q(z | x_n) - log p(z)` less the known rate has mean zero; it is used
    as a control variate, with the coefficient that regression finds. Of very many data, evenly
    spaced ones give the draws.

    Args:
        runs: a model and its guide, which has local latents.
        draws: `draws_of` each minibatch; an empty list for a point, whose values are NaN, and where
            data have different latents, since the model masks some: they have no aggregate.
        rate: KL(q(z | x) || p(z)) per datum, shape `(N,)`.
        channels: the channels of the guide's family, or None for a guide of another kind.

    Returns:
        `mutual_information`, which is I(x; z) under the distribution of the data at hand and at
        most log N, and `aggregate_kl`, which is KL(q(z) || p(z)) of the aggregate posterior; each
        with its standard error, under the same name with `_se`. NaN where a rate is infinite.
    """
    if not draws or not np.isfinite(rate).all():
        return dict.fromkeys(_TOTALS, math.nan)
    # a family with channels never runs its model, and so can run inside a plate of draws; one
    # without runs it, decoder and all, and then fewer pairs must do
    inside, size = bool(runs.vectorized or channels), len(rate)
    pairs = _PAIRS if inside and channels != () else _PAIRS // 100
    count = min(size, max(1, pairs // size))
    chosen = np.arange(count) * size // count
    columns = zip(*draws, strict=True)
    values, log_own, log_prior = (torch.cat(column, 1)[:, chosen] for column in columns)
    log_sums = _log_sum(runs, values.flatten(0, 1), inside).reshape(log_own.shape)
    logs = torch.stack([log_own, log_prior, log_sums - math.log(size)])
    log_own, log_prior, log_q = logs.double().cpu().numpy()
    gain, control = log_own - log_q, log_own - log_prior - rate[chosen]
    spread = control.var()
    if spread > 0 and control.size > 20:
        covariance = np.cov(gain.ravel(), control.ravel(), ddof=0)[0, 1]
        gain = gain - covariance / spread * control
    per_datum = gain.mean(0)
    mutual = min(float(per_datum.mean()), math.log(size))
    errors = _error(per_datum), _error(rate[chosen] - per_datum)
    totals = mutual, errors[0], float(rate.mean()) - mutual, errors[1]
    return dict(zip(_TOTALS, totals, strict=True))


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
