"""One training loop for every model and every guide."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ppvae._checks import check_count, expect
from ppvae._scopes import matmul_precision, private_modules, random_state, train_mode
from ppvae.data.adapters import length_of
from ppvae.data.batches import Batches
from ppvae.objectives.elbo import ELBO
from ppvae.training.quasi_newton import draws_needed, minimise
from ppvae.training.snapshots import Diverged, restore, undone_by_errors
from ppvae.training.steppers import (
    Runner,
    Stepper,
    adam,
    check_options,
    check_support_of,
    how_to_run,
    mean_loss,
    parameters_of,
)


class Fit(NamedTuple):
    """What a training run has to tell; losses are in nats per datum.

    Attributes:
        losses: values of the objective in each epoch, averaged over its data while they were
            trained on: the negative ELBO, if no other was asked for.
        validation_losses: negative ELBO on the validation data after each epoch; empty without.
        seconds: time in the loop.
        num_steps: steps of the optimizer.
        best_epoch: the epoch, from 0, whose parameters were kept: the last one, or with early
            stopping the one with the lowest validation loss.
        method: "stochastic gradient", or "L-BFGS" (see `optimizer` of `fit`).
        objective: what was minimised, such as `objectives.ELBO()`.
        execution: "eager", "staged" or "compiled".
    """

    losses: list[float]
    validation_losses: list[float]
    seconds: float
    num_steps: int
    best_epoch: int
    method: str
    objective: Callable[..., Tensor]
    execution: str

    @property
    def history(self) -> dict[str, list[Any]]:
        """Columns of a table, one row per epoch; `pandas.DataFrame(fit.history)` prints it."""
        columns: dict[str, list[Any]] = {
            "epoch": list(range(len(self.losses))),
            "loss": self.losses,
        }
        if self.validation_losses:
            columns["validation_loss"] = self.validation_losses
        return columns


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    num_epochs: int = 100,
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
) -> Fit:
    """Trains the parameters of a model and its guide on the negative ELBO, or another objective.

    Works on any Pyro model and guide whose draws are reparametrized. The modules are trained in
    training mode and left in the mode they had. Pyro's own checks run on the first step only.

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
            all and the number of steps before this one; returns a scalar in nats per datum.
            With any but the default, `losses` are its values, and not those of the negative ELBO;
            `validation_losses`, and with them `patience`, stay the plain negative ELBO.
        seed: seeds minibatches and draws, without a trace outside; None uses the caller's stream.
        validation: data of the same kind, evaluated after each epoch.
        patience: stop after this many epochs without a lower validation loss, and go back to the
            best parameters.
        check_support: look first whether the data lie in the support of their likelihood.
        compile: run the loss and its gradients as one compiled graph (see `stage`); "auto" does so
            for 10,000 steps or more, which take longer than the compiler, and stages from 1,000 on.
            The result is the same up to rounding. What cannot be staged runs eagerly, and a warning
            says why.
        precision: that of products of float32 matrices, "highest", "high" or "medium", as in
            `torch.set_float32_matmul_precision`; None leaves it as it is.
        progress: show a progress bar; a string is its label.

    Returns:
        The losses and what else there is to tell.

    Raises:
        ValueError: the data are empty, not finite, or outside the support; lengths differ; an
            argument is out of its range; the guide does not fit the model.
        Diverged: the loss became infinite or NaN. Its message names the step and the term;
            parameters of at most ten steps before are in place.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, fit, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(mlp(2, 16, out=5), latent=2, likelihood=likelihoods.Normal(0.1))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> len(fit(model, guide, torch.randn(20, 5), num_epochs=3, progress=False).losses)
        3
    """
    batches = Batches("data", data, batch_size, shuffle=True)
    held_out = None
    if validation is not None:
        size = min(batches.batch_size or 1024, length_of(validation))
        held_out = Batches("validation", validation, size, shuffle=False)
    check_options(num_epochs, learning_rate, optimizer, objective, precision)
    if patience is not None:
        patience = check_count("patience", patience)
        expect(held_out is not None, "patience", "`validation` data beside it", "none")
    objective = ELBO() if objective is None else objective
    how = how_to_run(compile, num_epochs * batches.count, batches.batch_size or 1)
    if batches.tensors and hasattr(model, "check_data"):
        model.check_data(*batches.tensors)
    label = progress if isinstance(progress, str) else "fit"
    bar = tqdm(range(num_epochs), desc=label, disable=not progress, unit="epoch")
    modes = train_mode(model, guide), matmul_precision(precision)
    with private_modules(), random_state(seed), modes[0], modes[1]:
        parameters = parameters_of(model, guide, batches)
        if check_support:
            for some in filter(None, (batches, held_out)):
                check_support_of(model, some)
        if held_out is not None:
            mean_loss(model, guide, held_out)  # fails before anything is trained, if it does
        plain = isinstance(objective, ELBO) and objective == ELBO()
        if optimizer is None and plain and batches.whole and held_out is None:
            (batch,) = batches
            draws = draws_needed(model, guide, batch, parameters)
            if draws:
                return _fit_at_once(model, guide, batch, parameters, num_epochs, draws, seed, bar)
        runner = Runner(model, guide, objective, batches, parameters, how)
        moved = (optimizer or adam)(runner.parameters, lr=learning_rate) if parameters else None
        with undone_by_errors(parameters):
            return _fit_in_steps(Stepper(runner, moved), batches, held_out, patience, bar)


def _fit_in_steps(
    stepper: Stepper, batches: Batches, held_out: Batches | None, patience: int | None, bar: Any
) -> Fit:
    start, runner = time.perf_counter(), stepper.runner
    losses: list[float] = []
    validation_losses: list[float] = []
    best: tuple[float, int, list[Tensor]] = (math.inf, -1, [])
    stale = 0
    for epoch in bar:
        total = count = 0.0
        for batch in batches:
            rows = len(batch[0])
            total += stepper.step(batch) * rows
            count += rows
        stepper.check()
        losses.append(total / count)
        shown = {"loss": f"{losses[-1]:.4g}"}
        if held_out is not None:
            validation_losses.append(mean_loss(runner.model, runner.guide, held_out))
            shown["validation"] = f"{validation_losses[-1]:.4g}"
            stale += 1
            if validation_losses[-1] < best[0]:
                copies = [p.detach().clone() for p in stepper.parameters] if patience else []
                best, stale = (validation_losses[-1], epoch, copies), 0
        bar.set_postfix(shown, refresh=False)
        if patience is not None and stale >= patience:
            break
        if not stepper.parameters:  # no channels, and a model without parameters: only measured
            break
    bar.close()
    kept = len(losses) - 1
    if patience is not None and best[2]:
        restore(stepper.parameters, best[2])
        kept = best[1]
    seconds = time.perf_counter() - start
    told = (stepper.number, kept, "stochastic gradient", runner.objective, runner.how)
    return Fit(losses, validation_losses, seconds, *told)


def _fit_at_once(
    model: Any,
    guide: Any,
    batch: tuple[Tensor, ...],
    parameters: list[Tensor],
    steps: int,
    draws: int,
    seed: int | None,
    bar: Any,
) -> Fit:
    start = time.perf_counter()
    before = [p.detach().clone() for p in parameters]
    with undone_by_errors(parameters):
        losses = minimise(model, guide, batch, parameters, steps=steps, draws=draws, seed=seed or 0)
    if not math.isfinite(losses[-1]):
        restore(parameters, before)
        raise Diverged(f"the loss is {losses[-1]} from the start; the parameters were left alone")
    bar.update(len(losses))
    bar.set_postfix({"loss": f"{losses[-1]:.6g}"}, refresh=False)
    bar.close()
    seconds = time.perf_counter() - start
    return Fit(losses, [], seconds, len(losses), len(losses) - 1, "L-BFGS", ELBO(), "eager")
