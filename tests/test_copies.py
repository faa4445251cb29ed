"""Copies and pickles: they say what the original says, and what belongs together stays together."""

import copy
import multiprocessing
import pickle
from functools import cache

import pyro.distributions as dist
import pytest
import torch
from cases import FAMILIES
from pairs import build, data, told
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from ppvae import FamilyGuide, evaluate, fit, from_pyro_svi, stage
from ppvae.objectives import ELBO, IWAE, warm_up
from ppvae.regression import exact_posterior


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def _pair(family):
    model, guide = build("mean_scale")
    return model, guide if family == "mean_scale" else FamilyGuide(model, family)


def _fitted():
    return fit(*build(), data(), num_epochs=2, progress=False)


def _exact(**priors):
    return exact_posterior(data(), data().sum(-1) + data()[:, 0] ** 2, **priors)


THINGS = {
    **{f"family {name}": lambda family=family: family for name, family in FAMILIES.items()},
    "objective": lambda: ELBO(beta=warm_up(10)),
    "IWAE": lambda: IWAE(4),
    "pair": lambda: _pair("mean_scale"),
    "pair of one program": lambda: _pair("noise_only"),
    "Fit": _fitted,
    "known noise": lambda: _exact(noise=1.0),
    "unknown noise": _exact,
    "unknown scale": lambda: _exact(scale=dist.HalfNormal(1.0)),
    "evaluation": lambda: evaluate(*build(), data(), num_samples=32, progress=False),
    "tree": lambda: from_pyro_svi(*build(), data(), num_samples=3, seed=0),
    "staged": lambda: stage(*build(), data()),
}


@cache
def thing_of(name):
    """Made once, since nothing here changes it."""
    return THINGS[name]()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("name", THINGS)
def test_a_copy_says_what_the_original_says(name, copied):
    thing = thing_of(name)
    assert told(copied(thing)) == told(thing)


def test_another_process_says_the_same():
    things = [thing_of(name) for name in THINGS]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        answers = pool.map(told, things)
    for name, answer, thing in zip(THINGS, answers, things, strict=True):
        assert answer == told(thing) or name.startswith("family"), name  # hashes of names differ
        assert not name.startswith("family") or answer[0] == thing.name


def test_a_staged_loss_is_that_of_the_parameters_beside_it():
    """Copied or pickled with a pair it is staged anew, as it was, whatever mode it is in now."""
    model, guide = build(encoder=nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)))
    loss = stage(model, guide, data())
    loss.eval()
    for copied in (copy.deepcopy, pickled):
        twin_model, twin, other = copied((model, guide, loss))
        assert twin.model is other.program.model is twin_model and other.program.guide is twin
        assert not any(module.training for module in other.program.modules())
        assert told(other) == told(loss)
        with torch.no_grad():
            twin_model.decoder[0].weight.mul_(2)
        assert told(other) != told(loss)


@pytest.mark.parametrize("family", ["mean_scale", "noise_only"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_pair_stays_one_in_any_order(copied, family):
    model, guide = _pair(family)
    twin, twin_model = copied((guide, model))
    assert twin.model is twin_model is not model and guide.model is model
    assert copied(copied({"guide": guide, "model": model}))["guide"].model is not model
    alone = copy.deepcopy(guide)
    assert alone.model is model and copy.deepcopy(alone).model is model


def test_a_guide_that_plain_pyro_trained_can_be_pickled(plain_pyro):
    model, guide = build()
    SVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO()).step(data())
    assert told(pickled((model, guide))) == told((model, guide))
