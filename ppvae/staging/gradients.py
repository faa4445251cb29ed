"""The loss and its gradients as one graph, which can be compiled and vectorized."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from ppvae._scopes import random_state, unchecked, without_reports, without_warnings
from ppvae.staging.staged import NotStageable, Staged, alike
from ppvae.staging.vectorized import Slopes, traced, vectorized

_MOST = 2  # graphs for single sizes of minibatches: the full one, and the last one of a pass


class Gradients:
    """The loss and its gradients as a function of the state and the data of a staged loss.

    One graph holds both passes, so that nothing of autograd is left to run. It is for data of any
    size, or, where an operation must know the size, one for each of two sizes. It is made in the
    first call, or by `make`.

    Args:
        staged: the loss.
        compiled: compile it; if that fails, run it as it is, and `why_not` says why.
        replicated: every value has a first dimension, of replicates that have nothing to do with
            each other; random numbers that are left in the graph differ between them.

    Attributes:
        trained: which values of the state have gradients.
        execution: "compiled" or "staged".
        why_not: what the compiler said, where it was to be compiled and is not.
        is_full: whether a third size of minibatches came, for which there is no graph.
    """

    def __init__(self, staged: Staged, *, compiled: bool, replicated: bool = False) -> None:
        self.staged, self.trained, self.replicated = staged, staged.trained(), replicated
        self.execution = "compiled" if compiled else "staged"
        self.why_not: Exception | None = None
        self.is_full = False
        self._plain: Slopes = value_and_slopes(staged, self.trained)
        if replicated:
            self._plain = torch.vmap(self._plain, randomness="different")
        # graphs of both passes, compiled or not, by the shapes of their data; of any, by None
        self._functions: dict[Any, Slopes] = {}

    def __call__(self, state: list[Tensor], data: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of `trained`.

        Args:
            state: as `Staged.state` gives it.
            data: as `Staged.data` gives it, of two data or more.
        """
        leaves = [state[at] for at in self.trained]
        with torch.no_grad():
            function = self._functions.get(None, self._functions.get(_shapes(data)))
            if function is None and len(self._functions) < _MOST:
                function = self.make(state, data)
            if function is not None:
                return function(leaves, state, data)
            self.is_full = True
            with without_warnings():  # of `torch.vmap`, that an operation goes one by one
                return self._plain(leaves, state, data)

    def make(self, state: list[Tensor], data: list[Tensor]) -> Slopes:
        """Makes the graph: for data of any size, or, where that fails, of the size at hand."""
        leaves, shapes = [state[at] for at in self.trained], None
        with (
            torch.no_grad(),
            random_state(None, keep=True),
            unchecked(),
            without_warnings(),
            without_reports(),
        ):
            try:
                graph = self._of_any_size(leaves, state, data)
                right = self._agree(graph, self._plain, leaves, state, data)
            except Exception:  # an operation that must know a size says so in any of many ways
                right = False
            if not right:
                shapes = _shapes(data)
                graph = traced(self._plain, leaves, state, data, mode="fake")
        function: Slopes = graph
        if self.execution == "compiled":
            try:
                with torch.no_grad():
                    function = self._compiled(graph, leaves, state, data, dynamic=shapes is None)
            except Exception as error:  # whatever a compiler may raise
                self.execution, self.why_not = "staged", error
        self._functions[shapes] = function
        return function

    def of_any_size(self, count: int, state: list[Tensor], data: list[Tensor]) -> Slopes:
        """The graph of some replicates for data of any size, not compiled.

        Args:
            count: how many they are.
            state: that of all, or of more.
            data: likewise.

        Raises:
            NotStageable: there is none.
        """
        graph = self._functions.get(None)
        if not isinstance(graph, fx.GraphModule):
            words = "the graph is for minibatches of one size only"
            raise NotStageable(words, "let the objective ask for no size")
        if count < len(state[0]):
            some = [[value[:count] for value in values] for values in (state, data)]
            leaves = [some[0][at] for at in self.trained]
            with torch.no_grad(), unchecked(), without_warnings():
                graph = self._of_any_size(leaves, *some)
        function: Slopes = graph.forward
        return function

    def _compiled(
        self, graph: Slopes, leaves: Any, state: Any, data: Any, *, dynamic: bool
    ) -> Slopes:
        """The graph compiled, for data of any size or of one; it must give what the graph gives."""
        for value in data if dynamic else ():
            if value.dim() > self.replicated:
                torch._dynamo.maybe_mark_dynamic(value, int(self.replicated))
        options: Any = {"fallback_random": True}  # the numbers that PyTorch itself would draw
        with unchecked(), without_warnings():  # PyTorch would turn checks off for good
            function = torch.compile(graph, fullgraph=True, options=options)
            if not self._agree(function, graph, leaves, state, data):
                raise NotStageable("the compiled graph gives other gradients")
        return function

    def _of_any_size(self, leaves: Any, state: Any, data: Any) -> fx.GraphModule:
        """The graph for data of any size; raises where there is none."""
        if self.replicated:
            return vectorized(self.staged, self._plain, leaves, state, data)
        taken = {size for value in [*state, *data] for size in value.shape}
        names = self.staged.sizes  # sizes that are equal would be traced as one
        free = [size for size in range(3, len(taken) + len(names) + 16) if size not in taken]
        for start in range(len(free) - len(names)):
            sizes = dict(zip(names, free[start:], strict=False))
            resized = self.staged.resized(data, sizes)
            if resized is not None:
                return traced(self._plain, leaves, state, resized, mode="symbolic")
        raise NotStageable("the graph is for batches of one size only")

    def _agree(self, one: Slopes, other: Slopes, leaves: Any, state: Any, data: Any) -> bool:
        """Whether two functions give the same losses and gradients; no buffer is moved."""
        outcomes: list[list[Tensor]] = []
        for function in (one, other):
            with random_state(0):
                copies = [v if isinstance(v, nn.Parameter) else v.clone() for v in state]
                loss, slopes = function(leaves, copies, data)
                outcomes.append([loss, *slopes])
        return alike(*outcomes)


def value_and_slopes(staged: Staged, trained: list[int]) -> Slopes:
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


def _shapes(data: list[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(value.shape for value in data)
