"""Draws that are held fixed, the loss over them, and the error that they leave."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from global_latents import labelled, logistic, noise, prepared

from ppvae import FamilyGuide, families, fit
from ppvae._scopes import double_precision, private_modules
from ppvae.guides.chart import Chart
from ppvae.programs.matched_normals import matched
from ppvae.training.average import average_of
from ppvae.training.surface import Surface, spread_of


def test_many_draws_at_once_are_a_loop_over_them_in_doubles(single):
    """Though parameters and data are float32, and nothing of that is seen outside."""
    x, y = labelled()
    guide = FamilyGuide(logistic, families.full_rank)
    task = prepared(logistic, guide, (x, y))
    with double_precision(), private_modules():
        average = average_of(task)
        assert average.smooth and average.at_once > 1 and average.normals == 2
        values = [parameter.detach().double() for parameter in task.parameters]
        rows = matched(6, 2, seed=0)
        together = average.losses(values, rows)
        alone = torch.stack([average.loss(values, row) for row in rows])
    assert torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in guide.parameters()} == {torch.float32}
    assert together.dtype == torch.float64 and torch.allclose(together, alone, rtol=1e-12)
    # the same as it is written: -log p(y | w), and the divergence from the prior
    fn = guide.heads["w"](None)
    mean, factor = fn.mean.detach().double(), fn.scale_tril.detach().double()
    torch.set_default_dtype(torch.float64)
    w = mean + rows @ factor.T
    logits = w[:, :1] + w[:, 1:] * x.double()
    log_p = dist.Bernoulli(logits=logits).log_prob(y.double()).sum(-1)
    exact = -log_p + torch.distributions.kl_divergence(
        dist.MultivariateNormal(mean, scale_tril=factor),
        dist.MultivariateNormal(torch.zeros(2), 4 * torch.eye(2)),
    )
    assert torch.allclose(together, exact, rtol=1e-6)  # the parameters are of 24 bits


def test_operands_are_doubles_and_what_is_written_to_stays(single):
    """As tensors of a program's closure; with numbers that float32 would round."""
    narrow, wide = torch.ones(2, 2), torch.full((2,), 1 / 3, dtype=torch.float64)
    written, by_views = narrow.clone(), narrow.clone()
    with double_precision():
        assert narrow.dtype == torch.float32 and narrow.mT.dtype == torch.float32
        products = [narrow @ wide, torch.mv(narrow, wide), torch.cat([narrow[0], wide]), narrow / 3]
        written[0] = 3 * wide
        written.mul_(wide)
        written += wide
        by_views[1].mul_(0.5)
        by_views.view(4)[:2].add_(1.0)
    assert by_views.tolist() == [[2.0, 2.0], [0.5, 0.5]] and by_views.dtype == torch.float32
    assert all(product.dtype == torch.float64 for product in products)
    assert torch.equal(products[0], wide + wide) and torch.equal(products[3][0], wide)
    assert written.dtype == torch.float32 and torch.equal(written, torch.full((2, 2), 2 / 3))


def test_who_looks_no_more_leaves_operands_as_they_are_and_no_trace(single):
    narrow, before = torch.ones(2), torch._C._len_torch_function_stack()
    with double_precision() as doubles:
        assert not doubles.needed and (narrow / 3).dtype == torch.float64 and doubles.needed
        for _ in range(2):
            doubles.look_no_more()
            assert (narrow / 3).dtype == torch.float32 and torch.ones(2).dtype == torch.float64
            assert torch._C._len_torch_function_stack() == before
    assert torch.get_default_dtype() == torch.float32
    with double_precision() as doubles:
        assert torch.cat([torch.ones(2), 2 * torch.arange(2)]).dtype == torch.float64
    assert not doubles.needed and torch._C._len_torch_function_stack() == before


@pytest.mark.filterwarnings("ignore::ppvae.NarrowFamily")
def test_operands_are_looked_at_where_a_program_has_narrow_ones_or_may_have_some(single):
    """A fit of it ends where one that gets them as data does, to rounding of the parameters."""
    x, y = labelled()

    def model(columns, y, *, decides=False):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 4.0).to_event(1))
        if decides and w[0] > 10:
            w = columns[:2] @ w
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=columns @ w), obs=y)

    columns, found = torch.stack([torch.ones_like(x), x], -1), []
    for program, args in ((model, (columns, y)), (partial(model, columns), (y,))):
        for decides in (False, True):
            called = partial(program, decides=decides)
            task = prepared(called, FamilyGuide(called, families.full_rank), args)
            with double_precision(), private_modules():
                assert average_of(task).mixed == (decides or program is not model)
        guide = FamilyGuide(program, families.full_rank)
        fit(program, guide, args, progress=False, seed=0)
        found.append(guide.heads["w"](None).mean)
    assert torch.allclose(*found, rtol=1e-6)


def test_a_slope_is_the_gradient_of_the_mean_loss_in_any_chunks():
    task = prepared(logistic, FamilyGuide(logistic, families.full_rank), labelled())
    with double_precision(), private_modules():
        average = average_of(task)
        chart, rows = Chart(task.parameters, [], torch.eye(2)), matched(10, 2, seed=0)
        place = 0.1 * torch.arange(chart.size)
        losses, slope = average.slope(chart, place, rows)
        mean = lambda at: average.losses(chart(at), rows).mean()  # noqa: E731
        expected = torch.func.grad(mean)(place)
        surface = Surface(average, chart, rows)
        value = surface(place)
        assert surface.losses(place.clone())[1] is value[0]  # which is not worked out again
        average.at_once = 3
        assert [len(chunk) for chunk in average.chunks(rows)] == [3, 3, 3, 1]
        again, same = average.slope(chart, place, rows)
    assert torch.allclose(slope, expected, rtol=1e-10) and torch.allclose(slope, same, rtol=1e-10)
    assert torch.allclose(losses, again) and torch.allclose(value[1], losses.mean())
    assert torch.equal(value[0], slope)


def test_what_a_mask_chooses_may_be_written_in_many_draws_at_once():
    """As Pyro's splines write; what is read by a mask and used otherwise is a loop over draws."""

    def clipped(x, *, reads):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        tilted = 2 * w
        tilted[w > 0] = w[w > 0] if reads else 0.0
        mask = w < 0
        kept = tilted[mask]
        tilted.mul_(3)
        tilted[mask] = kept
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(tilted.sum(), 1.0), obs=x)

    for reads in (False, True):
        model = partial(clipped, reads=reads)
        task = prepared(model, FamilyGuide(model, families.mean_scale), noise(4))
        with double_precision(), private_modules(), torch.no_grad():
            average, rows = average_of(task), matched(8, 2, seed=0)
            assert (average.at_once > 1) == (not reads)
            values = [parameter.detach() for parameter in task.parameters]
            alone = torch.stack([average.loss(values, row) for row in rows])
            assert torch.allclose(average.losses(values, rows), alone, rtol=1e-12)


def test_the_error_of_a_mean_over_matched_draws_is_that_over_seeds():
    """Of products of two numbers there is none.

    A variance of 600 means has an error of 6 %, and what is told errs on the safe side.
    """

    def scores(normals):
        x, y = normals.T
        return torch.stack([1 + x * y - 3 * y.square(), x.cos() + x.pow(3), (x * y).square() + x])

    runs = [matched(256, 2, seed) for seed in range(600)]
    told = torch.stack([spread_of(scores(normals), normals).diagonal() for normals in runs]).mean(0)
    true = torch.stack([scores(normals).mean(1) for normals in runs]).var(0)
    assert told[0] < 1e-25 and true[0] < 1e-25
    assert ((told / true)[1:] > 1 - 3 * 0.06).all() and ((told / true)[1:] < 1.5).all()
    few = matched(8, 2, seed=0)  # which cannot tell one part of a score from another
    assert spread_of(scores(few), few)[0, 0] > 0.01
