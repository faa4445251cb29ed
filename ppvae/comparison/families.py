"""Is the next channel worth it? Each family against the one below it, over seeds, with a verdict.

What a family gains is uncertain, as another seed trains another guide, other data have other gains
(the interval is for both), and training may not have ended (of which the last losses tell). Latents
of all the data have one gain, of the data that were fitted: its interval is for other seeds and
other draws.
"""

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from scipy import special
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ppvae._checks import check_count, check_label, check_number, check_seed, expect
from ppvae._process import apart, exclusive
from ppvae._scopes import private_modules, random_state
from ppvae.comparison.members import members_of
from ppvae.data.adapters import as_tensors, items_of, schema_of
from ppvae.evaluation.evaluation import evaluate
from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.trace_terms import terms
from ppvae.programs.runs import opened
from ppvae.training.course import last_fall
from ppvae.training.fitting import fit
from ppvae.training.verdict import NarrowFamily

_MEASURES = ["elbo", "log_likelihood", "rate", "distortion"]
_TOTALS = ["total_elbo", "total_elbo_se", "log_evidence", "global_rate"]
_GAIN = ["gain", "gain_lower", "gain_upper"]
_RATES = ["gain_per_parameter", "gain_per_second"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_families` found; `print` shows it as a table.

    Attributes:
        dataset: the numbers, in nats per datum, or in nats of all the data, where some latents
            belong to all of them; each variable has its `unit`, and of all the data so has the
            whole. Dims `family` and `seed`: `elbo`, `log_likelihood`,
            `rate`, `distortion` on the test data; `seconds` of training; `fall` of the loss over
            the last quarter of the epochs, with its standard error `fall_se`. Dim `family`:
            `parameters`, the trained numbers of the guide, without an encoder that stays idle; and,
            for the step up from the family `below`, the `gain` in ELBO, its interval `gain_lower`
            to `gain_upper`, its standard errors `gain_se_seeds` and `gain_se_data`, its growth
            `gain_drift` over the last quarter of the epochs, `gain_per_parameter` and
            `gain_per_second` added (NaN if none), the `verdict`, and a `note` on what weakens it.
            Of all the data there are `total_elbo` with its Monte Carlo error `total_elbo_se`,
            `log_evidence` and `global_rate` in the place of the four measures, and `gain_se_draws`
            in that of `gain_se_data`; see `evaluate`.
    """

    dataset: xr.Dataset

    def __repr__(self) -> str:
        data = self.dataset
        measures = [name for name in (*_MEASURES, *_TOTALS) if name in data]
        means = {name: data[name].mean("seed", skipna=False) for name in [*measures, "fall"]}
        means["seconds"] = data.seconds.median("seed")
        columns = [*means, "parameters", *_GAIN, *_RATES, "verdict"]
        table = data.assign(means)[columns].to_dataframe().rename_axis(None)
        short = dict.fromkeys(_RATES, "{:.1e}".format)
        text = table.to_string(na_rep="", float_format="{:.3f}".format, formatters=short)
        notes = zip(data.family.values, data.note.values, strict=True)
        said = [f"{name}: {note}" for name, note in notes if note]
        return "\n".join([text, f"densities and gains in {data.gain.unit}", *said])


@exclusive
def compare_families(
    build: Callable[[], tuple[Any, Any]],
    families: Sequence[Any] | Mapping[str, Any],
    train: Any,
    test: Any = None,
    *,
    num_seeds: int = 3,
    seed: int = 0,
    min_gain: float = 0.05,
    level: float = 0.95,
    num_samples: int = 256,
    progress: bool | str = True,
    **fit_options: Any,
) -> Comparison:
    r"""Trains families side by side and says of each whether it is worth more than the one below.

    For each seed all families start from the same networks and train with the same seed: the gain,
    the ELBO of a family less that of the one before it, is a mean of paired differences. Its
    interval is for another seed *and* another datum, see `crossed_interval`. The training data are
    the same throughout: the interval does not say what others would have taught.

    The verdict is "yes" where the whole interval is above `min_gain`, "no" where it is below, else
    "undecided". It must also stand if training went on: a gain that was still moving, as
    `still_to_come` sees it in the losses, makes undecided what it could turn.

    **Global latents** belong to all the data, so the ELBO and the gain do, too: they are in nats of
    all the data, and so is `min_gain`. There is no other datum, and the interval is for another
    seed and other draws, see `interval_of_totals`. What is compared are posteriors of the training
    data, and there are no others to measure them on. That a family is too narrow is what the gain
    says, and not a warning.

    Args:
        build: makes a fresh model and encoder, without arguments; called once per seed and family,
            with the random numbers of the seed. To compare families for a given decoder, freeze it
            there: `decoder.requires_grad_(False)`. The encoder may be None, or a mapping of
            several, as for `FamilyGuide`.
        families: what `FamilyGuide` takes, in the order of the comparison: names in the ladder,
            guide families, `Block`s, or mappings to such from the latent sites, each called by its
            name. Or a mapping to such from names of your own.
        train: training data, as for `fit`.
        test: data to measure on, at least 2: a tensor, an array, or a tuple of them. By default the
            training data, on which a bigger family gains more than on others. None for latents of
            all the data, or with parameters for each datum.
        num_seeds: at least 2 (where Student's t makes the interval wide).
        seed: the first seed; the others follow it.
        min_gain: what a step must gain to be worth it, in nats per datum, or of all the data.
        level: of the interval.
        num_samples: draws per datum in the evaluation, see `evaluate`; their error is in the
            interval.
        progress: as for `evaluate`.
        **fit_options: options of `fit`. Train until the losses are level, as `fit` does without
            `num_epochs`; with a learning rate that shrinks they become so anywhere, and the verdict
            may be about the optimizer.

    Returns:
        The numbers, in a wrapper that prints them as a table. A point (`deterministic`, `zero`) has
        no ELBO, so that a step from or to it has no gain and no verdict.

    Raises:
        TypeError: a family is not what it should be, `build` does not make a model and an encoder,
            or the test data are not tensors or arrays.
        ValueError: another argument is not as above, `build` does not start anew, or some families
            draw the latents of each datum by themselves and others all together.
        Diverged: see `fit`. A note on this and other errors names the family and the seed.

    Example:
        >>> import torch
        >>> from ppvae import VAE, likelihoods
        >>> def build():
        ...     model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(0.5))
        ...     return model, torch.nn.Identity()
        >>> names, x = ["noise_only", "mean_only"], torch.randn(20, 5)
        >>> compare_families(build, names, x, num_epochs=3, progress=False).dataset.seed.values
        array([0, 1, 2])

        Global latents, without an encoder:

        >>> from ppvae.regression import LinearRegression
        >>> def build():
        ...     return LinearRegression(2, noise=1.0), None
        >>> named = {"mean field": "mean_scale", "joint": "full_rank"}
        >>> data = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.9, 1.0]]), torch.tensor([1.0, 0.0, 2.0])
        >>> found = compare_families(build, named, data, progress=False)
        >>> found.dataset.verdict.sel(family="joint").item(), found.dataset.unit
        ('yes', 'nats of all the data')
    """
    members = members_of(families)
    num_seeds = check_count("num_seeds", num_seeds, 2)
    num_samples = check_count("num_samples", num_samples, 2)
    min_gain = check_number("min_gain", min_gain)
    level = check_number("level", level)
    expect(level < 1, "level", "a number from 0 to below 1", level)
    expect(callable(build), "build", "a function", type(build).__name__, TypeError)
    seed = check_seed(seed)
    args = _test_data("train", train) if test is None else _test_data("test", test)
    seeds = list(range(seed, seed + num_seeds))
    shown, label = check_label("progress", progress, "compare_families")
    runs = list(itertools.product(seeds, members.items()))
    results: list[xr.Dataset] = []
    starts: dict[int, list[Tensor]] = {}
    with private_modules(), tqdm(runs, label, disable=not shown, unit="fit") as bar:
        for number, (name, family) in bar:
            bar.set_postfix(family=name, seed=number)
            try:  # in a param store of its own, so that `pyro.param` statements start anew
                with pyro.get_param_store().scope(), random_state(number):
                    model, encoder, starts[number] = _fresh(build, starts.get(number))
                    pair = model, FamilyGuide(model, family, encoder)
                    if test is not None and number == seed:
                        _check_test(*copy.deepcopy(pair), args, fit_options)
                    results.append(_run(*pair, train, args, number, num_samples, fit_options))
                    alike = ("elbo" in results[-1]) == ("elbo" in results[0])
                    wanted = "ones that all draw the latents of each datum by themselves, or none"
                    expect(alike, "families", wanted, "some of both")
            except Exception as error:
                error.add_note(f"compare_families: family {name}, seed {number}")
                raise
    rows = [results[first :: len(members)] for first in range(len(members))]
    joined = xr.combine_nested(rows, ["family", "seed"]).transpose("family", "seed", ...)
    joined = joined.assign_coords(family=list(members), seed=seeds)
    return Comparison(with_steps(joined, min_gain, level))


def crossed_interval(differences: np.ndarray, level: float = 0.95) -> list[np.ndarray]:
    r"""The mean of differences, its interval for new seeds and new data, and two standard errors.

    For `d[s, i] = m + a[s] + b[i] + c[s, i]` with S seeds and N data the variance of the mean is
    `var(a) / S + var(b) / N + var(c) / (S N)`. The spread over seeds of the means over data tells
    the first and last term, that over data of the means over seeds the last two. Each standard
    error is widened by Student's t, of S - 1 and of N - 1 degrees, and the half-widths are added in
    quadrature. `c`, with the error of the draws in it, counts twice: the interval is rather too
    wide. (Satterthwaite's degrees for the sum cover too little where few seeds differ much.)

    Args:
        differences: shape `(*, seeds, data)`, at least two of each.
        level: the least probability to cover the mean.

    Returns:
        The mean, the ends of the interval, and the standard errors over seeds and over data; `(*)`.
    """
    seeds, data = differences.shape[-2:]
    over_seeds = differences.mean(-1).std(-1, ddof=1) / math.sqrt(seeds)
    over_data = differences.mean(-2).std(-1, ddof=1) / math.sqrt(data)
    t = special.stdtrit([seeds - 1, data - 1], (1 + level) / 2)
    mean, half = differences.mean((-2, -1)), np.hypot(t[0] * over_seeds, t[1] * over_data)
    return [mean, mean - half, mean + half, over_seeds, over_data]


def interval_of_totals(
    differences: np.ndarray, errors: np.ndarray, level: float = 0.95
) -> list[np.ndarray]:
    r"""The mean of differences of totals, its interval for new seeds and draws, and two errors.

    For `d[s] = m + a[s] + e[s]` with S seeds the variance of the mean is `(var(a) + var(e)) / S`,
    all of which the spread over seeds tells, as far as S - 1 degrees of freedom can. The Monte
    Carlo error of each, which is known, is added in quadrature and counts twice: the interval is
    rather too wide, and that of the draws alone where all seeds end at one optimum.

    Args:
        differences: shape `(*, seeds)`, at least two.
        errors: their Monte Carlo errors, of the same shape.
        level: the least probability to cover the mean.

    Returns:
        The mean, the ends of the interval, and the standard errors over seeds and of the draws.
    """
    seeds = differences.shape[-1]
    over_seeds = differences.std(-1, ddof=1) / math.sqrt(seeds)
    of_draws = np.sqrt((errors**2).mean(-1) / seeds)
    t, z = special.stdtrit(seeds - 1, (1 + level) / 2), special.ndtri((1 + level) / 2)
    mean, half = differences.mean(-1), np.hypot(t * over_seeds, z * of_draws)
    return [mean, mean - half, mean + half, over_seeds, of_draws]


def still_to_come(fall: np.ndarray, error: np.ndarray) -> np.ndarray:
    """How far falls over the last quarter of the epochs may go on; zero if they may be noise.

    A loss that falls like 1 / epoch has, at the end, three times as far to go as it fell over the
    last quarter, 1 / (3T/4) - 1 / T = (1 / T) / 3, and one that falls faster has less. Two standard
    errors of the fall are taken off as noise. NaN, from too few epochs, counts as zero.
    """
    return np.nan_to_num(3 * np.sign(fall) * np.maximum(np.abs(fall) - 2 * error, 0.0))


def _fresh(build: Any, start: list[Tensor] | None) -> tuple[Any, Any, list[Tensor]]:
    """Model, encoder and a copy of their parameters, which must be those of the start."""
    built = build()
    pair = isinstance(built, tuple) and len(built) == 2
    pair = pair and isinstance(built[1], (nn.Module, Mapping, type(None)))
    wanted = "a model and an encoder module, or None for one"
    expect(pair, "build", wanted, repr(built), TypeError)
    model, encoder = built
    encoders = encoder.values() if isinstance(encoder, Mapping) else [encoder]
    now = [p.detach().clone() for p in _parameters(model, *encoders)]
    alike = start is None or (len(now) == len(start) and all(map(torch.equal, now, start)))
    expect(alike, "build", "fresh networks that start alike for one seed", "others")
    return model, encoder, now


def _parameters(*programs: Any) -> list[nn.Parameter]:
    """The parameters of those programs that are modules."""
    return [p for m in programs if isinstance(m, nn.Module) for p in m.parameters()]


def _check_test(model: Any, guide: Any, test: Any, options: Mapping[str, Any]) -> None:
    """Raises a ValueError if a guide is for the training data alone."""
    told = {name: options[name] for name in ("plate", "kwargs") if name in options}
    with opened(model, guide, test, seed=0, **told) as runs:
        local = terms(*runs.traces, told.get("plate")).is_local
        own = runs.plate is not None and runs.plate.name in guide.held
    got = "others" if local else "others, of latents of all the data"
    expect(local and not own, "test", "None: the posterior is one of the training data", got)


def _run(
    model: Any, guide: Any, train: Any, test: Any, seed: int, num_samples: int, options: Any
) -> xr.Dataset:
    """Trains and measures one guide."""
    with apart(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NarrowFamily)  # the gain says by how much
        fitted = fit(model, guide, train, seed=seed, progress=False, **options)
    if fitted.interrupted:  # half a training is no ground for a comparison
        raise KeyboardInterrupt
    same = {name: options[name] for name in ("plate", "kwargs") if name in options}
    same |= {"num_samples": num_samples, "seed": seed, "progress": False}
    measured = evaluate(model, guide, *test, **same)
    whole = "total_elbo" in measured
    infinite = int(np.isinf(measured["total_elbo" if whole else "elbo"]).sum())
    name = "train" if whole else "test"
    expect(not infinite, name, "data of a finite ELBO", f"{infinite} of an infinite one")
    told = options.get("num_epochs") if fitted.method == "stochastic gradient" else None
    ended = len(fitted.losses) < told if told else fitted.converged is not False
    losses = fitted.validation_losses or fitted.losses
    fall, error = (0.0, 0.0) if ended else last_fall(losses)[:2]  # it ended by itself
    used = guide if guide.family.channels else guide.heads  # with no channel the encoder is idle
    size = sum(p.numel() for p in _parameters(used) if p.requires_grad)
    numbers = {"seconds": fitted.seconds, "parameters": size}
    if whole:
        count = measured.sizes.get("datum", len(test[0]))
        numbers |= {"fall": count * fall, "fall_se": count * error, "num_data": count}
        rate = {"global_rate": measured.global_rate.where(measured.total_elbo.notnull())}
        return measured[_TOTALS].assign(numbers | rate)
    numbers |= {"fall": fall, "fall_se": error}
    rate = {"rate": measured.rate.where(measured.elbo.notnull())}  # of a point it is a penalty
    return measured[_MEASURES].assign(numbers | rate)


def with_steps(results: xr.Dataset, min_gain: float, level: float) -> xr.Dataset:
    """Means over the data, and what each family gains over the one below, with the verdict."""
    whole = "total_elbo" in results
    if whole:
        errors = results.total_elbo_se.values
        errors = np.hypot(errors[1:], errors[:-1])
        interval = interval_of_totals(np.diff(results.total_elbo, axis=0), errors, level)
    else:
        interval = crossed_interval(np.diff(results.elbo, axis=0), level)
    gain, lower, upper = interval[:3]
    fall = results.fall.mean("seed").values
    error = np.sqrt((results.fall_se**2).sum("seed").values) / results.sizes["seed"]
    drift, falling = np.diff(fall), np.abs(still_to_come(fall, error)) > min_gain
    left = still_to_come(drift, np.hypot(error[1:], error[:-1]))
    yes, no, point = lower > min_gain, upper < min_gain, np.isnan(gain)
    turns = (lower + np.minimum(left, 0) <= min_gain) & (upper + np.maximum(left, 0) >= min_gain)
    names = [*_GAIN, "gain_se_seeds", "gain_se_draws" if whole else "gain_se_data"]
    steps = dict(zip(names, interval, strict=True), below=results.family.values[:-1])
    steps["gain_drift"] = np.where(point, math.nan, drift)
    for name, total in zip(_RATES, (results.parameters, results.seconds), strict=True):
        cost = np.diff(total.median("seed"))
        steps[name] = gain / np.where(cost > 0, cost, math.nan)
    steps["verdict"] = np.select([point, turns, yes], ["", "undecided", "yes"], "no")
    more = "more seeds or draws" if whole else "more seeds, test data or draws"
    notes = {
        "no verdict, a point has no ELBO: its objective is no bound": point,
        "the gain still moved at the end (see gain_drift): train longer": turns & (yes | no),
        "the loss still fell at the end (see fall): train longer": falling[1:] | falling[:-1],
        f"the interval holds {min_gain:g}: {more} would tell": turns,
    }
    steps["note"] = np.select(list(notes.values()), list(notes), "")
    columns = {
        name: ("family", [math.nan if values.dtype.kind == "f" else "", *values.tolist()])
        for name, values in steps.items()
    }
    options: dict[str, Any] = {"min_gain": min_gain, "level": level}
    if whole:
        unit = "nats of all the data"
        options |= {"num_data": int(results.num_data[0, 0]), "unit": unit}
        means = results.drop_vars("num_data")
    else:
        unit = "nats per datum"
        options["num_data"] = results.sizes["datum"]
        means = results.mean("datum", skipna=False)
    means = means.assign(parameters=results.parameters.isel(seed=0)).assign(columns)
    for name in (*_MEASURES, *_TOTALS, "fall", "fall_se", *names, "gain_drift"):
        if name in means:
            means[name].attrs["unit"] = unit
    means.attrs = options
    return means


def _test_data(name: str, test: Any) -> tuple[Any, ...]:
    """The test data as tensors, with at least two data; tables stay, whose names a model knows."""
    held = not isinstance(test, (Dataset, DataLoader))
    expect(held, name, "a tensor, an array or a tuple", type(test).__name__, TypeError)
    args = as_tensors(name, test, missing=True)
    size = len(args[0]) if args[0].dim() else 1
    expect(size >= 2, name, "at least 2 data", size)
    pairs = zip(items_of(test), args, strict=True)
    return tuple(arg if schema_of(item) is None else item for item, arg in pairs)
