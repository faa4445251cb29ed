"""The processes that train together, and what they agree on.

Under a process group of `torch.distributed`, as `torchrun` starts one, all processes run the same
program: each calls `fit` with the same arguments, and what one of them decides all of them do.
"""

import functools
import hashlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ppvae._checks import expect
from ppvae._process import interrupted, is_apart
from ppvae.training.identity import differences

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

_now: ContextVar["Processes | None"] = ContextVar("processes", default=None)


class Processes:
    """The processes of the default group, of which this is one.

    Their words go through a group of their own. Who is through, or fails, closes it, and with that
    ends the waiting of all others, whatever it does next.

    Attributes:
        rank: the number of this one; 0 is the first, which shows progress and writes files.
        count: how many there are.
        interrupted: whether any of them was told to stop, as of the last `mean`.
    """

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.interrupted = False
        with _together():
            # here, and not in `new_group`, it is noticed if one has ended
            dist.all_gather_object([None] * self.count, None)
            self._group: Any = dist.new_group(timeout=_timeout())

    def close(self) -> None:
        """Ends the waiting of all that still expect an answer of this one."""
        dist.destroy_process_group(self._group)
        self._group = None  # which closes the connections

    @property
    def is_first(self) -> bool:
        """Whether this is the one that shows progress and writes files."""
        return self.rank == 0

    def sums(self, values: Tensor) -> Tensor:
        """The sums of what all processes have; the same bits in all of them."""
        values = values.contiguous()
        with _together():
            dist.all_reduce(values, group=self._group)
        return values

    def mean(self, loss: Tensor, parameters: Sequence[Tensor], weight: float) -> Tensor:
        """Averages a loss and the gradients of parameters over all processes, by one message.

        It carries along whether a process was interrupted.

        Args:
            loss: of this process.
            parameters: with the gradients of this process, which become the averages.
            weight: of this process; those of all add up to one.

        Returns:
            The average loss.
        """
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        there = [float(p.grad is not None) for p in parameters]  # else Adam would move it
        told = torch.tensor([*there, float(interrupted())], dtype=loss.dtype, device=loss.device)
        parts = [weight * _numbers(each) for each in (*slopes, loss.detach())]
        *flat, told = self.sums(torch.cat([*parts, told])).split([len(p) for p in [*parts, told]])
        self.interrupted = self.interrupted or bool(told[-1])
        for parameter, slope, known in zip(parameters, flat, told.tolist(), strict=False):
            if parameter.is_complex():
                slope = torch.view_as_complex(slope.clone().view(-1, 2))
            slope = slope.view_as(parameter).to(parameter.dtype)
            if parameter.grad is not None and parameter.grad.is_sparse:
                slope = slope.to_sparse(parameter.grad.sparse_dim())
            parameter.grad = slope if known else None
        return flat[-1].reshape(()).to(loss.dtype)

    def in_any(self, said: object, streams: Sequence[Tensor]) -> bool:
        """Whether any process says so.

        Args:
            said: what this one says.
            streams: where its random numbers stand, which must be the same in all.

        Raises:
            RuntimeError: they have come apart.
        """
        digest = hashlib.blake2b(digest_size=8)
        for stream in streams:
            digest.update(stream.numpy().data)
        told = self.all_of((bool(said), digest.hexdigest()))
        wanted = "a model, objective and callback that draw as many numbers in all processes"
        expect(len({each[1] for each in told}) == 1, "fit", wanted, "others", RuntimeError)
        return any(each[0] for each in told)

    def all_of(self, value: T) -> list[T]:
        """What each process has, by rank; any object that can be pickled."""
        values: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def of_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, which alone is asked; its error is raised in all."""
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except Exception as error:  # which ends all of them
                made[1] = error
        with _together():
            dist.broadcast_object_list(made, group=self._group)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def level(self, values: Sequence[Tensor]) -> None:
        """Gives tensors the values that they have in the first process."""
        with torch.no_grad(), _together():
            for value in values:
                whole = value.detach().contiguous()
                dist.broadcast(whole, 0, group=self._group)
                if not torch.equal(whole, value):  # one that was expanded cannot be written to
                    value.copy_(whole)

    def same_seed(self, seed: int | None) -> int:
        """A seed for all: the one that was given, or one that the first process draws."""
        drawn = int(torch.randint(2**62, ())) if seed is None else seed
        return self.of_first(lambda: drawn)

    def check_same(self, call: Mapping[str, str]) -> None:
        """Raises a ValueError unless all processes describe the same call.

        Args:
            call: what is trained, and how, in words.
        """
        for rank, other in enumerate(self.all_of(dict(call))):
            for key, here, there in differences(call, other):
                wanted = f"the same {key} in all processes, which is {here} in process {self.rank}"
                expect(here == there, "fit", wanted, f"{there} in process {rank}")


def together(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function one that all processes of the default group call together, if there are any.

    An error in one of them ends it in all.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        others = Processes() if grouped and not is_apart() else None
        token = _now.set(others)
        try:
            return function(*args, **kwargs)
        finally:
            _now.reset(token)
            if others is not None:
                others.close()

    return call


def processes() -> Processes | None:
    """Those that train together; None if this one is alone."""
    return _now.get()


def _numbers(value: Tensor) -> Tensor:
    """The real numbers of a tensor in a row; the gradient of an embedding may be sparse."""
    dense = value.to_dense() if value.is_sparse else value
    return (torch.view_as_real(dense) if dense.is_complex() else dense).reshape(-1)


@contextmanager
def _together() -> Iterator[None]:
    """Inside, processes wait for each other.

    Raises:
        ConnectionError: one of them is gone, or did not come.
    """
    try:
        yield
    except RuntimeError as error:
        _lost(error)


def _timeout() -> Any:
    """How long one waits for another in the default group."""
    group = dist.distributed_c10d._get_default_group()
    return group._get_backend(group._device_types[0]).options._timeout


def _lost(error: RuntimeError) -> NoReturn:
    traceback.clear_frames(error.__traceback__)  # which would keep the connections open
    said = str(error).strip().splitlines() or [type(error).__name__]
    raise ConnectionError(
        "fit: expected an answer of all processes of the group, but one has ended or failed, or "
        f"does not call fit (torch.distributed says: {said[0]}); what was saved in a checkpoint "
        "goes on from there, with any number of processes"
    ) from error
