"""Copies of the parameters and buffers that a training moves, to go back to."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppvae._checks import TROUBLE


class Diverged(ArithmeticError):
    """The loss stopped being finite; all that was trained is as at most ten steps before.

    The message names the first number that is not finite: whose it is (the guide's, the model's, or
    that of a gradient), the site, the datum and the dimension, as far as they can be known; and
    what to do about it.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.add_note(TROUBLE)


class Snapshot:
    """A copy of the parameters and buffers of a training, as they were after some step.

    Args:
        parameters: what the optimizer moves.
        modules: modules, whose calls move their buffers.

    Attributes:
        step: number of steps of the optimizer before it was taken.
        values: the copies: of the parameters, then of the buffers.
    """

    def __init__(self, parameters: Iterable[Tensor], modules: Iterable[nn.Module] = ()) -> None:
        parts = {id(part): part._buffers for module in modules for part in module.modules()}
        # a buffer may be replaced as well as written to, so it is looked up by its name
        self._buffers = [(part, n) for part in parts.values() for n in part if part[n] is not None]
        self._parameters, self.step = list(parameters), 0
        self.values = [value.detach().clone() for value in self.now()]

    def take(self, step: int, rows: list[int] | None = None) -> None:
        """Copies the values of now, or of some replicates only."""
        self.step = step
        with torch.no_grad():
            if rows is not None:
                for value, now in zip(self.values, self.now(), strict=True):
                    value[rows] = now[rows]
            elif self.values:
                torch._foreach_copy_(self.values, self.now())

    def put_back(self, rows: list[int] | None = None) -> None:
        """Gives parameters and buffers, or those of some replicates, the values of the copy."""
        with torch.no_grad():
            for now, before in zip(self.now(), self.values, strict=True):
                if rows is not None:
                    now[rows] = before[rows]
                elif not torch.equal(now, before):  # one that was expanded cannot be written to
                    now.copy_(before)

    def now(self) -> list[Tensor]:
        """The parameters and buffers themselves, in the order of `values`."""
        buffers: list[Any] = [part[name] for part, name in self._buffers]
        return self._parameters + buffers


@contextmanager
def undone_by_errors(parameters: list[Tensor], modules: list[nn.Module]) -> Iterator[Snapshot]:
    """Puts parameters and buffers back if an error ends the training, unless it is `Diverged`."""
    before = Snapshot(parameters, modules)
    try:
        yield before
    except Diverged:
        raise
    except BaseException:
        before.put_back()
        raise
