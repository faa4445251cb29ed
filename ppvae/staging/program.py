"""A Pyro model, its guide and an objective as one module: what a graph is recorded from."""

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import transform_to

from ppvae._checks import TROUBLE, expect
from ppvae._reach import reached, watched
from ppvae._scopes import (
    as_they_are,
    kept_buffers,
    private_modules,
    random_state,
    stacklevel,
    unchecked,
)
from ppvae.objectives.base import at_step, moving_fields, takes_plate
from ppvae.objectives.elbo import ELBO
from ppvae.programs.checks import numbers_observed
from ppvae.programs.plates import data_plate, plates_of
from ppvae.programs.tracing import trace_pair


class DataDependent(Exception):
    """A program decides on the values of tensors while it is recorded, which have none then."""


class Program(nn.Module):
    """The loss of a model and its guide as a module that holds all that they are made of.

    Besides the two, where they are modules, it holds the modules that plain functions call, or
    whose parameters they take, and the values of their `pyro.param` statements, which share their
    memory with Pyro's param store. Made by `program_of`.

    Attributes:
        model: a Pyro model.
        guide: its guide.
        objective: the loss.
        options: its keyword arguments: the number of data, and the name of the plate.
        plate: the frame of the data plate in the first call; None if there is none.
        plate_name: its name, where that was given or another minibatch could have another plate.
        moving: the fields of the objective that are inputs of a call; see `moving_fields`.
        dtype: that of the loss, and of such inputs.
        called: the modules that the two call or take parameters of, where these are not theirs.
        loose: parameters that the loss depends on, and of which nobody knows the module.
        params: values of `pyro.param` statements that belong to no module.
        constraints: name of such a statement -> the constraint on its value, as `params` are.
    """

    def __init__(self, model: Any, guide: Any, objective: Any, size: int | None) -> None:
        super().__init__()
        self.model, self.guide, self.objective = model, guide, objective
        self.options: dict[str, Any] = {"size": size}
        self.plate, self.plate_name, self.moving = None, None, moving_fields([objective])
        self.dtype = torch.get_default_dtype()
        self.called, self.loose = nn.ModuleList(), nn.ParameterList()
        self.params = nn.ParameterList()
        self.constraints: dict[str, Any] = {}

    def forward(self, *args: Any) -> Tensor:
        """The loss; behind the arguments of the programs stand the `settings` of a step."""
        cut = len(args) - len(self.moving) - 1
        *values, step = args[cut:]
        fields = dict(zip(self.moving, values, strict=True))
        objective = replace(self.objective, **fields) if fields else self.objective
        with private_modules(), as_they_are():
            try:
                return self.loss(args[:cut], step, objective)
            except RuntimeError as error:  # of which PyTorch would print the graph so far
                if "DataDependent" in type(error).__name__:
                    raise DataDependent(str(error)) from error
                raise

    def loss(
        self, batch: tuple[Any, ...], step: Any, objective: Any = None, size: int | None = None
    ) -> Tensor:
        """The loss, in the caller's param store; `size` is another number of data in all."""
        objective = objective or self.objective
        options = self.options if size is None else self.options | {"size": size}
        with _Params(self):
            return objective(self.model, self.guide, *batch, **options, step=step)

    def traces(self, batch: tuple[Any, ...]) -> tuple[Any, Any]:
        """The traces of model and guide for one draw, in the caller's param store."""
        with _Params(self):
            return trace_pair(self.model, self.guide, *batch)

    def settings(self, step: int) -> list[Tensor]:
        """What the loss depends on beside the data: the moving fields at a step, and the step."""
        now = at_step(self.objective, step)
        values = [torch.as_tensor(getattr(now, name), dtype=self.dtype) for name in self.moving]
        return [*values, torch.as_tensor(step)]


def program_of(
    model: Any,
    guide: Any,
    objective: Any,
    args: tuple[Any, ...],
    *,
    size: int | None = None,
    plate: str | None = None,
) -> Program:
    """Makes a program, by calls of model, guide and objective that leave nothing behind.

    Args:
        model: a Pyro model.
        guide: its guide.
        objective: the loss; None is the negative ELBO.
        args: arguments of the calls.
        size: number of data in all.
        plate: name of the data plate; by default the one that `data_plate` finds.

    Warns:
        UserWarning: the loss depends on a tensor that wants a gradient and is no parameter, so that
            nothing will move it.

    Raises:
        TypeError: the objective is no function, or what is observed is no tensor of real numbers.
        ValueError: model and guide do not fit, or nothing is observed.
    """
    objective = ELBO() if objective is None else objective
    fits = callable(objective) and not inspect.isclass(objective)
    expect(fits, "objective", "a function, such as ELBO()", repr(objective), TypeError)
    program = Program(model, guide, objective, size)
    with random_state(None, keep=True), torch.enable_grad(), unchecked(), private_modules():
        with called_modules():  # may make what is made late, by modules that are then forgotten
            _find_plate(program, trace_pair(model, guide, *args)[0], plate)
        with called_modules() as called, poutine.trace(param_only=True) as capture:
            loss = objective(model, guide, *args, **program.options, step=0)
        got = type(loss).__name__
        expect(isinstance(loss, Tensor), "objective", "one that returns a tensor", got, TypeError)
        expect(not loss.is_complex(), "data", "a model of real densities", loss.dtype, TypeError)
        program.dtype = loss.dtype
        nodes: Any = capture.trace.nodes
        # inside, where Pyro's store still has the values that the statements refer to
        values = {name: node["value"].unconstrained() for name, node in nodes.items()}
    leaves = _leaves(loss)
    taken = (part for module in reached(model, guide) for part in module.modules())
    used = [part for part in taken if {*map(id, part.parameters(recurse=False))} & leaves.keys()]
    for module in [*called, *used]:
        if module not in set(program.modules()):
            program.called.append(module)

    def again() -> Tensor:
        with (
            random_state(None, keep=True),
            torch.enable_grad(),
            unchecked(),
            private_modules(),
            called_modules(),
        ):
            return objective(model, guide, *args, **program.options, step=0)

    _own_the_rest(program, leaves, [*args, *values.values()], again)
    owned = {id(parameter) for parameter in program.parameters()}
    for name, value in values.items():
        if id(value) not in owned:
            program.constraints[name] = nodes[name]["kwargs"]["constraint"]
            program.params.append(nn.Parameter(value.detach(), value.requires_grad))
    return program


def _find_plate(program: Program, trace: Any, plate: str | None) -> None:
    """Finds the data plate once, and passes on its name where the rule could differ later."""
    observed = numbers_observed(trace)
    program.plate = frame = data_plate(trace, plate)
    others = {name for node in observed for name in plates_of(node)} - {"data"}
    if plate is not None or (frame is not None and frame.name != "data" and len(others) > 1):
        program.plate_name = frame.name
        if plate is not None or takes_plate(program.objective):
            program.options["plate"] = frame.name


def _leaves(loss: Tensor) -> dict[int, Tensor]:
    """The tensors that a loss depends on and that want a gradient, by their numbers."""
    leaves: dict[int, Tensor] = {}
    seen, left = set(), [loss.grad_fn]
    while left:
        node: Any = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [each for each, _ in node.next_functions]
            if hasattr(node, "variable"):
                leaves[id(node.variable)] = node.variable
    return leaves


def _own_the_rest(
    program: Program, leaves: dict[int, Tensor], known: list[Any], again: Callable[[], Tensor]
) -> None:
    """Holds those parameters that a loss depends on and no module is known to have.

    Args:
        program: what holds them.
        leaves: what the loss depends on.
        known: tensors that are inputs.
        again: gives the loss of another run: what is not in this is made by a run, and no one's.

    Warns:
        UserWarning: there are tensors among them that are no parameters.
    """
    numbers = {*map(id, [*program.parameters(), *known])}
    rest = [value for number, value in leaves.items() if number not in numbers]
    program.loose.extend(value for value in rest if isinstance(value, nn.Parameter))
    others = [value for value in rest if not isinstance(value, nn.Parameter)]
    lasting = _leaves(again()) if others else {}
    shapes = [tuple(value.shape) for value in others if id(value) in lasting]
    if shapes:
        so = "model, guide: the loss depends on tensors that want a gradient and are no parameters"
        todo = "they are not trained; make them an `nn.Parameter`, or a `pyro.param`"
        warnings.warn(f"{so}, of shapes {shapes}: {todo} ({TROUBLE})", stacklevel=stacklevel())


@contextmanager
def called_modules() -> Iterator[list[nn.Module]]:
    """Lists the modules that are called inside, and puts their buffers back at the end."""
    called: list[nn.Module] = []
    with ExitStack() as scopes:

        def see(module: nn.Module) -> None:
            if module not in called:
                called.append(module)
                scopes.enter_context(kept_buffers(module))

        scopes.enter_context(watched(see))
        yield called


class _Params(Messenger):
    """Gives `pyro.param` statements the parameters of a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.sites = dict(zip(program.constraints, program.params, strict=True))
        self.constraints = program.constraints

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.sites:
            raw = self.sites[msg["name"]]
            value = transform_to(self.constraints[msg["name"]])(raw)
            value.unconstrained = weakref.ref(raw)
            msg["value"], msg["done"] = value, True
