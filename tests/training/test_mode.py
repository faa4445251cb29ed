"""The mode of a posterior and its curvature, and the ways down to it."""

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from global_latents import (
    SCORES,
    columns,
    decides,
    linear,
    location,
    noise,
    posterior,
    schools,
    two_modes,
)

from ppvae.programs.matched_normals import matched
from ppvae.programs.potential import potential_of
from ppvae.training.descent import lbfgs
from ppvae.training.mode import _elbo, gaussian_near


def test_a_gaussian_posterior_is_its_own_neighbour():
    X, y = columns()
    X = X * torch.tensor([1.0, 1.0, 0.1, 10.0])
    mean, precision, _ = posterior(X, y)
    near = gaussian_near(potential_of(linear, (X, y)), seed=0)
    covariance = near.factor @ near.factor.T
    assert ((near.mean - mean).abs() * precision.diagonal().sqrt()).max() < 1e-6
    scale = precision.inverse().diagonal().sqrt()
    error = (covariance - precision.inverse()) / (scale[:, None] * scale)
    assert error.abs().max() < 1e-6 and torch.equal(near.factor, near.factor.tril())
    assert near.others == []


def test_another_mode_that_is_met_is_told():
    near = gaussian_near(potential_of(two_modes, (4 + noise(9),)), seed=0)
    (other,) = near.others
    assert abs(other.above) < 1e-9 and other.weight == pytest.approx(1.0)
    assert other.mean.item() == pytest.approx(-near.mean.item())
    assert other.sds.item() == pytest.approx(near.factor.item())
    assert abs(near.mean.item()) == pytest.approx(2.0, abs=0.2)


def test_a_mode_that_only_the_prior_knows_is_met():
    """A mixture of two far Gaussians, which the curvature at each gives exactly."""
    weights, at, sds = torch.tensor([0.7, 0.3]), torch.tensor([-10.0, 14.0]), (1.0, 0.5)

    def model(x):
        parts = dist.Normal(at, torch.tensor(sds))
        a = pyro.sample("a", dist.MixtureSameFamily(dist.Categorical(weights), parts))
        pyro.sample("x", dist.Normal(0 * a, 1.0), obs=x)

    near = gaussian_near(potential_of(model, (torch.tensor(0.3),)), seed=0)
    (other,) = near.others
    assert near.mean.item() == pytest.approx(-10) and near.factor.item() == pytest.approx(1.0)
    assert other.mean.item() == pytest.approx(14) and other.sds.item() == pytest.approx(0.5)
    assert other.weight == pytest.approx(3 / 7) and other.above == pytest.approx(
        math.log(7 / 3 / 2)
    )


def test_the_mode_with_the_most_mass_is_taken_and_not_the_highest():
    """At -1 a peak that is twice as high, and has a tenth of the mass."""

    def model(x):
        weights, parts = (
            torch.tensor([0.1, 1.0]),
            dist.Normal(torch.tensor([-1.0, 3.0]), torch.tensor([0.01, 0.2])),
        )
        pyro.sample("a", dist.MixtureSameFamily(dist.Categorical(weights), parts))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    near = gaussian_near(potential_of(model, (torch.tensor(0.3),)), seed=0)
    assert near.mean.item() == pytest.approx(3.0) and near.factor.item() == pytest.approx(0.2)
    (other,) = near.others
    assert other.above == pytest.approx(-math.log(2)) and other.weight == pytest.approx(0.1)


def test_a_funnel_has_a_usable_neighbour_though_it_has_no_mode():
    """Its density has no bound at tau = 0: the Gaussian stands where its own draws have some."""
    potential = potential_of(schools(centred=True), SCORES)
    near = gaussian_near(potential, seed=0)
    assert torch.isfinite(near.mean).all() and torch.isfinite(near.factor).all()
    assert torch.equal(near.factor, near.factor.tril()) and (near.factor.diagonal() > 0).all()
    states = near.mean + matched(40, potential.size, seed=1) @ near.factor.T
    assert all(torch.isfinite(potential(state)) for state in states)
    assert near.others == []


def test_a_ridge_that_is_as_good_as_flat_is_no_mode():
    """A weight that may be zero under a HalfCauchy scale: the density of both is the highest where
    the scale is zero, and there is no mass there. That of the scale alone is known.
    """

    def shrunk(y):
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        weight = pyro.sample("weight", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(weight, 1.0), obs=y)

    near = gaussian_near(potential_of(shrunk, (torch.tensor(0.0),)), seed=0)
    u = torch.linspace(-30.0, 30.0, 60_001)  # of the log of the scale
    log_density = dist.HalfCauchy(1.0).log_prob(u.exp()) + u - (1 + (2 * u).exp()).log() / 2
    density = torch.softmax(log_density, 0)
    mean = density @ u
    sd = (density @ (u - mean).square()).sqrt()
    assert (near.mean[0] - mean).abs() < sd / 2 and abs(near.mean[1]) < 1.0
    assert 0.5 < near.factor[0].norm() / sd < 1.0 and near.others == []


def test_a_saddle_is_no_other_mode_and_units_make_no_difference():
    """`w * w` has its mode on both sides, and a stationary point between that is none."""

    def squared(x):
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w * w, 1.0), obs=x)

    near = gaussian_near(potential_of(squared, (torch.full((4,), 1.5),)), seed=0)
    assert [other.above for other in near.others] == pytest.approx([0.0], abs=1e-8)

    X = torch.cat([torch.full((30, 1), 0.01), 1e6 * noise(30, 1)], 1)

    def regression(X):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1e3).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ w, 1.0), obs=X[:, 1])

    factor = gaussian_near(potential_of(regression, (X,)), seed=0).factor
    precision = X.T @ X + 1e-6 * torch.eye(2)
    torch.testing.assert_close(factor @ factor.T, precision.inverse(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("model", [location, decides])
def test_the_elbo_of_a_gaussian_is_exact_for_a_gaussian_posterior(model):
    """Of the draws mean and variance are exact; at once, or one by one."""
    x, mean, sd = 1 + noise(20), 0.7, 0.4
    found = _elbo(potential_of(model, (x,)), torch.tensor([mean]), torch.tensor([[sd]]))
    squares = mean**2 + (x - mean).square().sum().item() + 21 * sd**2
    wanted = math.log(sd) - 0.5 * squares - 21 * math.log(2 * math.pi) / 2
    assert found == pytest.approx(wanted, rel=1e-9)


class LogCosh:
    """Of the distance from 3, beyond 1.1 of which Newton's full steps go further and further."""

    size = 1

    def __call__(self, state):
        return (state - 3).cosh().log().sum()

    def values(self, states):
        return [self(state).item() for state in states]

    def slope_and_value(self, state):
        return (state - 3).tanh(), self(state)

    def hessian(self, state):
        return torch.diag((state - 3).cosh() ** -2)

    def prior_draws(self, count, seed):
        return []


def test_newton_steps_are_damped(monkeypatch):
    """From where a descent that goes nowhere leaves it."""
    monkeypatch.setattr("ppvae.training.mode.lbfgs", lambda _, start, **told: start)
    near = gaussian_near(LogCosh(), seed=0)
    assert near.mean.item() == pytest.approx(3.0, abs=1e-6)
    assert near.factor.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("broken", ["slope", "value", "slope and value"])
def test_a_descent_turns_back_where_the_objective_is_not_finite(broken):
    """Hyperbolas, nearly straight far out: the second step leads to where a coordinate is < 0."""

    asked = []

    def hyperbolas(place):
        asked.append(place)
        away, beyond = place - 1, 0.0 if (place > 0).all() else math.nan
        value = (1 + away**2).sqrt().sum() + (beyond if "value" in broken else 0.0)
        return away / (1 + away**2).sqrt() + (beyond if "slope" in broken else 0.0), value

    way = []
    told = {"steps": 100, "tolerance": 1e-9}
    after = {"after": lambda *step: way.append(step)}
    end = lbfgs(hyperbolas, torch.tensor([5.0, 0.1]), **told, **after)
    assert torch.allclose(end, torch.ones(2), atol=1e-6)
    assert len(way) > 2 and way[-1][1] == pytest.approx(2.0)
    assert torch.equal(way[-1][0], end) and not torch.equal(way[0][0], end)
    assert not any(torch.equal(*pair) for pair in pairwise(asked))  # no place twice in a row
    second = lbfgs(hyperbolas, torch.tensor([5.0, 0.1]), **told, after=lambda _, v: v == way[1][1])
    assert torch.equal(second, way[1][0])
    assert len(lbfgs(hyperbolas, torch.tensor([5.0]), steps=1, tolerance=0.0)) == 1
