"""`fit` trains any model with any guide, and says how that went."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import check_count, expect
from ppvae._scopes import matmul_precision, private_modules, random_state, train_mode
from ppvae.data.batches import Batches, batches_of
from ppvae.programs.keywords import with_keywords
from ppvae.training.loop import Fit, progress_bar, train
from ppvae.training.optimum import is_free, is_global, optimise
from ppvae.training.single import how_to_run, single
from ppvae.training.snapshots import Diverged, Snapshot, undone_by_errors
from ppvae.training.task import (
    Task,
    adam,
    check_objective,
    check_options,
    task_of,
    training_batches,
)
from ppvae.training.verdict import judge

_STEPS, _EPOCHS = 1000, 100  # where the user does not say


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    num_epochs: int | None = None,
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

    Args:
        model: a Pyro model; called with one minibatch.
        guide: its guide.
        data: a tensor or array, or a tuple of them with equal first dimension, which become the
            arguments; or a `Dataset` of such items (every part of an item becomes an argument, so
            leave labels out); or a `DataLoader`. Arrays take the default dtype; all are moved to
            the device of the parameters.
        num_epochs: passes through the data, at least 1.
        batch_size: size of a minibatch; by default all the data, or 128 of more than 1024. The last
            one of an epoch may be smaller.
        learning_rate: step size.
        optimizer: called as `optimizer(parameters, lr=learning_rate)`. By default Adam, fused; but
            L-BFGS on fixed, moment-matched draws, for at most `num_epochs` steps, where the model
            is vectorized (as `LinearRegression`), all latents are global, there are at most 500
            parameters, and a batch is all the data: it reaches the optimum to many digits. A flow
            has more; standardise its columns, and compare it with `full_rank`.
        objective: the loss, `objectives.ELBO(beta=4.0)` for one; by default `objectives.ELBO()`.
            Called as `objective(model, guide, *batch, size=N, step=s)`, with the number of data in
            all and the number of steps before this one (see `objectives.Objective`); returns a
            scalar in nats per datum.
            With any but the default, `losses` are its values, and not those of the negative ELBO;
            `validation_losses`, and with them `patience`, stay the plain negative ELBO.
        seed: seeds minibatches and draws, without a trace outside; None uses the caller's stream.
        validation: data of the same kind, evaluated after each epoch.
        patience: stop after this many epochs without a lower validation loss, and go back to the
            parameters and buffers of the best epoch.
        check_support: check every datum against the support of its likelihood before training.
        compile: run the loss and its gradients as one compiled graph (see `stage`); "auto" does so
            for 10,000 steps or more, which take longer than the compiler, and stages from 1,000 on.
            The result is the same up to rounding. What cannot be staged runs eagerly, and a warning
            says why.
        precision: that of products of float32 matrices, "highest", "high" or "medium", as in
            `torch.set_float32_matmul_precision`; None leaves it as it is.
        progress: show a progress bar; a string is its label.
        plate: name of the data plate; by default `data`, or else the one whose length is that of
            the data (see `data_plate`).
        kwargs: keyword arguments of model and guide. Tensors with as many rows as the data are cut
            into the minibatches with them, all else is passed as it is.

    Returns:
        The losses, and how they were reached.

    Raises:
        ValueError: the data are empty, not finite, or outside the support; lengths differ; an
            argument is out of its range; the model observes nothing, or the guide does not fit it.
        Diverged: the loss became infinite or NaN. Its message names the step and the term;
            parameters and buffers of at most ten steps before are in place.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, fit, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(mlp(2, 16, out=5), latent=2, likelihood=likelihoods.Normal(0.1))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> len(fit(model, guide, torch.randn(20, 5), num_epochs=3, progress=False).losses)
        3
    """
    given = model
    model, guide, extra = with_keywords(model, guide, (), kwargs)
    whole = batch_size is None and is_free(guide)
    batches = training_batches(given, data, batch_size, extra, whole=whole)
    held_out = None if validation is None else _held_out(validation, batches)
    asked, num_epochs = num_epochs, _EPOCHS if num_epochs is None else num_epochs
    num_epochs = check_options(num_epochs, learning_rate, optimizer, precision)
    check_objective(objective)
    if patience is not None:
        patience = check_count("patience", patience)
        expect(held_out is not None, "patience", "`validation` data beside it", "none")
    how = how_to_run(compile, num_epochs * batches.count, batches.batch_size or 1)
    bar = progress_bar(num_epochs, progress)
    modes = train_mode(model, guide), matmul_precision(precision)
    with private_modules(), random_state(seed), modes[0], modes[1]:
        task = task_of(model, guide, objective, batches, plate)
        if check_support:
            task.check_support(*filter(None, (batches, held_out)))
        if held_out is not None:
            task.held_out_loss(held_out)  # fails before anything is trained, if it does
        if optimizer is None and held_out is None and is_global(task):
            result = _fit_at_once(task, _STEPS if asked is None else num_epochs, seed or 0, bar)
            if result is not None:
                return result
        engine = single(task, how)
        moves = partial(optimizer or adam, lr=learning_rate)
        validate = None if held_out is None else partial(task.held_out_loss, held_out)
        (result,) = train(engine, moves, bar, validate=validate, patience=patience)
        return result


def _held_out(validation: Any, batches: Batches) -> Batches:
    """The validation data, with the further arguments of those that are trained on."""
    wanted = "no tensor with as many rows as the data, beside validation data"
    expect(not any(batches.cut), "kwargs", wanted, "one")
    size = batches.batch_size or 1024
    return batches_of("validation", validation, size, training=False, extra=batches.extra)


def _fit_at_once(task: Task, steps: int, seed: int, bar: Any) -> Fit | None:
    """Fits global latents to the optimum; None if they have to be fitted in steps."""
    start, before = time.perf_counter(), Snapshot(task.parameters, [task.program])
    with undone_by_errors(task.parameters, [task.program]):
        optimum = optimise(task, steps=steps, seed=seed)
        if optimum is None:
            return None
        if not all(torch.isfinite(value).all() for value in optimum.values):
            before.put_back()
            raise Diverged("the optimum is not finite; the parameters were left alone")
        with torch.no_grad():
            for parameter, value in zip(task.parameters, optimum.values, strict=True):
                parameter.copy_(value.reshape(parameter.shape))
        verdict = judge(task, optimum, seed)
    losses, number = optimum.losses, len(optimum.losses)
    bar.update(bar.total or number)
    bar.set_postfix({"loss": f"{losses[-1]:.6g}"}, refresh=False)
    bar.close()
    verdict.warn(stacklevel=2)
    seconds, objective = time.perf_counter() - start, task.program.objective
    end = seconds, number, number - 1, "L-BFGS", objective, "eager"
    return Fit(losses, [], *end, verdict.converged, verdict.words)
