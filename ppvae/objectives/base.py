"""What an objective is, and all that training and staging ask of one.

They ask it of any callable, by the functions below, and so know no objective by its class.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ppvae.objectives.draws import Run, runs_of


class Objective(ABC):
    """A loss of a model and its guide on a minibatch: a scalar in nats per datum.

    **To add an objective**, write a function `(model, guide, *args, size=None, step=0) -> scalar`:
    `trace_pair` runs the two programs, and `terms` reads the traces. Or derive a frozen dataclass
    from this class and write its `loss`. Any other callable may have these attributes as well:

    - `scheduled` names the fields that may be functions of the step, and in which objectives that
      are trained side by side may differ. In a graph such a field is an input, a tensor; else it is
      a number. `at_step` replaces the functions by their values.
    - `unstageable` says in a few words why a graph cannot hold the loss; it is empty if one can.

    Example:
        >>> from dataclasses import dataclass
        >>> from ppvae.objectives import Objective, at_step, warm_up
        >>> @dataclass(frozen=True)
        ... class Distortion(Objective):
        ...     weight: object = 1.0
        ...     scheduled = ("weight",)
        ...     def loss(self, draw, size):
        ...         (run,) = draw(1)
        ...         return self.weight * run.terms.distortion.mean()
        >>> at_step(Distortion(warm_up(100)), 25)
        Distortion(weight=0.25)
    """

    scheduled: ClassVar[tuple[str, ...]] = ()

    @property
    def unstageable(self) -> str:
        """Why a graph cannot hold the loss; empty, if one can."""
        return ""

    @abstractmethod
    def loss(self, draw: Callable[..., list[Run]], size: int | None) -> Tensor:
        """The loss, in nats per datum.

        Args:
            draw: called with a number of draws, it runs model and guide; see `runs_of`.
            size: number of data in all; None is the size of the data plate.
        """

    def __call__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        size: int | None = None,
        plate: str | None = None,
        step: Any = 0,
    ) -> Tensor:
        """The loss.

        Args:
            model: a Pyro model.
            guide: its guide; every draw must be reparametrized.
            *args: their arguments: one minibatch.
            size: number of data in all; by default the size of the data plate.
            plate: name of the data plate; by default the one that `data_plate` finds.
            step: number of steps of the optimizer so far, which may be a tensor.

        Returns:
            A scalar in nats per datum that can be differentiated.
        """
        return at_step(self, step).loss(partial(runs_of, model, guide, args, plate), size)


def at_step(objective: Any, step: Any) -> Any:
    """An objective whose `scheduled` fields are values, and no functions of the step any more.

    It is made as any other, so that its constructor checks the values.

    Args:
        objective: any objective; one without such functions is returned as it is.
        step: number of steps of the optimizer so far.
    """
    names = [name for name in _scheduled(objective) if callable(getattr(objective, name))]
    values = {name: getattr(objective, name)(step) for name in names}
    return replace(objective, **values) if values else objective


def moving_fields(objectives: Sequence[Any]) -> tuple[str, ...]:
    """The scheduled fields that are functions of the step, or that some objectives differ in.

    Raises:
        ValueError: the objectives differ in anything else.
    """
    first, *others = objectives
    names = _scheduled(first)
    for other in others:
        if other is not first and other != first:
            shared = {name: getattr(first, name) for name in names}
            alike = names and type(other) is type(first) and replace(other, **shared) == first
            if not alike:
                raise ValueError("objective: they differ in more than their scheduled fields")
    values = {name: [getattr(objective, name) for objective in objectives] for name in names}
    return tuple(
        name
        for name, (value, *rest) in values.items()
        if callable(value) or any(other is not value and other != value for other in rest)
    )


def takes_plate(objective: Any) -> bool:
    """Whether an objective can be told the name of the data plate, which a function need not."""
    kinds = inspect.signature(objective).parameters
    return "plate" in kinds or any(kind.kind is kind.VAR_KEYWORD for kind in kinds.values())


def _scheduled(objective: Any) -> tuple[str, ...]:
    return tuple(getattr(objective, "scheduled", ()))
