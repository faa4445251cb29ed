"""Passes over graphs, and noise that is drawn at once: the same numbers in another way."""

import pytest
import torch
from cases import LONG
from pairs import build, data, made
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae import stage
from ppvae._scopes import unchecked
from ppvae.objectives import IWAE
from ppvae.staging.noise import joint_noise
from ppvae.staging.passes import clean, transpose_narrow
from ppvae.staging.vectorized import traced


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [3, 16, 40])
def test_products_of_few_columns_are_worked_out_the_other_way_round(columns, bias):
    def product(x, weight, offset):
        y = torch.addmm(offset, x, weight) if bias else x @ weight
        return y.view(-1)  # which wants rows one behind the other

    given = torch.randn(50, 20), torch.randn(20, columns), torch.randn(columns)
    graph = make_fx(product)(*given)
    transpose_narrow(graph.graph)
    graph.recompile()
    products = [node for node in graph.graph.nodes if "mm" in str(node.target)]
    graph(*given)
    turned = any("aten.t." in str(node.target) for node in graph.graph.nodes)
    assert len(products) == 1 and turned == (columns == 3)
    torch.testing.assert_close(graph(*given), product(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [3, 16, 40])
def test_products_of_many_are_turned_round_as_those_of_one(columns):
    given = torch.randn(4, 50, 20), torch.randn(4, 20, columns)
    graph = make_fx(lambda x, weight: torch.bmm(x, weight).view(-1))(*given)
    transpose_narrow(graph.graph)
    graph.recompile()
    turned = any("aten.permute." in str(node.target) for node in graph.graph.nodes)
    assert turned == (columns == 3)
    torch.testing.assert_close(graph(*given), torch.bmm(*given).view(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")
def test_sums_into_a_row_that_stands_for_many_are_compiled():
    """As the gradient of `Permute` has them, for replicates: a bug of the compiler."""

    def add(x):
        return torch.zeros(4, 3).expand(2, 4, 3).index_add(2, torch.arange(2, -1, -1), x)

    x = torch.randn(2, 4, 3)
    graph = traced(add, x, mode="fake")
    (sums,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.index_add.default)
    assert sums.args[0].target is torch.ops.aten.clone.default
    if not LONG:
        return
    with unchecked():  # torch.compile switches validation off for good
        torch.testing.assert_close(torch.compile(graph)(x), x.flip(2), rtol=0, atol=0)


def over(x):
    """Noise in the place of other numbers."""
    return x.clone().normal_()


def twice(x):
    """Noise in an empty tensor, that is drawn there again."""
    z = torch.empty_like(x)
    first = z.normal_().clone()
    return first, z.normal_()


@pytest.mark.parametrize("draw", [over, twice])
def test_noise_that_does_not_fill_an_empty_tensor_alone_is_that_of_the_program(draw):
    x = torch.randn(4, 3)
    graph = make_fx(draw, tracing_mode="fake")(x)
    clean(graph)
    torch.manual_seed(6)
    wanted = draw(x)
    torch.manual_seed(6)
    found = graph(x)
    assert all(map(torch.equal, *([each] if draw is over else each for each in (found, wanted))))


@pytest.mark.parametrize(
    ("rows", "objective", "at_once"),
    [
        (8, None, True),  # two latents: 16 numbers
        (9, None, False),
        (4, IWAE(4), True),
        (10, IWAE(2), False),
    ],
)
def test_noise_is_drawn_at_once_where_it_is_that_of_single_steps(rows, objective, at_once):
    staged = stage(*made()[0], data(10), objective=objective)
    given = [data(rows), *staged.program.settings(0)]
    joint = joint_noise(staged, given)
    assert (joint is not None) == at_once
    if joint is not None:
        for steps in (1, 2, 7):
            torch.manual_seed(4)
            apart = torch.stack([staged.noise(*given)[0] for _ in range(steps)])
            after = torch.get_rng_state()
            torch.manual_seed(4)
            assert torch.equal(joint(steps)[0], apart)
            assert torch.equal(torch.get_rng_state(), after)


def test_a_loss_without_noise_draws_none():
    staged = stage(*made(lambda: build("deterministic"))[0], data(10))
    before = torch.get_rng_state()
    joint = joint_noise(staged, [data(9), *staged.program.settings(0)])
    assert joint(5) == [] and torch.equal(torch.get_rng_state(), before)
