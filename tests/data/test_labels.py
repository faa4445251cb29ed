"""Tables with other labels of their rows are refused, wherever a pair takes several of them."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import (
    FamilyGuide,
    annealed_importance,
    compare_families,
    evaluate,
    families,
    fit,
    fit_replicates,
)
from ppvae.export.arviz import from_pyro_svi

X = pd.DataFrame(np.random.default_rng(0).normal(size=(12, 2)), columns=["a", "b"])
Y = X["a"] + 1.0
SHUFFLED = Y.sample(frac=1.0, random_state=1)


def line(X, y=None, labels=None):
    """A regression; a keyword argument may be called as a check has its own called."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal((w * X).sum(-1), 0.5), obs=y if labels is None else labels)


def train(model, guide, *data, **rest):
    return fit(model, guide, data, num_epochs=2, progress=False, **rest)


def train_several(model, guide, *data, **rest):
    rest |= {"num_epochs": 2, "progress": False}
    return fit_replicates([(model, guide)], data, seeds=[0], **rest)


def compare(model, guide, *data, **rest):
    rest |= {"num_epochs": 2, "progress": False}
    return compare_families(lambda: (model, None), ["mean_scale", "full_rank"], data, **rest)


CALLS = [train, train_several, compare, evaluate, annealed_importance, from_pyro_svi]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_rows_have_the_same_labels_wherever_they_are_given(call):
    guide = FamilyGuide(line, families.full_rank)
    fit(line, guide, (X.to_numpy(), Y.to_numpy()), num_epochs=2, progress=False)
    told = r"expected the row labels of (data|args|train)\[0\], in this order, or .*another order"
    with pytest.raises(ValueError, match=rf"^(data|args|train)\[1\]: {told}"):
        call(line, guide, X, SHUFFLED)
    for name in ("y", "labels"):
        with pytest.raises(ValueError, match=rf"^{name}: {told}"):
            call(line, guide, X, kwargs={name: SHUFFLED})


def test_one_order_and_what_has_no_labels_go_through():
    guide = FamilyGuide(line, families.full_rank)
    fit(line, guide, (X, Y), num_epochs=2, progress=False)
    order = SHUFFLED.index
    one, *others, other_order = [
        evaluate(line, guide, *data, num_samples=20, seed=0).elbo.to_numpy()
        for data in ((X, Y), (X, Y.to_numpy()), (X.to_numpy(), Y), (X.loc[order], SHUFFLED))
    ]
    assert all(np.array_equal(other, one) for other in others)
    assert other_order == pytest.approx(one[order], rel=1e-12)


def test_held_out_tables_agree_with_each_other_and_not_with_those_of_training():
    guide = FamilyGuide(line, families.full_rank)
    rest = {"num_epochs": 2, "progress": False}
    fit(line, guide, (X[:8], Y[:8]), validation=(X[8:], Y[8:]), **rest)
    with pytest.raises(ValueError, match=r"^validation\[1\]: expected the row labels"):
        fit(line, guide, (X, Y), validation=(X, SHUFFLED), **rest)
