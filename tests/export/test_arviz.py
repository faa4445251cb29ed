"""The tree for ArviZ: its schema, and its densities against closed forms."""

import math

import arviz_base
import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from cases import CASES, FAMILIES, cases
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from ppvae import VAE, FamilyGuide, families, from_pyro_svi, likelihoods
from ppvae._scopes import private_modules
from ppvae.nn import mlp

GROUPS = {
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
}


def build(family="mean_scale"):
    torch.manual_seed(0)
    model = VAE(mlp(2, 8, out=4), 2, likelihoods.Normal(0.5))
    return model, FamilyGuide(model, families.LADDER[family], mlp(4, 8)), torch.randn(9, 4)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("batch_size", [256, 4])
def test_densities_are_those_of_the_draws(vectorized, batch_size):
    """log p(x | z), log p(x, z) and log q(z), computed again from the draws in the tree."""
    model, guide, x = build("full_rank")
    tree = from_pyro_svi(
        model, guide, x, num_samples=5, vectorized=vectorized, batch_size=batch_size
    )
    assert set(tree.children) == GROUPS
    z = torch.as_tensor(tree.posterior.z.values[0])
    with torch.no_grad():
        log_x = dist.Normal(model.decode(z), 0.5).log_prob(x).sum(-1)
        log_z = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_q = guide.heads["z"](guide.encoder(x)).log_prob(z)
    stats = tree.sample_stats
    assert np.allclose(tree.log_likelihood.x.values[0], log_x, atol=1e-10)
    assert np.allclose(stats.log_p.values[0], log_x + log_z, atol=1e-10)
    assert np.allclose(stats.log_q.values[0], log_q, atol=1e-10)
    assert np.array_equal(tree.observed_data.x.values, x.numpy())


def test_dims_and_coords():
    model, guide, x = build()
    names = [f"d{i}" for i in range(9)]
    tree = from_pyro_svi(
        model, guide, x, num_samples=3, coords={"datum": names}, dims={"x": ["datum", "feature"]}
    )
    assert tree.posterior.z.dims == ("chain", "draw", "datum", "latent")
    assert tree.posterior_predictive.x.dims == ("chain", "draw", "datum", "feature")
    assert tree.sample_stats.log_q.dims == ("chain", "draw", "datum")
    assert tree.observed_data.x.dims == ("datum", "feature")
    assert tree.posterior.datum.values.tolist() == names
    assert tree.posterior.sizes == {"chain": 1, "draw": 3, "datum": 9, "latent": 2}


def test_predictions_are_drawn_anew_and_the_prior_is_the_models():
    """Means over 2,000 draws within 5 standard errors of those known."""
    model, guide, x = build()
    tree = from_pyro_svi(model, guide, x, num_samples=2000, seed=0)
    z = torch.as_tensor(tree.posterior.z.values[0])
    with torch.no_grad():
        noise = tree.posterior_predictive.x.values[0] - model.decode(z).numpy()
        prior_noise = (
            tree.prior_predictive.x.values[0]
            - model.decode(torch.as_tensor(tree.prior.z.values[0])).numpy()
        )
    for residual in (noise, prior_noise):
        count = residual.size
        assert abs(residual.mean()) < 5 * 0.5 / math.sqrt(count)
        assert abs(residual.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * count)
    prior = tree.prior.z.values
    assert abs(prior.mean()) < 5 / math.sqrt(prior.size)
    assert abs(prior.std() - 1) < 5 / math.sqrt(2 * prior.size)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("case", [name for name in CASES if name != "own rows"])
def test_every_family_and_model(family, case):
    case = cases()[case]
    guide = FamilyGuide(case.model, FAMILIES[family], case.encoder)
    tree = from_pyro_svi(case.model, guide, *case.args, num_samples=2)
    for name, shape in case.latents.items():
        kept = tuple(size for size in shape if size > 1)
        data = tree.posterior[name]
        assert sorted(data.shape) == sorted((1, 2, *kept))
        assert tree.prior[name].dims == data.dims
    point = family in ("deterministic", "zero")
    assert ("log_q" in tree.sample_stats) == (not point)
    local = case.encoder is not None
    assert tree.sample_stats.log_p.dims == ("chain", "draw", *(["datum"] if local else []))


def test_exact_global_guide_gives_the_evidence_and_loo(plain_pyro):
    """With the exact posterior log p - log q is the log evidence in every draw."""
    torch.manual_seed(0)
    X = torch.randn(30, 3)
    y = X @ torch.tensor([1.0, -1.0, 0.5]) + 0.4 * torch.randn(30)

    def model(X, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal((w * X).sum(-1), 0.4), obs=y)

    guide = FamilyGuide(model, families.full_rank).setup(X, y)
    precision = torch.eye(3) + X.T @ X / 0.16
    factor = torch.linalg.cholesky(precision.inverse())
    rows, columns = torch.tril_indices(3, 3)
    head = guide.heads["w"]
    head.loc.raw.data = torch.linalg.solve(precision, X.T @ y) / 0.16
    values = factor[rows, columns]
    head.scale_tril.raw.data = torch.where(rows == columns, values.abs().log(), values)
    tree = from_pyro_svi(model, guide, X, y, num_samples=500, seed=0)
    evidence = dist.MultivariateNormal(torch.zeros(30), 0.16 * torch.eye(30) + X @ X.T).log_prob(y)
    weights = tree.sample_stats.log_p - tree.sample_stats.log_q
    assert abs(weights.values - evidence.item()).max() < 1e-9
    assert tree.posterior.w.dims == ("chain", "draw", "latent")
    result = arviz_stats.loo_approximate_posterior(
        tree, tree.sample_stats.log_p, tree.sample_stats.log_q, var_name="y"
    )
    # exact leave-one-out in closed form; PSIS with 500 draws is good to a tenth of a nat here
    covariance = 0.16 * torch.eye(30) + X @ X.T
    inverse = covariance.inverse()
    spread = 1 / inverse.diagonal()
    exact = dist.Normal(y - spread * (inverse @ y), spread.sqrt()).log_prob(y).sum()
    assert result.elpd == pytest.approx(exact.item(), abs=0.3)


def test_local_and_global_latents_share_one_density_per_draw(plain_pyro):
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * w)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * w, 1.0), obs=x[:, 0])

    x = torch.randn(300, 3)
    guide = AutoGuideList(model)
    guide.append(FamilyGuide(poutine.block(model, expose=["w"]), families.mean_scale))
    guide.append(FamilyGuide(poutine.block(model, hide=["w"]), families.mean_scale, mlp(3, 4)))
    tree = from_pyro_svi(model, guide, x, num_samples=3)
    assert tree.sample_stats.log_p.dims == tree.sample_stats.log_q.dims == ("chain", "draw")
    w, z = (torch.as_tensor(tree.posterior[name].values[0]) for name in "wz")
    expected = dist.Normal(0.0, 1.0).log_prob(w) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    expected += dist.Normal(z * w[:, None], 1.0).log_prob(x[:, 0]).sum(-1)
    assert np.allclose(tree.sample_stats.log_p.values[0], expected, atol=1e-9)
    assert np.allclose(tree.posterior.double.values, 2 * tree.posterior.w.values)


def test_any_guide_of_pyro(plain_pyro):
    case = cases()["regression"]
    tree = from_pyro_svi(case.model, AutoNormal(case.model), *case.args, num_samples=4)
    assert tree.posterior.s.dims == ("chain", "draw") and (tree.posterior.s > 0).all()


def test_file_round_trip_and_summary(tmp_path):
    model, guide, x = build()
    tree = from_pyro_svi(model, guide, x, num_samples=50)
    tree.to_netcdf(tmp_path / "fit.nc")
    with xr.open_datatree(tmp_path / "fit.nc") as again:
        assert np.array_equal(again["posterior/z"].values, tree["posterior/z"].values)
    with arviz_base.rc_context({"stats.ci_kind": "eti"}):
        summary = arviz_stats.summary(tree, var_names=["z"], kind="stats")
    assert len(summary) == 18


def test_opens_in_arviz(tmp_path):
    import arviz

    model, guide, x = build()
    tree = from_pyro_svi(model, guide, x, num_samples=50)
    if hasattr(arviz, "from_datatree"):  # arviz 0.x
        assert arviz.from_datatree(tree).posterior["z"].shape == (1, 50, 9, 2)
    else:
        assert arviz.extract(tree, var_names="z").sizes["sample"] == 50


def test_seed_leaves_the_stream_alone_and_repeats():
    model, guide, x = build()
    state = torch.get_rng_state()
    trees = [from_pyro_svi(model, guide, x, num_samples=3, seed=4) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert trees[0].posterior.equals(trees[1].posterior)


def test_a_model_with_fixed_plates_is_run_in_one_piece():
    def model(x):
        with pyro.plate("data", 12):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    guide = FamilyGuide(model, families.mean_scale, mlp(3, 4))
    tree = from_pyro_svi(model, guide, torch.randn(12, 3), num_samples=2, batch_size=5)
    assert tree.posterior.sizes["datum"] == 12


def test_bad_input():
    model, guide, x = build()
    with pytest.raises(ValueError, match="num_samples: .* got 0"):
        from_pyro_svi(model, guide, x, num_samples=0)
    with pytest.raises(ValueError, match="args: expected finite numbers, got 36"):
        from_pyro_svi(model, guide, x * math.nan)
    case = cases()["own rows"]
    guide = FamilyGuide(case.model, families.mean_scale, case.encoder)
    with pytest.raises(ValueError, match="'data' draws a subsample of 4"):
        from_pyro_svi(case.model, guide, *case.args)
    with private_modules(), pytest.raises(ValueError, match="plate: expected one of"):
        from_pyro_svi(model, FamilyGuide(model, families.mean_scale, mlp(4, 8)), x, plate="rows")


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"vectorized": True}])
def test_deterministic_sites_have_the_shape_of_their_values(options):
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("c", a.sum(-1))
            pyro.deterministic("d", 2 * a, event_dim=1)
            pyro.sample("x", dist.Normal(a.sum(-1), 1.0), obs=x[:, 0])

    guide = FamilyGuide(model, families.mean_scale, mlp(3, 4))
    tree = from_pyro_svi(model, guide, torch.randn(9, 3), num_samples=4, **options)
    for group in (tree.posterior, tree.prior):
        assert group.c.dims == ("chain", "draw", "datum")
        assert group.d.shape == (1, 4, 9, 2)
        assert np.allclose(group.c, group.a.sum("latent"))


def test_a_distribution_that_broadcasts_against_its_observation():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    guide = FamilyGuide(model, families.mean_scale, mlp(3, 4))
    with pyro.validation_enabled(False):
        tree = from_pyro_svi(model, guide, torch.randn(9, 3), num_samples=4)
    assert tree.observed_data.x.shape == (9, 3)


def test_arrays_and_no_data():
    model, guide, x = build()
    tree = from_pyro_svi(model, guide, x.numpy(), num_samples=2)
    assert np.array_equal(tree.observed_data.x, x)
    with pytest.raises(ValueError, match="args: expected at least one datum, got none"):
        from_pyro_svi(model, guide, x[:0])
