"""The one loop of training: steps of an optimizer, which are taken back where they diverge."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ppvae._checks import expect
from ppvae.objectives.base import at_step
from ppvae.training.blame import blame
from ppvae.training.course import Ending, course
from ppvae.training.snapshots import Diverged, Snapshot, undone_by_errors
from ppvae.training.task import Task, adam

_EVERY = 10  # steps between two snapshots: to take one in every step would cost a tenth of it


class Fit(NamedTuple):
    """The course of a training; losses are in nats per datum.

    Attributes:
        losses: values of the objective in each epoch, averaged over its data while they were
            trained on: the negative ELBO, if no other was asked for. For global latents, after each
            step, by the draws that are held fixed; the last one by 10,000 fresh draws.
        validation_losses: the objective on the validation data after each epoch; empty without.
        seconds: time in the loop.
        num_steps: steps of the optimizer.
        best_epoch: the epoch, from 0, whose parameters were kept: the last one, or with early
            stopping the one with the lowest validation loss since the objective stood still.
        method: "stochastic gradient", or "L-BFGS" (see `optimizer` of `fit`).
        objective: what was minimised, such as `objectives.ELBO()`.
        execution: "eager", "staged" or "compiled".
        converged: whether it ended at the optimum of its objective, or stochastic training where
            the loss was flat; None if that cannot be judged.
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

    def goals(self) -> list[Any]:
        """The objectives of the next step, without what moves in them."""
        return [at_step(objective, self.number) for objective in self.engine.objectives]

    def slow_down(self, factor: float) -> None:
        """Multiplies the learning rate."""
        if factor != 1.0:
            for group in self.optimizer.param_groups:
                group["lr"] *= factor

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
    ending: Ending | None = None,
    validate: Callable[[int], float] | None = None,
    patience: int | None = None,
) -> list[Fit]:
    """Trains for some epochs, or until the loss is flat, or the validation loss falls no longer.

    An error puts parameters and buffers back to where they were before the training, but `Diverged`
    to where they were at most ten steps before it.

    Args:
        engine: what computes losses and gradients.
        optimizer: called as `optimizer(parameters, lr=learning_rate)`, if there are any parameters;
            None is Adam.
        learning_rate: step size.
        epochs: a progress bar over the epochs.
        ending: ends the training of one model when its loss is flat; None goes through all epochs.
        validate: returns the validation loss after a number of steps; it is called after each
            epoch.
        patience: the training stops after so many epochs without a lower validation loss, and goes
            back to the best epoch. While the objective moves every epoch is a new beginning.

    Returns:
        The course of the training of each replicate, and its share of the time.
    """
    start, parameters = time.perf_counter(), engine.parameters
    made: Any = (optimizer or adam)(parameters, lr=learning_rate) if parameters else None
    fits = not parameters or all(hasattr(made, name) for name in ("step", "param_groups"))
    expect(fits, "optimizer", "a function that returns an optimizer", made, TypeError)
    steps = Steps(engine, made)
    with undone_by_errors(parameters, engine.modules):
        run = _epochs(steps, epochs, ending, validate, patience)
    engine.write_back()
    seconds = (time.perf_counter() - start) / len(engine.objectives)
    ends = seconds, steps.number, run.best_epoch, "stochastic gradient"
    results = []
    columns = zip(zip(*run.losses, strict=True), engine.objectives, run.still, strict=True)
    for own, goal, still in columns:
        verdict = _verdict(own, still, run, steps.number, ending)
        results.append(Fit([*own], run.validation, *ends, goal, engine.execution, *verdict))
    return results


class _Epochs(NamedTuple):
    """What came of the epochs.

    Attributes:
        losses: of each epoch, for each replicate.
        validation: the validation losses.
        best_epoch: the epoch whose parameters are in place.
        still: the first epoch from which on the objective of each replicate stood still.
    """

    losses: list[list[float]]
    validation: list[float]
    best_epoch: int
    still: list[int]


def _verdict(
    losses: Sequence[float], still: int, run: _Epochs, steps: int, ending: Ending | None
) -> tuple[bool | None, str]:
    """Whether a stochastic training is at its end, None if that cannot be judged, and in words."""
    if run.best_epoch < len(losses) - 1:
        lowest = f"which was lowest in epoch {run.best_epoch}"
        return None, f"stopped by the validation loss, {lowest}"
    if ending is not None and ending.flat is not None:
        return ending.flat, ending.words
    if still >= len(losses):
        return None, "the objective changed on the way, so that its values say little"
    return course(losses[still:], steps)


def _epochs(
    steps: Steps,
    epochs: Any,
    ending: Ending | None,
    validate: Callable[[int], float] | None,
    patience: int | None,
) -> _Epochs:
    """Goes through the epochs, and back to the best one."""
    engine, count = steps.engine, len(steps.engine.objectives)
    history: list[list[float]] = []
    validation: list[float] = []
    best: Snapshot | None = None
    lowest, best_epoch, still = math.inf, -1, [0] * count
    goals = steps.goals()
    for epoch in epochs:
        before, totals, size = goals, [0.0] * count, 0
        for minibatch in engine.minibatches():
            values, rows = steps.take(minibatch)
            totals = [total + value * rows for total, value in zip(totals, values, strict=True)]
            size += rows
        steps.check()
        history.append([total / size for total in totals])
        goals = steps.goals()
        still = [
            since if now == was else epoch + 1
            for since, now, was in zip(still, goals, before, strict=True)
        ]
        if still[0] == epoch + 1:  # what was lower before was lower for another objective
            lowest = math.inf
        shown = {"loss": f"{sum(totals) / size / count:.4g}"}
        if validate is not None:
            validation.append(validate(steps.number))
            shown["validation"] = f"{validation[-1]:.4g}"
            if validation[-1] < lowest:
                lowest, best_epoch = validation[-1], epoch
                best = Snapshot(engine.parameters, engine.modules) if patience else None
        epochs.set_postfix(shown, refresh=False)
        if (patience is not None and epoch - best_epoch >= patience) or not engine.parameters:
            break  # without parameters, of a family without channels, it is only measured
        if ending is not None:
            loss = None if still[0] == epoch + 1 else history[-1][0]
            if not ending.go_on(loss, steps.number):
                break
            steps.slow_down(ending.factor)
    epochs.close()
    if best is not None:
        best.put_back()
    return _Epochs(history, validation, epoch if best is None else best_epoch, still)
