"""The one loop of training, over epochs, to a result.

Between two steps a training is a `Training`, whose state can be saved and loaded: then it goes on
as if nothing had been, to the last bit.
"""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ppvae._checks import check_label
from ppvae._scopes import stacklevel
from ppvae.training.checkpoints import Checkpoint
from ppvae.training.course import Ending, course
from ppvae.training.options import Options, step_scheduler
from ppvae.training.result import Fit
from ppvae.training.snapshots import Diverged, Snapshot
from ppvae.training.steps import Engine, Steps


def progress_bar(num_epochs: int, progress: Any) -> Any:
    """A progress bar over epochs; a string is its label, False hides it."""
    shown, label = check_label("progress", progress, "fit")
    return tqdm(total=num_epochs, desc=label, disable=not shown, unit="epoch")


@dataclass
class Numbers:
    """The numbers of the course of a training.

    Attributes:
        totals: the losses of what was seen of the epoch that has not ended, each times its number
            of data, summed for each replicate.
        still: the first epoch from which on the objective of each replicate stood still.
        epoch: epochs that have ended.
        position: minibatches that were seen of the one that has not.
        size: the data in these.
        losses: of each epoch, for each replicate.
        validation: the validation losses of each epoch, for each replicate.
        lowest: the lowest of them since its objective stood still, for each replicate.
        best_epoch: the epochs of these.
        ended: why each replicate has ended before the others; empty if it has not.
        lasted: how many epochs, and how many steps, each has had that has ended.
        stopped: why all ended before the last epoch; empty if they have not.
        seconds: the time in the loop, up to the end of the last epoch or the last save.
    """

    totals: list[float]
    still: list[int]
    lowest: list[float]
    best_epoch: list[int]
    ended: list[str]
    lasted: list[list[int]]
    epoch: int = 0
    position: int = 0
    size: int = 0
    losses: list[list[float]] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    stopped: str = ""
    seconds: float = 0.0

    @classmethod
    def of(cls, count: int) -> "Numbers":
        """Those of so many replicates, before their training."""
        return cls(
            totals=[0.0] * count,
            still=[0] * count,
            lowest=[math.inf] * count,
            best_epoch=[-1] * count,
            ended=[""] * count,
            lasted=[[0, 0] for _ in range(count)],
        )

    @property
    def going_on(self) -> list[int]:
        """The replicates that have not ended."""
        return [number for number, why in enumerate(self.ended) if not why]

    @property
    def mean(self) -> list[float]:
        """The losses of what was seen of the epoch, in nats per datum."""
        return [total / self.size for total in self.totals]


class Training:
    """A training that stands between two steps, and goes on from there.

    Attributes:
        steps: with the parameters, the optimizer and its scheduler.
        ending: ends the training of one model when its loss is flat; None goes through all epochs.
        validate: returns the validation losses of all after a number of steps; it is called after
            each epoch. None does without.
        before: parameters and buffers at the start of this run.
        numbers: the numbers of its course so far.
        best: parameters and buffers of the best epoch of each, with early stopping.
    """

    def __init__(
        self,
        steps: Steps,
        *,
        ending: Ending | None = None,
        validate: Callable[[int], list[float]] | None = None,
    ) -> None:
        self.steps, self.ending, self.validate = steps, ending, validate
        self.before = Snapshot(steps.engine.parameters, steps.engine.modules)
        self.numbers = Numbers.of(len(steps.engine.objectives))
        self._since = time.perf_counter()
        self.best: Snapshot | None = None
        self._began: list[Tensor] = []  # where the random numbers stood when the epoch began

    def go_on(self, bar: Any, file: Checkpoint | None = None) -> None:
        """Goes through the epochs that are left, or until there is a reason to stop.

        An interrupt ends it behind the next step.

        Args:
            bar: a progress bar, over all epochs.
            file: where it is saved after an epoch.
        """
        numbers = self.numbers
        bar.update(numbers.epoch - bar.n)
        while numbers.epoch < bar.total and not numbers.stopped:
            self._go_through_epoch()
            self.steps.engine.execution.warn()
            if self.steps.engine.interrupted:
                self.steps.check()
                break
            shown = self._end_epoch()
            bar.update()
            bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            if file is not None and file.is_due(numbers.epoch):
                self.save(file)
            if self.steps.engine.interrupted:
                break
        bar.close()

    def _go_through_epoch(self) -> None:
        """Takes the steps of an epoch that are left, unless it is interrupted."""
        numbers, engine = self.numbers, self.steps.engine
        if not numbers.position:
            self._began = engine.random_numbers()
        for losses, rows in self.steps.through(self._minibatches()):
            for values, count in zip(losses, rows, strict=True):
                totals = zip(numbers.totals, values, strict=True)
                numbers.totals = [total + value * count for total, value in totals]
                numbers.size += count
            numbers.position += len(rows)
            if engine.interrupted:
                return

    def _minibatches(self) -> Iterator[Any]:
        """The minibatches of the epoch that are left."""
        engine, done = self.steps.engine, self.numbers.position
        if not done:
            yield from engine.minibatches()
            return
        now = engine.random_numbers()
        engine.set_random_numbers(self._began)
        left = iter(engine.minibatches())
        for minibatch in itertools.islice(left, done):
            engine.data(minibatch, self.steps.number)
        engine.set_random_numbers(now)
        yield from left

    def _end_epoch(self) -> dict[str, float]:
        """What comes after the last step of an epoch; returns the losses that are shown."""
        numbers, steps = self.numbers, self.steps
        epoch, engine = numbers.epoch, steps.engine
        steps.check()
        numbers.losses.append(numbers.mean)
        goals = [steps.goals(step) for step in (steps.number - numbers.position, steps.number)]
        numbers.still = [
            since if now == was else epoch + 1
            for since, was, now in zip(numbers.still, *goals, strict=True)
        ]
        # what was lower before was lower for another objective
        moved = [since == epoch + 1 for since in numbers.still]
        pairs = zip(numbers.lowest, moved, strict=True)
        numbers.lowest = [math.inf if anew else lowest for lowest, anew in pairs]
        live = numbers.going_on
        shown = {"loss": sum(numbers.losses[-1][k] for k in live) / len(live)}
        if self.validate is not None:
            losses = self.validate(steps.number)
            self._keep_best(losses)
            shown["validation"] = sum(losses[k] for k in live) / len(live)
        numbers.epoch, numbers.position, numbers.size = epoch + 1, 0, 0
        numbers.totals = [0.0] * len(engine.objectives)
        self._look_at_clock()
        numbers.stopped = self._reason_to_stop(epoch, moved=moved[0])
        step_scheduler(steps.scheduler, shown.get("validation", shown["loss"]))
        return shown

    def _keep_best(self, losses: list[float]) -> None:
        """Notes the validation losses of an epoch, and keeps what had none as low before."""
        numbers, steps = self.numbers, self.steps
        epoch, engine = numbers.epoch, steps.engine
        for number in numbers.going_on:
            if not math.isfinite(losses[number]):
                which = f" of replicate {number}" if len(losses) > 1 else ""
                so = f"the validation loss{which} is {losses[number]} after epoch {epoch}"
                raise Diverged(f"{so}, and that of the training data finite; all stays as it is")
        numbers.validation.append(losses)
        better = [k for k in numbers.going_on if losses[k] < numbers.lowest[k]]
        for number in better:
            numbers.lowest[number], numbers.best_epoch[number] = losses[number], epoch
        if not steps.options.patience:
            return
        if self.best is None:
            self.best = Snapshot(engine.parameters, engine.modules)
        elif better:
            self.best.take(steps.number, better if len(losses) > 1 else None)

    def _look_at_clock(self) -> None:
        now = time.perf_counter()
        self.numbers.seconds += now - self._since
        self._since = now

    def _reason_to_stop(self, epoch: int, *, moved: bool) -> str:
        """Why the training ends before its last epoch; empty if it does not."""
        numbers, steps, engine = self.numbers, self.steps, self.steps.engine
        if engine.in_any(steps.options.stops(self._row(epoch))):
            return f"stopped by the callback after epoch {epoch}"
        if not engine.parameters:
            return "there is nothing to train"  # of a family without channels: only measured
        self._end_replicates(epoch)
        if not numbers.going_on:
            return numbers.ended[0]
        if self.ending is not None:
            loss = None if moved else numbers.losses[-1][0]
            if not self.ending.go_on(loss, steps.number):
                return self.ending.words
            steps.slow_down(self.ending.factor)
        return ""

    def _end_replicates(self, epoch: int) -> None:
        """Ends those that have run out of patience: they stay at their best epoch."""
        numbers, steps = self.numbers, self.steps
        patience = steps.options.patience or math.inf
        for number in numbers.going_on:
            if epoch - numbers.best_epoch[number] >= patience:
                lowest = f"which was lowest in epoch {numbers.best_epoch[number]}"
                numbers.ended[number] = f"stopped by the validation loss, {lowest}"
                numbers.lasted[number] = [epoch + 1, steps.number]
        ended = {number for number, why in enumerate(numbers.ended) if why}
        if self.best is not None and ended and numbers.going_on:  # they are moved with the others
            self.best.put_back(sorted(ended))
        steps.ended = ended

    def _row(self, epoch: int) -> dict[str, Any]:
        """What is told to a callback."""
        numbers, steps = self.numbers, self.steps
        losses = numbers.losses[-1]
        row: dict[str, Any] = {"epoch": epoch, "loss": losses if len(losses) > 1 else losses[0]}
        if numbers.validation:
            held_out = numbers.validation[-1]
            row["validation_loss"] = held_out if len(losses) > 1 else held_out[0]
        if steps.optimizer is not None:
            row["learning_rate"] = steps.optimizer.param_groups[0]["lr"]
        return row | {"num_steps": steps.number, "seconds": numbers.seconds}

    def save(self, file: Checkpoint) -> None:
        """Writes down where it stands."""
        engine = self.steps.engine
        file.write(
            lambda: {
                "execution": engine.execution.how,
                "not_faster": engine.execution.state_dict(),
                "loss": engine.first_losses(),
                "state": self.state_dict(),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on: tensors and plain numbers."""
        steps, engine = self.steps, self.steps.engine
        self._look_at_clock()
        return {
            "values": {name: value.detach() for name, value in engine.values().items()},
            "constants": self._constants(),
            "best": None if self.best is None else self._by_name(self.best),
            "optimizer": None if steps.optimizer is None else steps.optimizer.state_dict(),
            "scheduler": None if steps.scheduler is None else steps.scheduler.state_dict(),
            "ending": None if self.ending is None else self.ending.state_dict(),
            "step": steps.number,
            "began": self._began if self.numbers.position else [],
            "random_numbers": engine.random_numbers(),
            "numbers": asdict(self.numbers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where another training of the same make stood.

        Warns:
            UserWarning: what training leaves as it is was something else there.
        """
        steps, engine = self.steps, self.steps.engine
        here = engine.values()
        others = [
            n for n in state["constants"] if not torch.equal(state["values"][n], here[n].cpu())
        ]
        if others:
            so = f"{others}, which training does not move, were others: the checkpoint's are taken"
            warnings.warn(f"checkpoint: {so}", stacklevel=stacklevel())
        with torch.no_grad():
            for name, value in engine.values().items():
                saved = state["values"][name].to(value.device)
                if not torch.equal(value, saved):  # one that was expanded cannot be written to
                    value.copy_(saved)
        if state["best"] is not None:
            self.best = Snapshot(engine.parameters, engine.modules)
            now = self._by_name(self.best).items()
            self.best.values = [state["best"][name].to(value.device) for name, value in now]
        for part in ("optimizer", "scheduler"):
            if state[part] is not None:
                getattr(steps, part).load_state_dict(state[part])
        if steps.scheduler is not None:  # which asks whether there was a step before its own
            steps.optimizer._opt_called = True
        if self.ending is not None:
            self.ending.load_state_dict(state["ending"])
        self.numbers = Numbers(**state["numbers"])
        steps.ended = {number for number, why in enumerate(self.numbers.ended) if why}
        self._began = state["began"]
        engine.set_random_numbers(state["random_numbers"])
        steps.number = state["step"]
        steps.snapshot.take(steps.number)

    def _constants(self) -> list[str]:
        """The names of all that training has not moved: what is frozen, and most buffers."""
        engine, started = self.steps.engine, self._by_name(self.before)
        trained = {id(parameter) for parameter in engine.parameters}
        return [
            name
            for name, value in engine.values().items()
            if id(value) not in trained and torch.equal(value, started.get(name, value))
        ]

    def _by_name(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The values of a snapshot, each with the name that the engine has for it."""
        names = {id(value): name for name, value in self.steps.engine.values().items()}
        return {names[id(n)]: v for n, v in zip(snapshot.now(), snapshot.values, strict=True)}

    def results(self, *, interrupted: bool = False) -> list[Fit]:
        """The course of each replicate, and its share of the time; goes to the best epoch."""
        numbers, steps = self.numbers, self.steps
        if self.best is not None:
            self.best.put_back()
        steps.engine.write_back()
        columns = [*numbers.losses, *([numbers.mean] if numbers.size else [])]
        self._look_at_clock()
        seconds = numbers.seconds / len(steps.engine.objectives)
        results = []
        for number, goal in enumerate(steps.engine.objectives):
            ended = bool(numbers.ended[number])
            most, taken = numbers.lasted[number] if ended else (len(columns), steps.number)
            own = [losses[number] for losses in columns[:most]]
            held_out = [losses[number] for losses in numbers.validation[:most]]
            best_epoch = len(own) - 1 if self.best is None else numbers.best_epoch[number]
            ran = steps.engine.execution
            how = seconds, taken, best_epoch, "stochastic gradient", goal, ran.how
            early = interrupted and not ended
            said = self._verdict(own, number, interrupted=early)
            results.append(Fit(own, held_out, *how, *said, early, steps.optimizer, ran.reason))
        return results

    def _verdict(
        self, losses: Sequence[float], number: int, *, interrupted: bool
    ) -> tuple[bool | None, str]:
        """Whether a training is at its end, None if that cannot be judged, and in words."""
        numbers, ending = self.numbers, self.ending
        if interrupted:
            done = f"interrupted in epoch {numbers.epoch}, after {self.steps.number} steps"
            return None, f"{done}; {self._course(losses, number)[1]}"
        if self.best is not None and numbers.best_epoch[number] < len(losses) - 1:
            lowest = f"which was lowest in epoch {numbers.best_epoch[number]}"
            return None, f"stopped by the validation loss, {lowest}"
        if numbers.stopped.startswith("stopped"):
            return None, numbers.stopped
        if ending is not None and ending.flat is not None:
            return ending.flat, ending.words
        return self._course(losses, number)

    def _course(self, losses: Sequence[float], number: int) -> tuple[bool | None, str]:
        still = self.numbers.still[number]
        if still >= len(losses):
            return None, "the objective changed on the way, so that its values say little"
        return course(losses[still:], self.steps.number)


def train(
    engine: Engine,
    options: Options,
    bar: Any,
    *,
    ending: Ending | None = None,
    validate: Callable[[int], list[float]] | None = None,
    file: Checkpoint | None = None,
) -> list[Fit]:
    """Trains for some epochs, or until there is a reason to stop.

    An error puts parameters and buffers back to where they were before the training; `Diverged`, a
    second Ctrl-C and the loss of another process to where they were at most ten steps, or one
    stride, before it.

    Args:
        engine: what computes losses and gradients.
        options: of the descent.
        bar: a progress bar over the epochs.
        ending: see `Training`.
        validate: see `Training`.
        file: where the training is saved, and from where it goes on.

    Returns:
        The course of the training of each replicate, and its share of the time.
    """
    steps = Steps(engine, options)
    engine.execution.warn()
    training = Training(steps, ending=ending, validate=validate)
    try:
        if file is not None and file.state is not None:
            training.load_state_dict(file.state)
            file.check_losses(engine.first_losses())
            if file.is_done(bar.total):
                bar.close()
                engine.execution = file.ran(engine.execution)
                return training.results()
        training.go_on(bar, file)
        if file is not None:
            training.save(file)
        return training.results(interrupted=engine.interrupted)
    except (KeyboardInterrupt, ConnectionError):
        steps.put_back()
        raise
    except Diverged:
        raise
    except BaseException:
        training.before.put_back()
        engine.write_back()
        raise
