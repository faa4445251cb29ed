"""Whether a fit is where it should be, in words with numbers."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ppvae._checks import TROUBLE
from ppvae._scopes import (
    double_precision,
    private_modules,
    random_state,
    stacklevel,
    unchecked,
)
from ppvae.objectives.elbo import ELBO
from ppvae.objectives.weights import (
    TRUSTED,
    effective_sample_size,
    khat,
    log_mean_weight,
    log_mean_weight_se,
)
from ppvae.programs.layout import Layout
from ppvae.programs.matched_normals import matched
from ppvae.programs.plates import draws_its_rows
from ppvae.programs.potential import potential_of
from ppvae.programs.runs import largest_tensor
from ppvae.staging.program import program_of
from ppvae.training.average import average_of, without_fallback_warnings
from ppvae.training.mode import Mode
from ppvae.training.optimum import FRESH, Optimum, affordable, allowed_gap
from ppvae.training.surface import ERROR
from ppvae.training.task import Task

_STEP = 0.01  # posterior sds: a Newton step that is as good as none
_EQUAL = 0.75  # share of effective draws, above which the weights are as good as equal
_FEW = 50  # effective draws, below which reweighted moments say nothing
_NEAR = 5.0  # nats: a mode that is no further above is worth a word
_ALL_AT_ONCE = 1_000  # draws on all the data
_LARGEST = 10_000_000  # numbers in the data, beyond which these would take minutes
_REACH = 3.0  # sds of the draws: a mode that is further away is not among them
_NARROW = 0.25  # posterior sds, or the share of one, by which a family may be off
#: nats, by which a Gaussian with sds that are too small by that share is off, in each coordinate
_COST = -math.log(1 - _NARROW) - (1 - (1 - _NARROW) ** 2) / 2
_TAIL = 0.01  # share of the draws: those that are furthest away
_HEAVY = 1.75  # times their share of the posterior, that they may have where an sd is not known
_LOOKED_AT = 20  # latents: the heaviest tails


Space = tuple[Tensor, list[str]]  # draws of coordinates, `(draws, coordinates)`, and their names


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
        kind = NarrowFamily if self.converged else NotConverged
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
    near = [other.above for other in optimum.others if other.above < _NEAR]
    beyond = "above" if min(near, default=0.0) >= 0 else "below"
    modes = f"; there is another mode, {abs(min(near)):.2g} nats {beyond} this one" if near else ""
    loss, labels = optimum.losses[-1], optimum.layout.free_labels
    draws, words, narrow, gap, allowed = "", "", False, 0.0, 1.0
    if optimum.draws != 1:  # no point
        losses, spaces = _fresh(task, optimum.layout, seed)
        gap = losses.mean().item() - loss * task.batches.size if optimum.draws else 0.0
        allowed = allowed_gap(len(labels)) + 3 * _se(losses).item()
        loss = losses.mean().item() / task.batches.size
        words, narrow = _narrowness(losses, spaces)
        left_out = "" if optimum.chosen else _left_out(optimum.others, *spaces[0])
        if left_out:
            modes, narrow = f"; {left_out}{modes}", True
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


def judge_steps(task: Task, told: str, seed: int) -> Verdict | None:
    """Holds global latents that were fitted in steps against the posterior given all the data.

    Noise of minibatches, and steps that stay long, hide what counts for latents of all data: a loss
    that is flat to a hundredth of a nat per datum is not known to a nat in all.

    Args:
        task: one whose guide has free parameters only, and whose loss was seen to be flat.
        told: the verdict so far.
        seed: chooses fresh draws.

    Returns:
        A verdict that says what is off; None if nothing is, or that cannot be told: each run draws
        rows of its own, a loader has the data, or there are so many that it would take minutes.
    """
    batches = task.batches
    if task.program.objective != ELBO() or not batches.tensors:
        return None
    whole = replace(task, batches=replace(batches, batch_size=batches.size, shuffle=False))
    (batch,) = whole.batches
    if largest_tensor(batch) > _LARGEST:
        return None
    with (
        private_modules(),
        unchecked(),
        random_state(None, keep=True),
        torch.no_grad(),
    ):
        trace = task.program.traces(batch)[0]
        sites = [node for node in trace.nodes.values() if node["type"] == "sample"]
        if any(map(draws_its_rows, sites)):
            return None
        layout = potential_of(task.program.model, batch).layout
    losses, spaces = _fresh(whole, layout, seed, _ALL_AT_ONCE)
    words, narrow = _narrowness(losses, spaces)
    if not narrow:
        return None
    but = "but the steps ended away from the posterior, or the family is too narrow for it"
    loss = losses.mean().item() / batches.size
    return Verdict(f"{told}; {but}: {words}", converged=None, loss=loss, narrow=True)


def _fresh(task: Task, layout: Layout, seed: int, most: int = FRESH) -> tuple[Tensor, list[Space]]:
    """Minus log weights of fresh draws of the guide as it is stored, and the latents.

    First those on the reals, then as they are those that are not any number, if there are some.
    """
    (batch,) = task.batches
    was, sampled = task.program, ELBO(kl="sampled")
    size, plate = task.batches.size, was.plate_name
    program = program_of(was.model, was.guide, sampled, batch, size=size, plate=plate)
    device = task.parameters[0].device
    with (
        double_precision(device),
        private_modules(),
        unchecked(),
        without_fallback_warnings(),
        torch.no_grad(),
    ):
        average = average_of(replace(task, program=program))
        values = [parameter.detach().double() for parameter in average.task.parameters]
        normals = matched(affordable(average, most), average.normals, seed + 1)
        chunks = enumerate(average.chunks(normals), seed + 1)
        pieces = [average.draws(values, chunk, layout, own) for own, chunk in chunks]
    losses, states, latents = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    moves = (latents != latents[:1]).any(0)  # and is no zero of a triangle
    bounded = {n: f"{label} itself" for n, label in layout.bounded.items() if moves[n]}
    spaces = [(states, layout.free_labels)]
    if bounded:
        spaces.append((latents[:, [*bounded]], [*bounded.values()]))
    return losses, spaces


def _se(values: Tensor) -> Tensor:
    """The standard error of the mean of independent values, which are in the first dimension."""
    return values.std(0) / math.sqrt(len(values))


def _narrowness(losses: Tensor, spaces: Sequence[Space]) -> tuple[str, bool]:
    """What importance weights say of a family, and whether it is too narrow for the posterior.

    Nearly equal weights may have a tail with a large k-hat, which nothing depends on. What a wider
    family may gain is the log of the mean weight, an estimate of the log evidence from below, less
    the ELBO: the divergence of the guide from the posterior. Where few draws count, moments are not
    known well enough to tell that they are off, and that divergence is.
    """
    shape, ess = khat(-losses).item(), effective_sample_size(-losses).item()
    share, off = ess / len(losses), []
    words = f"k-hat {shape:.2f}, {share:.0%} of the draws count"
    gain = (log_mean_weight(-losses) + losses.mean()).item()
    error = (log_mean_weight_se(-losses) + _se(losses)).item()
    if ess >= _FEW:
        weights = torch.softmax(-losses, 0)
        off = [*_off(weights, *spaces[0])]
        for space in spaces[1:]:
            off += _off(weights, *space, heavy=True) or _heavier(weights, *space)
    if not share >= _EQUAL and not shape <= TRUSTED or not ess >= _FEW:
        off.insert(0, f"{words} (k-hat is trusted up to {TRUSTED})")
    if not off and gain - 2 * error > _COST * spaces[0][0].shape[1]:
        off.append(f"{words}; sds may be too small by {_NARROW:.0%} or more")
    if not off:
        tail = ", the tail of the others does not" if shape > TRUSTED else ""
        return words + tail, False
    return "; ".join([*off, f"a wider one may gain {gain:.2g} nats or more"]), True


def _left_out(others: list[Mode], states: Tensor, labels: list[str]) -> str:
    """What a mode that the draws do not reach would change most, if that is too much.

    With it the posterior is a mixture of two, whose moments follow from its weight.
    """
    mean, sd, told = states.mean(0), states.std(0), dict[float, str]()
    for other in others:
        away, share = other.mean - mean, other.weight / (1 + other.weight)
        if not (away.abs() > _REACH * sd).any():
            continue
        both = ((1 - share) * sd**2 + share * other.sds**2 + share * (1 - share) * away**2).sqrt()
        moved, wider = share * away.abs() / both, (both / sd).log()
        at, widest = int(moved.argmax()), int(wider.argmax())
        if moved[at] > _NARROW or wider[widest] > math.log(1 + _NARROW):
            much = f"its sd is {(both / sd)[widest]:.2g} times as large with it"
            told[share] = f"it leaves out a mode with some {share:.0%} of the mass, where "
            told[share] += f"{labels[widest]} is {other.mean[widest]:.3g} on the reals; {much}"
    return told[max(told)] if told else ""


def _off(weights: Tensor, states: Tensor, labels: list[str], *, heavy: bool = False) -> list[str]:
    """Where the means or sds of draws are furthest from the reweighted ones, if that is too far.

    Both by more than two standard errors: those of draws that are near a Gaussian, or, where their
    tails may be heavy, as those of an exponential are, those that the draws have themselves.
    """
    mean, sd, true = states.mean(0), states.std(0), weights @ states
    apart = (states - true).square()
    spread, squares = (weights @ apart).sqrt(), weights.square()
    errors = [squares.sum(), 2 * squares.sum()]  # squared: of a mean in sds, and of twice a log sd
    if heavy:
        scaled = apart / spread**2
        each = squares @ scaled, squares @ (scaled - 1).square()
        errors = [torch.maximum(*pair) for pair in zip(errors, each, strict=True)]
    off = (mean - true).abs() / spread - 2 * errors[0].sqrt()
    ratio = (sd / spread).log().abs() - errors[1].sqrt()
    at, widest, words = int(off.argmax()), int(ratio.argmax()), []
    if off[at] > _NARROW:
        words.append(f"the mean of {labels[at]} is {off[at]:.2f} sd from the reweighted one")
    if ratio[widest] > math.log(1 + _NARROW):
        times = (sd / spread)[widest].item()
        words.append(f"the sd of {labels[widest]} is {times:.2f} of the reweighted one")
    return words


def _heavier(weights: Tensor, states: Tensor, labels: list[str]) -> list[str]:
    """Where a posterior goes further than the draws do, so that its sd is not known from them.

    The draws that are furthest from the mean have more than their share of the posterior, by more
    than two standard errors, and the products of weights and squares, whose sum is the variance,
    have a tail in which the largest, of draws that never came, would count most.
    """
    apart = (states - weights @ states).square()
    far = weights[apart.topk(max(2, int(_TAIL * len(weights))), 0).indices] * len(weights)
    times = far.mean(0)
    found = (times - 2 * _se(far) > _HEAVY).nonzero()[:, 0]
    heaviest = found[times[found].argsort(descending=True)][:_LOOKED_AT]
    for at in heaviest.tolist():
        shape = khat((weights * apart[:, at]).log()).item()
        if shape > TRUSTED:
            word = f"{labels[at]} has a tail too heavy for its sd to be known (k-hat {shape:.2f})"
            return [f"{word}: there the posterior has {times[at]:.1f} times the mass of the draws"]
    return []
