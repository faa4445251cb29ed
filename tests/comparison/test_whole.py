"""Accounts of latents of all the data: against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from accounts import LADDER, measure, row, sums
from cases import LONG
from linear import Regression, close
from pairs import traceless
from torch import nn

from ppvae import (
    FamilyGuide,
    closed_form,
    families,
    fit,
)

GLOBALS = ["noise_only", "mean_only", "mean_scale", "full_rank", "deterministic"]


@pytest.mark.parametrize("name", GLOBALS if LONG else ["mean_only", "mean_scale", "deterministic"])
def test_a_regression_in_nats_of_all_the_data(name):
    reg, family = Regression(rows=40, columns=3), families.LADDER[name]
    ladder = LADDER if LONG or name == "mean_only" else ("noise_only", "full_rank")
    X, y = reg.args
    guide = FamilyGuide(reg.model, family)
    if name not in ("noise_only", "mean_only"):
        fit(reg.model, guide, reg.args, progress=False)
    guide.setup(*reg.args)
    with traceless(reg.model, guide, moved=False):
        found = measure(reg.model, guide, *reg.args, families=ladder)
    known = {
        each: closed_form.regression(X, y, 0.7, 0.5, families.LADDER[each])
        for each in {*LADDER, name, "deterministic"}
    }
    for each in ladder:
        assert close(found.optimum.sel(family=each), known[each].objective)
    evidence = known[name].log_likelihood
    assert close(found.log_likelihood, evidence) and "datum" not in found.dims
    assert close(row(found, "point"), known["deterministic"].objective)
    C, m = reg.P.inverse(), reg.mean(X, y)
    noise = ((y - X @ m).square().sum() + (X @ C @ X.T).trace()) / 0.49
    noise = -(noise + 40 * math.log(2 * math.pi * 0.49)) / 2
    assert close(row(found, "noise"), noise)
    # KL both ways between N(0, I / 4) and N(m, C)
    both = (0.25 * reg.P).trace() + (4 * C).trace() - 6 + m @ reg.P @ m + 4 * m @ m
    assert close(row(found, "prior_cost"), -both / 2)
    if "mean_only" in ladder:
        assert row(found, "mean_channel") < 0  # a sd of 1, where that of the prior is 1/2
    assert found.attrs["unit"] == "nats of all the data" and not found.attrs["notes"]
    if name == "deterministic":
        assert sums(found, evidence) and close(row(found, "guide_point"), known[name].objective)
        return
    assert close(row(found, "family_gap"), -known[name].gap)
    assert sums(found, found.elbo)
    if name == "mean_only":  # which was not fitted
        with torch.no_grad():
            away = guide.heads["weight"].loc.raw - m
        short = -(away @ reg.P @ away) / 2
        assert short < -1 and close(row(found, "optimization_gap"), short)
    else:
        assert close(row(found, "optimization_gap"), 0.0, 1e-4)


def test_globals_of_a_plain_function_whose_parameters_stay_where_they_are():
    """Also those of `pyro.param`, and of a module that it closes over."""
    inside = nn.Linear(2, 2)
    X, y = torch.randn(30, 2), torch.randn(30)

    def model(X, y, *, offset=0.0):
        pyro.module("inside", inside)
        scale = pyro.param("user_scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(inside(X) @ w + offset, scale), obs=y)

    store = pyro.get_param_store()
    with store.scope():
        pyro.param("user_scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        guide = FamilyGuide(model, families.mean_scale).setup(X, y)
        before = {k: v.detach().clone() for k, v in inside.state_dict().items()}
        wanted = [p.requires_grad for p in (*inside.parameters(), *guide.parameters())]
        told = {"kwargs": {"offset": 0.3}}
        found = measure(model, guide, X, y, families=LADDER[-2:], **told)
        assert [p.requires_grad for p in (*inside.parameters(), *guide.parameters())] == wanted
        assert all(torch.equal(before[k], v) for k, v in inside.state_dict().items())
        assert pyro.param("user_scale").item() == pytest.approx(0.7)
        assert pyro.param("user_scale").requires_grad and all(wanted)
        assert all(p.grad is None for p in (*inside.parameters(), *guide.parameters()))
        with torch.no_grad():
            Z = inside(X)
    P = Z.T @ Z / 0.49 + torch.eye(2)
    marginal = dist.MultivariateNormal(torch.zeros(30), Z @ Z.T + 0.49 * torch.eye(30))
    assert close(found.log_likelihood, marginal.log_prob(y - 0.3).item(), 1e-5)
    gap = (P.diagonal().log().sum() - P.logdet()) / 2
    assert close(row(found, "correlations"), gap, 1e-5)
    assert row(found, "optimization_gap") < -0.1


@pytest.mark.parametrize("size", [0.5, 2.0])
def test_a_point_without_a_maximum_is_said(size):
    """Of a Beta(a, a) and three equal coins: for a = 1/2 the density is infinite at 1."""

    def model(x):
        z = pyro.sample("z", dist.Beta(torch.tensor(size), torch.tensor(size)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(z), obs=x)

    model.vectorized = True
    x = torch.ones(3)
    guide = FamilyGuide(model, families.mean_scale).setup(x)
    found = measure(model, guide, x, families=["mean_scale"], num_samples=64)
    said = [note for note in found.attrs["notes"] if "found no maximum for all the data" in note]
    assert len(said) == (size < 1)
    if size > 1:  # at 4/5, where the density is 6 (4/5) (1/5) (4/5)^3
        assert close(row(found, "point"), math.log(6 * 0.8**4 * 0.2))
