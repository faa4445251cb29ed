"""What people have, and what becomes of it: one column of numbers in every dress."""

import functools
import math
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pairs import build, one_warning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ppvae import VAE, FamilyGuide, evaluate, fit, likelihoods
from ppvae.data.adapters import Form, as_tensors, form_of, prepared
from ppvae.nn import mlp

X = np.arange(12.0).reshape(4, 3) % 5
DRESSES = {
    "float64": X,
    "float32": X.astype(np.float32),
    "float16": X.astype(np.float16),
    "long double": X.astype(np.longdouble),
    "int8": X.astype(np.int8),
    "uint16": X.astype(np.uint16),
    "uint64": X.astype(np.uint64),
    "big endian": X.astype(">f8"),
    "objects": X.astype(object),
    "lists": X.tolist(),
    "lists of whole numbers": X.astype(int).tolist(),
    "frame": pd.DataFrame(X),
    "frame of whole numbers": pd.DataFrame(X.astype(int)),
    "nullable frame": pd.DataFrame(X).convert_dtypes(),
    "xarray": xr.DataArray(X, dims=["row", "column"]),
    "tensor": torch.tensor(X),
    "whole tensor": torch.tensor(X).long(),
    "strided": np.repeat(X, 2, 1)[:, ::2],
}


def counted(dtype=torch.float64):
    model = VAE(mlp(2, out=3), 2, likelihoods.Poisson()).to(dtype)
    return model, FamilyGuide(model, "mean_scale", mlp(3, 4).to(dtype))


def measured(x, dtype):
    """The ELBO, and the losses of a fit, of the same pair."""
    torch.manual_seed(0)
    model, guide = counted(dtype)
    found = evaluate(model, guide, x, num_samples=8, progress=False)
    return found.elbo, fit(model, guide, x, num_epochs=1, seed=0, progress=False).losses


@functools.cache
def plain(dtype):
    """Those of numbers as they are."""
    return measured(torch.tensor(X, dtype=dtype), dtype)


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_dresses_give_the_same_numbers(dress, dtype):
    """The parameters say the dtype; a tensor that has another is cast with a word."""
    elbo, wanted = plain(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cast, which has a test of its own
        found, losses = measured(DRESSES[dress], dtype)
    assert found.identical(elbo) and losses == wanted


@pytest.mark.parametrize("kind", ["tensor", "loader", "dataset"])
def test_a_tensor_of_another_dtype_is_cast_with_a_word(kind):
    model, guide = counted(torch.float32)
    x = torch.tensor(X)
    given = {"loader": DataLoader(x, 2), "dataset": TensorDataset(x)}.get(kind, x)
    with one_warning("data: torch.float64 is cast to torch.float32, that of the parameters"):
        fit(model, guide, given, num_epochs=2, progress=False)
    with one_warning("args: torch.float64 is cast to torch.float32, that of the parameters"):
        evaluate(model, guide, x, num_samples=8, progress=False)
    model, guide = counted()
    with one_warning("data: torch.float32 is cast to torch.float64"):
        fit(model, guide, x.float(), num_epochs=1, progress=False)


def test_what_the_dtype_cannot_hold_is_refused():
    model, guide = counted(torch.float32)
    with pytest.raises(ValueError, match="^data: expected numbers that torch.float32 can hold, go"):
        fit(model, guide, X * 1e300)


class Stream(torch.utils.data.IterableDataset):
    """Rows one after the other."""

    def __iter__(self):
        return iter(torch.tensor(X))


class Told(Stream):
    """One that says how many there are."""

    def __len__(self):
        return len(X)


def test_a_stream_may_know_its_length():
    for given, size in ((Told(), None), (DataLoader(Told(), 2), None), (Stream(), 4), (Told(), 4)):
        result = fit(*counted(), given, num_epochs=2, size=size, progress=False)
        assert len(result.losses) == 2
    with pytest.raises(ValueError, match="^size: expected the number of data beside an Iterable"):
        fit(*counted(), Stream(), num_epochs=1, progress=False)


def test_whole_numbers_stay_whole_where_a_model_says_nothing():
    """Codes that a program indexes by must not become real numbers."""
    seen = []

    def model(group, y):
        seen.append(group.dtype)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(torch.zeros(3)[group] + z, 1.0), obs=y)

    guide = FamilyGuide(model, "mean_scale", _Second())
    group = np.array([0, 2, 1, 1])
    fit(model, guide, (group, X[:, 0]), num_epochs=1, progress=False)
    evaluate(model, guide, group, X[:, 0], num_samples=8, progress=False)
    assert {*seen} == {torch.int64}


class _Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp(1, 4)

    def forward(self, group, y):
        return self.inner(y[:, None])


def test_bools_become_what_the_likelihood_needs():
    torch.manual_seed(0)
    model = VAE(mlp(2, out=3), 2, likelihoods.Bernoulli())
    guide = FamilyGuide(model, "mean_scale", mlp(3, 4))
    values = [
        evaluate(model, guide, x, num_samples=8, progress=False).elbo.values
        for x in (X > 1, torch.tensor(X > 1), pd.DataFrame(X > 1), (X > 1).astype(float))
    ]
    assert all(np.array_equal(values[0], other) for other in values)


def test_labels_of_a_context_come_as_they_are():
    model = VAE(mlp(5, out=3), 2, likelihoods.Normal(), context=3)
    encoder = FamilyGuide(model, "noise_only")
    labels = pd.Series(pd.Categorical(["b", "a", "c", "a"]))
    values = [
        evaluate(model, encoder, X, c, num_samples=8, progress=False).elbo.values
        for c in (labels, np.array([1, 0, 2, 0]), [1, 0, 2, 0], torch.tensor([1, 0, 2, 0]))
    ]
    assert all(np.array_equal(values[0], other) for other in values)


def test_a_memory_map_is_not_copied(tmp_path):
    np.save(tmp_path / "x.npy", X.astype(np.float64))
    held = np.load(tmp_path / "x.npy", mmap_mode="r")
    (tensor,) = as_tensors("data", held)
    assert tensor.data_ptr() == held.ctypes.data
    assert prepared((held,))[0].data_ptr() == held.ctypes.data


def test_the_form_is_that_of_the_parameters():
    model, guide = build()
    form = form_of(model, guide)
    assert form.dtype is torch.float64 and form.device == torch.device("cpu")
    assert form.is_real(0) and not form.is_real(1)
    assert form_of(print, print).dtype is None and not Form().is_real(0)
    whole = nn.Module()
    whole.register_parameter("w", nn.Parameter(torch.ones(1, dtype=torch.int64), False))
    assert form_of(whole).dtype is None


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([["a"]], TypeError, "^data: expected tensors, arrays of numbers"),
        ([[1.0], [2.0, 3.0]], TypeError, "^data: expected real numbers in a dense array"),
        (np.array([["a"]]), TypeError, "^data: expected tensors, arrays of numbers"),
        (pd.Series(["a"]), TypeError, r"^data: expected numbers, categories by astype\('cat"),
        (pd.DataFrame({"a": ["b"]}), TypeError, "in column 'a', got"),
        (pd.DataFrame({"t": pd.to_datetime(["2020-01-01"])}), TypeError, "in column 't', got date"),
        (X + 1j, TypeError, "^data: "),
        ([X, X[:3]], ValueError, r"^data: expected equal first dimensions, got \[3, 4\]"),
        (np.full((4, 3), math.inf), ValueError, "^data: expected finite numbers, or NaN, got 12"),
    ],
)
def test_what_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        fit(*build(), data, num_epochs=1, progress=False)
