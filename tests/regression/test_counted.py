"""Rows that count several times are the same row as often, and half a row half of its density."""

import functools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LONG
from linear import same_one_by_one
from pyro import poutine

from ppvae import FamilyGuide, families, fit, from_pyro_svi, likelihoods, predict, simulate
from ppvae.regression import GeneralizedLinear, LinearRegression, exact_posterior, objective
from ppvae.regression.counted import Counted

ROWS, COLUMNS = 24, 3
UNIT, HALF = dist.Normal(0.0, 1.0), dist.HalfNormal(1.0)
PRIORS = {"weight": UNIT, "intercept": UNIT}
MODELS = {
    "normal": functools.partial(LinearRegression, COLUMNS, noise=0.8, **PRIORS),
    "unknown noise": functools.partial(LinearRegression, COLUMNS, noise=HALF, scale=HALF),
    "student": functools.partial(GeneralizedLinear, COLUMNS, likelihoods.StudentT(4.0), **PRIORS),
    "poisson": functools.partial(GeneralizedLinear, COLUMNS, likelihoods.Poisson(), **PRIORS),
    "bits": functools.partial(GeneralizedLinear, COLUMNS, likelihoods.Bernoulli(), **PRIORS),
    "classes": functools.partial(GeneralizedLinear, COLUMNS, likelihoods.Categorical(3), **PRIORS),
}
HAVE_NOISE = ("normal", "unknown noise", "student")


def rows(name):
    """Arguments of a model, and whole counts, of which some are zero."""
    X, counts = torch.randn(ROWS, COLUMNS), torch.arange(float(ROWS)) % 4
    if name in HAVE_NOISE:
        y, weights, offset = torch.randn(ROWS), torch.rand(ROWS) + 0.5, torch.randn(ROWS)
        return {"X": X, "y": y, "weights": weights, "offset": offset}, counts
    most = {"poisson": 4, "bits": 2, "classes": 3}[name]
    return {"X": X, "y": torch.randint(most, (ROWS,)).to(X.dtype)}, counts


def repeated(data, counts):
    return {name: values.repeat_interleave(counts.long(), 0) for name, values in data.items()}


def fitted(model, data, **more):
    """The guide at its optimum, and its parameters; X and y by position, all else by name."""
    sides = {name: values for name, values in data.items() if name not in ("X", "y")} | more
    guide = FamilyGuide(model, families.full_rank)
    found = fit(model, guide, (data["X"], data["y"]), kwargs=sides, progress=False, seed=0)
    assert found.converged
    fn = guide.heads["joint" if "joint" in guide.heads else "weight"](None)
    value = objective(model, guide, data["X"], data["y"], kwargs=sides)
    return value, fn.mean.detach(), fn.covariance_matrix.detach()


@pytest.mark.parametrize("name", list(MODELS))
def test_counts_are_repeated_rows_and_parts_are_parts_of_a_density(name):
    """To rounding: at the same latents, row by row."""
    model, (data, counts) = MODELS[name](), rows(name)
    start = poutine.trace(poutine.block(model, hide=["y", "data"])).get_trace(**data)
    latents = {node: start.nodes[node]["value"] for node in start.stochastic_nodes}
    same = poutine.condition(model, latents)

    def densities(values, **more):
        trace = poutine.trace(same).get_trace(**values, **more)
        trace.compute_log_prob()
        return trace.nodes["y"]["log_prob"]

    once = densities(data)
    assert torch.allclose(
        densities(data, counts=counts).sum(), densities(repeated(data, counts)).sum()
    )
    part = torch.rand(ROWS)
    assert torch.allclose(densities(data, counts=part), part * once)
    # of another kind of number, too
    assert torch.equal(densities(data, counts=counts.int()), densities(data, counts=counts))


@pytest.mark.parametrize("name", ["normal", "poisson"] + ["bits", "student"] * LONG)
def test_an_optimum_with_counts_is_that_of_repeated_rows(name):
    """Value, means and covariances to 1e-6; rows that count zero times are left out."""
    model, (data, counts) = MODELS[name](), rows(name)
    value, *moments = fitted(model, data, counts=counts)
    other, *those = fitted(MODELS[name](), repeated(data, counts))
    assert value == pytest.approx(other, abs=1e-6)
    for mine, theirs in zip(moments, those, strict=True):
        assert (mine - theirs).abs().max() < 1e-6
    left = {key: values[counts > 0] for key, values in data.items()}
    assert fitted(model, left, counts=counts[counts > 0])[0] == pytest.approx(value, abs=1e-6)


def test_the_gaussian_one_is_the_exact_posterior_with_counts():
    """Of parts of rows, too: the optimum is the evidence, to 1e-6 nats."""
    data, _ = rows("normal")
    counts = 2 * torch.rand(ROWS)
    model = LinearRegression(COLUMNS, weight=UNIT, noise=0.8)
    value, mean, covariance = fitted(model, data, counts=counts)
    exact = exact_posterior(**data, counts=counts, weight=UNIT, noise=0.8)
    assert value == pytest.approx(exact.log_evidence, abs=1e-6)
    np.testing.assert_allclose(mean, exact.mean, atol=1e-5 * exact.sd.min())
    np.testing.assert_allclose(covariance, exact.covariance, rtol=1e-4, atol=1e-9)


def test_minibatches_take_the_counts_of_their_rows():
    """Within 0.1 nats of the evidence after 300 epochs of stochastic gradients."""
    data, counts = rows("normal")
    X, y = data["X"], data["y"]
    model = LinearRegression(COLUMNS, weight=UNIT, noise=0.8)
    guide, sides = FamilyGuide(model, families.full_rank), {"counts": counts}
    told = {"batch_size": 8, "num_epochs": 300, "learning_rate": 0.03, "seed": 0}
    slower = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.987)
    with warnings.catch_warnings(action="ignore"):
        fit(model, guide, (X, y), kwargs=sides, **told, scheduler=slower, progress=False)
    exact = exact_posterior(X, y, counts=counts, weight=UNIT, noise=0.8)
    assert -0.1 < objective(model, guide, X, y, kwargs=sides) - exact.log_evidence < 1e-6


@pytest.mark.parametrize("name", list(MODELS))
def test_many_draws_at_once_are_as_one_by_one(name):
    """And what is drawn is one datum for each row; the tree has densities of all that counts."""
    model, (data, counts) = MODELS[name](), rows(name)
    args = [data.get(each) for each in ("X", "y", "weights", "offset")]
    guide = FamilyGuide(model, families.mean_scale).setup(*args, counts)
    assert same_one_by_one(model, guide, *args, counts)
    sides = {key: data[key] for key in ("weights", "offset") if key in data}
    both = sides | {"counts": counts}
    drawn = (
        predict(model, guide, data["X"], num_samples=5, kwargs=kwargs, seed=0)
        for kwargs in (sides, both)
    )
    first, other = (values["y"] for values in drawn)
    assert first.shape == (5, ROWS) and (first == other).all()
    pairs = (
        from_pyro_svi(model, guide, *args[:2], num_samples=5, kwargs=kwargs, seed=0)
        for kwargs in (sides, both)
    )
    plain, counted = (tree.log_likelihood["y"].values for tree in pairs)
    np.testing.assert_allclose(counted, plain * counts.numpy(), rtol=1e-5, atol=1e-12)
    (_, y), _ = simulate(model, data["X"], data["y"], kwargs=both, seed=0)
    assert y.shape == (ROWS,) and (name in HAVE_NOISE or (y == y.round()).all())


def test_a_row_that_does_not_count_adds_nothing_whatever_it_is():
    base = dist.Uniform(torch.zeros(3), 1.0, validate_args=False)
    fn = Counted(base, torch.tensor([0.0, 2.0, 1.0]))
    assert fn.log_prob(torch.tensor([2.0, 0.5, 0.5])).tolist() == [0.0, 0.0, 0.0]
    assert fn.log_prob(torch.tensor([0.5, 0.5, 2.0]))[2] == -torch.inf
    with pyro.plate("draws", 4, dim=-2), pyro.plate("rows", 3, dim=-1):
        assert pyro.sample("x", fn).shape == (4, 3)


X4, Y4 = torch.arange(8.0).reshape(4, 2) ** 2, torch.tensor([0.0, 1.0, 1.0, 0.0])
FLAT = {"weight": None, "intercept": True}
BOTH = [
    functools.partial(LinearRegression, 2),
    functools.partial(GeneralizedLinear, 2, likelihoods.Bernoulli()),
]
BAD = {
    r"counts: expected shape \(4,\), one for each row of X, got \(3,\)": torch.ones(3),
    "counts: expected finite numbers of at least 0, got -1.0": torch.tensor([1.0, -1.0, 0.0, 1.0]),
    "counts: expected finite numbers of at least 0, got nan": torch.tensor([1.0, torch.nan, 0, 1]),
    "counts: expected a row that counts, got zeros": torch.zeros(4),
    "weight: expected a proper prior where X has rank 0": torch.tensor([0.0, 1.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("message", list(BAD))
def test_bad_counts_are_named(make, message):
    model = make(**FLAT)
    guide = FamilyGuide(model, families.deterministic)
    with pytest.raises(ValueError, match=f"^{message}"):
        fit(model, guide, (X4, Y4), kwargs={"counts": BAD[message]}, progress=False)
    with pytest.raises(TypeError, match="^counts: expected a tensor of real numbers.* got float"):
        model(X4, Y4, counts=1.0)


def test_values_that_do_not_count_make_no_flat_posterior_proper():
    model, counts = BOTH[1](**(FLAT | {"weight": UNIT})), torch.tensor([1.0, 0.0, 0.0, 1.0])
    model.check_data(X4, Y4)
    with pytest.raises(ValueError, match="^y: expected 2 different values at least, got 1 and"):
        model.check_data(X4, Y4, counts=counts)


def test_keyword_arguments_of_a_fit_are_checked_with_the_data():
    """As they are where they are positional; what the check has no argument for is left out."""
    model, weights = LinearRegression(2, noise=1.0), torch.tensor([1.0, -2.0, 1.0, 1.0])
    guide = FamilyGuide(model, families.deterministic)
    for data, kwargs in (((X4, Y4, weights), None), ((X4, Y4), {"weights": weights})):
        with pytest.raises(ValueError, match="^weights: expected positive finite numbers, got -2"):
            fit(model, guide, data, kwargs=kwargs, progress=False)
    seen = []
    model.check_data = lambda X, y: seen.append((X, y))
    fit(model, guide, (X4, Y4), kwargs={"offset": Y4}, progress=False)
    assert len(seen) == 1 and torch.equal(seen[0][0], X4.double())
