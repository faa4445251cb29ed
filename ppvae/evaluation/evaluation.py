"""What a fit is worth, per datum and in total, in nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from ppvae._checks import check_count
from ppvae.evaluation.coordinates import Coordinates
from ppvae.evaluation.directions import Directions
from ppvae.evaluation.information import Draws, Information, draws_needed, draws_of, information
from ppvae.evaluation.measures import PER_DATUM, PER_LATENT, Sample
from ppvae.families.family import cap
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.runs import Runs, draws_plate, opened


def evaluate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 512,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool | str = True,
) -> xr.Dataset:
    r"""Measures a guide with local latents on data, without touching a weight or a buffer.

    `ppvae.summary` makes a table of the result, with standard errors, and `ppvae.reading` says in
    words what it means. All values are in nats.

    Per datum (dim `datum`): `distortion` -E log p(x|z); `rate` KL(q(z|x) || p(z)); `objective`
    -(distortion + rate); `elbo`, the same where it is a bound; `log_likelihood` log p(x), from
    below, as the log of the mean importance weight over all draws; `ess`, the effective number of
    those draws; `khat`, the Pareto shape of the weights' tail: above 0.7 neither `log_likelihood`
    nor `ess` can be trusted (0 where all weights are equal; NaN with fewer than 25 draws). `terms`
    (dims `datum`, `site`) splits the objective: log p(x|z) of an observed site, -KL of a latent
    one; where a joint draw gives several latents, log p(z) of each, and `guide` is -log q of all.

    For a point guide (`deterministic`) the rate is the penalty -log p(z) and the objective a
    penalised log-likelihood: no bound, so `elbo` and what needs a density are NaN.

    Per coordinate of the latents (dim `latent`): `mean_variance`, the variance over the data of the
    mean of q, with its standard error `mean_variance_se`; `active`, whether it is above 0.01; `kl`,
    NaN where it does not split over coordinates.

    In total: `mutual_information` I(x;z) under the distribution of these data, at most log N;
    `aggregate_kl` KL(q(z) || p(z)) of the aggregate posterior, what is left of the mean rate; and
    the standard errors `mutual_information_se`, `aggregate_kl_se`.

    Attributes of the result: `bound`, whether the objective is one; `stochastic`, whether two
    encodings of the same data differ; `num_samples`; `family`, `channels` and `cap` (the most that
    one latent of the family can carry, in nats) for a `FamilyGuide`; for a Gaussian likelihood
    `noise_variance` and `directions`, how many principal directions of the data are worth 0.05 nats
    or more to a linear decoder with that noise.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments: data of which the first dimension is that of the data plate.
        num_samples: draws per datum, at least 2.
        batch_size: data per run.
        vectorized: run many draws at once, which the model must be written for (all operations
            leave leading dims alone); by default only where the model says so, as `VAE` does.
        seed: seeds the draws, without a trace outside; None uses the caller's stream.
        plate: name of the data plate; by default `data`, or else the outermost one.
        kwargs: keyword arguments of model and guide; tensors with as many rows as the data plate
            are cut into the same runs.
        progress: show a progress bar if it takes more than some seconds; a string is its label.

    Returns:
        The measures, with dims `datum`, `site` and `latent`.

    Raises:
        ValueError: the data are not finite, an argument is out of its range, or some latent site is
            outside the data plate.

    Burda, Grosse, Salakhutdinov, Importance weighted autoencoders, 2016 (log p(x), active units);
    Vehtari et al., Pareto smoothed importance sampling, 2024; Yao et al., Yes, but did it work?,
    2018 (k-hat of a guide); Hoffman and Johnson, ELBO surgery, 2016.
    """
    check_count("num_samples", num_samples, 2)
    family = getattr(guide, "family", None)
    channels = None if family is None else family.channels
    label = progress if isinstance(progress, str) else "evaluate"
    options: dict[str, Any] = {"kwargs": kwargs, "batch_size": batch_size, "vectorized": vectorized}
    with opened(model, guide, args, seed=seed, plate=plate, **options) as runs:
        whole = terms(*runs.traces, plate)
        whole.check_local()
        few = draws_needed(whole.plate.size) if channels != () else 1
        bar = tqdm(runs.batches, label, disable=not progress, delay=3.0, unit="batch")
        directions, measured, draws = Directions(), [], []
        for batch in bar:
            pairs = [runs.pair(batch) for _ in range(few)]
            directions.add(pairs[0][0], whole.plate)
            measured.append(_measured(_sample(runs, batch, pairs[0], plate, num_samples)))
            if whole.log_guide:
                draws.append(draws_of([(terms(*pair, plate), pair[1]) for pair in pairs]))
        totals = _totals(runs, measured, draws, channels)
    dataset = _dataset(measured, totals)
    dataset.attrs |= {"bound": int(bool(whole.log_guide)), "num_samples": num_samples}
    dataset.attrs |= directions.found()
    if family is not None:
        names = ", ".join(family.channels) or "none"
        dataset.attrs |= {"family": family.name, "channels": names, "cap": cap(family)}
    return dataset


class _Measured(NamedTuple):
    """What is kept of the draws for one minibatch; arrays with the data in front."""

    per_datum: dict[str, np.ndarray]
    terms: dict[str, np.ndarray]
    coordinates: dict[str, np.ndarray]
    labels: list[Any]
    differ: bool


def _measured(sample: Sample) -> _Measured:
    per_datum = {name: measure(sample) for name, measure in PER_DATUM.items()}
    coordinates = sample.coordinates
    arrays = coordinates.arrays()
    return _Measured(per_datum, sample.terms, arrays, coordinates.labels, coordinates.differ)


def _sample(
    runs: Runs, args: tuple[Any, ...], pair: tuple[Any, Any], plate: str | None, num_samples: int
) -> Sample:
    """Draws for one minibatch, summed up; `pair` is a pair of traces on it."""
    first = terms(*pair, plate)
    point, total = not first.log_guide, num_samples if first.log_guide else 2
    coordinates = Coordinates(*pair, first.plate)
    log_weight = []
    sums: dict[str, Any] = dict.fromkeys(_by_site(first), 0.0)
    for count, draws in runs.draws(args, total, pair):
        model_trace, guide_trace = runs.pair(args, draws)
        read = terms(model_trace, guide_trace, plate)
        size = (count, first.plate.size)
        log_weight.append(read.log_weight.expand(size).double())
        for name, value in _by_site(read).items():
            sums[name] = sums[name] + value.expand(size).double().sum(0)
        coordinates.add(guide_trace, draws)
    means = {name: (value / total).cpu().numpy() for name, value in sums.items()}
    return Sample(torch.cat(log_weight), means, tuple(first.log_likelihood), point, coordinates)


def _by_site(parts: Terms) -> dict[str, torch.Tensor]:
    """The objective by site; what belongs to a joint draw of several sites is called `guide`."""
    by_site = dict(parts.log_likelihood)
    for name, value in parts.log_prior.items():
        if name in parts.kl:
            by_site[name] = -parts.kl[name]
        else:
            by_site[name] = value - parts.log_guide.get(name, torch.zeros(()))
    joint = [value for name, value in parts.log_guide.items() if name not in parts.log_prior]
    if joint:
        by_site["guide"] = -sum(joint, start=torch.zeros(()))
    return by_site


def _totals(
    runs: Runs, measured: list[_Measured], draws: list[Draws], channels: tuple[str, ...] | None
) -> Information:
    """What the latents tell of the data; NaN for a point, which has no density."""
    if not draws:
        return Information(*[math.nan] * 4)
    rate = np.concatenate([each.per_datum["rate"] for each in measured])
    # a family with channels never runs its model; one without runs it, decoder and all
    inside = runs.vectorized or channels
    dim = draws_plate(runs.model, *runs.batches[0], draws=2).dim if inside else None
    few = dim is None or channels == ()
    return information(runs.guide, runs.batches, draws, rate, runs.plate, dim, few=few)


def _dataset(measured: list[_Measured], totals: Information) -> xr.Dataset:
    def joined(tables: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}

    variables: dict[str, Any] = {}
    for name, values in joined([each.per_datum for each in measured]).items():
        variables[name] = ("datum", values, {"unit": PER_DATUM[name].unit})
    by_site = joined([each.terms for each in measured])
    variables["terms"] = (("datum", "site"), np.stack(list(by_site.values()), -1))
    arrays = joined([each.coordinates for each in measured])
    for name, measure in PER_LATENT.items():
        variables[name] = ("latent", measure(arrays), {"unit": measure.unit})
    variables |= {name: ((), value) for name, value in totals._asdict().items()}
    coords = {"site": list(by_site), "latent": measured[0].labels}
    attrs = {"stochastic": int(any(each.differ for each in measured))}
    return xr.Dataset(variables, coords, attrs)
