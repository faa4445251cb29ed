r"""Staging: the loss of a Pyro model and its guide as one graph of PyTorch operations.

A Pyro program is run once, with handlers, plates, names and checks, and what it does to tensors is
recorded (`torch.export`); from then on only that is run, for batches of any size:

    loss = stage(model, guide, x)     # an nn.Module; shares the parameters of model and guide
    loss(x).backward()                # the same number and gradients, for the same seed
    fast = torch.compile(loss)        # without a graph break

It goes wherever a module goes: any optimizer and loop, `DistributedDataParallel`, Lightning. `fit`
stages by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ppvae._scopes import kept_buffers, random_state, unchecked
from ppvae.objectives.elbo import ELBO
from ppvae.objectives.iwae import IWAE
from ppvae.staging.export import export
from ppvae.staging.passes import clean, split_noise
from ppvae.staging.program import Program


class NotStageable(ValueError):
    """A model or guide does what a graph cannot hold; the message says what, in one line."""


def stage(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    objective: Callable[..., Tensor] | None = None,
    size: int | None = None,
    plate: str | None = None,
) -> Staged:
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
        plate: name of the data plate; by default `data`, or else the outermost one.

    Returns:
        A module `(*args, step=0) -> loss`, a scalar in nats per datum.

    Raises:
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
    objective = ELBO() if objective is None else objective
    if isinstance(objective, IWAE) and objective.gradient != "pathwise":
        raise NotStageable(f"objective: {objective.gradient} takes a derivative inside the loss")
    return Staged(Program(model, guide, objective, args, size=size, plate=plate), args)


class Staged(nn.Module):
    """The loss of a model and its guide as a graph; made by `stage`.

    A call that the graph does not cover, such as a batch of one datum, runs the program itself.
    """

    def __init__(self, program: Program, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.program = program
        try:
            exported = export(program, (*args, program.setting(0)))
            clean(exported.graph_module)
            self._read(exported)
        except Exception as error:  # whatever may go wrong in a program that is traced
            raise NotStageable(f"model, guide: cannot be staged: {one_line(error)}") from error
        self._check(args)

    def forward(self, *args: Any, step: int = 0) -> Tensor:
        """The loss.

        Args:
            *args: the arguments of model and guide.
            step: number of steps of the optimizer so far, for an objective that depends on it.

        Returns:
            A scalar in nats per datum.
        """
        knob = self.program.setting(step)
        if not self.covers(*args):
            return self.program(*args, knob)
        return self.rest(*self.state(), *self.data(args, knob))[0]

    def covers(self, *args: Any) -> bool:
        """Whether the graph is that of a call with these arguments."""
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
        if program is None:
            return [held[name] for held, name in self._state]
        return [held[name] for held, name in self._held_by(program)]

    def data(self, batch: tuple[Any, ...], knob: Tensor) -> list[Any]:
        """The arguments after the state: a batch, the setting of a step, and fresh noise."""
        return [*batch, knob, *self.noise(*batch, knob)]

    def trained(self) -> list[int]:
        """Which of `state` are parameters that the loss depends on and that want a gradient."""
        places = [node for node in self.rest.graph.nodes if node.op == "placeholder"]
        state = zip(self.state(), places, strict=False)
        return [
            at for at, (value, place) in enumerate(state) if value.requires_grad and place.users
        ]

    def _read(self, exported: Any) -> None:
        """Takes the exported program apart: what it needs, what noise it draws, and the rest."""
        module = exported.graph_module
        places = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
        kinds = torch.export.graph_signature.InputKind
        self._paths: list[tuple[str, str]] = []
        self.shapes: list[Any] = []
        guards = [f"({code})" for code in getattr(exported, "_guards_code", [])] or ["True"]
        names = {"torch": torch, "math": math}  # what PyTorch's own conditions on sizes speak of
        self._guard = eval(f"lambda L: {' and '.join(guards)}", names)
        for spec in exported.graph_signature.input_specs:
            if spec.kind == kinds.USER_INPUT:
                self.shapes.append(_like(places[spec.arg.name].meta["val"]))
            elif spec.kind == kinds.CONSTANT_TENSOR:
                name = f"constant_{len(self._paths)}"
                self.register_buffer(name, exported.constants[spec.target], persistent=False)
                self._paths.append(("constant", name))
            else:
                kind = "_parameters" if spec.kind == kinds.PARAMETER else "_buffers"
                self._paths.append((kind, spec.target))
        del self.shapes[-1]  # that of the setting
        self._state = self._held_by(self.program)
        noise, rest = split_noise(module.graph, len(self._paths))
        self.noise, self.rest = fx.GraphModule(module, noise), fx.GraphModule(module, rest)

    def _held_by(self, program: Program) -> list[tuple[dict[str, Any], str]]:
        """Where a program holds its values: dictionaries of modules, and the names in them."""
        held = []
        for kind, target in self._paths:
            path, _, name = target.rpartition(".")
            owner = self if kind == "constant" else program.get_submodule(path)
            held.append((self._buffers if kind == "constant" else getattr(owner, kind), name))
        return held

    def _check(self, args: tuple[Any, ...]) -> None:
        """Raises unless the graph gives the loss of the program, on these data and on one less."""
        rows = max((len(arg) for arg in args if isinstance(arg, Tensor) and arg.dim()), default=0)
        fewer = tuple(
            arg[: rows - 1] if isinstance(arg, Tensor) and arg.dim() and len(arg) == rows else arg
            for arg in args
        )
        for some in [args, fewer]:
            if not self.covers(*some):
                continue
            try:
                told = self._gradients_of(self.program, *some, self.program.setting(0))
            except Exception:  # data that the program itself refuses
                if some is args:
                    raise
                continue
            found = self._gradients_of(self, *some)
            if not alike(found, told):
                raise NotStageable(
                    f"model, guide: cannot be staged: the graph gives a loss of {found[0]:.6g} or "
                    f"a gradient that is not the program's ({told[0]:.6g}); does one keep a count "
                    "or a list of its own?"
                )

    def _gradients_of(self, call: Any, *args: Any) -> list[Tensor]:
        """The loss of a call, and its gradients; nothing is left behind."""
        leaves = [parameter for parameter in self.parameters() if parameter.requires_grad]
        with random_state(0), kept_buffers(self), unchecked(), torch.enable_grad():
            loss = call(*args)
            slopes: Any = [None] * len(leaves)
            if loss.requires_grad:
                slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
        zero = torch.zeros((), dtype=loss.dtype, device=loss.device)
        return [loss.detach(), *(zero if slope is None else slope for slope in slopes)]


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
    for size, known in zip(arg.shape, like.shape, strict=True):
        if isinstance(known, str):  # one datum is a case of its own: it broadcasts
            if size < 2 or sizes.setdefault(known, size) != size:
                return False
        elif size != known:
            return False
    return True


def alike(found: list[Tensor], told: list[Tensor]) -> bool:
    """Whether a loss and its gradients are those that were told, to a thousandth of the largest."""
    return all(
        torch.allclose(a, b, rtol=0.0, atol=1e-3 * b.abs().max().item() + 1e-6, equal_nan=True)
        for a, b in zip(found, told, strict=True)
    )


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    if "DataDependent" in type(error).__name__:
        return "a decision depends on the values of tensors (`if`, `while`, `int(x)`, `x.item()`)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else ""
    return said if isinstance(error, NotStageable) else f"{type(error).__name__}: {said}"
