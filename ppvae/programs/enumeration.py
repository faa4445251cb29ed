"""Sums finite discrete latents out of a model, exactly, so that a guide need not draw them.

A run of a model with such latents takes every one of their values at once, in dims of tensors to
the left of all plates, as in `pyro.infer.TraceEnum_ELBO`; and `summed_out` contracts the factors of
the density that depend on them, by Pyro's own tensor variable elimination. What is left is a trace
like any other: of continuous latents and observations.
"""

import math
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._checks import expect
from ppvae.programs.masks import log_prob
from ppvae.programs.nodes import Node, counts, is_finite_discrete, trace_of
from ppvae.programs.plates import depth_of

Tree = OrderedDict[Any, list[Tensor]]  # plates, as symbols -> factors of the density, packed


class Factor(NamedTuple):
    """A node of which the density depends on discrete latents, and that density, packed."""

    node: Node
    value: Any


class Component(NamedTuple):
    """Factors that share discrete latents.

    Attributes:
        factors: the nodes, discrete latents among them, in the order of the model.
        symbols: of the dims that are summed over.
    """

    factors: list[Factor]
    symbols: frozenset[str]

    @property
    def discrete(self) -> list[Node]:
        """The discrete latents."""
        return [factor.node for factor in self.factors if _is_enumerated(factor.node)]


class SummedTrace(poutine.Trace):
    """A trace without the discrete latents that were summed out of it.

    Attributes:
        components: the factors that depend on them.
        enumerated: the trace with all their values.
    """

    components: list[Component]
    enumerated: Any


class Summed(dist.TorchDistribution):
    """The distribution of a site with discrete latents summed out, at the one value that it has.

    Args:
        fn: the distribution of the site given the discrete latents, with dims for their values.
        log_density: what is left at the value, by batch element.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, fn: Any, log_density: Tensor, batch_shape: torch.Size) -> None:
        self.given, self._log_density = fn, log_density
        super().__init__(batch_shape, fn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the site."""
        return self.given.support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the site is reparametrized given the discrete latents."""
        return bool(self.given.has_rsample)

    @property
    def fixed_support(self) -> bool:
        """Whether the support is the same whatever the latents are."""
        return getattr(self.given, "fixed_support", False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density at the value of the site, in nats; of no other."""
        return self._log_density


class _Enumerate(EnumMessenger):
    """Takes all values of each finite discrete latent, but of some.

    It is to be the innermost handler, so that it sees every site before others give it a value.
    """

    def __init__(self, outermost: int, known: Container[str]) -> None:
        super().__init__(outermost)
        self.known = known

    def _pyro_sample(self, msg: Any) -> None:
        waits = not (msg["is_observed"] or msg["name"] in self.known or site_is_subsample(msg))
        if waits and counts(msg) and is_finite_discrete(msg["fn"]):
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}
        super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        """Keeps in which dims a value is enumerated; asks for no `data`, which `vmap` lacks."""
        known = self._param_dims.get(msg["name"])
        if known is None or not isinstance(msg["value"], Tensor):
            return
        dims = msg["infer"].setdefault("_dim_to_id", {})
        dims.update(known)
        shape = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
        wide = {dim for dim in dims if len(shape) >= -dim and shape[dim] > 1}
        self._value_dims[msg["name"]] = {dim: dims[dim] for dim in wide}


def enumerated_trace(
    model: Any, known: Any, args: tuple[Any, ...], draws: Any, leftmost: int
) -> Any:
    """A trace of a model in which finite discrete latents have all their values at once.

    Args:
        model: the model.
        known: a trace with the values of its other latents.
        args: its arguments.
        draws: the plate of draws, or None.
        leftmost: dim of the leftmost plate of the model.
    """
    outermost = leftmost - 2  # beyond the draws
    program = poutine.replay(_Enumerate(outermost, known)(model), trace=known)
    try:
        with draws if draws is not None else nullcontext():
            return trace_of(program, args)
    except (IndexError, RuntimeError, ValueError) as error:
        wanted = (
            "operations that leave leading dims alone, since all values of the discrete latents"
        )
        raise ValueError(f"model: expected {wanted} are taken at once; got {error}") from error


def summed_out(trace: Any) -> SummedTrace:
    """A trace without the discrete latents that `enumerated_trace` gave all values.

    The log density that they leave is that of the last observed site that depends on them; those of
    the others are zero. Where the sum runs over more than one member of a plate around that site
    (a discrete latent of all the data), it is a factor of its own, named like the discrete site.
    Continuous latents that depend on discrete ones have the density in which those are summed out.

    Raises:
        ValueError: the densities have different scales (`poutine.scale`), which no sum can have.
        NotImplementedError: plates are nested such that no sum over members factorises.
    """
    components = list(_components(trace))
    replaced: dict[str, Node] = {}
    extra: dict[str, Node] = {}
    for component in components:
        latent = [f for f in component.factors if not f.node["is_observed"]]
        continuous = [f for f in latent if not _is_enumerated(f.node)]
        seen = [f for f in component.factors if f.node["is_observed"]]
        _check_scales(component)
        for factor in [*continuous, *seen]:
            replaced[factor.node["name"]] = _with(factor.node, factor.value.new_zeros(()))
        before: list[tuple[frozenset[str], Tensor]] = []
        if continuous:
            before = _contracted(latent, component.symbols)
            last = continuous[-1].node
            one = len(before) == 1 and before[0][0] == _ordinal(trace, last)
            if one:
                replaced[last["name"]] = _with(last, packed.unpack(before[0][1], _dims(trace)))
            before = before if one else []
        if not seen:
            continue
        ((ordinal, value),) = _contracted(component.factors, component.symbols)
        value = packed.unpack(value, _dims(trace))
        for _, prior in before:
            value = value - _summed_to(packed.unpack(prior, _dims(trace)), trace, prior, ordinal)
        last = seen[-1].node
        if ordinal == _ordinal(trace, last):
            replaced[last["name"]] = _with(last, value)
        else:
            name = component.discrete[0]["name"]
            frames = tuple(
                f for f in last["cond_indep_stack"] if trace.plate_to_symbol.get(f.name) in ordinal
            )
            unit = {**last, "name": name, "cond_indep_stack": frames, "value": torch.zeros(0)}
            extra[name] = {**unit, "fn": dist.Unit(value), "mask": None}
    left = SummedTrace()
    gone = {node["name"] for component in components for node in component.discrete}
    for name, node in trace.nodes.items():
        if name in extra:
            left.add_node(name, **extra[name])
        elif name not in gone:
            left.add_node(name, **replaced.get(name, node))
    left.components, left.enumerated = components, trace
    return left


def probabilities(trace: Any) -> dict[str, Tensor]:
    """Posterior probabilities of the discrete latents that were summed out of a trace.

    Args:
        trace: of the model, from `summed_out`.

    Returns:
        Discrete site -> the probability of each of its values given the data and all other latents
        of the trace, of shape `(*batch, values)`.
    """
    return {
        node["name"]: _logits(trace.enumerated, component, node).softmax(-1)
        for component in getattr(trace, "components", [])
        for node in component.discrete
    }


def draw_discrete(trace: Any, given: Container[str]) -> dict[str, Node]:
    """Draws the discrete latents that were summed out of a trace, from their joint posterior.

    Each is drawn given those before it: of a chain of T sites, by T sums over it.

    Args:
        trace: of the model, from `summed_out`.
        given: the sites whose values are given, beside those that are observed. What else the model
            drew, as data to be predicted, says nothing of the discrete latents.

    Returns:
        Discrete site -> its node, with a draw for each member of its plates as its value.
    """
    result = {}
    for component in getattr(trace, "components", []):
        told = [f for f in component.factors if _is_told(f.node, given)]
        known = component._replace(factors=told)
        for node in component.discrete:
            index = dist.Categorical(logits=_logits(trace.enumerated, known, node)).sample()
            result[node["name"]] = {**node, "value": values_of(node)[index], "infer": {}}
            known = known._replace(factors=[*known.factors, _fixed(trace.enumerated, node, index)])
    return result


def _is_told(node: Node, given: Container[str]) -> bool:
    return bool(node["is_observed"]) or _is_enumerated(node) or node["name"] in given


def _logits(trace: Any, component: Component, node: Node) -> Tensor:
    """Log chances of the values of a discrete latent, up to a constant, `(*batch, values)`."""
    symbol, dim = node["infer"]["_enumerate_symbol"], node["infer"]["_enumerate_dim"]
    if len(values_of(node)) == 1:  # it is certain, and packing leaves out a dim of one
        return component.factors[0].value.new_zeros((*_batch_of(node), 1))
    logits = contract_to_tensor(
        _tree(component.factors),
        set(component.symbols),
        target_ordinal=_ordinal(trace, node),
        target_dims={symbol},
        ring=_LogSums(dim_to_size=_sizes(component, trace)),
    )
    logits = packed.unpack(logits, _dims(trace) | {symbol: dim})
    logits = logits.unsqueeze(-1).transpose(-1, dim - 1)
    return logits.reshape(logits.shape[logits.dim() - 1 - depth_of(node) :])


def _fixed(trace: Any, node: Node, index: Tensor) -> Factor:
    """A factor that is one at a value of a discrete latent, and zero at its others."""
    symbol, dim = node["infer"]["_enumerate_symbol"], node["infer"]["_enumerate_dim"]
    values = torch.arange(len(values_of(node)), device=index.device)
    here = values.reshape(-1, *[1] * (-dim - 1)) == index
    logs = torch.where(here, 0.0, -math.inf)
    value: Any = packed.pack(logs, {**node["infer"]["_dim_to_symbol"], dim: symbol})
    value._pyro_ordinal = _ordinal(trace, node)
    return Factor({**node, "is_observed": True, "infer": {}}, value)


def values_of(node: Node) -> Tensor:
    """The values of a discrete latent, in the order of its probabilities, `(values, *event)`."""
    values: Tensor = node["fn"].enumerate_support(expand=False)
    return values.reshape(len(values), *node["fn"].event_shape)


def _is_enumerated(node: Node) -> bool:
    return node["infer"].get("_enumerate_dim") is not None


def _dims(trace: Any) -> dict[str, int]:
    dims: dict[str, int] = trace.symbol_to_dim
    return dims


def _ordinal(trace: Any, node: Node) -> frozenset[str]:
    """The plates around a node, as symbols."""
    return frozenset(
        trace.plate_to_symbol[f.name] for f in node["cond_indep_stack"] if f.vectorized
    )


def _components(trace: Any) -> Iterator[Component]:
    """The factors that depend on discrete latents, in groups that share none."""
    trace.symbolize_dims()
    nodes = [n for n in trace.nodes.values() if n["type"] == "sample" and counts(n)]
    symbols = {n["infer"]["_enumerate_symbol"] for n in nodes if _is_enumerated(n)}
    groups: list[tuple[list[Factor], set[str]]] = []
    for node in nodes:
        value = node["fn"].log_prob(node["value"]) if _is_enumerated(node) else log_prob(node)
        if value.dim() <= depth_of(node) and not _is_enumerated(node):
            continue  # it has none of their dims, which are to the left of all plates
        value = packed.pack(value, node["infer"]["_dim_to_symbol"])
        value._pyro_ordinal = _ordinal(trace, node)
        mine = symbols & set(value._pyro_dims)
        if _is_enumerated(node):
            mine.add(node["infer"]["_enumerate_symbol"])
        if not mine:
            continue
        alike = [group for group in groups if group[1] & mine]
        groups = [group for group in groups if not group[1] & mine]
        factors = [factor for group in alike for factor in group[0]]
        groups.append(([*factors, Factor(node, value)], mine.union(*(g[1] for g in alike))))
    order = {node["name"]: number for number, node in enumerate(nodes)}
    for factors, shared in groups:
        factors.sort(key=lambda factor: order[factor.node["name"]])
        yield Component(factors, frozenset(shared))


def _check_scales(component: Component) -> None:
    scales = [factor.node["scale"] for factor in component.factors]
    names = [factor.node["name"] for factor in component.factors]
    number = not any(isinstance(scale, Tensor) and scale.dim() for scale in scales)
    same = number and max(map(float, scales)) - min(map(float, scales)) < 1e-6 * float(scales[0])
    wanted = (
        f"one scale (subsampling, poutine.scale) of all of {names}, which share discrete latents"
    )
    expect(same, "model", wanted, scales)


class _LogSums(LogRing):
    """Sums and products of factors in log space, by operations that a graph can hold.

    Pyro's own goes through exponentials and matrix products, by a path that it looks up in a table
    of sizes, which are no numbers while a graph is recorded.
    """

    def sumproduct(self, terms: Any, dims: Any) -> Tensor:
        """Adds terms, and sums their exponentials over some dims, one by one."""
        left = list(terms)
        for dim in sorted(
            dims, key=lambda dim: len(_union(t for t in left if dim in t._pyro_dims))
        ):
            joined = _joined([term for term in left if dim in term._pyro_dims])
            names = joined._pyro_dims
            total = joined.logsumexp(names.index(dim))
            total._pyro_dims = names.replace(dim, "")
            left = [term for term in left if dim not in term._pyro_dims] + [total]
        return _joined(left)


def _union(terms: Iterable[Any]) -> str:
    """The dims of some packed terms."""
    return "".join(sorted({dim for term in terms for dim in term._pyro_dims}))


def _joined(terms: Sequence[Any]) -> Any:
    """The sum of some packed terms, with the dims of all."""
    if len(terms) == 1:
        return terms[0]
    union = _union(terms)
    total: Any = 0
    for term in terms:
        names = term._pyro_dims
        value = term.permute([names.index(dim) for dim in union if dim in names])
        index = tuple(slice(None) if dim in names else None for dim in union)
        total = total + value[index]
    total._pyro_dims = union
    return total


def _tree(factors: Sequence[Factor]) -> Tree:
    """The densities of some factors by the plates around them."""
    tree: Tree = OrderedDict()
    for factor in factors:
        tree.setdefault(factor.value._pyro_ordinal, []).append(factor.value)
    return tree


def _sizes(component: Component, trace: Any) -> dict[str, int]:
    """The sizes of packed dims, and of plates of one member, which packing leaves out."""
    frames = [f for factor in component.factors for f in factor.node["cond_indep_stack"]]
    sizes = {trace.plate_to_symbol[f.name]: f.size for f in frames if f.vectorized}
    values = [factor.value for factor in component.factors]
    return sizes | {dim: n for v in values for dim, n in zip(v._pyro_dims, v.shape, strict=True)}


def _contracted(
    factors: Sequence[Factor], symbols: frozenset[str]
) -> list[tuple[frozenset[str], Any]]:
    """What the sum over discrete latents leaves, by plates as symbols."""
    used = {s for factor in factors for s in factor.value._pyro_dims} & symbols
    tree = contract_tensor_tree(_tree(factors), used, ring=_LogSums())
    return [(ordinal, term) for ordinal, terms in tree.items() for term in terms]


def _summed_to(value: Tensor, trace: Any, term: Any, ordinal: frozenset[str]) -> Tensor:
    """A density summed over the plates that another has not."""
    drop = [_dims(trace)[symbol] for symbol in term._pyro_dims if symbol not in ordinal]
    return value.sum(drop, keepdim=True) if drop else value


def _batch_of(node: Node) -> torch.Size:
    """The sizes of the plates around a node."""
    sizes = {f.dim: f.size for f in node["cond_indep_stack"] if f.vectorized}
    return torch.Size(sizes.get(dim, 1) for dim in range(-depth_of(node), 0))


def _with(node: Node, log_density: Tensor) -> Node:
    """A node with another density at its value."""
    batch = _batch_of(node)
    value = log_density.expand(batch)
    return {**node, "fn": Summed(node["fn"], value, batch), "mask": None}
