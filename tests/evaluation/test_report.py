"""The table and the words made of `evaluate` and `calibration`, from results written by hand."""

import math

import numpy as np
import pytest
import torch
import xarray as xr

from ppvae import VAE, FamilyGuide, evaluate, families, likelihoods, reading, summary
from ppvae.evaluation.directions import Moments, directions
from ppvae.evaluation.ranks import verdict

NATS = ["elbo", "rate", "distortion", "objective", "log_likelihood"]


def result(**changes):
    """Numbers of four data and three latents, of which the last is not active."""
    values = {
        "elbo": np.array([-3.0, -4.0, -5.0, -4.0]),
        "rate": np.array([1.0, 1.5, 2.0, 1.5]),
        "log_likelihood": np.array([-2.0, -3.5, -4.0, -3.5]),
        "ess": np.array([10.0, 20.0, 30.0, 40.0]),
        "khat": np.array([0.1, 0.2, 0.3, 0.4]),
        "mean_variance": np.array([0.5, 0.3, 0.0]),
        "mean_variance_se": np.array([0.1, 0.01, 0.001]),
        "active": np.array([True, True, False]),
        "mutual_information": 0.7,
        "mutual_information_se": 0.1,
        "aggregate_kl": 0.8,
        "aggregate_kl_se": 0.05,
    }
    attrs = {"bound": 1, "num_samples": 50, "cap": math.inf, "channels": "loc"}
    attrs |= {name: changes.pop(name) for name in list(changes) if name not in values}
    values |= {name: np.asarray(value) for name, value in changes.items()}
    values |= {"objective": values["elbo"], "distortion": -values["elbo"] - values["rate"]}
    dims = {(): (), (4,): ("datum",), (3,): ("latent",)}
    found = xr.Dataset({k: (dims[np.shape(v)], v) for k, v in values.items()}, attrs=attrs)
    for name in found:
        unit = "draws" if name == "ess" else "nats per datum"
        found[name].attrs["unit"] = unit
    return found.assign_coords(latent=["a", "b", "c"])


def test_summary():
    """Means, standard errors over four data, and the units of the measures."""
    table = summary(result(cap=0.25, khat=[0.1, 0.7, 0.8, 0.9]))
    se = math.sqrt(2 / 3) / 2
    chance = 0.5 * math.erfc((0.5 - 0.01) / 0.1 / math.sqrt(2))
    rows = {
        "elbo": (-4.0, se, "nats per datum"),
        "rate": (1.5, se / 2, "nats per datum"),
        "distortion": (2.5, se / 2, "nats per datum"),
        "log_likelihood": (-3.25, math.sqrt(2.25 / 3) / 2, "nats per datum"),
        "mutual_information": (0.7, 0.1, "nats per datum"),
        "aggregate_kl": (0.8, 0.05, "nats per datum"),
        "ess": (25.0, math.sqrt(500 / 3) / 2, "of 50 draws"),
        "khat > 0.7": (0.5, 0.5 / math.sqrt(3), "share of the data"),
        "active": (2.0, math.sqrt(chance * (1 - chance)), "of 3 latents"),
        "cap": (0.25, 0.0, "nats per latent"),
    }
    assert list(table.index) == list(rows) and list(table.columns) == ["mean", "se", "unit"]
    for name, (mean, error, unit) in rows.items():
        assert table.loc[name, "mean"] == pytest.approx(mean, rel=1e-12), name
        assert table.loc[name, "se"] == pytest.approx(error, rel=1e-6, abs=1e-12), name
        assert table.loc[name, "unit"] == unit
    one = summary(result().isel(datum=slice(1)))
    assert math.isnan(one.loc["elbo", "se"]) and "cap" not in one.index
    gone = summary(result(khat=[math.nan, 0.9, 0.1, 0.1]))
    assert math.isnan(gone.loc["khat > 0.7", "mean"])
    point = summary(result(bound=0))
    assert list(point.index) == ["objective", "rate", "distortion", "active"]
    # a variance of the mean right at the limit counts as active half of the time
    error = summary(result(mean_variance=[0.01, 0.5, 0.0], mean_variance_se=[0.1, 0.0, 0.0]))
    assert error.loc["active", "se"] == pytest.approx(0.5)


BOUND = (
    "The ELBO is -4.00 +- 0.41 nats per datum, at a rate of 1.50; log p(x) is at least -3.25, so "
    "the gap is 0.75 or more."
)
TOLD = "The latents tell 0.70 +- 0.10 nats of each datum."
APART = "The latents tell all these 4 data apart: I(x; z) is at its limit here, log N = 1.39, "
GOOD = "k-hat is below 0.7 for all data: the importance weights are well behaved."
COLLAPSED = "1 of 3 latents collapsed (c): the data may have no use for more than the others, or "


@pytest.mark.parametrize(
    ("changes", "line", "start"),
    [
        ({}, 0, BOUND),
        ({}, 1, TOLD),
        ({}, 2, GOOD),
        ({}, 3, COLLAPSED),
        ({"mutual_information": -0.001}, 1, "The latents tell 0.00 +- 0.10"),
        # log 4 = 1.386: within 0.1, or two errors, of it
        ({"mutual_information": 1.18}, 1, "The latents tell 1.18 +- 0.10"),
        ({"mutual_information": 1.19}, 1, APART),
        ({"mutual_information": 1.28, "mutual_information_se": 0.01}, 1, "The latents tell 1.28"),
        ({"mutual_information": 1.29, "mutual_information_se": 0.01}, 1, APART),
        ({"mutual_information": 0.98, "mutual_information_se": 0.2}, 1, "The latents tell 0.98"),
        ({"mutual_information": 0.99, "mutual_information_se": 0.2}, 1, APART),
        ({"aggregate_kl": 1.0}, 2, GOOD),
        ({"aggregate_kl": 1.01}, 2, "The aggregate posterior is 1.01 +- 0.05 nats from the prior"),
        ({"aggregate_kl": 1.6, "aggregate_kl_se": 0.8}, 2, GOOD),
        ({"aggregate_kl": 1.7, "aggregate_kl_se": 0.8}, 2, "The aggregate posterior is 1.70"),
        ({"cap": 0.3368}, 2, "The family can carry no more than 0.3368 nats per latent, 1.01 in"),
        ({"cap": 0.0}, 2, GOOD),
        ({"khat": [0.7, 0.1, 0.1, 0.1]}, 2, GOOD),
        ({"khat": [0.71, 0.9, 0.1, math.nan]}, 2, "k-hat is above 0.7 for 67 % of the data"),
        ({"khat": [math.nan] * 4}, 2, "k-hat cannot be told from so few draws."),
        ({"copied": 2}, 3, "The decoder's noise is a thousandth of the spread, or less, for 2 of"),
        ({"active": [True] * 3}, 3, "All 3 latents are active."),
        ({"active": [False] * 3}, 3, "3 of 3 latents collapsed (a, b, c): the likely cause is"),
        ({"channels": "none"}, 3, COLLAPSED[:30] + "the family has no channel, so nothing can"),
        ({"bound": 0}, 0, "The objective, -4.00, is a penalised log-likelihood: a point has no"),
        ({"bound": 0}, 1, "Its rate is the penalty -log p(z), no divergence."),
        ({"bound": 0}, 2, COLLAPSED),
    ],
)
def test_reading(changes, line, start):
    lines = reading(result(**changes)).splitlines()
    assert lines[line].startswith(start), lines[line]
    assert "-0.00" not in "".join(lines)
    wrong = lines[-1].startswith("What to do: see")  # else all are active, or none could be
    assert wrong == (changes != {"active": [True] * 3} and "channels" not in changes)


def test_a_share_that_is_not_zero_is_not_called_so():
    many = result(khat=[0.9, 0.1, 0.1, 0.1]).isel(datum=[0] + [1] * 999)
    assert "k-hat is above 0.7 for less than 1 % of the data" in reading(many)


def test_the_cause_of_a_collapse():
    for directions_, beta, words in (
        (2, 1, "variance of 0.09, only 2 of the principal directions of the data"),
        (0, 1, "none of the principal directions"),
        (3, 1, "3 principal directions of the data are worth a latent, so there"),
        (3, 4, "beta = 4 makes a latent pay 4 nats of fit for every nat"),
        (2, 4, "only 2 of the principal directions"),
    ):
        assert words in reading(result(directions=directions_, noise_variance=0.09), beta=beta)
    assert "beta = 2 makes a latent pay" in reading(result(), beta=2)


def test_the_names_of_many_collapsed_latents_are_cut():
    nine = result(active=[False] * 3).isel(latent=[0] * 9).assign_coords(latent=range(9))
    assert "9 of 9 latents collapsed (0, 1, 2, 3, 4, 5, 6, 7, ...): " in reading(nine)
    assert "collapsed (0, 1, 2, 3, 4, 5, 6, 7): " in reading(nine.isel(latent=slice(8)))


def linear(latent, noise, used=0):
    """Data with two directions of variance 9 and 4 beside noise of variance 0.09, and a guide."""
    x = torch.randn(100, 6) * torch.tensor([3.0, 2.0, 0.3, 0.3, 0.3, 0.3])
    model = VAE(torch.nn.Linear(latent, 6), latent, likelihoods.Normal(noise))
    guide = FamilyGuide(model, families.mean_scale, torch.nn.Identity())
    torch.nn.init.zeros_(guide.heads["z"].loc.linear.weight)
    for unit in range(used):
        guide.heads["z"].loc.linear.weight.data[unit, unit] = 0.3
    return evaluate(model, guide, x, num_samples=2, batch_size=60), x


def test_directions_of_the_data():
    """Those whose eigenvalue l is worth `(r - 1 - log r) / 2` of 0.05 nats, r = l / noise."""
    for noise, expected in ((0.3, 2), (2.2, 1), (4.0, 0)):
        found, x = linear(2, noise)
        ratio = np.maximum(np.linalg.eigvalsh(np.cov(x.T, ddof=0)) / noise**2, 1)
        worth = (ratio - 1 - np.log(ratio)) / 2
        assert found.directions == expected == (worth > 0.05).sum()
        assert found.noise_variance == pytest.approx(noise**2)
    squares = np.array([2.0, 0.01])
    two = Moments(2, 2 * np.ones(2), np.zeros(2), squares, np.diag(squares), np.full(2, 0.18))
    assert directions([two]) == {"noise_variance": 0.09, "directions": 1}
    assert directions([two._replace(size=1)]) == directions([None]) == {}
    assert directions([two, two._replace(products=None)]) == {"noise_variance": 0.09}
    tiny = np.array([2.0e-6, 0.02])  # the first of a thousandth of its spread
    assert directions([two._replace(noise=tiny)])["copied"] == 1
    assert "copied" not in directions([two._replace(noise=1.1 * tiny)])
    half = two._replace(seen=np.ones(2), noise=1.5 * tiny)  # of half as many, twice the spread
    assert directions([half])["copied"] == 1
    assert "only 2 of the principal directions" in reading(linear(4, 0.3, used=2)[0])
    assert "training stuck at the prior" in reading(linear(2, 0.3)[0])
    model = VAE(torch.nn.Linear(2, 3), 2, likelihoods.Bernoulli())
    guide = FamilyGuide(model, families.deterministic, torch.nn.Linear(3, 4))
    found = evaluate(model, guide, (torch.rand(9, 3) > 0.5).double())
    assert "directions" not in found.attrs and "no bound on log p(x)" in reading(found)
    assert summary(found).loc["objective", "mean"] == pytest.approx(float(found.objective.mean()))


@pytest.mark.parametrize("function", [summary, reading])
def test_other_things_are_refused(function):
    for other in ({}, xr.Dataset(), result().drop_vars("distortion")):
        with pytest.raises(ValueError, match="found: expected a result of evaluate, got D?d?"):
            function(other)
    with pytest.raises(ValueError, match="beta: expected a finite number of at least 0, got -1"):
        reading(result(), beta=-1)


# --- calibration ----------------------------------------------------------------------------------


def ranks(**changes):
    """A result of `calibration` for two latents, 100 simulations and 9 draws."""
    p = changes.pop("p", [0.5, 0.6])
    attrs = {"num_samples": 9, "unit": "nats per datum", "note": ""}
    values = {"information": 1.0, "information_se": 0.1, "gap": 0.2, "gap_upper": 0.21} | changes
    spread = np.tile(np.arange(10), 10)
    rank = np.stack([values.pop("rank", spread), spread], 1)
    covered = values.pop("covered", 0.9)
    variables = {
        "rank": (("simulation", "latent"), rank),
        "coverage": (("level", "latent"), [[0.5, 0.5], [covered, 0.9]]),
        "uniformity_p": ("latent", p),
    }
    return xr.Dataset(variables | values, {"latent": ["z[0]", "z[1]"], "level": [0.5, 0.9]}, attrs)


UNIFORM = "passes: ranks are uniform in 100 simulations (smallest p 0.5; information 1.00, gap "
FAILS = "fails for 1 of 2 latents; "
HIGH, LOW = np.full(100, 7), np.full(100, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, UNIFORM + "0.20 nats per datum)"),
        ({"gap_upper": 0.2542}, UNIFORM + "0.20 nats per datum)"),  # 0.05 and 2 % of it
        ({"gap_upper": 0.2562}, UNIFORM + "0.20 to 0.26 nats per datum)"),
        ({"gap": -0.001, "gap_upper": -0.001}, UNIFORM + "0.00 nats per datum)"),
        ({"information": 0.205}, "passes, and passes nothing: the guide is no closer"),
        ({"information": 0.206}, "passes: ranks are uniform"),
        ({"information": 0.0, "information_se": 0.0}, "passes, and passes nothing: the guide is"),
        ({"p": [0.005, 0.6]}, "passes: "),  # at 1 %, shared between two
        ({"p": [0.0049, 0.6]}, FAILS + "the ranks of z[0] are not uniform; information 1.00"),
        # 4 errors of 0.03, and of 0.05
        ({"p": [0, 0.6], "covered": 0.77}, FAILS + "intervals too narrow: 90 % intervals cover 77"),
        ({"p": [0, 0.6], "covered": 0.79}, FAILS + "the ranks of z[0] are"),
        ({"p": [0, 0.6], "covered": 1.03}, FAILS + "intervals too wide: 90 % intervals cover 103"),
        ({"p": [0, 0.6], "rank": HIGH}, FAILS + "draws too low: 100 % of the true values of z[0]"),
        ({"p": [0, 0.6], "rank": LOW}, FAILS + "draws too high: 0 % of the true values of z[0]"),
        ({"p": [0.6, 0], "rank": HIGH}, FAILS + "the ranks of z[1] are not uniform"),
    ],
)
def test_verdict(changes, words):
    assert verdict(ranks(**changes)).startswith(words), verdict(ranks(**changes))
