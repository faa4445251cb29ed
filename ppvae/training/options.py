"""What a user may choose of the descent: optimizer, rate, scheduler, clipping, callback."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ppvae._checks import check_count, check_number, expect

Named = Sequence[tuple[str, Tensor]]  # parameters with their names


@dataclass
class Options:
    """The choices; those that are not made are as in `fit`, which says what they mean.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: an argument is out of its range.
    """

    learning_rate: float = 1e-3
    optimizer: Any = None
    scheduler: Callable[[Any], Any] | None = None
    clip: float | None = None
    callback: Callable[[dict[str, Any]], Any] | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        self.learning_rate = check_number("learning_rate", self.learning_rate, positive=True)
        self.clip = None if self.clip is None else check_number("clip", self.clip, positive=True)
        if self.patience is not None:
            self.patience = check_count("patience", self.patience)
        for name in ("optimizer", "scheduler", "callback"):
            value = getattr(self, name)
            fits = value is None or callable(value)
            expect(fits, name, "a class or function", type(value).__name__, TypeError)
        if isinstance(self.optimizer, PyroOptim):
            _check_pyro_optimizer(self.optimizer)

    def descent(self, named: Named) -> tuple[Any, Any]:
        """The optimizer of some parameters, and its scheduler or None.

        Raises:
            TypeError: what was given makes something else.
        """
        optimizer = self._optimizer(named)
        kind = "a function that returns an optimizer"
        fits = all(hasattr(optimizer, name) for name in ("step", "param_groups"))
        expect(fits, "optimizer", kind, repr(optimizer), TypeError)
        if self.scheduler is None:
            return optimizer, None
        scheduler = self.scheduler(optimizer)
        kind = "a function that returns a scheduler of torch.optim.lr_scheduler"
        fits = all(hasattr(scheduler, name) for name in ("step", "state_dict"))
        expect(fits, "scheduler", kind, repr(scheduler), TypeError)
        return optimizer, scheduler

    def _optimizer(self, named: Named) -> Any:
        parameters = [parameter for _, parameter in named]
        if self.optimizer is None:  # all parameters in one kernel
            return torch.optim.Adam(parameters, lr=self.learning_rate, fused=True)
        if isinstance(self.optimizer, PyroOptim):
            pyros: Any = self.optimizer
            return pyros.pt_optim_constructor(parameters, **pyros.pt_optim_args)
        given = list(named) if _wants_names(self.optimizer) else parameters
        return self.optimizer(given, lr=self.learning_rate)

    def stops(self, row: Mapping[str, Any]) -> bool:
        """Calls the callback on what there is after an epoch; whether it ends the training.

        Raises:
            TypeError: it returns something else than None, True or False.
        """
        said = None if self.callback is None else self.callback(dict(row))
        fits = said is None or isinstance(said, (bool, np.bool_))
        expect(fits, "callback", "one that returns None, or True to stop", repr(said), TypeError)
        return bool(said)


def step_scheduler(scheduler: Any, loss: float) -> None:
    """Moves a scheduler on by an epoch with that loss."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    elif scheduler is not None:
        scheduler.step()


def clip_gradients(parameters: Sequence[Tensor], most: float, replicates: int) -> None:
    """Scales gradients down so that their norm, for each replicate, is `most` or below."""
    slopes = [p.grad for p in parameters if p.grad is not None]
    squares = [s.reshape(replicates, -1).square().sum(1) for s in slopes]
    factor = (most / (sum(squares, torch.zeros(())).sqrt() + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            ones = [1] * (parameter.dim() - 1) if replicates > 1 else []
            scale = factor.reshape(-1, *ones) if replicates > 1 else factor.squeeze()
            parameter.grad = parameter.grad * scale.to(parameter.grad.dtype)


def _wants_names(optimizer: Any) -> bool:
    """Whether a function asks for the names of parameters: its first argument is called so."""
    try:
        first = next(iter(inspect.signature(optimizer).parameters), "")
    except (TypeError, ValueError):  # what has no signature
        return False
    return first == "named_parameters"


def _check_pyro_optimizer(optimizer: Any) -> None:
    """Raises unless an optimizer of Pyro's is one of PyTorch's with fixed settings."""
    fixed = isinstance(optimizer.pt_optim_args, dict)
    wanted = "an optimizer of pyro.optim with a dict of settings"
    advice = "settings by parameter; use a function of `named_parameters` of your own"
    expect(fixed, "optimizer", wanted, advice, TypeError)
    scheduled = isinstance(optimizer, PyroLRScheduler)
    expect(not scheduled, "optimizer", wanted, "a scheduler; use `scheduler=`", TypeError)
    clipped = optimizer.pt_clip_args
    expect(not clipped, "optimizer", wanted, "arguments of clipping; use `clip=`", TypeError)
