"""One trial: a family is fitted from fresh networks with a seed, and measured."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ppvae._checks import check_count, check_number, check_seed, expect
from ppvae._process import apart
from ppvae._scopes import eval_mode, random_state
from ppvae.comparison.steps import MEASURES, TOTALS, TRUST
from ppvae.data.adapters import as_tensors, items_of, schema_of
from ppvae.evaluation.evaluation import evaluate
from ppvae.objectives.trace_terms import terms
from ppvae.programs.keywords import bare, with_keywords
from ppvae.programs.missing import nan_masked
from ppvae.programs.runs import opened
from ppvae.training.course import last_fall
from ppvae.training.fitting import fit
from ppvae.training.task import Task, task_of, training_batches
from ppvae.training.verdict import NarrowFamily


class Settings(NamedTuple):
    """How often families are fitted, how they are measured, and what a step must gain.

    Attributes:
        seeds: one for each fit of a family.
        min_gain: what a step must gain, in nats.
        level: of its interval.
        num_samples: draws of an evaluation.
    """

    seeds: range
    min_gain: float
    level: float
    num_samples: int


def settings_of(num_seeds: Any, seed: Any, min_gain: Any, level: Any, num_samples: Any) -> Settings:
    """What the caller asks for.

    Raises:
        TypeError: one is no number.
        ValueError: one is out of its range.
    """
    num_seeds = check_count("num_seeds", num_seeds, 2)
    num_samples = check_count("num_samples", num_samples, 2)
    min_gain, level = check_number("min_gain", min_gain), check_number("level", level)
    expect(level < 1, "level", "a number from 0 to below 1", level)
    first = check_seed(seed)
    return Settings(range(first, first + num_seeds), min_gain, level, num_samples)


@contextmanager
def one_trial(caller: str, family: str, seed: int) -> Iterator[None]:
    """Inside is one trial: with the random numbers of a seed, and a param store of its own.

    So `pyro.param` statements start anew. A note on an error names the family and the seed.
    """
    try:
        with pyro.get_param_store().scope(), random_state(seed):
            yield
    except Exception as error:
        error.add_note(f"{caller}: family {family}, seed {seed}")
        raise


def fresh(build: Any, start: list[Tensor] | None) -> tuple[Any, Any, list[Tensor]]:
    """Model, encoder and a copy of their parameters, which must be those of the start."""
    built = build()
    pair = isinstance(built, tuple) and len(built) == 2
    pair = pair and isinstance(built[1], (nn.Module, Mapping, type(None)))
    wanted = "a model and an encoder module, or None for one"
    expect(pair, "build", wanted, repr(built), TypeError)
    model, encoder = built
    encoders = encoder.values() if isinstance(encoder, Mapping) else [encoder]
    now = [p.detach().clone() for p in parameters_of(model, *encoders)]
    alike = start is None or (len(now) == len(start) and all(map(torch.equal, now, start)))
    expect(alike, "build", "fresh networks that start alike for one seed", "others")
    return model, encoder, now


def check_alike(result: xr.Dataset, first: xr.Dataset) -> None:
    """Raises a ValueError if one result is of each datum and another of all the data."""
    wanted = "ones that all draw the latents of each datum by themselves, or none"
    expect(("elbo" in result) == ("elbo" in first), "families", wanted, "some of both")


def parameters_of(*programs: Any) -> list[nn.Parameter]:
    """The parameters of those programs that are modules."""
    return [p for m in programs if isinstance(m, nn.Module) for p in m.parameters()]


def check_test(model: Any, guide: Any, test: Any, options: Mapping[str, Any]) -> None:
    """Raises a ValueError if a guide is for the training data alone."""
    told = {name: options[name] for name in ("plate", "kwargs") if name in options}
    with opened(model, guide, test, seed=0, **told) as runs:
        local = terms(*runs.traces, told.get("plate")).is_local
        own = runs.plate is not None and runs.plate.name in guide.held
    got = "others" if local else "others, of latents of all the data"
    expect(local and not own, "test", "None: the posterior is one of the training data", got)


def trial(
    model: Any,
    guide: Any,
    train: Any,
    test: Any,
    seed: int,
    num_samples: int,
    options: Any,
    name: str = "train",
) -> xr.Dataset:
    """Trains and measures one guide; `name` is what an error calls the training data."""
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
    name = name if whole else "test"
    expect(not infinite, name, "data of a finite ELBO", f"{infinite} of an infinite one")
    told = options.get("num_epochs") if fitted.method == "stochastic gradient" else None
    ended = len(fitted.losses) < told if told else fitted.converged is not False
    losses = fitted.validation_losses or fitted.losses
    fall, error = (0.0, 0.0) if ended else last_fall(losses)[:2]  # it ended by itself
    used = guide if guide.family.channels else guide.heads  # with no channel the encoder is idle
    size = sum(p.numel() for p in parameters_of(used) if p.requires_grad)
    numbers = {"seconds": fitted.seconds, "parameters": size}
    if whole:
        count = measured.sizes.get("datum", len(test[0]))
        numbers |= {"fall": count * fall, "fall_se": count * error, "num_data": count}
        rate = {"global_rate": measured.global_rate.where(measured.total_elbo.notnull())}
        return measured[[*TOTALS, *TRUST[1]]].assign(numbers | rate)
    numbers |= {"fall": fall, "fall_se": error}
    rate = {"rate": measured.rate.where(measured.elbo.notnull())}  # of a point it is a penalty
    return measured[[*MEASURES, *TRUST[0]]].assign(numbers | rate)


def held_data(name: str, test: Any) -> tuple[Any, ...]:
    """The test data as tensors, with at least two data; tables stay, whose names a model knows."""
    held = not isinstance(test, (Dataset, DataLoader))
    expect(held, name, "a tensor, an array or a tuple", type(test).__name__, TypeError)
    args = as_tensors(name, test, missing=True)
    size = len(args[0]) if args[0].dim() else 1
    expect(size >= 2, name, "at least 2 data", size)
    pairs = zip(items_of(test), args, strict=True)
    return tuple(arg if schema_of(item) is None else item for item, arg in pairs)


def task_on(
    model: Any,
    guide: Any,
    data: Any,
    kwargs: Mapping[str, Any] | None,
    plate: str | None,
    objective: Any = None,
) -> Task:
    """The task of a pair on whole data, made as `fit` makes it, with the same words on bad data.

    Its program holds all parameters, also those that plain functions bring along.
    """
    names = tuple(kwargs or ())
    model, guide, extra = with_keywords(model, guide, (), kwargs, data=data)
    batches = training_batches(bare(model), bare(guide), data, None, extra, names, whole=True)
    if batches.missing:
        model, guide = nan_masked(model), nan_masked(guide)
    with eval_mode(model, guide):
        return task_of(model, guide, objective, batches, plate)
