"""Loops of training: of one's own, and those of `fit` and `fit_replicates`."""

import copy
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import BATCH, RATE
from ppvae._scopes import matmul_precision, private_modules
from ppvae.data.batches import batches_of
from ppvae.training.execution import Execution
from ppvae.training.options import Options
from ppvae.training.single import single
from ppvae.training.stacked import stacked
from ppvae.training.steps import Steps
from ppvae.training.task import task_of

Run = Callable[[Tensor], float]  # takes a step for each row of a matrix of indices; returns seconds


def now() -> float:
    """Seconds, when the GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter()


def timed(step: Callable[[Tensor], Any], x: Tensor, inside: Callable[[], Any] = nullcontext) -> Run:
    """Steps one by one, in a context that training enters once and that is off the clock."""

    def run(order: Tensor) -> float:
        with inside():
            start = now()
            for rows in order:
                step(x[rows])
            return now() - start

    return run


def own_loop(module: nn.Module, x: Tensor, loss: Any = None, **options: Any) -> Run:
    """The loop that one writes oneself, around a module that returns the loss."""
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE, fused=True)
    loss = loss or (torch.compile(module, **options) if options else module)

    def step(batch: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss(batch)
        value.backward()
        optimizer.step()
        return value.item()

    return timed(step, x)


def check(ran: Execution, how: str) -> None:
    """Raises unless it is run as was asked: a ratio of something else would be measured."""
    if ran.reason or ran.how != how:
        raise RuntimeError(f"asked to run {how}, it ran {ran.how}: {ran.reason}")


def ours(pair: Any, x: Tensor, how: str, precision: str | None = None) -> Run:
    """The step of `fit`, put together as `fit` does it."""

    @contextmanager
    def inside():
        with private_modules(), matmul_precision(precision):
            yield

    with inside():
        task = task_of(*pair, None, batches_of("data", x, BATCH, training=True))
        engine = single(task, Execution(how))
        steps = Steps(engine, Options(learning_rate=RATE))

    def run(order: Tensor) -> float:
        with inside():
            start = now()
            minibatches = iter(order) if how == "looped" else ((x[rows],) for rows in order)
            for _ in steps.through(minibatches):
                check(engine.execution, how)
            return now() - start

    return run


def replicates(count: int, pair: Any, x: Tensor) -> Run:
    """The step of `fit_replicates` for so many, each on minibatches of its own."""
    how = "compiled" if x.is_cuda else "looped"  # a loop is for the CPU
    with private_modules():
        batches = batches_of("data", x, BATCH, training=True)
        tasks = [task_of(*copy.deepcopy(pair), None, batches) for _ in range(count)]
        engine = stacked(tasks, range(count), Execution(how))
        steps = Steps(engine, Options(learning_rate=RATE))

    def run(order: Tensor) -> float:
        rows = torch.stack([order.roll(k, 0) for k in range(count)], 1)
        start = now()
        for _ in steps.through(rows):
            check(engine.execution, how)
        return now() - start

    return run
