"""`fit` trains a model and its guide."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DistributedSampler

from ppvae._checks import check_count, check_flag, check_seed, expect
from ppvae._process import answer_interrupt, deferred_interrupts, exclusive
from ppvae._scopes import matmul_precision, private_modules, random_state, train_mode
from ppvae.programs.keywords import with_keywords
from ppvae.programs.missing import nan_masked
from ppvae.training.at_once import fit_at_once
from ppvae.training.course import Ending
from ppvae.training.execution import COMPILE, how_to_run
from ppvae.training.identity import batch_in_words
from ppvae.training.loop import progress_bar, train
from ppvae.training.optimum import is_free, is_global
from ppvae.training.options import Options
from ppvae.training.preparation import (
    check_call,
    check_held_out,
    check_supports,
    checkpoint_of,
    in_all_words,
    material_of,
    remember_fit,
)
from ppvae.training.processes import Processes, processes, together
from ppvae.training.result import Fit
from ppvae.training.single import single
from ppvae.training.task import Task, task_of
from ppvae.training.verdict import Verdict, judge_steps

_ROUND = 1_000  # steps of a method for global latents in each round, where the user does not say
_LONGEST = 50_000  # steps of a training without `num_epochs`, at the latest, but ...
_FEWEST = 200  # ... so many epochs at least


@exclusive
@together
def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any = (),
    *,
    num_epochs: int | None = None,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    optimizer: Any = None,
    scheduler: Callable[[Any], Any] | None = None,
    clip: float | None = None,
    objective: Callable[..., Tensor] | None = None,
    seed: int | None = None,
    validation: Any = None,
    patience: int | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    checkpoint: Any = None,
    check_support: bool = True,
    compile: bool | str = "auto",
    precision: str | None = None,
    progress: bool | str = True,
    plate: str | None = None,
    size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Fit:
    """Trains the parameters of a model and its guide on the negative ELBO, or another objective.

    Works on any Pyro model and guide whose draws are reparametrized. The modules, and those that
    plain functions call or take parameters of, are trained in
    training mode and left in the mode they had. Pyro's own checks run on the first step only. Fits
    and evaluations in several threads wait for each other: Pyro's handlers belong to the process.

    **Global latents** (a `FamilyGuide` without encoder, another autoguide of Pyro's, or any guide
    whose latents are in no plate of the data) are fitted to the optimum, on all the data at once
    and whatever their units are: from the mode of the posterior and its curvature, by L-BFGS on
    draws that are held fixed, in double precision. `Fit.converged` says whether that was reached,
    and `Fit.verdict` how one knows; `NotConverged` warns where it was not, and `NarrowFamily` where
    the posterior is far from every member of the family.

    **All else** is trained with stochastic gradients: for `num_epochs`, after which the verdict
    says whether the loss was still falling; or without that number until the loss is flat, so that
    three times as many epochs would gain less than 0.1 nats per datum (or than half of the noise in
    the loss of an epoch), after which the learning rate falls to a hundredth over a quarter as
    many epochs again.

    **Several processes** (those of the default group of `torch.distributed`, which a program that
    is started with `torchrun` joins by `init_process_group()`) train together, as one would with
    the same `batch_size`: all of them call `fit` with the same arguments and data, each computes
    its share of every minibatch, and the gradients are averaged. The result is the same in all,
    and up to rounding whatever their number. The first one shows progress and has the checkpoint,
    from which any number of them goes on. Where the loss of a minibatch is not the mean of those of
    its parts (batch normalisation, free bits), each process computes all of it, and a warning says
    so. Global latents that are fitted at once are so by each. Inside of `ppvae.training.apart()` a
    process is on its own, as it is in all other functions of this library.

    **Ctrl-C** ends the training after its step (or after those of a tenth of a second, where many
    are taken by one call): `fit` returns what was trained, and `Fit.interrupted` says so; a second
    one raises, and takes back at most ten steps, or those of such a call. With a
    checkpoint nothing at all is lost, and SIGTERM, too, waits until it is written.

    Args:
        model: a Pyro model; called with one minibatch.
        guide: its guide.
        data: a tensor, array, list of numbers, table of pandas or xarray, or sparse matrix of
            SciPy's, or a tuple of them with equal first dimension, which become the arguments; or a
            `Dataset` of such items (every part of an item becomes an argument, so leave labels
            out); or a `DataLoader`. Left out for a model that has its data, or takes them by
            keyword: its data plate then tells their number. NaN, what is masked and NA are not
            observed. All take the dtype of the parameters (a tensor with a warning) and are moved
            to their device.
        num_epochs: passes through the data, at least 1; by default as many as it takes. For global
            latents at most so many steps in each round of the method; by default 1,000.
        max_epochs: a bound on them where `num_epochs` is not given; by default 200, or as many as
            make 50,000 steps. For global latents it is what `num_epochs` is.
        batch_size: size of a minibatch; by default all the data, or 128 of more than 1024 (but all,
            where all that the guide learns are free parameters). The last one of an epoch may be
            smaller.
        learning_rate: step size.
        optimizer: called as `optimizer(parameters, lr=learning_rate)`; by default Adam, fused. A
            function whose first argument is called `named_parameters` gets pairs of a name, such as
            `model.decoder.weight`, and a parameter, so that groups can have rates of their own. Or
            one of `pyro.optim` with a dict of settings, which has a rate of its own.
            Given one, global latents are trained by it, too, as they are with another objective,
            validation data, minibatches, or more than 500 parameters of which the mode says nothing
            (a flow).
        scheduler: called as `scheduler(optimizer)`, returns a scheduler of
            `torch.optim.lr_scheduler`, which is moved on after each epoch; beside `num_epochs`. A
            `ReduceLROnPlateau` is told the validation loss, or else that of training.
        clip: the largest norm of the gradient; a longer one is scaled down to it. None clips
            nothing.
        objective: the loss, `objectives.ELBO(beta=4.0)` for one; by default `objectives.ELBO()`.
            Called as `objective(model, guide, *batch, size=N, step=s)`, with the number of data in
            all and the number of steps before this one (see `objectives.Objective`); returns a
            scalar in nats per datum.
            With any but the default, `losses` and `validation_losses` are its values, and not those
            of the negative ELBO.
        seed: seeds minibatches and draws, without a trace outside; None uses the caller's stream
            (in several processes, a seed that the first one draws from its own).
        validation: data of the same kind, evaluated after each epoch.
        patience: stop after this many epochs without a lower validation loss, and go back to the
            parameters and buffers of the best epoch. While the objective moves, as in a warm-up,
            its values cannot be compared, and none of its epochs is the best.
        callback: called after each epoch with a dict of `epoch`, `loss`, `num_steps` and `seconds`,
            and where there are such of `validation_loss` and `learning_rate`; True ends the
            training. For global latents, after each step.
        checkpoint: path of a file, in which the training is saved after each epoch (or less often,
            where that would take more than 2 % of the time) and at its end. If the file is there,
            the training goes on from it, and ends with the same bits as if it had not been stopped
            (on a CPU); one that had ended is returned, or goes on to a larger `num_epochs`. A
            `Dataset` or `DataLoader` must give the same data again. `ppvae.training.checkpoints`
            says what is in it.
        check_support: check every datum against the support of its likelihood before training, or,
            where a `DataLoader` gives them, in the first epoch; it takes a run of the programs.
        compile: run compiled code; "auto" does so for 10,000 steps or more, which take longer than
            the compiler, and stages from 1,000 on. On a CPU and with Adam as it comes, many whole
            steps are taken by one call of a compiled loop, which is kept in a file for later
            processes (in `~/.cache/ppvae`, or `$PPVAE_CACHE`); all else compiles the loss and its
            gradients as one graph (see `stage`). What cannot be staged runs eagerly. The result is
            the same up to rounding. `Fit.execution` says which it was, and `execution_reason` why
            it was none that is faster; `True` warns of that, where there is a remedy.
        precision: the precision of products of float32 matrices, "highest", "high" or "medium", as
            in `torch.set_float32_matmul_precision`; None leaves it as it is.
        progress: show a progress bar; a string is its label.
        plate: name of the data plate; by default `data`, or else the one whose length is that of
            the data (see `data_plate`).
        size: the number of data in an `IterableDataset`, where it has no length.
        kwargs: keyword arguments of model and guide. Tensors with as many rows as the data are cut
            into the minibatches with them, all else is passed as it is.

    Returns:
        The losses, how they were reached, and a verdict; see `Fit`. `evaluate` and `from_pyro_svi`
        carry the verdict on, as long as no parameter is written to.

    Warns:
        UserWarning: the checkpoint has other values of what is not trained, and they are taken.
        NotConverged: global latents are not at the optimum of their objective, or the loss was not
            flat after `max_epochs`; or global latents that were fitted in steps are not those of
            the posterior given all the data, by 1,000 fresh draws (`converged` is then None).
        NarrowFamily: global latents are, and the family is too narrow for the posterior, or leaves
            out a mode that would change a mean or an sd by a quarter.

    Raises:
        ValueError: the data are empty, not finite, or outside the support; lengths differ; an
            argument is out of its range; the model observes nothing, or the guide does not fit it;
            or the checkpoint is that of another training.
        ConnectionError: another process of the group has ended, raised an error, or does not call
            `fit`; parameters and buffers of at most ten steps before are in place.
        RuntimeError: the processes of the group do not draw the same random numbers.
        Diverged: the loss became infinite or NaN. Its message names the number that overflowed and
            what to do; parameters and buffers of at most ten steps before are in place.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, fit, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(mlp(2, 16, out=5), latent=2, likelihood=likelihoods.Normal(0.1))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> len(fit(model, guide, torch.randn(20, 5), num_epochs=3, progress=False).losses)
        3
    """
    options = Options(learning_rate, optimizer, scheduler, clip, callback, patience)
    check_call(precision)
    seed = None if seed is None else check_seed(seed)
    others = processes()
    model, guide, extra = with_keywords(model, guide, (), kwargs, data=data)
    given = (model, guide), data, validation, batch_size, extra, tuple(kwargs or ())
    material = material_of(*given, size=size)
    if material.missing:
        model, guide = nan_masked(model), nan_masked(guide)
    batches, held_out = material
    length = _length(num_epochs, max_epochs, batches.count)
    endless = length.ending is not None
    expect(not endless or scheduler is None, "scheduler", "`num_epochs` beside it", "none")
    expect(held_out or patience is None, "patience", "`validation` data beside it", "none")
    rows = batches.batch_size or 2  # of a loader that does not say
    execution = how_to_run(compile, length.steps, rows if batches.given else 0)
    bar = progress_bar(length.most, progress if others is None or others.is_first else False)
    draws = random_state(seed if others is None else others.same_seed(seed))
    with ExitStack() as scopes:
        for scope in (private_modules(), draws, train_mode(model, guide)):
            scopes.enter_context(scope)
        scopes.enter_context(matmul_precision(precision))
        task = task_of(model, guide, objective, batches, plate)
        scopes.enter_context(train_mode(task.program.called))
        if check_flag("check_support", check_support):
            check_supports(task, material)
        run: dict[str, str] = {}
        if others is not None or checkpoint is not None:
            told = {"seed": seed, "compile": compile, "precision": precision}
            run = in_all_words(task, options, material, epochs=length.words, **told)
        if others is not None:
            _agree(others, task, run | {"epochs": f"{length.most}", "checkpoint": f"{checkpoint}"})
        part = None if others is None or held_out is None else task.share(others, held_out)
        check_held_out(task, held_out, part)
        with deferred_interrupts(terminate=checkpoint is not None):
            file, result = None, None
            if checkpoint is not None:
                file = checkpoint_of(checkpoint, run, others)
                execution = file.execution(execution, length.most)
            if optimizer is None and held_out is None and is_global(task):
                rounds = length.most if num_epochs or max_epochs else _ROUND
                result = fit_at_once(task, options, execution, rounds, seed or 0, bar, file)
            if result is None:
                engine = single(task, execution, None if others is None else task.share(others))
                validate = None
                if held_out is not None:
                    validate = partial(engine.held_out_losses, held_out, share=part)
                how: dict[str, Any] = {"ending": length.ending, "validate": validate, "file": file}
                (result,) = train(engine, options, bar, **how)
                if endless and not result.interrupted:
                    result = _judged(result, task, seed or 0)
            came = answer_interrupt()
            if others is not None:  # who waits here until the first one has written its file
                came = any(others.all_of(came))
                others.level(task.parameters)
            result = result._replace(interrupted=came)
    remember_fit(task, result)
    return result


class _Length(NamedTuple):
    """How long a training is.

    Attributes:
        most: epochs at the most.
        steps: of the optimizer, as far as it is known that there will be so many.
        ending: what ends it; None where all the epochs were asked for.
    """

    most: int
    steps: int
    ending: Ending | None

    @property
    def words(self) -> str:
        """The same for a checkpoint, from which a training goes on to more epochs if it is told."""
        return "given" if self.ending is None else f"until flat, at most {self.most}"


def _length(num_epochs: int | None, max_epochs: int | None, count: int) -> _Length:
    """How long a training of so many minibatches an epoch is.

    Without a number of epochs at most those that the user allows, or 50,000 steps and at least 200.
    """
    if num_epochs is not None:
        expect(max_epochs is None, "max_epochs", "none beside num_epochs", max_epochs)
        most = check_count("num_epochs", num_epochs)
        return _Length(most, most * count, None)
    if max_epochs is None:
        most = max(_FEWEST, -(-_LONGEST // count))
    else:
        most = check_count("max_epochs", max_epochs)
    return _Length(most, min(most * count, COMPILE - 1), Ending(most))


def _agree(others: Processes, task: Task, run: Mapping[str, str]) -> None:
    """Raises a ValueError unless all processes train the same; they begin with the same values."""
    sampler = getattr(task.batches.loader, "sampler", None)
    wanted = "a loader of all the data, of which fit takes this process's share"
    cut = isinstance(sampler, DistributedSampler)
    expect(not cut, "data", wanted, "one with a DistributedSampler")
    others.check_same({**run, "first minibatch": batch_in_words(task.example)})
    others.level([*task.program.parameters(), *task.program.buffers()])


def _judged(result: Fit, task: Task, seed: int) -> Fit:
    """The result of a training that ended by itself with its verdict, of which it warns."""
    verdict = Verdict(result.verdict, result.converged, result.losses[-1])
    if result.converged and is_free(task.program.guide):
        verdict = judge_steps(task, verdict.words, seed) or verdict
    verdict.warn()
    return result._replace(verdict=verdict.words, converged=verdict.converged)
