"""The one loop of training: steps of an optimizer, which are taken back where they diverge."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ppvae._checks import expect
from ppvae.objectives.base import moving_fields
from ppvae.training.blame import blame
from ppvae.training.course import falling
from ppvae.training.snapshots import Diverged, Snapshot, undone_by_errors
from ppvae.training.task import Task, adam

_EVERY = 10  # steps between two snapshots: to take one in every step would cost a tenth of it


class Fit(NamedTuple):
    """The course of a training; losses are in nats per datum.

    Attributes:
        losses: values of the objective in each epoch, averaged over its data while they were
            trained on: the negative ELBO, if no other was asked for. For global latents, after each
            step, by the draws that are held fixed; the last one by 10,000 fresh draws.
        validation_losses: negative ELBO on the validation data after each epoch; empty without.
        seconds: time in the loop.
        num_steps: steps of the optimizer.
        best_epoch: the epoch, from 0, whose parameters were kept: the last one, or with early
            stopping the one with the lowest validation loss.
        method: "stochastic gradient", or "L-BFGS" (see `optimizer` of `fit`).
        objective: what was minimised, such as `objectives.ELBO()`.
        execution: "eager", "staged" or "compiled".
        converged: whether it ended at the optimum of its objective; None if that cannot be judged.
        verdict: the same in one sentence, with numbers.
    """

    losses: list[float]
    validation_losses: list[float]
    seconds: float
    num_steps: int
    best_epoch: int
    method: str
    objective: Callable[..., Tensor]
    execution: str
    converged: bool | None = None
    verdict: str = ""

    def __repr__(self) -> str:
        how = f"{self.method} ({self.execution})"
        course = f"Fit by {how}: {self.num_steps} steps, {self.seconds:.3g} s"
        loss = f"loss {self.losses[-1]:.6g} nats per datum"
        return "\n".join([course, loss, self.verdict or "not judged"])

    @property
    def history(self) -> dict[str, list[Any]]:
        """Columns of a table, one row per epoch; `pandas.DataFrame(fit.history)` prints it."""
        columns: dict[str, list[Any]] = {"epoch": [*range(len(self.losses))], "loss": self.losses}
        if self.validation_losses:
            columns["validation_loss"] = self.validation_losses
        return columns


class Engine(ABC):
    """What computes losses and gradients: for one model and its guide, or for several at once.

    Attributes:
        objectives: the loss of each replicate.
        parameters: what the optimizer moves; the first dimension is that of replicates, if there
            are several.
        modules: what holds the buffers that a call moves.
        execution: how it runs, "eager", "staged" or "compiled".
    """

    objectives: list[Any]
    parameters: list[Tensor]
    modules: list[nn.Module]
    execution: str

    @abstractmethod
    def minibatches(self) -> Iterable[Any]:
        """Goes once through the data."""

    @abstractmethod
    def data(self, minibatch: Any, step: int) -> tuple[Any, int]:
        """What the losses of a step are computed from, and the number of data in it."""

    @abstractmethod
    def losses(self, data: Any, step: int) -> Tensor:
        """The losses in nats per datum; leaves the gradients in the parameters."""

    @abstractmethod
    def replicate(self, number: int, data: Any) -> tuple[Task, tuple[Any, ...]]:
        """The task of one of `objectives`, with its parameters of now, and its minibatch."""

    def write_back(self) -> None:
        """Gives models and guides the values of the parameters, where those are copies."""
        return


class Steps:
    """Steps of an optimizer on the losses of an engine.

    Attributes:
        number: how many were taken.
        snapshot: parameters and buffers of before the training, or of one of the last ten steps.
    """

    def __init__(self, engine: Engine, optimizer: Any) -> None:
        self.engine, self.optimizer, self.number = engine, optimizer, 0
        self._last: Any = None  # the data of the last step
        self.snapshot = Snapshot(engine.parameters, engine.modules)

    def take(self, minibatch: Any) -> tuple[list[float], int]:
        """Takes a step; returns the losses before it, and the number of data in the minibatch.

        Raises:
            Diverged: a loss is not finite; parameters and buffers are those of the snapshot.
        """
        data, rows = self.engine.data(minibatch, self.number)
        self._last = data
        values: list[list[float]] = []

        def evaluate() -> Tensor:
            for parameter in self.engine.parameters:
                parameter.grad = None
            losses = self.engine.losses(data, self.number)
            values.append(losses.reshape(-1).tolist())
            for replicate, loss in enumerate(values[-1]):
                if not math.isfinite(loss):
                    self._diverge("the loss", replicate, f"is {loss}")
            if self.number % _EVERY == 0:
                self.snapshot.take(self.number)
            return losses

        if self.optimizer is not None and len(self.engine.objectives) == 1:
            self.optimizer.step(evaluate)
        else:  # replicates have no loss in common, by which a step of one could be judged
            evaluate()
            if self.optimizer is not None:
                self.optimizer.step()
        self.number += 1
        return values[0], rows

    def check(self) -> None:
        """Raises Diverged, if the last step led out of the finite numbers."""
        for parameter in self.engine.parameters:
            rows = parameter.reshape(len(self.engine.objectives), -1)
            finite = torch.isfinite(rows).all(1).tolist()
            if not all(finite):
                replicate = finite.index(False)
                self._diverge("a parameter", replicate, "is not finite")

    def _diverge(self, what: str, replicate: int, how: str) -> None:
        task, batch = self.engine.replicate(replicate, self._last)
        why = blame(task, batch, self.number, self._put_back)
        which = f" of replicate {replicate}" if len(self.engine.objectives) > 1 else ""
        raise Diverged(
            f"{what}{which} {how} at step {self.number}: {why}; parameters and buffers are back at "
            f"those of step {self.snapshot.step}"
        )

    def _put_back(self) -> None:
        self.snapshot.put_back()
        self.engine.write_back()


def progress_bar(num_epochs: int, progress: Any) -> Any:
    """A progress bar over epochs; a string is its label, False hides it."""
    label = progress if isinstance(progress, str) else "fit"
    return tqdm(range(num_epochs), desc=label, disable=not progress, unit="epoch")


def train(
    engine: Engine,
    optimizer: Callable[..., torch.optim.Optimizer] | None,
    learning_rate: float,
    epochs: Any,
    *,
    validate: Callable[[], float] | None = None,
    patience: int | None = None,
) -> list[Fit]:
    """Trains for some epochs, or until the validation loss has stopped falling.

    An error puts parameters and buffers back to where they were before the training, but `Diverged`
    to where they were at most ten steps before it.

    Args:
        engine: what computes losses and gradients.
        optimizer: called as `optimizer(parameters, lr=learning_rate)`, if there are any parameters;
            None is Adam.
        learning_rate: step size.
        epochs: a progress bar over the epochs.
        validate: returns the validation loss; it is called after each epoch.
        patience: the training stops after so many epochs without a lower validation loss, and goes
            back to the best epoch.

    Returns:
        The course of the training of each replicate, and its share of the time.
    """
    start, parameters = time.perf_counter(), engine.parameters
    made: Any = (optimizer or adam)(parameters, lr=learning_rate) if parameters else None
    moves = not parameters or hasattr(made, "step")
    expect(moves, "optimizer", "a function that returns an optimizer", made, TypeError)
    steps = Steps(engine, made)
    with undone_by_errors(parameters, engine.modules):
        losses, validation, best_epoch = _epochs(steps, epochs, validate, patience)
    engine.write_back()
    seconds = (time.perf_counter() - start) / len(losses)
    ends = seconds, steps.number, best_epoch, "stochastic gradient"
    return [
        Fit(own, validation, *ends, goal, engine.execution, None, _words(own, goal, best_epoch))
        for own, goal in zip(losses, engine.objectives, strict=True)
    ]


def _words(losses: list[float], objective: Any, best_epoch: int) -> str:
    """What can be said of a stochastic training."""
    if best_epoch < len(losses) - 1:
        return f"stopped by the validation loss, which was lowest in epoch {best_epoch}"
    if moving_fields([objective]):
        return "the objective changed on the way, so that its values say little"
    return falling(losses)


def _epochs(
    steps: Steps, epochs: Any, validate: Callable[[], float] | None, patience: int | None
) -> tuple[list[list[float]], list[float], int]:
    """The losses of each replicate, the validation losses, and the epoch of the last parameters."""
    engine, count = steps.engine, len(steps.engine.objectives)
    history: list[list[float]] = []
    validation: list[float] = []
    best: Snapshot | None = None
    lowest, best_epoch = math.inf, -1
    for epoch in epochs:
        totals, size = [0.0] * count, 0
        for minibatch in engine.minibatches():
            values, rows = steps.take(minibatch)
            totals = [total + value * rows for total, value in zip(totals, values, strict=True)]
            size += rows
        steps.check()
        history.append([total / size for total in totals])
        shown = {"loss": f"{sum(totals) / size / count:.4g}"}
        if validate is not None:
            validation.append(validate())
            shown["validation"] = f"{validation[-1]:.4g}"
            if validation[-1] < lowest:
                lowest, best_epoch = validation[-1], epoch
                best = Snapshot(engine.parameters, engine.modules) if patience else None
        epochs.set_postfix(shown, refresh=False)
        if (patience is not None and epoch - best_epoch >= patience) or not engine.parameters:
            break  # without parameters, of a family without channels, it is only measured
    epochs.close()
    if best is not None:
        best.put_back()
    losses = [list(own) for own in zip(*history, strict=True)]
    return losses, validation, epoch if best is None else best_epoch
