"""Whatever one gives a public function, it returns numbers or says which argument is wrong."""

import contextlib
import dataclasses
import os
import re
import traceback
import warnings
from functools import cache

import fuzzed
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from bad_programs import FINE, PAIRED, PROGRAMS
from cases import LONG, world
from changes import changes
from fuzzed import CALLS, LEFT_OUT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro.poutine import runtime
from torch import nn

from ppvae import Diverged, Fit, NotStageable

RIGHT, CLEAR, OBSCURE, SILENT = "right", "clear", "obscure", "silent"


def numbers(thing, path=""):
    """All numbers in a result, by where they stand."""
    if isinstance(thing, Fit):
        thing = {"losses": thing.losses, "validation": thing.validation_losses}
    if isinstance(thing, nn.Module):
        thing = thing.state_dict()
    if isinstance(thing, xr.DataTree):
        thing = thing.to_dict()
    if isinstance(thing, (xr.Dataset, pd.DataFrame)):
        thing = dict(thing.items())
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        thing = vars(thing) if hasattr(thing, "__dict__") else {}
    if hasattr(thing, "_asdict"):
        thing = thing._asdict()
    if isinstance(thing, dict):
        for name, value in thing.items():
            yield from numbers(value, f"{path}/{name}")
    elif isinstance(thing, (list, tuple)) and not all(isinstance(v, float) for v in thing):
        for index, value in enumerate(thing):
            yield from numbers(value, f"{path}/{index}")
    elif isinstance(thing, torch.Tensor):
        if not (thing.is_meta or thing.is_complex()):
            yield path, thing.detach().to_dense().double().numpy()
    elif isinstance(
        thing, (int, float, list, tuple, np.ndarray, xr.DataArray, pd.Series, np.number)
    ):
        array = np.asarray(thing)
        if array.dtype.kind in "biuf":
            yield path, array


def held(thing, *, trained):
    """The tensors and arrays in what a caller holds, without modules that are trained."""
    if isinstance(thing, nn.Module):
        yield from () if trained else (*thing.parameters(), *thing.buffers())
    elif isinstance(thing, (torch.Tensor, np.ndarray)):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for each in thing:
            yield from held(each, trained=trained)
    elif isinstance(thing, dict):
        yield from held(list(thing.values()), trained=trained)


def copied(tensor):
    plain = isinstance(tensor, torch.Tensor)
    return tensor.detach().clone() if plain else tensor.copy()


def unchanged(tensor, before):
    if isinstance(tensor, torch.Tensor):
        if tensor.is_meta or tensor.layout is not torch.strided:
            return True
        return tensor.grad is None and torch.equal(tensor.nan_to_num(), before.nan_to_num())
    return tensor.tobytes() == before.tobytes()


def state():
    """What belongs to the process; the first part is the random numbers."""
    return [*world(), torch.get_num_threads(), len(runtime._PYRO_STACK), os.getcwd()]


def answered(name, told):
    """What a call gives, or the error it raises, and what it left behind, in words."""
    call = CALLS[name]
    tensors = list(held(told, trained=call.trains))
    before, outside = [copied(tensor) for tensor in tensors], state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = call.function(**told)
        except Exception as error:
            result = error
    left = []
    after = state()
    seeded = told.get("seed", 0) is not None and told.get("seeds", 0) is not None
    if after[1:] != outside[1:] or (seeded and "seed" in told and after[0] != outside[0]):
        left.append("the process is changed")
    if not all(map(unchanged, tensors, before)):
        left.append("the caller's tensors are changed")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(True)
    return result, left


@cache
def good_numbers(name):
    torch.manual_seed(0)
    good = CALLS[name].good()
    torch.manual_seed(0)
    result, left = answered(name, good)
    assert not isinstance(result, Exception), result
    assert not left
    return dict(numbers(result))


#: what messages call the parts of a program, and of its data
PARTS = {"encoder", "decoder", "likelihood", "prior", "args", "data", "x", "context"}
REFUSALS = (TypeError, ValueError, FileNotFoundError)


def tells(error, name, told, functions):
    """Whether an error names an argument and says what was expected of it.

    Where two do not fit each other it may be either of them. A function that was given may raise
    its own errors, as over arguments that it does not take; so may a program and its network, with
    a note of what it was called with.
    """
    if isinstance(error, (Diverged, NotStageable)):
        return True
    if isinstance(error, ValueError) and str(error).startswith("Expected parameter"):
        return True  # Pyro's own words, over a program that is checked as it runs
    if functions or "unexpected keyword argument" in str(error):
        return True
    noted = any(
        re.match("in a run of model or guide on", n) for n in getattr(error, "__notes__", [])
    )
    if noted and not is_ours(error):
        return True
    head, colon, rest = str(error).partition(": ")
    known = PARTS.union(told, CALLS[name].named.values())
    names = any(re.search(rf"\b{re.escape(each)}\b", head) for each in known)
    return isinstance(error, REFUSALS) and names and "expected " in rest and "got " in rest


def is_ours(error):
    """Whether a line of this library raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].split(".")[0] == "ppvae"


def outcome(name, changed):
    """The class of a call, and why.

    Args:
        name: of the call.
        changed: argument -> words of the change.
    """
    torch.manual_seed(0)
    told = CALLS[name].good()
    same, functions = True, False
    for argument, words in changed.items():
        make, alike = changes(told[argument])[words]
        told[argument] = make(told[argument])
        same, functions = same and alike, functions or callable(told[argument])
    torch.manual_seed(0)
    result, left = answered(name, told)
    if left:
        return SILENT, left[0] + f" ({type(result).__name__}: {result!s:.100})"
    if isinstance(result, Exception):
        kind = CLEAR if tells(result, name, told, functions) else OBSCURE
        return kind, f"{type(result).__name__}: {result!s:.200}"
    came, good = dict(numbers(result)), good_numbers(name)
    for where, values in came.items():
        wanted = good.get(where)
        finite = np.isfinite(values).all() or re.fullmatch(CALLS[name].infinite, where)
        if wanted is not None and np.isfinite(wanted).all() and not finite:
            return SILENT, f"{where} is not finite"
        timed = "second" in where
        if same and not (timed or wanted is None or np.array_equal(values, wanted, equal_nan=True)):
            if not np.allclose(values, wanted, rtol=1e-6, equal_nan=True):
                return SILENT, f"{where} is {values!r:.60} instead of {wanted!r:.60}"
    return RIGHT, ""


@cache
def arguments_of(name):
    """argument -> words of its changes, without those that take long."""
    table = {argument: changes(value) for argument, value in CALLS[name].good().items()}
    return {
        argument: [words for words in all_words if (name, argument, words) not in LEFT_OUT]
        for argument, all_words in table.items()
    }


@st.composite
def calls(draw, name=None):
    """The name of a call, and one or two of its arguments with their changes."""
    name = name or draw(st.sampled_from(list(CALLS)))
    table = arguments_of(name)
    chosen = draw(st.lists(st.sampled_from(list(table)), min_size=1, max_size=2, unique=True))
    return name, {argument: draw(st.sampled_from(table[argument])) for argument in chosen}


@pytest.fixture(scope="module", autouse=True)
def folder():
    """Relative paths are in a folder of their own."""
    with contextlib.chdir(fuzzed.FOLDER.name):
        yield


def fuzz(count):
    """So many calls, the same ones each time."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


@fuzz(4000 if LONG else 200)
@given(calls())
def test_a_call_is_right_or_its_error_names_the_argument(call):
    kind, why = outcome(*call)
    assert kind in (RIGHT, CLEAR), f"{call}: {kind}: {why}"


@pytest.mark.skipif(not LONG, reason="15,000 calls take minutes")
@pytest.mark.parametrize("name", CALLS)
def test_every_change_of_one_argument(name):
    wrong = {}
    for argument, all_words in arguments_of(name).items():
        for words in all_words:
            kind, why = outcome(name, {argument: words})
            if kind not in (RIGHT, CLEAR):
                wrong[argument, words] = f"{kind}: {why}"
    assert not wrong


@pytest.mark.parametrize("measure", PAIRED)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_bad_program_is_refused(name, measure):
    """An error of its own comes through with its type; all others name what is wrong."""
    make, errors, words = PROGRAMS[name]
    try:
        model, guide = make()
    except REFUSALS as error:
        assert type(error) in errors and re.search(words, str(error))
        return
    arguments = CALLS[measure].good() | {"model": model, "guide": guide}
    result, left = answered(measure, arguments)
    assert not left
    if (name, measure) in FINE:
        assert not isinstance(result, Exception)
        return
    assert isinstance(result, errors) and re.search(words, str(result)), repr(result)
