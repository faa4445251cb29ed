"""Whether a fit is where it should be, in words with numbers."""

import math
import warnings
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ppvae._checks import TROUBLE
from ppvae._scopes import double_precision, private_modules, stacklevel, unchecked
from ppvae.objectives.elbo import ELBO
from ppvae.objectives.weights import TRUSTED, effective_sample_size, khat
from ppvae.programs.layout import Layout
from ppvae.programs.matched_normals import matched
from ppvae.staging.program import program_of
from ppvae.training.average import average_of, without_fallback_warnings
from ppvae.training.optimum import FRESH, Optimum, affordable, allowed_gap
from ppvae.training.surface import ERROR
from ppvae.training.task import Task

_STEP = 0.01  # posterior sds: a Newton step that is as good as none
_EQUAL = 0.75  # share of effective draws, above which the weights are as good as equal
_FEW = 50  # effective draws, below which reweighted moments say nothing
_NEAR = 5.0  # nats: a mode that is no further above is worth a word
_NARROW = 0.25  # posterior sds, or the share of one, by which a family may be off


class NotConverged(UserWarning):
    """A fit ended before it was at the optimum of its objective."""


class NarrowFamily(UserWarning):
    """A fit is at its optimum, but the posterior is far from every member of the family."""


class Verdict(NamedTuple):
    """What is to be said of a fit.

    Attributes:
        words: one sentence, with numbers.
        converged: whether it is at the optimum of its objective; None if that cannot be judged.
        loss: the objective there in nats per datum, by fresh draws.
        narrow: whether it is at the optimum, and the family is too narrow for the posterior.
    """

    words: str
    converged: bool | None
    loss: float
    narrow: bool = False

    def warn(self) -> None:
        """Warns once, if there is a reason to."""
        kind = NotConverged if self.converged is False else NarrowFamily
        if self.converged is False or self.narrow:
            warnings.warn(f"fit: {self.words} ({TROUBLE})", kind, stacklevel=stacklevel())


def judge(task: Task, optimum: Optimum, seed: int) -> Verdict:
    """Holds what a task has come to against what an optimum must be.

    Args:
        task: a task, whose parameters are those of the optimum, as they are stored.
        optimum: where its minimisation ended.
        seed: chooses fresh draws.
    """
    step = f"the Newton step is {optimum.step:.2g} posterior sds, at {optimum.site}"
    near = [other for other in optimum.others if other < _NEAR]
    beyond = "above" if min(near, default=0.0) >= 0 else "below"
    modes = f"; there is another mode, {abs(min(near)):.2g} nats {beyond} this one" if near else ""
    loss, labels = optimum.losses[-1], optimum.layout.free_labels
    draws, words, narrow, gap, allowed = "", "", False, 0.0, 1.0
    if optimum.draws != 1:  # no point
        losses, states = _fresh(task, optimum.layout, seed)
        gap = losses.mean().item() - loss * task.batches.size if optimum.draws else 0.0
        se = losses.std().item() / math.sqrt(len(losses))
        loss, allowed = losses.mean().item() / task.batches.size, allowed_gap(len(labels)) + 3 * se
        words, narrow = _narrowness(losses, states, labels)
    if optimum.draws > 1:
        cost = f" cost some {optimum.excess:.1g} nats" if math.isfinite(optimum.excess) else ""
        draws = f"; {optimum.draws} draws held fixed{cost}"
    if not optimum.step < (_STEP if optimum.draws else 5 * _STEP):
        words = f"stopped before the optimum: {step}; give it more steps{modes}"
        return Verdict(words, converged=False, loss=loss)
    if not optimum.error < ERROR:
        words = f"too few draws{draws}, and {optimum.error:.2g} posterior sds in a mean{modes}"
        return Verdict(words, converged=False, loss=loss)
    if not gap < allowed:  # not finite, too
        lower = f"the ELBO of fresh draws is {gap:.3g} nats below that of those held fixed"
        return Verdict(f"{lower}{draws}{modes}", converged=False, loss=loss)
    if narrow:
        words = f"converged, but the family is too narrow: {words}{modes}"
        return Verdict(words, converged=True, loss=loss, narrow=True)
    parts = filter(None, [f"at the optimum: {step}{draws}", words])
    return Verdict("; ".join(parts) + modes, converged=True, loss=loss)


def _fresh(task: Task, layout: Layout, seed: int) -> tuple[Tensor, Tensor]:
    """Minus log weights of fresh draws of the guide as it is stored, and the latents."""
    (batch,) = task.batches
    was, sampled = task.program, ELBO(kl="sampled")
    size, plate = task.batches.size, was.plate_name
    program = program_of(was.model, was.guide, sampled, batch, size=size, plate=plate)
    scopes = private_modules(), unchecked(), without_fallback_warnings(), torch.no_grad()
    device = task.parameters[0].device
    with double_precision(device), scopes[0], scopes[1], scopes[2], scopes[3]:
        average = average_of(replace(task, program=program))
        values = [parameter.detach().double() for parameter in average.task.parameters]
        normals = matched(affordable(average, FRESH), average.normals, seed + 1)
        chunks = enumerate(average.chunks(normals), seed + 1)
        pieces = [average.draws(values, chunk, layout, own) for own, chunk in chunks]
    losses, states = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return losses, states


def _narrowness(losses: Tensor, states: Tensor, labels: list[str]) -> tuple[str, bool]:
    """What importance weights say of a family, and whether it is too narrow for the posterior.

    Nearly equal weights may have a tail with a large k-hat, which nothing depends on. What a wider
    family may gain is the log of the mean weight, an estimate of the log evidence from below, less
    the ELBO.
    """
    shape, ess = khat(-losses).item(), effective_sample_size(-losses).item()
    share, off = ess / len(losses), []
    words = f"k-hat {shape:.2f}, {share:.0%} of the draws count"
    if ess >= _FEW:
        off = _off(torch.softmax(-losses, 0), states, labels)
    if not share >= _EQUAL and not shape <= TRUSTED or not ess >= _FEW:
        off.insert(0, f"{words} (k-hat is trusted up to {TRUSTED})")
    if not off:
        return words, False
    gain = (torch.logsumexp(-losses, 0) - math.log(len(losses)) + losses.mean()).item()
    return "; ".join([*off, f"a wider one may gain {gain:.2g} nats or more"]), True


def _off(weights: Tensor, states: Tensor, labels: list[str]) -> list[str]:
    """Where the means or sds of draws are furthest from the reweighted ones, if that is too far."""
    mean, sd, error = states.mean(0), states.std(0), weights.square().sum().sqrt().item()
    true = weights @ states
    spread = (weights @ (states - true).square()).sqrt()
    off = (mean - true).abs() / spread - 2 * error
    ratio = (sd / spread).log().abs() - math.sqrt(2) * error
    at, widest, words = int(off.argmax()), int(ratio.argmax()), []
    if off[at] > _NARROW:
        words.append(f"the mean of {labels[at]} is {off[at]:.2f} sd from the reweighted one")
    if ratio[widest] > math.log(1 + _NARROW):
        times = (sd / spread)[widest].item()
        words.append(f"the sd of {labels[widest]} is {times:.2f} of the reweighted one")
    return words
