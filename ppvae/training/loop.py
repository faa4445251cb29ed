"""The one loop of training: steps of an optimizer, with a way back from where they may lead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ppvae.training.snapshots import Diverged, Snapshot

_EVERY = 10  # steps between two snapshots: to take one in every step would cost a tenth of it


class Engine(Protocol):
    """What computes losses and gradients: for one model and its guide, or for several at once.

    Attributes:
        replicates: how many losses there are.
        parameters: what the optimizer moves; the first dimension is that of replicates, if there
            are several.
        modules: what holds the buffers that a call moves.
    """

    replicates: int
    parameters: list[Tensor]
    modules: list[nn.Module]

    def minibatches(self) -> Iterable[Any]:
        """Goes once through the data."""

    def data(self, minibatch: Any, step: int) -> tuple[Any, int]:
        """What the losses of a step are computed from, and the number of data in it."""

    def losses(self, data: Any, step: int) -> Tensor:
        """The losses in nats per datum; leaves the gradients in the parameters."""

    def blame(self, data: Any) -> str:
        """From what a loss is not finite, as ", from the term"; empty, if that is not known."""

    def write_back(self) -> None:
        """Gives models and guides the values of the parameters, where those are copies."""


class Steps:
    """Steps of an optimizer on the losses of an engine.

    Attributes:
        number: how many were taken.
        snapshot: what was before the steps, or one of the last ten.
    """

    def __init__(self, engine: Engine, optimizer: Any) -> None:
        self.engine, self.optimizer, self.number = engine, optimizer, 0
        self.snapshot = Snapshot(engine.parameters, engine.modules)

    def take(self, minibatch: Any) -> tuple[list[float], int]:
        """Takes a step; returns the losses before it, and the number of data in the minibatch.

        Raises:
            Diverged: a loss is not finite; parameters and buffers are those of the snapshot.
        """
        data, rows = self.engine.data(minibatch, self.number)
        found: list[list[float]] = []

        def evaluate() -> Tensor:
            for parameter in self.engine.parameters:
                parameter.grad = None
            losses = self.engine.losses(data, self.number)
            found.append(losses.reshape(-1).tolist())
            for replicate, loss in enumerate(found[-1]):
                if not math.isfinite(loss):
                    self._diverged("the loss", replicate, f"is {loss}", self.engine.blame(data))
            if self.number % _EVERY == 0:
                self.snapshot.take(self.number)
            return losses

        if self.optimizer is not None and self.engine.replicates == 1:
            self.optimizer.step(evaluate)
        else:  # replicates have no loss in common, by which a step of one could be judged
            evaluate()
            if self.optimizer is not None:
                self.optimizer.step()
        self.number += 1
        return found[0], rows

    def check(self) -> None:
        """Raises Diverged, if the last step led out of the finite numbers."""
        for parameter in self.engine.parameters:
            finite = torch.isfinite(parameter).reshape(self.engine.replicates, -1).all(1).tolist()
            if not all(finite):
                self._diverged(
                    "a parameter", finite.index(False), "is not finite", ", from its gradient"
                )

    def _diverged(self, what: str, replicate: int, how: str, why: str) -> None:
        self.snapshot.put_back()
        self.engine.write_back()
        which = f" of replicate {replicate}" if self.engine.replicates > 1 else ""
        raise Diverged(
            f"{what}{which} {how} at step {self.number}{why}; parameters and buffers are back at "
            f"those of step {self.snapshot.step}"
        )


def progress_bar(num_epochs: int, progress: Any) -> Any:
    """A progress bar over epochs; a string is its label, False hides it."""
    label = progress if isinstance(progress, str) else "fit"
    return tqdm(range(num_epochs), desc=label, disable=not progress, unit="epoch")


class History(NamedTuple):
    """What a training tells beside the parameters.

    Attributes:
        losses: of each epoch and replicate, in nats per datum, averaged over the data.
        validation_losses: after each epoch; empty without validation data.
        num_steps: steps of the optimizer.
        best_epoch: the epoch, from 0, whose parameters were kept.
    """

    losses: list[list[float]]
    validation_losses: list[float]
    num_steps: int
    best_epoch: int


def train(
    engine: Engine,
    optimizer: Any,
    epochs: Any,
    *,
    validate: Callable[[], float] | None = None,
    patience: int | None = None,
) -> History:
    """Trains for some epochs, or until the validation loss has stopped falling.

    After an error parameters and buffers are as they were before, but for `Diverged` as at most ten
    steps before it.

    Args:
        engine: what computes losses and gradients.
        optimizer: what moves the parameters; None if there are none.
        epochs: a progress bar over the epochs.
        validate: returns a loss, and is asked after each epoch.
        patience: after how many epochs without a lower one to stop and go back to the best.
    """
    before = Snapshot(engine.parameters, engine.modules)
    try:
        history = _epochs(Steps(engine, optimizer), epochs, validate, patience)
    except Diverged:
        raise
    except Exception:
        before.put_back()
        raise
    engine.write_back()
    return history


def _epochs(steps: Steps, epochs: Any, validate: Any, patience: int | None) -> History:
    engine = steps.engine
    history: list[list[float]] = []
    validation: list[float] = []
    best = Snapshot(engine.parameters, engine.modules) if patience else None
    lowest, kept = math.inf, -1
    for epoch in epochs:
        totals, count = [0.0] * engine.replicates, 0
        for minibatch in engine.minibatches():
            losses, rows = steps.take(minibatch)
            totals = [total + loss * rows for total, loss in zip(totals, losses, strict=True)]
            count += rows
        steps.check()
        history.append([total / count for total in totals])
        shown = {"loss": f"{sum(history[-1]) / len(totals):.4g}"}
        if validate is not None:
            validation.append(validate())
            shown["validation"] = f"{validation[-1]:.4g}"
            if validation[-1] < lowest:
                lowest, kept = validation[-1], epoch
                if best is not None:
                    best.take(steps.number)
        epochs.set_postfix(shown, refresh=False)
        if (patience is not None and epoch - kept >= patience) or not engine.parameters:
            break  # without parameters, of a family without channels, it is only measured
    epochs.close()
    if best is None or kept < 0:
        kept = len(history) - 1
    else:
        best.put_back()
    return History(history, validation, steps.number, kept)
