"""Graph passes: drop idle nodes, replace writes in place, and move random draws to the inputs.

`torch.export` leaves the operations as they were called, with writes in place, stretches without
gradients in graphs of their own, and random draws in the middle. A graph that is to be vectorized
by `torch.vmap`, differentiated and compiled must have none of these, and yet give every number of
the program, to the last bit and for the same seed.
"""

import operator
from typing import Any

import torch
from torch import fx

_SIZE = torch.ops.aten.sym_size.int
_NEW_EMPTY = torch.ops.aten.new_empty.default
_EMPTY = torch.ops.aten.empty.memory_format
_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled

# Draws that fill an empty tensor, and those that make the same numbers in a new one.
_DRAWS = {
    torch.ops.aten.normal_.default: torch.ops.aten.randn.default,
    torch.ops.aten.uniform_.default: torch.ops.aten.rand.default,
}


def clean(module: fx.GraphModule) -> None:
    """Inlines the stretches without gradients, rewrites writes in place, and drops what is idle."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=_SET_GRAD):
        _inline(module, node)
    for node in list(graph.nodes):
        _rewrite(graph, node)
    _own_what_is_written(graph)
    drop_unused(graph)
    module.delete_all_unused_submodules()
    module.recompile()


def drop_unused(graph: fx.Graph) -> None:
    """Erases nodes that nothing uses, except random draws: without one the next would change."""
    ends = ("placeholder", "output")
    graph.eliminate_dead_code(lambda n: n.op in ends or _writes_outside(n) or is_random(n))


def spell_sizes(graph: fx.Graph) -> None:
    """Writes the number of elements of a tensor as a product of sizes, which can be compiled."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_numel.default):
        with graph.inserting_before(node):
            total: Any = 1
            for dim in range(node.args[0].meta["val"].dim()):
                size = graph.call_function(_SIZE, (node.args[0], dim))
                total = graph.call_function(operator.mul, (total, size))
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def copy_before_adding(graph: fx.Graph) -> None:
    """Copies what `index_add` and `index_put` add to.

    PyTorch's compiler gives wrong sums where that is one row in the place of many (`expand`).
    """
    aten = torch.ops.aten
    for target in (aten.index_add.default, aten.index_put.default):
        for node in graph.find_nodes(op="call_function", target=target):
            like: dict[str, Any] = {"memory_format": torch.contiguous_format}
            with graph.inserting_before(node):
                into = graph.call_function(aten.clone.default, node.args[:1], like)
            into.meta["val"] = node.meta["val"]
            node.update_arg(0, into)


_FEW = 32  # columns, from which on a product is as fast as that of its transposed factors


def transpose_narrow(graph: fx.Graph) -> None:
    """Works out products of few columns as `(B' A')'`, as libraries do them faster on a CPU.

    128 x 256 by 256 x 8 takes 39 us in MKL (one core of an AMD EPYC), and its transpose 11; only
    multiples of 16 are well done either way.
    """
    aten = torch.ops.aten
    products: Any = (  # of one pair or of many, the same without a bias, and a transpose
        (aten.mm.default, aten.mm.default, aten.t.default, ()),
        (aten.addmm.default, aten.mm.default, aten.t.default, ()),
        (aten.bmm.default, aten.bmm.default, aten.permute.default, ([0, 2, 1],)),
    )
    for target, product, turn, order in products:
        skip = int(target is aten.addmm.default)
        for node in graph.find_nodes(op="call_function", target=target):
            value = node.meta["val"]
            columns = value.shape[-1]
            narrow = isinstance(columns, int) and columns < _FEW and columns % 16
            if not narrow or node.kwargs or value.device.type != "cpu":
                continue
            with graph.inserting_before(node):
                turned = [graph.call_function(turn, (v, *order)) for v in node.args[skip:]]
                new = graph.call_function(product, tuple(turned[::-1]))
                new = graph.call_function(turn, (new, *order))
                if skip:
                    new = graph.call_function(aten.add.Tensor, (new, node.args[0]))
                like: dict[str, Any] = {"memory_format": torch.contiguous_format}  # for its views
                new = graph.call_function(aten.clone.default, (new,), like)
            _replace(node, new)


def _rewrite(graph: fx.Graph, node: Any) -> None:
    """Writes a node in operations that can be vectorized, with the same numbers."""
    aten = torch.ops.aten
    with graph.inserting_before(node):
        if node.target is aten.lift_fresh_copy.default:  # of a constant; `vmap` has no rule for it
            _replace(node, graph.call_function(aten.clone.default, node.args))
        elif node.target is aten.index_put_.default and (source := _masked_source(node)):
            # x[mask] = y[mask], or a number: sizes must not depend on how many are selected
            into, (mask,) = node.args[:2]
            chosen = graph.call_function(aten.where.self, (mask, source, into))
            _replace(node, graph.call_function(aten.copy_.default, (into, chosen)))
        elif node.target in _DRAWS and len(node.args) == 1 and _is_blank(node.args[0]):
            like = node.meta["val"]
            size = node.args[0].args[-1]
            options = {"dtype": like.dtype, "device": like.device}
            _replace(node, graph.call_function(_DRAWS[node.target], (size,), options))
        elif node.target is aten.dropout.default and (sizes := _sizes(graph, node)):
            # the mask depends on nothing but sizes, so that it can be drawn before all else
            value, rate, training = node.args
            if training and 0 < rate < 1:
                keep = graph.call_function(aten.new_empty.default, (value, sizes))
                keep.meta["val"] = node.meta["val"]
                keep = graph.call_function(aten.bernoulli.p, (keep, 1 - rate))
                keep.meta["val"] = node.meta["val"]
                scale = graph.call_function(aten.div.Scalar, (keep, 1 - rate))
                _replace(node, graph.call_function(aten.mul.Tensor, (value, scale)))
        elif _is_mutable(node) and _is_alone(node.args[0]):
            # `x.add_(y)` on a new tensor that nothing else sees is `x.add(y)`
            packet, overload = str(node.target).removeprefix("aten.").split(".")
            pure = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
            filled = not is_random(node) or _is_blank(node.args[0])
            if packet.endswith("_") and pure is not None and filled:
                _replace(node, graph.call_function(pure, node.args, node.kwargs))


def _own_what_is_written(graph: fx.Graph) -> None:
    """Makes a new tensor that is written to depend on an input, by a zero that is added.

    A model may make `torch.zeros(...)` and fill it piece by piece. Under `torch.vmap` an input is
    one of many, and so is what is made from it: each of them can be written to.
    """
    aten, places = torch.ops.aten, graph.find_nodes(op="placeholder")
    first = next((p for p in places if isinstance(p.meta.get("val"), torch.Tensor)), None)
    for node in list(graph.nodes):
        made = node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
        writers = _writers(node) if made and first else []
        if not writers or any(map(is_random, writers)) or not _depends_on_shapes(node):
            continue
        value = node.meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        with graph.inserting_before(node.next):
            zero = graph.call_function(aten.new_zeros.default, (first, []), options)
            own = graph.call_function(aten.add.Tensor, (node, zero))
        zero.meta["val"], own.meta["val"] = value.new_zeros(()), value
        node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)


def _writers(node: fx.Node) -> list[fx.Node]:
    """The nodes that write to what a node made, through views of it, too."""
    writers: list[fx.Node] = []
    todo = [node]
    while todo:
        here = todo.pop()
        for user in here.users:
            schema = getattr(user.target, "_schema", None)
            told = zip(user.args, schema.arguments if schema else (), strict=False)
            kinds = [argument.alias_info for value, argument in told if value is here]
            if any(kind is not None and kind.is_write for kind in kinds):
                writers.append(user)
            if any(kinds) or user.target is operator.getitem:
                todo.append(user)
    return writers


def _sizes(graph: fx.Graph, node: Any) -> list[Any] | None:
    """The shape of a node, by numbers and sizes of arguments; None if it is not to be had so."""
    places = graph.find_nodes(op="placeholder")
    known = {
        str(size): (place, dim)
        for place in places
        if isinstance(place.meta.get("val"), torch.Tensor)
        for dim, size in enumerate(place.meta["val"].shape)
    }
    sizes: list[Any] = []
    for size in node.meta["val"].shape:
        if isinstance(size, int):
            sizes.append(size)
        elif str(size) in known:
            sizes.append(graph.call_function(_SIZE, known[str(size)]))
            sizes[-1].meta["val"] = size
        else:
            return None
    return sizes


def _is_blank(node: Any) -> bool:
    """Whether a node makes an empty tensor that a single other node fills."""
    return node.target in (_NEW_EMPTY, _EMPTY) and len(node.users) == 1


def _replace(node: fx.Node, new: fx.Node) -> None:
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _masked_source(node: Any) -> Any:
    """The `y` of `x[mask] = y[mask]`, or a number in its place; None, if a node is no such write.

    The mask has the shape of `x` and of `y`, so that each element goes to its own place.
    """
    into, masks, value, *accumulate = node.args
    depth = into.meta["val"].dim()
    mask = masks[0].meta["val"] if len(masks) == 1 else None
    if accumulate or mask is None or mask.dtype != torch.bool or mask.dim() != depth:
        return None
    if value.target is torch.ops.aten.index.Tensor:
        source, chosen = value.args
        return source if list(chosen) == list(masks) and source.meta["val"].dim() == depth else None
    return value if value.meta["val"].dim() == 0 else None


def _is_alone(node: Any) -> bool:
    """Whether a node makes a new tensor that only one other uses, and as a whole."""
    returns = getattr(getattr(node, "target", None), "_schema", None)
    fresh = returns is not None and all(r.alias_info is None for r in returns.returns)
    return fresh and len(node.users) == 1 and node.op == "call_function"


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    """Puts the body of `with torch.set_grad_enabled(...)` in its place, results detached."""
    enabled, body, *inputs = node.args
    inner: Any = getattr(module, str(body.target))  # type: ignore[union-attr]
    for part in inner.graph.find_nodes(op="call_function", target=_SET_GRAD):
        _inline(inner, part)
    for part in inner.graph.find_nodes(op="get_attr"):
        name = f"{body.target}_{part.target}"  # type: ignore[union-attr]
        setattr(module, name, getattr(inner, part.target))
        part.target = name
    into = dict(zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True))
    graph = module.graph
    with graph.inserting_before(node):
        results = list(graph.graph_copy(inner.graph, into))  # type: ignore[arg-type]
        for at, result in enumerate(results):
            value = result.meta.get("val") if isinstance(result, fx.Node) else None
            if not enabled and isinstance(value, torch.Tensor):
                results[at] = graph.call_function(torch.ops.aten.detach.default, (result,))
                results[at].meta["val"] = value
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(node)


def _writes_outside(node: fx.Node) -> bool:
    """Whether a node writes to something that others may read."""
    if not _is_mutable(node):
        return False
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    written: list[Any] = [
        value
        for value, argument in zip(node.args, arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return not all(map(_is_alone, written))


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def split_noise(graph: fx.Graph, state: int) -> tuple[fx.Graph, fx.Graph]:
    """Splits a graph in two: one that draws noise, and one that takes it as its last arguments.

    Noise is a random number that depends on nothing but shapes, such as a standard normal. Only the
    draws before the first of another kind (a gamma whose shape was computed) move, so that the
    order of drawing stays, and with it every number of a seed.

    Args:
        graph: a graph; it is left alone.
        state: how many arguments at the front are no data, of which the noise needs none.

    Returns:
        The graph of the noise, which takes the data and returns a tuple; and the rest.
    """
    rest = fx.Graph()
    into: dict[fx.Node, fx.Node] = {}
    rest.output(rest.graph_copy(graph, into))
    drawn = []
    for node in graph.nodes:
        if node.op == "call_function" and is_random(node):
            if not _depends_on_shapes(node):
                break
            drawn.append(node)
    noise = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    wanted = _ancestors(drawn) | set(graph.find_nodes(op="placeholder")[state:])
    for node in graph.nodes:
        if node.target is _NEW_EMPTY and node in wanted:  # like a parameter, but none is needed
            like, size = node.meta["val"], fx.map_arg(node.args[1], copies.__getitem__)
            options = {"dtype": like.dtype, "device": like.device}
            copies[node] = noise.call_function(_EMPTY, (size,), options)
        elif node in wanted:
            copies[node] = noise.node_copy(node, copies.__getitem__)
    noise.output(tuple(copies[node] for node in drawn))
    last = rest.find_nodes(op="placeholder")[-1]
    for number, node in enumerate(drawn):
        with rest.inserting_after(last):
            last = rest.placeholder(f"noise_{number}")
        last.meta["val"] = node.meta["val"]
        into[node].replace_all_uses_with(last)
        rest.erase_node(into[node])
    drop_unused(rest)
    return noise, rest


def _depends_on_shapes(node: fx.Node) -> bool:
    """Whether nothing but the shapes of arguments and constants leads to a node."""
    return not _writes_outside(node) and all(
        part.op == "call_function" and (part is node or not is_random(part))
        for part in _ancestors([node])
    )


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that some nodes are made from, with themselves; sizes of an argument are leaves."""
    ancestors: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in ancestors:
            continue
        ancestors.add(node)
        if node.target is _NEW_EMPTY:
            todo += [size for size in node.args[1] if isinstance(size, fx.Node)]  # type: ignore
        elif not (node.target is _SIZE and node.args[0].op == "placeholder"):  # type: ignore
            todo += node.all_input_nodes
    return ancestors
