"""Simulation-based calibration: whether the intervals of a guide cover what they promise."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from ppvae._scopes import eval_mode, private_modules, random_state, unchecked
from ppvae.data.adapters import prepared
from ppvae.evaluation.ranks import ALPHA, coverage, reading, uniformity
from ppvae.guides.score import needs_training, terms_at
from ppvae.objectives.trace_terms import terms
from ppvae.programs.layout import Layout
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
    _check(num_samples, levels, batch_size)
    args = prepared(args)
    vectorized = is_vectorized(model) if vectorized is None else vectorized
    label = progress if isinstance(progress, str) else "calibration"
    with private_modules(), random_state(seed):
        layout = Layout(model, args, plate, local=refit is None)
        _check_refit(guide, refit, layout)
        total = num_simulations
        if total is None:
            total = 100 if refit else min(layout.frame.size, 1000)
        if total < 2:
            raise ValueError(f"num_simulations: expected at least 2, got {total}")
        if refit is None:
            size = min(batch_size, total)
            with torch.no_grad(), eval_mode(model, guide):
                batches = minibatches(model, guide, args, layout.frame, size, plate)
            runs = _answers(model, guide, batches, layout, total, arguments)
        else:
            runs = _refits(model, guide, args, total, refit, arguments)
        found, note = [], ""
        bar = tqdm(total=total, desc=label, disable=not progress, unit="simulation")
        with bar, closing(runs):  # an error ends the run inside, and what it has opened, at once
            for trained, simulation in runs:
                arrays, why = _measured(
                    model, trained, simulation, layout, num_samples, vectorized=vectorized
                )
                found.append(arrays)
                note = note or why
                bar.update(min(len(arrays["rank"]), total - bar.n))
    joined = {name: np.concatenate([f[name] for f in found])[:total] for name in found[0]}
    attrs = {"num_samples": num_samples, "note": note}
    attrs["unit"] = "nats per datum" if layout.local else "nats per data set"
    return _dataset(joined, layout.names, [float(level) for level in levels], attrs)


def _answers(
    model: Any, guide: Any, batches: Any, layout: Layout, total: int, arguments: Arguments | None
) -> Generator[tuple[Any, Simulation]]:
    """The guide as it is, with minibatches of simulated data, until there are enough."""
    done = 0
    for batch, seed in zip(itertools.cycle(batches), _seeds(total), strict=False):
        simulation = simulate(model, *batch, seed=seed, arguments=arguments)
        yield guide, simulation
        done += layout.rows(simulation.latents, simulation.latents).shape[1]
        if done >= total:
            return


def _refits(
    model: Any, guide: Any, args: Any, total: int, refit: Any, arguments: Arguments | None
) -> Generator[tuple[Any, Simulation]]:
    """A copy of the guide for each simulated data set, trained on it."""
    for seed, other in zip(_seeds(total), _seeds(total), strict=True):
        simulation = simulate(model, *args, seed=seed, arguments=arguments)
        truth, trained = copy.deepcopy((model, guide))
        if isinstance(truth, nn.Module):
            truth.requires_grad_(requires_grad=False)
        with _copied_parameters():
            with random_state(other), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*was not registered in the param store")
                refit(truth, trained, *simulation.args)
            yield trained, simulation


def _seeds(count: int) -> list[int]:
    """One for each simulation, so that the data do not depend on what a guide draws."""
    return torch.randint(2**31, (count,)).tolist()


@contextmanager
def _copied_parameters() -> Iterator[None]:
    """Plain `pyro.param` statements see copies inside, which are dropped at the end."""
    store = pyro.get_param_store()
    state = store.get_state()
    params = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in state["params"].items()
    }
    with store.scope({"params": params, "constraints": dict(state["constraints"])}):
        yield
    dict(store.items())  # reading a parameter restores the weak reference that get_state takes off


def _measured(
    model: Any,
    guide: Any,
    simulation: Simulation,
    layout: Layout,
    num_samples: int,
    *,
    vectorized: bool,
) -> tuple[dict[str, np.ndarray], str]:
    """Ranks of shape `(simulations, coordinates)`, and nats of shape `(simulations,)`."""
    args, latents = simulation
    with torch.no_grad(), unchecked(), eval_mode(model, guide):
        truth = layout.rows(latents, latents)[0]
        below, ties = torch.zeros((2, *truth.shape), dtype=torch.long, device=truth.device)
        weights = []
        widest = max(v.numel() for v in (*latents.values(), *args) if isinstance(v, Tensor))
        for count, draws in draw_runs(model, args, num_samples, widest if vectorized else None):
            model_trace, guide_trace = trace_pair(model, guide, *args, draws=draws)
            values = {name: guide_trace.nodes[name]["value"] for name in latents}
            drawn = layout.rows(values, latents, draws)
            if drawn.isnan().any():
                raise ValueError("guide: expected draws that are numbers, got NaN")
            below += (drawn < truth).sum(0)
            ties += (drawn == truth).sum(0)
            parts = terms(model_trace, guide_trace, layout.plate)
            weights.append(layout.log_weight(parts, (count, len(truth))))
        known = terms_at(model, guide, args, latents, layout.plate) if parts.log_guide else None
    shift = (torch.rand(ties.shape, dtype=torch.float64, device=ties.device) * (ties + 1)).floor()
    log_w = torch.cat(weights)
    found = dict.fromkeys(("information", "gap", "gap_upper"), torch.full_like(log_w[0], math.nan))
    if parts.log_guide:
        found["gap"] = log_w.logsumexp(0) - math.log(num_samples) - log_w.mean(0)
    if known is not None:
        size = (1, len(truth))
        gain = layout.total(known, "log_guide", size) - layout.total(known, "log_prior", size)
        joined = torch.cat([log_w, layout.log_weight(known, size)])
        found["information"] = gain[0]
        found["gap_upper"] = joined.logsumexp(0) - math.log(len(joined)) - log_w.mean(0)
    found["rank"] = below + shift.long()
    point, hidden = "a point has no density", "the guide's density at given latents was not found"
    note = "" if known is not None else hidden if parts.log_guide else point
    return {name: value.cpu().numpy() for name, value in found.items()}, note


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


def _check(num_samples: int, levels: Sequence[float], batch_size: int) -> None:
    if num_samples < 2 or batch_size < 1:
        raise ValueError(
            f"num_samples, batch_size: expected at least 2 and 1, got {num_samples}, {batch_size}"
        )
    if len(levels) == 0 or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels: expected numbers in (0, 1), at least one; got {levels}")


def _check_refit(guide: Any, refit: Any, layout: Layout) -> None:
    if refit is not None:
        if not callable(refit):
            raise TypeError(f"refit: expected a function, got {type(refit).__name__}")
        frame = layout.frame
        if frame is not None and frame.full_size not in (None, frame.size):
            raise ValueError(
                f"model: expected all the data in the plate {frame.name!r} with `refit`, got "
                f"{frame.size} of {frame.full_size}"
            )
        return
    why = needs_training(guide, layout)
    if why:
        raise ValueError(
            f"refit: expected a function that trains a copy of the guide on simulated data, since "
            f"{why}; got None"
        )
