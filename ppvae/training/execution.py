"""How the losses of a training are run, and why not faster."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ppvae._checks import TROUBLE, expect
from ppvae._scopes import stacklevel
from ppvae.staging.gradients import Gradients
from ppvae.staging.staged import NotStageable, one_line

# Steps after which it has paid to stage a loss, and to compile it: held to eager steps of a small
# network, staging takes what 350 to 530 of them save, and half of that but for the first time in a
# process; a loop takes 14 s, or 1.6 s where its file is, and saves 2.0 ms of each
# (`examples/benchmark.py` measures all of these).
STAGE, COMPILE = 500, 10_000

_FASTER = {"eager": "staged", "staged": "compiled", "compiled": "looped"}
LEAVE_TWO = "take a batch_size that leaves two or more"
_ONE = "a minibatch of one datum is a case of its own", LEAVE_TWO
_OWN = "the data are the model's own, and no input of a graph", "give them as arguments"


@dataclass
class Execution:
    """How losses are run: as fast as may be, at first, and as fast as it goes in the end.

    Attributes:
        how: "eager", by the programs; "staged", by their graph; "compiled", by compiled code that
            gives the loss and its gradients; or "looped", by such that takes many steps at a call.
        insists: whether the user asked for compiled code, and is told where there is less.
        caller: the function that the user called.
        why: why the next faster way is not taken.
        apart: of what is run otherwise than the rest, and why.
    """

    how: str
    insists: bool = False
    caller: str = "fit"
    why: str = ""
    apart: list[str] = field(default_factory=list)
    _to_tell: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why it is not faster, in words; empty where whole steps are looped."""
        slower = [f"not {_FASTER[self.how]}: {self.why}"] if self.why else []
        return "; ".join([*slower, *self.apart])

    def instead(self, how: str, why: NotStageable | Exception | str, way_out: Any = "") -> None:
        """Runs so, and no faster.

        Args:
            how: as `how`.
            why: why the way that was taken cannot be.
            way_out: what the user may do about it, or "" where nobody knows; None where there is
                nothing to be done, so that it is no news. That of a `NotStageable` is its own.
        """
        if isinstance(why, NotStageable):
            way_out = why.way_out
        said = why if isinstance(why, str) else one_line(why)
        self.how, self.why = how, said
        so = "runs eagerly" if how == "eager" else f"{how}, not {_FASTER[how]}"
        self._note("", f"{so}; {said}", way_out)

    def but(self, why: str, way_out: Any = "") -> None:
        """Notes that something is run otherwise than the rest; once, however often that is."""
        if why not in self.apart:
            self.apart.append(why)
            self._note(why, f"{self.how}, but {why}", way_out)

    def state_dict(self) -> dict[str, Any]:
        """Why it is not faster, for a checkpoint, beside `how`."""
        return {"why": self.why, "apart": [*self.apart]}

    def as_before(self, how: str, state: Mapping[str, Any]) -> "Execution":
        """One that ran so, and why not faster, for the same user."""
        return replace(self, how=how, why=state["why"], apart=[*state["apart"]])

    def _note(self, what: str, so: str, way_out: Any) -> None:
        if self.insists and way_out is not None:
            self._to_tell[what] = f"{so}; {way_out}" if way_out else so

    def of(self, gradients: Gradients) -> None:
        """Runs as a graph of loss and gradients does: a compiler may fail, and sizes be many."""
        if gradients.why_not is not None and gradients.execution != self.how:
            self.instead(gradients.execution, gradients.why_not, "it takes a C++ compiler")
        if gradients.is_full:
            self.but("minibatches of a third size have no graph", "leave two sizes of minibatches")

    def warn(self) -> None:
        """Warns of what the user has not been told, if that is less than was asked for."""
        told, self._to_tell = self._to_tell, {}
        for so in told.values():
            warnings.warn(f"{self.caller}: {so} ({TROUBLE})", stacklevel=stacklevel())


def how_to_run(
    compile: Any, steps: int, rows: int, *, caller: str = "fit", graph: bool = False
) -> Execution:
    """How to run losses; see `compile` of `fit`.

    Args:
        compile: as `fit` takes it.
        steps: how many steps there will be.
        rows: number of data in a minibatch, 0 if they are the model's own; a minibatch of one datum
            always runs eagerly, and so do these.
        caller: the function that the user called.
        graph: there is a graph in any case, as that of replicates.

    Raises:
        ValueError: `compile` is none of its values.
    """
    known = isinstance(compile, bool) or isinstance(compile, str) and compile == "auto"
    expect(known, "compile", '"auto", True or False', repr(compile))
    execution = Execution("looped", insists=compile is True, caller=caller)
    if compile is not False and rows < 2:
        execution.instead("eager", *(_ONE if rows else _OWN))
    elif compile is False or steps < COMPILE and compile is not True:
        staged = graph or steps >= STAGE and compile is not False
        execution.how = "staged" if staged else "eager"
        pays = f"that pays from {COMPILE if staged else STAGE:,} steps on (compile=True insists)"
        execution.why = "compile=False" if compile is False else pays
    return execution
