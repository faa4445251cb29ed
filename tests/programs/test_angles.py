"""Angles: a density that is periodic has an integral over one turn, and over no more."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppvae import Family, FamilyGuide, evaluate, fit, from_pyro_svi
from ppvae._scopes import private_modules
from ppvae.families.rules import TURN, support_of
from ppvae.nn import mlp


def angle(y):
    a = pyro.sample("a", dist.VonMises(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.VonMises(a, 0.2), obs=y)


def angles(y):
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", dist.VonMises(0.0, 0.3))
        pyro.sample("y", dist.VonMises(a, 2.0), obs=y)


def log_evidence(y, prior, noise):
    """Log of the integral of vonmises(a; 0, prior) vonmises(y; a, noise) over a turn."""
    both = (prior**2 + noise**2 + 2 * prior * noise * torch.cos(y)).sqrt()
    i0 = [torch.special.i0(torch.as_tensor(each)) for each in (both, prior, noise)]
    return torch.log(i0[0] / (2 * math.pi * i0[1] * i0[2]))


@pytest.mark.filterwarnings("ignore::ppvae.NarrowFamily")
@pytest.mark.parametrize("family", ["mean_scale", "full_rank"])
def test_the_bound_of_a_wide_angle_is_one(family):
    """On all of the reals a guide gains by being wide, without end."""
    y = torch.tensor([0.5])
    guide, exact = FamilyGuide(angle, family), log_evidence(y, 0.5, 0.2).item()
    result = fit(angle, guide, y, progress=False)
    found = evaluate(angle, guide, y, num_samples=4000, vectorized=True, progress=False)
    tree = from_pyro_svi(angle, guide, y, num_samples=300, seed=0)
    assert result.converged and -result.losses[-1] < exact
    # the best Gaussian of the logit is some hundredths of a nat off
    assert 0 < exact - float(found.total_elbo) < 0.2
    assert abs(float(found.log_evidence) - exact) < 4 * float(found.log_evidence_se)
    assert abs(tree.posterior.a.values).max() <= math.pi
    free = tree.unconstrained_posterior.a.values
    assert abs(2 * math.pi / (1 + np.exp(-free)) - math.pi - tree.posterior.a.values).max() < 1e-12


def test_angles_of_each_datum_stay_within_a_turn():
    y = dist.VonMises(0.5, 1.0).sample((40,))
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), mlp(1, 16))
    guide = FamilyGuide(angles, "mean_scale", encoder)
    fit(angles, guide, y, num_epochs=200, learning_rate=2e-2, seed=0, progress=False)
    found = evaluate(angles, guide, y, num_samples=1000, vectorized=True, progress=False)
    exact = log_evidence(y, 0.3, 2.0)
    assert float(found.elbo.mean()) < float(exact.mean())
    error = found.log_likelihood.values.mean() - float(exact.mean())
    assert abs(error) < 0.05, error  # the guide's tails end where the turn does, so khat is below 1
    with torch.no_grad(), private_modules():
        assert guide(y)["a"].abs().max() <= math.pi


def test_what_is_an_angle():
    turns = dist.VonMises(torch.zeros(3), 1.0)
    assert support_of(turns) is TURN and support_of(dist.VonMises) is TURN
    for fn in (turns.to_event(1), turns.mask(torch.tensor([True, False, True])).to_event(1)):
        support = support_of(fn)
        assert support.event_dim == 1 and support.base_constraint is TURN
    mixed = dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), turns)
    assert support_of(mixed) is TURN
    assert Family(dist.Normal).support is support_of(dist.Normal(0.0, 1.0))
