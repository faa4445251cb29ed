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
from linear import Regression, local
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from ppvae import (
    VAE,
    FamilyGuide,
    concat_chains,
    evaluate,
    families,
    from_pyro_svi,
    likelihoods,
    to_netcdf,
)
from ppvae.nn import mlp
from ppvae.regression import LinearRegression, exact_posterior

GROUPS = {"posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior"}
GROUPS |= {"prior_predictive", "observed_data"}
GLOBAL = GROUPS | {"log_prior", "unconstrained_posterior", "constant_data"}
SAMPLE = ("chain", "draw")


def build(family="mean_scale", seed=0):
    torch.manual_seed(seed)
    model = VAE(mlp(2, 8, out=4), 2, likelihoods.Normal(0.5))
    return model, FamilyGuide(model, families.LADDER[family], mlp(4, 8)), torch.randn(9, 4)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("batch_size", [256, 4])
def test_densities_are_those_of_the_draws(vectorized, batch_size):
    """log p(x, z), log q(z) and log p(x) of their weights, again from the draws in the tree."""
    model, guide, x = build("full_rank")
    options = {"num_samples": 5, "vectorized": vectorized, "batch_size": batch_size}
    tree = from_pyro_svi(model, guide, x, **options)
    assert set(tree.children) == GROUPS
    z = torch.as_tensor(tree.posterior.z.values[0])
    with torch.no_grad():
        log_x = dist.Normal(model.decode(z), 0.5).log_prob(x).sum(-1)
        log_z = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_q = guide.heads["z"](guide.encoder(x)).log_prob(z)
    stats = tree.sample_stats
    assert np.allclose(stats.log_p.values[0], log_x + log_z, atol=1e-10)
    assert np.allclose(stats.log_q.values[0], log_q, atol=1e-10)
    assert np.allclose(stats.log_weight.values[0], log_x + log_z - log_q, atol=1e-10)
    whole = (log_x + log_z - log_q).logsumexp(0) - math.log(5)
    assert np.allclose(tree.log_likelihood.x.values[0], whole, atol=1e-8)  # 1e-10 of some 20
    assert tree.log_likelihood.attrs["latents"] == "integrated out"
    assert np.array_equal(tree.observed_data.x.values, x.numpy())


def test_dims_and_coords():
    model, guide, x = build()
    options = {"coords": {"datum": [f"d{i}" for i in range(9)]}, "dims": {"x": ("datum", "pixel")}}
    tree = from_pyro_svi(model, guide, x, num_samples=3, **options)
    assert tree.posterior.z.dims == (*SAMPLE, "datum", "latent")
    assert tree.posterior_predictive.x.dims == (*SAMPLE, "datum", "pixel")
    assert tree.sample_stats.log_q.dims == (*SAMPLE, "datum")
    assert tree.observed_data.x.dims == ("datum", "pixel")
    assert tree.posterior.datum.values.tolist() == options["coords"]["datum"]
    assert tree.posterior.sizes == {"chain": 1, "draw": 3, "datum": 9, "latent": 2}


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_scale_counts_in_log_p_and_not_in_log_likelihood(vectorized):
    """It belongs to what a fit draws towards, and not to the probability of data."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.scale(scale=3.0):
                loc = z.sum(-1, keepdim=True) + torch.zeros(4)
                pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    x = torch.randn(9, 4)
    guide = FamilyGuide(model, "mean_scale", mlp(4, 8)).setup(x)
    tree = from_pyro_svi(model, guide, x, num_samples=5, vectorized=vectorized)
    z = torch.as_tensor(tree.posterior.z.values[0])
    log_x = dist.Normal(z.sum(-1, keepdim=True), 0.5).log_prob(x).sum(-1)
    log_z = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert np.allclose(tree.log_likelihood.x.values[0], log_x, atol=1e-10)
    assert np.allclose(tree.sample_stats.log_p.values[0], 3.0 * log_x + log_z, atol=1e-10)


def test_half_precision_is_exported():
    for dtype, wanted in {torch.bfloat16: "float32", torch.float16: "float16"}.items():
        model, guide, x = build()
        tree = from_pyro_svi(model.to(dtype), guide.to(dtype), x.to(dtype), num_samples=3)
        assert tree.posterior.z.dtype == wanted and np.isfinite(tree.sample_stats.log_p).all()


BAD = [
    ({"dims": {"nothing": ["a"]}}, "dims: expected variables among .*, got .'nothing'.$"),
    ({"dims": {"z": "ab"}}, "dims: expected a mapping from names to sequences"),
    ({"dims": ["a"]}, "dims: expected a mapping"),
    ({"dims": {"z": ["draw", "k"]}}, "dims: expected names for 'z' that differ, also from"),
    ({"dims": {"z": ["k", "k"]}}, "dims: expected names for 'z' that differ"),
    ({"dims": {"z": ["datum", "a/b"]}}, "model: expected names without '/'"),
    ({"coords": {"nothing": [1]}}, "coords: expected dims among .*, got .'nothing'.$"),
    ({"coords": 3}, "coords: expected a mapping"),
    ({"evaluation": 3}, "evaluation: expected a result of evaluate, got int"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_names_that_nothing_has_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        from_pyro_svi(*build(), num_samples=2, **options)


@pytest.mark.parametrize("name", ["latent", "datum", "chain", "draw", "log_p", "log_q", "a/b"])
@pytest.mark.parametrize("local", [True, False])
def test_sites_with_the_name_of_a_dim_are_refused(name, local, plain_pyro):
    """Xarray would take them for coordinates, and their draws would be gone."""

    def model(x):
        fn = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            if local:
                pyro.sample(name, fn)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        if not local:
            pyro.sample(name, fn)

    with pytest.raises(ValueError, match=rf"model: expected .* \['{name}'"):
        from_pyro_svi(model, AutoNormal(model), torch.randn(6), num_samples=2)


def test_predictions_are_drawn_anew_and_the_prior_is_the_models():
    """Means over 2,000 draws within 5 standard errors of those known."""
    model, guide, x = build()
    tree = from_pyro_svi(model, guide, x, num_samples=2000, seed=0)
    residuals = [(tree.prior.z.values, 1.0)]
    for draws, data in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
        with torch.no_grad():
            mean = model.decode(torch.as_tensor(tree[draws].z.values)).numpy()
        residuals.append((tree[data].x.values - mean, 0.5))
    for residual, sd in residuals:
        assert abs(residual.mean()) < 5 * sd / math.sqrt(residual.size)
        assert abs(residual.std() - sd) < 5 * sd / math.sqrt(2 * residual.size)


KINDS = ["mean_scale", "full_rank", "flow", "noise_only", "deterministic"]
MODELS = [name for name in CASES if name != "own rows"]
PAIRS = [(family, name) for family in KINDS for name in MODELS]
PAIRS += [(family, name) for family in set(FAMILIES) - {*KINDS} for name in MODELS[::4]]


DIMS = {
    ("right of steps", "z"): ("datum", "steps", "latent"),
    ("steps inside", "z"): ("datum", "steps"),
    ("positive", "a"): ("datum", "a_dim_0"),
    ("hierarchy", "theta"): ("groups",),
    ("regression", "w"): ("w_dim_0",),
}


@pytest.mark.parametrize(("family", "model"), sorted(PAIRS))
def test_every_family_and_model(family, model):
    case = cases()[model]
    guide = FamilyGuide(case.model, FAMILIES[family], case.encoder)
    tree = from_pyro_svi(case.model, guide, *case.args, num_samples=2, batch_size=4)
    for name, shape in case.latents.items():
        kept = tuple(size for size in shape if size > 1)
        data = tree.posterior[name]
        assert sorted(data.shape) == sorted((1, 2, *kept))
        assert tree.prior[name].dims == data.dims
        assert data.dims[2:] == DIMS.get((model, name), data.dims[2:])
    assert ("log_q" in tree.sample_stats) == (family not in ("deterministic", "zero"))
    local = case.encoder is not None
    assert tree.sample_stats.log_p.dims == (*SAMPLE, *(["datum"] if local else []))


def test_exact_global_guide_gives_the_evidence_and_loo(plain_pyro):
    """With the exact posterior log p - log q is the log evidence in every draw."""
    known = Regression(rows=30, columns=3)
    guide = known.guide(families.full_rank)
    tree = from_pyro_svi(known.model, guide, *known.args, num_samples=2000, seed=0)
    exact = exact_posterior(*known.args, **known.priors)
    log_p, log_q = tree.sample_stats.log_p, tree.sample_stats.log_q
    assert abs((log_p - log_q).values - exact.log_evidence).max() < 1e-9
    assert tree.posterior.weight.dims == (*SAMPLE, "latent")
    result = arviz_stats.loo_approximate_posterior(tree, log_p, log_q, var_name="y")
    # PSIS with 2,000 draws is good to a tenth of a nat here
    assert result.elpd == pytest.approx(exact.loo().total, abs=0.3)


def expected_inner(guide, w, z, x):
    """The weight of the one draw of each datum, given the global one."""
    with torch.no_grad():
        q = guide[1].heads["z"](guide[1].encoder(x)).log_prob(z)
    prior = dist.Normal(0.0, 1.0).log_prob(z)
    return prior + dist.Normal(z * w[:, None], 1.0).log_prob(x[:, 0]) - q


def test_local_and_global_latents_share_one_density_per_draw(plain_pyro):
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * w)
        pyro.deterministic("pair", torch.stack([w, -w], -1)[None], event_dim=1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * w, 1.0), obs=x[:, 0])

    x = torch.randn(300, 3)
    guide = AutoGuideList(model)
    guide.append(FamilyGuide(poutine.block(model, expose=["w"]), families.mean_scale))
    guide.append(FamilyGuide(poutine.block(model, hide=["w"]), families.mean_scale, mlp(3, 4)))
    tree = from_pyro_svi(model, guide, x, num_samples=3, num_inner=1)
    assert tree.sample_stats.log_p.dims == tree.sample_stats.log_q.dims == SAMPLE
    w, z = (torch.as_tensor(tree.posterior[name].values[0]) for name in "wz")
    inner = expected_inner(guide, w, z, x)
    expected = dist.Normal(0.0, 1.0).log_prob(w) + inner.sum(-1)
    assert np.allclose(tree.sample_stats.log_p.values[0], expected, atol=1e-9)
    assert np.allclose(tree.log_likelihood.x.values[0], inner, atol=1e-9)
    assert np.allclose(tree.posterior.double.values, 2 * tree.posterior.w.values)
    assert tree.posterior.pair.dims == (*SAMPLE, "pair_dim_0")


def test_any_guide_of_pyro_and_an_improper_prior(plain_pyro):
    case = cases()["regression"]
    tree = from_pyro_svi(case.model, AutoNormal(case.model), *case.args, num_samples=4)
    assert tree.posterior.s.dims == SAMPLE and (tree.posterior.s > 0).all()
    flat = LinearRegression(3, weight=None, noise=1.0)
    tree = from_pyro_svi(flat, FamilyGuide(flat, families.mean_scale), *case.args, num_samples=4)
    assert set(tree.children) == GLOBAL - {"prior", "prior_predictive", "unconstrained_posterior"}


def test_arviz_takes_the_tree():
    import arviz

    tree = from_pyro_svi(*build(), num_samples=50)
    with arviz_base.rc_context({"stats.ci_kind": "eti"}):
        assert len(arviz_stats.summary(tree, var_names=["z"], kind="stats")) == 18
    if hasattr(arviz, "from_datatree"):  # arviz 0.x
        assert arviz.from_datatree(tree).posterior["z"].shape == (1, 50, 9, 2)
    else:
        assert arviz.extract(tree, var_names="z").sizes["sample"] == 50


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"vectorized": True}])
def test_deterministic_sites_have_the_shape_of_their_values(options, dim):
    """Also with dims of size one in front or behind, and a last minibatch of one datum."""

    def model(x):
        with pyro.plate("data", len(x), dim=dim):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("c", a.sum(-1))
            pyro.deterministic("d", 2 * a, event_dim=1)
            value = a[..., :1] if dim == -1 else a[..., 0]
            pyro.deterministic("e", value[None] if value.dim() == 2 else value)  # (1, N, 1)
            pyro.sample("x", dist.Normal(a.sum(-1), 1.0), obs=x if dim == -1 else x[:, None])

    encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), mlp(1, 4))
    guide = FamilyGuide(model, families.mean_scale, encoder)
    tree = from_pyro_svi(model, guide, torch.randn(9), num_samples=4, **options)
    for group in (tree.posterior, tree.prior):
        assert group.c.dims == (*SAMPLE, "datum") and group.d.shape == (1, 4, 9, 2)
        assert np.allclose(group.c, group.a.sum("latent"))
        assert group.e.dims[:3] == group.c.dims and group.e.size == 36
        assert np.array_equal(group.e.values.ravel(), group.a.values[..., 0].ravel())


def test_a_distribution_that_broadcasts_against_its_observation():
    model = local(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z[..., None], 1.0).to_event(1))
    guide = FamilyGuide(model, families.mean_scale, mlp(3, 4))
    with pyro.validation_enabled(False):
        tree = from_pyro_svi(model, guide, torch.randn(9, 3), num_samples=4)
    assert tree.observed_data.x.shape == (9, 3)


# --- chains ---------------------------------------------------------------------------------------


def chain(seed, x, evaluated=True, **options):
    model, guide, _ = build(seed=seed)
    found = evaluate(model, guide, x, num_samples=30) if evaluated else None
    return from_pyro_svi(model, guide, x, evaluation=found, **({"num_samples": 5} | options)), found


def test_seeds_become_chains(tmp_path):
    x = torch.randn(9, 4)
    (first, one), (second, two) = chain(0, x), chain(1, x)
    both = concat_chains([first, second])
    assert set(both.children) == GROUPS | {"evaluation"}
    for index, (alone, found) in enumerate([(first, one), (second, two)]):
        for group in ("posterior", "log_likelihood", "sample_stats", "prior"):
            for name, values in alone[group].data_vars.items():
                assert np.array_equal(both[group][name].values[index], values.values[0])
        assert np.array_equal(both["evaluation"].elbo.values[index], found.elbo.values)
        assert both["evaluation"].mutual_information.values[index] == found.mutual_information
    assert both.posterior.chain.values.tolist() == [0, 1]
    assert "chain" not in both.observed_data.dims and both.attrs == first.attrs
    to_netcdf(both, tmp_path / "both.nc")
    with xr.open_datatree(tmp_path / "both.nc") as again:
        for name in ("posterior/z", "evaluation/khat"):
            assert np.array_equal(again[name].values, both[name].values)
        assert again["evaluation"].attrs["family"] == "mean_scale"
    three = concat_chains([both, chain(2, x)[0]])
    assert three.posterior.sizes["chain"] == three["evaluation"].sizes["chain"] == 3
    assert np.array_equal(three["evaluation"].elbo.values[:2], both["evaluation"].elbo.values)


def test_chains_that_do_not_fit_are_refused():
    x = torch.randn(9, 4)
    tree, plain = chain(0, x)[0], chain(0, x, evaluated=False)[0]
    for trees, message in (
        ([], "trees: expected at least one tree, got none"),
        ([tree, plain], r"trees: expected the groups \['evaluation'.* got \['log"),
        ([plain, chain(1, x, False, num_samples=6)[0]], "variables and sizes in 'posterior'"),
        ([plain, chain(1, x + 1, False)[0]], "trees: expected the same data in 'observed_data'"),
    ):
        with pytest.raises(ValueError, match=message):
            concat_chains(trees)


def test_discrete_latents_are_drawn_from_their_posterior(plain_pyro):
    """Of a mixture with known parts: shares of the draws against p(k | x), and loo without them."""
    loc = torch.tensor([-1.0, 1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            part = pyro.sample("part", dist.Bernoulli(0.3))
            pyro.deterministic("middle", loc[part.long()])
            z = pyro.sample("z", dist.Normal(0.0, 0.5))
            pyro.sample("x", dist.Normal(loc[part.long()] + z, 0.5).to_event(0), obs=x[:, 0])

    model.vectorized = True
    x = torch.linspace(-2.0, 2.0, 5)[:, None]
    guide = FamilyGuide(model, "mean_scale", torch.nn.Identity()).setup(x)
    tree = from_pyro_svi(model, guide, x, num_samples=4000)
    drawn = tree["posterior"]
    assert drawn["part"].dims == ("chain", "draw", "datum")
    assert (drawn["middle"] == 2 * drawn["part"] - 1).all()
    z = torch.as_tensor(drawn["z"].values[0])
    on = 0.3 * torch.exp(dist.Normal(1.0 + z, 0.5).log_prob(x[:, 0]))
    off = 0.7 * torch.exp(dist.Normal(-1.0 + z, 0.5).log_prob(x[:, 0]))
    chance = (on / (on + off)).mean(0).numpy()
    assert (abs(drawn["part"].values[0].mean(0) - chance) < 5 * 0.5 / 4000**0.5).all()
    with torch.no_grad():
        q = guide.heads["z"](guide.encoder(x)).log_prob(z)
    weights = torch.log(on + off) + dist.Normal(0.0, 0.5).log_prob(z) - q
    found = torch.as_tensor(tree["log_likelihood"]["x"].values[0])
    assert torch.allclose(found, weights.logsumexp(0) - math.log(4000), rtol=1e-6)
    again = tree["posterior_predictive"]["x"].values[0]
    middle = drawn["middle"].values[0] + z.numpy()
    assert (abs((again - middle).mean(0)) < 5 * 0.5 / 4000**0.5).all()
