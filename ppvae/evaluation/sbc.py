"""Simulation-based calibration: whether the intervals of a guide cover what they promise."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoGuideList, AutoNormal
from torch import Tensor, nn
from tqdm.auto import tqdm

from ppvae._checks import check_count, expect
from ppvae._scopes import eval_mode, param_store, private_modules, random_state, unchecked
from ppvae.data.adapters import prepared
from ppvae.evaluation.ranks import ALPHA, coverage, reading, uniformity
from ppvae.guides.family_guide import FamilyGuide
from ppvae.guides.score import terms_at
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.objectives.weights import log_mean_weight
from ppvae.programs.keywords import with_keywords
from ppvae.programs.layout import Layout
from ppvae.programs.nodes import data_plate, is_data, is_inside, latent_nodes, prototype
from ppvae.programs.runs import draw_runs, is_vectorized, minibatches, trace_pair
from ppvae.programs.simulation import Simulation, simulate

Arguments = Callable[[Mapping[str, Tensor]], tuple[Any, ...]]


def calibration(
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
        batch_size: data per run, where all latents are local.
        vectorized: run many draws at once, which the model must be written for (all operations
            leave leading dims alone); by default only where the model says so, as `VAE` does.
        seed: seeds the draws, without a trace outside; None uses the caller's stream. With one
            seed all guides of a model see the same simulated data.
        plate: name of the data plate; by default `data`, or else the outermost one.
        kwargs: keyword arguments of model and guide (and of `refit`, behind the others).
        progress: show a progress bar; a string is its label.

    Returns:
        A dataset with dims `simulation`, `latent` (`z[0]`, `weight[3]`: all coordinates of all
        sites) and `level`. `found["rank"]`: number of draws below the truth, ties split at random,
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
        >>> found = calibration(model, guide, torch.zeros(50, 5), progress=False)
        >>> found.reading[:50]
        'passes, and passes nothing: the guide is the prior'

    Talts et al., Validating Bayesian inference algorithms with simulation-based calibration, 2018;
    Säilynoja et al., Graphical test for discrete uniformity, 2022 (the p-value); Grosse et al.,
    Sandwiching the marginal likelihood, 2015 (the upper gap).
    """
    num_samples, batch_size = _checked(num_samples, levels, batch_size)
    vectorized = is_vectorized(model) if vectorized is None else vectorized
    label = progress if isinstance(progress, str) else "calibration"
    model, named, args = with_keywords(model, guide, prepared(args), kwargs)
    with private_modules(), random_state(seed):
        truth = _read_truth(model, args, plate, local=refit is None)
        _check_refit(guide, refit, truth)
        total = num_simulations
        if total is None:
            total = 100 if refit else min(truth.plate.size, 1000)
        total = check_count("num_simulations", total, 2)
        if refit is None:
            size = min(batch_size, total)
            with torch.no_grad(), eval_mode(model, named):
                batches = minibatches(model, named, args, truth.plate, size, plate)
            runs = _answers(model, named, batches, total, arguments)
        else:
            runs = _refits(model, named, args, total, refit, arguments)
        results, done, note = [], 0, ""
        bar = tqdm(total=total, desc=label, disable=not progress, unit="simulation")
        with bar, closing(runs):  # an error ends the run inside, and what it has opened, at once
            for trained, simulation in runs:
                arrays, why = _measured(
                    model, trained, simulation, truth, num_samples, vectorized=vectorized
                )
                results.append(arrays)
                note = note or why
                done += len(arrays["rank"])
                bar.update(min(done, total) - bar.n)
                if done >= total:
                    break
    joined = {name: np.concatenate([each[name] for each in results])[:total] for name in results[0]}
    attrs = {"num_samples": num_samples, "note": note}
    attrs["unit"] = "nats per datum" if truth.local else "nats per data set"
    return _dataset(joined, truth.labels, [float(level) for level in levels], attrs)


class _Truth(NamedTuple):
    """What a simulation is in a model, and the latents of which it tells the true values.

    Attributes:
        plate: the data plate; its members are the simulations where `local` is true.
        name: of the plate, as the user gave it.
        local: whether each datum is a simulation, and not the whole data set.
        outside: names of the sites outside the data plate.
        labels: of the coordinates of the latents.
    """

    plate: Any
    name: str | None
    local: bool
    outside: list[str]
    labels: list[str]

    def layout(self, trace: Any, draws: Any = None) -> Layout:
        """The latents of a trace of the model, one row for each simulation."""
        return Layout.of(trace, self.plate if self.local else None, draws)

    def per_simulation(self, value: Tensor, parts: Terms, size: tuple[int, int]) -> Tensor:
        """Nats per datum, or of all data, as `(draws, simulations)` of that size."""
        if not self.local:
            value = (value.sum(-1) if parts.is_local else value)[..., None]
        return value.double().expand(size)


def _read_truth(model: Any, args: tuple[Any, ...], plate: str | None, *, local: bool) -> _Truth:
    with torch.no_grad(), eval_mode(model), random_state(None, keep=True):
        trace = prototype(model, args, {})
    frame = data_plate(trace, plate)
    nodes = latent_nodes(trace)
    expect(nodes, "model", "latent sites", "none")
    data = [node for node in trace.nodes.values() if node["type"] == "sample" and is_data(node)]
    outside = [node["name"] for node in nodes + data if not is_inside(node, frame)]
    truth = _Truth(frame, plate, local, outside, [])
    if local and outside:
        return truth
    places = truth.layout(trace).places.values()
    return truth._replace(labels=[label for place in places for label in place.labels])


def _answers(
    model: Any, guide: Any, batches: Any, total: int, arguments: Arguments | None
) -> Generator[tuple[Any, Simulation]]:
    """The guide as it is, with minibatches of simulated data, again and again."""
    for batch, seed in zip(itertools.cycle(batches), _seeds(total), strict=False):
        yield guide, simulate(model, *batch, seed=seed, arguments=arguments)


def _refits(
    model: Any, guide: Any, args: Any, total: int, refit: Any, arguments: Arguments | None
) -> Generator[tuple[Any, Simulation]]:
    """A copy of the guide for each simulated data set, trained on it."""
    for seed, other in zip(_seeds(total), _seeds(total), strict=True):
        simulation = simulate(model, *args, seed=seed, arguments=arguments)
        truth, trained = copy.deepcopy((model, guide))
        if isinstance(truth, nn.Module):
            truth.requires_grad_(requires_grad=False)
        with param_store(copies=True):
            with random_state(other), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*was not registered in the param store")
                refit(truth, trained, *simulation.args)
            yield trained, simulation


def _seeds(count: int) -> list[int]:
    """One for each simulation, so that the data do not depend on what a guide draws."""
    return torch.randint(2**31, (count,)).tolist()


def _measured(
    model: Any,
    guide: Any,
    simulation: Simulation,
    truth: _Truth,
    num_samples: int,
    *,
    vectorized: bool,
) -> tuple[dict[str, np.ndarray], str]:
    """Ranks of shape `(simulations, coordinates)`, and nats of shape `(simulations,)`."""
    args, latents = simulation
    with torch.no_grad(), unchecked(), eval_mode(model, guide):
        with random_state(None, keep=True):
            trace = prototype(model, args, {})
        true = truth.layout(trace).flat(latents)[0]
        below, ties = torch.zeros((2, *true.shape), dtype=torch.long, device=true.device)
        weights = []
        widest = max(v.numel() for v in (*latents.values(), *args) if isinstance(v, Tensor))
        for count, draws in draw_runs(model, args, num_samples, widest if vectorized else None):
            model_trace, guide_trace = trace_pair(model, guide, *args, draws=draws)
            values = {name: guide_trace.nodes[name]["value"] for name in latents}
            drawn = truth.layout(model_trace, draws).flat(values)
            expect(not drawn.isnan().any(), "guide", "draws that are numbers", "NaN")
            below += (drawn < true).sum(0)
            ties += (drawn == true).sum(0)
            parts = terms(model_trace, guide_trace, truth.name)
            size = (count, len(true))
            weights.append(truth.per_simulation(parts.log_weight, parts, size))
        known = terms_at(model, guide, args, latents, truth.name) if parts.log_guide else None
    shift = (torch.rand(ties.shape, dtype=torch.float64, device=ties.device) * (ties + 1)).floor()
    nats, note = _nats(torch.cat(weights), known, truth, point=not parts.log_guide)
    values = {**nats, "rank": below + shift.long()}
    return {name: value.cpu().numpy() for name, value in values.items()}, note


def _nats(
    log_w: Tensor, known: Terms | None, truth: _Truth, *, point: bool
) -> tuple[dict[str, Tensor], str]:
    """Information and gaps, from the weights of the draws and the terms at the true latents."""
    nats = dict.fromkeys(("information", "gap", "gap_upper"), torch.full_like(log_w[0], math.nan))
    if point:
        return nats, "a point has no density"
    nats["gap"] = log_mean_weight(log_w) - log_w.mean(0)
    if known is None:
        return nats, "the guide's density at given latents was not found"
    size = (1, log_w.shape[1])
    gain = known.log_q - known.total(known.log_prior)
    nats["information"] = truth.per_simulation(gain, known, size)[0]
    joined = torch.cat([log_w, truth.per_simulation(known.log_weight, known, size)])
    nats["gap_upper"] = log_mean_weight(joined) - log_w.mean(0)
    return nats, ""


def _dataset(
    arrays: dict[str, np.ndarray], names: list[str], levels: list[float], attrs: dict[str, Any]
) -> xr.Dataset:
    rank, num_samples = arrays.pop("rank"), attrs["num_samples"]
    share, error = np.stack([coverage(rank, num_samples, level) for level in levels], 1)
    variables: dict[str, Any] = {
        "rank": (("simulation", "latent"), rank),
        "coverage": (("level", "latent"), share),
        "coverage_se": (("level", "latent"), error),
        "uniformity_p": ("latent", uniformity(rank, num_samples)),
    }
    for name, value in arrays.items():
        variables[name] = float(value.mean())
        variables[f"{name}_se"] = float(value.std(ddof=1)) / math.sqrt(len(rank))
    found = xr.Dataset(variables, {"latent": names, "level": levels}, attrs)
    p = variables["uniformity_p"][1]
    found.attrs["calibrated"] = int((p * len(p) >= ALPHA).all())
    found.attrs["reading"] = reading(found)
    return found


def _checked(num_samples: Any, levels: Sequence[float], batch_size: Any) -> tuple[int, int]:
    inside = len(levels) > 0 and all(0 < level < 1 for level in levels)
    expect(inside, "levels", "numbers in (0, 1), at least one", levels)
    return check_count("num_samples", num_samples, 2), check_count("batch_size", batch_size)


def _check_refit(guide: Any, refit: Any, truth: _Truth) -> None:
    if refit is not None:
        expect(callable(refit), "refit", "a function", type(refit).__name__, TypeError)
        frame = truth.plate
        if frame is not None and frame.full_size not in (None, frame.size):
            raise ValueError(
                f"model: expected all the data in the plate {frame.name!r} with `refit`, got "
                f"{frame.size} of {frame.full_size}"
            )
        return
    why = _needs_training(guide, truth)
    if why:
        raise ValueError(
            f"refit: expected a function that trains a copy of the guide on simulated data, since "
            f"{why}; got None"
        )


def _needs_training(guide: Any, truth: _Truth) -> str:
    """Why a guide must be trained on data before it can answer for them; empty if it need not."""
    if truth.plate is None:
        return "the model has no plate over its data"
    if truth.outside:
        return f"the sites {truth.outside} are outside the plate {truth.plate.name!r}"
    if not _is_amortized(guide):
        return "the parameters of a guide without encoder are those of one data set"
    return ""


def _is_amortized(guide: Any) -> bool:
    """Whether a guide can answer for data that it was not trained on, as far as one can tell."""
    if isinstance(guide, AutoGuideList):
        return all(_is_amortized(part) for part in guide)
    if isinstance(guide, FamilyGuide):
        return guide.encoder is not None or not guide.family.channels
    return not isinstance(guide, (AutoContinuous, AutoDelta, AutoNormal))
