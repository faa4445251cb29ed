"""The best member of each of several families for each datum, searched on minibatches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.comparison.ledger import Measured, found_by_prior, joined, posterior_mean
from ppvae.comparison.members import own_of, prior_of
from ppvae.comparison.rungs import Rung, climb, moments_of, rung_of, without_maximum
from ppvae.evaluation.amortization import check_along, elbo_groups, seeds_of_groups
from ppvae.evaluation.search import ShiftedGuide, new_seed
from ppvae.families.ladder import LADDER
from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.trace_terms import terms
from ppvae.objectives.weights import estimates
from ppvae.programs.plates import data_plate, values_outside
from ppvae.programs.runs import Runs


def measured_of_each(
    model: Any,
    guide: FamilyGuide,
    opened_pair: Runs,
    members: Mapping[str, Any],
    steps: int,
    draws: int,
    names: tuple[str, ...],
    bar: Any,
) -> Measured:
    """Searches the best member of each family for each datum, one minibatch after the other.

    Args:
        model: the model as it was given.
        guide: the guide to account for.
        opened_pair: both, opened.
        members: family by name.
        steps: of a search.
        draws: of a measure.
        names: of the keyword arguments.
        bar: a progress bar, which is closed at the end.
    """
    outer = values_outside(opened_pair.plate, *opened_pair.traces)
    runs = opened_pair.given_globals()
    check_along(terms(*runs.traces, None if runs.plate is None else runs.plate.name), guide)
    mine = Rung(guide, runs)
    own = own_of(guide, runs.traces, members)
    known = model, runs, outer, names
    rungs = {n: mine if n == own else rung_of(n, f, *known) for n, f in members.items()}
    point = rung_of("point", LADDER["deterministic"], *known, dense=False)
    dense = terms(*runs.traces, runs.plate.name).is_dense
    parts = []
    searches = len(rungs) + 1 + dense  # the point, and from what the guide says by itself
    bar.reset(len(runs.batches) * steps * searches)
    with bar:
        for batch in runs.batches:
            climber = _Climber(mine.on(batch), steps, draws, bar.update, prior_of(members))
            parts.append(climber.measured(mine, rungs, point, dense=dense))
    return joined(parts)


@dataclass(frozen=True)
class _Climber:
    """Searches and measures on one minibatch.

    Attributes:
        own: the guide to account for, on the minibatch.
        steps: of a search.
        draws: of a measure.
        tick: is called before each step.
        prior: the name under which the prior is among the families, or None.
    """

    own: ShiftedGuide
    steps: int
    draws: int
    tick: Callable[[], Any]
    prior: str | None

    def measured(
        self, mine: Rung, rungs: Mapping[str, Rung], point: Rung, *, dense: bool
    ) -> Measured:
        """The optimum of each family, of the guide's own and of points, and log p(x)."""
        own, seeds = self.own, seeds_of_groups()
        rows = data_plate(own.traces[0], own.runs.plate.name).size
        where, below = moments_of(own, own.start), None
        found: dict[str, tuple[ShiftedGuide, Tensor]] = {}
        left: dict[str, Tensor] = {}
        every = {**rungs, **({"": mine} if dense and mine not in rungs.values() else {})}
        for name, rung in every.items():
            shifted = own if rung is mine else rung.on(own.args, rows)
            more = rung is mine and dense
            best = climb(shifted, rung.guide, [where, below], self.steps, self.tick, own=more)
            below = moments_of(shifted, best.point)
            found[name], left[name or "the family of the guide"] = (shifted, best.point), best.left
        groups = {name: elbo_groups(*each, self.draws, seeds) for name, each in found.items()}
        shifted = point.on(own.args, rows)
        top = climb(shifted, point.guide, [where, below], self.steps, self.tick)
        endless = without_maximum(shifted, point.guide, top.point)
        said = elbo_groups(own, own.start, self.draws, seeds if dense else seeds[:1])
        kept = next((name for name, rung in every.items() if rung is mine), None)
        return Measured(
            rungs={name: groups[name] for name in rungs},
            best=None if kept is None else groups[kept],
            guide=said,
            point=-shifted.loss(top.point, 1, seeds[0]),
            endless=endless,
            left=left | {"`point`": top.left.where(~endless, math.nan)},
            **self._weighed(found, groups, seeds),
        )

    def _weighed(
        self,
        found: Mapping[str, tuple[ShiftedGuide, Tensor]],
        groups: Mapping[str, Tensor],
        seeds: Sequence[int],
    ) -> dict[str, Tensor]:
        """Log p(x) and the posterior mean of log p(x|z), by weights of the best members."""
        names = [*found]
        best = torch.stack([groups[name].mean(0) for name in names]).argmax(0)
        result: dict[str, Tensor] = {}
        for number in best.unique().tolist():
            _put(result, self._by(*found[names[number]], seeds), best == number)
        result["prior_found"] = torch.zeros_like(result["log_likelihood"])
        if self.prior is not None:
            prior = self._by(*found[self.prior], seeds)
            result["prior_found"] = more = found_by_prior(result, prior)
            _put(result, prior, more > 0)
        return result

    def _by(self, shifted: ShiftedGuide, shifts: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Estimates by draws of one family."""
        count = self.draws // len(seeds)
        weighed = [shifted.weighed(shifts, count, seed) for seed in seeds]
        log_weight, values = (torch.stack(each) for each in zip(*weighed, strict=True))
        alone = estimates(shifted.log_weight(shifts, self.draws, new_seed()))
        noise = posterior_mean(log_weight, values)
        return {**{name: value.to(noise) for name, value in alone.items()}, "noise": noise}


def _put(result: dict[str, Tensor], values: Mapping[str, Tensor], where: Tensor) -> None:
    """Writes values of some data; all of them, where there are none yet."""
    for name, value in values.items():
        result[name] = torch.where(where, value, result.get(name, value))
