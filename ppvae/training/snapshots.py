"""The parts of the training loop: steps, parameters, checks, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Diverged(ArithmeticError):
    """The loss stopped being finite; parameters of at most ten steps before are in place."""


class Kept:
    """Parameters of some steps back, with a finite loss: the way back from a step into nowhere.

    To keep those of every step would cost a tenth of it.
    """

    EVERY = 10

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters, self.step = parameters, 0
        self.copies = [p.detach().clone() for p in parameters]

    def keep(self, step: int) -> None:
        """Keeps the parameters as they are, if it is time again."""
        if step % self.EVERY == 0 and self.copies:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.parameters)
            self.step = step

    def back(self) -> str:
        """Puts the parameters back and says to where."""
        restore(self.parameters, self.copies)
        return f"the parameters are back at those of step {self.step}"


@contextmanager
def undone_by_errors(parameters: list[Tensor]) -> Iterator[None]:
    """Puts the parameters back if an error ends the training, unless that has done so itself."""
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    except Diverged:
        raise
    except Exception:
        restore(parameters, before)
        raise


def restore(parameters: list[Tensor], values: list[Tensor]) -> None:
    """Gives parameters the values, in place."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
