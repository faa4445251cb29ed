"""The loss and its gradients as one graph, which can be compiled and vectorized."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae._checks import TROUBLE
from ppvae._scopes import random_state, stacklevel, unchecked, without_warnings
from ppvae.staging.passes import drop_unused, spell_sizes
from ppvae.staging.staged import NotStageable, Staged, alike, one_line

# from leaves, state and data to the loss and its slopes at the leaves
_Function = Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]


class Gradients:
    """The loss and its gradients as a function of the state and the data of a staged loss.

    One graph holds both passes, so that nothing of autograd is left to run; nothing in it depends
    on the number of data. It is made in the first call, or by `make`.

    Args:
        staged: the loss.
        compiled: compile it; if that fails, run it as it is and say why.
        replicated: every value has a first dimension, of replicates that have nothing to do with
            each other; random numbers that are left in the graph differ between them.

    Attributes:
        trained: which values of the state have gradients.
        execution: "compiled" or "staged".
    """

    def __init__(self, staged: Staged, *, compiled: bool, replicated: bool = False) -> None:
        self.staged, self.trained, self.replicated = staged, staged.trained(), replicated
        self.execution = "compiled" if compiled else "staged"
        self._plain: _Function = value_and_slopes(staged, self.trained)
        if replicated:
            self._plain = torch.vmap(self._plain, randomness="different")
        self._function: Any = None  # the graph of both passes, or that graph compiled
        self._shapes: Any = None  # of the only data that it is for; None: it is for all

    def __call__(self, state: list[Tensor], data: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of `trained`.

        Args:
            state: as `Staged.state` gives it.
            data: as `Staged.data` gives it, of two data or more.
        """
        leaves = [state[at] for at in self.trained]
        with torch.no_grad():
            if self._function is None:
                self.make(state, data)
            if self._shapes is None or self._shapes == _shapes(data):
                return self._function(leaves, state, data)
            with without_warnings():  # of `torch.vmap`, that an operation goes one by one
                return self._plain(leaves, state, data)

    def make(self, state: list[Tensor], data: list[Tensor]) -> None:
        """Makes the graph: for data of any size, or, where that fails, of the size at hand."""
        leaves = [state[at] for at in self.trained]
        scopes = random_state(None, keep=True), unchecked(), without_warnings()
        with torch.no_grad(), scopes[0], scopes[1], scopes[2]:
            try:
                graph = self._traced(leaves, state, self._of_odd_size(state, data))
                right = self._agree(graph, self._plain, leaves, state, data)
            except Exception:  # an operation that must know a size says so in any of many ways
                right = False
            if not right:
                self._shapes = _shapes(data)
                graph = self._traced(leaves, state, data, mode="fake")
        self._function = graph
        if self.execution == "compiled":
            try:
                with torch.no_grad():
                    self._function = self._compiled(graph, leaves, state, data)
            except Exception as error:  # whatever a compiler may raise, which is passed on
                words = f"fit: staged, not compiled; {one_line(error)} ({TROUBLE})"
                warnings.warn(words, stacklevel=stacklevel())
                self.execution = "staged"

    def _compiled(self, graph: _Function, leaves: Any, state: Any, data: Any) -> _Function:
        """The graph compiled for data of any size, which must give what the graph gives."""
        if self._shapes is not None:
            raise NotStageable("the graph is for batches of one size only")
        for value in data:
            if value.dim() > self.replicated:
                torch._dynamo.maybe_mark_dynamic(value, int(self.replicated))
        options: Any = {"fallback_random": True}  # the numbers that PyTorch itself would draw
        with unchecked(), without_warnings():  # PyTorch would turn checks off for good
            function = torch.compile(graph, fullgraph=True, options=options)
            if not self._agree(function, graph, leaves, state, data):
                raise NotStageable("the compiled graph gives other gradients")
        return function

    def _traced(self, leaves: Any, state: Any, data: Any, mode: Any = "symbolic") -> fx.GraphModule:
        graph = make_fx(self._plain, tracing_mode=mode)(leaves, state, data)
        spell_sizes(graph.graph)
        drop_unused(graph.graph)
        graph.recompile()
        return graph

    def _agree(self, one: _Function, other: _Function, leaves: Any, state: Any, data: Any) -> bool:
        """Whether two functions give the same losses and gradients; no buffer is moved."""
        outcomes: list[list[Tensor]] = []
        for function in (one, other):
            with random_state(0):
                copies = [v if isinstance(v, nn.Parameter) else v.clone() for v in state]
                loss, slopes = function(leaves, copies, data)
                outcomes.append([loss, *slopes])
        return alike(*outcomes)

    def _of_odd_size(self, state: list[Tensor], data: list[Tensor]) -> list[Tensor]:
        """Data of sizes that nothing else has: sizes that are equal are traced as one."""
        each = [data]
        if self.replicated:
            each = [[value[k] for value in data] for k in range(len(data[0]))]
        taken = {size for value in [*state, *data] for size in value.shape}
        names = self.staged.sizes
        free = [size for size in range(3, len(taken) + len(names) + 16) if size not in taken]
        for start in range(len(free) - len(names)):
            sizes = dict(zip(names, free[start:], strict=False))
            resized = [self.staged.resized(values, sizes) for values in each]
            if None not in resized:
                return [
                    torch.stack(v) if self.replicated else v[0] for v in zip(*resized, strict=True)
                ]
        raise NotStageable("the graph is for batches of one size only")


def value_and_slopes(staged: Staged, trained: list[int]) -> _Function:
    """A function of leaves, state and data, which gives the loss and its slopes at the leaves."""

    def call(leaves: Any, state: Any, data: Any) -> tuple[Tensor, list[Tensor]]:
        def loss(leaves: list[Tensor], state: list[Tensor]) -> Tensor:
            arguments = list(state)
            for at, leaf in zip(trained, leaves, strict=True):
                arguments[at] = leaf
            # without the call of a module, which prints the graph if there is an error in it
            return staged.rest.forward(*arguments, *data)[0]

        slopes, value = torch.func.grad_and_value(loss)(leaves, state)
        return value, slopes

    return call


def _shapes(data: list[Tensor]) -> list[torch.Size]:
    return [value.shape for value in data]
