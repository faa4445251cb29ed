"""One training loop for every model and every guide."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm.auto import tqdm

from ppvae._batches import Batches, length_of
from ppvae._context import eval_mode, private_modules, random_state, train_mode, unchecked
from ppvae._quasi_newton import draws_needed, minimise
from ppvae.objective import data_plate, negative_elbo, terms, trace_pair

__all__ = ["Diverged", "Fit", "fit"]


class Fit(NamedTuple):
    """What a training run has to tell; losses are in nats per datum.

    Attributes:
        losses: negative ELBO of each epoch, averaged over its data while they were trained on.
        validation_losses: negative ELBO on the validation data after each epoch; empty without.
        seconds: time in the loop.
        num_steps: steps of the optimizer.
        best_epoch: the epoch, from 0, whose parameters were kept: the last one, or with early
            stopping the one with the lowest validation loss.
    """

    losses: list[float]
    validation_losses: list[float]
    seconds: float
    num_steps: int
    best_epoch: int

    @property
    def history(self) -> dict[str, list[Any]]:
        """Columns of a table, one row per epoch; `pandas.DataFrame(fit.history)` prints it."""
        columns: dict[str, list[Any]] = {
            "epoch": list(range(len(self.losses))),
            "loss": self.losses,
        }
        if self.validation_losses:
            columns["validation_loss"] = self.validation_losses
        return columns


class Diverged(ArithmeticError):
    """The loss stopped being finite; the last parameters with a finite loss are in place."""


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    num_epochs: int = 100,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    seed: int | None = None,
    validation: Any = None,
    patience: int | None = None,
    check_support: bool = False,
    progress: bool | str = True,
) -> Fit:
    """Trains the parameters of a model and its guide on the negative ELBO.

    Works on any Pyro model and guide whose draws are reparametrized. The modules are trained in
    training mode and left in the mode they had. Pyro's own checks run on the first step only.

    Args:
        model: a Pyro model; called with one minibatch.
        guide: its guide.
        data: a tensor or array, or a tuple of them with equal first dimension, which become the
            arguments; or a `Dataset` of such items; or a `DataLoader`. Arrays take the default
            dtype; all are moved to the device of the parameters.
        num_epochs: passes through the data, at least 1.
        batch_size: size of a minibatch; by default all the data, or 128 of more than 1024. The last
            one of an epoch may be smaller.
        learning_rate: step size.
        optimizer: called as `optimizer(parameters, lr=learning_rate)`. By default Adam, fused; but
            L-BFGS on fixed, moment-matched draws, for at most `num_epochs` steps, where the model
            is vectorized (as `LinearRegression`), all latents are global, there are at most 500
            parameters, and a batch is all the data: it reaches the optimum to many digits.
        seed: seeds minibatches and draws, without a trace outside; None uses the caller's stream.
        validation: data of the same kind, evaluated after each epoch.
        patience: stop after this many epochs without a lower validation loss, and go back to the
            best parameters.
        check_support: look first whether the data lie in the support of their likelihood.
        progress: show a progress bar; a string is its label.

    Returns:
        The losses and what else there is to tell.

    Raises:
        ValueError: the data are empty, not finite, or outside the support; lengths differ; an
            argument is out of its range; the guide does not fit the model.
        Diverged: the loss became infinite or NaN. Its message names the step and the term.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, fit, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(mlp(2, 16, out=5), latent=2, likelihood=likelihoods.Normal(0.1))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> len(fit(model, guide, torch.randn(20, 5), num_epochs=3, progress=False).losses)
        3
    """
    batches = Batches("data", data, batch_size, shuffle=True)
    held_out = None
    if validation is not None:
        size = min(batches.batch_size or 1024, length_of(validation))
        held_out = Batches("validation", validation, size, shuffle=False)
    if num_epochs < 1:
        raise ValueError(f"num_epochs: expected at least 1, got {num_epochs}")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate}")
    if patience is not None and (held_out is None or patience < 1):
        raise ValueError(f"patience: expected at least 1 and `validation` data, got {patience}")
    start = time.perf_counter()
    losses: list[float] = []
    validation_losses: list[float] = []
    best: tuple[float, int, list[Tensor]] = (math.inf, -1, [])
    steps = stale = 0
    with private_modules(), random_state(seed), train_mode(model, guide):
        parameters = _parameters(model, guide, batches)
        if check_support:
            _check_support(model, batches)
        if optimizer is None and batches.whole and validation is None:
            (batch,) = batches
            draws = draws_needed(model, guide, batch, parameters)
            if draws:
                losses = minimise(
                    model, guide, batch, parameters, steps=num_epochs, draws=draws, seed=seed or 0
                )
                seconds = time.perf_counter() - start
                return Fit(losses, [], seconds, len(losses), len(losses) - 1)
        if not parameters:  # a guide without channels on a model without parameters: only measure
            num_epochs = 1
        moved = (optimizer or _adam)(parameters, lr=learning_rate) if parameters else None
        stepper = _Stepper(model, guide, parameters, moved)
        label = progress if isinstance(progress, str) else "fit"
        epochs = tqdm(range(num_epochs), desc=label, disable=not progress, unit="epoch")
        for epoch in epochs:
            total = count = 0.0
            for batch in batches:
                rows = len(batch[0])
                total += stepper.step(batch, batches.size, steps) * rows
                count += rows
                steps += 1
            losses.append(total / count)
            shown = {"loss": f"{losses[-1]:.4g}"}
            if held_out is not None:
                validation_losses.append(_mean_loss(model, guide, held_out))
                shown["validation"] = f"{validation_losses[-1]:.4g}"
                stale += 1
                if validation_losses[-1] < best[0]:
                    copies = [p.detach().clone() for p in parameters] if patience else []
                    best, stale = (validation_losses[-1], epoch, copies), 0
            epochs.set_postfix(shown, refresh=False)
            if patience is not None and stale >= patience:
                break
        epochs.close()
        if patience is not None:
            _restore(parameters, best[2])
    kept = best[1] if patience is not None else len(losses) - 1
    return Fit(losses, validation_losses, time.perf_counter() - start, steps, kept)


class _Stepper:
    """One step of the optimizer, and the way back from a step into nowhere."""

    def __init__(self, model: Any, guide: Any, parameters: list[Tensor], optimizer: Any) -> None:
        self.model, self.guide, self.parameters = model, guide, parameters
        self.optimizer = optimizer
        self.good = [p.detach().clone() for p in parameters]

    def step(self, batch: tuple[Tensor, ...], size: int, number: int) -> float:
        def closure() -> Tensor:
            with unchecked() if number else nullcontext():
                loss = negative_elbo(self.model, self.guide, *batch, size=size)
            if not math.isfinite(loss.item()):
                blame = self._blame(batch)
                _restore(self.parameters, self.good)
                raise Diverged(
                    f"the loss is {loss.item()} at step {number}, from {blame}; the parameters are "
                    "those of the last finite loss"
                )
            if self.optimizer is not None:
                with torch.no_grad():
                    torch._foreach_copy_(self.good, self.parameters)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
            return loss.detach()

        return (closure() if self.optimizer is None else self.optimizer.step(closure)).item()

    def _blame(self, batch: tuple[Tensor, ...]) -> str:
        """Names the terms that are not finite."""
        with torch.no_grad(), unchecked():
            parts = terms(*trace_pair(self.model, self.guide, *batch))
        named = {
            "log_likelihood": parts.log_likelihood,
            "kl": parts.kl,
            "log_prior": parts.log_prior,
            "log_guide": parts.log_guide,
        }
        bad = [
            f"{term} of {site!r}"
            for term, values in named.items()
            for site, value in values.items()
            if not torch.isfinite(value).all()
        ]
        return ", ".join(bad) or "their sum"


def _adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def _parameters(model: Any, guide: Any, batches: Batches) -> list[Tensor]:
    """All parameters of model and guide, after a first call has made those that are made late."""
    modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
    near = next((p for module in modules for p in module.parameters()), None)
    if near is not None:
        batches.to(near.device)
    (batch,) = itertools.islice(iter(batches), 1)
    with torch.no_grad(), random_state(None, keep=True), eval_mode(model, guide):
        with poutine.trace(param_only=True) as capture:
            pair = trace_pair(model, guide, *batch)
    _check_rows(pair[0], len(batch[0]))
    nodes: Any = capture.trace.nodes
    sites = [node["value"].unconstrained() for node in nodes.values()]
    found = [p for module in modules for p in module.parameters()] + sites
    return list({id(p): p for p in found if p.requires_grad}.values())


def _check_rows(trace: Any, rows: int) -> None:
    frame = data_plate(trace)
    if frame is not None and rows not in (frame.size, frame.full_size):
        raise ValueError(
            f"data: expected {frame.size} rows, the size of the plate {frame.name!r} of the model; "
            f"got {rows}"
        )


def _check_support(model: Any, batches: Batches) -> None:
    with torch.no_grad(), random_state(None, keep=True), eval_mode(model):
        for batch in batches:
            trace = poutine.trace(model).get_trace(*batch)
            for name in trace.observation_nodes:
                node = trace.nodes[name]
                ok = node["fn"].support.check(node["value"])
                if not ok.all():
                    raise ValueError(
                        f"data: expected values in the support of {name!r}, {node['fn'].support}; "
                        f"{int((~ok).sum())} of {ok.numel()} data are outside"
                    )


def _mean_loss(model: Any, guide: Any, batches: Batches) -> float:
    """The loss on held-out data, with the same random numbers every time."""
    batches.to(next(iter(_devices(model, guide)), batches.device))
    total = count = 0.0
    with torch.no_grad(), random_state(0), eval_mode(model, guide), unchecked():
        for batch in batches:
            rows = len(batch[0])
            total += negative_elbo(model, guide, *batch, size=batches.size).item() * rows
            count += rows
    return total / count


def _devices(*programs: Any) -> Iterator[torch.device]:
    for program in programs:
        if isinstance(program, nn.Module):
            yield from (p.device for p in program.parameters())


def _restore(parameters: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
