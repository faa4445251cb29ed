"""`fit` trains a model and its guide; `fit_replicates` trains several pairs of them side by side.

    pairs = [build(seed) for seed in range(4)]          # four models and their guides
    results = fit_replicates(pairs, x, seeds=range(4))  # each trained as `fit` would

The parameters of replicates are stacked and one step moves them all, so that four replicates take
about the time of two.
"""

import operator
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import check_count, expect
from ppvae._scopes import matmul_precision, private_modules, random_state, train_mode
from ppvae.data.batches import Batches, batches_of
from ppvae.programs.keywords import bare, with_keywords
from ppvae.programs.verdicts import remember
from ppvae.staging.staged import NotStageable
from ppvae.training.blame import blame
from ppvae.training.course import Ending
from ppvae.training.loop import Fit, progress_bar, train
from ppvae.training.optimum import Optimum, is_free, is_global, optimise
from ppvae.training.single import COMPILE, how_to_run, single
from ppvae.training.snapshots import Diverged, undone_by_errors
from ppvae.training.stacked import stacked
from ppvae.training.task import Task, check_options, task_of, training_batches
from ppvae.training.verdict import Verdict, judge

Pair = tuple[Any, Any]  # a model and its guide

_ROUND = 1_000  # steps of a method for global latents in each round, where the user does not say
_LONGEST = 50_000  # steps of a training without `num_epochs`, at the latest, but ...
_FEWEST = 200  # ... so many epochs at least


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    num_epochs: int | None = None,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    objective: Callable[..., Tensor] | None = None,
    seed: int | None = None,
    validation: Any = None,
    patience: int | None = None,
    check_support: bool = False,
    compile: bool | str = "auto",
    precision: str | None = None,
    progress: bool | str = True,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Fit:
    """Trains the parameters of a model and its guide on the negative ELBO, or another objective.

    Works on any Pyro model and guide whose draws are reparametrized. The modules are trained in
    training mode and left in the mode they had. Pyro's own checks run on the first step only. Fit
    in one thread at a time: Pyro's handlers belong to the process.

    **Global latents** (a `FamilyGuide` without encoder, another autoguide of Pyro's, or any guide
    whose latents are in no plate of the data) are fitted to the optimum, on all the data at once
    and whatever their units are: from the mode of the posterior and its curvature, by L-BFGS on
    draws that are held fixed, in double precision. `Fit.converged` says whether that was reached,
    and `Fit.verdict` how one knows; `NotConverged` warns where it was not, and `NarrowFamily` where
    the posterior is far from every member of the family.

    **All else** is trained with stochastic gradients: for `num_epochs`, after which the verdict
    says whether the loss was still falling; or without that number until the loss is flat, so that
    three times as many epochs would gain less than 0.1 nats per datum (or than half of the noise in
    the loss of an epoch), after which the learning rate falls to a hundredth over a quarter as
    many epochs again.

    Args:
        model: a Pyro model; called with one minibatch.
        guide: its guide.
        data: a tensor or array, or a tuple of them with equal first dimension, which become the
            arguments; or a `Dataset` of such items (every part of an item becomes an argument, so
            leave labels out); or a `DataLoader`. Arrays take the default dtype; all are moved to
            the device of the parameters.
        num_epochs: passes through the data, at least 1; by default as many as it takes. For global
            latents at most so many steps in each round of the method; by default 1,000.
        max_epochs: a bound on them where `num_epochs` is not given; by default 200, or as many as
            make 50,000 steps. For global latents it is what `num_epochs` is.
        batch_size: size of a minibatch; by default all the data, or 128 of more than 1024 (but all,
            where all that the guide learns are free parameters). The last one of an epoch may be
            smaller.
        learning_rate: step size.
        optimizer: called as `optimizer(parameters, lr=learning_rate)`; by default Adam, fused.
            Given one, global latents are trained by it, too, as they are with another objective,
            validation data, minibatches, or more than 500 parameters of which the mode says nothing
            (a flow).
        objective: the loss, `objectives.ELBO(beta=4.0)` for one; by default `objectives.ELBO()`.
            Called as `objective(model, guide, *batch, size=N, step=s)`, with the number of data in
            all and the number of steps before this one (see `objectives.Objective`); returns a
            scalar in nats per datum.
            With any but the default, `losses` and `validation_losses` are its values, and not those
            of the negative ELBO.
        seed: seeds minibatches and draws, without a trace outside; None uses the caller's stream.
        validation: data of the same kind, evaluated after each epoch.
        patience: stop after this many epochs without a lower validation loss, and go back to the
            parameters and buffers of the best epoch. While the objective moves, as in a warm-up,
            its values cannot be compared, and none of its epochs is the best.
        check_support: check every datum against the support of its likelihood before training.
        compile: run the loss and its gradients as one compiled graph (see `stage`); "auto" does so
            for 10,000 steps or more, which take longer than the compiler, and stages from 1,000 on.
            The result is the same up to rounding. What cannot be staged runs eagerly, and a warning
            says why.
        precision: the precision of products of float32 matrices, "highest", "high" or "medium", as
            in `torch.set_float32_matmul_precision`; None leaves it as it is.
        progress: show a progress bar; a string is its label.
        plate: name of the data plate; by default `data`, or else the one whose length is that of
            the data (see `data_plate`).
        kwargs: keyword arguments of model and guide. Tensors with as many rows as the data are cut
            into the minibatches with them, all else is passed as it is.

    Returns:
        The losses, how they were reached, and a verdict; see `Fit`. `evaluate` and `from_pyro_svi`
        carry the verdict on, as long as no parameter is written to.

    Warns:
        NotConverged: global latents are not at the optimum of their objective, or the loss was not
            flat after `max_epochs`.
        NarrowFamily: global latents are, and the family is too narrow for the posterior.

    Raises:
        ValueError: the data are empty, not finite, or outside the support; lengths differ; an
            argument is out of its range; the model observes nothing, or the guide does not fit it.
        Diverged: the loss became infinite or NaN. Its message names the number that overflowed and
            what to do; parameters and buffers of at most ten steps before are in place.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, fit, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(mlp(2, 16, out=5), latent=2, likelihood=likelihoods.Normal(0.1))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> len(fit(model, guide, torch.randn(20, 5), num_epochs=3, progress=False).losses)
        3
    """
    model, guide, extra = with_keywords(model, guide, (), kwargs)
    free = batch_size is None and is_free(guide)
    batches = training_batches(bare(model), data, batch_size, extra, whole=free)
    held_out = None if validation is None else _held_out(validation, batches)
    check_options(learning_rate, optimizer, precision)
    ending = None
    if num_epochs is None:
        ending = Ending(_max_epochs(max_epochs, batches))
        most, steps = ending.max_epochs, min(ending.max_epochs * batches.count, COMPILE - 1)
    else:
        expect(max_epochs is None, "max_epochs", "none beside num_epochs", max_epochs)
        most = check_count("num_epochs", num_epochs)
        steps = most * batches.count
    if patience is not None:
        patience = check_count("patience", patience)
        expect(held_out is not None, "patience", "`validation` data beside it", "none")
    how = how_to_run(compile, steps, batches.batch_size or 1)
    bar = progress_bar(most, progress)
    modes = train_mode(model, guide), matmul_precision(precision)
    with private_modules(), random_state(seed), modes[0], modes[1]:
        task = task_of(model, guide, objective, batches, plate)
        if check_support:
            task.check_support(*filter(None, (batches, held_out)))
        if held_out is not None:
            task.held_out_loss(held_out, 0)  # fails before anything is trained, if it does
        if optimizer is None and held_out is None and is_global(task):
            bounded = num_epochs is not None or max_epochs is not None
            result = _fit_at_once(task, most if bounded else _ROUND, seed or 0, bar)
            if result is not None:
                _remember(model, guide, result)
                return result
        validate = None if held_out is None else partial(task.held_out_loss, held_out)
        told: dict[str, Any] = {"ending": ending, "validate": validate, "patience": patience}
        (result,) = train(single(task, how), optimizer, learning_rate, bar, **told)
    _remember(model, guide, result)
    if ending is not None:
        Verdict(result.verdict, result.converged, result.losses[-1]).warn()
    return result


def _remember(model: Any, guide: Any, result: Fit) -> None:
    """Leaves the verdict to `evaluate` and to the export."""
    remember(bare(model), bare(guide), words=result.verdict, converged=result.converged)


def _max_epochs(max_epochs: Any, batches: Batches) -> int:
    """At most so many epochs: those that the user allows, or 50,000 steps and at least 200."""
    if max_epochs is None:
        return max(_FEWEST, -(-_LONGEST // batches.count))
    return check_count("max_epochs", max_epochs)


def _fit_at_once(task: Task, steps: int, seed: int, bar: Any) -> Fit | None:
    """Fits global latents to the optimum; None if they have to be fitted in steps."""
    start = time.perf_counter()
    with undone_by_errors(task.parameters, [task.program]) as before:
        optimum = optimise(task, steps=steps, seed=seed)
        if optimum is None:
            return None
        with torch.no_grad():
            for parameter, value in zip(task.parameters, optimum.values, strict=True):
                parameter.copy_(value.reshape(parameter.shape))
        verdict = _verdict(task, optimum, seed)
        if verdict is None:  # the optimum was found in doubles, and is kept in less
            (batch,) = task.batches
            reach = f"the optimum is out of reach of {task.parameters[0].dtype}"
            why = blame(task, batch, 0, before.put_back)
            raise Diverged(f"{reach}: {why}; the parameters are unchanged")
    losses, number = [*optimum.losses[:-1], verdict.loss], len(optimum.losses)
    bar.update(bar.total)
    bar.set_postfix({"loss": f"{losses[-1]:.6g}"}, refresh=False)
    bar.close()
    verdict.warn()
    seconds, objective = time.perf_counter() - start, task.program.objective
    method = "L-BFGS" if optimum.draws else "stochastic gradient"
    end = seconds, number, number - 1, method, objective, "eager"
    return Fit(losses, [], *end, verdict.converged, verdict.words)


def _verdict(task: Task, optimum: Optimum, seed: int) -> Verdict | None:
    """What is to be said of an optimum; None if the parameters, as they are stored, are useless."""
    if not all(torch.isfinite(parameter).all() for parameter in task.parameters):
        return None
    try:
        return judge(task, optimum, seed)
    except torch.linalg.LinAlgError:
        return None


def _held_out(validation: Any, batches: Batches) -> Batches:
    """The validation data, with the further arguments of those that are trained on."""
    wanted = "no tensor with as many rows as the data, beside validation data"
    expect(not any(batches.cut), "kwargs", wanted, "one")
    size = batches.batch_size or 1024
    return batches_of("validation", validation, size, training=False, extra=batches.extra)


def fit_replicates(
    pairs: Sequence[Pair],
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
    would train it: with its own minibatches and its own noise, the same up to rounding. (The gammas
    of `student_t` and the masks of dropout, whose noise is made from what was computed, are other
    numbers of the same distribution.) Replicates do not influence each other, but one that diverges
    ends them all. Convolutions, `student_t`, `low_rank`, `full_rank` and `flow` are
    vectorized but, for now, not compiled: `torch.vmap` ties their graphs to one size of minibatch.

    Pairs that cannot be trained in one program are trained one after the other, and a warning says
    why.

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
    pairs, seeds, objectives = _checked(pairs, seeds, objective)
    check_options(learning_rate, optimizer, precision)
    num_epochs = check_count("num_epochs", num_epochs)
    named = [with_keywords(*pair, (), kwargs) for pair in pairs]
    batches = training_batches(pairs[0][0], data, batch_size, named[0][2])
    how = how_to_run(compile, num_epochs * batches.count, 2)
    programs = [program for pair in named for program in pair[:2]]
    with private_modules(), train_mode(*programs), matmul_precision(precision):
        tasks = []
        for (model, guide, _), own, seed in zip(named, objectives, seeds, strict=True):
            # parameters are made as `fit` would, and those of equal names stay apart
            with private_modules(), random_state(seed):
                tasks.append(task_of(model, guide, own, batches, plate))
        _check_parameters([list(task.program.parameters()) for task in tasks])
        at_once = optimizer is None and any(is_global(task) for task in tasks)
        if tasks[0].parameters and len(tasks) > 1 and not at_once:
            try:
                engine = stacked(tasks, seeds, compiled=how == "compiled")
            except NotStageable as error:
                warnings.warn(f"fit_replicates: one after the other; {error}", stacklevel=2)
            else:
                bar = progress_bar(num_epochs, progress)
                with random_state(random.Random(repr(seeds)).getrandbits(62)):
                    results = train(engine, optimizer, learning_rate, bar)
                for pair, result in zip(pairs, results, strict=True):
                    _remember(*pair, result)
                return results
    options: dict[str, Any] = {"num_epochs": num_epochs, "batch_size": batch_size}
    options |= {"learning_rate": learning_rate, "optimizer": optimizer, "compile": compile}
    options |= {"precision": precision, "progress": progress, "plate": plate, "kwargs": kwargs}
    return [
        fit(*pair, data, objective=own, seed=seed, **options)
        for pair, own, seed in zip(pairs, objectives, seeds, strict=True)
    ]


def _checked(pairs: Any, seeds: Any, objective: Any) -> tuple[list[Pair], list[int], list[Any]]:
    """The pairs, and a seed and an objective for each.

    Raises:
        TypeError: one of them is of a wrong kind.
        ValueError: there are no pairs, or not as many of the others.
    """
    pairs = list(pairs)
    expect(pairs, "pairs", "at least one model and its guide", "none")
    paired = all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs)
    expect(paired, "pairs", "pairs of a model and its guide", "something else", TypeError)
    objectives = list(objective) if isinstance(objective, Sequence) else [objective] * len(pairs)
    if seeds is None:
        seeds = torch.randint(2**62, (len(pairs),)).tolist()
    whole = all(hasattr(seed, "__index__") for seed in seeds)
    expect(whole, "seeds", "whole numbers, one for each pair", repr(seeds), TypeError)
    for name, values in {"objective": objectives, "seeds": seeds}.items():
        wanted = f"{len(pairs)}, one for each pair"
        expect(len(values) == len(pairs), name, wanted, len(values))
    return pairs, [operator.index(seed) for seed in seeds], objectives


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
