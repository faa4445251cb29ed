"""The walk up the ladder: against closed forms, and each of its ends."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from linear import Linear, Regression
from pairs import slowing, traceless, values
from torch import nn

from ppvae import (
    VAE,
    Block,
    FamilyGuide,
    choose_family,
    closed_form,
    evaluate,
    families,
    likelihoods,
    priors,
)
from ppvae.comparison.trials import Settings
from ppvae.comparison.walk import Walk
from ppvae.regression import LinearRegression

QUIET = {"progress": False}


def walked(found):
    return found.dataset.family.values.tolist()


def optima(args, noise, sd, names):
    found = [closed_form.regression(*args, noise, sd, families.LADDER[name]) for name in names]
    return [float(each.objective) for each in found]


def test_a_correlated_posterior_of_a_regression_ends_at_full_rank():
    """It is the exact posterior: nothing is left, and no flow is fitted. A mean of sd 1 loses."""
    reg = Regression(rows=60, columns=4)
    with traceless(reg.model, moved=False):
        found = choose_family(reg.model, reg.args, num_samples=1000, num_seeds=2, **QUIET)
    names = ["noise_only", "mean_only", "shared_scale", "mean_scale", "full_rank"]
    assert walked(found) == names and found.name == found.family == "full_rank"
    best = optima(reg.args, 0.7, 0.5, names)
    data = found.dataset
    below = data.below.values.tolist()
    assert below[:3] == ["", "noise_only", "noise_only"] and below[4] in names[2:4]
    for step in names[1:]:
        one = data.sel(family=step)
        gain = best[names.index(step)] - best[names.index(one.below.item())]
        error = math.hypot(one.gain_se_seeds, one.gain_se_draws)
        assert abs(float(one.gain) - gain) < 5 * error + 0.02
    assert data.verdict.values.tolist()[1:3] == ["no", "yes"] and data.verdict[4] == "yes"
    last = data.sel(family="full_rank")
    assert abs(last.left) < 1e-3 and last.left_upper < 1e-3 and last.untrusted == 0
    assert found.model is not reg.model and found.guide.family is families.full_rank
    again = evaluate(found.model, found.guide, *reg.args, num_samples=50, **QUIET)
    assert float(again.total_elbo) == pytest.approx(best[-1], abs=1e-3)
    text = found.reason.splitlines()
    assert text[0].startswith("Take `full_rank`: it gains 0.") and "nats of all the data" in text[0]
    assert text[1].startswith("It costs 14 parameters and ") and f"{best[-1]:.2f}" in text[1]
    assert "A richer family could gain 0.000" in text[2] and "(flow not tried)" in text[2]
    assert "another decoder" not in found.reason and " ".join(str(found).split()).endswith(
        " ".join(found.reason.split())
    )


def test_orthogonal_columns_of_a_regression_end_at_the_mean_field():
    """Columns of other lengths: a scale for each weight, and the posterior is in the family."""
    X = torch.linalg.qr(torch.randn(40, 3))[0] * torch.tensor([1.0, 3.0, 9.0])
    y = X @ torch.tensor([0.3, -0.4, 0.2]) + 0.7 * torch.randn(40)
    model = LinearRegression(3, noise=0.7, weight=dist.Normal(0.0, 0.5))
    found = choose_family(model, (X, y), seed=3, num_seeds=2, num_samples=1000, **QUIET)
    assert walked(found) == ["noise_only", "mean_only", "shared_scale", "mean_scale"]
    assert found.name == "mean_scale" and found.dataset.seed.values.tolist() == [3, 4]
    best = optima((X, y), 0.7, 0.5, ["shared_scale", "mean_scale"])
    assert best[1] - best[0] > 0.5
    assert float(found.dataset.gain[-1]) == pytest.approx(best[1] - best[0], abs=0.3)
    assert "(full_rank, flow not tried)" in found.reason


def test_a_frozen_decoder_with_a_diagonal_posterior_ends_at_the_mean_field():
    """And the given networks stay; a copy of each was trained, whose ELBO is that of the table."""
    axes = torch.linalg.qr(torch.randn(4, 2))[0] * torch.tensor([0.5, 2.0])
    linear = Linear(axes, size=300, noise=0.7, b=torch.zeros(4))
    linear.model.requires_grad_(False)
    encoder, x = nn.Linear(4, 16), linear.x
    before = values(linear.model, encoder)
    names = ["mean_only", "shared_scale", "mean_scale", "full_rank", "flow"]
    told = slowing(100, 0.05, 0.002) | {"encoder": encoder, "families": names, "num_seeds": 2}
    found = choose_family(linear.model, x, x[:100], **told, **QUIET)
    assert found.name == "mean_scale" and walked(found) == names[:3], f"\n{found}"
    assert all(map(torch.equal, before, values(linear.model, encoder)))
    best = [
        closed_form.fixed_decoder(x[:100], axes, linear.b, 0.7, families.LADDER[name]).objective
        for name in names[:3]
    ]
    gains = [float((best[at] - best[at - 1]).mean()) for at in (1, 2)]
    assert found.dataset.gain.values[1:] == pytest.approx(gains, abs=0.1) and min(gains) > 0.3
    row = evaluate(found.model, found.guide, x[:100], num_samples=256, seed=0, **QUIET)
    one = found.dataset.elbo.sel(family="mean_scale", seed=0)
    assert float(row.elbo.mean()) == pytest.approx(float(one), abs=1e-9)
    assert found.dataset.left.sel(family="mean_scale") < 0.05
    assert found.dataset.gain.unit == "nats per datum"


def test_latents_that_explain_nothing_end_at_the_prior():
    """Frozen, after one family. One that learns is not stopped by a code that passes nothing."""
    x, encoder = torch.randn(40, 4), nn.Linear(4, 4)
    model = VAE(nn.Linear(2, 4), 2, likelihoods.Normal(1.0))
    nn.init.zeros_(model.decoder.weight)
    short = {"encoder": encoder, "num_epochs": 2, "num_seeds": 2, **QUIET}
    found = choose_family(copy.deepcopy(model).requires_grad_(False), x, **short)
    assert found.name == "noise_only" and walked(found) == ["noise_only"]
    assert found.reason.startswith("Take `noise_only`: it is the first of the walk.")
    assert float(found.dataset.left[0]) == pytest.approx(0.0, abs=1e-9)
    two = ["noise_only", "mean_only"]
    assert walked(choose_family(model, x, families=two, **short)) == two


def result(gain=0.0, left=0.5, khat=0.1, rate=1.0, level=-10.0):
    """One of two seeds and fifty data, almost without noise."""
    noise = 1e-4 * np.random.default_rng(int(1000 * gain + 1e4)).standard_normal((2, 50))
    elbo = level + gain + noise
    both = ("seed", "datum")
    arrays = {"elbo": elbo, "log_likelihood": elbo + left, "rate": np.full((2, 50), rate)}
    arrays |= {"distortion": -elbo, "ess": np.full((2, 50), 10.0), "khat": np.full((2, 50), khat)}
    numbers = {name: (both, array) for name, array in arrays.items()}
    numbers |= {name: ("seed", np.ones(2)) for name in ("seconds", "parameters")}
    numbers |= {name: ("seed", np.zeros(2)) for name in ("fall", "fall_se")}
    return xr.Dataset(numbers).assign_coords(seed=[0, 1])


def walk(*steps, learns=False, **last):
    """Walks over families with these kinds and gains; returns the walk and how far it went."""
    found, ended = Walk(Settings(range(2), 0.05, 0.95, 1000), learns=learns), False
    for number, (kind, gain) in enumerate(steps, 1):
        extra = last if number == len(steps) else {}
        ended = found.ends_with(kind, kind, result(gain, **{"left": 0.5 - gain} | extra))
        if ended:
            break
    return found, len(found.names) if ended else None


def said_of(found, every):
    return found.reason(found.dataset(), every)


def test_each_end_of_the_walk():
    nested = [("mean_only", 0.0), ("shared_scale", 0.01), ("mean_scale", 0.02), ("full_rank", 0.2)]
    found, stopped = walk(*nested)  # two steps in a row bring nothing
    assert stopped == 3 and found.best == "mean_only" and found.end == "row"
    assert "The last two steps bring less than 0.05 each (full_rank not tried)" in said_of(
        found, [kind for kind, _ in nested]
    )
    # a loss of a family that holds the one below is one of training, and counts
    assert walk(("mean_scale", 0.0), ("full_rank", -0.1), ("flow", 0.0))[1] == 3
    # that of another family says nothing of richer ones
    losing = [("noise_only", 0.0), ("mean_only", -2.0), ("shared_scale", -1.0), ("mean_scale", 0.2)]
    found, stopped = walk(*losing)
    assert stopped is None and found.best == "mean_scale"
    assert found.dataset().below.values.tolist()[1:] == ["noise_only"] * 3
    taken = [("mean_only", 0.0), ("shared_scale", 0.01), ("mean_scale", 0.2), ("full_rank", 0.21)]
    found, stopped = walk(*taken)  # a step that is taken begins the count anew
    assert stopped is None and found.best == "mean_scale"
    assert "The walk went to its end; what is left to log p(x) is 0.300" in said_of(found, [])
    found, stopped = walk(("mean_scale", 0.0), left=0.01)
    assert stopped == 1 and found.end == "left"
    assert "could gain 0.010" in said_of(found, ["mean_scale"])
    assert walk(("mean_scale", 0.0), left=0.01, khat=0.9)[1] is None  # which may be more
    found, _ = walk(("mean_scale", 0.0), left=0.2, khat=0.9)
    assert "or more: the weights of 100% cannot be trusted" in said_of(found, ["mean_scale"])
    found, stopped = walk(("mean_scale", 0.0), left=0.01, learns=True)
    assert stopped == 1 and "another decoder may be learned" in said_of(found, ["mean_scale"])
    assert walk(("mean_scale", 0.0), left=0.01, learns=True, rate=0.0)[1] is None


def test_an_undecided_step_is_not_taken_and_said():
    found, _ = walk(("mean_only", 0.0), ("mean_scale", 0.05))
    assert found.best == "mean_only"
    said = said_of(found, ["mean_only", "mean_scale"])
    assert "Whether `mean_scale` is worth it over `mean_only` is undecided, 0.050 (" in said
    assert "more seeds, test data or draws would tell" in said


def test_too_few_epochs_are_said():
    """Of those families only that have something to train; enough epochs are passed over."""
    x, encoder = torch.randn(20, 4), nn.Linear(4, 4)
    model = VAE(nn.Linear(2, 4), 2, likelihoods.Normal(1.0)).requires_grad_(False)
    told = {"families": ["noise_only", "mean_only"], "num_seeds": 2, "min_gain": 0.0, **QUIET}
    found = choose_family(model, x, encoder=encoder, num_epochs=2, **told)
    assert walked(found) == told["families"]
    assert "Whether the loss of mean_only still fell at the end cannot be told" in found.reason
    longer = choose_family(model, x, encoder=encoder, num_epochs=40, **told)
    assert "cannot be told" not in longer.reason


def test_another_mode_is_left_over():
    """The square of a weight is seen: a Gaussian sits on one of two modes, and half is missing.

    Its own draws see nothing of that; those of the prior do, and log 2 is left.
    """

    def two_modes(x):
        w = pyro.sample("w", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w * w, 1.0), obs=x)

    two_modes.vectorized = True
    x = torch.tensor([3.0, 4.0, 3.5])
    rungs = ["noise_only", "mean_scale", "full_rank"]
    told = {"num_samples": 4000, "num_seeds": 2, **QUIET}
    found = choose_family(two_modes, x, families=rungs, **told)
    assert found.name == "mean_scale" and walked(found) == rungs
    # the rest is what the mode is no Gaussian; 4000 draws of which one in 20 counts: 0.07
    assert float(found.dataset.left[1]) == pytest.approx(math.log(2), abs=0.2)


def test_families_by_names_of_ones_own_and_one_alone():
    reg = Regression(rows=20, columns=2)
    named = {"independent": "mean_scale", "joint": Block("full_rank")}
    found = choose_family(reg.model, reg.args, families=named, num_seeds=2, **QUIET)
    assert found.name in named and found.family is named[found.name]
    alone = choose_family(reg.model, reg.args, families=["full_rank"], num_seeds=2, **QUIET)
    assert alone.name == "full_rank" and alone.dataset.gain.isnull().all()


def test_a_model_that_cannot_be_copied():
    decoder, x = nn.Linear(2, 4), torch.randn(20, 4)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def scaled(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    before = values(decoder)
    short = {"encoder": nn.Linear(4, 4), "num_epochs": 1, **QUIET}
    wanted = "model: expected a torch.nn.Module that holds its networks and parameters, .* got one "
    with pytest.raises(ValueError, match=wanted + r"that uses \['Linear'\]") as caught:
        choose_family(model, x, **short)
    assert caught.value.__notes__ == ["choose_family: family noise_only, seed 0"]
    with pytest.raises(ValueError, match=wanted + r"that uses \[\"pyro.param\('scale'\)\"\]"):
        choose_family(scaled, x, **short)
    assert all(map(torch.equal, before, values(decoder)))
    vamp = VAE(nn.Linear(2, 4), 2, likelihoods.Normal(0.5), priors.VampPrior(x[:3], 2))
    FamilyGuide(vamp, "mean_scale", nn.Linear(4, 4))
    with pytest.raises(ValueError, match="model: expected a prior that is made of no guide's"):
        choose_family(vamp, x, **short)


REG = Regression(rows=6, columns=2)
REFUSED = [
    ({"families": []}, ValueError, "families: expected at least 1"),
    ({"families": ["bayes"]}, TypeError, "families: .* got 'bayes'"),
    ({"families": ["deterministic"]}, ValueError, "families: .* got deterministic, a point"),
    ({"num_seeds": 1}, ValueError, "num_seeds: expected a whole number of at least 2, got 1"),
    ({"num_samples": 1}, ValueError, "num_samples: .* got 1"),
    ({"min_gain": -0.1}, ValueError, "min_gain: .* got -0.1"),
    ({"level": 1.0}, ValueError, "level: .* got 1.0"),
    ({"model": 3}, TypeError, "model: expected a function or module, got int"),
    ({"encoder": 3}, TypeError, "encoder: expected a torch.nn.Module"),
    ({"test": REG.args}, ValueError, "test: expected None: the posterior is one of the training"),
    ({"data": (torch.ones(1, 2), torch.ones(1))}, ValueError, "data: expected at least 2 data"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_input(options, error, message):
    given = {"model": REG.model, "data": REG.args, "num_samples": 8, "num_epochs": 5, **QUIET}
    with pytest.raises(error, match=message):
        choose_family(**given | options)
