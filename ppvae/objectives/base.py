"""What an objective is, the draws that it averages over, and what training asks of one.

Training and staging ask it of any callable, by the functions below: they know no objective by its
class.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ppvae._checks import check_count, expect
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.keywords import check_programs
from ppvae.programs.tracing import (
    check_sites,
    draws_plate,
    given,
    is_vectorized,
    run_model,
    run_trace,
)


class Run(NamedTuple):
    """One run of a model and its guide: of many draws, if the model is vectorized, else of one."""

    terms: Terms
    model_trace: Any
    guide_trace: Any


def runs_of(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    plate: str | None,
    num_samples: int,
    around_guide: AbstractContextManager[Any] | None = None,
) -> list[Run]:
    """Runs model and guide for some draws: once, if the model is vectorized, else for each draw.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their arguments.
        plate: name of the data plate, see `data_plate`.
        num_samples: number of draws; all are for the same data, if a plate subsamples.
        around_guide: a handler that every run of the guide goes through.

    Raises:
        ValueError: the sites of model and guide do not match, or the guide has parameters that no
            gradient reaches, since its draws are not reparametrized.
    """
    draws, count = None, num_samples
    if num_samples > 1 and is_vectorized(model):
        draws, count = draws_plate(model, *args, draws=num_samples), 1
    runs: list[Run] = []
    for _ in range(count):
        # every run is on the rows that the plates of the first one drew
        program = given(guide, runs[0].guide_trace, {}) if runs else guide
        with around_guide or nullcontext():  # outside the trace, which records what it makes
            guide_trace = run_trace(program, args, draws)
        model_trace = run_model(model, guide_trace, args, draws)
        check_sites(model_trace, guide_trace)
        run = Run(terms(model_trace, guide_trace, plate), model_trace, guide_trace)
        for name, value in run.terms.log_guide.items():
            fn = guide_trace.nodes[name]["fn"]
            if value.requires_grad and not fn.has_rsample:
                raise ValueError(
                    f"guide: expected reparametrized draws; {name!r} is drawn from {fn}, for which "
                    "pyro.infer.SVI with TraceGraph_ELBO can train this guide"
                )
        runs.append(run)
    return runs


class Objective(ABC):
    """A loss of a model and its guide on a minibatch: a scalar in nats per datum.

    **To add an objective**, write a function `(model, guide, *args, size=None, step=0) -> scalar`:
    `trace_pair` runs the two programs, and `terms` reads the traces. Or derive a frozen dataclass
    from this class and write its `loss`. Any other callable may have these attributes as well:

    - `scheduled` names the fields that may be functions of the step. Objectives that are trained
      side by side may differ in these fields only. In a graph such a field is an input, a tensor;
      else it is a number. `at_step` replaces the functions by their values.
    - `unstageable` says in a few words why a graph cannot hold the loss; it is empty if one can.
    - `indivisible` says why the loss of a minibatch is not the mean of those of its parts, by their
      numbers of data, so that several processes cannot share it; it is empty if it is.

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

    @property
    def indivisible(self) -> str:
        """Why the loss of a minibatch is not the mean of those of its parts; empty, if it is."""
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

        Raises:
            TypeError: model or guide cannot be called.
            ValueError: `size` is no whole number of at least 1.
        """
        check_programs(model, guide)
        size = None if size is None else check_count("size", size)
        return at_step(self, step).loss(partial(runs_of, model, guide, args, plate), size)


def at_step(objective: Any, step: Any) -> Any:
    """An objective whose `scheduled` fields are values, and no functions of the step any more.

    It is made as any other, so that its constructor checks the values.

    Args:
        objective: any objective; one without such functions is returned as it is.
        step: number of steps of the optimizer so far.
    """
    fields = _scheduled(objective)
    values = {name: field(step) for name, field in fields.items() if callable(field)}
    return replace(objective, **values) if values else objective


def moving_fields(objectives: Sequence[Any]) -> tuple[str, ...]:
    """The scheduled fields that are functions of the step, or that some objectives differ in.

    Raises:
        ValueError: the objectives differ in anything else.
    """
    first = objectives[0]
    shared = _scheduled(first)
    for other in objectives:
        same = other is first or other == first
        if not same and shared and type(other) is type(first):
            same = replace(other, **shared) == first
        expect(same, "objective", "those that differ in their scheduled fields only", "others")

    def moves(name: str) -> bool:
        values = [getattr(objective, name) for objective in objectives]
        return callable(values[0]) or values.count(values[0]) < len(values)

    return tuple(filter(moves, shared))


def takes_plate(objective: Any) -> bool:
    """Whether an objective has an argument `plate`, which a plain function need not have."""
    kinds = inspect.signature(objective).parameters
    return "plate" in kinds or any(kind.kind is kind.VAR_KEYWORD for kind in kinds.values())


def _scheduled(objective: Any) -> dict[str, Any]:
    """The scheduled fields of an objective, which a plain function has none of, by name."""
    return {name: getattr(objective, name) for name in getattr(objective, "scheduled", ())}
