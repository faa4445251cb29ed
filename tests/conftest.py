"""What every test gets: double precision, Pyro's checks on, and a guard against traces left."""

import gc
import os
import signal
import threading
from collections import Counter

# All is small, in one process of several: threads, those of linear algebra too, would only wait for
# each other, which costs as much as work does. Libraries ask for their number when they are loaded.
for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")

import pyro  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from cases import LONG  # noqa: E402

from ppvae.staging import stride  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keeps modules and tests, which all stay, from being searched for garbage again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config, items):
    """Keeps every n-th test of each file, the first one always, where `PPVAE_EVERY` is n."""
    every, seen = int(os.environ.get("PPVAE_EVERY", "1")), Counter()
    kept, left = [], []
    for item in items:
        (left if seen[item.path] % every else kept).append(item)
        seen[item.path] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def _settings():
    store = pyro.get_param_store()
    return {
        "dtype": torch.get_default_dtype(),
        "validation": pyro.settings.get(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "parameters": {name for name in store if not name.startswith("user")},
    }


@pytest.fixture(autouse=True)
def guard():
    """Fails any test that leaves a global setting or a parameter behind."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    torch.set_default_dtype(torch.float64)
    before = _settings()
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        yield
    after = _settings()
    torch.set_default_dtype(torch.float32)
    assert after == before, "a global setting was changed"


@pytest.fixture
def single(guard):
    """For tests in single precision."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def plain_pyro():
    """For tests that run plain Pyro, which registers parameters in its global store."""
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the graphs of loops, and of gradients, as they are: what they compute is what is tested.

    In the long form of the tests they are compiled, which takes ten seconds a graph. Within a test
    the graph of a loop is kept under its words, as its compiled code is kept in a file.
    """
    if not LONG:
        kept = {}

        def compiled(words, made):
            if (name := tuple(words)) not in kept:
                kept[name] = _called_with_a_list(made()[0])
            return kept[name]

        monkeypatch.setattr(stride, "compiled", compiled)
        monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


@pytest.fixture
def traced_only(monkeypatch):
    """Has PyTorch's compiler trace what it is given, sizes and all, and write no code for it.

    In the long form of the tests it does.
    """
    if not LONG:
        whole = torch.compile
        monkeypatch.setattr(
            torch,
            "compile",
            lambda graph, *, options=None, **told: whole(graph, backend="aot_eager", **told),
        )


def _called_with_a_list(graph):
    return lambda inputs: list(graph(*inputs))


@pytest.fixture
def ctrl_c():
    """The handler of Ctrl-C that Python starts with; test runners may have another."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
