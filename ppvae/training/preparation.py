"""What a training begins with: data that fit its programs, and the words for what it is of."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ppvae._checks import check_choice, expect
from ppvae.data.batches import Batches, batches_of
from ppvae.programs.keywords import bare
from ppvae.programs.verdicts import remember
from ppvae.training.checkpoints import Checkpoint
from ppvae.training.identity import data_in_words, in_words, parts_of
from ppvae.training.optimum import is_free
from ppvae.training.options import Options
from ppvae.training.processes import Processes
from ppvae.training.result import Fit
from ppvae.training.share import Share
from ppvae.training.task import Task, training_batches

Pair = tuple[Any, Any]  # a model and its guide


class Material(NamedTuple):
    """The data of a training; made by `material_of`.

    Attributes:
        batches: those that are trained on.
        held_out: those that validate; None if there are none.
    """

    batches: Batches
    held_out: Batches | None

    @property
    def each(self) -> list[Batches]:
        """Those that there are."""
        return [each for each in self if each is not None]

    @property
    def missing(self) -> bool:
        """Whether a number is missing among them."""
        return any(each.missing for each in self.each)


def material_of(
    pair: Pair,
    data: Any,
    validation: Any,
    batch_size: int | None,
    extra: tuple[Any, ...],
    names: tuple[str, ...],
    *,
    size: int | None = None,
) -> Material:
    """The data of a training, as minibatches.

    Args:
        pair: a model and its guide.
        data: as `fit` takes them.
        validation: likewise.
        batch_size: likewise; a guide of free parameters takes all data at once.
        extra: arguments behind the data.
        names: of these.
        size: as `fit` takes it.
    """
    whole = batch_size is None and is_free(pair[1])
    programs = bare(pair[0]), bare(pair[1])
    told: dict[str, Any] = {"whole": whole, "size": size}
    batches = training_batches(*programs, data, batch_size, extra, names, **told)
    return Material(batches, None if validation is None else _held_out(validation, batches))


def _held_out(validation: Any, batches: Batches) -> Batches:
    """The validation data, with the further arguments of those that are trained on."""
    wanted = "no tensor with as many rows as the data, beside validation data"
    expect(not any(batches.cut), "kwargs", wanted, "one")
    size = batches.batch_size or 1024
    told: dict[str, Any] = {"training": False, "extra": batches.extra}
    held = batches_of("validation", validation, size, batches.form, **told)
    kinds, came = ([tensor.dtype for tensor in each.tensors] for each in (batches, held))
    expect(not (kinds and came) or kinds == came, "validation", f"{kinds}, as the data", came)
    return held


def check_call(precision: Any) -> None:
    """Raises a ValueError unless a training can be had here, in that precision."""
    check_choice("precision", precision, ("highest", "high", "medium", None))
    wanted = "a call outside of torch.inference_mode, in which nothing can be trained"
    expect(not torch.is_inference_mode_enabled(), "fit", wanted, "one inside")


def check_supports(task: Task, material: Material) -> None:
    """Raises a ValueError unless every datum lies in the support of its likelihood."""
    for batches in material.each:
        batches.to(material.batches.device)
        task.check_support(batches)


def check_held_out(task: Task, held_out: Batches | None, share: Share | None = None) -> None:
    """Raises before anything is trained what validation would raise, if there is such."""
    if held_out is not None:
        first = task.held_out_loss(held_out, 0, share)
        expect(math.isfinite(first), "validation", "data of a finite loss", first)


def checkpoint_of(path: Any, run: Mapping[str, str], others: Processes | None = None) -> Checkpoint:
    """The checkpoint of a training, which must be of that training if it is there already.

    Args:
        path: of the file.
        run: what the training is of, in words.
        others: those that train together, of which the first has the file.
    """
    if others is None:
        return Checkpoint(path, run)
    file = others.of_first(lambda: Checkpoint(path, run))
    file.kept = others.is_first
    return file


def in_all_words(task: Task, options: Options, material: Material, **told: Any) -> dict[str, str]:
    """What a training is of, in words: its programs, data and options, and what else was told."""
    program, (batches, held_out) = task.program, material
    named = {"model": bare(program.model), "guide": bare(program.guide)}
    parts = parts_of(program=program)
    parts |= {name: in_words(p) for name, p in named.items() if not isinstance(p, nn.Module)}
    chosen = {name: in_words(value) for name, value in vars(options).items() if name != "callback"}
    own = {"objective": in_words(program.objective), "plate": f"{program.plate_name}"}
    own |= {"data": data_in_words(batches), "batch_size": f"{batches.batch_size}"}
    own["validation"] = "none" if held_out is None else data_in_words(held_out)
    return parts | chosen | own | {name: f"{value}" for name, value in told.items()}


def remember_fit(task: Task, result: Fit) -> None:
    """Leaves the verdict, and the objective in words, to `evaluate` and to the export."""
    program = task.program
    words = {"verdict": result.verdict, "objective": in_words(program.objective)}
    remember(bare(program.model), bare(program.guide), words=words, converged=result.converged)
