"""Missing entries: left out of the likelihood, exactly, whatever stands in their places."""

import math
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LIKELIHOODS
from linear import exact_pair, holes, observed_only
from pairs import build, data
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader

from ppvae import (
    VAE,
    FamilyGuide,
    annealed_importance,
    evaluate,
    families,
    fit,
    fit_replicates,
    from_pyro_svi,
    gaps,
    likelihoods,
    nan_masked,
    reading,
    stage,
)
from ppvae._scopes import private_modules
from ppvae.nn import FillMissing, Standardize, mlp
from ppvae.objectives import ELBO, IWAE, negative_elbo
from ppvae.regression import LinearRegression

QUIET = {"progress": False, "num_samples": 8}


@pytest.fixture(autouse=True)
def _alone():
    """Programs that are run by hand leave their modules in Pyro's store."""
    with private_modules():
        yield


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_density_is_that_of_the_observed_entries(name):
    kind, out = LIKELIHOODS[name], 4
    likelihood = kind.make()
    width = likelihood.size(out) if hasattr(likelihood, "size") else out
    model = VAE(mlp(2, out=width), 2, likelihood)
    x = kind.draw(6, 4).to(torch.get_default_dtype())
    z = torch.randn(6, 2)
    held = poutine.condition(nan_masked(model), {"z": z})
    whole = kind.log_prob(model.decode(z), x)
    missing = torch.rand(6, 4) < 0.4
    trace = poutine.trace(held).get_trace(torch.where(missing, math.nan, x))
    trace.compute_log_prob()
    expected = torch.where(missing, 0.0, whole).sum(-1)
    assert torch.allclose(trace.nodes["x"]["log_prob"], expected, rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(trace.nodes["x"]["log_prob"].sum(), model.decoder[0].bias)
    assert torch.isfinite(slope).all()


def test_log_p_of_what_is_observed_is_exact():
    """The guide is the posterior, so that all weights are equal: log p(x) has no error."""
    model, guide, covariance = exact_pair()
    x = holes(torch.randn(30, 4))
    found = evaluate(model, guide, x, **QUIET)
    expected = [observed_only(row, torch.zeros(4), covariance) for row in x]
    assert np.allclose(found.log_likelihood, expected, atol=1e-8)
    assert expected[0] == 0.0  # of nothing


@pytest.mark.parametrize("kind", ["masked", "frame", "NA", "tensor", "loader", "keyword"])
def test_what_stands_under_the_mask_has_no_part(kind):
    x, junk = holes(data(12)), torch.randn(12, 3)
    hidden = x.isnan().numpy()

    def given(under):
        values = torch.where(x.isnan(), under, x).numpy()
        if kind == "masked":
            return np.ma.masked_array(values, hidden)
        if kind == "frame":
            return pd.DataFrame(values).mask(hidden)
        if kind == "NA":
            return pd.DataFrame(values).astype("Float64").mask(hidden, pd.NA)
        gone = torch.tensor(values)
        gone[torch.tensor(hidden)] = math.nan
        return DataLoader(gone, batch_size=12) if kind == "loader" else gone

    def losses(under):
        torch.manual_seed(0)
        model, guide = build()
        if kind == "keyword":
            model, guide = (_by_keyword(model), _by_keyword(guide))
            call = fit(model, guide, junk, kwargs={"obs": given(under)}, num_epochs=3, seed=0,
                       progress=False)  # fmt: skip
        else:
            call = fit(model, guide, given(under), num_epochs=3, seed=0, progress=False)
        return call.losses

    assert losses(torch.zeros(12, 3)) == losses(junk) == losses(torch.full((12, 3), 1e30))
    assert all(map(math.isfinite, losses(junk)))


class _by_keyword(nn.Module):  # noqa: N801
    """A program whose data are a keyword argument, beside something else."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, junk, obs):
        return self.program(obs)


def test_every_way_to_run_a_loss_gives_the_same_number():
    x = holes(data(12))
    model, guide = build()
    for objective in (None, IWAE(3)):
        staged = stage(model, guide, x, objective=objective)
        for batch in (x, x[:7], data(5)):
            values = []
            for call in (staged, objective or negative_elbo):
                torch.manual_seed(3)
                pair = () if call is staged else (nan_masked(model), nan_masked(guide))
                values.append(call(*pair, batch).item())
            assert values[0] == pytest.approx(values[1], rel=1e-6)
    results = fit_replicates([build(), build()], x, num_epochs=2, progress=False)
    assert all(math.isfinite(loss) for result in results for loss in result.losses)


def test_plain_pyro_inference_takes_them_too():
    x = holes(data(12))
    model, guide = build()
    pair = nan_masked(model), nan_masked(guide)
    torch.manual_seed(0)
    loss = SVI(*pair, pyro.optim.Adam({}), Trace_ELBO()).evaluate_loss(x)
    torch.manual_seed(0)
    assert loss / 12 == pytest.approx(ELBO(kl="sampled")(*pair, x).item(), rel=1e-6)
    assert nan_masked(nan_masked(model)).program is model
    with pytest.raises(TypeError, match="^program: expected a function or module, got int"):
        nan_masked(3)


def test_an_obs_mask_of_pyro_is_integrated_out():
    """The entries it makes a latent of belong to the model, and the bound is that of the others."""
    weight, x = torch.randn(1, 3), torch.randn(20, 3)
    seen = torch.rand(20, 3) < 0.7

    def model(x, seen):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(z * weight, 0.5), obs=x, obs_mask=seen)

    def posterior(x, seen):
        precision = 1 + (seen * weight**2).sum(-1) / 0.25
        mean = (torch.where(seen, x, 0.0) * weight).sum(-1) / 0.25 / precision
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(mean[:, None], precision.rsqrt()[:, None]))

    covariance = weight.T @ weight + 0.25 * torch.eye(3)
    expected = [
        observed_only(row, torch.zeros(3), covariance) for row in torch.where(seen, x, math.nan)
    ]
    for under in (x, torch.where(seen, x, 7.0), torch.where(seen, x, math.nan)):
        found = evaluate(model, posterior, under, seen, **QUIET)
        assert np.allclose(found.log_likelihood, expected, atol=1e-8)
    guide = FamilyGuide(model, families.mean_scale, encoder=_Both())
    result = fit(model, guide, (x, seen), num_epochs=60, learning_rate=0.02, progress=False)
    assert [site.name for block in guide.blocks for site in block.sites] == ["z"]
    bound = evaluate(model, guide, x, seen, **QUIET).elbo
    assert result.losses[-1] < result.losses[0] and (bound.mean() <= np.mean(expected) + 0.1).all()


class _Both(nn.Module):
    """An encoder of data and of which entries are observed."""

    def __init__(self):
        super().__init__()
        self.inner = mlp(6, 8)

    def forward(self, x, seen):
        return self.inner(torch.cat([torch.where(seen, x, 0.0), seen.to(x.dtype)], -1))


def test_the_tree_knows_what_was_not_observed():
    x = holes(data(12))
    model, guide = build()
    tree = from_pyro_svi(model, guide, x, num_samples=3, seed=0)
    assert np.array_equal(tree["observed_data/x"], x, equal_nan=True)
    assert np.isfinite(tree["posterior_predictive/x"]).all()
    log_p = tree["log_likelihood/x"].values
    assert np.isnan(log_p[0, :, 0]).all() and np.isfinite(log_p[0, :, 1:]).all()


def test_noise_and_copied_values_are_told_without_the_missing_ones():
    x = holes(torch.randn(200, 3) * torch.tensor([1.0, 1000.0, 1.0]))
    model = VAE(mlp(2, out=3), 2, likelihoods.Normal(0.5))
    found = evaluate(model, FamilyGuide(model, families.noise_only), x, **QUIET)
    assert found.copied == 1 and found.noise_variance == 0.25 and "directions" not in found.attrs


SCALED = {
    "laplace": (lambda: likelihoods.Laplace(torch.tensor([0.3, 0.3, 0.3])), lambda x: x),
    "student": (lambda: likelihoods.StudentT(3.0, scale=0.3), lambda x: x),
    "log normal": (lambda: likelihoods.LogNormal(0.3), torch.exp),
    "mixed": (
        lambda: likelihoods.Mixed({(0, 1): likelihoods.Laplace(0.3), 2: likelihoods.Poisson()}),
        lambda x: torch.cat([x[:, :2], x[:, 2:].abs().floor()], 1),
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_copied_values_are_told_of_every_likelihood_with_a_scale(name):
    make, changed = SCALED[name]
    x = changed(holes(torch.randn(200, 3) * torch.tensor([1.0, 600.0, 1.0])).clamp(-700, 700))
    model = VAE(mlp(2, out=3), 2, make())
    found = evaluate(model, FamilyGuide(model, families.noise_only), x, **QUIET)
    assert found.copied == 1 and "noise_variance" not in found.attrs
    assert "What to do: " in reading(found)
    counted = VAE(mlp(2, out=3), 2, likelihoods.Poisson())
    found = evaluate(counted, FamilyGuide(counted, families.noise_only), x.abs().floor(), **QUIET)
    assert "copied" not in found.attrs


@pytest.mark.parametrize("with_mask", [False, True])
def test_an_encoder_may_take_them_itself(with_mask):
    x = holes(data(12))
    inner = mlp(6 if with_mask else 3, 4)
    encoder = FillMissing.of(x, inner, learned=True, with_mask=with_mask)
    means = np.nanmean(x, 0)
    assert np.allclose(encoder.fill.detach(), means)
    filled = torch.where(x.isnan(), torch.tensor(means), x)
    wanted = torch.cat([filled, (~x.isnan()).to(x.dtype)], -1) if with_mask else filled
    assert torch.allclose(encoder(x), inner(wanted))
    model, guide = build(encoder=encoder)
    before = encoder.fill.detach().clone()
    fit(model, guide, x, num_epochs=2, progress=False)
    assert (encoder.fill != before).any()
    inside = nn.Sequential(Standardize.of(x), encoder)  # its columns have mean zero
    _, guide = build(encoder=inside)
    trace = poutine.trace(nan_masked(guide)).get_trace(x)
    expected = guide.heads["z"](inside(x)).mean
    assert torch.equal(trace.nodes["z"]["fn"].mean, expected)
    plain = mlp(3, 4)
    model, guide = build(encoder=plain)
    trace = poutine.trace(nan_masked(guide)).get_trace(x)
    assert torch.isfinite(trace.nodes["z"]["fn"].mean).all()
    expected = guide.heads["z"](plain(x.nan_to_num(0.0))).mean
    assert torch.equal(trace.nodes["z"]["fn"].mean, expected)


def test_zeros_far_from_the_data_are_told():
    x = holes(data(40)) + torch.tensor([0.0, 100.0, 0.0])
    for encoder, told in ((mlp(3, 4), True), (FillMissing.of(x, mlp(3, 4)), False)):
        model, guide = build(encoder=encoder)
        start = (
            r"data: missing entries are zeros to the encoder, \d+ standard deviations from column 1"
        )
        with pytest.warns(UserWarning, match=start) if told else nullcontext():
            fit(model, guide, x, num_epochs=1, progress=False)


def test_starts_and_standards_are_those_of_the_observed_entries():
    x = holes(data(40)).numpy()
    layer = Standardize.of(torch.tensor(x))
    assert np.allclose(layer.loc, np.nanmean(x, 0)) and np.allclose(layer.scale, np.nanstd(x, 0))
    normal = likelihoods.Normal.of(np.ma.masked_invalid(x), learned=True)
    assert np.allclose(normal.start, np.nanmean(x, 0))
    assert np.allclose(normal.scale.detach(), np.nanstd(x, 0))
    counts = np.array([[0.0, 3.0], [2.0, np.nan], [np.nan, 5.0]])
    assert np.allclose(likelihoods.Poisson.of(counts).start.exp(), [2.5 / 2, 8.5 / 2])
    assert np.allclose(
        likelihoods.Bernoulli.of(counts.clip(0, 1)).start.sigmoid(), [1.5 / 3, 2.5 / 3]
    )


def test_a_table_of_categories_becomes_its_codes():
    frame = pd.DataFrame({"sex": pd.Categorical(["m", None, "f"], ["f", "m"]), "age": [1, 2, 3]})
    likelihood = likelihoods.Mixed.of(
        frame, parts={0: likelihoods.Categorical(2), 1: likelihoods.Normal()}
    )
    assert np.allclose(likelihood.parts[0].shares.exp(), [[0.5], [0.5]])
    model = VAE(mlp(2, out=3), 2, likelihood)
    guide = FamilyGuide(model, families.noise_only)
    tree = from_pyro_svi(model, guide, frame, num_samples=2)
    assert np.array_equal(tree["observed_data/x"], [[1, 1], [np.nan, 2], [0, 3]], equal_nan=True)
    other = VAE(mlp(2, out=3), 2, likelihoods.Normal())
    with pytest.raises(TypeError, match=r"astype\('boolean'\), in column 'word', got (object|str)"):
        fit(other, FamilyGuide(other, "noise_only"), frame.assign(word=["a", "b", "c"]))


def _correlated(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.MultivariateNormal(z, torch.eye(3)), obs=x)


def _bit_by_bit(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((z * x).sum(-1), 1.0), obs=torch.ones(len(x)))


@pytest.mark.parametrize("train", ["fit", "replicates", "loader", "validation"])
@pytest.mark.parametrize("model", [_correlated, _bit_by_bit])
def test_what_cannot_be_left_out_is_refused_by_row_and_column(model, train):
    x = data(12)
    x[7, 2] = math.nan
    guide = FamilyGuide(model, families.mean_scale, encoder=mlp(3, 4))
    name = "validation" if train == "validation" else "data"
    place = rf"{name}: .* first in row 7, column 2: NaN, which this distribution cannot leave out"
    if model is _bit_by_bit:
        place = "model: .* argument 0 is NaN in row 7, column 2, and is more than an observation"
    with pytest.raises(ValueError, match=place):
        if train == "replicates":
            pairs = [(model, guide), (model, FamilyGuide(model, "mean_scale", mlp(3, 4)))]
            fit_replicates(pairs, x, num_epochs=1, progress=False)
        elif train == "validation":
            fit(model, guide, data(12), validation=x, num_epochs=1, progress=False)
        else:
            loader = DataLoader(x, batch_size=12)
            fit(model, guide, loader if train == "loader" else x, num_epochs=1, progress=False)


def test_pyros_own_distribution_of_correlated_entries_is_taken():
    """It leaves NaN out by itself, whose density is that of the others."""
    covariance = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 1.0]])
    x = holes(data(12))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1e-6))
            fn = dist.NanMaskedMultivariateNormal(z.unsqueeze(-1) + torch.zeros(3), covariance)
            pyro.sample("x", fn, obs=x)

    guide = FamilyGuide(model, families.noise_only)
    found = evaluate(model, guide, x, **QUIET)
    expected = [observed_only(row, torch.zeros(3), covariance) for row in x]
    assert np.allclose(found.log_likelihood, expected, atol=1e-4)


def test_a_regression_without_some_answers_is_that_of_the_other_rows():
    X, y = torch.randn(40, 2), torch.randn(40)
    y[::4] = math.nan
    results = []
    for rows in (slice(None), ~y.isnan()):
        model = LinearRegression(2, noise=0.5)
        guide = FamilyGuide(model, families.full_rank)
        assert fit(model, guide, (X[rows], y[rows]), progress=False).converged
        results.append(guide.heads["weight"](None))
    assert torch.allclose(results[0].mean, results[1].mean, atol=1e-6)
    assert torch.allclose(results[0].covariance_matrix, results[1].covariance_matrix, atol=1e-6)
    X[3, 1] = math.nan
    with pytest.raises(ValueError, match="argument 0 is NaN in row 3, column 1"):
        fit(model, guide, (X, y.nan_to_num(0.0)), progress=False)


def test_annealed_importance_and_gaps_know_only_what_is_observed():
    """log p(x) of the observed entries is known, and the gap of a guide is to it."""
    model, _, covariance = exact_pair()
    x = holes(torch.randn(8, 4))
    expected = np.array([observed_only(row, torch.zeros(4), covariance) for row in x])
    guide = FamilyGuide(model, families.full_rank, encoder=mlp(4, 4)).setup(x)
    told = {"vectorized": True, "progress": False}
    run = annealed_importance(model, guide, x, num_temperatures=100, num_chains=32, **told)
    error = np.sqrt(1 / run.ess - 1 / 32)  # of the log of a mean weight
    assert (abs(run.log_likelihood - expected) < 5 * error + 0.02).all()
    found = gaps(model, guide, x, num_steps=100, log_likelihood=expected, **told)
    assert (abs(found.approximation) < 1e-6).all()  # a normal posterior is of the family
    assert (found.amortization > 0.01).all()  # and an untrained encoder does not find it
