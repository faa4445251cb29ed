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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ppvae._context import kept_buffers, private_modules, random_state, unchecked
from ppvae._graphs import clean, split_noise
from ppvae._tracing import Program, export
from ppvae.objectives import ELBO

__all__ = ["NotStageable", "Staged", "stage"]


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
    with private_modules():
        program = Program(model, guide, objective or ELBO(), args, size=size, plate=plate)
        return Staged(program, args)


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
        if not self.covers(*args):
            with private_modules():
                return self.program(*args, self.program.setting(step))
        return self.rest(*self.state(), *self.data(*args, step=step))

    def covers(self, *args: Any) -> bool:
        """Whether the graph is that of a call with these arguments."""
        sizes: dict[str, int] = {}
        if len(args) != len(self._shapes):
            return False
        return all(_fits(arg, like, sizes) for arg, like in zip(args, self._shapes, strict=True))

    def state(self) -> list[Tensor]:
        """The parameters, buffers and constants, in the order of the graph's arguments."""
        return [held[name] for held, name in self._state]

    def data(self, *args: Any, step: int = 0) -> list[Any]:
        """The data, the setting of a step, and fresh noise: the arguments after the state."""
        given = (*args, self.program.setting(step))
        return [*given, *self.noise(*given)]

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
        self._state: list[tuple[dict[str, Any], str]] = []
        self._shapes: list[Any] = []
        for spec in exported.graph_signature.input_specs:
            if spec.kind == kinds.USER_INPUT:
                self._shapes.append(places[spec.arg.name].meta["val"])
                continue
            if spec.kind == kinds.CONSTANT_TENSOR:
                name = f"constant_{len(self._state)}"
                self.register_buffer(name, exported.constants[spec.target], persistent=False)
                self._state.append((self._buffers, name))
                continue
            path, _, name = spec.target.rpartition(".")
            owner = self.program.get_submodule(path)
            held = owner._parameters if spec.kind == kinds.PARAMETER else owner._buffers
            self._state.append((held, name))
        del self._shapes[-1]  # that of the setting
        noise, rest = split_noise(module.graph, len(self._state))
        self.noise, self.rest = fx.GraphModule(module, noise), fx.GraphModule(module, rest)

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
            losses = []
            for call in (self, self.program):
                last = () if call is self else (self.program.setting(0),)
                with torch.no_grad(), random_state(0), kept_buffers(self), unchecked():
                    losses.append(call(*some, *last))
            if not torch.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-6, equal_nan=True):
                raise NotStageable(
                    f"model, guide: cannot be staged: the graph gives a loss of {losses[0]:.6g}, "
                    f"the program {losses[1]:.6g}; does one keep a count or a list of its own?"
                )


def _fits(arg: Any, like: Any, sizes: dict[str, int]) -> bool:
    """Whether an argument is like a traced one; sizes of the same name must be equal."""
    if not isinstance(like, Tensor):
        return arg is like or arg == like
    if not isinstance(arg, Tensor) or arg.dim() != like.dim():
        return False
    if arg.dtype != like.dtype or arg.device != like.device:
        return False
    for size, symbol in zip(arg.shape, like.shape, strict=True):
        if isinstance(symbol, torch.SymInt):  # one datum is a case of its own: it broadcasts
            if size < 2 or sizes.setdefault(str(symbol), size) != size:
                return False
        elif size != symbol:
            return False
    return True


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else ""
    return said if isinstance(error, NotStageable) else f"{type(error).__name__}: {said}"
