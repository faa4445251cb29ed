"""Verdicts follow from numbers, and name them."""

import math
import re

import pyro.distributions as dist
import pytest
import torch
from global_latents import (
    labelled,
    location,
    logistic,
    noise,
    prepared,
    quiet,
    two_modes,
)
from pyro import poutine

from ppvae import FamilyGuide, NarrowFamily, NotConverged, families
from ppvae._checks import TROUBLE
from ppvae.objectives.weights import khat
from ppvae.programs.layout import Layout
from ppvae.training import verdict
from ppvae.training.optimum import Optimum, allowed_gap

narrow = pytest.mark.filterwarnings("ignore::ppvae.NarrowFamily")


def test_few_steps_are_told_with_their_number():
    guide = FamilyGuide(logistic, families.mean_scale)
    words = r"stopped before the optimum: the Newton step is \S+ posterior sds, at w\[[01]\]; give"
    with pytest.warns(NotConverged, match=f"^fit: {words}") as caught:
        result = quiet(logistic, guide, labelled(), num_epochs=1)
    (warning,) = [each for each in caught if each.category is NotConverged]
    assert result.converged is False and warning.filename == quiet.__code__.co_filename
    assert warning.message.args[0] == f"fit: {result.verdict} ({TROUBLE})"
    first, second, third, fourth = repr(result).split("\n")
    assert (
        fourth
        == result.execution_reason
        == "not staged: the optimum is found at once, in few steps"
    )
    assert first.startswith("Fit by L-BFGS (eager): 1 steps, ") and first.endswith(" s")
    assert second == f"loss {result.losses[-1]:.6g} nats per datum" and third == result.verdict


@narrow
def test_another_mode_nearby_is_told():
    result = quiet(two_modes, FamilyGuide(two_modes, families.full_rank), 4 + noise(9))
    assert result.converged and "there is another mode, " in result.verdict
    assert result.verdict.endswith(" nats above this one")


def test_a_family_that_cannot_move_is_too_narrow():
    guide = FamilyGuide(location, families.mean_only)
    with pytest.warns(NarrowFamily, match="too narrow: .*the sd of w is") as caught:
        result = quiet(location, guide, noise(3))
    (warning,) = [each for each in caught if each.category is NarrowFamily]
    assert result.converged and warning.filename == quiet.__code__.co_filename
    assert issubclass(NarrowFamily, UserWarning) and not issubclass(NarrowFamily, NotConverged)


def test_a_tail_of_equal_weights_is_no_reason_to_warn():
    """Weights within a percent of each other; k-hat sees only their tail, which is heavy."""
    generator = torch.Generator().manual_seed(0)
    tail = 1e-4 * torch.rand(4000, generator=generator).pow(-1.0).clamp_max(2000)
    states = noise(4000, 1)
    assert khat(tail) > 0.7
    words, too_narrow = verdict._narrowness(-tail, states, ["w"])
    assert not too_narrow and "k-hat" in words and "100% of the draws count" in words
    words, too_narrow = verdict._narrowness(-5000 * tail, states, ["w"])
    assert too_narrow and "k-hat is trusted up to 0.7" in words


def test_moments_that_are_off_name_their_site():
    """Draws of N(0, 1) reweighted to N(m, s): what they are off by is known."""
    states = noise(20_000, 2)
    for mean, sd, words in [
        (0.5, 1.0, r"the mean of b is 0.\d\d sd from the reweighted one"),
        (0.0, 0.7, r"the sd of b is 1.4\d of the reweighted one"),
        (0.1, 0.9, None),
    ]:
        other = dist.Normal(mean, sd).log_prob(states[:, 1])
        losses = dist.Normal(0.0, 1.0).log_prob(states[:, 1]) - other
        said, too_narrow = verdict._narrowness(losses, states, ["a", "b"])
        assert too_narrow == (words is not None)
        if words is not None:
            assert re.match(words, said), said


def optimum(**changes):
    layout = Layout.of(poutine.trace(location).get_trace(noise(3)), None)
    told = {"values": [], "losses": [1.0], "draws": 1, "step": 0.001, "site": "w"}
    told |= {"error": 0.0, "excess": 0.0, "others": [], "layout": layout}
    return Optimum(**(told | changes))


@pytest.mark.parametrize(
    ("changes", "converged", "words"),
    [
        ({}, True, "at the optimum: the Newton step is 0.001 posterior sds, at w$"),
        ({"step": 0.01}, False, "stopped before the optimum: the Newton step is 0.01 "),
        ({"step": math.nan}, False, "stopped before .* nan"),
        ({"step": 0.0099}, True, "at the optimum"),
        ({"others": [7.0, 4.9]}, True, "; there is another mode, 4.9 nats above this one$"),
        ({"others": [5.0]}, True, "at w$"),
        (
            {"draws": 64, "error": 0.1},
            False,
            "too few draws; 64 draws held fixed .* 0.1 posterior sds in a mean",
        ),
        ({"draws": 0, "step": 0.05}, False, "stopped before the optimum"),
    ],
)
def test_verdicts_follow_from_the_numbers(changes, converged, words):
    task = prepared(location, FamilyGuide(location, families.deterministic), noise(3))
    said = verdict.judge(task, optimum(**changes), seed=0)
    assert said.converged is converged and not said.narrow
    assert re.search(words, said.words), said.words


def test_draws_that_were_overfitted_are_told():
    """The loss that was reached with fixed draws is far below the one of fresh ones."""
    guide = FamilyGuide(location, families.full_rank)
    task = prepared(location, guide, noise(3))
    said = verdict.judge(task, optimum(draws=32, error=0.01, losses=[-50.0]), seed=0)
    assert said.converged is False
    assert re.match("the ELBO of fresh draws is 1[56]. nats below", said.words)
    assert allowed_gap(1) == 0.1 and allowed_gap(100) == 2.5
