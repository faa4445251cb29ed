"""What computes a loss and its gradients: a program, its graph, or that graph compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppvae._context import unchecked
from ppvae.staging import NotStageable, Staged, one_line, stage

__all__ = ["Runner", "how_to_run", "loss_and_gradients"]

# Steps after which it has paid to stage a loss, and to compile it: it takes 0.4 s and 5 s or so,
# and saves 0.9 and 0.7 ms of each step of a small network, the same of each step of a large one
# (`examples/benchmark.py` measures all four).
STAGE, COMPILE = 1_000, 10_000


def how_to_run(compile: Any, steps: int, rows: int) -> str:
    """How to run the loss: "eager", "staged" or "compiled"; see `compile` of `fit`.

    Raises:
        ValueError: `compile` is none of its values.
    """
    if not isinstance(compile, bool) and compile != "auto":
        raise ValueError(f'compile: expected "auto", True or False, got {compile!r}')
    if compile is False or rows < 2:
        return "eager"
    if compile is True or steps >= COMPILE:
        return "compiled"
    return "staged" if steps >= STAGE else "eager"


class Runner:
    """Computes the loss of a batch, and its gradients where that takes no autograd.

    What cannot be staged runs eagerly and what cannot be compiled runs staged, with one line that
    says why.

    Attributes:
        how: "eager", "staged" or "compiled".
        parameters: what is trained; of plain `pyro.param` statements with the same memory.
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        objective: Any,
        size: int,
        parameters: list[Tensor],
        how: str,
        example: tuple[Tensor, ...],
    ) -> None:
        self.model, self.guide, self.objective, self.size = model, guide, objective, size
        self.how, self.parameters = how, parameters
        self._staged: Staged | None = None
        if how == "eager":
            return
        try:
            self._staged = stage(model, guide, *example, objective=objective, size=size)
        except NotStageable as error:
            self._instead("eager", error)
            return
        self.parameters = [p for p in self._staged.parameters() if p.requires_grad]
        if how == "compiled":
            self._function = loss_and_gradients(self._staged, compiled=True)

    def __call__(self, batch: tuple[Tensor, ...], step: int) -> tuple[Tensor, list[Any] | None]:
        """The loss, and pairs of a parameter and its gradient; None if `backward` gives them."""
        staged = self._staged
        if staged is None:
            return self.eager(batch, step), None
        if self.how == "staged" or not staged.covers(*batch):
            with unchecked():
                return staged(*batch, step=step), None
        state, data = staged.state(), staged.data(*batch, step=step)
        try:
            loss, slopes = self._function(state, data)
        except Exception as error:  # whatever a compiler may raise
            self._instead("staged", error)
            return staged.rest(*state, *data), None
        return loss, list(zip([state[at] for at in staged.trained()], slopes, strict=True))

    def eager(self, batch: tuple[Tensor, ...], step: int, *, checked: bool = False) -> Tensor:
        """The loss by way of the program; with the caller's checks of arguments, if asked for."""
        told = {"size": self.size, "step": step}
        if checked:
            return self.objective(self.model, self.guide, *batch, **told)
        with unchecked():
            return self.objective(self.model, self.guide, *batch, **told)

    def _instead(self, how: str, error: Exception) -> None:
        self.how = how
        warnings.warn(f"fit: runs {how}; {one_line(error)}", stacklevel=4)


def loss_and_gradients(
    staged: Staged, *, compiled: bool, replicated: bool = False
) -> Callable[[list[Tensor], list[Any]], tuple[Tensor, list[Tensor]]]:
    """The function from the state and the data of a staged loss to its value and its gradients.

    One graph holds both passes, so that nothing of autograd is left to run; nothing in it depends
    on the number of data.

    Args:
        staged: the loss.
        compiled: compile it, at the first call, for which the data must be two or more.
        replicated: every value has a first dimension, of replicates that have nothing to do with
            each other; random numbers that are left in the graph differ between them.

    Returns:
        A function `(state, data) -> (loss, gradients)`: `state` as `Staged.state` gives it, `data`
        as `Staged.data`; the gradients are those of `Staged.trained`.
    """
    rest, trained = staged.rest, staged.trained()

    def value_and_slopes(
        leaves: list[Tensor], state: list[Tensor], data: list[Any]
    ) -> tuple[Tensor, list[Tensor]]:
        def loss(leaves: list[Tensor]) -> Tensor:
            given = list(state)
            for at, leaf in zip(trained, leaves, strict=True):
                given[at] = leaf
            return rest(*given, *data)

        slopes, value = torch.func.grad_and_value(loss)(leaves)
        return value, slopes

    function: Any = value_and_slopes
    if replicated:
        function = torch.vmap(function, randomness="different")
    if compiled:
        function = torch.compile(function, fullgraph=True, options={"fallback_random": True})
    seen = False

    def run(state: list[Tensor], data: list[Any]) -> tuple[Tensor, list[Tensor]]:
        nonlocal seen
        if not seen:
            for value in data:
                if isinstance(value, Tensor) and value.dim() > replicated:
                    torch._dynamo.maybe_mark_dynamic(value, int(replicated))
            seen = True
        with torch.no_grad():
            return function([state[at] for at in trained], state, data)

    return run
