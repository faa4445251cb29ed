"""What is to be trained: a model, its guide, an objective and data, which fit each other."""

import inspect
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae._scopes import eval_mode, kept_buffers, random_state, stacklevel, unchecked
from ppvae.data.adapters import form_of, has_missing
from ppvae.data.batches import Batches, batches_of
from ppvae.guides.family_guide import FamilyGuide
from ppvae.models.protocol import check_data_of
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.checks import check_densities, check_model
from ppvae.programs.keywords import bare
from ppvae.programs.missing import takes_missing
from ppvae.staging.program import Program, program_of
from ppvae.training.processes import Processes
from ppvae.training.share import Share, share_of


@dataclass(frozen=True)
class Task:
    """The loss of a model and its guide, and data; made by `task_of`.

    Attributes:
        program: the loss.
        batches: the data to train on.
        example: the first minibatch of a pass.
    """

    program: Program
    batches: Batches
    example: tuple[Any, ...]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that are trained.

        Those of plain `pyro.param` statements share their memory with Pyro's param store.
        """
        return [p for p in self.program.parameters() if p.requires_grad]

    def held_out_loss(self, held_out: Batches, step: int, share: Share | None = None) -> float:
        """The objective on other data, with the same random numbers every time.

        Args:
            held_out: the data.
            step: number of steps so far.
            share: what this process computes of each minibatch, where there are others.
        """
        held_out.to(self.batches.device)
        total, count = torch.zeros((), dtype=torch.float64, device=held_out.device), 0
        program = self.program
        # the modules that plain functions call, too
        with torch.no_grad(), random_state(0), eval_mode(program), unchecked():
            for batch in held_out:
                rows = held_out.rows(batch)
                with nullcontext(batch) if share is None else share.of(batch) as part:
                    loss = program.loss(part, step, size=held_out.size).item()
                total += loss * rows * (1.0 if share is None else share.weight(batch))
                count += rows
        if share is not None:
            total = share.processes.sums(total)
        return total.item() / count

    def share(self, processes: Processes, held_out: Batches | None = None) -> Share:
        """What this process computes of each minibatch, of held-out data in evaluation mode."""
        if held_out is None:
            return share_of(processes, self.program, self.batches, self.example)
        held_out.to(self.batches.device)
        with eval_mode(self.program):
            return share_of(processes, self.program, held_out, held_out.example(), held_out.size)

    def first_loss(self) -> float:
        """The loss on the first minibatch, by the same random numbers every time."""
        with torch.no_grad(), random_state(0), kept_buffers(self.program), unchecked():
            return self.program.loss(self.example, 0).item()

    def check(self, batch: tuple[Any, ...]) -> None:
        """Runs the loss on a minibatch with the checks of Pyro and PyTorch, if they are on."""
        with random_state(None, keep=True), torch.no_grad(), kept_buffers(self.program):
            self.program.loss(batch, 0)

    def terms(self, batch: tuple[Any, ...]) -> Terms:
        """The terms of the objective on a minibatch, for one draw of the guide."""
        return terms(*self.program.traces(batch), self.program.plate_name)

    def check_support(self, data: Batches) -> None:
        """Raises a ValueError unless every datum lies in the support of its likelihood.

        Of data that a loader gives, the first minibatch is looked at now, and the others in the
        first pass.
        """
        if data.loader is not None:
            data.check = partial(self._check_batch, data.name)
            self._check_batch(data.name, data.example())
            return
        start = 0
        for batch in replace(data, shuffle=False):
            self._check_batch(data.name, batch, start)
            start += data.rows(batch)

    def _check_batch(self, name: str, batch: tuple[Any, ...], start: int = 0) -> None:
        program = self.program
        with torch.no_grad(), random_state(None, keep=True), eval_mode(program), unchecked():
            trace = program.traces(batch)[0]
            check_model(program.model, trace, batch, name, start)
            if has_missing(batch):  # which may be in more than the observations
                check_densities(trace)


def training_batches(
    model: Any,
    guide: Any,
    data: Any,
    batch_size: int | None,
    extra: tuple[Any, ...],
    names: tuple[str, ...] = (),
    **told: Any,
) -> Batches:
    """Minibatches to train on. A model with a method `check_data` checks data that are tensors.

    Of `extra`, keyword arguments of these `names`, it is given those that the method takes.
    """
    form = form_of(model, guide)
    if isinstance(data, tuple) and not (data or extra):
        expect(_has_data(model, guide), "data", "at least one tensor or array", "none")
    batches = batches_of("data", data, batch_size, form, training=True, extra=extra, **told)
    if batches.tensors and not extra:
        _check_number(model, len(batches.tensors))
    whole = batches.tensors and all(isinstance(each, Tensor) for each in batches.tensors)
    if whole and has_missing(batches.tensors):
        _check_seen(batches.tensors)
    if whole:
        check_data_of(model, *batches.tensors, **dict(zip(names, extra, strict=True)))
    return batches


def _check_number(model: Any, data: int) -> None:
    """Raises a TypeError unless a model can be called with so many arguments."""
    try:
        signature = inspect.signature(getattr(model, "forward", model))
    except (TypeError, ValueError):  # what has none
        return
    try:
        signature.bind(*[None] * data)
    except TypeError as error:
        wanted = f"tensors for the arguments {signature} of the model"
        raise TypeError(f"data: expected {wanted}, got {data} ({error})") from None


def _check_seen(tensors: tuple[Any, ...]) -> None:
    """Raises a ValueError if nothing is observed; warns of columns of which nothing is."""
    some = not all(bool(tensor.isnan().all()) for tensor in tensors)
    expect(some, "data", "observed values", "nothing but missing ones")
    for tensor in tensors:
        gone = tensor.isnan().all(0)
        if tensor.dim() > 1 and gone.any() and not gone.all():
            first = ", ".join(map(str, gone.nonzero()[0].tolist()))
            told = f"{int(gone.sum())} of {gone.numel()} columns, first {first}, have"
            told += " no observed value, so that nothing is learned of them"
            warnings.warn(f"data: {told}", stacklevel=stacklevel())


def _has_data(model: Any, guide: Any) -> bool:
    """Whether a pair can be called without data; an encoder always takes some."""
    try:
        inspect.signature(getattr(model, "forward", model)).bind()
    except TypeError:
        return False
    return getattr(guide, "encoder", None) is None


_FAR = 5.0  # standard deviations of a column, beyond which zero is none of its values


def _tell_of_zeros(guide: Any, batches: Batches) -> None:
    """Warns if the zeros that an encoder gets for missing entries are far from the data."""
    encoder, first = getattr(guide, "encoder", None), next(iter(batches.tensors), None)
    able = isinstance(encoder, nn.Module) and not takes_missing(encoder)
    if not (able and isinstance(first, Tensor) and first.is_floating_point() and first.dim() == 2):
        return
    gaps = torch.isnan(first)
    mean = first.double().nanmean(0)
    sd = (first.double() - mean).square().nanmean(0).sqrt()
    away = torch.where(gaps.any(0) & (sd > 0), mean.abs() / sd, 0.0)
    if away.max() > _FAR:
        column = int(away.argmax())
        warnings.warn(
            f"{batches.name}: missing entries are zeros to the encoder, {away.max():.0f} standard "
            f"deviations from column {column}; nn.FillMissing.of(x, encoder) fills in the means",
            stacklevel=stacklevel(),
        )


def _check_parameters(guide: Any, plate: Any) -> None:
    """Raises a ValueError if a guide has parameters for each datum, of which it sees minibatches.

    A model that takes all data, or their rows, tells the guide which are at hand; but this one is
    given some of them, and the guide would take those of any minibatch for the same.
    """
    parts = guide.modules() if isinstance(guide, nn.Module) else ()
    held = any(plate.name in part.held for part in parts if isinstance(part, FamilyGuide))
    wanted = f"an encoder, or shared parameters, for the latents in the plate {plate.name!r}"
    came = "parameters for each datum beside minibatches (batch_size=None takes all data at once)"
    expect(not held, "guide", wanted, came)


def task_of(
    model: Any, guide: Any, objective: Any, batches: Batches, plate: str | None = None
) -> Task:
    """Makes a task. It calls model and guide, which make the parameters that they make late.

    Args:
        model: a Pyro model.
        guide: its guide.
        objective: the loss; None is the negative ELBO.
        batches: the data, which are moved to the device of the parameters.
        plate: name of the data plate; by default the one that `data_plate` finds.

    Raises:
        TypeError: the objective is no function, or returns no tensor.
        ValueError: model and guide do not fit, nothing is observed, or the data are not as
            many as the data plate has.
    """
    modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
    found = (p for module in modules for p in module.parameters())
    near = next(found, next((t for t in batches.tensors if isinstance(t, Tensor)), None))
    if near is not None:
        batches.to(near.device)
    if batches.missing:
        _tell_of_zeros(bare(guide), batches)
    batch = batches.example()
    size = batches.size if batches.given else None
    program = program_of(model, guide, objective, batch, size=size, plate=plate)
    if program.plate is not None and not batches.given:  # its data are the program's own
        batches.size = batches.batch_size = program.plate.full_size or program.plate.size
    elif program.plate is not None:
        sizes, rows = (program.plate.size, program.plate.full_size), len(batch[0])
        wanted = f"{sizes[0]} rows, the size of the plate {program.plate.name!r} of the model"
        expect(rows in sizes, "data", wanted, rows)
        if not batches.whole and program.plate.full_size in (None, sizes[0]):
            _check_parameters(bare(guide), program.plate)
        task = Task(program, batches, batch)
        if program.plate.full_size not in (None, sizes[0], batches.size):
            _check_size(task, program.plate)
        return task
    return Task(program, batches, batch)


def _check_size(task: Task, plate: Any) -> None:
    """Raises a ValueError if latents of all data are told two numbers of data.

    For the latents of each datum their number makes no difference.
    """
    with torch.no_grad(), kept_buffers(task.program), random_state(None, keep=True), unchecked():
        terms = task.terms(task.example)
    wanted = f"a plate {plate.name!r} of {task.batches.size} members, as there are data"
    came = f"one of {plate.full_size}, beside latents of all of them"
    expect(terms.is_local, "model", wanted, came)
