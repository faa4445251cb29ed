"""The potential of a model is minus its log density, with what the maps to the supports add."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to, constraints

from ppvae.programs.potential import potential_of

X = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
MASK = torch.tensor([True, True, False, True])
SIMPLEX = biject_to(constraints.simplex)


def model(x):
    """Real, positive and simplex latents, one in a plate; masked and scaled sites."""
    w = pyro.sample("w", dist.Normal(1.0, 2.0))
    s = pyro.sample("s", dist.Gamma(2.0, 3.0))
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 4.0])))
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=MASK):
            z = pyro.sample("z", dist.Normal(w, s))
        with poutine.scale(scale=3.0):
            pyro.sample("x", dist.Normal(z, 0.5 + p[0]), obs=x)


def written(state):
    """The same, by hand."""
    w, log_s, free, z = state[0], state[1], state[2:4], state[4:]
    s, p = log_s.exp(), SIMPLEX(free)
    log_p = -0.5 * ((w - 1) / 2) ** 2 - math.log(2) - 0.5 * math.log(2 * math.pi)
    log_p = log_p + 2 * math.log(3) + s.log() - 3 * s + log_s  # Gamma(2, 3), and ds = s dlog(s)
    log_p = log_p + math.lgamma(7) - math.lgamma(4) + p[1].log() + 3 * p[2].log()
    log_p = log_p + SIMPLEX.log_abs_det_jacobian(free, p)
    log_p = log_p + (dist.Normal(w, s).log_prob(z) * MASK).sum()
    return -log_p - 3 * dist.Normal(z, 0.5 + p[0]).log_prob(X).sum()


STATE = torch.tensor([0.5, -0.3, 0.2, -0.7, 1.0, -1.0, 0.4, 0.1], dtype=torch.float64)


def test_it_is_minus_the_log_joint_with_its_slope_and_curvature():
    potential = potential_of(model, (X,))
    assert potential.size == len(STATE)
    expected = written(STATE)
    assert potential(STATE).item() == pytest.approx(expected.item(), rel=1e-12)
    slope, value = potential.slope_and_value(STATE)
    assert not value.requires_grad and torch.equal(value, potential(STATE))
    assert torch.allclose(slope, torch.func.grad(written)(STATE), atol=1e-11)
    curvature = torch.func.hessian(written)(STATE)
    assert torch.allclose(potential.hessian(STATE), curvature, atol=1e-10)
    states = [STATE, -STATE, 0.1 * STATE]
    assert potential.values(states) == pytest.approx([written(each).item() for each in states])


def test_differences_stand_in_for_a_second_derivative():
    """Of a model that decides by `.item()`, which no transform of `torch.func` goes through."""

    def decides(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        scale = w[0].exp() if w[1].item() > -5 else 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w.sum(), scale), obs=x)

    def by_hand(w):
        prior = dist.Normal(0.0, 1.0).log_prob(w).sum()
        return -prior - dist.Normal(w.sum(), w[0].exp()).log_prob(X).sum()

    state = torch.tensor([0.3, -0.6])
    potential = potential_of(decides, (X,))
    expected = torch.func.hessian(by_hand)(state)
    assert torch.allclose(potential.hessian(state), expected, rtol=1e-6, atol=1e-6)
    values = potential.values([state, 2 * state])  # one by one
    assert values == pytest.approx([by_hand(state).item(), by_hand(2 * state).item()])


def test_a_matrix_without_a_factor_is_a_step_too_far():
    def fails(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        torch.linalg.cholesky(w * torch.eye(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    trace = poutine.condition(fails, {"w": torch.tensor(1.0)})
    assert math.isfinite(poutine.trace(trace).get_trace(X).log_prob_sum())
    torch.manual_seed(1)  # draws a positive number first
    potential = potential_of(fails, (X,))
    slope, value = potential.slope_and_value(torch.tensor([-1.0]))
    assert torch.isnan(slope).all() and value == math.inf
    good = torch.tensor([1.0])
    assert torch.isfinite(potential.slope_and_value(good)[0]).all()
    assert potential.values([good, -good]) == [potential(good).item(), math.inf]


def test_a_flat_prior_adds_nothing():
    def flat(x):
        w = pyro.sample("w", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    found = potential_of(flat, (X,))(torch.tensor([0.7]))
    assert found.item() == pytest.approx(-dist.Normal(0.7, 1.0).log_prob(X).sum().item())


def discrete(x):
    k = pyro.sample("k", dist.Poisson(0.5))
    pyro.sample("x", dist.Normal(k, 1.0).expand([4]).to_event(1), obs=x)


def nothing(x):
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([4]).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (discrete, "model: expected continuous latents .* for 'k'"),
        (nothing, "model: expected latent sites, got none"),
    ],
)
def test_what_has_no_coordinates_is_refused(program, words):
    with pytest.raises(ValueError, match=words):
        potential_of(program, (X,))


def test_curvature_where_pytorch_knows_the_slope_alone():
    """Of two bowls of curvature 100 that are far apart; PyTorch's is NaN."""

    def two():
        m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("bowls", torch.logaddexp(-50 * (m - 3) ** 2, -50 * (m + 3) ** 2))

    potential = potential_of(two, ())
    at = torch.tensor([3.0], dtype=torch.float64)
    assert torch.func.hessian(potential)(at).isnan().all()
    assert potential.hessian(at).item() == pytest.approx(100, rel=1e-6)
