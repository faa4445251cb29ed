"""Runs over seeds as chains."""

import numpy as np
import pytest
import torch
import xarray as xr

from ppvae import VAE, FamilyGuide, concat_chains, evaluate, families, from_pyro_svi, likelihoods


def tree(seed, x, evaluated=True, num_samples=5):
    torch.manual_seed(seed)
    model = VAE(torch.nn.Linear(2, 4), 2, likelihoods.Normal(0.5))
    guide = FamilyGuide(model, families.mean_scale, torch.nn.Linear(4, 8))
    found = evaluate(model, guide, x, num_samples=30) if evaluated else None
    return from_pyro_svi(model, guide, x, num_samples=num_samples, evaluation=found), found


def test_seeds_become_chains(tmp_path):
    x = torch.randn(9, 4)
    (first, one), (second, two) = tree(0, x), tree(1, x)
    both = concat_chains([first, second])
    assert set(both.children) == {*first.children} and "evaluation" in both.children
    for index, (alone, found) in enumerate([(first, one), (second, two)]):
        for group in ("posterior", "log_likelihood", "sample_stats", "prior"):
            for name, values in alone[group].data_vars.items():
                assert np.array_equal(both[group][name].values[index], values.values[0])
        assert np.array_equal(both["evaluation"].elbo.values[index], found.elbo.values)
        assert both["evaluation"].mutual_information.values[index] == found.mutual_information
    assert both.posterior.chain.values.tolist() == [0, 1]
    assert "chain" not in both.observed_data.dims
    both.to_netcdf(tmp_path / "both.nc")
    with xr.open_datatree(tmp_path / "both.nc") as again:
        assert np.array_equal(again["evaluation"].khat.values, both["evaluation"].khat.values)
        assert again["evaluation"].attrs["family"] == "mean_scale"
    three = concat_chains([both, tree(2, x)[0]])
    assert three.posterior.sizes["chain"] == three["evaluation"].sizes["chain"] == 3
    assert np.array_equal(three["evaluation"].elbo.values[:2], both["evaluation"].elbo.values)


def test_what_does_not_fit_is_refused():
    x = torch.randn(9, 4)
    with pytest.raises(ValueError, match="trees: expected at least one"):
        concat_chains([])
    with pytest.raises(ValueError, match="trees: expected the groups .*'evaluation'.* got"):
        concat_chains([tree(0, x)[0], tree(1, x, evaluated=False)[0]])
    with pytest.raises(ValueError, match="equal variables and sizes in 'posterior'"):
        concat_chains([tree(0, x, False)[0], tree(1, x, False, num_samples=6)[0]])
