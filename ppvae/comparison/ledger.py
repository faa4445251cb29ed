"""From the optimum of each family to rows of nats that sum to log p(x), and on to the fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae.evaluation.amortization import error_of
from ppvae.objectives.weights import TRUSTED

#: Families of which each holds those before it, up to limits.
_NESTED = ("mean_only_bounded", "mean_only", "shared_scale", "mean_scale", "low_rank", "full_rank")
_VISIBLE = 1e-3  # nats of a datum by which a search may end lower without a word
_ERRORS = 5.0  # standard errors, of which the same is said
_CLEAR = 4.0  # errors by which draws from the prior must find more to be taken

_STEPS = {
    (None, "noise_only"): "prior_cost",
    ("noise_only", "mean_only"): "mean_channel",
    ("mean_only", "mean_scale"): "scale_channel",
    ("mean_scale", "full_rank"): "correlations",
}
_WORDS = {
    "noise": "E log p(x|z) over p(z|x): the noise of the data",
    "prior_cost": "what it costs that nothing passes: z is drawn from its prior",
    "mean_channel": "what a mean for each datum is worth, with noise of sd 1",
    "scale_channel": "what a scale for each datum adds",
    "correlations": "what correlations of the latents add",
    "beyond_gaussian": "what no Gaussian says: the shape of the posterior",
    "family_gap": "what the family of the guide cannot say",
    "amortization_gap": "what the guide misses of its family's best for each datum",
    "optimization_gap": "what the fit is short of the best of its family",
    "point": "max log p(x, z) over z, in the model's coordinates: no bound",
    "guide_point": "log p(x, z) where the guide has its point: no bound",
}


@dataclass(frozen=True)
class Measured:
    """What was measured of some data; tensors have shape `(groups, data)` or `(data,)`.

    Attributes:
        rungs: family -> the ELBO of its best member, by groups of draws.
        noise: E[log p(x|z)] over the posterior, by the same groups, linearised.
        log_likelihood: log p(x).
        log_likelihood_se: its Monte Carlo error.
        ess: effective draws behind it.
        khat: of their weights.
        point: max log p(x, z).
        best: the ELBO of the best member of the guide's family, by groups; None of a point.
        guide: the ELBO of the guide, or log p(x, z) at its point.
        prior_found: by how many nats draws from the prior found more than the best member.
        endless: where the search for `point` found no maximum.
        left: what was searched for -> by how many nats it may be short of that, which is judged
            from how the search still rose; NaN where that is not known.
    """

    rungs: dict[str, Tensor]
    noise: Tensor
    log_likelihood: Tensor
    log_likelihood_se: Tensor
    ess: Tensor
    khat: Tensor
    point: Tensor
    best: Tensor | None
    guide: Tensor
    prior_found: Tensor
    endless: Tensor
    left: dict[str, Tensor] = field(default_factory=dict)


def joined(parts: Sequence[Measured]) -> Measured:
    """What was measured of minibatches, of all data, in doubles on the CPU."""

    def join(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], dict):
            return {name: join([value[name] for value in values]) for name in values[0]}
        values = [value if value.dtype == torch.bool else value.double() for value in values]
        return torch.cat([value.detach().cpu() for value in values], -1)

    return Measured(**{name: join([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class Row:
    """One row: its nats of each datum, their Monte Carlo error, and its place in the sum.

    Attributes:
        nats: of each datum.
        se: their Monte Carlo error.
        words: what they are.
        summed: whether it is in the sum.
        end: what the sum is behind it, if that has a name.
    """

    nats: np.ndarray
    se: np.ndarray
    words: str
    summed: bool = True
    end: str = ""


def check_finite(found: Measured) -> None:
    """Raises a ValueError if an ELBO is infinite: of the guide, or of the best of a family."""
    for name, groups in {"": found.guide, **found.rungs}.items():
        bad = int((~groups.isfinite().all(0)).sum())
        wanted = f"a finite ELBO of {name} for every datum, or `families` without it"
        wanted = wanted if name else "a finite ELBO of every datum"
        expect(not bad, "model" if name else "model or guide", wanted, f"{bad} that are not")


def rows_of(
    found: Measured,
    whole: bool,  # noqa: FBT001
    kinds: Mapping[str, str],
) -> dict[str, Row]:
    """The rows by name, in the order of the sum, and those outside of it behind.

    Args:
        found: what was measured.
        whole: whether the one datum is all the data.
        kinds: name of a rung -> name of its family, which the caller may call otherwise.
    """
    words = {
        name: text.replace(" for each datum", "") if whole else text
        for name, text in _WORDS.items()
    }
    rows = {"noise": _row(found.noise, words["noise"])}
    below: str | None = None
    last = found.noise
    for name, groups in found.rungs.items():
        known = name == kinds[name] and (below is None or kinds[below] == below)
        step = _STEPS.get((below, name)) if known else None
        step = step or _free(name, {**words, **rows})
        rows[step] = _row(groups - last, words.get(step, f"what {name} adds"))
        below, last = name, groups
    log_p, error = found.log_likelihood, found.log_likelihood_se
    beyond, said = "beyond_gaussian", words["beyond_gaussian"]
    if not below == "full_rank" == kinds["full_rank"]:
        beyond, said = _free(f"beyond_{below}", {**words, **rows}), f"what {below} cannot say"
    rows[beyond] = replace(_row(log_p - last, said, error), end="log p(x)")
    if found.best is not None:
        rows["family_gap"] = _row(found.best - log_p, words["family_gap"], error)
        gap = "optimization_gap" if whole else "amortization_gap"
        rows[gap] = replace(_row(found.guide - found.best, words[gap]), end="ELBO of the guide")
    rows["point"] = replace(_row(found.point[None], words["point"]), summed=False)
    if found.best is None:
        rows["guide_point"] = replace(_row(found.guide, words["guide_point"]), summed=False)
    return rows


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """A name that no row has yet."""
    return name if name not in taken else _free(f"{name}_", taken)


def _row(groups: Tensor, words: str, error: Tensor | None = None) -> Row:
    """The mean over groups of draws, and its error, with one that is independent of them."""
    spread = error_of(groups) if len(groups) > 1 else torch.zeros_like(groups[0])
    se = spread if error is None else torch.hypot(spread, error)
    return Row(groups.mean(0).numpy(), se.numpy(), words)


def notes_of(found: Measured, kinds: Mapping[str, str], *, exact: bool = False) -> list[str]:
    """What must be said of the numbers: which of them cannot be trusted, and why.

    Args:
        found: what was measured.
        kinds: name of a rung -> name of its family.
        exact: whether log p(x) is given, and only the noise is by weights.
    """
    notes, count = [], len(found.khat)
    bad = int((found.khat > TRUSTED).sum())
    if bad:
        what = "`noise` may be off there"
        if not exact:
            what = "log p(x) and what lies beyond the last family may be understated there"
        notes.append(f"k-hat is above {TRUSTED} for {_of(bad, count)}: {what}")
    more = int((found.prior_found > 0).sum())
    if more:
        notes.append(
            f"draws from the prior found up to {found.prior_found.max():.2g} nats that the best "
            f"members miss, for {_of(more, count)} (another mode?): they are taken there"
        )
    notes += _rising(found)
    if found.endless.any():
        notes.append(
            f"the search for `point` found no maximum for {_of(int(found.endless.sum()), count)}: "
            "log p(x, z) may be infinite at an end of the range of z, or the search too short"
        )
    return notes + _below_what_they_hold(found, kinds)


def _rising(found: Measured) -> list[str]:
    """Searches that still rose where they ended."""
    short = {name: left for name, left in found.left.items() if (left > _VISIBLE).any()}
    if not short:
        return []
    most = ", ".join(f"{name} by {left.nan_to_num(0).max():.1g}" for name, left in short.items())
    some = torch.stack([left > _VISIBLE for left in short.values()]).any(0)
    return [
        f"the search still rose where it ended, and may be short of the best of {most} nats, "
        f"for {_of(int(some.sum()), len(some))}: give it more steps (num_steps)"
    ]


def _below_what_they_hold(found: Measured, kinds: Mapping[str, str]) -> list[str]:
    """Families whose search ended lower than that of a family which they hold."""
    notes = []
    for below, name in combinations(found.rungs, 2):
        if holds(kinds[name], kinds[below]):
            step = found.rungs[name] - found.rungs[below]
            gain, error = step.mean(0), error_of(step)
            lower = gain < -_ERRORS * error - _VISIBLE
            if lower.any():
                notes.append(
                    f"the search ended below {below}, which {name} holds, by up to "
                    f"{-gain.min():.2g} nats for {_of(int(lower.sum()), len(lower))}: give it "
                    "more steps (num_steps)"
                )
    return notes


def holds(family: str, below: str) -> bool:
    """Whether a family of the ladder holds another one, by their names."""
    known = family in _NESTED and below in _NESTED
    return known and _NESTED.index(below) < _NESTED.index(family)


def _of(some: int, count: int) -> str:
    return "all the data" if count == 1 else f"{some} of {count} data"


def posterior_mean(log_weight: Tensor, values: Tensor) -> Tensor:
    """A posterior mean by self-normalised weights, by groups of draws around it.

    Args:
        log_weight: shape `(groups, draws, data)`.
        values: what is averaged, of the same shape.

    Returns:
        Shape `(groups, data)`: the mean over all draws, and around it what each group adds to its
        error, to first order (the delta method).
    """
    groups = len(log_weight)
    flat = log_weight.double().flatten(0, 1)
    weight = torch.softmax(flat, 0).reshape(log_weight.shape)
    values = values.double()
    mean = (weight * values).sum((0, 1))
    return mean + groups * (weight * (values - mean)).sum(1)


def found_by_prior(found: Mapping[str, Tensor], prior: Mapping[str, Tensor]) -> Tensor:
    """By how many nats draws from the prior find more of log p(x) than others, else zero.

    A member that sits on one of several modes gives weights that look well and miss the others.

    Args:
        found: `estimates` of draws of the best members.
        prior: the same of draws from the prior.
    """
    more = prior["log_likelihood"] - found["log_likelihood"]
    error = torch.hypot(prior["log_likelihood_se"], found["log_likelihood_se"])
    clear = (more > _CLEAR * error + 1e-9) & (prior["khat"] <= TRUSTED)
    return torch.where(clear, more, 0.0)
