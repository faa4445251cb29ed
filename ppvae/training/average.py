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
from torch.overrides import TorchFunctionMode

from ppvae._scopes import as_they_are, private_modules, random_state, unchecked
from ppvae.guides.chart import Chart
from ppvae.programs.layout import Layout
from ppvae.programs.runs import BUDGET, largest_tensor
from ppvae.training.task import Task


class GivenNormals(TorchFunctionMode):
    """Gives the random numbers that are drawn inside, one after the other, from normal ones.

    Normal, uniform and exponential numbers, as distributions draw them, are smooth functions of
    standard normal ones. All others are drawn as ever.

    Attributes:
        count: how many were drawn.
        given: a vector of standard normal numbers; without one, zeros are taken.
    """

    def __init__(self, given: Tensor | None = None) -> None:
        super().__init__()
        self.count, self.given = 0, given

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the function, or takes its numbers from those that are given."""
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_ and len(args) == 1 and not kwargs:
            return self._next(args[0])
        if func is torch.Tensor.exponential_ and len(args) == 1 and not kwargs:
            return -torch.special.ndtr(self._next(args[0])).log()
        if func is torch.Tensor.uniform_ and not kwargs:
            low, high = args[1:] or (0.0, 1.0)
            return low + (high - low) * torch.special.ndtr(self._next(args[0]))
        if func is torch.rand and set(kwargs) <= {"dtype", "device"}:
            with torch._C.DisableTorchFunction():
                like = torch.empty(*args, **kwargs)
            return torch.special.ndtr(self._next(like))
        return func(*args, **kwargs)

    def _next(self, like: Tensor) -> Tensor:
        """So many numbers as a tensor has, in its shape and dtype."""
        first, self.count = self.count, self.count + like.numel()
        if self.given is None:
            return torch.zeros_like(like)
        return self.given[first : self.count].reshape(like.shape).to(like.dtype)


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
    """

    def __init__(self, task: Task) -> None:
        (batch,) = task.batches
        self.task, self.size = task, len(batch[0])
        self.batch = tuple(_double(value) for value in batch)
        names = {id(p): name for name, p in task.program.named_parameters()}
        self._names = [names[id(p)] for p in task.parameters]
        tensors = [*task.program.named_parameters(), *task.program.named_buffers()]
        self._state = {name: _double(value.detach()) for name, value in tensors}
        self.normals, self.smooth, self.at_once = 0, True, 1

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
    ) -> tuple[Tensor, Tensor]:
        """The losses of some draws, and the latents in unconstrained space, `(draws, size)`."""

        def one(row: Tensor) -> Tensor:
            with _Recorder(layout.places) as latents:
                loss = self.loss(values, row)
            return torch.cat([loss.reshape(1), layout.free(latents.values).reshape(-1)])

        both = self._each(one, normals, seed)
        return both[:, 0], both[:, 1:]

    def _each(self, one: Callable[[Tensor], Tensor], normals: Tensor, seed: int) -> Tensor:
        with random_state(seed):
            if self.at_once > 1 and len(normals) > 1:
                return torch.func.vmap(one, randomness="different")(normals)
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
    with torch.no_grad(), private_modules(), random_state(0):
        average.loss(values, None)
        (row, other) = 0.1 * matched(2, average.normals, seed=0)
        first, again = average.loss(values, row), average.loss(values, row)
        average.smooth = torch.allclose(first, again, rtol=0.0, atol=0.0, equal_nan=True)
        alone = torch.stack([first, average.loss(values, other)])
        average.at_once = max(2, BUDGET // largest_tensor(average.batch))
        try:
            together = average.losses(values, torch.stack([row, other]))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            average.at_once = 1
            return average
        if average.smooth and not torch.allclose(alone, together, rtol=1e-6, equal_nan=True):
            average.at_once = 1
    return average


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def matched(draws: int, size: int, seed: int) -> Tensor:
    """Standard normal numbers `(draws, size)`, of which mean and, if it can be, covariance match.

    They come in pairs of opposite sign, so that all odd moments are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(draws // 2, size, generator=generator, dtype=torch.float64, device="cpu")
    if draws // 2 > size:
        triangle = torch.linalg.cholesky(half.T @ half / len(half))
        half = torch.linalg.solve_triangular(triangle, half.T, upper=False).T
    return torch.cat([half, -half]).to(torch.get_default_device())
