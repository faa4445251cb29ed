r"""The loss of a Pyro model and its guide as one graph of PyTorch operations.

A Pyro program is run once, with handlers, plates, names and checks, and what it does to tensors is
recorded (`torch.export`); from then on only that is run, for batches of any size:

    loss = stage(model, guide, x)     # an nn.Module; shares the parameters of model and guide
    loss(x).backward()                # the same number and gradients, for the same seed
    fast = torch.compile(loss)        # without a graph break

It goes wherever a module goes: any optimizer and loop, `DistributedDataParallel`, Lightning. `fit`
stages by itself.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ppvae._checks import check_real, expect
from ppvae._process import exclusive
from ppvae._scopes import kept_buffers, random_state, stacklevel, unchecked
from ppvae.data.adapters import has_missing
from ppvae.programs.keywords import with_keywords
from ppvae.programs.missing import nan_masked
from ppvae.staging.export import export
from ppvae.staging.passes import clean, is_random, split_noise
from ppvae.staging.program import Program, program_of


class NotStageable(ValueError):
    """A model or guide does what a graph cannot hold; the message says what, in one line.

    Attributes:
        way_out: what the user may do about it; empty where nobody knows, and None where there is
            nothing to be done.
    """

    def __init__(self, message: str, way_out: str | None = "") -> None:
        super().__init__(message)
        self.way_out = way_out


@exclusive
def stage(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    objective: Callable[..., Tensor] | None = None,
    size: int | None = None,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> "Staged":
    """Records the loss of a model and its guide as a graph.

    What depends on the values of tensors in Python (`if x.sum() > 0`, `.item()`, sampling of
    structure) cannot be staged. Modules keep the mode that they are in: stage in training mode to
    train.

    Args:
        model: a Pyro model: a module, or a function with `pyro.module` or `pyro.param` statements.
        guide: its guide; every draw must be reparametrized.
        *args: their arguments: one minibatch, of two data or more. The first dimension of tensors
            may vary from call to call, wherever the model allows that.
        objective: the loss, such as `objectives.IWAE(8)`; by default `objectives.ELBO()`.
        size: number of data in all; by default the size of the data plate.
        plate: name of the data plate; by default the one that `data_plate` finds.
        kwargs: keyword arguments of model and guide, by which the result is then called too.

    Returns:
        A module `(*args, step=0, **kwargs) -> loss`, a scalar in nats per datum.

    Warns:
        UserWarning: the loss is not finite, so that the graph could not be compared with the
            program.

    Raises:
        TypeError: a tensor is sparse, nested, quantized, or on the device `meta`.
        NotStageable: the loss is no graph, or the graph does not give the loss of the program.

    Example:
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(mlp(2, 16, out=5), latent=2, likelihood=likelihoods.Bernoulli())
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> loss = stage(model, guide, torch.zeros(8, 5))
        >>> loss(torch.zeros(3, 5)).shape
        torch.Size([])
    """
    model, guide, args = with_keywords(model, guide, args, kwargs)
    _check_dense(args)
    if has_missing(args):
        model, guide = nan_masked(model), nan_masked(guide)
    program = program_of(model, guide, objective, args, size=size, plate=plate)
    staged = record(program, args, tuple(kwargs or ()))
    value = _outcome(staged, program, *args, *program.settings(0))[0]
    if not torch.isfinite(value):
        so = f"stage: the loss is {value}, so that graph and program could not be compared"
        warnings.warn(f"{so}; are the data scaled?", stacklevel=stacklevel())
    return staged


def record(program: Program, args: tuple[Any, ...], names: tuple[str, ...] = ()) -> "Staged":
    """Stages a program; see `stage`.

    Args:
        program: the loss of a model and its guide.
        args: one minibatch.
        names: of the last arguments, by which the result is to be called.

    Raises:
        NotStageable: the loss is no graph, or the graph does not give the loss of the program.
    """
    why = getattr(program.objective, "unstageable", "")
    if why:
        raise NotStageable(f"objective: {why}")
    try:
        exported = export(program, (*args, *program.settings(0)))
        clean(exported.graph_module)
        staged = _taken_apart(program, exported, names)
    except Exception as error:  # a program that is traced may fail in ways of its own
        raise NotStageable(f"model, guide: cannot be staged: {one_line(error)}") from error
    _check(staged, args)
    staged.recorded_on = args, [module.training for module in program.modules()]
    return staged


def _record_again(
    program: Program, recorded_on: tuple[tuple[Any, ...], list[bool]], names: tuple[str, ...]
) -> "Staged":
    """Stages a copy of a program on the batch and in the modes of the first time."""
    args, modes = recorded_on
    now = [module.training for module in program.modules()]
    _set_modes(program, modes)
    try:
        return record(program, args, names)
    finally:
        _set_modes(program, now)


def _set_modes(program: Program, modes: list[bool]) -> None:
    for module, mode in zip(program.modules(), modes, strict=True):
        module.training = mode


class Staged(nn.Module):
    """The loss of a model and its guide as a graph; made by `stage`.

    A call that the graph does not cover, such as a batch of one datum, runs the program itself. A
    copy or a pickle has the program and the batch that it was recorded on, and records it anew.

    Attributes:
        program: what was recorded.
        names: of the last arguments, which come as keywords.
        recorded_on: the minibatch, and the training mode of each module of the program.
        shapes: for each argument a `Like` if it is a tensor, else its value.
        noise: the graph that draws random numbers; it takes the tensors of a batch and settings.
        rest: the graph of the loss; it takes state, tensors, settings and noise.
    """

    recorded_on: tuple[tuple[Any, ...], list[bool]]

    def __init__(
        self,
        program: Program,
        names: tuple[str, ...],
        shapes: list[Any],
        guard: Callable[[Any], bool],
        paths: list[tuple[str, str]],
        constants: list[Tensor],
        graphs: tuple[fx.GraphModule, fx.GraphModule],
    ) -> None:
        super().__init__()
        self.program, self.names, self.shapes = program, names, shapes
        self.noise, self.rest = graphs
        for number, value in enumerate(constants):
            self.register_buffer(f"constant_{number}", value, persistent=False)
        self._guard, self._paths = guard, paths
        self._state = self._homes(program)

    def __repr__(self) -> str:
        args = self.recorded_on[0]
        seen = [str(tuple(a.shape)) if isinstance(a, Tensor) else repr(a) for a in args]
        programs = (self.program.model, self.program.guide)
        names = [getattr(each, "__name__", type(each).__name__) for each in programs]
        of = f"{self.program.objective} of {' and '.join(names)}"
        return f"Staged({of}, recorded on {', '.join(seen)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _record_again, (self.program, self.recorded_on, self.names)

    def forward(self, *args: Any, step: int = 0, **kwargs: Any) -> Tensor:
        """The loss.

        Args:
            *args: the arguments of model and guide.
            step: number of steps of the optimizer so far, for an objective that depends on it.
            **kwargs: their keyword arguments, all of those that were given to `stage`.

        Returns:
            A scalar in nats per datum.

        Raises:
            TypeError: a tensor is sparse, nested, quantized, or on the device `meta`.
        """
        if kwargs or self.names:
            fits = set(kwargs) == set(self.names)
            expect(fits, "kwargs", f"those of stage, {list(self.names)}", list(kwargs), TypeError)
            args = (*args, *(kwargs[name] for name in self.names))
        settings = self.program.settings(step)
        if not self.covers(*args):
            _check_dense(args)
            return self.program(*args, *settings)
        return self.by_graph(args, settings)

    def by_graph(self, batch: tuple[Any, ...], settings: list[Tensor]) -> Tensor:
        """The loss by the graph, which must cover the batch."""
        return self.rest(*self.state(), *self.data(batch, settings))[0]

    def covers(self, *args: Any) -> bool:
        """Whether the graph is that of a call with these arguments, keywords behind the others."""
        sizes: dict[str, int] = {}
        if len(args) != len(self.shapes):
            return False
        fits = all(_fits(arg, like, sizes) for arg, like in zip(args, self.shapes, strict=True))
        return fits and self._guard({"args": args})

    def state(self, program: Program | None = None) -> list[Tensor]:
        """The parameters, buffers and constants, in the order of the graph's arguments.

        Args:
            program: another one of the same make, whose values they are; by default the own one.
        """
        homes = self._state if program is None else self._homes(program)
        return [home[name] for home, name in homes]

    @property
    def names_of_state(self) -> list[str]:
        """The names of `state` in the program, with dots; those of constants have none."""
        return [name for _, name in self._paths]

    def data(self, batch: tuple[Any, ...], settings: list[Tensor]) -> list[Tensor]:
        """The arguments after the state: the tensors of a batch, settings, and fresh noise."""
        given = [*(value for value in batch if isinstance(value, Tensor)), *settings]
        return [*given, *self.noise(*given)]

    def batch(self, data: list[Tensor]) -> tuple[Any, ...]:
        """The arguments of model and guide, from data as `data` gives them."""
        values = iter(data)
        return tuple(next(values) if isinstance(like, Like) else like for like in self.shapes)

    @property
    def sizes(self) -> list[str]:
        """The names of the sizes in `shapes` that may vary, each for itself."""
        every = (size for like in self.shapes for size in getattr(like, "shape", ()))
        return [*dict.fromkeys(size for size in every if isinstance(size, str))]

    def resized(self, data: list[Tensor], sizes: Mapping[str, int]) -> list[Tensor] | None:
        """Data of other sizes, with the same rows again and again; None if the graph has no such.

        Args:
            data: as `data` gives it.
            sizes: the number for each of `sizes`.
        """
        batch = []
        for value, like in zip(self.batch(data), self.shapes, strict=True):
            for dim, size in enumerate(getattr(like, "shape", ())):
                if isinstance(size, str):
                    index = torch.arange(sizes[size], device=value.device) % value.shape[dim]
                    value = value.index_select(dim, index)
            batch.append(value)
        after = sum(isinstance(like, Like) for like in self.shapes)
        settings = data[after : after + len(self.program.settings(0))]
        return self.data(tuple(batch), settings) if self.covers(*batch) else None

    @property
    def draws_late(self) -> bool:
        """Whether numbers are drawn that depend on others, and so not before all else."""
        return any(map(is_random, self.rest.graph.nodes))

    def trained(self) -> list[int]:
        """Which of `state` are parameters that the loss depends on and that want a gradient."""
        nodes = self.rest.graph.find_nodes(op="placeholder")
        state = zip(self.state(), nodes, strict=False)
        return [at for at, (value, node) in enumerate(state) if value.requires_grad and node.users]

    def _homes(self, program: Program) -> list[tuple[dict[str, Any], str]]:
        """Where a program has its values: dictionaries of modules, and the names in them."""
        homes: list[tuple[dict[str, Any], str]] = []
        for kind, target in self._paths:
            path, _, name = target.rpartition(".")
            owner = program.get_submodule(path) if path else self  # which has the constants
            homes.append((getattr(owner, kind), name))
        return homes


def _check_dense(args: tuple[Any, ...]) -> None:
    """Raises a TypeError if a tensor among some arguments is not dense."""
    for arg in args:
        if isinstance(arg, Tensor) and not arg.is_complex():  # which a model may take
            check_real("args", arg)


def _taken_apart(program: Program, exported: Any, names: tuple[str, ...]) -> Staged:
    """Reads an exported program: what it needs, what noise it draws, and the rest."""
    graph = exported.graph_module.graph
    places = {node.name: node for node in graph.find_nodes(op="placeholder")}
    kinds = torch.export.graph_signature.InputKind
    shapes: list[Any] = []
    paths: list[tuple[str, str]] = []  # which dictionary of a module has a value, and where
    constants: list[Tensor] = []  # tensors that the program closes over
    for spec in exported.graph_signature.input_specs:
        if spec.kind == kinds.USER_INPUT:
            shapes.append(_like(places[spec.arg.name].meta["val"]))
            if not isinstance(shapes[-1], Like):  # a part of the graph, and no input
                graph.erase_node(places[spec.arg.name])
        elif spec.kind == kinds.CONSTANT_TENSOR:
            paths.append(("_buffers", f"constant_{len(constants)}"))
            constants.append(exported.constants[spec.target])
        else:
            kind = "_parameters" if spec.kind == kinds.PARAMETER else "_buffers"
            paths.append((kind, spec.target))
    guards = [f"({code})" for code in getattr(exported, "_guards_code", [])] or ["True"]
    known = {"torch": torch, "math": math}  # the names in PyTorch's own conditions on sizes
    guard = eval(f"lambda L: {' and '.join(guards)}", known)
    noise, rest = (
        fx.GraphModule(exported.graph_module, part) for part in split_noise(graph, len(paths))
    )
    arguments = shapes[: len(shapes) - len(program.settings(0))]
    return Staged(program, names, arguments, guard, paths, constants, (noise, rest))


def _check(staged: Staged, args: tuple[Any, ...]) -> None:
    """Raises unless the graph gives the loss of the program, on these data and on one less."""
    rows = max((len(arg) for arg in args if isinstance(arg, Tensor) and arg.dim()), default=0)
    fewer = tuple(v[: rows - 1] if isinstance(v, Tensor) and v.dim() else v for v in args)
    settings = staged.program.settings(0)
    for batch in filter(lambda batch: staged.covers(*batch), [args, fewer]):
        try:
            wanted = _outcome(staged, staged.program, *batch, *settings)
        except Exception:  # fewer data may be data that the program itself refuses
            if batch is args:
                raise
            continue
        graph = _outcome(staged, staged.by_graph, batch, settings)
        if not alike(graph, wanted):
            raise NotStageable(
                f"model, guide: cannot be staged: the graph gives a loss of {graph[0]:.6g} or "
                f"a gradient that is not the program's ({wanted[0]:.6g}); does one keep a count "
                "or a list of its own?"
            )


def _outcome(staged: Staged, call: Callable[..., Tensor], *args: Any) -> list[Tensor]:
    """The loss of a call, and its gradients; nothing is left behind."""
    leaves = [parameter for parameter in staged.parameters() if parameter.requires_grad]
    with random_state(0), kept_buffers(staged), unchecked(), torch.enable_grad():
        loss = call(*args)
        slopes = [torch.zeros_like(leaf) for leaf in leaves]
        if loss.requires_grad:
            slopes = [*torch.autograd.grad(loss, leaves, materialize_grads=True)]
    return [loss.detach(), *slopes]


class Like(NamedTuple):
    """What a tensor that was traced was like; a size that may vary is a name."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype
    device: torch.device


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    sizes = []
    for size in value.shape:
        known = size if isinstance(size, int) else size.node.maybe_as_int()
        sizes.append(str(size) if known is None else known)
    return Like(tuple(sizes), value.dtype, value.device)


def _fits(arg: Any, like: Any, sizes: dict[str, int]) -> bool:
    """Whether an argument is like a traced one; sizes of the same name must be equal."""
    if not isinstance(like, Like):
        return arg is like or arg == like
    if not isinstance(arg, Tensor) or arg.dim() != len(like.shape):
        return False
    if arg.dtype != like.dtype or arg.device != like.device:
        return False
    if arg.layout != torch.strided or arg.is_nested:
        return False
    for size, known in zip(arg.shape, like.shape, strict=True):
        if isinstance(known, str):  # one datum is a case of its own: it broadcasts
            if size < 2 or sizes.setdefault(known, size) != size:
                return False
        elif size != known:
            return False
    return True


def alike(outcome: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether a loss and its gradients are those wanted, to a thousandth of the largest number.

    Numbers that are not finite must be the same; training, and not staging, refuses them.
    """
    for one, other in zip(outcome, wanted, strict=True):
        largest = other.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        if not torch.allclose(one, other, rtol=0.0, atol=1e-3 * largest + 1e-6, equal_nan=True):
            return False
    return True


#: of errors that say, each in its way, that a value is wanted where there are none, or many
_DECISIONS = "DataDependent", "data-dependent control", "calling .item()"


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    words = f"{type(error).__name__} {error}"
    if any(word in words for word in _DECISIONS):
        return "a decision depends on the values of tensors (`if`, `while`, `int(x)`, `x.item()`)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else ""
    return said if isinstance(error, NotStageable) else f"{type(error).__name__}: {said}"
