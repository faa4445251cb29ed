"""Why a training diverged: the first number that is not finite, whose it is, and what to do."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from ppvae._scopes import kept_buffers, random_state, unchecked
from ppvae.nn import Affine, Log1p, Standardize
from ppvae.objectives.divergence import by_coordinate, closed_kl
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.keywords import bare
from ppvae.programs.masks import mask_of, masked
from ppvae.programs.nodes import Node, base_of, is_point, latent_nodes, observed_nodes
from ppvae.programs.plates import data_plate
from ppvae.staging.program import Program
from ppvae.staging.staged import one_line
from ppvae.training.task import Task

_RUNS = 8  # the noise of the step is gone: what overflowed by it may not do so in one run

# Networks start for numbers of size one; a column whose largest number is above this, or below one
# over it, is better scaled.
_USUAL = 30.0


def blame(task: Task, batch: tuple[Any, ...], step: int, put_back: Callable[[], None]) -> str:
    """Says why the loss or a parameter is not finite, and what to do about it.

    Guide and model are run anew, with other noise than in the step.

    Args:
        task: what was trained, with the parameters of now.
        batch: the minibatch of the step.
        step: number of steps of the optimizer so far.
        put_back: gives the parameters their values of a finite loss; it is called once, since a
            gradient can only be looked at there.
    """
    lost, why = _lost_parameters(task.program), first_culprit(task, batch)
    put_back()
    before = _lost_parameters(task.program)
    lost = {name: value for name, value in lost.items() if name not in before}
    trace = _model_trace(task, batch)
    outside = next(_outside(task, batch, trace), "")
    slope = _bad_slope(task, batch, step) if lost else ""
    if outside or slope:
        return outside or slope
    if lost:
        name = next(iter(lost))
        why = f"{name} is {lost[name]}: its gradient, or the step by it, was not finite"
        why = why if step > 0 else f"{name} would be {lost[name]}"
    advice = _advice(task, batch, step, counts=_is_counted(trace))
    if not advice and not lost:
        advice = ["it was so before any step, by the initial values"]
    return "; ".join([why, *advice])


def first_culprit(task: Task, batch: tuple[Any, ...]) -> str:
    """Names the first number, in runs of guide and model on a minibatch, that is not finite."""
    try:
        with torch.no_grad(), random_state(None, keep=True), unchecked():
            for _ in range(_RUNS):
                for words in _culprits(task, batch):
                    return words
    except Exception as error:  # whatever a program may raise on numbers that are not finite
        return f"a run of guide and model raises {one_line(error)}"
    return "from the objective, or from a rare draw: guide and model are finite in other draws"


def _culprits(task: Task, batch: tuple[Any, ...]) -> Iterator[str]:
    """What is not finite in one run: arguments and draws first, and then what follows from them."""
    model, guide = task.program.traces(batch)
    places = _Places(task, batch, data_plate(model, task.program.plate_name))
    for whose, trace in (("guide", guide), ("model", model)):
        for node in [*latent_nodes(trace), *observed_nodes(trace)]:
            found = dict(_arguments(node["fn"]))
            found |= {"draw": node["value"]} if whose == "guide" else {}
            for name, value in found.items():
                yield from places.words(f"the {whose}'s {name} of {_name(node)}", node, value)
    parts = terms(model, guide, task.program.plate_name)
    summands = [*_divergences(parts, model, guide), *_densities(parts, model, guide)]
    for start, node, each, beside in summands:
        yield from places.words(start, node, each, beside)
        by_batch = each.reshape(*node["fn"].batch_shape, -1).sum(-1)
        yield from places.words(start, node, by_batch)
    for start, node, each, beside in summands:
        if not torch.isfinite(each.sum() * task.batches.size / task.batches.rows(batch)):
            largest = each.abs() == each.abs().max()
            start = f"{start}, the sum of which overflows,"
            yield from places.words(start, node, each, beside, ok=~largest)


#: What it is in words, its site, its values by element, and what is to be told beside them.
_Summand = tuple[str, Node, Tensor, dict[str, Tensor]]


def _divergences(parts: Terms, model: Any, guide: Any) -> Iterator[_Summand]:
    """The divergences that have a closed form."""
    for name in parts.kl:
        q, p = guide.nodes[name], model.nodes[name]
        pair = by_coordinate(q["fn"], p["fn"]) or (q["fn"], p["fn"])
        each: Any = closed_kl(*pair)
        start = f"the KL divergence of the guide's {name!r} from the model's"
        yield start, q, each, dict(_arguments(pair[0]))


def _densities(parts: Terms, model: Any, guide: Any) -> Iterator[_Summand]:
    """The densities that the objective takes, those of the data first."""
    kinds = [("model", model, parts.log_likelihood)]
    kinds += [("guide", guide, parts.log_guide), ("model", model, parts.log_prior)]
    for whose, trace, values in kinds:
        for name in [name for name in values if name not in parts.kl]:
            node, fn = trace.nodes[name], base_of(trace.nodes[name]["fn"])
            drawn = "draw" if node["infer"].get("is_auxiliary") else name
            beside = {drawn: node["value"], **dict(_arguments(fn))}
            start = f"the log density of the {whose}'s {_name(node)}"
            yield start, node, fn.log_prob(node["value"]), beside


def _model_trace(task: Task, batch: tuple[Any, ...]) -> Any:
    """A trace of the model; without nodes, if a program raises on what is not finite."""
    try:
        with torch.no_grad(), random_state(None, keep=True), unchecked():
            with kept_buffers(task.program):
                return task.program.traces(batch)[0]
    except Exception:  # which has been told already
        return poutine.Trace()


def _is_counted(trace: Any) -> bool:
    """Whether all that a model observes are counts, or classes."""
    supports = [_support(node) for node in observed_nodes(trace)]
    return bool(supports) and all(s is not None and s.is_discrete for s in supports)


def _support(node: Node) -> Any:
    """The support of the elements of a site; None, if its distribution does not say."""
    try:
        return base_of(node["fn"]).support
    except NotImplementedError:
        return None


def _outside(task: Task, batch: tuple[Any, ...], trace: Any) -> Iterator[str]:
    """Data that are outside of the support of their likelihood, which no step can change."""
    nodes = observed_nodes(trace)
    frame = data_plate(trace, task.program.plate_name) if nodes else None
    places = _Places(task, batch, frame)
    for node in nodes:
        support = _support(node)
        bounds = [v for v in vars(support).values() if isinstance(v, Tensor)] if support else []
        if support and all(torch.isfinite(bound).all() for bound in bounds):
            end = f", outside of the support of its likelihood, {support}"
            start, inside = f"the datum of {_name(node)}", support.check(node["value"])
            yield from places.words(start, node, node["value"], ok=inside, end=end)


class _Places:
    """Where a number stands: the datum, the index along further plates, and in the event.

    Args:
        task: what was trained.
        batch: a minibatch.
        frame: the frame of the data plate, or None.
    """

    def __init__(self, task: Task, batch: tuple[Any, ...], frame: Any) -> None:
        self.batches, self.batch = task.batches, batch
        follows = frame is not None and frame.size == task.batches.rows(batch)
        self.data = frame.name if follows else None

    def words(
        self,
        start: str,
        node: Node,
        values: Tensor,
        beside: dict[str, Tensor] | None = None,
        ok: Tensor | None = None,
        end: str = "",
    ) -> Iterator[str]:
        """Says which of some numbers of a node is the first that is not finite, if there is one.

        Args:
            start: what they are.
            node: whose batch dims they begin with; what is masked there does not count.
            values: the numbers.
            beside: name -> others; those of the same shape are told, too.
            ok: whether each is as it should be; by default whether it is finite.
            end: further words.
        """
        lead = len(node["fn"].batch_shape)
        bad = ~(torch.isfinite(values) if ok is None else ok)
        if bad.shape[:lead] == node["fn"].batch_shape and mask_of(node) is not None:
            mask = torch.as_tensor(mask_of(node))
            mask = mask.reshape(mask.shape + (1,) * (bad.dim() - lead))
            bad = masked(bad, {**node, "mask": mask})
        count = int(bad.sum())
        if not count:
            return
        first = tuple(bad.nonzero()[0].tolist())
        where = self._place(node, bad, first)
        if count > 1:
            where += f", the first of {'all ' if count == bad.numel() else ''}{count}"
        told = {k: v[first] for k, v in (beside or {}).items() if v.shape == values.shape}
        others = ", ".join(f"{name} = {value:.4g}" for name, value in told.items())
        value = f" is {values[first]:.4g}" if bad.shape == values.shape else ""
        yield f"{start}{value}{where}{f', where {others}' if others else ''}{end}"

    def _place(self, node: Node, values: Tensor, index: tuple[int, ...]) -> str:
        lead, words = len(node["fn"].batch_shape), []
        if values.shape[:lead] != node["fn"].batch_shape:
            lead = 0  # of what all data share
        for frame in node["cond_indep_stack"] if lead else ():
            if frame.dim is not None:
                at = index[lead + frame.dim]
                words.append(self._row(at) if frame.name == self.data else f"{frame.name} {at}")
        event = index[lead:]
        if event:
            words.append(f"dimension {event[0] if len(event) == 1 else event}")
        return f" for {', '.join(words)}" if words else ""

    def _row(self, at: int) -> str:
        """The row of a datum: within the data, if they are tensors, in which it can be found."""
        if self.batches.whole:
            return f"row {at} of the data"
        same = torch.ones(self.batches.size, dtype=torch.bool, device=self.batches.device)
        held = [data for data in self.batches.tensors if isinstance(data, Tensor)]
        for data, tensor in zip(held, self.batch, strict=False):
            same &= (data == tensor[at]).reshape(len(data), -1).all(1)
        if not held or len(held) < len(self.batches.tensors) or not same.any():
            return f"row {at} of the minibatch"
        return f"row {int(same.nonzero()[0])} of the data"


def _name(node: Node) -> str:
    """The name of a site; that of a draw from which several sites are cut was made up."""
    joint = node["infer"].get("is_auxiliary") and not node["is_observed"]  # a factor is, too
    return "the joint draw" if joint else repr(node["name"])


def _arguments(fn: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a distribution is made of, and those that it is made from, by name."""
    for name, value in vars(fn).items() if not is_point(fn) else ():
        if isinstance(value, Distribution):
            yield from _arguments(value)
        elif isinstance(value, Tensor) and not name.startswith("_"):
            yield name, value


def _parameters(program: Program) -> dict[str, Tensor]:
    """What is trained, under names by which users know it."""
    named: dict[str, Tensor] = {}
    for path, value in program.named_parameters():
        whose, _, rest = path.partition(".")
        name = f"the {whose}'s parameter {rest.removeprefix('program.')!r}"  # behind keywords
        if whose == "params":
            name = f"the parameter {list(program.constraints)[int(rest)]!r}"
        elif whose == "called":
            number, _, rest = rest.partition(".")
            kind = type(program.called[int(number)]).__name__
            name = f"the parameter {rest!r} of the called module {number}, a {kind},"
        if value.requires_grad:
            named[name] = value
    return named


def _lost_parameters(program: Program) -> dict[str, float]:
    """Name -> the first number that is not finite, of the parameters that have one."""
    bad = {name: value[~torch.isfinite(value)] for name, value in _parameters(program).items()}
    return {name: values[0].item() for name, values in bad.items() if values.numel()}


def _bad_slope(task: Task, batch: tuple[Any, ...], step: int) -> str:
    """Names the first gradient that is not finite, and the operation; empty, if all are finite."""
    named = _parameters(task.program)
    with (
        unchecked(),
        random_state(None, keep=True),
        kept_buffers(task.program),
        torch.enable_grad(),
    ):
        for _ in range(_RUNS):
            loss = task.program.loss(batch, step)
            if not torch.isfinite(loss):
                continue
            operations = _bad_operations(loss)
            slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, slope in zip(named, slopes, strict=True):
                if slope is not None and not torch.isfinite(slope).all():
                    value = slope[~torch.isfinite(slope)][0]
                    by = f", by the derivative of {operations[0]}" if operations else ""
                    return f"the gradient of {name} is {value}{by}, where the loss is {loss:.4g}"
    return ""


def _bad_operations(loss: Tensor) -> list[str]:
    """A list that fills, in a backward pass, with the operations whose slopes are not finite."""
    names: list[str] = []

    def look(name: str, slopes: tuple[Any, ...], _: Any) -> None:
        if any(slope is not None and not torch.isfinite(slope).all() for slope in slopes):
            names.append(name)

    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            name = re.sub(r"Backward\d*$", "", node.name()).lower()
            node.register_hook(partial(look, name))
            waiting += [before for before, _ in node.next_functions]
    return names


def _advice(task: Task, batch: tuple[Any, ...], step: int, *, counts: bool) -> list[str]:
    """What to do, by the scale of the data and by whether the start was fine."""
    advice, held = [], [v for v in task.batches.tensors if isinstance(v, Tensor)]
    rows = [v for v in held or batch if isinstance(v, Tensor) and v.dim()]
    largest = [v.reshape(len(v), -1).double().abs().amax(0) for v in rows]
    sizes = torch.cat(largest)
    sizes = sizes[sizes > 0]
    if sizes.numel() and (sizes.max() > _USUAL or sizes.min() < 1 / _USUAL):
        layers = _layers(task, counts=counts)
        floats = [(v, top) for v, top in zip(rows, largest, strict=True) if v.is_floating_point()]
        if not all(torch.isfinite(top.to(v.dtype) ** 2).all() for v, top in floats):
            layers = "standardise them beforehand, since their squares overflow"
        what = "the data are" if held else "a minibatch are"
        reach = f"{sizes.min():.3g} to {sizes.max():.3g}"
        advice += [f"the columns of {what} of sizes {reach}: {layers}"] if layers else []
    if step > 0:
        advice.append("the loss was finite at first: take a smaller learning rate")
    return advice


def _layers(task: Task, *, counts: bool) -> str:
    """What networks and likelihood may lack for raw data; empty, if they have it."""
    kinds = {type(module) for module in task.program.modules()}
    if getattr(bare(task.program.guide), "encoder", ...) is None:
        return "standardise them beforehand"
    if counts:
        lacks = not kinds & {Log1p, Standardize}
        return "take ppvae.nn.Log1p() as the first layer of the encoder" if lacks else ""
    ends = {
        Standardize: "ppvae.nn.Standardize.of(data) as the first layer of the encoder",
        Affine: "its inverse as the last layer of the decoder",
    }
    lacking = [words for kind, words in ends.items() if kind not in kinds]
    return f"take {', '.join([*lacking, 'a likelihood whose scale is in their units'])}"
