"""Names of rows and columns, categories and back, and sparse matrices."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import sparse
from torch import nn

from ppvae import (
    VAE,
    FamilyGuide,
    compare_families,
    evaluate,
    fit,
    fit_replicates,
    from_pyro_svi,
    generate,
    impute,
    likelihoods,
    log_prob,
)
from ppvae.data import from_anndata, to_frame
from ppvae.nn import Concatenate, FillMissing, mlp

FRAME = pd.DataFrame(
    {
        "age": [30.0, np.nan, 51.5, 40.0],
        "sex": pd.Categorical(["f", "m", None, "f"]),
        "smokes": [True, False, False, True],
        "visits": [0, 3, 1, 7],
    },
    index=["ann", "ben", "cem", "dee"],
)


def pair():
    parts = {
        0: likelihoods.Normal(learned=True),
        1: likelihoods.Categorical(2),
        2: likelihoods.Bernoulli(),
        3: likelihoods.Poisson(),
    }
    likelihood = likelihoods.Mixed.of(FRAME, parts=parts)
    model = VAE(mlp(2, out=5), 2, likelihood)
    return model, FamilyGuide(model, "mean_scale", mlp(4, 8))


def test_names_reach_the_coordinates():
    model, guide = pair()
    fit(model, guide, FRAME, num_epochs=1, progress=False)
    tree = from_pyro_svi(model, guide, FRAME, num_samples=3)
    found = impute(model, guide, FRAME, num_samples=40)
    for x in (tree["observed_data/x"], tree["posterior_predictive/x"], found.value):
        assert [*x.coords["datum"].values] == [*FRAME.index]
        assert [*x.coords["x_dim_0"].values] == [*FRAME.columns]
    named = from_pyro_svi(model, guide, FRAME, num_samples=3, coords={"x_dim_0": list("abcd")})
    assert [*named["observed_data/x"].coords["x_dim_0"].values] == list("abcd")
    other = from_pyro_svi(model, guide, FRAME, num_samples=3, dims={"x": ["who", "what"]})
    assert other["observed_data/x"].dims == ("who", "what")
    plain = impute(model, guide, [[30.0, 1.0, 0.0, 2.0]], num_samples=40)
    assert "datum" not in plain.coords


def test_columns_go_by_their_names_and_categories_too():
    """Another table may have its categories in another order, or fewer of them, but no new ones."""
    parts = {
        "age": likelihoods.Normal(learned=True),
        ("sex",): likelihoods.Categorical(2),
        "smokes": likelihoods.Bernoulli(),
        3: likelihoods.Poisson(),
    }
    likelihood = likelihoods.Mixed.of(FRAME, parts=parts)
    assert likelihood.columns == [[0], [1], [2], [3]]
    assert likelihood.schema.categories == {"sex": ["f", "m"]}
    model = VAE(mlp(2, out=5), 2, likelihood)
    guide = FamilyGuide(model, "noise_only")
    other = FRAME.assign(sex=FRAME.sex.cat.reorder_categories(["m", "f"]))
    for frame in (FRAME, other):
        tree = from_pyro_svi(model, guide, frame, num_samples=2)
        sex = tree["observed_data/x"].values[:, 1]
        assert np.array_equal(sex, [0, 1, np.nan, 0], equal_nan=True)
    new = FRAME.assign(sex=pd.Categorical(["f", "x", None, "m"]))
    seen = r"^data: expected categories of \['f', 'm'\] in column 'sex', got 'x' in row 1"
    with pytest.raises(ValueError, match=seen):
        fit(model, guide, new, progress=False)
    with pytest.raises(ValueError, match="^args: .* got 'x' in row 1"):
        from_pyro_svi(model, guide, new)
    with pytest.raises(
        ValueError, match=r"^parts: expected columns among \['age', .*, got \['a'\]"
    ):
        likelihoods.Mixed.of(FRAME, parts={"a": likelihoods.Normal()})
    with pytest.raises(ValueError, match="^exposure: expected none for a table"):
        likelihoods.Mixed.of(FRAME, parts=parts, exposure=[1.0] * 4)
    with pytest.raises(ValueError, match="^likelihood: expected a state of"):
        pair()[0].load_state_dict({**model.state_dict(), "_extra_state": {"likelihood": ["Mixed"]}})


def test_columns_may_come_in_another_order_but_not_others():
    model, guide = pair()  # made from the table
    numbers = FRAME.drop(columns="sex")
    narrow = VAE(mlp(2, out=3), 2, likelihoods.Normal())
    held = FamilyGuide(narrow, "mean_scale", FillMissing.of(numbers, mlp(3, 4)))
    fit(narrow, held, numbers, num_epochs=1, progress=False)  # which remembers it
    for one, other, table in ((model, guide, FRAME), (narrow, held, numbers)):
        turned = table[table.columns[::-1]]
        values = [log_prob(one, other, t, num_samples=40) for t in (table, turned)]
        assert values[0].identical(values[1])
        named = impute(one, other, turned, num_samples=40)
        assert [*named.coords["x_dim_0"].values] == [*table.columns]
        with pytest.raises(ValueError, match=r"^args: expected columns of names that differ, got"):
            log_prob(one, other, table.rename(columns={"visits": "age"}))
        with pytest.raises(ValueError, match=r"^args: expected the columns \['age', .*'zzz'"):
            log_prob(one, other, table.rename(columns={"visits": "zzz"}))
    with pytest.raises(
        ValueError, match=r"^parts: expected a likelihood for each column, got none"
    ):
        likelihoods.Mixed.of(FRAME, parts={"age": likelihoods.Normal()})


def test_labels_go_by_their_names_from_the_first_fit_on():
    labels = pd.Series(["cat", "dog"] * 10, dtype="category")
    x = torch.where(torch.tensor([True, False] * 10), -5.0, 5.0)[:, None]
    model = VAE(nn.Linear(3, 1), 1, likelihoods.Normal(0.1), context=2)
    guide = FamilyGuide(model, "mean_scale", Concatenate(mlp(3, 4), labels={1: 2}))
    fit(model, guide, (x, labels), num_epochs=1, progress=False)
    dogs = pd.Series(["dog"] * 3, dtype="category")
    told = {"seed": 0}
    assert torch.equal(generate(model, context=dogs, **told), generate(model, 3, context=1, **told))
    codes = log_prob(model, guide, x[:3], [1, 1, 1], num_samples=40)
    assert log_prob(model, guide, x[:3], dogs, num_samples=40).identical(codes)
    other = labels.cat.reorder_categories(["dog", "cat"])
    wanted = log_prob(model, guide, x, labels, num_samples=40)
    assert log_prob(model, guide, x, other, num_samples=40).identical(wanted)
    with pytest.raises(
        ValueError, match=r"^args: expected categories of \['cat', 'dog'\], got 'ant'"
    ):
        log_prob(model, guide, x[:1], pd.Series(["ant"], dtype="category"))
    with pytest.raises(ValueError, match=r"^context: expected categories of \['cat', 'dog'\]"):
        generate(model, context=pd.Series(["ant"], dtype="category"))


def test_replicates_and_comparisons_know_the_names_too():
    table = pd.DataFrame({"a": np.arange(6.0) % 3, "k": pd.Categorical(list("xyxyxx"))})
    other = table.assign(k=table.k.cat.reorder_categories(["y", "x"]))[["k", "a"]]

    def build():
        model = VAE(mlp(2, out=2), 2, likelihoods.Normal())
        return model, mlp(2, 4)

    pairs = []
    for _ in range(2):
        model, encoder = build()
        pairs.append((model, FamilyGuide(model, "mean_scale", encoder)))
    fit_replicates(pairs, table, num_epochs=1, progress=False)
    for pair in pairs:
        values = [log_prob(*pair, t, num_samples=40) for t in (table, other)]
        assert values[0].identical(values[1])
    told = {"num_seeds": 2, "num_samples": 8, "num_epochs": 1, "progress": False}
    found = [
        compare_families(build, ["noise_only", "mean_scale"], table, test, seed=0, **told)
        for test in (table, other)
    ]
    assert np.array_equal(found[0].dataset.distortion, found[1].dataset.distortion)


def test_names_of_xarray_reach_them_too():
    x = xr.DataArray(np.zeros((2, 3)), {"row": ["a", "b"]}, ["row", "column"])
    model = VAE(mlp(2, out=3), 2, likelihoods.Normal())
    guide = FamilyGuide(model, "noise_only")
    tree = from_pyro_svi(model, guide, x, num_samples=3)
    assert [*tree["observed_data/x"].coords["datum"].values] == ["a", "b"]


def test_a_table_and_back():
    model, guide = pair()
    found = impute(model, guide, FRAME, num_samples=40)
    whole = to_frame(found.value, FRAME)
    assert (whole.dtypes == FRAME.dtypes).all() and not whole.isna().any(axis=None)
    assert (whole.index == FRAME.index).all()
    known = FRAME.notna()
    assert (whole[known] == FRAME[known])[known].stack().all()
    drawn = to_frame(found.imputations[0], FRAME)
    assert drawn.sex["cem"] in ("f", "m")
    again = to_frame(torch.tensor([[1.0, np.nan, 0.0, np.nan]]), FRAME)
    assert again.sex.isna()[0] and not again.smokes[0] and np.isnan(again.visits[0])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (np.zeros((2, 3)), ValueError, r"^values: expected shape \(rows, 4\), as the table"),
        ([[0.0, 2.0, 0.0, 0.0]], ValueError, "^values: expected codes from 0 to 1 in column 'sex'"),
        ([["a", "b", "c", "d"]], TypeError, "^values: "),
    ],
)
def test_what_is_no_such_table(values, error, message):
    with pytest.raises(error, match=message):
        to_frame(values, FRAME)
    with pytest.raises(TypeError, match="^like: expected a table of pandas, got int"):
        to_frame(values, 3)


def counts(rows=12):
    dense = np.random.default_rng(0).poisson(0.4, (rows, 5)).astype(float)
    return dense, sparse.csr_matrix(dense)


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, sparse.coo_array])
def test_a_sparse_matrix_gives_the_losses_of_a_dense_one(kind):
    dense, _ = counts()

    def losses(x):
        torch.manual_seed(0)
        model = VAE(mlp(2, out=5), 2, likelihoods.Poisson.of(dense))
        guide = FamilyGuide(model, "mean_scale", mlp(5, 4))
        return fit(model, guide, x, num_epochs=2, batch_size=12, seed=0, progress=False).losses

    assert losses(kind(dense)) == losses(dense)


def test_a_sparse_matrix_goes_with_an_exposure_and_is_measured():
    dense, matrix = counts()
    told = {"kwargs": {"exposure": dense.sum(1) + 1}, "progress": False}

    def fitted(x):
        torch.manual_seed(0)
        likelihood = likelihoods.Poisson.of(x, exposure=dense.sum(1) + 1)
        model = VAE(mlp(2, out=5), 2, likelihood)
        guide = FamilyGuide(model, "mean_scale", mlp(5, 4))
        result = fit(model, guide, x, num_epochs=2, batch_size=5, seed=0, **told)
        return result.losses, evaluate(model, guide, x, num_samples=8, **told).elbo.values

    losses, bounds = fitted(matrix)
    assert losses == fitted(dense)[0] and np.array_equal(bounds, fitted(dense)[1])
    holed = matrix.copy()
    holed.data[0] = np.nan
    model = VAE(mlp(2, out=5), 2, likelihoods.Poisson())
    guide = FamilyGuide(model, "mean_scale", mlp(5, 4))
    assert np.isfinite(fit(model, guide, holed, num_epochs=1, progress=False).losses).all()
    with pytest.raises(ValueError, match="^data: expected finite numbers of torch.float64, or NaN"):
        fit(model, guide, matrix * np.inf, num_epochs=1, progress=False)
    huge = sparse.csr_matrix((100_000, 10_000))
    with pytest.raises(ValueError, match="^args: expected at most 500,000,000 numbers when dense"):
        evaluate(model, guide, huge)


def test_anndata_gives_its_matrix_and_columns():
    """By an object with the three attributes that are asked for."""
    dense, matrix = counts()
    batch = pd.Series(pd.Categorical(["a", "b", "c"] * 4))
    obs = pd.DataFrame({"batch": batch, "size": dense.sum(1)})
    adata = SimpleNamespace(X=matrix, obs=obs, layers={"raw": dense})
    x, codes, size = from_anndata(adata, "batch", "size")
    assert x is matrix and [*codes[:4]] == [0, 1, 2, 0] and np.array_equal(size, dense.sum(1))
    assert from_anndata(adata, layer="raw")[0] is dense
    model = VAE(mlp(5, out=5), 2, likelihoods.Poisson(), context=3)
    guide = FamilyGuide(model, "mean_scale", Concatenate(mlp(8, 4), labels={1: 3}))
    result = fit(model, guide, (x, codes), num_epochs=1, batch_size=4, progress=False)
    assert np.isfinite(result.losses).all() and result.num_steps == 3
    with pytest.raises(TypeError, match="^adata: expected an AnnData object, got int"):
        from_anndata(3)
    with pytest.raises(ValueError, match=r"^layer: expected one of \['raw'\], got 'x'"):
        from_anndata(adata, layer="x")
    with pytest.raises(ValueError, match=r"^keys: expected columns of obs, \['batch', 'size'\]"):
        from_anndata(adata, "donor")
    with pytest.raises(ValueError, match=r"^data: expected equal first dimensions, got \[11, 12\]"):
        fit(model, guide, (x, codes[:11]), num_epochs=1, progress=False)
