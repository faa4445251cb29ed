"""Many steps of Adam as one compiled graph with a loop in it.

A step by step training leaves the compiled code after each step, to draw noise, to pick data, to
move parameters and to read the loss. A stride draws the noise of many steps beforehand, and does
all else in one call.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._higher_order_ops.while_loop import while_loop_op
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae._scopes import random_state, unchecked, without_warnings
from ppvae.staging.artifacts import Compiled, compiled
from ppvae.staging.gradients import value_and_slopes
from ppvae.staging.passes import (
    copy_before_adding,
    drop_unused,
    is_random,
    spell_sizes,
    transpose_narrow,
)
from ppvae.staging.staged import Like, NotStageable, Staged, alike, one_line
from ppvae.staging.vectorized import Slopes, of_sizes

#: Of an argument of a step: a row of a matrix of all data is taken for each datum, or one of a
#: stack for the step, or it is the same in every step.
PICKED, STACKED, SAME = "picked", "stacked", "same"

_FIRST = torch.tensor([0])  # the number of a step
_ONE_SIZE = "the loss is for minibatches of one size only"
_ANY_SIZE = "let model, guide and objective ask for the size, as by `len(x)`, where they need it"


class Replicas(NamedTuple):
    """Losses of the same make, which were staged as one.

    Attributes:
        together: how many take a step side by side, of which the number of all is a multiple; the
            others wait until these have taken their steps.
        state: the parameters, buffers and constants of all, with a first dimension of replicates.
        slopes: losses and slopes of so many together, as `vectorized` gives them.
    """

    together: int
    state: list[Tensor]
    slopes: Slopes


class Moved(NamedTuple):
    """What steps move.

    Replicates have one vector each, which are the rows of a matrix, and as many buffers.

    Attributes:
        values: the parameters, one behind the other in a vector.
        mean: Adam's running mean of their gradients.
        square: that of their squares.
        buffers: what the loss itself moves, such as running means.
    """

    values: Tensor
    mean: Tensor
    square: Tensor
    buffers: list[Tensor]


def rates_of(betas: Sequence[float], rate: float, eps: float, done: int, steps: int) -> Tensor:
    """The settings of some steps of Adam, which a scheduler may move.

    Args:
        betas: Adam's.
        rate: the learning rate.
        eps: Adam's.
        done: how many steps were taken before.
        steps: how many there are.

    Returns:
        A tensor of shape `(steps, 6)` in double precision: the length of a step, the root of the
        weight of its squares, `1 - betas[0]`, `betas[1]`, `1 - betas[1]` and `eps`.
    """
    number = torch.arange(done + 1, done + steps + 1, dtype=torch.float64)
    first, second = map(float, betas)
    moving = torch.stack([rate / (1 - first**number), (1 - second**number).sqrt()], 1)
    still = torch.tensor([1 - first, second, 1 - second, eps], dtype=torch.float64)
    return torch.cat([moving, still.expand(steps, -1)], 1)


class Taken(NamedTuple):
    """What steps are computed from.

    Attributes:
        rates: for each step the numbers of `rates_of`, in the dtype of the parameters.
        rows: the data of each step by their numbers, of shape `(steps, batch)`, or for replicates
            `(steps, replicates, batch)`; they are of no matter where nothing is picked.
        data: as `Staged.data` gives it, each of its kind: where a step picks, all data, and where
            it takes one of a stack, a first dimension of steps, before that of replicates.
    """

    rates: Tensor
    rows: Tensor
    data: list[Tensor]


class Stride:
    """Steps of Adam on a staged loss, as many as are asked for, by one call.

    The number of steps and that of data in a minibatch may differ from call to call: the numbers
    are the same as if each step were taken alone, to the last bit.

    Args:
        staged: the loss.
        kinds: for each of `staged.data`, `PICKED`, `STACKED` or `SAME`.
        clip: the largest norm of the gradient, or None.
        example: what two steps are computed from.
        replicas: the losses of replicates that were staged, which take steps side by side; None
            for a single one.

    Attributes:
        trained: which of the state are moved by Adam.
        buffers: which the loss itself moves.

    Raises:
        NotStageable: the loss has draws that depend on numbers, or parameters that are no one
            vector; or there is no compiler, or it compiles something else.
    """

    def __init__(
        self,
        staged: Staged,
        kinds: Sequence[str],
        *,
        clip: float | None,
        example: Taken,
        replicas: Replicas | None = None,
    ) -> None:
        self.staged, self.kinds, self.trained = staged, list(kinds), staged.trained()
        self.clip, self.replicas = clip, replicas
        self.lead = () if replicas is None else (replicas.together,)
        state = self.state()
        leaves = [state[at] for at in self.trained]
        if len({(leaf.dtype, leaf.device) for leaf in leaves}) != 1:
            words = "the parameters are of several dtypes or devices, or there are none"
            raise NotStageable(words, "make them alike, as by `model.double()`")
        if leaves[0].dtype not in (torch.float32, torch.float64):  # Adam's rates would be rounded
            words = "the parameters are not of single or double precision"
            raise NotStageable(words, "make them so, as by `model.float()`")
        if leaves[0].device.type != "cpu":
            raise NotStageable("a loop on this device waits for it in every step", None)
        if any(map(is_random, staged.rest.graph.nodes)):
            raise NotStageable("the loss draws random numbers that depend on others", None)
        self.shapes = [leaf.shape for leaf in leaves]
        self.sizes = [shape[len(self.lead) :].numel() for shape in self.shapes]
        alone = value_and_slopes(staged, self.trained)
        self._slopes = alone if replicas is None else replicas.slopes
        self.buffers = self._written(example)
        moved = {*self.trained, *self.buffers}
        places = Counter(value.untyped_storage().data_ptr() for value in state if value.numel())
        if any(places[state[at].untyped_storage().data_ptr()] > 1 for at in moved):
            words = "what a step moves is in memory that something else has, too"
            raise NotStageable(words, "give each tensor its own, as by `clone()`")
        self.fixed = [at for at in range(len(state)) if at not in moved]
        self._run = self._made(example)

    def state(self) -> list[Tensor]:
        """The parameters, buffers and constants, in the order of the graph's arguments."""
        return self.staged.state() if self.replicas is None else self.replicas.state

    def moved(self, mean: list[Tensor] | None, square: list[Tensor] | None) -> Moved:
        """What is moved, as it is now; Adam's means of each parameter, None for zeros."""
        values = self._flat(self.parameters())
        first = torch.zeros_like(values) if mean is None else self._flat(mean)
        second = torch.zeros_like(values) if square is None else self._flat(square)
        return Moved(values, first, second, [value.clone() for value in self.buffers_now()])

    def parameters(self) -> list[Tensor]:
        """The parameters that are moved, in the order of the vectors."""
        state = self.state()
        return [state[at] for at in self.trained]

    def buffers_now(self) -> list[Tensor]:
        """The buffers that are moved."""
        state = self.state()
        return [state[at] for at in self.buffers]

    def fixed_now(self) -> list[Tensor]:
        """The rest of the state; the compiled loop looks at no strides."""
        state = self.state()
        return [state[at].detach().contiguous() for at in self.fixed]

    def parts(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector that belong to each parameter."""
        pieces, depth = zip(vector.split(self.sizes, -1), self.shapes, strict=True), len(self.lead)
        return [piece.view(piece.shape[:depth] + shape[depth:]) for piece, shape in pieces]

    def __call__(self, moved: Moved, taken: Taken, steps: int) -> tuple[Tensor, Moved]:
        """Takes steps.

        Args:
            moved: what is moved; it stays as it is.
            taken: from what they are computed.
            steps: how many are taken, at most as many as there are data for.

        Returns:
            The loss before each step, and what is moved, as it is after them.
        """
        outcomes = []
        for some, fixed, own in self._in_turn(moved, taken):
            head = torch.tensor(steps), own.rates, own.rows
            inputs = [*head, *some[:3], *some.buffers, *fixed, *own.data]
            outcomes.append(self._run(inputs))
        if len(outcomes) == 1:
            losses, values, mean, square, *buffers = outcomes[0]
        else:
            each = [[outcome[0].T, *outcome[1:]] for outcome in outcomes]
            turned, values, mean, square, *buffers = map(torch.cat, zip(*each, strict=True))
            losses = turned.T
        return losses[:steps], Moved(values, mean, square, buffers)

    def _in_turn(self, moved: Moved, taken: Taken) -> Iterator[tuple[Moved, list[Tensor], Taken]]:
        """What is moved and what is not, and what for, of those that take steps together."""
        fixed = self.fixed_now()
        if not self.lead:
            yield moved, fixed, taken
            return
        for start in range(0, len(moved.values), *self.lead):
            some = slice(start, start + self.lead[0])
            data = [
                value[:, some].contiguous() if kind == STACKED else value
                for value, kind in zip(taken.data, self.kinds, strict=True)
            ]
            buffers = [value[some] for value in moved.buffers]
            yield (
                Moved(moved.values[some], moved.mean[some], moved.square[some], buffers),
                [value[some] for value in fixed],
                Taken(taken.rates, taken.rows[:, some].contiguous(), data),
            )

    def _flat(self, parts: list[Tensor]) -> Tensor:
        depth = len(self.lead)
        return torch.cat([part.detach().reshape(*part.shape[:depth], -1) for part in parts], -1)

    def _step(self, moved: Moved, rate: Tensor, fixed: Any, data: Any) -> tuple[Tensor, Moved]:
        """One step, in operations that a graph can hold."""
        state: list[Any] = [None] * len(self.state())
        buffers = [value.clone() for value in moved.buffers]
        for places, values in ((self.buffers, buffers), (self.fixed, fixed)):
            for at, value in zip(places, values, strict=True):
                state[at] = value
        loss, slopes = self._slopes(self.parts(moved.values), state, list(data))
        slope = torch.cat([part.reshape(*self.lead, -1) for part in slopes], -1)
        if self.clip is not None:
            norm = slope.square().sum(-1, keepdim=True).sqrt()
            slope = slope * (self.clip / (norm + 1e-6)).clamp(max=1.0)
        length, root, first, kept, second, eps = rate.unbind()
        mean = moved.mean + first * (slope - moved.mean)
        square = kept * moved.square + second * slope.square()
        ahead = moved.values - length * mean / (square.sqrt() / root + eps)
        return loss, Moved(ahead, mean, square, buffers)

    def _loop(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The steps of a call, from its inputs."""
        several, still = len(self.buffers), len(self.fixed)
        count, rates, rows, *rest = inputs
        carried, constant = rest[: 3 + several], rest[3 + several :]

        def go_on(number: Tensor, losses: Tensor, *others: Tensor) -> Tensor:
            return number < others[len(carried)]

        def body(number: Tensor, losses: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            values, mean, square, *buffers = others[: len(carried)]
            _, rates, rows, *constant = others[len(carried) :]
            at = number.reshape(1)
            data = self._at(at, Taken(rates, rows, constant[still:]))
            moved = Moved(values, mean, square, buffers)
            rate = rates.index_select(0, at)[0]
            loss, moved = self._step(moved, rate, constant[:still], data)
            losses = losses.index_copy(0, at, loss.reshape(1, *self.lead).to(losses.dtype))
            return (number + 1, losses, *moved[:3], *moved.buffers)

        losses = rates.new_zeros((rates.shape[0], *self.lead))
        start = torch.zeros((), dtype=torch.int64), losses
        first: Any = (*start, *carried)
        _, *results = while_loop_op(go_on, body, first, (count, rates, rows, *constant))
        return tuple(results)

    def _written(self, example: Taken) -> list[int]:
        """Which of the state a loss writes to."""
        # of replicates one tells for all
        first = 0 if self.lead else ...
        before = [value[first] for value in self.state()]
        data = [value[first] for value in self._at(_FIRST, example)]
        state = [value.detach().clone() for value in before]
        with torch.no_grad(), unchecked():
            self.staged.rest.forward(*state, *data)
        # some operations write without a word, and what others write may be what was there
        pairs = zip(state, before, strict=True)
        return [at for at, (v, was) in enumerate(pairs) if v._version or not torch.equal(v, was)]

    def _at(self, at: Tensor, taken: Taken) -> list[Tensor]:
        """The data of the step whose number is the only one in a tensor."""
        rows = taken.rows.index_select(0, at)[0]

        def now(value: Tensor, kind: str) -> Tensor:
            if kind == PICKED:
                picked = value.index_select(0, rows.reshape(-1))
                return picked.reshape(*rows.shape, *value.shape[1:]) if self.lead else picked
            if kind == STACKED:
                return value.index_select(0, at)[0]
            return value.expand(*self.lead, *value.shape) if self.lead else value

        return [now(value, kind) for value, kind in zip(taken.data, self.kinds, strict=True)]

    def _made(self, example: Taken) -> Compiled:
        """The compiled loop; raises NotStageable."""
        try:
            with random_state(None, keep=True), unchecked(), without_warnings(), torch.no_grad():
                run = compiled(self._words(example), lambda: self._graph(example))
                self._run = run
                right = self._agrees(example)
        except NotStageable:
            raise
        except Exception as error:  # whatever a compiler may raise
            words = f"the loop is not compiled: {one_line(error)}"
            raise NotStageable(words, "it takes a C++ compiler") from error
        if not right:
            raise NotStageable("the compiled loop gives other numbers")
        return run

    def _words(self, example: Taken) -> list[str]:
        """All that the graph of the loop depends on, in words."""
        staged, told = self.staged, (self.kinds, self.clip, self.trained, self.buffers, self.lead)
        graphs = [g for g in staged.rest.modules() if isinstance(g, fx.GraphModule)]
        held = [value for graph in graphs for value in (*graph.buffers(), *vars(graph).values())]
        held = [value for value in held if isinstance(value, Tensor)]
        depth = len(self.lead)
        like = [f"{value.shape[depth:]} {value.dtype}" for value in self.state()]
        like += [f"{value.dim()} {value.dtype}" for value in (example.rates, *example.data)]
        constants = [f"{value.shape} {value.dtype} {value.tolist()}" for value in held]
        # what a graph makes without a word of its dtype has the default one
        more = staged.shapes, torch.get_default_dtype()
        return [*(g.code for g in graphs), f"{told} {more}", *like, *constants]

    def _graph(self, example: Taken) -> tuple[fx.GraphModule, list[Tensor]]:
        """The graph of the loop, and inputs of sizes that nothing else has."""
        moved, fixed, example = next(self._in_turn(self.moved(None, None), example))
        known = [*moved[:3], example.rates[0], *moved.buffers, *fixed, *example.data]
        known += self.parts(moved.values)
        taken = {size for value in known for size in value.shape}
        ours, names = self._sizes_of_minibatch(), self.staged.sizes
        free = (size for size in itertools.count(3) if size not in taken)
        count, batch, rows, *others = itertools.islice(free, 3 + len(names))
        sizes = {n: batch if n in ours else other for n, other in zip(names, others, strict=True)}
        resize = of_sizes if self.lead else Staged.resized
        resized = resize(self.staged, self._at(_FIRST, example), sizes)
        if resized is None:
            raise NotStageable(_ONE_SIZE, _ANY_SIZE)
        data = []
        for value, whole, kind in zip(resized, example.data, self.kinds, strict=True):
            if kind == PICKED:
                data.append(whole[torch.arange(rows) % len(whole)])
            elif kind == STACKED:
                data.append(torch.stack([value] * count))
            else:
                data.append(value[0] if self.lead else value)
        rates = example.rates[torch.zeros(count, dtype=torch.int64)]
        numbers = torch.zeros(count, *self.lead, batch, dtype=torch.int64)
        inputs = [torch.tensor(count), rates, numbers, *moved[:3], *moved.buffers, *fixed, *data]
        inputs = [value.clone() for value in inputs]  # what is one tensor is traced as one input
        graph = make_fx(lambda *each: self._loop([*each]), tracing_mode="symbolic")(*inputs)
        for part in graph.modules():
            if isinstance(part, fx.GraphModule):
                spell_sizes(part.graph)
                copy_before_adding(part.graph)
                transpose_narrow(part.graph)
                drop_unused(part.graph)
                part.recompile()
        places = graph.graph.find_nodes(op="placeholder")
        for place, value in zip(places, inputs, strict=True):
            for size, known in zip(value.shape, place.meta["val"].shape, strict=True):
                fixed_to = known if isinstance(known, int) else known.node.maybe_as_int()
                if size in (count, batch, rows, *others) and fixed_to is not None:
                    raise NotStageable(_ONE_SIZE, _ANY_SIZE)
        return graph, inputs

    def _sizes_of_minibatch(self) -> set[Any]:
        """The names of sizes that are that of a minibatch, with other sizes among them."""
        tensors = [like for like in self.staged.shapes if isinstance(like, Like)]
        kinds = zip(tensors, self.kinds, strict=False)
        picked = [like for at, (like, kind) in enumerate(kinds) if kind == PICKED or not at]
        return {size for like in picked for size in like.shape}

    def _agrees(self, example: Taken) -> bool:
        """Whether the compiled loop gives the numbers of its steps, and as many steps as told."""
        start, fixed, example = next(self._in_turn(self.moved(None, None), example))
        once, twice = self(start, example, 1), self(start, example, 2)
        rate, data = example.rates[0], self._at(_FIRST, example)
        loss, wanted = self._step(start, rate, fixed, data)
        length, root, *_, eps = rate
        got = once[1]
        values = start.values - length * got.mean / (got.square.sqrt() / root + eps)
        right = alike(
            [once[0][0], got.mean, got.square, got.values, *got.buffers],
            [loss, wanted.mean, wanted.square, values, *wanted.buffers],
        )
        stacked = [kind == STACKED for kind in self.kinds]
        data = [v[1:] if later else v for v, later in zip(example.data, stacked, strict=True)]
        then = self(got, Taken(example.rates[1:], example.rows[1:], data), 1)
        pairs = zip([*then[1][:3], then[0][0]], [*twice[1][:3], twice[0][1]], strict=True)
        return right and all(torch.equal(*pair) for pair in pairs)
