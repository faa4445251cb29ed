"""What may come in place of a good argument: good, bad and borderline values."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
import xarray as xr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ppvae import families


def nothing(model, guide, *args):
    """A function that does nothing."""


#: words -> value, for any argument
THINGS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "zero": lambda: 0,
    "one": lambda: 1,
    "two": lambda: 2,
    "-1": lambda: -1,
    "NaN": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "1e300": lambda: 1e300,
    "1e-300": lambda: 1e-300,
    "True": lambda: True,
    "False": lambda: False,
    "1.9": lambda: 1.9,
    "0.3": lambda: 0.3,
    "1j": lambda: 1j,
    "too large for a float": lambda: 10**400,
    "text": lambda: "3",
    "no text": lambda: "",
    "bytes": lambda: b"3",
    "list": lambda: [],
    "tuple": lambda: (),
    "dict": lambda: {},
    "set": lambda: {1, 2},
    "numbers": lambda: [1, 2],
    "NaN among numbers": lambda: [1.0, math.nan],
    "Nones": lambda: [None, None],
    "pair of text": lambda: ("a", "b"),
    "a mapping": lambda: {"a": 1},
    "a mapping of numbers": lambda: {1: 2},
    "a mapping to None": lambda: {"a": None},
    "np.nan": lambda: np.array([np.nan]),
    "scalar array": lambda: np.array(0.5),
    "scalar tensor": lambda: torch.tensor(0.5),
    "whole tensor": lambda: torch.tensor(2),
    "NaN tensor": lambda: torch.tensor(math.nan),
    "vector": lambda: torch.tensor([1.0, 2.0]),
    "negative vector": lambda: torch.tensor([-1.0, 2.0, 3.0]),
    "empty tensor": lambda: torch.empty(0),
    "empty matrix": lambda: torch.empty(0, 3),
    "date": lambda: np.datetime64("2020-01-01"),
    "pd.NA": lambda: pd.NA,
    "object": object,
    "class": lambda: int,
    "function": lambda: nothing,
    "function of nothing": lambda: lambda: None,
    "one that returns what it gets": lambda: lambda *args, **kwargs: args,
    "math.sqrt": lambda: math.sqrt,
    "module": lambda: nn.Linear(3, 3),
    "dtype": lambda: torch.float64,
    "path": lambda: Path("nowhere") / "file",
    "folder": lambda: Path("."),
    "distribution": lambda: dist.Normal(0.0, 1.0),
    "discrete distribution": lambda: dist.Poisson(1.0),
    "infinite distribution": lambda: dist.Normal(0.0, torch.tensor(math.inf), validate_args=False),
    "distribution's class": lambda: dist.Gamma,
    "family": lambda: families.flow,
    "empty Dataset": xr.Dataset,
    "Dataset of other things": lambda: xr.Dataset({"elbo": ("datum", [1.0, 2.0])}),
    "empty tree": xr.DataTree,
}


def _sub(tensor):
    return nn.Parameter(tensor) if tensor.is_floating_point() else tensor


#: words -> from good data to other data
DATA: dict[str, Callable[[torch.Tensor], Any]] = {
    "no rows": lambda x: x[:0],
    "one row": lambda x: x[:1],
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float32": lambda x: x.float(),
    "whole": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x + 0j,
    "first row": lambda x: x[0],
    "more dimensions": lambda x: x[None],
    "column": lambda x: x[..., None],
    "flat": lambda x: x.flatten(),
    "wider": lambda x: torch.cat([x, x], -1),
    "twice": lambda x: (x, x),
    "a list of tensors": lambda x: list(x),
    "sparse": lambda x: x.to_sparse(),
    "on meta": lambda x: x.to("meta"),
    "NaN row": lambda x: torch.cat([x[:1] * math.nan, x[1:]]),
    "inf entry": lambda x: torch.cat([x[:1] + math.inf, x[1:]]),
    "x 1e30": lambda x: x * 1e30,
    "x 1e-30": lambda x: x * 1e-30,
    "x 1e200": lambda x: x * 1e200,
    "x 1e-200": lambda x: x * 1e-200,
    "constant": lambda x: torch.ones_like(x),
    "zeros": lambda x: torch.zeros_like(x),
    "repeated": lambda x: x[:1].expand(x.shape),
    "masked": lambda x: np.ma.masked_array(x.numpy(), mask=x.numpy() == x.numpy().max()),
    "text array": lambda x: x.numpy().astype(str),
    "objects": lambda x: x.numpy().astype(object),
    "dates": lambda x: x.numpy().astype("datetime64[s]"),
    "long double": lambda x: x.numpy().astype(np.longdouble),
    "table": lambda x: pd.DataFrame(x.reshape(len(x), -1).numpy()),
    "xarray": lambda x: xr.DataArray(x.numpy()),
    "TensorDataset": TensorDataset,
    "DataLoader": lambda x: DataLoader(x, 2),
    "iterator": lambda x: iter(x),
}

#: words -> the same data in another dress
DRESSES: dict[str, Callable[[torch.Tensor], Any]] = {
    "array": lambda x: x.numpy(),
    "backwards": lambda x: x.numpy()[::-1].copy()[::-1],
    "read-only": lambda x: np.broadcast_to(x.numpy()[None], (1, *x.shape))[0],
    "nested lists": lambda x: x.tolist(),
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "parameter": _sub,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}

#: words -> the same number in another dress
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "NumPy's": lambda n: np.asarray(n)[()],
    "array of one": np.asarray,
    "tensor of one": torch.tensor,
    "float32": lambda n: np.float32(n) if n == np.float32(n) else n,
}


def changes(good):
    """words -> (function from a good value to another one, whether that means the same)."""
    table = {words: (lambda _, make=make: make(), False) for words, make in THINGS.items()}
    if isinstance(good, (torch.Tensor, np.ndarray)) and good.ndim:
        table |= {
            words: (lambda v, m=make: m(torch.as_tensor(v)), False) for words, make in DATA.items()
        }
        table |= {
            words: (lambda v, m=make: m(torch.as_tensor(v)), True)
            for words, make in DRESSES.items()
        }
    elif isinstance(good, (int, float)) and not isinstance(good, bool):
        table |= {words: (make, True) for words, make in NUMBERS.items()}
    return table
