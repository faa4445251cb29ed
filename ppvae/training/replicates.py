"""Many fits in one program: seeds, or settings, of the same model and guide, trained side by side.

    pairs = [build(seed) for seed in range(4)]          # four models and their guides
    results = fit_replicates(pairs, x, seeds=range(4))  # each trained as `fit` would

All parameters are stacked and one step moves them all, so that four replicates cost about two.
"""

from __future__ import annotations

import operator
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae._scopes import matmul_precision, private_modules, random_state, train_mode
from ppvae.programs.keywords import with_keywords
from ppvae.staging.staged import NotStageable, one_line
from ppvae.training.fitting import fit
from ppvae.training.loop import Fit, progress_bar, train
from ppvae.training.optimum import is_global
from ppvae.training.single import how_to_run
from ppvae.training.stacked import stacked
from ppvae.training.task import adam, check_objective, check_options, task_of, training_batches


def fit_replicates(
    pairs: Sequence[tuple[Any, Any]],
    data: Any,
    *,
    num_epochs: int = 100,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    objective: Any = None,
    seeds: Sequence[int] | None = None,
    compile: bool | str = "auto",
    precision: str | None = None,
    progress: bool | str = True,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[Fit]:
    """Trains several models and guides of the same make at once, in one vectorized program.

    Replicate k is trained as `fit(*pairs[k], data, seed=seeds[k], objective=objective[k], ...)`
    would: with its own minibatches and its own noise, the same up to rounding. (Where noise is made
    from what was computed, as the gammas of `student_t` or the masks of dropout are, the numbers
    are others of the same distribution.) Replicates have nothing to do with each other; one that
    diverges ends them all. Convolutions, `student_t`, `low_rank`, `full_rank` and `flow` are
    vectorized but, for now, not compiled: `torch.vmap` ties their graphs to one size of minibatch.

    What cannot be trained so is trained one after the other, and a warning says why.

    Args:
        pairs: models and their guides, equal but for the values of their parameters, of which none
            is shared. Build each under its own seed, for results that are independent.
        data: a tensor or array, or a tuple of them, as for `fit`.
        num_epochs: passes through the data, at least 1.
        batch_size: size of a minibatch, as for `fit`.
        learning_rate: step size.
        optimizer: called as `optimizer(parameters, lr=learning_rate)`, with parameters that have a
            first dimension of replicates, so it must treat every number on its own, as Adam does;
            by default Adam, fused.
        objective: one objective for all, or one for each: those that differ in their scheduled
            fields only, as `ELBO`s in `beta` and `free_bits`, are trained at once.
        seeds: a seed for each; by default drawn from the caller's stream.
        compile: as for `fit`.
        precision: as for `fit`.
        progress: show a progress bar; a string is its label.
        plate: as for `fit`.
        kwargs: as for `fit`; the same for all.

    Returns:
        The course of each training; `seconds` is its share of the time.

    Raises:
        TypeError: `pairs` or `seeds` is not what it should be.
        ValueError: an argument is out of its range, the models differ or share a parameter.
        Diverged: a loss became infinite or NaN. The message names the replicate.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, fit_replicates, likelihoods
        >>> from ppvae.nn import mlp
        >>> def build(seed):
        ...     torch.manual_seed(seed)
        ...     model = VAE(mlp(2, 16, out=5), latent=2, likelihood=likelihoods.Normal(0.1))
        ...     return model, FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> pairs = [build(seed) for seed in range(4)]
        >>> len(fit_replicates(pairs, torch.randn(20, 5), num_epochs=3, progress=False))
        4
    """
    pairs, seeds, goals = _checked(pairs, seeds, objective)
    num_epochs = check_options(num_epochs, learning_rate, optimizer, precision)
    named = [with_keywords(*pair, (), kwargs) for pair in pairs]
    batches = training_batches(pairs[0][0], data, batch_size, named[0][2])
    how = how_to_run(compile, num_epochs * batches.count, 2)
    programs = [program for pair in named for program in pair[:2]]
    with private_modules(), train_mode(*programs), matmul_precision(precision):
        tasks = []
        for (model, guide, _), goal, seed in zip(named, goals, seeds, strict=True):
            # parameters are made as `fit` would, and those of equal names stay apart
            with private_modules(), random_state(seed):
                tasks.append(task_of(model, guide, goal, batches, plate))
        _check_parameters([list(task.program.parameters()) for task in tasks])
        at_once = optimizer is None and any(is_global(task) for task in tasks)
        if tasks[0].parameters and len(tasks) > 1 and not at_once:
            try:
                engine = stacked(tasks, seeds, compiled=how == "compiled")
            except NotStageable as error:
                said = one_line(error)
                warnings.warn(f"fit_replicates: one after the other; {said}", stacklevel=2)
            else:
                moves = partial(optimizer or adam, lr=learning_rate)
                with random_state(random.Random(repr(seeds)).getrandbits(62)):
                    return train(engine, moves, progress_bar(num_epochs, progress))
    options: dict[str, Any] = {"num_epochs": num_epochs, "batch_size": batch_size}
    options |= {"learning_rate": learning_rate, "optimizer": optimizer, "compile": compile}
    options |= {"precision": precision, "progress": progress, "plate": plate, "kwargs": kwargs}
    return [
        fit(*pair, data, objective=goal, seed=seed, **options)
        for pair, goal, seed in zip(pairs, goals, seeds, strict=True)
    ]


def _checked(
    pairs: Any, seeds: Any, objective: Any
) -> tuple[list[tuple[Any, Any]], list[int], list[Any]]:
    """The pairs, and a seed and an objective for each.

    Raises:
        TypeError: one of them is of a wrong kind.
        ValueError: there are no pairs, or not as many of the others.
    """
    pairs = list(pairs)
    expect(pairs, "pairs", "at least one model and its guide", "none")
    paired = all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs)
    expect(paired, "pairs", "pairs of a model and its guide", "something else", TypeError)
    goals = list(objective) if isinstance(objective, Sequence) else [objective] * len(pairs)
    if seeds is None:
        seeds = torch.randint(2**62, (len(pairs),)).tolist()
    whole = all(hasattr(seed, "__index__") for seed in seeds)
    expect(whole, "seeds", "whole numbers, one for each pair", repr(seeds), TypeError)
    for name, values in {"objective": goals, "seeds": seeds}.items():
        wanted = f"{len(pairs)}, one for each pair"
        expect(len(values) == len(pairs), name, wanted, len(values))
    for goal in goals:
        check_objective(goal)
    return pairs, [operator.index(seed) for seed in seeds], goals


def _check_parameters(parameters: Sequence[list[Tensor]]) -> None:
    """Raises a ValueError if pairs share a parameter, or those of one have other shapes."""
    seen: dict[int, int] = {}
    kinds = [[(p.shape, p.requires_grad) for p in own] for own in parameters]
    for number, own in enumerate(parameters):
        got = f"other shapes, or other parameters frozen, in pair {number} than in pair 0"
        expect(kinds[number] == kinds[0], "pairs", "models and guides of the same make", got)
        for p in filter(lambda p: p.requires_grad, own):
            other = seen.setdefault(id(p), number)
            got = f"one of shape {tuple(p.shape)} that pair {number} shares with pair {other}"
            expect(other == number, "pairs", "parameters of their own", got)
