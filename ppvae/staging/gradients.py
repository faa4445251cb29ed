"""What computes a loss and its gradients: a program, its graph, or that graph compiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae._scopes import random_state, unchecked, without_warnings
from ppvae.staging.passes import drop_unused, spell_sizes
from ppvae.staging.staged import NotStageable, Staged, alike, one_line


class Gradients:
    """The loss and its gradients as a function of the state and the data of a staged loss.

    One graph holds both passes, so that nothing of autograd is left to run; nothing in it depends
    on the number of data.

    Args:
        staged: the loss.
        compiled: compile it; if that fails, run it as it is and say why.
        replicated: every value has a first dimension, of replicates that have nothing to do with
            each other; random numbers that are left in the graph differ between them.

    Attributes:
        execution: "compiled" or "staged".
    """

    def __init__(self, staged: Staged, *, compiled: bool, replicated: bool = False) -> None:
        self.staged, self.trained, self.replicated = staged, staged.trained(), replicated
        self.execution = "compiled" if compiled else "staged"
        self._graph: Any = None  # of both passes
        self._function: Any = None  # the same, compiled
        self._shapes: Any = None  # of the only data that it is for; None: it is for all
        rest, trained = staged.rest, self.trained

        def value_and_slopes(
            leaves: list[Tensor], state: list[Tensor], data: list[Any]
        ) -> tuple[Tensor, list[Tensor]]:
            def loss(leaves: list[Tensor], state: list[Tensor]) -> Tensor:
                given = list(state)
                for at, leaf in zip(trained, leaves, strict=True):
                    given[at] = leaf
                return rest(*given, *data)[0]

            slopes, value = torch.func.grad_and_value(loss)(leaves, state)
            return value, slopes

        self._plain: Any = value_and_slopes
        if replicated:
            self._plain = torch.vmap(value_and_slopes, randomness="different")

    def __call__(self, state: list[Tensor], data: list[Any]) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of `Staged.trained`.

        Args:
            state: as `Staged.state` gives it.
            data: as `Staged.data` gives it, of two data or more.
        """
        leaves = [state[at] for at in self.trained]
        with torch.no_grad():
            if self._graph is None:
                self._make(leaves, state, data)
            if self._shapes is not None and self._shapes != _shapes(data):
                with _quiet_vmap():
                    return self._plain(leaves, state, data)
            if self.execution == "compiled":
                return self._function(leaves, state, data)
            return self._graph(leaves, state, data)

    def _make(self, leaves: list[Tensor], state: list[Tensor], data: list[Any]) -> None:
        """Makes the graph: for data of any size, or, where that fails, of the size at hand.

        It is traced with a number of data that no other size is equal to: equal sizes would be
        taken for one.
        """
        with random_state(None, keep=True), unchecked(), _quiet_vmap():
            try:
                self._graph = self._traced(leaves, state, self._of_odd_size(state, data))
                right = self._agrees(self._graph, self._plain, leaves, state, data)
            except Exception:  # a size that has to be known, of which tracing says no more
                right = False
            if not right:
                self._shapes = _shapes(data)
                self._graph = self._traced(leaves, state, data, mode="fake")
        if self.execution == "compiled":
            try:
                self._compile(leaves, state, data)
            except Exception as error:  # whatever a compiler may raise
                warnings.warn(f"fit: staged, not compiled; {one_line(error)}", stacklevel=3)
                self.execution = "staged"

    def _compile(self, leaves: list[Tensor], state: list[Tensor], data: list[Any]) -> None:
        """Compiles the graph, for data of any size, and holds it against what was compiled."""
        if self._shapes is not None:
            raise NotStageable("the graph is for batches of one size only")
        for value in data:
            if isinstance(value, Tensor) and value.dim() > self.replicated:
                torch._dynamo.maybe_mark_dynamic(value, int(self.replicated))
        options: Any = {"fallback_random": True}  # the numbers that PyTorch itself would draw
        with unchecked(), without_warnings():  # PyTorch would turn checks off for good
            self._function = torch.compile(self._graph, fullgraph=True, options=options)
            if not self._agrees(self._function, self._graph, leaves, state, data):
                raise NotStageable("the compiled graph gives other gradients")

    def _traced(self, leaves: Any, state: Any, data: Any, mode: Any = "symbolic") -> Any:
        traced = make_fx(self._plain, tracing_mode=mode)(leaves, state, data)
        spell_sizes(traced.graph)
        drop_unused(traced.graph)
        traced.recompile()
        return traced

    def _agrees(self, one: Any, other: Any, leaves: Any, state: Any, data: Any) -> bool:
        """Whether two functions give the same losses and gradients; no buffer is moved."""
        found: list[list[Tensor]] = []
        for function in (one, other):
            with random_state(0):
                kept = [v if isinstance(v, nn.Parameter) else v.clone() for v in state]
                loss, slopes = function(leaves, kept, data)
                found.append([loss, *slopes])
        return alike(*found)

    def _of_odd_size(self, state: list[Tensor], data: list[Any]) -> list[Any]:
        """Data of a size that nothing else has, where the graph allows one, with their noise."""
        inputs = len(self.staged.shapes)
        taken = {size for value in [*state, *data] for size in getattr(value, "shape", ())}

        def resized(values: list[Any], rows: int) -> tuple[Any, ...]:
            batch = list(values[:inputs])
            for at, like in enumerate(self.staged.shapes):
                for dim, size in enumerate(getattr(like, "shape", ())):
                    if isinstance(size, str):
                        index = torch.arange(rows, device=batch[at].device) % batch[at].shape[dim]
                        batch[at] = batch[at].index_select(dim, index)
            return tuple(batch)

        each = [data]
        if self.replicated:
            each = [[value[k] for value in data] for k in range(len(data[0]))]
        rows = next(
            number
            for number in range(3, len(taken) + 16)
            if number not in taken and self.staged.covers(*resized(each[0], number))
        )
        drawn = [self.staged.data(resized(values, rows), values[inputs]) for values in each]
        if not self.replicated:
            return drawn[0]
        return [torch.stack(values) for values in zip(*drawn, strict=True)]


def _shapes(data: list[Any]) -> list[Any]:
    return [getattr(value, "shape", None) for value in data]


@contextmanager
def _quiet_vmap() -> Iterator[None]:
    """Without the warnings of `torch.vmap` that an operation goes replicate by replicate."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    functorch._set_vmap_fallback_warning_enabled(False)  # noqa: FBT003
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)  # noqa: FBT003
