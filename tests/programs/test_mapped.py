"""Programs that write to parts of a tensor are run for many draws at once."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import FamilyGuide, families
from ppvae.programs.mapped import UNMAPPED, many, mapped
from ppvae.programs.matched_normals import matched
from ppvae.training.average import average_of
from ppvae.training.task import task_of, training_batches

SEEN = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)


def walk(draw):
    path = torch.zeros(3)
    path[0] = draw[0]
    for t in range(1, 3):
        path[t] = 0.5 * path[t - 1] + draw[t]
    return path.square().sum().sin()


def missing(draw):
    whole = SEEN.clone()
    whole[torch.tensor([True, False, True, False, True])] = draw
    return whole.cos().sum()


def added(draw):
    total = torch.ones(3)
    total += draw
    return total.exp().sum()


def triangle(draw):
    factor = torch.eye(3)
    factor[1, 0], factor[2, :2] = draw[0], draw[1:]
    return (factor @ factor.T).sum().exp()


def summed(draw):
    return draw.new_zeros(6).index_add(0, torch.tensor([0, 2, 2]), draw).square().sum()


def masked(draw):
    kept = torch.full((3,), 2.0) * draw
    kept[draw > 0] = 0.0
    return kept.sum() + torch.zeros(3, dtype=torch.int64).sum()


@pytest.mark.parametrize("one", [walk, missing, added, triangle, summed, masked])
def test_many_draws_are_each_of_them(one):
    draws = torch.randn(7, 3)
    torch.testing.assert_close(many(one, draws), torch.stack([one(draw) for draw in draws]))
    slopes, _ = many(torch.func.grad_and_value(one), draws)
    each = torch.stack([torch.func.grad(one)(draw) for draw in draws])
    torch.testing.assert_close(slopes, each)
    assert torch.equal(SEEN, torch.linspace(-1.0, 1.0, 5, dtype=SEEN.dtype))


def test_tensors_are_their_own_where_it_is_asked_for_and_a_decision_cannot_be_mapped():
    with pytest.raises(RuntimeError, match="inplace"):
        mapped(walk)(torch.randn(7, 3))
    with pytest.raises(UNMAPPED):
        many(lambda draw: draw.sum() if draw.sum() > 0 else -draw, torch.randn(7, 3))


def marks(x, y):
    """A regression of marks in three classes; Pyro fills their probabilities one by one."""
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.OrderedLogistic(x @ weight, torch.tensor([-1.0, 1.0])), obs=y)


def test_the_loss_of_a_model_that_fills_tensors_is_run_for_all_draws_together():
    args = torch.randn(9, 2), torch.arange(9) % 3
    guide = FamilyGuide(marks, families.full_rank)
    task = task_of(marks, guide, None, training_batches(marks, guide, args, None, ()))
    average = average_of(task)
    assert average.at_once > 1 and average.own
    values, normals = [p.detach() for p in task.parameters], matched(8, average.normals, 0)
    with torch.no_grad():
        alone = torch.stack([average.loss(values, row) for row in normals])
        torch.testing.assert_close(average.losses(values, normals), alone)
