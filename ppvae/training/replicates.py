"""Many fits in one program: seeds, or settings, of the same model and guide, trained side by side.

    pairs = [build(seed) for seed in range(4)]          # four models and their guides
    results = fit_replicates(pairs, x, seeds=range(4))  # each trained as `fit` would

All parameters are stacked and one step moves them all, so that four replicates cost about two.
"""

from __future__ import annotations

import operator
import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ppvae._scopes import matmul_precision, private_modules, random_state, train_mode
from ppvae.data.batches import Batches
from ppvae.objectives.elbo import ELBO
from ppvae.staging.staged import NotStageable, one_line
from ppvae.training.fitting import Fit, fit
from ppvae.training.quasi_newton import draws_needed
from ppvae.training.stacked import Stacked
from ppvae.training.steppers import adam, check_options, how_to_run, parameters_of


def fit_replicates(
    pairs: Sequence[tuple[Any, Any]],
    data: Any,
    *,
    num_epochs: int = 100,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    objective: Any = None,
    seeds: Sequence[int] | None = None,
    compile: bool | str = "auto",
    precision: str | None = None,
    progress: bool | str = True,
) -> list[Fit]:
    """Trains several models and guides of the same make at once, in one vectorized program.

    Replicate k is trained as `fit(*pairs[k], data, seed=seeds[k], objective=objective[k], ...)`
    would: with its own minibatches and its own noise, the same up to rounding. (Where noise is made
    from what was computed, as the gammas of `student_t` or the masks of dropout are, the numbers
    are others of the same distribution.) Replicates have nothing to do with each other; one that
    diverges ends them all. Convolutions, `student_t`, `low_rank`, `full_rank` and `flow` are
    vectorized but, for now, not compiled: `torch.vmap` ties their graphs to one size of minibatch.

    What cannot be trained so is trained one after the other, and a warning says why.

    Args:
        pairs: models and their guides, equal but for the values of their parameters, of which none
            is shared. Build each under its own seed, for results that are independent.
        data: a tensor or array, or a tuple of them, as for `fit`.
        num_epochs: passes through the data, at least 1.
        batch_size: size of a minibatch, as for `fit`.
        learning_rate: step size.
        optimizer: called as `optimizer(parameters, lr=learning_rate)`, with parameters that have a
            first dimension of replicates, so it must treat every number on its own, as Adam does;
            by default Adam, fused.
        objective: one objective for all, or one for each: `ELBO`s that differ in `beta` are trained
            at once.
        seeds: a seed for each; by default drawn from the caller's stream.
        compile: as for `fit`.
        precision: as for `fit`.
        progress: show a progress bar; a string is its label.

    Returns:
        What there is to tell of each; `seconds` is its share of the time.

    Raises:
        TypeError: `pairs` or `seeds` is not what it should be.
        ValueError: an argument is out of its range, the models differ or share a parameter.
        Diverged: a loss became infinite or NaN. The message names the replicate.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, fit_replicates, likelihoods
        >>> from ppvae.nn import mlp
        >>> def build(seed):
        ...     torch.manual_seed(seed)
        ...     model = VAE(mlp(2, 16, out=5), latent=2, likelihood=likelihoods.Normal(0.1))
        ...     return model, FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> pairs = [build(seed) for seed in range(4)]
        >>> len(fit_replicates(pairs, torch.randn(20, 5), num_epochs=3, progress=False))
        4
    """
    pairs = list(pairs)
    count = len(pairs)
    if not pairs:
        raise ValueError("pairs: expected at least one model and its guide, got none")
    if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise TypeError("pairs: expected pairs of a model and its guide")
    goals = list(objective) if isinstance(objective, Sequence) else [objective] * count
    seeds = torch.randint(2**62, (count,)).tolist() if seeds is None else _whole(seeds)
    for name, values in {"objective": goals, "seeds": seeds}.items():
        if len(values) != count:
            raise ValueError(f"{name}: expected {count}, one for each pair; got {len(values)}")
    for goal in goals:
        check_options(num_epochs, learning_rate, optimizer, goal, precision)
    goals = [ELBO() if goal is None else goal for goal in goals]
    batches = Batches("data", data, batch_size, shuffle=True)
    how = how_to_run(compile, num_epochs * batches.count, 2)
    label = progress if isinstance(progress, str) else "fit"
    with private_modules(), train_mode(*(program for pair in pairs for program in pair)):
        if not _as_fit(pairs, seeds, batches, alone=optimizer is None):
            with matmul_precision(precision):
                try:
                    stacked = Stacked(pairs, goals, batches, seeds, compiled=how == "compiled")
                    stacked.optimizer = (optimizer or adam)(stacked.parameters, lr=learning_rate)
                    bar = tqdm(range(num_epochs), desc=label, disable=not progress, unit="epoch")
                    with random_state(random.Random(repr(seeds)).getrandbits(62)):
                        return _train(stacked, bar)
                except NotStageable as error:
                    said = one_line(error)
                    warnings.warn(f"fit_replicates: one after the other; {said}", stacklevel=2)
    options: dict[str, Any] = {"num_epochs": num_epochs, "batch_size": batch_size}
    options |= {"learning_rate": learning_rate, "optimizer": optimizer}
    options |= {"compile": compile, "precision": precision, "progress": progress}
    return [
        fit(*pair, data, objective=goal, seed=seed, **options)
        for pair, goal, seed in zip(pairs, goals, seeds, strict=True)
    ]


def _whole(seeds: Any) -> list[int]:
    """The seeds as a list.

    Raises:
        TypeError: they are no whole numbers.
    """
    try:
        return [operator.index(seed) for seed in seeds]
    except TypeError:
        raise TypeError(
            f"seeds: expected whole numbers, one for each pair, got {seeds!r}"
        ) from None


def _as_fit(
    pairs: list[tuple[Any, Any]], seeds: list[int], batches: Batches, *, alone: bool
) -> bool:
    """Makes the parameters; says whether there is nothing to stack, or `fit` takes no steps.

    Raises:
        ValueError: pairs share a parameter, or their parameters have different shapes.
    """
    seen: dict[int, int] = {}
    shapes: list[list[torch.Size]] = []
    for number, (pair, seed) in enumerate(zip(pairs, seeds, strict=True)):
        if batches.tensors and hasattr(pair[0], "check_data"):
            pair[0].check_data(*batches.tensors)
        with private_modules(), random_state(seed):  # as `fit` would make those not there yet
            parameters = parameters_of(*pair, batches)
        shapes.append([parameter.shape for parameter in parameters])
        for parameter in parameters:
            if seen.setdefault(id(parameter), number) != number:
                raise ValueError(
                    f"pairs: expected parameters of their own; pair {number} shares one of shape "
                    f"{tuple(parameter.shape)} with pair {seen[id(parameter)]}"
                )
    different = [number for number, some in enumerate(shapes) if some != shapes[0]]
    if different:
        raise ValueError(
            f"pairs: expected models and guides of the same make; the parameters of pair "
            f"{different[0]} differ in shape or number from those of pair 0"
        )
    if not shapes[0] or len(pairs) == 1:
        return True
    if not (alone and batches.whole):
        return False
    (batch,) = batches
    return draws_needed(*pairs[0], batch, parameters) > 0


def _train(stacked: Stacked, bar: Any) -> list[Fit]:
    start = time.perf_counter()
    history: list[list[float]] = []
    for _ in bar:
        losses, size = torch.zeros(len(stacked.programs), dtype=torch.float64), 0
        for values, rows in stacked.epoch():
            losses += rows * torch.tensor(values, dtype=torch.float64)
            size += rows
        stacked.check()
        history.append((losses / size).tolist())
        bar.set_postfix({"loss": f"{sum(history[-1]) / len(losses):.4g}"}, refresh=False)
    bar.close()
    stacked.write_back()
    seconds, how = (time.perf_counter() - start) / len(stacked.programs), stacked.gradients
    told = (len(history) - 1, "stochastic gradient")
    return [
        Fit(list(losses), [], seconds, stacked.number, *told, goal, how.execution)
        for losses, goal in zip(zip(*history, strict=True), stacked.objectives, strict=True)
    ]
