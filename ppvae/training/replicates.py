"""`fit_replicates` trains several pairs of a model and its guide side by side.

    pairs = [build(seed) for seed in range(4)]          # four models and their guides
    results = fit_replicates(pairs, x, seeds=range(4))  # each trained as `fit` would

The parameters of replicates are stacked and one step moves them all.
"""

import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import TROUBLE, check_count, check_seed, expect
from ppvae._files import as_path
from ppvae._process import answer_interrupt, apart, deferred_interrupts, exclusive
from ppvae._scopes import (
    matmul_precision,
    private_modules,
    random_state,
    stacklevel,
    train_mode,
)
from ppvae.data.adapters import form_of
from ppvae.data.batches import Batches
from ppvae.families.base import GuideFamily
from ppvae.objectives.elbo import ELBO
from ppvae.programs.keywords import with_keywords
from ppvae.programs.missing import nan_masked
from ppvae.staging.staged import NotStageable
from ppvae.training.checkpoints import Checkpoint
from ppvae.training.execution import how_to_run
from ppvae.training.fitting import fit
from ppvae.training.identity import in_words
from ppvae.training.loop import progress_bar, train
from ppvae.training.optimum import is_global
from ppvae.training.options import Options
from ppvae.training.preparation import (
    Pair,
    check_call,
    check_held_out,
    check_supports,
    checkpoint_of,
    in_all_words,
    material_of,
    remember_fit,
)
from ppvae.training.result import Fit
from ppvae.training.stacked import Stacked, stacked
from ppvae.training.task import Task, task_of


@exclusive
def fit_replicates(
    pairs: Sequence[Pair],
    data: Any,
    *,
    num_epochs: int = 100,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    optimizer: Any = None,
    scheduler: Callable[[Any], Any] | None = None,
    clip: float | None = None,
    objective: Any = None,
    seeds: Sequence[int] | None = None,
    validation: Any = None,
    patience: int | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    checkpoint: Any = None,
    compile: bool | str = "auto",
    precision: str | None = None,
    progress: bool | str = True,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[Fit]:
    """Trains several models and their guides, those of the same make in one vectorized program.

    Replicate k is trained as `fit(*pairs[k], data, seed=seeds[k], objective=objective[k], ...)`
    would train it: with its own minibatches and its own noise, the same up to rounding. (The gammas
    of `student_t`, whose noise is made from what was computed, are other numbers of the same
    distribution.) Replicates do not influence each other, but one that diverges ends them all.

    Pairs of different make, such as those of a sweep over families or sizes of the latent, are
    trained in groups of equal make, one group after the other. Pairs of one make that cannot be
    trained in one program are trained one after the other, and a warning says why.

    On one core of a CPU this saves what a step costs beside its arithmetic, which is most of it for
    small networks and nothing for large ones, which take their steps in turn.

    Args:
        pairs: models and their guides, of which none share parameters. Those of the same make are
            equal but for the values of these. Build each under its own seed, for results that are
            independent.
        data: a tensor or array, or a tuple of them, as for `fit`.
        num_epochs: passes through the data, at least 1. It has to be given, or is 100: that a
            training ends by itself takes a learning rate of its own.
        batch_size: size of a minibatch, as for `fit`.
        learning_rate: step size.
        optimizer: called as `optimizer(parameters, lr=learning_rate)`, with parameters that have a
            first dimension of replicates, so it must treat every number on its own, as Adam does;
            by default Adam, fused.
        scheduler: as for `fit`; one for all. A `ReduceLROnPlateau` is told the mean of the losses
            of all that have not ended.
        clip: as for `fit`; of the gradient of each replicate.
        objective: one objective for all, or one for each: those that differ in their scheduled
            fields only, as `ELBO`s in `beta` and `free_bits`, are trained at once.
        seeds: a seed for each; by default drawn from the caller's stream.
        validation: as for `fit`; the same data for all.
        patience: as for `fit`. Each replicate ends when its own validation loss does not fall any
            more, and goes back to its own best epoch; the training goes on until all have ended.
        callback: as for `fit`; `loss` is a list, of the replicates in their order, and so is
            `validation_loss`, of which those that have ended have some more. Where replicates are
            trained one after the other these are numbers, and the epochs of each come in their
            turn, as those of groups do.
        checkpoint: as for `fit`; a file for all. Where they are trained one after the other,
            replicate k has a file of its own, `run-k.pt` for `run.pt`, and so has a group of which
            k is the first.
        compile: as for `fit`.
        precision: as for `fit`.
        progress: show a progress bar; a string is its label.
        plate: as for `fit`.
        kwargs: as for `fit`; the same for all.

    Returns:
        The course of each training, in the order of the pairs; `seconds` is its share of the time.
        After an interrupt all say so that had not ended; one that had not begun has no losses.

    Raises:
        TypeError: `pairs` or `seeds` is not what it should be.
        ValueError: an argument is out of its range, or two pairs share a parameter.
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
    pairs, seeds, objectives = _checked(pairs, seeds, objective)
    told: dict[str, Any] = {"learning_rate": learning_rate, "optimizer": optimizer}
    told |= {"scheduler": scheduler, "clip": clip, "callback": callback, "patience": patience}
    options = Options(**told)
    check_call(precision)
    checkpoint = None if checkpoint is None else as_path("checkpoint", checkpoint)
    wanted = "a number: a training that ends by itself has a learning rate of its own (see fit)"
    expect(num_epochs is not None, "num_epochs", wanted, None)
    num_epochs = check_count("num_epochs", num_epochs)
    named = [with_keywords(*pair, (), kwargs, data=data) for pair in pairs]
    for pair in pairs[1:]:
        form_of(*pair).remember(data)
    extra, names = named[0][2], tuple(kwargs or ())
    material = material_of(pairs[0], data, validation, batch_size, extra, names)
    batches, held_out = material
    expect(held_out or patience is None, "patience", "`validation` data beside it", "none")
    if material.missing:
        named = [(nan_masked(model), nan_masked(guide), extra) for model, guide, extra in named]
    steps = num_epochs * batches.count
    execution = how_to_run(compile, steps, 2, caller="fit_replicates", graph=True)
    in_turn = ""  # why replicates of one make are trained one after the other
    programs = [program for pair in named for program in pair[:2]]
    with ExitStack() as scopes:
        for scope in (private_modules(), train_mode(*programs), matmul_precision(precision)):
            scopes.enter_context(scope)
        tasks = []
        for (model, guide, _), own, seed in zip(named, objectives, seeds, strict=True):
            # parameters are made as `fit` would, and those of equal names stay apart
            with private_modules(), random_state(seed):
                tasks.append(task_of(model, guide, own, batches, plate))
            scopes.enter_context(train_mode(tasks[-1].program.called))
        _check_own([list(task.program.parameters()) for task in tasks])
        groups = _of_equal_make(tasks)
        if len(groups) == 1 and _go_together(tasks, optimizer, held_out):
            check_supports(tasks[0], material)
            for task in tasks:
                check_held_out(task, held_out)
            file = None
            if checkpoint is not None:
                more = {"seeds": seeds, "objectives": in_words(objectives), "compile": compile}
                run = in_all_words(tasks[0], options, material, precision=precision, **more)
                file = checkpoint_of(checkpoint, run)
                execution = file.execution(execution, num_epochs)
            try:
                engine = stacked(tasks, seeds, execution)
            except NotStageable as error:
                in_turn = str(error)
                words = f"fit_replicates: one after the other; {in_turn} ({TROUBLE})"
                warnings.warn(words, stacklevel=stacklevel())
            else:
                bar = progress_bar(num_epochs, progress)
                return _side_by_side(engine, seeds, options, held_out, bar, file)
    if len(groups) == 1:
        groups = [[number] for number in range(len(pairs))]
    told |= {"num_epochs": num_epochs, "batch_size": batch_size, "compile": compile}
    told |= {"precision": precision, "progress": progress, "plate": plate, "kwargs": kwargs}
    told["validation"] = validation
    results = _in_turn(groups, pairs, data, objectives, seeds, checkpoint, told)
    if in_turn:
        for number, each in enumerate(results):
            reasons = filter(None, [f"one after the other: {in_turn}", each.execution_reason])
            results[number] = each._replace(execution_reason="; ".join(reasons))
    return results


def _go_together(tasks: Sequence[Task], optimizer: Any, held_out: Batches | None) -> bool:
    """Whether tasks of equal make are trained in one program, if that can be made."""
    at_once = optimizer is None and held_out is None and any(is_global(task) for task in tasks)
    return len(tasks) > 1 and bool(tasks[0].parameters) and not at_once


def _side_by_side(
    engine: Stacked,
    seeds: Sequence[int],
    options: Options,
    held_out: Batches | None,
    bar: Any,
    file: Checkpoint | None,
) -> list[Fit]:
    """Trains replicates that are stacked."""
    validate = None if held_out is None else partial(engine.held_out_losses, held_out)
    stream = random_state(random.Random(repr(seeds)).getrandbits(62))
    with stream, deferred_interrupts(terminate=file is not None):
        results = train(engine, options, bar, validate=validate, file=file)
        answer_interrupt()
    for task, result in zip(engine.tasks, results, strict=True):
        remember_fit(task, result)
    return results


def _in_turn(
    groups: Sequence[Sequence[int]],
    pairs: Sequence[Pair],
    data: Any,
    objectives: Sequence[Any],
    seeds: Sequence[int],
    checkpoint: Path | None,
    told: Mapping[str, Any],
) -> list[Fit]:
    """Trains groups of pairs one after the other, each with a checkpoint of its own."""
    results: dict[int, Fit] = {}
    for group in groups:
        if any(result.interrupted for result in results.values()):
            for number in group:
                goal = objectives[number] or ELBO()
                ends = 0.0, 0, -1, "stochastic gradient", goal, "eager", None
                said = "interrupted before it began"
                results[number] = Fit([], [], *ends, said, interrupted=True)
            continue
        file = checkpoint
        if checkpoint is not None:
            file = checkpoint.with_name(f"{checkpoint.stem}-{group[0]}{checkpoint.suffix}")
        goals, own = ([values[number] for number in group] for values in (objectives, seeds))
        if len(group) == 1:
            more = {"objective": goals[0], "seed": own[0], "checkpoint": file, **told}
            with apart():
                fits = [fit(*pairs[group[0]], data, **more)]
        else:
            several = [pairs[number] for number in group]
            more = {"objective": goals, "seeds": own, "checkpoint": file, **told}
            fits = fit_replicates(several, data, **more)
        results |= zip(group, fits, strict=True)
    return [results[number] for number in range(len(pairs))]


def _checked(pairs: Any, seeds: Any, objective: Any) -> tuple[list[Pair], list[int], list[Any]]:
    """The pairs, and a seed and an objective for each.

    Raises:
        TypeError: one of them is of a wrong kind.
        ValueError: there are no pairs, or not as many of the others.
    """
    several = isinstance(pairs, Iterable) and getattr(pairs, "ndim", 1) > 0
    kind = type(pairs).__name__
    expect(several, "pairs", "pairs of a model and its guide", kind, TypeError)
    pairs = list(pairs)
    expect(pairs, "pairs", "at least one model and its guide", "none")
    paired = all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
    expect(paired, "pairs", "pairs of a model and its guide", "something else", TypeError)
    objectives = list(objective) if isinstance(objective, Sequence) else [objective] * len(pairs)
    if seeds is None:
        seeds = torch.randint(2**62, (len(pairs),)).tolist()
    several = isinstance(seeds, Iterable) and not isinstance(seeds, str)
    several = several and getattr(seeds, "ndim", 1) > 0
    expect(several, "seeds", "whole numbers, one for each pair", repr(seeds), TypeError)
    seeds = [check_seed(seed, "seeds") for seed in seeds]
    for name, values in {"objective": objectives, "seeds": seeds}.items():
        wanted = f"{len(pairs)}, one for each pair"
        expect(len(values) == len(pairs), name, wanted, len(values))
    return pairs, seeds, objectives


def _check_own(parameters: Sequence[list[Tensor]]) -> None:
    """Raises a ValueError if pairs share a parameter."""
    seen: dict[int, int] = {}
    for number, own in enumerate(parameters):
        for p in filter(lambda p: p.requires_grad, own):
            other = seen.setdefault(id(p), number)
            got = f"one of shape {tuple(p.shape)} that pair {number} shares with pair {other}"
            expect(other == number, "pairs", "parameters of their own", got)


def _of_equal_make(tasks: Sequence[Task]) -> list[list[int]]:
    """The numbers of the tasks, in groups that have the same modules, families and parameters."""
    groups: dict[Any, list[int]] = {}
    for number, task in enumerate(tasks):
        modules, parameters = [*task.program.modules()], task.program.named_parameters()
        held = [value for module in modules for value in vars(module).values()]
        make = (
            *map(type, modules),
            *(in_words(value) for value in held if isinstance(value, GuideFamily)),
            *((name, p.shape, p.requires_grad) for name, p in parameters),
        )
        groups.setdefault(make, []).append(number)
    return [*groups.values()]
