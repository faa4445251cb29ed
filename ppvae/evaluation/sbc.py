"""Simulation-based calibration: whether the intervals of a guide cover what they promise."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuideList, AutoNormal
from torch import Tensor, nn
from tqdm.auto import tqdm

from ppvae._checks import check_array, check_count, check_label, check_real, expect
from ppvae._process import apart, exclusive
from ppvae._scopes import eval_mode, param_store, private_modules, random_state, unchecked
from ppvae.evaluation.ranks import ALPHA, coverage, uniformity, verdict
from ppvae.guides.family_guide import FamilyGuide
from ppvae.guides.score import terms_at
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.objectives.weights import log_mean_weight
from ppvae.programs.keywords import prepared_call
from ppvae.programs.layout import Layout
from ppvae.programs.nodes import counts, prototype, summed_nodes
from ppvae.programs.plates import data_plate, is_inside
from ppvae.programs.runs import draw_runs, minibatches
from ppvae.programs.simulation import Simulation, simulate
from ppvae.programs.tracing import Args, is_vectorized, run_trace, trace_pair

Arguments = Callable[[Mapping[str, Tensor]], tuple[Any, ...]]
Arrays = dict[str, np.ndarray]


@exclusive
def calibration(  # noqa: D417
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_simulations: int | None = None,
    num_samples: int = 399,
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    refit: Callable[..., Any] | None = None,
    arguments: Arguments | None = None,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool | str = True,
) -> xr.Dataset:
    r"""Simulates data from the model and ranks the latents they came from among the guide's draws.

    A latent drawn with its data from the model is a draw from the exact posterior. Under the exact
    guide its rank is uniform, and a central interval covers it as often as its level says. It is
    so under the prior too, which has learned nothing: so two measures in nats stand beside.

    - `information` is `E[log q(z*|x) - log p(z*)]` at the simulated latents `z*`. It equals the
      model's mutual information less the mean of KL(p(z|x) || q(z|x)): zero for a guide equal to
      the prior, negative for one further from the posterior than the prior is, and largest for
      the exact guide. It needs no estimate of log p(x).
    - `gap` is log p(x) - ELBO, with log p(x) by importance sampling, and too small where the
      weights vary much. `gap_upper` is too large instead: the simulated latent joins the draws.
      The true gap lies between their means, and for the exact guide both are zero for any draws.
      They are infinite where a draw of the guide gives the data a density of zero.

    Local latents (an encoder): each datum is a simulation, and the guide answers as it is. Global
    latents: each simulation is a whole data set, on which `refit` trains a copy of the guide.

    Args:
        model: a Pyro model whose sample statements are a recipe for data (see `simulate`).
        guide: its guide; it is not changed.
        *args: their arguments: the shapes of the data, and all that the model does not observe.
        num_simulations: by default the number of data, 1000 at most, or 100 data sets where there
            is `refit`.
        num_samples: draws of the guide per simulation, at least 2. With one less than a multiple
            of 40, the default levels end between two ranks; else an interval takes a part of one.
        levels: of the central intervals, each in (0, 1).
        refit: called as `refit(model, guide, *args)` with copies and simulated data; it trains the
            guide, starting from where the user's is, as in `lambda model, guide, *args:
            fit(model, guide, args, progress=False)`. The parameters of the model are frozen: it is
            the truth here. For a guide of global latents that needs no training, a function that
            does nothing.
        arguments: from the drawn values of observed sites to the arguments, see `simulate`.
        batch_size, vectorized, plate, progress: as for `evaluate`.
        seed: as for `evaluate`; with one seed all guides of a model see the same simulated data.
        kwargs: as for `evaluate`; `refit` gets their values too, behind the others.

    Returns:
        A dataset with dims `simulation`, `latent` (`z[0]`, `weight[3]`: all coordinates of all
        sites) and `level`. `rank`: number of draws below the truth, ties split at random,
        from 0 to `num_samples`. `coverage`: share of the simulations with the truth inside, with
        `coverage_se`. `uniformity_p`: exact p-value of uniform ranks, from the largest departure
        of their cumulative distribution. `information`, `gap`, `gap_upper` with `*_se`: nats per
        datum, or per data set with `refit` (`attrs["unit"]`); NaN for a point, which has no
        density (`attrs["note"]` says why). `attrs["reading"]` says it in words, and
        `attrs["calibrated"]` whether no latent fails at 1 %, shared among them (Bonferroni).

    Raises:
        ValueError: an argument is out of its range; `refit` is missing; guide and model do not
            fit; the model cannot be simulated from.
        TypeError: `refit` is no function.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(0.1))
        >>> guide = FamilyGuide(model, families.noise_only)
        >>> result = calibration(model, guide, torch.zeros(50, 5), progress=False)
        >>> result.reading[:50]
        'passes, and passes nothing: the guide is the prior'

    Talts et al., Validating Bayesian inference algorithms with simulation-based calibration, 2018;
    Säilynoja et al., Graphical test for discrete uniformity, 2022 (the p-value); Grosse et al.,
    Sandwiching the marginal likelihood, 2015 (the upper gap).
    """
    num_samples = check_count("num_samples", num_samples, 2)
    batch_size = check_count("batch_size", batch_size)
    shares = check_array("levels", check_real("levels", levels), ("levels",)).tolist()
    inside = len(shares) > 0 and all(0 < share < 1 for share in shares)
    expect(inside, "levels", "numbers in (0, 1), at least one", levels)
    for name, each in {"refit": refit, "arguments": arguments}.items():
        known, kind = each is None or callable(each), type(each).__name__
        expect(known, name, "a function", kind, TypeError)
    shown, label = check_label("progress", progress, "calibration")
    vectorized = is_vectorized(model, vectorized)
    model, guide, args = prepared_call(model, guide, args, kwargs, missing=False)
    with private_modules(), random_state(seed):
        data, labels = _plate_and_labels(model, guide, args, plate, local=refit is None)
        plan = _Plan(model, guide, data, num_samples, vectorized, arguments, refit)
        if num_simulations is None:
            num_simulations = min(data.size, 1000) if refit is None else 100
        total = check_count("num_simulations", num_simulations, 2)
        with tqdm(total=total, desc=label, disable=not shown, unit="simulation") as bar:
            arrays = _repeated(plan, args, min(batch_size, total), bar)
    return _dataset(arrays, plan, labels, shares)


class _Plan(NamedTuple):
    """How data are simulated and how the guide answers for them.

    Attributes:
        model: the model.
        guide: its guide.
        plate: the data plate.
        num_samples: draws of the guide per simulation.
        vectorized: whether many draws are made in one run.
        arguments: from the drawn values of observed sites to the arguments.
        refit: trains a copy of the guide on a whole data set, which is one simulation then; with
            None each datum is one.
    """

    model: Any
    guide: Any
    plate: Any
    num_samples: int
    vectorized: bool
    arguments: Arguments | None
    refit: Callable[..., Any] | None

    def per_simulation(self, value: Tensor, sites: Terms, size: torch.Size) -> Tensor:
        """Nats per datum, or of all data, as `(draws, simulations)` of that size."""
        if self.refit is not None:
            value = (value.sum(-1) if sites.is_local else value)[..., None]
        return value.double().expand(size)


def _plate_and_labels(
    model: Any, guide: Any, args: Args, plate_name: str | None, *, local: bool
) -> tuple[Any, list[str]]:
    """The data plate, and the names of the coordinates of the latents.

    Raises:
        ValueError: the guide must be trained on the data first, or some of the data are missing.
    """
    with torch.no_grad(), eval_mode(model), random_state(None, keep=True):
        trace = prototype(model, args, {})
    plate = data_plate(trace, plate_name)
    if local:
        why = _needs_training(guide, trace, plate)
        wanted = "a function that trains a copy of the guide on simulated data"
        expect(not why, "refit", f"{wanted}, since {why}", None)
    elif plate is not None and plate.full_size is not None:
        wanted, rows = f"all the data in the plate {plate.name!r} with `refit`", plate.full_size
        expect(plate.size == rows, "model", wanted, f"{plate.size} of {rows}")
    places = Layout.of(trace, plate if local else None).places
    summed = {node["name"] for node in summed_nodes(trace)}  # not ranked, unless the guide has them
    if summed:
        with torch.no_grad(), eval_mode(model, guide), random_state(None, keep=True):
            drawn = run_trace(guide, args)
        summed -= set(drawn.nodes)
    return plate, [v for name, p in places.items() if name not in summed for v in p.labels]


def _needs_training(guide: Any, trace: Any, plate: Any) -> str:
    """Why a guide must be trained on data before it can answer for them; empty if it need not."""
    if plate is None:
        return "the model has no plate over its data"
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample" and counts(node)]
    outside = [node["name"] for node in nodes if not is_inside(node, plate)]
    if outside:
        return f"the sites {outside} are outside the plate {plate.name!r}"
    single = "the parameters of a guide without encoder are those of one data set"
    return "" if _is_amortized(guide) else single


def _is_amortized(guide: Any) -> bool:
    """Whether a guide can answer for data that it was not trained on, as far as one can tell."""
    if isinstance(guide, AutoGuideList):
        return all(_is_amortized(part) for part in guide)
    if isinstance(guide, FamilyGuide):
        return guide.encoder is not None or not guide.family.channels
    return not isinstance(guide, (AutoContinuous, AutoDelta, AutoNormal))


def _repeated(plan: _Plan, args: Args, batch_size: int, bar: Any) -> Arrays:
    """What is measured of as many simulations as the bar has room for."""
    batches, total = [args], bar.total
    if plan.refit is None:
        with torch.no_grad(), eval_mode(plan.model, plan.guide):
            batches = minibatches(plan.model, plan.guide, args, plan.plate, batch_size)
    # a seed for each simulation: the data do not depend on what a guide draws, or a refit
    seeds = torch.randint(2**31, (1 if plan.refit is None else 2, total)).tolist()
    results, done = [], 0
    for batch, *pair in zip(itertools.cycle(batches), seeds[0], seeds[-1], strict=False):
        results.append(_simulated(plan, batch, *pair))
        done += len(results[-1]["rank"])
        bar.update(min(done, total) - bar.n)
        if done >= total:
            break
    return {k: np.concatenate([result[k] for result in results])[:total] for k in results[0]}


def _simulated(plan: _Plan, args: Args, seed: int, refit_seed: int) -> Arrays:
    """Simulates data and measures the guide on them, or a copy that was trained on them."""
    simulation = simulate(plan.model, *args, seed=seed, arguments=plan.arguments)
    if plan.refit is None:
        return _measured(plan, plan.guide, simulation)
    frozen, trained = copy.deepcopy((plan.model, plan.guide))
    if isinstance(frozen, nn.Module):
        frozen.requires_grad_(requires_grad=False)
    with param_store(copies=True):
        with apart(), random_state(refit_seed):
            plan.refit(frozen, trained, *simulation.args)
        return _measured(plan, trained, simulation)


def _measured(plan: _Plan, guide: Any, simulation: Simulation) -> Arrays:
    """Ranks of shape `(simulations, coordinates)`, and nats of shape `(simulations,)`."""
    (args, latents), model = simulation, plan.model
    name = None if plan.plate is None else plan.plate.name
    below, ties = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
    weights = []
    tensors = [value for value in (*latents.values(), *args) if isinstance(value, Tensor)]
    widest = max(value.numel() for value in tensors) if plan.vectorized else None
    with torch.no_grad(), unchecked(), eval_mode(model, guide):
        for _, draws in draw_runs(model, args, plan.num_samples, widest):
            model_trace, guide_trace = trace_pair(model, guide, *args, draws=draws)
            layout = Layout.of(model_trace, plan.plate if plan.refit is None else None, draws)
            drawn = layout.flat({site: guide_trace.nodes[site]["value"] for site in layout.places})
            expect(not drawn.isnan().any(), "guide", "draws that are numbers", "NaN")
            true = layout.flat(latents)
            below, ties = below + (drawn < true).sum(0), ties + (drawn == true).sum(0)
            drawn_terms = terms(model_trace, guide_trace, name)
            log_weight = plan.per_simulation(drawn_terms.log_weight, drawn_terms, true.shape[:2])
            weights.append(log_weight)
        nats = {}
        if drawn_terms.log_guide:
            nats = _nats(plan, torch.cat(weights), terms_at(model, guide, args, latents, name))
    shift = (torch.rand(ties.shape, dtype=torch.float64, device=ties.device) * (ties + 1)).floor()
    values = {**nats, "rank": below + shift.long()}
    return {name: value.cpu().numpy() for name, value in values.items()}


def _nats(plan: _Plan, log_weight: Tensor, true_terms: Terms | None) -> dict[str, Tensor]:
    """The gaps from the weights of the draws, and information from the terms at the true latents.

    Without those terms there is only the lower gap.
    """
    elbo = log_weight.mean(0)
    never = elbo.isneginf()  # log p(x) is finite, as the model has drawn x, and the ELBO is not
    nats = {"gap": torch.where(never, math.inf, log_mean_weight(log_weight) - elbo)}
    if true_terms is not None:
        size = torch.Size([1, len(elbo)])
        gain = true_terms.log_q - true_terms.total(true_terms.log_prior)
        nats["information"] = plan.per_simulation(gain, true_terms, size)[0]
        true_weight = plan.per_simulation(true_terms.log_weight, true_terms, size)
        nats["gap_upper"] = log_mean_weight(torch.cat([log_weight, true_weight])) - elbo
    return nats


def _dataset(arrays: Arrays, plan: _Plan, labels: list[str], levels: list[float]) -> xr.Dataset:
    """The result, with its verdict in words."""
    rank = arrays["rank"]
    share, error = np.stack([coverage(rank, plan.num_samples, level) for level in levels], 1)
    p = uniformity(rank, plan.num_samples)
    variables: dict[str, Any] = {
        "rank": (("simulation", "latent"), rank),
        "coverage": (("level", "latent"), share),
        "coverage_se": (("level", "latent"), error),
        "uniformity_p": ("latent", p),
    }
    for name in ("information", "gap", "gap_upper"):
        value = arrays.get(name, np.full(len(rank), math.nan))
        variables[name] = float(value.mean())
        spread = value.std(ddof=1) if np.isfinite(value).all() else math.nan
        variables[f"{name}_se"] = float(spread) / math.sqrt(len(rank))
    note = "a point has no density"
    if "gap" in arrays:
        note = "the guide's density at given latents was not found"
    result = xr.Dataset(variables, {"latent": labels, "level": levels})
    result.attrs = {
        "num_samples": plan.num_samples,
        "note": "" if "information" in arrays else note,
        "unit": "nats per datum" if plan.refit is None else "nats per data set",
        "calibrated": int((p * len(p) >= ALPHA).all()),
    }
    result.attrs["reading"] = verdict(result)
    return result
