"""One call at a time: threads wait, Ctrl-C does no harm, and Pyro's handlers are left alone."""

import random
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import LONG, world
from pairs import build, data, made, same, traceless, values
from pyro import poutine
from pyro.poutine import runtime

from ppvae import (
    annealed_importance,
    evaluate,
    fit,
    fit_replicates,
    from_pyro_svi,
    gaps,
    simulate,
    stage,
)

TOLD = {"num_epochs": 3, "batch_size": 4, "learning_rate": 0.01, "progress": False}
QUIET = {"seed": 0, "progress": False}
CALLS = {
    "fit": lambda model, guide: fit(model, guide, data(), seed=1, **TOLD),
    "fit_replicates": lambda *pair: fit_replicates([pair], data(), seeds=[1], **TOLD),
    "evaluate": lambda *pair: evaluate(*pair, data(), num_samples=32, **QUIET),
    "gaps": lambda *pair: gaps(*pair, data(4), num_steps=5, num_samples=16, **QUIET),
    "annealed_importance": lambda *pair: annealed_importance(
        *pair, data(3), num_temperatures=4, num_chains=2, **QUIET
    ),
    "from_pyro_svi": lambda *pair: from_pyro_svi(*pair, data(), num_samples=5, seed=0),
    "simulate": lambda model, _: simulate(model, data(3), seed=0),
    "stage": lambda *pair: stage(*pair, data(4)),
}


def test_threads_wait_for_each_other():
    """Two fits and two evaluations at once are what they are one after the other."""

    def work(pair):
        losses = fit(*pair, data(), seed=1, **TOLD).losses
        return losses, evaluate(*pair, data(), num_samples=16, **QUIET).elbo.values

    pairs, others = made(build, 4), made(build, 4)
    outside = world()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, pairs))
    assert world() == outside and not runtime._PYRO_STACK
    for pair, other, (losses, elbo) in zip(pairs, others, together, strict=True):
        alone, alone_elbo = work(other)
        assert losses == alone and (elbo == alone_elbo).all()
        assert same(values(*pair), values(*other))


@pytest.mark.parametrize("name", CALLS)
def test_a_call_inside_of_a_handler_that_changes_numbers_is_refused(name):
    """Others, as a trace around a whole script, see nothing of it."""
    pair = build()
    with traceless(*pair, moved=False), poutine.scale(scale=2.0):
        with pytest.raises(RuntimeError, match=rf"{name}: .* handlers.*\['ScaleMessenger'\]"):
            CALLS[name](*pair)
    with poutine.trace() as trace, poutine.block():
        CALLS[name](*pair)
    assert not trace.trace.nodes


def interrupt_after(seconds):
    """Sends Ctrl-C some time later."""
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)


@pytest.mark.parametrize("name", CALLS)
def test_interrupts_at_any_time_leave_the_process_as_it_was(name, ctrl_c):
    """At random times; afterwards the same call gives the same numbers as before."""
    (pair,) = made(build)
    before = values(*pair)
    moments = random.Random(name)

    def outcome():
        """What the call gives, and what it leaves, from the same start."""
        tensors = [v for p in pair for v in (*p.parameters(), *p.buffers())]
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                if not torch.equal(tensor, value):  # one that was expanded cannot be written to
                    tensor.copy_(value)
        result = CALLS[name](*pair)
        numbers = result.elbo.values.tolist() if name == "evaluate" else []
        return numbers, [value.tolist() for value in values(*pair)]

    wanted, outside = outcome(), world()
    for _ in range(60 if LONG else 4):
        try:
            interrupt_after(moments.uniform(1e-4, 0.15))
            outcome()
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        except KeyboardInterrupt:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        assert world() == outside and not runtime._PYRO_STACK and not runtime._DIM_ALLOCATOR._stack
    assert outcome() == wanted
