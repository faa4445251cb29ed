"""What an account consists of: the names of its rows, what is said of them, and its table."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from accounts import LADDER, ROWS, measure, row, sums
from cases import Own
from linear import Linear, Regression, close
from pairs import traceless
from pyro.infer.autoguide import AutoNormal
from torch import nn

from ppvae import (
    VAE,
    Family,
    FamilyGuide,
    account,
    closed_form,
    families,
    likelihoods,
)
from ppvae.comparison.ledger import Measured, notes_of, posterior_mean
from ppvae.nn import mlp


def test_other_families_give_the_rows_their_names():
    linear = Linear(size=6)
    half = Family(dist.Normal, scale=0.5)
    names = {"prior": "noise_only", "fixed": half, "one width": "shared_scale", "best": "low_rank"}
    guide = linear.guide(families.mean_scale, error=0.1)
    found = measure(linear.model, guide, linear.x, families=names)
    assert found.row.values[:6].tolist() == ["noise", *names, "beyond_best"]
    for name, family in (("fixed", half), ("one width", families.shared_scale)):
        known = closed_form.fixed_decoder(linear.x, linear.W, linear.b, linear.noise, family)
        assert close(found.optimum.sel(family=name), known.objective)
    assert row(found, "beyond_best").max() < 1e-3  # two factors and a diagonal: any covariance
    assert sums(found, found.elbo)
    # the families need not hold the prior: a fixed width that does not suit costs more than it
    wide = Family(dist.Normal, scale=3.0)
    found = measure(linear.model, guide, linear.x, families=[families.mean_scale, wide])
    assert (row(found, wide.name) < -1).all() and sums(found, found.elbo)
    assert (row(found, f"beyond_{wide.name}") > 1).all()


def test_names_of_the_ladder_for_other_families_do_not_name_the_rows():
    linear = Linear(size=3)
    swapped = {"mean_scale": "full_rank", "full_rank": "mean_scale"}
    guide = linear.guide(families.mean_scale, error=0.1)
    found = measure(linear.model, guide, linear.x, families=swapped)
    assert found.row.values[1:4].tolist() == ["mean_scale", "full_rank", "beyond_full_rank"]
    assert close(row(found, "mean_scale") + row(found, "noise"), linear.log_p)
    assert found.attrs["notes"] == []


def test_families_may_have_the_names_of_rows():
    """A row keeps its name and words; and the prior is told by what it is, not by its name."""
    linear = Linear(size=3)
    guide = linear.guide(families.mean_scale, error=0.1)
    named = {"point": "noise_only", "noise_only": "mean_scale", "family_gap": "full_rank"}
    found = measure(linear.model, guide, linear.x, families=named, num_samples=64)
    added = ["point_", "noise_only", "family_gap_"]
    down = ["family_gap", "amortization_gap", "point"]
    assert found.row.values.tolist() == ["noise", *added, "beyond_family_gap", *down]
    assert sums(found, found.elbo) and not found.summed.sel(row="point")
    assert found.words.sel(row="point_") == "what point adds"
    assert close(row(found, "beyond_family_gap"), 0.0)


def test_a_family_of_the_same_name_as_that_of_the_guide_is_another_one():
    """The sds of the two families are told apart by what their heads make, not by their names."""
    linear = Linear(size=4)
    narrow, wide = (Own(lambda loc, sd=sd: dist.Normal(loc, sd)) for sd in (0.5, 1.0))
    assert narrow.name == wide.name
    guide = FamilyGuide(linear.model, narrow, mlp(5, 4))
    few = {"num_samples": 32, "num_steps": 20}
    with pytest.raises(ValueError, match="families: expected families each member"):
        measure(linear.model, guide, linear.x, families=["noise_only", wide], **few)
    found = measure(linear.model, guide, linear.x, families=["noise_only", narrow], **few)
    assert sums(found, found.elbo)


def test_a_guide_with_networks_of_its_own_is_a_rung_of_its_own():
    linear = Linear(size=4)
    guide = FamilyGuide(linear.model, families.flow, mlp(5, 4))
    ladder = ["mean_scale", "flow"]
    few = {"num_samples": 32, "num_steps": 20}
    found = measure(linear.model, guide, linear.x, families=ladder, **few)
    assert found.row.values[2:5].tolist() == ["flow", "beyond_flow", "family_gap"]
    assert close(row(found, "family_gap"), -row(found, "beyond_flow"), 1e-12)
    assert sums(found, found.elbo)
    own = FamilyGuide(linear.model, Own(lambda loc: dist.Normal(loc, 1.0)), mlp(5, 4))
    found = measure(linear.model, own, linear.x, families=["noise_only", "mean_only"], **few)
    assert found.row.values[4:6].tolist() == ["family_gap", "amortization_gap"]
    assert sums(found, found.elbo)


def test_the_posterior_mean_of_weighted_draws_and_its_error():
    """Importance draws of a normal from a wider one: 5 errors, which are those that seeds show."""

    def one(seed):
        z = 1.5 * torch.randn(8, 256, 1, generator=torch.Generator().manual_seed(seed))
        weight = dist.Normal(0.5, 1.0).log_prob(z) - dist.Normal(0.0, 1.5).log_prob(z)
        groups = posterior_mean(weight, z)
        return float(groups.mean()), float(groups.std() / math.sqrt(8))

    values, errors = np.array([one(seed) for seed in range(200)]).T
    assert abs(values.mean() - 0.5) < 5 * values.std() / math.sqrt(200)
    # the ratio of the variances is that of two chi-squares of 199 and 1400 degrees of freedom
    assert 0.55 < values.var() / (errors**2).mean() < 1.6
    assert torch.allclose(posterior_mean(torch.zeros(8, 4, 2), torch.ones(8, 4, 2)), torch.ones(()))


def test_nothing_moves_and_equal_calls_give_equal_numbers():
    linear = Linear(size=4)
    guide = linear.guide(families.mean_scale, error=0.1)
    call = partial(measure, linear.model, guide, linear.x, families=LADDER[1:3], num_steps=9)
    with traceless(linear.model, guide, moved=False):
        first = call()
    assert first.equals(call()) and not first.equals(call(seed=1))


def test_the_table_says_in_words_what_each_row_is():
    linear = Linear(size=4)
    guide = linear.guide(families.mean_scale, error=0.1)
    found = account(linear.model, guide, linear.x, num_samples=32, num_steps=9, progress=False)
    text = str(found)
    assert all(name in text for name in ROWS) and "nats per datum, a mean of 4" in text
    assert "log p(x)" in text and "ELBO of the guide" in text and "not in the sum" in text
    assert f"{float(found.dataset.elbo.mean()):.3f}" in text and "nan" not in text
    assert all(len(line) < 80 for line in text.splitlines()[: 2 * len(found.dataset.row) + 3])
    assert {"nats", "mean", "running", "log_likelihood"} <= set(found.dataset)
    assert all("unit" in found.dataset[name].attrs for name in ("nats", "optimum", "khat"))
    with pytest.raises(AttributeError):
        found.dataset = None


def told(khat=0.1, prior=0.0, low=0.0, left=0.0, kinds=("mean_scale", "full_rank"), exact=False):
    """What is said where one of three data has such numbers."""
    ones = torch.zeros(3)
    rungs = {"mean_scale": torch.zeros(8, 3), "full_rank": torch.zeros(8, 3)}
    rungs["full_rank"][:, 1] = -low
    shapes = torch.tensor([0.1, khat, math.nan])
    more = torch.tensor([0.0, prior, 0.0])
    zero = torch.zeros(8, 3)
    rising = {"full_rank": torch.tensor([0.0, left, math.nan])}
    found = Measured(
        rungs, zero, ones, ones, ones, shapes, ones, zero, zero, more, ones > 0, rising
    )
    return notes_of(found, dict(zip(rungs, kinds, strict=True)), exact=exact)


def test_what_cannot_be_trusted_is_said():
    assert told() == []
    (note,) = told(khat=0.71)
    assert "k-hat is above 0.7 for 1 of 3 data" in note and "understated" in note
    assert "found up to 0.5 nats" in told(prior=0.5)[0]
    (note,) = told(low=0.2)
    assert "below mean_scale, which full_rank holds, by up to 0.2 nats for 1 of 3 data" in note
    assert told(low=0.2, kinds=("full_rank", "mean_scale")) == []  # names of the caller's own
    (note,) = told(khat=0.71, exact=True)  # a given log p(x) is not understated
    assert note == "k-hat is above 0.7 for 1 of 3 data: `noise` may be off there"
    assert told(low=1e-4) == told(left=1e-4) == []  # no more than a search may end short
    (note,) = told(left=0.02)
    assert "may be short of the best of full_rank by 0.02 nats, for 1 of 3 data" in note


def test_a_rung_is_held_against_all_that_it_holds_not_only_the_one_before():
    rungs = {"wide": torch.zeros(8, 1), "other": -torch.ones(8, 1), "widest": -torch.ones(8, 1)}
    zero, one = torch.zeros(8, 1), torch.zeros(1)
    found = Measured(rungs, zero, one, one, one, one, one, zero, zero, one, one > 0)
    kinds = {"wide": "mean_scale", "other": "student_t", "widest": "full_rank"}
    (note,) = notes_of(found, kinds)
    assert "below wide, which widest holds, by up to 1 nats for all the data" in note


LINEAR = Linear(size=3)
POINT = "families: expected families with a density, got "
REFUSED = [
    ({"families": ["mean_scale", "deterministic"]}, ValueError, POINT + "deterministic"),
    ({"families": []}, ValueError, "families: expected at least 1"),
    ({"families": "full_rank"}, ValueError, "families: expected at least 1"),
    ({"families": ["bayes"]}, TypeError, "families: expected a guide family"),
    ({"families": ["flow"]}, ValueError, "families: expected families each member .* got flow"),
    ({"families": ["mean_only", "mean_only"]}, ValueError, "families: expected different"),
    ({"num_samples": 8}, ValueError, "num_samples: .* at least 16, got 8"),
    ({"num_steps": 0}, ValueError, "num_steps: .* got 0"),
    ({"seed": None}, TypeError, "seed: expected a whole number, got None"),
    ({"log_likelihood": [0.0]}, ValueError, "log_likelihood: expected 3 finite numbers, one per"),
    ({"log_likelihood": [0.0, 0.0, math.nan]}, ValueError, "log_likelihood: .* with 1 that are"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_input(options, error, message):
    guide = LINEAR.guide(families.mean_scale)
    few = {"num_steps": 1, "num_samples": 16, "progress": False}
    with pytest.raises(error, match=message):
        account(LINEAR.model, guide, LINEAR.x, **few | options)


def test_guides_that_have_no_account():
    def classes(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(3.0 * k, 1.0), obs=x[:, 0])

    guide = FamilyGuide(classes, families.mean_scale, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: expected a latent beside those .* got none"):
        measure(classes, guide, torch.ones(3, 2))
    model = VAE(nn.Linear(2, 3), 2, likelihoods.Normal(1e-200))
    guide = FamilyGuide(model, families.mean_scale, nn.Linear(3, 2))
    with pytest.raises(ValueError, match="model or guide: expected a finite ELBO of every datum"):
        measure(model, guide, torch.ones(4, 3), num_steps=1, num_samples=16)
    with pytest.raises(ValueError, match="guide: expected a FamilyGuide, got AutoNormal"):
        account(LINEAR.model, AutoNormal(LINEAR.model), LINEAR.x)
    reg = Regression(rows=6, columns=2)
    with pytest.raises(ValueError, match=POINT + "zero, whose members are points"):
        measure(reg.model, FamilyGuide(reg.model, "mean_scale"), *reg.args, families=["zero"])
    with pytest.raises(ValueError, match="log_likelihood: expected a finite number"):
        guide = FamilyGuide(reg.model, "mean_scale")
        measure(reg.model, guide, *reg.args, families=["full_rank"], log_likelihood=[1.0, 2.0])
