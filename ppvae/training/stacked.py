"""The losses and gradients of many models and their guides, stacked, in one vectorized program."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppvae._scopes import kept_buffers, random_state, unchecked
from ppvae.objectives.base import moving_fields
from ppvae.staging.gradients import Gradients
from ppvae.staging.program import Program
from ppvae.staging.staged import NotStageable, Staged, one_line, record
from ppvae.staging.stride import Replicas
from ppvae.training.execution import Execution
from ppvae.training.stacked_strides import StackedStrides
from ppvae.training.steps import Engine
from ppvae.training.streams import Stream
from ppvae.training.strides import Strides
from ppvae.training.task import Task

_MOST = 2**18  # parameters that move side by side in a loop on a CPU


class Stacked(Engine):
    """The engine for replicates, whose parameters, buffers and data have a dimension in common.

    `stacked` makes it. The models and guides have their old values until `write_back`.

    Attributes:
        tasks: what is trained.
        programs: the losses of the replicates; the first one was staged.
        gradients: the vectorized graph of losses and gradients.
        state: parameters and buffers of all, in the order of the graph's arguments.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        seeds: Sequence[int],
        gradients: Gradients,
        state: list[Tensor],
        execution: Execution,
    ) -> None:
        self.tasks, self.programs = tasks, [task.program for task in tasks]
        self.gradients, self.state = gradients, state
        self.staged, self.batches = gradients.staged, tasks[0].batches
        self.streams, self.execution = [Stream(seed) for seed in seeds], execution
        self._strides: StackedStrides | None = None
        self.objectives = [program.objective for program in self.programs]
        self.parameters = [state[at] for at in gradients.trained]
        held = nn.Module()
        for at, value in enumerate(state):
            if at not in gradients.trained:
                held.register_buffer(f"value_{at}", value)
        self.modules: list[nn.Module] = [held]

    def values(self) -> dict[str, Tensor]:
        """The stacked parameters and buffers, by their names in the programs."""
        return dict(zip(self.staged.names_of_state, self.state, strict=True))

    def strides(self, optimizer: Any, clip: float | None) -> Strides | None:
        """What takes many steps at a call, where the losses are to run so and can."""
        if self.execution.how != "looped":
            return None
        together = _together(len(self.tasks), self.parameters)
        try:
            slopes = self.gradients.of_any_size(together, self.state, _data(self))
            replicas = Replicas(together, self.state, slopes)
            self._strides = StackedStrides(
                self.tasks,
                self.staged,
                optimizer,
                clip,
                replicas=replicas,
                streams=self.streams,
                passes=self._passes,
            )
        except NotStageable as error:
            self.execution.instead("compiled", error)
            self.compile()
        return self._strides

    def compile(self) -> None:
        """Compiles losses and gradients, which leaves the steps to PyTorch's optimizer."""
        self.gradients = Gradients(self.staged, compiled=True, replicated=True)
        _try(self)
        self.execution.of(self.gradients)

    def minibatches(self) -> Iterable[Any]:
        """Yields, once for each step, the minibatches of all, or the numbers of their data."""
        return self._passes() if self._strides is None else self._strides.minibatches()

    def _passes(self) -> Iterator[Any]:
        batches = self.batches
        passes = [iter(batches.numbers() if batches.numbered else batches) for _ in self.streams]
        for _ in range(batches.count):
            drawn: list[Any] = []
            for stream, each in zip(self.streams, passes, strict=True):
                with stream:
                    drawn.append(next(each))
            alike = batches.numbered and len({len(numbers) for numbers in drawn}) == 1
            yield torch.stack(drawn) if alike else drawn

    def data(self, minibatch: Any, step: int) -> tuple[list[Tensor], int]:
        """The minibatch of each replicate with its noise, from its own random numbers."""
        drawn = []
        for stream, own, program in zip(self.streams, minibatch, self.programs, strict=True):
            batch = self.batches.picked(own) if isinstance(own, Tensor) else own
            with stream:
                drawn.append(self.staged.data(batch, program.settings(step)))
        return _stacked(drawn), self.batches.rows(batch)

    def losses(self, data: list[Tensor], step: int) -> Tensor:
        """The losses in nats per datum; leaves the gradients in the parameters."""
        losses, slopes = self.gradients(self.state, data)
        for parameter, slope in zip(self.parameters, slopes, strict=True):
            parameter.grad = slope
        self.execution.of(self.gradients)  # a compiler may fail in the last minibatch
        return losses

    def replicate(self, number: int, data: list[Tensor]) -> tuple[Task, tuple[Any, ...]]:
        """The task of a replicate, with its parameters of now, and its minibatch."""
        self.write_back()
        return self.tasks[number], self.staged.batch([value[number] for value in data])

    def random_numbers(self) -> list[Tensor]:
        """Where the streams of the replicates stand, and then all else that is drawn from."""
        return [*(s for each in self.streams for s in each.states), *super().random_numbers()]

    def set_random_numbers(self, states: Sequence[Tensor]) -> None:
        """Moves them to where they stood."""
        states = list(states)
        for stream in self.streams:
            count = len(stream.states)
            stream.states, states = states[:count], states[count:]
        super().set_random_numbers(states)

    def write_back(self) -> None:
        """Gives each pair its values; constants of the graph are no one's."""
        owned = ["." in name for name in self.staged.names_of_state]
        with torch.no_grad():
            for replicate, program in enumerate(self.programs):
                values = zip(owned, self.staged.state(program), self.state, strict=True)
                for own, value, new in values:
                    if own:
                        value.copy_(new[replicate])


def stacked(tasks: Sequence[Task], seeds: Sequence[int], execution: Execution) -> Stacked:
    """Makes an engine for replicates.

    Args:
        tasks: models and guides, alike but for their values, with the same data.
        seeds: the seed of each.
        execution: how they are to run: not eagerly.

    Raises:
        NotStageable: the loss is no graph, or not the same for all.
    """
    batches = tasks[0].batches
    example = tasks[0].example
    rows = len(example[0])
    dropped = batches.loader is not None and batches.loader.drop_last
    if rows < 2 or (batches.size % rows == 1 and not dropped):
        raise NotStageable("data: a batch of one datum is a case of its own")
    try:
        moving = moving_fields([task.program.objective for task in tasks])
    except ValueError as error:
        raise NotStageable(str(error)) from error
    programs = [task.program for task in tasks]
    for program in programs:
        program.moving = moving
    staged = record(programs[0], example)
    states = [staged.state(program) for program in programs]
    for number, program in enumerate(programs):
        _check(number, staged, program, example)
    compiled = execution.how == "compiled"
    gradients = Gradients(staged, compiled=compiled, replicated=True)
    if not gradients.trained:
        raise NotStageable("pairs: the loss depends on no parameter")
    state = [torch.stack(values).detach() for values in zip(*states, strict=True)]
    for at in gradients.trained:
        state[at] = nn.Parameter(state[at])
    engine = Stacked(tasks, seeds, gradients, state, execution)
    _try(engine)
    if compiled:
        execution.of(gradients)
    return engine


def _check(number: int, staged: Staged, program: Program, example: tuple[Any, ...]) -> None:
    """Raises unless the one graph gives the loss of a pair."""
    settings = program.settings(0)
    with torch.no_grad(), kept_buffers(program):
        with random_state(0), unchecked():
            data = staged.data(example, settings)
            (by_graph,) = staged.rest.forward(*staged.state(program), *data)
        if not by_graph.isfinite():  # training will say so
            return
        with random_state(0):  # with the caller's checks
            by_program = program(*example, *settings)
    if not torch.allclose(by_program, by_graph, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise NotStageable(
            f"pairs: expected models and guides of the same make; the graph of the first gives "
            f"pair {number} a loss of {by_graph:.6g}, its own program {by_program:.6g}"
        )


def _try(engine: Stacked) -> None:
    """Makes the graph of a step, without taking it; raises if there is none."""
    try:
        engine.gradients.make(engine.state, _data(engine))
    except Exception as error:  # whatever `torch.vmap` may not know
        raise NotStageable(f"pairs: cannot be stacked: {one_line(error)}") from error


def _data(engine: Stacked) -> list[Tensor]:
    """What a step is computed from, on first minibatches and numbers that nothing else sees."""
    with random_state(None, keep=True):
        return _stacked(
            [engine.staged.data(engine.batches.example(), p.settings(0)) for p in engine.programs]
        )


def _together(count: int, parameters: Sequence[Tensor]) -> int:
    """How many replicates take a step side by side: those whose parameters stay in the cache.

    More of them wait for each other's memory, and take longer than one after the other.
    """
    numbers = sum(parameter[0].numel() for parameter in parameters)
    return max(k for k in range(1, count + 1) if count % k == 0 and (k == 1 or k * numbers < _MOST))


def _stacked(drawn: Sequence[list[Tensor]]) -> list[Tensor]:
    """Stacks the data of replicates; a tensor that all of them share takes no more memory."""
    whole = []
    for first, *others in zip(*drawn, strict=True):
        same = all(value is first for value in others)
        stack = first.expand(len(drawn), *first.shape) if same else torch.stack([first, *others])
        whole.append(stack)
    return whole
