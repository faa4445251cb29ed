"""The losses and gradients of replicates as one graph, for minibatches of any size.

`torch.vmap` writes sizes as numbers. So the graph is made for two minibatches, whose sizes are
primes that nothing else is a multiple of; what differs between the two are sizes and their
products and quotients, and becomes these again.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ppvae.staging.passes import copy_before_adding, drop_unused, spell_sizes
from ppvae.staging.staged import Like, NotStageable, Staged

# from leaves, state and data to the losses and their slopes at the leaves
Slopes = Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]


def vectorized(
    staged: Staged, slopes: Slopes, leaves: list[Tensor], state: list[Tensor], data: list[Tensor]
) -> fx.GraphModule:
    """The graph of a function of replicates, by `torch.vmap`, for data of any size.

    Args:
        staged: the loss of one.
        slopes: the function.
        leaves: its arguments, with a first dimension of replicates.
        state: likewise.
        data: likewise.

    Raises:
        NotStageable: the loss is for minibatches of one size, or depends on it otherwise.
    """
    leaves = [leaf.detach().clone() for leaf in leaves]  # what is one tensor is traced as one
    names = staged.sizes
    taken = {size for value in (*state, *data) for size in value.shape if size}
    primes = (p for p in _primes() if all(size % p for size in taken))
    told = [dict(zip(names, itertools.islice(primes, len(names)), strict=True)) for _ in range(2)]
    graphs = []
    for sizes in told if names else told[:1]:
        resized = of_sizes(staged, data, sizes)
        if resized is None:
            raise NotStageable("the graph is for minibatches of one size only")
        graphs.append(traced(slopes, leaves, state, resized, mode="fake"))
    if names:
        first = len(leaves) + len(state)
        tensors = [like for like in staged.shapes if isinstance(like, Like)]
        places = {
            size: (first + at, dim + 1)
            for at, like in enumerate(tensors)
            for dim, size in enumerate(like.shape)
            if isinstance(size, str)
        }
        _make_sizes(graphs[0], graphs[1], told[0], told[1], places)
    return graphs[0]


def traced(slopes: Slopes, *arguments: list[Tensor], mode: Any) -> fx.GraphModule:
    """The graph of a function of leaves, state and data."""
    graph = make_fx(slopes, tracing_mode=mode)(*arguments)
    spell_sizes(graph.graph)
    copy_before_adding(graph.graph)
    drop_unused(graph.graph)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # parameters may be parts of one tensor
    graph.recompile()
    return graph


def of_sizes(staged: Staged, data: list[Tensor], sizes: Mapping[str, int]) -> list[Tensor] | None:
    """Data of replicates in other sizes; see `Staged.resized`."""
    each = [staged.resized([value[k] for value in data], sizes) for k in range(len(data[0]))]
    if None in each:
        return None
    return [torch.stack(values) for values in zip(*each, strict=True)]


def _primes() -> Iterator[int]:
    """Primes that are large enough not to be a number of something else by chance."""
    for number in itertools.count(29, 2):
        if all(number % factor for factor in range(3, math.isqrt(number) + 1, 2)):
            yield number


def _make_sizes(
    graph: fx.GraphModule,
    other: fx.GraphModule,
    sizes: Mapping[str, int],
    others: Mapping[str, int],
    places: Mapping[str, tuple[int, int]],
) -> None:
    """Writes the numbers that differ between two graphs as products of sizes.

    Args:
        graph: where they are written.
        other: the same for other sizes.
        sizes: of the minibatch of the first graph.
        others: of that of the second.
        places: for each size which argument has it, and in which dimension.
    """
    nodes, twins = list(graph.graph.nodes), list(other.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    known: dict[Any, Any] = {}
    with graph.graph.inserting_after(inputs[-1]):
        for name, (at, dim) in places.items():
            known[name] = graph.graph.call_function(torch.ops.aten.sym_size.int, (inputs[at], dim))
    same: dict[Any, Any] = {}

    def size(one: Any, two: Any) -> Any:
        if isinstance(one, fx.Node):
            if same.get(two) is not one:
                raise NotStageable("the graph differs with the size of a minibatch")
            return one
        if type(one) is not type(two):
            raise NotStageable("the graph differs with the size of a minibatch")
        if one == two or (one != one and two != two):
            return one
        return _product(graph.graph, one, two, sizes, others, known)

    for node, twin in zip(nodes, twins, strict=True):
        if (node.op, node.target) != (twin.op, twin.target):
            raise NotStageable("the graph differs with the size of a minibatch")
        same[twin] = node
        if node.op == "get_attr":
            pair = getattr(graph, node.target), getattr(other, node.target)
            if not torch.equal(*pair):
                raise NotStageable("a constant of the graph depends on the size of a minibatch")
        (ones, form), (twos, _) = (tree_flatten((n.args, dict(n.kwargs))) for n in (node, twin))
        with graph.graph.inserting_before(node):
            found = [size(one, two) for one, two in zip(ones, twos, strict=True)]
        node.args, node.kwargs = tree_unflatten(found, form)
    graph.recompile()


def _product(
    graph: fx.Graph,
    one: Any,
    two: Any,
    sizes: Mapping[str, int],
    others: Mapping[str, int],
    known: Mapping[str, fx.Node],
) -> Any:
    """A number that is `one` for `sizes` and `two` for `others`, as a product or a quotient."""
    if isinstance(one, (int, float)):
        for several in range(1, max(2, len(sizes)) + 1):  # a square is one of two
            for names in itertools.combinations_with_replacement(sizes, several):
                p, q = (math.prod(each[name] for name in names) for each in (sizes, others))
                if one * q == two * p and (isinstance(one, float) or one % p == 0):
                    result: Any = one // p if isinstance(one, int) else one / p
                    for name in names:
                        result = graph.call_function(operator.mul, (result, known[name]))
                    return result
                if isinstance(one, float) and math.isclose(one * p, two * q, rel_tol=1e-14):
                    result = one * p
                    for name in names:
                        result = graph.call_function(operator.truediv, (result, known[name]))
                    return result
    raise NotStageable("the graph depends on the size of a minibatch by more than products of it")
