"""Keyword arguments of a model: an encoder gets those that its `forward` names."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from ppvae import FamilyGuide, evaluate, fit, stage
from ppvae._scopes import private_modules
from ppvae.nn import Concatenate, mlp
from ppvae.objectives import ELBO
from ppvae.programs.missing import nan_masked

X = torch.arange(18, dtype=torch.float64).reshape(6, 3) / 10
C = torch.ones(6, 2, dtype=torch.float64)


def model(x, *, side=None, strength=1.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        mean = strength * z.sum(-1) + w + (0.0 if side is None else side.nan_to_num().sum(-1))
        pyro.sample("x", dist.Normal(mean.unsqueeze(-1), 1.0).to_event(1), obs=x)


def by_position(x, side):
    model(x, side=side)


class Named(nn.Module):
    """Names the side information, and nothing else."""

    def __init__(self):
        super().__init__()
        self.net = mlp(5, 4)

    def forward(self, x, side=None):
        return self.net(torch.cat([x, torch.zeros(len(x), 2) if side is None else side], -1))


class Open(Named):
    """Takes whatever there is, and names nothing."""

    def forward(self, x, **others):
        assert not others
        return super().forward(x)


def guide_of(encoder=None, program=model):
    torch.manual_seed(0)
    return FamilyGuide(program, "mean_scale", encoder or Named())


def drawn(guide, *args, **kwargs):
    with private_modules():
        torch.manual_seed(0)
        guide(*args, **kwargs)  # makes the parameters, if there are none
        torch.manual_seed(1)
        return guide(*args, **kwargs)["z"]


def test_an_encoder_gets_what_it_names_as_if_by_position():
    guide, other = guide_of(), guide_of(program=by_position)
    expected = drawn(other, X, C)
    assert torch.equal(drawn(guide, X, side=C), expected)
    assert not torch.equal(drawn(guide, X), expected)
    assert torch.equal(drawn(guide, X, side=C, strength=2.0), expected)
    assert torch.equal(drawn(copy.deepcopy(guide), X, side=C), expected)
    with private_modules():
        again = guide_of()
        again.load_state_dict(guide.state_dict())
    assert torch.equal(drawn(again, X, side=C), expected)
    gone = torch.where(torch.arange(2) == 0, math.nan, C)
    with private_modules():
        torch.manual_seed(1)
        filled = nan_masked(guide)(X, side=gone)["z"]
    assert torch.equal(filled, drawn(other, X, gone.nan_to_num()))


@pytest.mark.parametrize("encoder", [Open, lambda: mlp(3, 4), lambda: Concatenate(mlp(3, 4))])
def test_an_encoder_that_names_nothing_gets_none(encoder):
    guide = guide_of(encoder())
    assert torch.equal(drawn(guide, X, side=C), drawn(guide, X))


def test_each_of_several_encoders_gets_what_it_names():
    guide = guide_of({"z": Named(), "w": mlp(3, 4)})
    with private_modules():
        with torch.no_grad():
            nodes = poutine.trace(guide).get_trace(X, side=C).nodes
            found = guide.encoder["0"](X, C), guide.encoder["1"](X)
            for name, features in zip("zw", found, strict=True):
                loc = guide.heads[name].loc(features)
                assert torch.allclose(nodes[name]["fn"].mean, loc, rtol=1e-12)


def test_all_that_is_done_with_a_pair(plain_pyro):
    guide, other = guide_of(), guide_of(program=by_position)
    how = {"num_epochs": 2, "batch_size": 3, "seed": 0, "progress": False}
    losses = fit(model, guide, X, kwargs={"side": C}, **how).losses
    assert losses == fit(by_position, other, (X, C), **how).losses
    told = {"num_samples": 3, "seed": 0, "progress": False}
    found = evaluate(model, guide, X, kwargs={"side": C}, **told).elbo
    assert found.equals(evaluate(by_position, other, X, C, **told).elbo)
    staged = stage(model, guide, X, kwargs={"side": C})
    torch.manual_seed(2)
    loss = staged(X, side=2 * C)
    torch.manual_seed(2)
    assert torch.allclose(loss, ELBO()(by_position, other, X, 2 * C), rtol=1e-12)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert math.isfinite(svi.step(X, side=C))


def test_names_that_are_handlers_own_in_pyro():
    """Pyro's handlers around a function take no `context=`, and so no SVI does; a guide does."""

    def taking(x, *, context):
        model(x, side=context)

    class Context(Named):
        def forward(self, x, context):
            return super().forward(x, context)

    guide, other = guide_of(Context(), taking), guide_of(program=by_position)
    assert torch.equal(drawn(guide, X, context=C), drawn(other, X, C))


def test_names_that_clash_are_refused():
    def two(x, y, *, side=None):
        model(x, side=side)

    clash = r"and side=\(6, 2\), got .* multiple values for argument 'side'"
    with pytest.raises(ValueError, match=clash):
        guide_of(program=two).setup(X, C, side=C)

    def one(x, *, side):
        model(x)

    with pytest.raises(ValueError, match=r"takes \[\(6, 3\)\] and side=str, got one that does"):
        guide_of(program=one).setup(X, side="c")
