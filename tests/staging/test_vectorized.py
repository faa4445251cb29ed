"""Losses and gradients of replicates as one graph, for minibatches of any size."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from ppvae.staging.staged import NotStageable
from ppvae.staging.vectorized import vectorized


class Sized(SimpleNamespace):
    """What is asked of a staged loss of one matrix, of so many rows."""

    sizes = ("rows",)

    def resized(self, data, sizes):
        (x,) = data
        return [x[torch.arange(sizes["rows"]) % len(x)]]


def made_for(function, rows=6):
    """The graph of a function of a matrix, for two replicates, and the function."""
    from ppvae.staging.staged import Like

    staged = Sized(shapes=[Like(("rows", 3), torch.get_default_dtype(), torch.device("cpu"))])
    several = torch.vmap(lambda leaves, state, data: (function(*data), []))
    return vectorized(staged, several, [], [], [torch.randn(2, rows, 3)]), several


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flatten()[: 2 * len(x)].view(-1, 2).sum(),
        lambda x: (x @ x.T).mean() * (12.0 / len(x)),
        lambda x: x.sum() / len(x) ** 2 + len(x) * x.mean(),
        lambda x: torch.linalg.solve_triangular(
            x.T[:, :3].expand(len(x), 3, 3).tril() + 9 * torch.eye(3), x[:, :, None], upper=False
        ).sum(),
        lambda x: torch.nn.functional.conv1d(x[:, None], torch.ones(2, 1, 2)).flatten(1).sum(),
    ],
)
def test_a_graph_is_for_any_size(function):
    graph, several = made_for(function)
    assert isinstance(graph, fx.GraphModule)
    for rows in (3, 6, 7, 29, 64):
        x = [torch.randn(2, rows, 3)]
        torch.testing.assert_close(graph([], [], x)[0], several([], [], x)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum() * math.log(len(x)),
        lambda x: x.sum() if len(x) > 30 else x.mean(),
        lambda x: x[: len(x) - 1].sum() / (len(x) - 1),
    ],
)
def test_what_depends_on_a_size_otherwise_has_a_graph_for_each(function):
    with pytest.raises(NotStageable, match="graph .* the size of a minibatch"):
        made_for(function)
