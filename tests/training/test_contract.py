"""Every objective trains alike by the program, by its graph, and side by side with others."""

import pytest
import torch
from pairs import OBJECTIVES, build, data, function, made, one_warning, same, traceless, values

from ppvae import fit, fit_replicates
from ppvae.objectives import IWAE
from ppvae.objectives.base import moving_fields


@pytest.mark.parametrize(
    ("name", "build_one"),
    [
        *((name, build) for name in OBJECTIVES),
        *((name, function) for name in ("all", "IWAE")),  # in a model that is not vectorized
    ],
)
def test_eager_staged_and_replicated_training_are_the_same(name, build_one, monkeypatch):
    """Batches of four, four and two; two replicates with two objectives."""
    goals, seeds = OBJECTIVES[name], [11, 16]
    told = {"num_epochs": 2, "batch_size": 4, "learning_rate": 0.01, "progress": False}
    alone = []
    for pair, goal, seed in zip(made(build_one, 2), goals, seeds, strict=True):
        result = fit(*pair, data(), seed=seed, objective=goal, **told)
        assert result.objective is goal and result.num_steps == 6 and result.execution == "eager"
        alone.append((result.losses, values(*pair)))
    assert alone[0][0] != alone[1][0]
    monkeypatch.setattr("ppvae.training.single.STAGE", 1)  # so many steps, and a loss is staged
    (pair,) = made(build_one)
    staged = fit(*pair, data(), seed=11, objective=goals[0], **told)
    # a product with a tensor rounds once, one with a number of Python's twice
    bound = 1e-13 if moving_fields(goals[:1]) else 0.0
    assert staged.losses == pytest.approx(alone[0][0], rel=bound, abs=0)
    assert same(values(*pair), alone[0][1], bound) and staged.execution == "staged"
    pairs = made(build_one, 2)
    with traceless(*pairs[0], *pairs[1]):
        results = fit_replicates(pairs, data(), seeds=seeds, objective=goals, **told)
    for result, goal, pair, (losses, after) in zip(results, goals, pairs, alone, strict=True):
        assert result.losses == pytest.approx(losses, rel=1e-9) and result.execution == "staged"
        assert same(values(*pair), after, 1e-9) and result.objective is goal


def test_what_no_graph_holds_is_trained_eagerly_and_one_after_the_other(monkeypatch):
    """A derivative inside the loss: the graph would have the right loss, and wrong gradients."""
    monkeypatch.setattr("ppvae.training.single.STAGE", 1)
    dreg = IWAE(4, "doubly_reparametrized")
    told = {"num_epochs": 2, "batch_size": 4, "objective": dreg, "progress": False}
    message = "objective: doubly_reparametrized takes a derivative inside the loss"
    (pair,), pairs = made(), made(build, 2)
    with traceless(*pair), one_warning(f"fit: runs eagerly; {message}"):
        alone = fit(*pair, data(), seed=1, **told)
    monkeypatch.undo()
    with traceless(), one_warning(f"fit_replicates: one after the other; {message}"):
        results = fit_replicates(pairs, data(), seeds=[1, 2], **told)
    assert results[0].losses == alone.losses and alone.execution == "eager"


def test_objectives_that_differ_in_more_than_a_schedule_have_no_common_graph():
    elbo, bits = OBJECTIVES["free bits"][0], OBJECTIVES["all"][0]
    for goals in ([elbo, IWAE(2)], [elbo, bits], [IWAE(2), IWAE(3)], [print, max]):
        with pytest.raises(ValueError, match="objective: they differ in more than their scheduled"):
            moving_fields(goals)
    assert moving_fields([OBJECTIVES["beta"][0]]) == moving_fields([torch.sin, torch.sin]) == ()
    assert moving_fields(OBJECTIVES["beta"]) == ("beta",)
    assert moving_fields(OBJECTIVES["sampled"]) == ("free_bits",)
    assert moving_fields([OBJECTIVES["warm up"][0]]) == ("beta",)
