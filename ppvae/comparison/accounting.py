"""Where the nats of a fit go: from the noise of the data, channel by channel, to the ELBO."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from ppvae._checks import as_doubles, check_count, check_label, check_real, check_seed, expect
from ppvae._process import exclusive
from ppvae.comparison.ledger import (
    Measured,
    check_finite,
    found_by_prior,
    joined,
    notes_of,
    posterior_mean,
    rows_of,
    words_of,
)
from ppvae.comparison.members import is_family_of, members_of, name_of
from ppvae.comparison.rungs import Rung, climb, moments_of, rung_of, without_maximum
from ppvae.comparison.whole import Whole, measured_whole
from ppvae.data.adapters import as_tensors
from ppvae.evaluation.amortization import (
    check_along,
    elbo_groups,
    error_of,
    in_groups,
    seeds_of_groups,
)
from ppvae.evaluation.search import ShiftedGuide, new_seed
from ppvae.families.ladder import LADDER
from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.trace_terms import terms
from ppvae.objectives.weights import estimates
from ppvae.programs.nodes import data_plate, is_finite_discrete, latent_nodes, values_outside
from ppvae.programs.runs import Runs, opened

_LADDER = ("noise_only", "mean_only", "mean_scale", "full_rank")
_CLEAR = 4.0  # errors by which a given log p(x) must be above that of the weights ...
_SHORT = 0.01  # ... and nats, for a remark


@dataclass(frozen=True, eq=False)
class Account:
    """Where the nats of a fit go; `account` makes it, `print` shows it as a table.

    Attributes:
        dataset: the numbers. Dims `row` and `datum` (no `datum` for latents of all the data):
            `nats` and their Monte Carlo error `nats_se`. Dim `row`: `mean` over the data, with its
            errors `mean_se_draws` (of the draws) and `mean_se_data` (for other data; NaN for
            latents of all the data); the `running` sum, NaN outside of it, and its name `end`,
            where it has one; `summed`, whether a row is inside; and `words`. Dims `family` and
            `datum`: `optimum`, the ELBO of the best member of each family, with `optimum_se`. Dim
            `datum`: `log_likelihood` with `log_likelihood_se`, `ess` and `khat`; `elbo` of the
            guide, NaN of a point, with `elbo_se`. Each has its `unit`; the attribute `notes` says
            what cannot be trusted.
    """

    dataset: xr.Dataset

    def __repr__(self) -> str:
        data = self.dataset
        lines: list[tuple[str, ...]] = [("row", "nats", "+- draws", "+- data", "sum", "what it is")]
        for row in data.row.values:
            one = data.sel(row=row)
            words = one.words.item() if one.summed else f"(not in the sum) {one.words.item()}"
            numbers = [one["mean"], one.mean_se_draws, one.mean_se_data, one.running]
            lines.append((str(row), *map(_shown, numbers), words))
            if one.end:
                lines.append((f"  {one.end.item()}", *[""] * 3, _shown(one.running), ""))
        kept = [0, 1, 2, 3, 4] if "datum" in data.dims else [0, 1, 2, 4]
        widths = [max(len(line[at]) for line in lines) for at in kept]
        text = []
        for line in lines:
            cells = [line[at] for at in kept]
            cells = [cells[0].ljust(widths[0])] + [
                cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)
            ]
            text.append("  ".join([*cells, line[5]]).rstrip())
        count = f", a mean of {data.sizes['datum']}" if "datum" in data.dims else ""
        return "\n".join([f"{data.attrs['unit']}{count}", *text, *data.attrs["notes"]])


def _shown(value: Any) -> str:
    """A number of the table; nothing where there is none."""
    number = float(value)
    return f"{round(number, 3) + 0.0:.3f}" if math.isfinite(number) else ""


@exclusive
def account(  # noqa: D417
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    families: Sequence[Any] | Mapping[str, Any] = _LADDER,
    num_samples: int = 512,
    num_steps: int = 300,
    batch_size: int = 256,
    log_likelihood: Any = None,
    vectorized: bool | None = None,
    seed: int = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool | str = True,
) -> Account:
    r"""Says where the nats of a fit go, from the noise of the data to the ELBO.

    The model stays what it is. Of each family in `families` the best member is searched for each
    datum by itself, without an encoder; the differences of their ELBOs are rows that sum to
    log p(x), in nats per datum:

    - `noise`: E[log p(x|z)] over the posterior p(z|x), what the likelihood says where z is known as
      well as x tells it; mostly below zero for discrete data;
    - `prior_cost` = ELBO(`noise_only`) - noise, what it costs that nothing passes: minus KL(p(z) ||
      p(z|x)) and minus KL(p(z|x) || p(z)) together;
    - `mean_channel`, `scale_channel`, `correlations`: what `mean_only`, `mean_scale` and
      `full_rank` add to the family before them;
    - `beyond_gaussian` = log p(x) - ELBO(`full_rank`), the shape that no Gaussian has.

    From there two rows lead down to the guide's ELBO: `family_gap`, what its family cannot say, and
    `amortization_gap`, what its encoder (and an argument that all data share) misses of the best
    member for each datum. With other families the rows between have the names of the families.
    A row may be negative: `mean_only` is a normal distribution of sd 1 in unconstrained space,
    which may suit worse than the prior, and so may any family that does not hold the one before it.

    Outside of the sum stands `point`, max log p(x, z) over z in the coordinates of the model, as of
    the family `deterministic` (no Jacobian where z is constrained): no bound on log p(x), and above
    it where the posterior is narrow. A remark says where the search for it found no maximum, as of
    a density that is infinite at an end of its support. A guide that is a point has `guide_point`,
    log p(x, z) at its points, in the place of the two gaps.

    **Searches** are those of `gaps`, one for each family; each begins where the better of the guide
    and of the family before is. Arguments that all data share are free for each datum. Families
    whose heads have networks of their own (a flow) can only be that of the guide, with its
    networks. Discrete latents of finitely many values are summed out for all of them, `noise_only`
    included; those that the guide itself draws are charged in the last two rows. Draws are
    moment-matched in 8 groups, so that Gaussian families on linear-Gaussian models come out to
    rounding, and all families see the same, so that the errors of rows are those of differences.
    log p(x) is estimated from below by `num_samples` independent draws from the best member of all
    (or from the prior, where those find clearly more), with `ess` and `khat` as in `evaluate`; a
    mode that neither meets is not seen.

    **Global latents** (a guide without an encoder, as for a regression) belong to all the data: the
    rows are in nats of all the data. The best members are found by `fit`, on guides of their own,
    and the last row is `optimization_gap`, what the fit is short of its family's optimum. Where
    some latents are global and others local with an encoder, all is given one draw of the globals,
    as in `gaps`.

    Args:
        model: a Pyro model.
        guide: a `FamilyGuide`.
        *args: their arguments: the data.
        families: what `FamilyGuide` takes as families, each with a density, from the first to the
            last; or a mapping to such from names of your own.
        num_samples: draws of each measure, at least 16; rounded up to a multiple of 8.
        num_steps: steps of each search for local latents; at least 1.
        log_likelihood: log p(x) of shape `(N,)`, or a number for latents of all the data, exact or
            better estimated; taken as it is.
        batch_size, vectorized, seed, plate, kwargs, progress: as for `evaluate`; the seed is a
            number.

    Returns:
        The rows, in a wrapper that prints them as a table; `ppvae.plots.account` draws them.

    Raises:
        TypeError: a family is none, or the guide cannot be called.
        ValueError: the guide is no `FamilyGuide`; a family has no density, or cannot be searched;
            the data are not finite, or have no finite ELBO; or an argument is out of its range.

    Cremer, Li, Duvenaud, Inference suboptimality in variational autoencoders, 2018 (the two gaps);
    Hoffman and Johnson, ELBO surgery, 2016.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> found = account(model, guide, torch.randn(20, 5), progress=False).dataset
        >>> found.row.values[:4].tolist()
        ['noise', 'prior_cost', 'mean_channel', 'scale_channel']
        >>> bool(abs(found.nats.sel(row="beyond_gaussian")).max() < 1e-3)  # the posterior is one
        True
        >>> total = found.nats.where(found.summed).sum("row")
        >>> bool(abs(total - found.elbo).max() < 1e-9)
        True
    """
    members = members_of(families, 1)
    num_steps, seed = check_count("num_steps", num_steps), check_seed(seed)
    draws = in_groups(num_samples)
    wanted = "a FamilyGuide"
    expect(isinstance(guide, FamilyGuide), "guide", wanted, type(guide).__name__)
    shown, label = check_label("progress", progress, "account")
    if args and guide.encoder is None and guide.family.channels:  # data of fits of their own
        as_tensors("args", args, missing=True, sparse=True)
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        sites = terms(*runs.traces, plate)
        dense, channels = sites.is_dense, guide.family.channels
        local = sites.is_local if not channels else guide.encoder is not None
        notes: list[str] = []
        if local:
            bar = tqdm(desc=label, disable=not shown, delay=3.0)
            names = tuple(kwargs or ())
            found = _of_each(model, guide, runs, members, num_steps, draws, names, bar)
        frame, args, traces = runs.plate, runs.args, runs.traces
        args = args[: len(args) - len(kwargs or ())]
    if not local:
        known = None if frame is None or plate is None else frame.name
        whole = Whole(model, args, kwargs, known, draws, seed)
        count = len(members) + 2
        with tqdm(desc=label, total=count, disable=not shown, delay=3.0, unit="fit") as bar:
            own = _own_of(guide, traces, members)
            found, notes = measured_whole(whole, guide, members, own, dense=dense, tick=bar.update)
    check_finite(found)
    if log_likelihood is not None:
        exact = _exact(log_likelihood, len(found.khat), whole=not local)
        found, missed = _with_exact(found, exact)
        notes = [*notes, *missed]
    kinds = {name: name_of(family) for name, family in members.items()}
    notes += notes_of(found, kinds, exact=log_likelihood is not None)
    told = {"num_samples": draws, "guide": guide.family.name}
    told |= {"num_steps": num_steps} if local else {}
    return Account(_dataset(found, kinds, notes, not local, told))


def _own_of(guide: FamilyGuide, traces: Any, members: Mapping[str, Any]) -> str | None:
    """The name under which the family of a guide is among some, or None."""
    if any(is_finite_discrete(node["fn"]) for node in latent_nodes(traces[1])):
        return None  # the rungs sum out what it draws
    return next((n for n, family in members.items() if is_family_of(guide, family)), None)


def _of_each(
    model: Any,
    guide: FamilyGuide,
    opened_pair: Runs,
    members: Mapping[str, Any],
    steps: int,
    draws: int,
    names: tuple[str, ...],
    bar: Any,
) -> Measured:
    """What is measured of the latents of each datum, one minibatch after the other."""
    outer = values_outside(opened_pair.plate, *opened_pair.traces)
    runs = opened_pair.given_globals()
    check_along(terms(*runs.traces, None if runs.plate is None else runs.plate.name), guide)
    mine = Rung(guide.family.name, guide, runs)
    own = _own_of(guide, runs.traces, members)
    known = model, runs, outer, names
    rungs = {n: mine if n == own else rung_of(n, f, *known) for n, f in members.items()}
    point = rung_of("point", LADDER["deterministic"], *known, dense=False)
    dense = terms(*runs.traces, runs.plate.name).is_dense
    parts = []
    bar.reset(len(runs.batches) * steps * (len(rungs) + 1 + dense))
    with bar:
        for batch in runs.batches:
            climber = _Climber(mine.on(batch), steps, draws, bar.update)
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
    """

    own: ShiftedGuide
    steps: int
    draws: int
    tick: Callable[[], Any]

    def measured(
        self, mine: Rung, rungs: Mapping[str, Rung], point: Rung, *, dense: bool
    ) -> Measured:
        """The optimum of each family, of the guide's own and of points, and log p(x)."""
        own, seeds = self.own, seeds_of_groups()
        rows = data_plate(own.traces[0], own.runs.plate.name).size
        where, below = moments_of(own, own.start), None
        found: dict[str, tuple[ShiftedGuide, Tensor]] = {}
        every = {**rungs, **({"": mine} if dense and mine not in rungs.values() else {})}
        for name, rung in every.items():
            shifted = own if rung is mine else rung.on(own.args, rows)
            starts = [where, below]
            best = climb(
                shifted, rung.guide, starts, self.steps, self.tick, own=rung is mine and dense
            )
            below = moments_of(shifted, best)
            found[name] = shifted, best
        groups = {name: elbo_groups(*each, self.draws, seeds) for name, each in found.items()}
        shifted = point.on(own.args, rows)
        best = climb(shifted, point.guide, [where, below], self.steps, self.tick)
        top = -shifted.loss(best, 1, seeds[0])
        endless = without_maximum(shifted, point.guide, best)
        said = elbo_groups(own, own.start, self.draws, seeds if dense else seeds[:1])
        kept = next((name for name, rung in every.items() if rung is mine), None)
        return Measured(
            rungs={name: groups[name] for name in rungs},
            best=None if kept is None else groups[kept],
            guide=said,
            point=top,
            endless=endless,
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
        if "noise_only" in found:
            prior = self._by(*found["noise_only"], seeds)
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


def _exact(log_likelihood: Any, size: int, *, whole: bool) -> Tensor:
    """The user's log p(x), of shape `(size,)`."""
    values = as_doubles(check_real("log_likelihood", log_likelihood))
    values = values.reshape(1) if whole and values.size == 1 else values
    bad = int((~np.isfinite(values)).sum())
    wanted = "a finite number" if whole else f"{size} finite numbers, one per datum"
    came = f"shape {values.shape} with {bad} that are not finite"
    expect(values.shape == (size,) and not bad, "log_likelihood", wanted, came)
    return torch.from_numpy(np.array(values))


def _with_exact(found: Measured, exact: Tensor) -> tuple[Measured, list[str]]:
    """The same with a known log p(x), and a remark if the weights miss some of it."""
    short = exact - found.log_likelihood - _CLEAR * found.log_likelihood_se - _SHORT
    missed = int((short > 0).sum())
    remark = (
        f"the weighted draws miss up to {(exact - found.log_likelihood).max():.2g} nats of the log "
        f"p(x) that was given, for {missed} of {len(exact)}: `noise` may be off there"
    )
    known = replace(found, log_likelihood=exact, log_likelihood_se=torch.zeros_like(exact))
    return known, [remark] if missed else []


def _dataset(
    found: Measured,
    kinds: Mapping[str, str],
    notes: list[str],
    whole: bool,  # noqa: FBT001
    told: dict[str, Any],
) -> xr.Dataset:
    """The result, with its units and errors."""
    rows = rows_of(found, whole, kinds)
    unit = "nats of all the data" if whole else "nats per datum"
    has = {"unit": unit}
    nats = np.stack([row.nats for row in rows.values()])
    errors = np.stack([row.se for row in rows.values()])
    summed = np.array([row.summed for row in rows.values()])
    size = nats.shape[1]
    mean, running = nats.mean(1), np.full(len(rows), math.nan)
    running[summed] = mean[summed].cumsum()
    spread = nats.std(1, ddof=1) / math.sqrt(size) if size > 1 else np.full(len(rows), math.nan)
    datum = () if whole else ("datum",)

    def of_data(values: Any) -> Any:
        values = np.asarray(values)
        return values[..., 0] if whole else values

    dense = found.best is not None
    optima = [_mean_and_error(groups) for groups in found.rungs.values()]
    elbo = _mean_and_error(found.guide) if dense else (np.full(size, math.nan),) * 2
    variables = {
        "nats": (("row", *datum), of_data(nats), has),
        "nats_se": (("row", *datum), of_data(errors), has),
        "mean": ("row", mean, has),
        "mean_se_draws": ("row", np.sqrt((errors**2).sum(1)) / size, has),
        "mean_se_data": ("row", spread, has),
        "running": ("row", running, has),
        "summed": ("row", summed),
        "end": ("row", [row.end for row in rows.values()]),
        "words": ("row", [words_of(name, whole) for name in rows]),
        "optimum": (("family", *datum), of_data([value for value, _ in optima]), has),
        "optimum_se": (("family", *datum), of_data([error for _, error in optima]), has),
        "log_likelihood": (datum, of_data(found.log_likelihood), has),
        "log_likelihood_se": (datum, of_data(found.log_likelihood_se), has),
        "ess": (datum, of_data(found.ess), {"unit": "draws"}),
        "khat": (datum, of_data(found.khat), {"unit": ""}),
        "elbo": (datum, of_data(elbo[0]), has),
        "elbo_se": (datum, of_data(elbo[1]), has),
    }
    coords = {"row": list(rows), "family": list(found.rungs)}
    attrs = {"unit": unit, "notes": notes, **told}
    return xr.Dataset(variables, coords, attrs)


def _mean_and_error(groups: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The mean over groups of draws, and its standard error."""
    return groups.mean(0).numpy(), error_of(groups).numpy()
