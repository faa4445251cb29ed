"""What a training returns: its course, and a verdict on where it ended."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Fit(NamedTuple):
    """The course of a training; losses are in nats per datum.

    Attributes:
        losses: values of the objective in each epoch, averaged over its data while they were
            trained on: the negative ELBO, if no other was asked for. For global latents, after each
            step, by the draws that are held fixed; the last one by 10,000 fresh draws. The last one
            of an interrupted training may be of a part of an epoch.
        validation_losses: the objective on the validation data after each epoch; empty without.
        seconds: time in the loop.
        num_steps: steps of the optimizer.
        best_epoch: the epoch, from 0, whose parameters were kept: the last one, or with early
            stopping the one with the lowest validation loss since the objective stood still.
        method: "stochastic gradient", or "L-BFGS" (see `optimizer` of `fit`).
        objective: what was minimised, such as `objectives.ELBO()`.
        execution: "eager", "staged", "compiled" (the loss and its gradients), or "looped" (whole
            steps, many by one call).
        converged: whether it ended at the optimum of its objective, or stochastic training where
            the loss was flat; None if that cannot be judged.
        verdict: the same in one sentence, with numbers.
        interrupted: whether Ctrl-C ended it.
        optimizer: the optimizer at the end; None where there was none.
        execution_reason: why `execution` is not a faster one, in words; empty where it is "looped"
            and nothing is run otherwise.
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
    interrupted: bool = False
    optimizer: Any = None
    execution_reason: str = ""

    def __repr__(self) -> str:
        how = f"{self.method} ({self.execution})"
        course = f"Fit by {how}: {self.num_steps} steps, {self.seconds:.3g} s"
        loss = f"loss {self.losses[-1]:.6g} nats per datum" if self.losses else "no loss"
        lines = [course, loss, self.verdict or "not judged"]
        return "\n".join([*lines, *filter(None, [self.execution_reason])])

    @property
    def history(self) -> dict[str, list[Any]]:
        """Columns of a table, one row per epoch; `pandas.DataFrame(fit.history)` prints it."""
        columns: dict[str, list[Any]] = {"epoch": [*range(len(self.losses))], "loss": self.losses}
        if self.validation_losses:
            missing = [math.nan] * (len(self.losses) - len(self.validation_losses))
            columns["validation_loss"] = self.validation_losses + missing
        return columns
