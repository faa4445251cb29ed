"""When training ends by itself, and what is said of the course of its losses."""

import copy
import math
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from ppvae import (
    VAE,
    FamilyGuide,
    NotConverged,
    evaluate,
    families,
    fit,
    fit_replicates,
    from_pyro_svi,
    likelihoods,
    objectives,
    reading,
)
from ppvae._scopes import private_modules
from ppvae.closed_form import learned_decoder
from ppvae.training.course import Ending, course, last_fall


def test_the_fall_over_the_last_part_is_that_of_a_line_of_least_squares():
    epochs = np.arange(1, 101)
    assert last_fall(10 - 0.02 * epochs)[:3] == pytest.approx((0.5, 0.0, 0.0), abs=1e-7)
    noise = np.random.default_rng(0).standard_normal(100)
    for part in (4, 2):
        count = 100 // part
        line = stats.linregress(range(count), noise[-count:])
        expected = (-count * line.slope, count * line.stderr)
        assert last_fall(noise, part)[:2] == pytest.approx(expected)
    assert np.isnan(last_fall([1.0] * 15)[:3]).all()
    assert last_fall([1.0] * 16)[:3] == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("part", [4, 2])
def test_what_is_to_come_in_three_times_as_many_epochs(part):
    epochs = np.arange(1, 1001)
    like_log = last_fall(-np.log(epochs), part)
    assert like_log.expected == pytest.approx(math.log(3), rel=0.02)
    assert like_log.to_come >= like_log.expected
    inverse = last_fall(1 / epochs, part)
    assert inverse.to_come > 1 / 1000 - 1 / 3000  # the law that falls on is the one assumed


def test_what_is_said_of_losses_after_a_number_of_epochs():
    noise = 0.1 * np.random.default_rng(0).standard_normal(100)
    assert course([1.0] * 15, 5000) == (None, ANY) and "too few" in course([1.0] * 15, 5000)[1]
    converged, words = course(noise - 0.1 * np.arange(100), 5000)
    assert converged is False and "still falling, by 0.1 " in words and "train longer" in words
    assert course(noise, 5000)[0] is None and "cannot be seen" in course(noise, 5000)[1]
    converged, words = course(0.01 * noise, 5000)
    assert converged and "less than" in words
    assert course(0.01 * noise, 999)[0] is None  # it may not have begun to fall


def ended(losses, max_epochs, steps=1000):
    """The ending of a training with such losses, the epochs before it slowed down, and all."""
    ending, factors = Ending(max_epochs), []
    for count in range(1, max_epochs + 2):
        if not ending.go_on(losses[count - 1], steps * count):
            break
        factors.append(ending.factor)
    return ending, factors.count(1.0) + 1, count, math.prod(factors)


def test_training_ends_when_the_loss_is_flat_with_a_hundredth_of_the_rate():
    epochs = np.arange(1000)
    ending, flat, count, factor = ended(5 * np.exp(-epochs / 20), 1000)
    assert ending.flat and count == flat + math.ceil(flat / 4)
    assert factor == pytest.approx(0.01)
    assert 5 * math.exp(-flat / 20) < 0.1  # all that is left is less than what was asked for
    assert f"flat after {flat} epochs" in ending.words
    ending, flat, count, factor = ended(-0.1 * epochs, 100)
    assert ending.flat is False and (flat, count) == (80, 100)
    assert factor == pytest.approx(0.01)
    assert "at most 100: the loss fell by 2 nats per datum in their last quarter" in ending.words
    assert "too few to say" in ended(-0.1 * epochs, 10)[0].words
    assert ended(np.zeros(100), 100, steps=20)[1] == 50  # no sooner than after 1000 steps


def test_an_objective_that_moves_to_the_end_leaves_nothing_to_judge_by():
    ending = Ending(100)
    count = next(epoch for epoch in range(1, 200) if not ending.go_on(None, 1000 * epoch))
    assert count == 100 and ending.flat is False and "too few to say" in ending.words


def test_noise_delays_the_end_until_the_fall_is_seen_through_it():
    noise = np.random.default_rng(0).standard_normal(4000)
    assert ended(0.01 * noise, 4000)[1] == 16
    early, late = (ended(size * noise, 4000) for size in (0.1, 1.0))
    assert early[0].flat and late[0].flat and 16 < early[1] < late[1]


def linear(x):
    torch.manual_seed(0)
    model = VAE(nn.Linear(2, x.shape[1]), 2, likelihoods.Normal(1.0, learned=True))
    return model, FamilyGuide(model, families.mean_scale, nn.Identity())


def table(rows):
    torch.manual_seed(3)
    return torch.randn(rows, 2) @ torch.randn(2, 4) + 0.5 * torch.randn(rows, 4)


def test_a_fit_that_ends_by_itself_is_at_the_optimum():
    """That of a linear decoder is known; 0.1 nats per datum is what the ending promises."""
    x = table(500)
    model, guide = linear(x)
    result = fit(model, guide, x, learning_rate=0.05, seed=0, progress=False)
    exact = learned_decoder(x, 2, families.mean_scale).objective
    found = float(evaluate(model, guide, x, num_samples=64, progress=False).objective.mean())
    assert result.converged and result.verdict.startswith("flat after")
    assert 1000 <= result.num_steps == len(result.losses) < 20_000
    assert exact - 0.1 < found < exact + 0.02  # 32,000 draws of an sd of about 1


def test_a_fit_that_may_not_go_on_says_so():
    x = table(50)
    with pytest.warns(NotConverged, match="fit: not flat after 32 epochs.*at most 40"):
        result = fit(*linear(x), x, max_epochs=40, seed=0, progress=False)
    assert result.converged is False and len(result.losses) == 40
    with pytest.raises(ValueError, match="max_epochs: expected none beside num_epochs, got 4"):
        fit(*linear(x), x, num_epochs=3, max_epochs=4)


@pytest.mark.parametrize("steps", [60, 61])
def test_patience_begins_when_the_warm_up_has_ended(steps):
    """In the warm-up the loss rises with beta, which is no reason to stop, nor a best epoch."""
    x = table(60)
    objective = objectives.ELBO(beta=objectives.warm_up(steps, end=9.0))
    told = {"objective": objective, "validation": table(90)[60:], "batch_size": 20, "patience": 3}
    result = fit(*linear(x), x, num_epochs=200, learning_rate=0.02, seed=0, progress=False, **told)
    rising = result.validation_losses[:20]
    assert rising[0] < max(rising) and len(result.losses) > 20
    assert result.best_epoch >= 19 + (steps > 60)
    after = result.validation_losses[19 + (steps > 60) :]
    assert result.validation_losses[result.best_epoch] == min(after)


@pytest.mark.parametrize(
    "objective",
    [
        objectives.ELBO(beta=4.0),
        objectives.ELBO(free_bits=0.5),
        objectives.IWAE(4),
        objectives.IWAE(4, gradient="doubly_reparametrized"),
    ],
    ids=["beta", "free bits", "IWAE", "DReG"],
)
def test_validation_losses_are_those_of_the_objective(objective):
    x = table(30)
    model, guide = linear(x)
    told = {"validation": x, "objective": objective, "num_epochs": 2, "learning_rate": 1e-300}
    result = fit(model, guide, x, seed=0, progress=False, **told)
    torch.manual_seed(0)
    with private_modules():
        expected = objective(model, guide, x).item()
    assert result.validation_losses == pytest.approx([expected] * 2, rel=1e-6)


def test_what_is_said_of_an_objective_that_moved():
    x = table(40)
    told = {"num_epochs": 30, "seed": 0, "progress": False}
    moving = fit(*linear(x), x, objective=objectives.ELBO(beta=objectives.warm_up(99)), **told)
    assert "the objective changed on the way" in moving.verdict
    still = fit(*linear(x), x, objective=objectives.ELBO(beta=objectives.warm_up(9)), **told)
    assert "after 20 epochs" in still.verdict or "after 21 epochs" in still.verdict


def test_measures_tree_and_words_carry_the_verdict_until_a_parameter_is_written_to():
    x = table(400)
    pair = linear(x)
    assert "verdict" not in evaluate(*pair, x, num_samples=8, progress=False).attrs
    told = {"seed": 0, "progress": False, "learning_rate": 0.01}
    result = fit(*pair, x, num_epochs=60, **told)
    assert result.converged is False and "train longer" in result.verdict
    found = evaluate(*pair, x, num_samples=8, progress=False)
    assert found.verdict == result.verdict and found.converged == 0
    assert reading(found).startswith("Train longer before you judge by what follows, or take")
    tree = from_pyro_svi(*pair, x, num_samples=4)
    assert tree["posterior"].attrs["verdict"] == result.verdict
    assert (
        "verdict" not in evaluate(linear(x)[0], pair[1], x, num_samples=8, progress=False).attrs
    )  # another model
    assert "verdict" not in evaluate(*copy.deepcopy(pair), x, num_samples=8, progress=False).attrs
    with torch.no_grad():
        pair[0].decoder.bias.add_(0.0)
    assert "verdict" not in evaluate(*pair, x, num_samples=8, progress=False).attrs
    result = fit(*pair, x, num_epochs=2, kwargs={}, **told)
    found = evaluate(*pair, x, num_samples=8, progress=False)
    assert "converged" not in found.attrs and reading(found).startswith("The fit says: after 2 ep")
    pairs = [linear(x), linear(x)]
    results = fit_replicates(pairs, x, num_epochs=2, seeds=[0, 1], progress=False)
    assert evaluate(*pairs[1], x, num_samples=8, progress=False).verdict == results[1].verdict
