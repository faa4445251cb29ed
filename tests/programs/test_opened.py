"""Whatever measures or exports a pair refuses what cannot be measured, in the same words."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import build, data
from pyro import poutine
from torch import nn

from ppvae import (
    VAE,
    FamilyGuide,
    annealed_importance,
    calibration,
    evaluate,
    from_pyro_svi,
    gaps,
    likelihoods,
    simulate,
)

QUIET = {"progress": False}
CALLS = {
    "evaluate": lambda *pair: evaluate(*pair, num_samples=4, **QUIET),
    "annealing": lambda *pair: annealed_importance(*pair, num_temperatures=3, **QUIET),
    "export": lambda *pair: from_pyro_svi(*pair, num_samples=3),
    "gaps": lambda *pair: gaps(*pair, **QUIET),
}
ONES = torch.ones(10, 3, dtype=torch.float64)


def _forgot(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


def _classes(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Categorical(logits=z), obs=x[:, 0])


def _correlated(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.MultivariateNormal(z, torch.eye(3)), obs=x)


def _regression(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((z * x).sum(-1), 1.0), obs=torch.ones(len(x)))


def _pair(model):
    return model, FamilyGuide(model, "mean_scale", nn.Linear(3, 4))


def _one_bad(value):
    x = ONES.clone()
    x[-1, 0] = value
    return x


BAD = {
    r"data: .* 'x', Boolean\(\), got 1 of 10 data": lambda: (
        *build(likelihood=likelihoods.Bernoulli()),
        _one_bad(255.0),
    ),
    "data: .* 'x', IntegerGreaterThan.*, got 1 of 10 data": lambda: (
        *build(likelihood=likelihoods.Poisson()),
        _one_bad(-4.5),
    ),
    "data: .* 'x', IntegerInterval.*, got 1 of 10": lambda: (*_pair(_classes), _one_bad(1.5)),
    "model: expected observed sites, got none": lambda: (*_pair(_forgot), ONES),
    "model: expected a function or module, got NoneType": lambda: (None, build()[1], ONES),
    "args: .*sparse_coo": lambda: (*build(), ONES.to_sparse()),
    "args: .* on meta": lambda: (*build(), ONES.to("meta")),
    "data: .* first in row 9, column 0: NaN, which this distribution cannot leave out": lambda: (
        *_pair(_correlated),
        np.ma.masked_array(ONES.numpy(), mask=_one_bad(0.0) == 0),
    ),
    "model: expected a density of 'y', got NaN for 1 of 10; argument 0 is NaN in row 9, column 0, "
    "and is more than an observation": lambda: (*_pair(_regression), _one_bad(np.nan)),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_measured_is_refused(name, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        CALLS[name](*BAD[message]())


@pytest.mark.parametrize("name", [name for name in CALLS if name != "gaps"])  # which wants more
def test_model_and_guide_the_wrong_way_round(name):
    model, guide = build()
    with pytest.raises(ValueError, match="^model: expected observed sites, .* wrong way round"):
        CALLS[name](guide, model, data())
    with pytest.raises(ValueError, match="^guide: expected no site that observes data"):
        CALLS[name](model, model, data())
    with pytest.raises(ValueError, match="^guide: expected no site that observes data"):
        calibration(model, model, data(), **QUIET)


def test_what_is_masked_may_be_anything():
    """And a draw may leave data out of a support that depends on it."""

    def masked(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.arange(len(x)) > 0):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z).to_event(1), obs=x)

    x = _one_bad(0.0).flip(0)
    x[0, 0] = 7.0
    assert np.isfinite(evaluate(*_pair(masked), x, num_samples=4, **QUIET).objective).all()

    def uniform(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Uniform(z, z + 1.0).to_event(1), obs=x)

    found = evaluate(*_pair(uniform), ONES + 40.0, num_samples=4, **QUIET)
    assert np.isneginf(found.log_likelihood).all()


def test_big_endian_and_read_only_data_are_as_others():
    model, guide = build()
    x, wanted = data().numpy(), evaluate(model, guide, data(), num_samples=4, **QUIET)
    for same in (x.astype(">f8"), np.broadcast_to(x[None], (1, 10, 3))[0]):
        assert evaluate(model, guide, same, num_samples=4, **QUIET).identical(wanted)


def test_complex_data_cannot_be_simulated():
    model = VAE(nn.Linear(2, 3), 2, likelihoods.Normal(1.0))
    with pytest.raises(TypeError, match="^args: expected real numbers in a tensor at 'x'"):
        simulate(model, ONES + 1j)


class _Odd:
    """A model that nothing can refer to weakly, and without a hash; its plates may change."""

    __slots__ = ("deep",)
    __hash__ = None  # type: ignore[assignment]
    vectorized = True

    def __call__(self, x):
        with pyro.plate("data", len(x), dim=-1 - self.deep):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if self.deep:
                with pyro.plate("columns", 3, dim=-1):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            else:
                loc = z[..., None] + torch.zeros(3)
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def test_a_model_may_be_any_callable_and_may_change_its_plates():
    odd = _Odd()
    changing = lambda x: odd(x)  # noqa: E731
    changing.vectorized = True
    for model in (odd, changing):
        for odd.deep in (False, True):
            guide = FamilyGuide(model, "mean_scale", nn.Linear(3, 4)).setup(data())
            assert np.isfinite(evaluate(model, guide, data(), num_samples=4, **QUIET).elbo).all()
