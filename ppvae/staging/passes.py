"""Passes over a traced graph: what is left to run, and the noise taken out of it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_sized = torch.ops.aten.sym_size.int


_new_empty = torch.ops.aten.new_empty.default


_DRAWN = {
    torch.ops.aten.normal_.default: torch.ops.aten.randn.default,
    torch.ops.aten.uniform_.default: torch.ops.aten.rand.default,
}


def _places(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def clean(module: fx.GraphModule) -> None:
    """Inlines the stretches without gradients and drops every node that nothing uses."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            _inline(module, node)
    for node in list(graph.nodes):
        _rewrite(graph, node)
    drop_unused(graph)
    module.delete_all_unused_submodules()
    module.recompile()


def drop_unused(graph: fx.Graph) -> None:
    """Erases what nothing uses, but no draw of random numbers: the next ones would be others."""
    for node in reversed(list(graph.nodes)):
        idle = node.op in ("call_function", "get_attr") and not node.users
        if idle and not (_writes_outside(node) or _is_random(node)):
            graph.erase_node(node)


def spell_sizes(graph: fx.Graph) -> None:
    """Writes the number of elements of a tensor as a product of sizes, which can be compiled."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.sym_numel.default:
            with graph.inserting_before(node):
                total: Any = 1
                for dim in range(node.args[0].meta["val"].dim()):
                    size = graph.call_function(_sized, (node.args[0], dim))
                    total = graph.call_function(operator.mul, (total, size))
            node.replace_all_uses_with(total)
            graph.erase_node(node)


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    """Writes a node in operations that can be vectorized, with the same numbers."""
    aten = torch.ops.aten
    with graph.inserting_before(node):
        if node.target is aten.lift_fresh_copy.default:
            _replace(node, graph.call_function(aten.clone.default, node.args))
        elif node.target is aten.index_put_.default and _is_masked(node):
            # x[mask] = y[mask], or a number: sizes must not depend on how many are selected
            arguments: Any = node.args
            into, (mask,), value = arguments
            value = value.args[0] if value.target is aten.index.Tensor else value
            chosen = graph.call_function(aten.where.self, (mask, value, into))
            _replace(node, graph.call_function(aten.copy_.default, (into, chosen)))
        elif node.target in _DRAWN and len(node.args) == 1 and _is_blank(node.args[0]):
            like = node.meta["val"]  # the same numbers of a seed
            size = node.args[0].args[-1]  # type: ignore[union-attr]
            told = {"dtype": like.dtype, "device": like.device}
            _replace(node, graph.call_function(_DRAWN[node.target], (size,), told))
        elif _is_mutable(node) and (not _is_random(node) or _is_blank(node.args[0])):
            if not _is_alone(node.args[0]):
                return
            packet, overload = str(node.target).removeprefix("aten.").split(".")
            pure = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
            if packet.endswith("_") and pure is not None:
                _replace(node, graph.call_function(pure, node.args, node.kwargs))


def _is_blank(node: Any) -> bool:
    """Whether a node makes a tensor without numbers, for one other that fills it."""
    made = node.target in (_new_empty, torch.ops.aten.empty.memory_format)
    return made and len(node.users) == 1


def _replace(node: fx.Node, new: fx.Node) -> None:
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _is_masked(node: fx.Node) -> bool:
    """Whether elements are put where a mask of the same shape says, each in its own place."""
    if len(node.args) > 3 or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return False
    arguments: Any = node.args
    into, (mask,), value = arguments
    depth = into.meta["val"].dim()
    if mask.meta["val"].dtype != torch.bool or mask.meta["val"].dim() != depth:
        return False
    if value.target is torch.ops.aten.index.Tensor:
        source, chosen = value.args
        return list(chosen) == [mask] and source.meta["val"].dim() == depth
    return value.meta["val"].dim() == 0


def _is_alone(node: Any) -> bool:
    """Whether a node makes a new tensor that only one other uses, and as a whole."""
    returns = getattr(getattr(node, "target", None), "_schema", None)
    fresh = returns is not None and all(r.alias_info is None for r in returns.returns)
    return fresh and len(node.users) == 1 and node.op == "call_function"


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    """Puts the body of `with torch.set_grad_enabled(...)` in its place, results detached."""
    enabled, body, *inputs = node.args
    inner = getattr(module, str(body.target))  # type: ignore[union-attr]
    for part in list(inner.graph.nodes):
        if part.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            _inline(inner, part)
    places = [part for part in inner.graph.nodes if part.op == "placeholder"]
    into = dict(zip(places, inputs, strict=True))
    graph = module.graph
    with graph.inserting_before(node):
        for part in inner.graph.nodes:
            if part.op == "get_attr":
                setattr(module, name := f"{body.target}_{part.target}", getattr(inner, part.target))  # type: ignore[union-attr]
                into[part] = graph.get_attr(name)
            elif part.op not in ("placeholder", "output"):
                into[part] = graph.node_copy(part, into.__getitem__)
        (out,) = (part for part in inner.graph.nodes if part.op == "output")
        results = []
        for part in out.args[0]:
            result = into[part] if isinstance(part, fx.Node) else part
            if not enabled and isinstance(result, fx.Node) and _is_tensor(result):
                value = result.meta["val"]
                result = graph.call_function(torch.ops.aten.detach.default, (result,))
                result.meta["val"] = value
            results.append(result)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(node)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


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
    return not all(_is_fresh(w) and len(w.users) == 1 for w in written)


def _is_fresh(node: fx.Node) -> bool:
    """Whether a node makes a tensor of its own, of which nothing else can be a view."""
    tensors = [part for part in node.all_input_nodes if _is_tensor(part)]
    return node.op == "call_function" and (not tensors or node.target is _new_empty)


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _is_random(node: fx.Node) -> bool:
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
        if node.op == "call_function" and _is_random(node):
            if not _depends_on_shapes(node):
                break
            drawn.append(node)
    noise = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    wanted = _ancestors(drawn) | set(_places(graph)[state:])
    for node in graph.nodes:
        if node.target is _new_empty and node in wanted:  # like a parameter, but none is needed
            like, size = node.meta["val"], fx.map_arg(node.args[1], copies.__getitem__)
            told = {"dtype": like.dtype, "device": like.device}
            copies[node] = noise.call_function(torch.ops.aten.empty.memory_format, (size,), told)
        elif node in wanted:
            copies[node] = noise.node_copy(node, copies.__getitem__)
    noise.output(tuple(copies[node] for node in drawn))
    last = _places(rest)[-1]
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
        part.op == "call_function" and (part is node or not _is_random(part))
        for part in _ancestors([node])
    )


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that some nodes are made from, with themselves; sizes of an argument are leaves."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found.add(node)
        if node.target is _new_empty:
            todo += [size for size in node.args[1] if isinstance(size, fx.Node)]  # type: ignore
        elif not (node.target is _sized and node.args[0].op == "placeholder"):  # type: ignore
            todo += node.all_input_nodes
    return found
