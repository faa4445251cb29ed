"""The loss over draws that are held fixed: a smooth function of the parameters, in doubles.

A program is run for one draw, whose standard normal numbers are an input, and `torch.func.vmap`
makes many draws of that. So every model is served, and none has to say that it is vectorized.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppvae._scopes import as_they_are, double_precision, private_modules, random_state, unchecked
from ppvae.guides.chart import Chart
from ppvae.programs.given_normals import GivenNormals
from ppvae.programs.layout import Layout
from ppvae.programs.mapped import UNMAPPED, mapped
from ppvae.programs.matched_normals import matched
from ppvae.programs.runs import BUDGET, largest_tensor
from ppvae.staging.staged import one_line
from ppvae.training.task import Task


class _Recorder(Messenger):
    """Keeps the first value of some sites."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = set(names)
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            self.values.setdefault(msg["name"], msg["value"])


class Average:
    """The loss of a task, in nats for all its data, for draws whose normal numbers are given.

    Made by `average_of`; to be used with doubles as the default dtype.

    Attributes:
        task: a loss and its data, all of them in one batch.
        batch: the data in doubles.
        size: number of data, by which a loss per datum is multiplied.
        normals: how many normal numbers one draw takes.
        smooth: whether a draw takes no other random numbers, and the loss is smooth in its
            parameters while the normal ones are held fixed.
        at_once: how many draws are run together; 1 where the program cannot be mapped.
        own: whether each draw has tensors of its own then; see `mapped`.
        why_not: why it cannot be mapped, in words; empty where it can.
        mixed: whether the program has numbers of its own that are narrower than doubles, or may
            have some on a way that it was not seen to go.
    """

    def __init__(self, task: Task) -> None:
        (batch,) = task.batches
        self.task, self.size = task, task.batches.rows(batch)
        self.batch = tuple(_double(value) for value in batch)
        names = {id(p): name for name, p in task.program.named_parameters()}
        self._names = [names[id(p)] for p in task.parameters]
        tensors = [*task.program.named_parameters(), *task.program.named_buffers()]
        self._state = {name: _double(value.detach()) for name, value in tensors}
        self.normals, self.smooth, self.at_once = 0, True, 1
        self.own, self.why_not, self.mixed = False, "", True

    def loss(self, values: list[Tensor], normals: Tensor | None) -> Tensor:
        """The loss of one draw; without normal numbers it draws zeros, and counts them."""
        state = self._state | dict(zip(self._names, values, strict=True))
        program, mode = self.task.program, GivenNormals(normals)
        args = (*self.batch, *program.settings(0))
        store = pyro.get_param_store().scope()  # one kept would hold the values of the first call
        with mode, as_they_are(), unchecked(), store:
            loss = torch.func.functional_call(program, state, args)
        self.normals = max(self.normals, mode.count)
        return loss * self.size

    def losses(self, values: list[Tensor], normals: Tensor, seed: int = 0) -> Tensor:
        """The losses of some draws; NaN if a step led too far.

        Args:
            values: of the parameters.
            normals: shape `(draws, normals)`.
            seed: of the other random numbers.
        """
        try:
            return self._each(lambda row: self.loss(values, row), normals, seed)
        except torch.linalg.LinAlgError:  # a matrix has no Cholesky factor
            return normals.new_full((len(normals),), math.nan)

    def draws(
        self, values: list[Tensor], normals: Tensor, layout: Layout, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of some draws, and the latents, `(draws, size)`: on the reals, and as such."""

        def one(row: Tensor) -> Tensor:
            with _Recorder(layout.places) as latents:
                loss = self.loss(values, row)
            spaces = layout.free(latents.values), layout.flat(latents.values)
            return torch.cat([part.reshape(-1) for part in (loss, *spaces)])

        every = self._each(one, normals, seed)
        return every[:, 0], every[:, 1 : layout.size + 1], every[:, layout.size + 1 :]

    def _each(self, one: Callable[[Tensor], Tensor], normals: Tensor, seed: int) -> Tensor:
        with random_state(seed):
            if self.at_once > 1 and len(normals) > 1:
                return mapped(one, own=self.own)(normals)
            return torch.stack([one(row) for row in normals])

    def slope(
        self, chart: Chart, place: Tensor, normals: Tensor, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The losses of some draws at coordinates of a chart, and the gradient of their mean."""
        total = torch.zeros_like(place)
        losses: list[Tensor] = []
        for chunk in self.chunks(normals):
            here = place.detach().requires_grad_()
            some = self.losses(chart(here), chunk, seed + len(losses))
            if some.requires_grad:
                total += torch.autograd.grad(some.sum(), here)[0]
            losses.append(some.detach())
        return torch.cat(losses), total / len(normals)

    def chunks(self, normals: Tensor) -> Sequence[Tensor]:
        """Draws in pieces that fit in memory."""
        return normals.split(self.at_once if self.at_once > 1 else len(normals))


@contextmanager
def without_fallback_warnings() -> Iterator[None]:
    """PyTorch does not remark inside that `vmap` runs some operation one by one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def average_of(task: Task) -> Average:
    """Makes the average of a task, by some runs of its program."""
    average = Average(task)
    values = [_double(parameter.detach()) for parameter in task.parameters]
    with torch.no_grad(), private_modules(), random_state(0), double_precision() as doubles:
        average.loss(values, None)
        (row, other) = 0.1 * matched(2, average.normals, seed=0)
        first, again = average.loss(values, row), average.loss(values, row)
        average.smooth = torch.allclose(first, again, rtol=0.0, atol=0.0, equal_nan=True)
        alone = torch.stack([first, average.loss(values, other)])
        together, rows = None, torch.stack([row, other])
        for own in (False, True):
            average.at_once, average.own = max(2, BUDGET // largest_tensor(average.batch)), own
            try:
                together, average.why_not = average.losses(values, rows), ""
                break
            except UNMAPPED as error:
                average.why_not = one_line(error)
        close: dict[str, Any] = {"rtol": 1e-6, "equal_nan": True}
        if together is not None and average.smooth and not torch.allclose(alone, together, **close):
            average.why_not = "the program gives other numbers when it runs for many"
        if average.why_not:
            average.at_once = 1
    average.mixed = doubles.needed or bool(average.why_not)
    return average


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
