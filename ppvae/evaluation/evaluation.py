"""What a fit is worth, per datum and in total, in nats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from ppvae._scopes import eval_mode, private_modules, random_state, unchecked
from ppvae.data.adapters import prepared
from ppvae.evaluation.coordinates import Coordinates, Directions
from ppvae.evaluation.information import Draws, Information, draws_needed, draws_of, information
from ppvae.families.family import cap
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.objectives.weights import (
    effective_sample_size,
    khat,
    log_mean_weight,
)
from ppvae.programs.layout import drawn_rows
from ppvae.programs.nodes import latent_nodes
from ppvae.programs.runs import draw_runs, draws_plate, is_vectorized, minibatches, trace_pair


def evaluate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 512,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    progress: bool = True,
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
        progress: show a progress bar if it takes more than some seconds.

    Returns:
        The measures, with dims `datum`, `site` and `latent`.

    Raises:
        ValueError: the data are not finite, an argument is out of its range, or some latent site is
            outside the data plate.

    Burda, Grosse, Salakhutdinov, Importance weighted autoencoders, 2016 (log p(x), active units);
    Vehtari et al., Pareto smoothed importance sampling, 2024; Yao et al., Yes, but did it work?,
    2018 (k-hat of a guide); Hoffman and Johnson, ELBO surgery, 2016.
    """
    if num_samples < 2 or batch_size < 1:
        raise ValueError(
            f"num_samples, batch_size: expected at least 2 and 1, got {num_samples}, {batch_size}"
        )
    args = prepared(args)
    vectorized = is_vectorized(model) if vectorized is None else vectorized
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model, guide):
        with unchecked():
            pair = _Pair(model, guide, plate, vectorized)
            parts = pair.run(args)[0]
            parts.check_local()
            batches = minibatches(model, guide, args, parts.plate, batch_size, plate)
            few = draws_needed(parts.plate.size) if pair.channels != () else 1
            bar = tqdm(batches, "evaluate", disable=not progress, delay=3.0, unit="batch")
            directions = Directions()
            found = [_Batch(pair, batch, num_samples, few, directions) for batch in bar]
            told = _told(pair, batches, found)
    dataset = _dataset(found, told)
    family = getattr(guide, "family", None)
    dataset.attrs |= {"num_samples": num_samples, **directions.found()}
    if family is not None:
        channels = ", ".join(family.channels) or "none"
        dataset.attrs |= {"family": family.name, "channels": channels, "cap": cap(family)}
    return dataset


class _Pair(NamedTuple):
    """A model and its guide, and how to run them."""

    model: Any
    guide: Any
    plate: str | None
    vectorized: bool

    def run(self, args: tuple[Any, ...], draws: Any = None) -> tuple[Terms, Any, Any]:
        """The terms, the model's trace and the guide's."""
        traces = trace_pair(self.model, self.guide, *args, draws=draws)
        return terms(*traces, self.plate), *traces

    def read(self, args: tuple[Any, ...], draws: Any) -> tuple[Tensor, ...]:
        """Of a run: log weights, draws `(draws, batch, coordinates)`, the objective by site."""
        parts, model_trace, guide_trace = self.run(args, draws)
        size = (1 if draws is None else draws.size, parts.plate.size)
        sites = [value.expand(size) for value in _by_site(parts).values()]
        dim = None if draws is None else draws.dim
        rows = drawn_rows(guide_trace, latent_nodes(model_trace), parts.plate, dim)
        return parts.log_weight.expand(size), rows, *sites

    @property
    def channels(self) -> tuple[str, ...] | None:
        """The channels of a family's guide; None for another guide."""
        return getattr(getattr(self.guide, "family", None), "channels", None)


class _Batch:
    """The measures of one minibatch.

    Attributes:
        data: name -> array of shape `(batch,)`.
        terms: site -> its part of the objective, `(batch,)`.
        coordinates: what `Coordinates.arrays` gives, and `names` their labels.
        draws: a few draws per datum, with their densities; None for a point.
        frame: the data plate.
        differ: whether two draws differ.
    """

    def __init__(
        self,
        pair: _Pair,
        args: tuple[Any, ...],
        num_samples: int,
        few: int,
        directions: Directions,
    ) -> None:
        runs = [pair.run(args) for _ in range(few)]
        parts, model_trace, guide_trace = runs[0]
        directions.add(model_trace, parts.plate)
        self.frame, point = parts.plate, not parts.log_guide
        read = [(run[0], run[2]) for run in runs]
        self.draws: Draws | None = None if point else draws_of(read)
        nodes = latent_nodes(model_trace) + latent_nodes(guide_trace)
        widest = max(
            [n["value"].numel() for n in nodes] + [a.numel() for a in args if isinstance(a, Tensor)]
        )
        coordinates = Coordinates(model_trace, guide_trace, self.frame)
        total = 2 if point else num_samples
        weights: list[Tensor] = []
        sums: dict[str, Any] = {}
        at_once = widest if pair.vectorized else None
        names = list(_by_site(parts))
        for _, draws in draw_runs(pair.model, args, total, at_once):
            log_w, rows, *values = pair.read(args, draws)
            weights.append(log_w.double())
            for name, value in zip(names, values, strict=True):
                sums[name] = sums.get(name, 0) + value.double().sum(0)
            coordinates.add(rows)
        log_w = torch.cat(weights)
        self.terms = {name: (value / total).cpu().numpy() for name, value in sums.items()}
        self.names, self.differ = coordinates.names, coordinates.differ
        self.coordinates = coordinates.arrays()
        log_likelihood = log_mean_weight(log_w)
        self.data = {
            "distortion": -sum(self.terms[name] for name in parts.log_likelihood),
            "rate": -sum(v for k, v in self.terms.items() if k not in parts.log_likelihood),
            "log_likelihood": log_likelihood.cpu().numpy(),
            "ess": effective_sample_size(log_w).cpu().numpy(),
            "khat": khat(log_w).numpy(),
        }
        self.data["objective"] = -(self.data["distortion"] + self.data["rate"])
        self.data["elbo"] = self.data["objective"]
        if point:
            nothing = np.full(len(log_likelihood), math.nan)
            self.data |= dict.fromkeys(("log_likelihood", "ess", "khat", "elbo"), nothing)


def _by_site(parts: Terms) -> dict[str, Tensor]:
    """The parts of the objective; those of joint draws, which are of no one site, as `guide`."""
    found = dict(parts.log_likelihood)
    for name, value in parts.log_prior.items():
        if name in parts.kl:
            found[name] = -parts.kl[name]
        else:
            found[name] = value - parts.log_guide.get(name, torch.zeros(()))
    joint = [value for name, value in parts.log_guide.items() if name not in parts.log_prior]
    if joint:
        found["guide"] = -sum(joint, start=torch.zeros(()))
    return found


def _told(pair: _Pair, batches: list[Any], found: list[_Batch]) -> Information | None:
    """What the latents tell of the data; None for a point, whose density there is not."""
    draws = [batch.draws for batch in found if batch.draws is not None]
    if not draws:
        return None
    rate = np.concatenate([batch.data["rate"] for batch in found])
    # a family with channels never runs its model; one without runs it, decoder and all
    inside = pair.vectorized or pair.channels
    dim = draws_plate(pair.model, *batches[0], draws=2).dim if inside else None
    few = dim is None or pair.channels == ()
    return information(pair.guide, batches, draws, rate, found[0].frame, dim, few=few)


def _dataset(found: list[_Batch], told: Information | None) -> xr.Dataset:
    def joined(part: str) -> dict[str, np.ndarray]:
        pieces = [getattr(batch, part) for batch in found]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    data, by_site = joined("data"), joined("terms")
    variables: dict[str, Any] = {name: ("datum", value) for name, value in data.items()}
    variables["terms"] = (("datum", "site"), np.stack(list(by_site.values()), -1))
    coordinates = joined("coordinates")
    away = (coordinates["mean"] - coordinates["mean"].mean(0)) ** 2 - coordinates["error"]
    spread, size = away.mean(0), len(away)
    variables["mean_variance"] = ("latent", np.maximum(spread, 0.0))
    variables["mean_variance_se"] = ("latent", away.std(0) / math.sqrt(size))
    variables["active"] = ("latent", spread > 0.01)
    variables["kl"] = ("latent", coordinates["kl"].mean(0))
    nothing = Information(*[math.nan] * 4)
    variables |= {name: ((), value) for name, value in (told or nothing)._asdict().items()}
    attrs = {"bound": int(told is not None), "stochastic": int(any(b.differ for b in found))}
    coords = {"site": list(by_site), "latent": found[0].names}
    return xr.Dataset(variables, coords, attrs)
