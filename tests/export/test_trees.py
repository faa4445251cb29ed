"""What a tree holds beyond draws, against closed forms."""

import math

import arviz_stats
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from global_latents import noise
from linear import Linear
from pyro import poutine

from ppvae import (
    VAE,
    FamilyGuide,
    calibration,
    families,
    fit,
    from_pyro_svi,
    likelihoods,
    loo,
    to_netcdf,
    to_zarr,
)
from ppvae.nn import mlp
from ppvae.regression import LinearRegression

# The likelihood of a datum


@pytest.mark.parametrize("batch_size", [256, 7])
def test_loo_of_local_latents_is_the_log_density_of_each_datum(batch_size):
    """With the posterior for a guide every weight is p(x): leaving a datum out changes nothing."""
    known = Linear()
    told = {"num_samples": 60, "batch_size": batch_size}
    tree = from_pyro_svi(known.model, known.exact(), known.x, **told)
    assert np.allclose(tree.log_likelihood.x, known.log_p, rtol=1e-8)
    assert tree.log_likelihood.x.dtype == np.float64
    for result in (loo(tree), arviz_stats.loo(tree, pointwise=True)):
        assert result.elpd == pytest.approx(known.log_p.sum(), rel=1e-8)
        assert np.allclose(result.elpd_i, known.log_p, rtol=1e-8)
        assert result.pareto_k.max() < 0.5


def test_the_pareto_k_of_loo_is_that_of_the_weights():
    """Of a guide that is too narrow, per datum; and its weights' mean is the likelihood."""
    known = Linear()
    guide = known.guide(families.mean_scale, sd=0.3 * known.best_sd)
    tree = from_pyro_svi(known.model, guide, known.x, num_samples=2000, seed=0)
    weight = tree.sample_stats.log_weight.values[0]
    expected = np.logaddexp.reduce(weight, 0) - math.log(2000)
    assert np.allclose(tree.log_likelihood.x.values, expected, rtol=1e-9, atol=1e-9)
    from arviz_stats.base import array_stats

    k = [array_stats.psislw(-weight[:, n])[1] for n in range(weight.shape[1])]
    assert np.allclose(loo(tree).pareto_k, k, atol=0.02)
    assert max(k) > 0.5


def exact_hierarchy(x):
    """Its local posterior given the global ones is Normal(mu + s (x - mu), sqrt(s))."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def exact_guide(x):
    share = 1 / (1 + 0.25)
    variance = 1 / (1 / 4 + len(x) / 1.25)
    mu = pyro.sample("mu", dist.Normal(variance * x.sum() / 1.25, variance**0.5))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(mu + share * (x - mu), (0.25 * share) ** 0.5))


@pytest.mark.parametrize("vectorized", [True, False])
def test_the_local_latents_are_integrated_out_for_each_draw_of_the_global_ones(vectorized):
    """N(x; mu, sqrt(1.25)); and the weights of the rest are the evidence, a normal of all data."""
    x = torch.tensor([0.3, -1.0, 2.0, 0.7, 1.1])
    told = {"num_samples": 400, "num_inner": 2, "vectorized": vectorized, "seed": 0}
    tree = from_pyro_svi(exact_hierarchy, exact_guide, x, **told)
    mu = torch.as_tensor(tree.posterior.mu.values[0])
    expected = dist.Normal(mu[:, None], 1.25**0.5).log_prob(x)
    assert np.allclose(tree.log_likelihood.x.values[0], expected, rtol=1e-10)
    whole = dist.MultivariateNormal(torch.zeros(5), 4 * torch.ones(5, 5) + 1.25 * torch.eye(5))
    assert np.allclose(tree.sample_stats.log_weight, whole.log_prob(x), rtol=1e-10)
    log_p = dist.Normal(0.0, 2.0).log_prob(mu) + expected.sum(-1)
    assert np.allclose(tree.sample_stats.log_p.values[0], log_p, rtol=1e-10)
    assert tree.posterior.attrs["log_evidence"] == pytest.approx(whole.log_prob(x).item())
    assert tree.posterior.attrs["khat"] == 0 and tree.posterior.attrs["ess"] == pytest.approx(400)
    exact = 0.0
    for n in range(5):
        rest = torch.cat([x[:n], x[n + 1 :]])
        variance = 1 / (1 / 4 + 4 / 1.25)
        exact += dist.Normal(variance * rest.sum() / 1.25, (variance + 1.25) ** 0.5).log_prob(x[n])
    # the se of each of the five means of 400 weights is some 0.03
    assert loo(tree).elpd == pytest.approx(exact.item(), abs=5 * 0.03 * 5**0.5)


def test_what_cannot_be_integrated_out_is_said():
    known = Linear()
    point = from_pyro_svi(known.model, known.guide(families.deterministic), known.x, num_samples=3)
    assert point.log_likelihood.attrs["latents"] == "given"
    with pytest.raises(ValueError, match="tree: expected draws of a guide with a density"):
        loo(point)

    def scaled(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=2.0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    x = torch.randn(6, 1)
    tree = from_pyro_svi(scaled, FamilyGuide(scaled, "mean_scale", mlp(1, 2)), x, num_samples=30)
    assert tree.log_likelihood.attrs["latents"] == "given"
    with pytest.raises(ValueError, match="tree: expected latents of each datum that are integrate"):
        loo(tree)
    for bad in (3, xr.DataTree()):
        with pytest.raises((TypeError, ValueError), match="tree: expected a result of from_pyro_"):
            loo(bad)


def test_several_observed_sites_have_one_likelihood_of_each_datum():
    known = Linear(W=torch.eye(3), noise=1.0, b=torch.zeros(3))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("a", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])
            pyro.sample("b", dist.Normal(z[..., 1:], 1.0).to_event(1), obs=x[:, 1:])

    guide = known.exact()
    tree = from_pyro_svi(model, guide, known.x, num_samples=40)
    assert [*tree.log_likelihood.data_vars] == ["joint"]
    assert np.allclose(tree.log_likelihood.joint, known.log_p, rtol=1e-8)


def test_the_likelihood_of_each_number_is_given_the_latents():
    known = Linear()
    x = known.x.clone()
    x[2, 1] = math.nan
    told = {"num_samples": 5, "pointwise": "element"}
    tree = from_pyro_svi(known.model, known.exact(), known.x, **told)
    z = torch.as_tensor(tree.posterior.z.values)
    with torch.no_grad():
        expected = dist.Normal(known.model.decode(z), known.noise).log_prob(known.x)
    assert tree.log_likelihood.x.dims == ("chain", "draw", "x_element")
    assert np.allclose(tree.log_likelihood.x, expected.flatten(2), rtol=1e-12)
    assert np.array_equal(tree.observed_data.x, known.x.flatten())
    gone = from_pyro_svi(known.model, known.exact(), x, **told).log_likelihood.x
    assert np.isnan(gone.values).sum() == 5 and np.isnan(gone.values[..., 11]).all()
    with pytest.raises(ValueError, match=r"pointwise: expected one of \['datum', 'element'\]"):
        from_pyro_svi(known.model, known.exact(), x, pointwise="pixel")


# Priors, constants, predictions


def grouped(group, x, y):
    """The slopes of groups around a common one, in a plate of their own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 3, dim=-1):
        slope = pyro.sample("slope", dist.Normal(mu, tau))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("y", dist.Normal(slope[..., group] * x, 0.5), obs=y)


GROUP = torch.tensor([0, 1, 2, 0, 1, 2, 2])
X = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.3, -0.7, 1.5], dtype=torch.float64)
Y = torch.tensor([1.2, -0.5, 0.0, 2.5, 0.1, -1.0, 1.0], dtype=torch.float64)


def test_the_log_prior_is_that_of_latents_that_depend_on_no_others():
    guide = FamilyGuide(grouped, "mean_scale")
    tree = from_pyro_svi(grouped, guide, GROUP, X, Y, num_samples=50)
    assert [*tree.log_prior.data_vars] == ["mu", "tau"]
    draws = {name: torch.as_tensor(tree.posterior[name].values) for name in ("mu", "tau")}
    assert np.allclose(tree.log_prior.mu, dist.Normal(0.0, 2.0).log_prob(draws["mu"]))
    assert np.allclose(tree.log_prior.tau, dist.HalfNormal(1.0).log_prob(draws["tau"]))
    assert {*arviz_stats.psense(tree).data_vars} >= {"mu", "tau", "slope"}


def test_arguments_that_are_not_observed_are_constants():
    guide = FamilyGuide(grouped, "mean_scale")
    tree = from_pyro_svi(grouped, guide, GROUP, X, Y, num_samples=2)
    constants = tree.constant_data
    assert {name: v.dims for name, v in constants.data_vars.items()} == {
        "group": ("datum",),
        "x": ("datum",),
    }
    assert np.array_equal(constants["group"], GROUP) and constants["group"].dtype.kind == "i"

    def regression(table, y, *, units):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((table * w).sum(-1), units), obs=y)

    frame = pd.DataFrame({"age": [30.0, 40.0, 50.0], "dose": [1.0, 0.0, 2.0]}, index=list("abc"))
    told = {"kwargs": {"units": torch.ones(3)}, "num_samples": 2}
    guide = FamilyGuide(regression, "mean_scale")
    tree = from_pyro_svi(regression, guide, frame, torch.randn(3), **told)
    constants = tree.constant_data
    assert constants["table"].dims == ("datum", "table_dim_1")
    assert constants["table_dim_1"].values.tolist() == ["age", "dose"]
    assert constants["age"].sel(datum="b") == 40 and constants["units"].dims == ("datum",)


def test_predictions_are_drawn_for_new_data_given_the_global_latents():
    """Held against the means given each draw: 200 residuals, with five of their standard errors."""
    guide = FamilyGuide(grouped, "mean_scale").setup(GROUP, X, Y)
    new = torch.tensor([2, 0]), torch.tensor([3.0, -2.0])
    told = {"num_samples": 100, "seed": 0}
    tree = from_pyro_svi(grouped, guide, GROUP, X, Y, predictions=(*new, None), **told)
    assert tree.predictions.y.shape == (1, 100, 2)
    mean = tree.posterior.slope.values[..., new[0]] * new[1].numpy()
    residual = tree.predictions.y.values - mean
    assert abs(residual.mean()) < 5 * 0.5 / 200**0.5
    assert abs(residual.std() - 0.5) < 5 * 0.5 / 400**0.5
    assert np.array_equal(tree.predictions_constant_data["x"], new[1])
    again = from_pyro_svi(
        grouped, guide, num_samples=100, seed=0, kwargs={"group": GROUP, "x": X, "y": Y},
        predictions={"group": new[0], "x": new[1], "y": torch.zeros(2)},
    )  # fmt: skip
    assert np.array_equal(again.posterior.slope, tree.posterior.slope)
    assert np.array_equal(again.predictions.y, tree.predictions.y)
    with pytest.raises(ValueError, match="predictions: expected 3 arguments, got 1"):
        from_pyro_svi(grouped, guide, GROUP, X, Y, predictions=X)
    with pytest.raises(ValueError, match=r"predictions: expected keyword arguments among \[\]"):
        from_pyro_svi(grouped, guide, GROUP, X, Y, predictions={"x": X})


# Names


def chain(x):
    with pyro.plate("data", len(x), dim=-1):
        z = torch.zeros(2)
        for t in range(3):
            z = pyro.sample(f"z_{t}", dist.Normal(0.5 * z, 1.0).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z[..., 0], 1.0), obs=x[:, t])
        pyro.sample("last", dist.Normal(0.0, 1.0))


def test_steps_are_put_along_one_dim():
    x = torch.randn(5, 3)
    guide = FamilyGuide(chain, "mean_scale", mlp(3, 4)).setup(x)
    plain = from_pyro_svi(chain, guide, x, num_samples=4, seed=0)
    told = {"coords": {"time": [1990, 1991, 1992]}, "dims": {"z": ["datum", "time", "axis"]}}
    tree = from_pyro_svi(
        chain, guide, x, num_samples=4, seed=0, stack={"z": "time", "x": "time"}, **told
    )
    assert tree.posterior.z.dims == ("chain", "draw", "datum", "time", "axis")
    assert tree.observed_data.x.dims == ("datum", "time")
    assert np.array_equal(tree.observed_data.x, x)
    for t in range(3):
        assert np.array_equal(tree.posterior.z[..., t, :], plain.posterior[f"z_{t}"])
        assert np.array_equal(
            tree.posterior_predictive.x[..., t], plain.posterior_predictive[f"x_{t}"]
        )
    assert tree.posterior.time.values.tolist() == [1990, 1991, 1992]
    assert {*tree.posterior.data_vars} == {"z", "last"}
    assert [*tree.log_likelihood.data_vars] == ["joint"]
    for stack, message in (
        ({"y": "time"}, "stack: expected a stem of the sites"),
        (["z"], "stack: expected a mapping from the stems"),
        ({"z": 3}, "stack: expected a mapping from the stems"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            from_pyro_svi(chain, guide, x, num_samples=2, stack=stack)


def test_dims_and_coords_of_another_number_are_refused():
    known = Linear()
    for told, message in (
        ({"dims": {"z": ["datum"]}}, "dims: expected 2 names for 'z', got .'datum'."),
        ({"coords": {"datum": [1, 2]}}, "coords: expected 20 for 'datum', got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            from_pyro_svi(known.model, known.exact(), known.x, num_samples=2, **told)


def test_discrete_sites_are_whole_numbers_where_none_is_missing():
    model = VAE(mlp(2, 4, out=3), 2, likelihoods.Bernoulli())
    guide = FamilyGuide(model, "mean_scale", mlp(3, 4))
    x = (torch.rand(6, 3) > 0.5).double()
    for missing in (False, True):
        x[0, 1] = math.nan if missing else 1.0
        tree = from_pyro_svi(model, guide, x, num_samples=2, batch_size=2)
        assert tree.observed_data.x.dtype == (np.float64 if missing else np.int8)
        assert tree.posterior_predictive.x.dtype == np.int8
        assert tree.posterior.z.dtype == tree.log_likelihood.x.dtype == np.float64


def test_attributes_say_what_drew_the_tree():
    model = LinearRegression(2, noise=1.0)
    X, y = torch.randn(9, 2), torch.randn(9)
    guide = FamilyGuide(model, "full_rank")
    result = fit(model, guide, (X, y), progress=False, seed=0)
    tree = from_pyro_svi(model, guide, X, y, num_samples=40, seed=7)
    words = tree.posterior.attrs
    assert words["family"] == "full_rank" and words["seed"] == 7
    assert words["verdict"] == result.verdict and words["converged"] == 1
    assert words["objective"].startswith("ELBO(")
    assert words["sampling"] == "independent draws of a guide"
    assert {"inference_library_version", "creation_library_version", "torch_version"} <= {
        *tree.attrs
    }


def test_calibration_joins_for_the_pictures_of_its_ranks():
    known = Linear()
    found = calibration(known.model, known.exact(), known.x, num_samples=39, progress=False)
    tree = from_pyro_svi(known.model, known.exact(), known.x, num_samples=3, calibration=found)
    assert [*tree.prior_sbc.data_vars] == ["0", "1", "2"] or len(tree.prior_sbc.data_vars) == 3
    first = next(iter(tree.prior_sbc.data_vars.values()))
    assert first.dims == ("chain", "draw")
    assert np.allclose(first[0], (found["rank"].isel(latent=0) + 0.5) / 40)
    with pytest.raises(TypeError, match="calibration: expected a result of calibration"):
        from_pyro_svi(known.model, known.exact(), known.x, calibration=xr.Dataset())


# Files


def test_a_store_of_zarr_is_there_whole_or_as_it_was(tmp_path):
    pytest.importorskip("zarr")
    known = Linear()
    tree = from_pyro_svi(known.model, known.exact(), known.x, num_samples=3)
    path = to_zarr(tree, tmp_path / "tree.zarr")
    to_netcdf(tree, tmp_path / "tree.nc")
    for _ in range(2):
        with xr.open_datatree(path, engine="zarr") as again:
            assert all(again[g].to_dataset().load().equals(tree[g].to_dataset()) for g in tree)
        to_zarr(tree, path)  # over the old one
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tree.nc", "tree.zarr"]
    bad = xr.Dataset({"x": ("n", np.array([object()]))})
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever Zarr says of an object)
        to_zarr(bad, path)
    with xr.open_datatree(path, engine="zarr") as again:
        assert again["posterior/z"].shape == (1, 3, 20, 3)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tree.nc", "tree.zarr"]
    with pytest.raises(ValueError, match="path: expected that of a Zarr store, or of nothing"):
        to_zarr(tree, tmp_path / "tree.nc")
    with pytest.raises(FileNotFoundError, match="path: expected a folder that exists"):
        to_zarr(tree, tmp_path / "none" / "tree.zarr")


# What is masked, named like something else, or in plates of its own


@pytest.mark.parametrize("how", ["obs_mask", "handler"])
def test_what_is_masked_has_no_likelihood(how):
    """Ten of twenty data count: by datum and by element, in the tree and in leave-one-out."""

    def model(x, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            told = {"obs_mask": seen} if how == "obs_mask" else {}
            with poutine.mask(mask=True if how == "obs_mask" else seen):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x, **told)

    x = torch.cat([torch.randn(10), torch.full((10,), 50.0)])
    seen = torch.arange(20) < 10
    guide = FamilyGuide(model, "mean_scale")
    fit(model, guide, (x, seen), progress=False, seed=0)
    name = "x_observed" if how == "obs_mask" else "x"
    for pointwise in ("datum", "element"):
        told = {"num_samples": 200, "pointwise": pointwise, "seed": 0}
        tree = from_pyro_svi(model, guide, x, seen, **told)
        mu = torch.as_tensor(tree.posterior.mu.values)[..., None]
        found = tree.log_likelihood[name].values
        assert np.isnan(found[..., 10:]).all()
        assert np.allclose(found[..., :10], dist.Normal(mu, 1.0).log_prob(x[:10]))
        assert np.isnan(tree.observed_data[name].values[10:]).all()
        result = loo(tree, var_name=name)
        assert result.n_data_points == 10 and result.elpd > -25


def test_a_point_among_other_latents_hides_no_dependence():
    guide = FamilyGuide(grouped, {"tau": "deterministic", "*": "mean_scale"})
    assert [*from_pyro_svi(grouped, guide, GROUP, X, Y, num_samples=5).log_prior] == ["mu", "tau"]


def test_data_in_two_plates_have_likelihoods_of_their_own():
    """Leave-one-out of the second set, whose exact value is a product of normal densities."""
    a, b = noise(30) + 1, noise(12, seed=1) - 1

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("first", 30):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=a)
        with pyro.plate("second", 12):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=b)

    guide = FamilyGuide(model, "mean_scale")
    fit(model, guide, progress=False, seed=0)
    tree = from_pyro_svi(model, guide, num_samples=500, seed=0)
    assert tree.log_likelihood.y.dims == ("chain", "draw", "second")
    total, exact = a.sum() + b.sum(), 0.0
    for value in b:
        variance = 1 / (1 / 9 + 41)
        exact += dist.Normal(variance * (total - value), (variance + 1) ** 0.5).log_prob(value)
    # an se of some 0.15 / sqrt(500) for each of twelve means of weights
    error = 0.15 * (12 / 500) ** 0.5
    assert loo(tree, var_name="y").elpd == pytest.approx(exact.item(), abs=5 * error)
    with pytest.raises(ValueError, match=r"var_name: expected one of \['x', 'y'\]"):
        loo(tree)


def test_a_scale_on_the_global_latents_counts_in_log_p_where_the_others_are_integrated_out():
    def model(x):
        with poutine.scale(scale=3.0):
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    tree = from_pyro_svi(model, exact_guide, x, num_samples=6)
    prior = dist.Normal(0.0, 2.0).log_prob(torch.as_tensor(tree.posterior.mu.values)).numpy()
    inner = tree.log_likelihood.x.sum("datum").values
    assert np.allclose(tree.sample_stats.log_p, 3 * prior + inner)
    assert np.allclose(tree.sample_stats.log_weight + tree.sample_stats.log_q, prior + inner)


def test_placeholders_of_predictions_are_no_constants_and_equal_columns_are():
    def model(c, x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(c)):
            pyro.sample("x", dist.Normal(c * w, 1.0), obs=x)

    x = noise(9)
    guide = FamilyGuide(model, "mean_scale").setup(x, x)
    new = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    tree = from_pyro_svi(model, guide, x.clone(), x, num_samples=4, predictions=new)
    assert [*tree.constant_data.data_vars] == ["c"]
    assert [*tree.predictions_constant_data.data_vars] == ["c"]


def test_an_argument_with_the_name_of_a_plate_or_a_latent_is_renamed():
    def model(county, a, y):
        with pyro.plate("county", 3):
            slope = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(slope[..., county], a), obs=y)

    y = noise(7)
    guide = FamilyGuide(model, "mean_scale")
    tree = from_pyro_svi(model, guide, GROUP, torch.ones_like(y), y, num_samples=3)
    assert {*tree.constant_data.data_vars} == {"county_data", "a_data"}
    assert tree.posterior.a.dims == ("chain", "draw", "county")


@pytest.mark.parametrize("name", ["draw", "chain", "datum", "latent"])
def test_plates_with_the_name_of_a_dim_are_refused(name):
    def model(x):
        with pyro.plate(name, 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    with pytest.raises(ValueError, match=rf"model: expected plates of other names .* \['{name}'\]"):
        from_pyro_svi(model, FamilyGuide(model, "mean_scale"), noise(4), num_samples=3)


def test_a_model_without_latents_has_the_likelihood_of_each_datum():
    from ppvae.models import GaussianMixture

    x = torch.randn(40, 2)
    model = GaussianMixture.of(x, 2)
    guide = FamilyGuide(model, "mean_scale")
    tree = from_pyro_svi(model, guide, x, num_samples=30)
    assert tree.log_likelihood.attrs["latents"] == "integrated out"
    with torch.no_grad():
        means, scales, weights = model.means, model.scales, model.weights
        parts = dist.Normal(means, scales).to_event(1).log_prob(x[:, None]) + weights.log()
    assert loo(tree).elpd == pytest.approx(parts.logsumexp(-1).sum().item(), rel=1e-8)


def test_one_name_for_dims_of_two_sizes_is_refused():
    def model(x):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a.sum(-1) + b.sum(-1), 1.0), obs=x)

    guide, x = FamilyGuide(model, "mean_scale"), noise(4)
    with pytest.raises(
        ValueError, match="dims: expected one size of 'k' in 'posterior', got 2 and"
    ):
        from_pyro_svi(model, guide, x, num_samples=2, dims={"a": ["k"], "b": ["k"]})


def test_leave_one_out_takes_the_only_site_that_has_data_in_a_plate():
    def model(x, total):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.sample("total", dist.Normal(4 * mu, 1.0), obs=total)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = noise(9)
    tree = from_pyro_svi(model, FamilyGuide(model, "mean_scale"), x, x.sum(), num_samples=30)
    assert tree.log_likelihood.total.dims == ("chain", "draw")
    assert loo(tree).elpd == loo(tree, var_name="x").elpd and loo(tree).n_data_points == 9
