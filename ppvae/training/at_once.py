"""Trains global latents at once: to the optimum of their ELBO, with a verdict on what was found."""

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppvae._process import interrupted
from ppvae.training.blame import blame
from ppvae.training.checkpoints import Checkpoint
from ppvae.training.execution import Execution
from ppvae.training.optimum import Optimum, Way, optimise
from ppvae.training.options import Options
from ppvae.training.result import Fit
from ppvae.training.snapshots import Diverged, undone_by_errors
from ppvae.training.task import Task
from ppvae.training.verdict import Verdict, judge

_IN_STEPS = "an optimizer of your own takes steps, which are compiled"


def fit_at_once(
    task: Task,
    options: Options,
    execution: Execution,
    steps: int,
    seed: int,
    bar: Any,
    file: Checkpoint | None,
) -> Fit | None:
    """Fits global latents to the optimum; None if they have to be fitted in steps.

    What was interrupted begins anew when it goes on: it is the same to the last bit, and takes
    seconds.

    Args:
        task: one that `is_global`.
        options: of the descent, of which only the callback counts.
        execution: how losses are to run, where they are: here they are not.
        steps: at most so many in each round.
        seed: chooses starts and draws.
        bar: a progress bar.
        file: where the result is saved, and its start, from which it goes on.
    """
    start = time.perf_counter()
    with undone_by_errors(task.parameters, [task.program]) as before:
        if file is not None and file.saved:
            done = file.saved["steps"] >= steps or file.saved["fit"]["converged"]
            _put(task, file.saved["values" if done else "start"])
            if done:
                file.check_losses([task.first_loss()])
                bar.close()
                return Fit(**file.saved["fit"], objective=task.program.objective)
        first = [parameter.detach().clone() for parameter in task.parameters]
        way = Way(task.batches.size, options.stops)
        try:
            optimum = optimise(task, way, steps=steps, seed=seed)
        except torch.linalg.LinAlgError as error:
            why = blame(task, task.example, 0, before.put_back)
            steep = f"the curvature of the posterior is beyond doubles ({error}): {why}"
            raise Diverged(f"{steep}; the parameters are unchanged") from error
        if optimum is None:
            return None
        _put(task, optimum.values)
        verdict = _ended(optimum, way) if way.ended else _verdict(task, optimum, seed)
        if verdict is None:  # the optimum was found in doubles, and is kept in less
            reach = f"the optimum is out of reach of {task.parameters[0].dtype}"
            why = blame(task, task.example, 0, before.put_back)
            raise Diverged(f"{reach}: {why}; the parameters are unchanged")
        losses, number = [*optimum.losses[:-1], verdict.loss], len(optimum.losses)
        bar.update(bar.total)
        bar.set_postfix({"loss": f"{losses[-1]:.6g}"}, refresh=False)
        bar.close()
        seconds, objective = time.perf_counter() - start, task.program.objective
        method = "L-BFGS" if optimum.draws else "stochastic gradient"
        end = seconds, number, number - 1, method, objective, "eager"
        execution = replace(execution, how="staged", why="", apart=[])
        execution.instead("eager", "the optimum is found at once, in few steps", _IN_STEPS)
        if optimum.one_by_one:
            execution.but(f"draws are run one after the other: {optimum.one_by_one}", None)
        result = Fit(losses, [], *end, verdict.converged, verdict.words)
        result = result._replace(execution_reason=execution.reason)
        if file is not None:
            kept = {k: v for k, v in result._asdict().items() if k != "objective"}
            file.write(
                lambda: {
                    "execution": "eager",
                    "loss": [task.first_loss()],
                    "fit": kept,
                    "start": first,
                    "values": [parameter.detach() for parameter in task.parameters],
                    "steps": 0 if interrupted() else steps,
                }
            )
    execution.warn()
    verdict.warn()
    return result


def _put(task: Task, values: list[Tensor]) -> None:
    """Gives the parameters of a task other values."""
    with torch.no_grad():
        for parameter, value in zip(task.parameters, values, strict=True):
            parameter.copy_(value.reshape(parameter.shape))


def _ended(optimum: Optimum, way: Way) -> Verdict:
    """What is to be said of a way that was ended."""
    who = "stopped by the callback" if way.stopped else "interrupted"
    words = f"{who} after {len(optimum.losses)} steps, before the optimum"
    return Verdict(words, None, optimum.losses[-1])


def _verdict(task: Task, optimum: Optimum, seed: int) -> Verdict | None:
    """What is to be said of an optimum; None if the parameters, as they are stored, are useless."""
    if not all(torch.isfinite(parameter).all() for parameter in task.parameters):
        return None
    try:
        verdict = judge(task, optimum, seed)
    except torch.linalg.LinAlgError:
        return None
    return verdict if math.isfinite(verdict.loss) else None
