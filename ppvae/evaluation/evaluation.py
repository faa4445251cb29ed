"""What a fit is worth, per datum and in total, in nats."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from ppvae._checks import check_count, check_label
from ppvae._process import exclusive
from ppvae.evaluation.coordinates import coordinates
from ppvae.evaluation.directions import directions, moments_of
from ppvae.evaluation.hierarchy import by_parts, why_unknown
from ppvae.evaluation.information import draws_needed, draws_of, information
from ppvae.evaluation.measures import PER_DATUM, PER_LATENT, Sample
from ppvae.evaluation.responsibilities import Responsibilities
from ppvae.families.family import cap
from ppvae.guides.encoding import encoded_once
from ppvae.objectives.trace_terms import Terms, has_masked_latents, terms
from ppvae.programs.runs import Runs, opened
from ppvae.programs.tracing import Args
from ppvae.programs.verdicts import verdict_of


@exclusive
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
    r"""Measures a guide on data, without touching a weight or a buffer.

    `ppvae.summary` makes a table of the result, with standard errors, and `ppvae.reading` says in
    words what it means. All values are in nats, and of the model's own densities: a weight that
    `pyro.poutine.scale` gives them in training is left out, here as in all functions that measure.

    Per datum (dim `datum`): `distortion` -E log p(x|z); `rate` KL(q(z|x) || p(z)); `objective`
    -(distortion + rate); `elbo`, the same where it is a bound; `log_likelihood` log p(x), from
    below, as the log of the mean importance weight over all draws; `ess`, the effective number of
    those draws; `khat`, the Pareto shape of the weights' tail: above 0.7 neither `log_likelihood`
    nor `ess` can be trusted (0 where all weights are equal; NaN with fewer than 30 draws). `terms`
    (dims `datum`, `site`) splits the objective: log p(x|z) of an observed site, -KL of a latent
    one; where a joint draw gives several latents, log p(z) of each, and `guide` is -log q of all.

    For a point guide (`deterministic`) the rate is the penalty -log p(z) and the objective a
    penalised log-likelihood: no bound, so `elbo` and what needs a density are NaN.

    Per coordinate of the latents (dim `latent`): `mean_variance`, the variance over the data of the
    mean of q, with its standard error `mean_variance_se`; `active`, whether it is above 0.01; `kl`,
    NaN where it does not split over coordinates.

    In total: `mutual_information` I(x;z) under the distribution of these data, at most log N;
    `aggregate_kl` KL(q(z) || p(z)) of the aggregate posterior, what is left of the mean rate; and
    the standard errors `mutual_information_se`, `aggregate_kl_se`. They are NaN where some data
    have latents that others have not, since the model masks them.

    **Global latents** belong to all the data. Then the result has totals, in nats of all data:
    `total_elbo` with its Monte Carlo error `total_elbo_se`; `log_evidence` log p(x) by importance
    sampling, with `evidence_ess` and `evidence_khat` of the globals; `log_evidence_se`, its error
    with what the local latents may lower it by, NaN where their weights do not tell, which its
    attribute `reason` says; and
    `global_rate`, what the globals cost. Numbers per datum are given the globals, averaged over 32
    draws of them, each with an eighth of `num_samples` draws of the local latents of every datum;
    of a guide that draws no local latents by themselves (or a model in which something outside of
    the data plate depends on them), `num_samples` draws count, and there are no `ess` and `khat`
    per datum; and where it draws local latents together with others, the rates are NaN, since they
    cannot be told apart. `terms`, numbers per latent, mutual information and aggregate KL
    are left out. All data are in one run.

    **Discrete latents** that are summed out have their posterior probabilities, averaged over the
    draws of the guide: `part_responsibility` for a site `part` (dims `datum`, `part_value`).

    Attributes of the result: `bound`, whether the objective is one; `stochastic`, whether two
    encodings of the same data differ; `num_samples`; `family`, `channels` and `cap` (the most that
    one latent of the family can carry, in nats) for a `FamilyGuide`; for a Gaussian likelihood
    `noise_variance` and `directions`, how many principal directions of the data are worth 0.05 nats
    or more to a linear decoder with that noise; and, for one with a scale, if there are any,
    `copied`, how many values of a datum have noise of a thousandth of their spread or less.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments: data of which the first dimension is that of the data plate.
        num_samples: draws per datum, at least 2.
        batch_size: data per run.
        vectorized: run many draws at once, which the model must be written for (all operations
            leave leading dims alone); by default only where the model says so, as `VAE` does.
        seed: seeds the draws: 0 in all functions that measure, so that equal calls give equal
            numbers. The caller's stream stays where it was; None draws from that stream.
        plate: name of the data plate; by default `data`, or else of the plates around observed
            sites the one that has the length of the data.
        kwargs: keyword arguments of model and guide; tensors with as many rows as the data plate
            are cut into the same runs.
        progress: show a progress bar, if it takes longer than some seconds; a string is its label.

    Returns:
        The measures, with dims `datum`, `site` and `latent`; each has the attribute `unit`. The
        attribute `verdict`, if there is one, is that of the last `fit`.

    Raises:
        ValueError: the data are not finite, or an argument is out of its range.

    Burda, Grosse, Salakhutdinov, Importance weighted autoencoders, 2016 (log p(x), active units);
    Vehtari et al., Pareto smoothed importance sampling, 2024; Yao et al., Yes, but did it work?,
    2018 (k-hat of a guide); Hoffman and Johnson, ELBO surgery, 2016.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=torch.nn.Linear(5, 8))
        >>> result = evaluate(model, guide, torch.randn(20, 5))
        >>> bool(result.elbo.mean() < result.log_likelihood.mean()), result.elbo.attrs["unit"]
        (True, 'nats per datum')
    """
    num_samples = check_count("num_samples", num_samples, 2)
    family = getattr(guide, "family", None)
    channels = None if family is None else family.channels
    shown, label = check_label("progress", progress, "evaluate")
    moments, measured, draws = [], [], []
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        whole = terms(*runs.traces, plate)
        if not (whole.is_local and whole.log_prior):
            dataset = _of_all(runs, num_samples)
            dataset.attrs |= {"bound": int(whole.is_dense), "num_samples": num_samples}
            dataset.attrs |= _of_family(family) | verdict_of(model, guide)
            return dataset
        ragged = False
        few = draws_needed(runs.plate.size) if channels != () else 1
        for batch in tqdm(runs.batches, label, disable=not shown, delay=3.0, unit="batch"):
            with encoded_once():
                pairs = [runs.pair(batch) for _ in range(few)]
                moments.append(moments_of(pairs[0][0], runs.plate))
                sample, shares = _sample(runs, batch, pairs[0], num_samples)
            measured.append(_measured(sample) | shares.arrays())
            ragged |= has_masked_latents(pairs[0][0])
            if whole.log_guide:
                draws.append(draws_of(pairs, runs.plate))
        arrays = {name: np.concatenate([each[name] for each in measured]) for name in measured[0]}
        totals = information(runs, [] if ragged else draws, arrays["rate"], channels)
    coords = {"site": list(sample.terms), "latent": sample.coordinates.layout.labels}
    summed, own = shares.variables(arrays)
    dataset = xr.Dataset(_variables(arrays, totals) | summed, coords | own)
    dataset.attrs = {"stochastic": int(arrays["differ"].any()), "bound": int(bool(draws))}
    dataset.attrs |= {"num_samples": num_samples, **directions(moments)}
    dataset.attrs |= _of_family(family) | verdict_of(model, guide)
    return dataset


def _of_family(family: Any) -> dict[str, Any]:
    """What the result says of the guide's family, if it has one."""
    if family is None:
        return {}
    names = ", ".join(family.channels) or "none"
    return {"family": family.name, "channels": names, "cap": cap(family)}


def _of_all(runs: Runs, num_samples: int) -> xr.Dataset:
    """The result for a model some of whose latents belong to all the data."""
    shares = Responsibilities()
    arrays, totals = by_parts(runs, num_samples, shares)
    units = {name: measure.unit for name, measure in PER_DATUM.items()}
    variables: dict[str, Any] = {}
    if runs.plate is not None:
        variables = {k: ("datum", v, {"unit": units[k]}) for k, v in arrays.items()}
    for name, value in totals.items():
        unit = {"evidence_ess": "draws", "evidence_khat": ""}.get(name, "nats")
        variables[name] = ((), value, {"unit": unit})
    if math.isnan(totals["log_evidence_se"]) and not math.isnan(totals["log_evidence"]):
        variables["log_evidence_se"][2]["reason"] = why_unknown(arrays["khat"])
    summed, coords = shares.variables(shares.arrays())
    return xr.Dataset(variables | summed, coords)


def _sample(
    runs: Runs, args: Args, pair: tuple[Any, Any], num_samples: int
) -> tuple[Sample, Responsibilities]:
    """Draws for one minibatch, summed up; `pair` is a pair of traces on it."""
    first = terms(*pair, runs.plate.name)
    point, total = not first.log_guide, num_samples if first.log_guide else 2
    latents, shares = coordinates(*pair, first.plate), Responsibilities()
    log_weight = []
    sums: dict[str, Any] = dict.fromkeys(_by_site(first), 0.0)
    for count, draws in runs.draws(args, total, pair):
        model_trace, guide_trace = runs.pair(args, draws)
        parts = terms(model_trace, guide_trace, runs.plate.name)
        size = (count, first.plate.size)
        log_weight.append(parts.log_weight.expand(size).double())
        for name, value in _by_site(parts).items():
            sums[name] = sums[name] + value.expand(size).double().sum(0)
        latents.add(guide_trace, draws)
        shares.add(model_trace, count, first.plate, draws)
        del model_trace, guide_trace, parts  # the next run wants their memory
    means = {name: (value / total).cpu().numpy() for name, value in sums.items()}
    sample = Sample(torch.cat(log_weight), means, tuple(first.log_likelihood), point, latents)
    return sample, shares


def _by_site(parts: Terms) -> dict[str, torch.Tensor]:
    """The objective by site; what belongs to a joint draw of several sites is called `guide`."""
    by_site = dict(parts.log_likelihood)
    for name, value in parts.log_prior.items():
        log_q = parts.log_guide.get(name, torch.zeros(()))
        by_site[name] = -parts.kl[name] if name in parts.kl else value - log_q
    joint = [value for name, value in parts.log_guide.items() if name not in parts.log_prior]
    if joint:
        by_site["guide"] = -sum(joint, start=torch.zeros(()))
    return by_site


def _measured(sample: Sample) -> dict[str, np.ndarray]:
    """What is kept of the draws for one minibatch; all arrays have the data in front."""
    nothing = np.full(sample.log_weight.shape[1], math.nan)
    arrays = {
        name: nothing if measure.density and sample.point else measure.function(sample)
        for name, measure in PER_DATUM.items()
    }
    by_site = np.stack(list(sample.terms.values()), -1)
    return arrays | {"terms": by_site} | sample.coordinates.arrays()


def _variables(arrays: dict[str, np.ndarray], totals: dict[str, float]) -> dict[str, Any]:
    """The variables of the result, with their units, from the arrays of all data."""
    variables: dict[str, Any] = {}
    for name, measure in PER_DATUM.items():
        variables[name] = ("datum", arrays[name], {"unit": measure.unit})
    variables["terms"] = (("datum", "site"), arrays["terms"], {"unit": "nats per datum"})
    for name, measure in PER_LATENT.items():
        variables[name] = ("latent", measure.function(arrays), {"unit": measure.unit})
    for name, value in totals.items():
        variables[name] = ((), value, {"unit": "nats per datum"})
    return variables
