"""Which family to take: a walk up the ladder that ends where a further step can bring nothing."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import xarray as xr
from torch import nn
from tqdm.auto import tqdm

from ppvae._checks import check_count, check_label, check_number, check_seed, expect
from ppvae._process import exclusive
from ppvae._scopes import private_modules, random_state
from ppvae.comparison.ledger import holds
from ppvae.comparison.members import members_of, name_of
from ppvae.comparison.steps import (
    TRUST,
    crossed_interval,
    interval_of_totals,
    table_of,
    with_steps,
)
from ppvae.comparison.trials import check_alike, check_test, held_data, task_on, trial
from ppvae.guides.family_guide import FamilyGuide
from ppvae.guides.headed import check_encoder
from ppvae.objectives.weights import TRUSTED
from ppvae.programs.keywords import check_programs

_LADDER = ("noise_only", "mean_only", "shared_scale", "mean_scale", "full_rank", "flow")
_EQUAL = 0.75  # share of effective draws, above which no tail of the weights matters
_FEW = 0.05  # share of the data whose weights need not be trusted
_CLEAR = 4.0  # errors by which draws of another family must find more of log p(x) to count
_NOTHING = 2  # steps in a row that bring nothing, after which the walk ends


@dataclass(frozen=True, eq=False)
class Choice:
    """What `choose_family` recommends; `print` shows the walk as a table, and why it ends there.

    Attributes:
        family: the family, as it was given.
        name: its name.
        model: a copy of the model, fitted with a guide of that family and the first seed.
        guide: that guide.
        dataset: the numbers of the families that were tried, as in `Comparison`: `below` is the
            one that a step was held against, the best so far. Beside them, dim `family`, what a
            richer family could still gain for the same model: `left`, log p(x) less the ELBO, with
            its upper end `left_upper`, and `untrusted`, the share of the data (or of the seeds, for
            latents of all the data) whose importance weights say little of it.
        reason: the recommendation in words.
    """

    family: Any
    name: str
    model: Any
    guide: FamilyGuide
    dataset: xr.Dataset
    reason: str

    def __repr__(self) -> str:
        return f"{table_of(self.dataset)}\n{self.reason}"


@exclusive
def choose_family(  # noqa: D417
    model: Any,
    data: Any,
    test: Any = None,
    *,
    encoder: Any = None,
    families: Sequence[Any] | Mapping[str, Any] = _LADDER,
    num_seeds: int = 3,
    seed: int = 0,
    min_gain: float = 0.05,
    level: float = 0.95,
    num_samples: int = 256,
    progress: bool | str = True,
    **fit_options: Any,
) -> Choice:
    r"""Walks up the ladder of families, and says which one to take, and why not a richer one.

    Each family is fitted with several seeds and held against the best one below it, as in
    `compare_families`: a step is taken where it gains more than `min_gain` for other seeds and
    other data. All begin with copies of the same model and encoder, which stay as they are.

    The walk ends before the last family where

    - **nothing is left**: log p(x) less the ELBO, which is all that a richer family could gain for
      this model, is below `min_gain` with its whole interval, and the importance weights behind it
      can be trusted. Where the model learns, it must have a code through which something passes (a
      decoder that learned to ignore its code leaves nothing, whatever the data); and another
      decoder may still be learned with another family;
    - **two steps in a row bring nothing**: their verdict is "no". A step to a family that does not
      hold the one below, as `mean_only` does not hold the prior, says nothing of richer ones where
      it loses, and is not counted.

    A step that is undecided is not taken, and the recommendation says so, and what would decide it;
    it says as well where so few epochs cannot tell whether a loss still fell.
    Points (`deterministic`, `zero`) have no ELBO, and are no rungs.

    **Global latents** (no encoder) belong to all the data; all is in nats of all the data, and so
    is `min_gain`, see `compare_families`.

    Args:
        model: a `torch.nn.Module` that is a Pyro model, or a function without networks and
            `pyro.param` statements of its own, which could not be copied. To choose for a given
            decoder, freeze it: `decoder.requires_grad_(False)`.
        data: training data, as for `fit`.
        test: data to measure on, see `compare_families`; by default the training data.
        encoder: as for `FamilyGuide`; None for latents of all the data (a latent of each datum
            then has parameters of its own for each datum, as of a guide without an encoder).
        families: at least one, with a density, from the cheapest to the richest; see
            `compare_families`.
        num_seeds, seed, min_gain, level, num_samples, progress: as for `compare_families`.
        **fit_options: options of `fit`.

    Returns:
        The recommendation, with a fitted pair to go on with.

    Raises:
        TypeError: model, encoder or a family is not what it should be.
        ValueError: a family has no density, the model cannot be copied, or another argument is not
            as above.
        Diverged: see `fit`.

    Example:
        >>> import torch
        >>> from ppvae.regression import LinearRegression
        >>> X = torch.tensor([[1.0, 1.0], [1.0, 0.9], [0.9, 1.0]])
        >>> y = torch.tensor([1.0, 0.0, 2.0])
        >>> model = LinearRegression(2, noise=1.0)
        >>> names = ["noise_only", "mean_scale", "full_rank", "flow"]
        >>> chosen = choose_family(model, (X, y), families=names, progress=False)
        >>> chosen.name, chosen.dataset.family.values.tolist()  # the posterior is Gaussian: no flow
        ('full_rank', ['noise_only', 'mean_scale', 'full_rank'])
        >>> chosen.reason.splitlines()[0][:18]
        'Take `full_rank`: '
    """
    members = members_of(families, 1)
    num_seeds = check_count("num_seeds", num_seeds, 2)
    num_samples = check_count("num_samples", num_samples, 2)
    min_gain, level = check_number("min_gain", min_gain), check_number("level", level)
    expect(level < 1, "level", "a number from 0 to below 1", level)
    check_programs(model, model)
    check_encoder(encoder)
    seed = check_seed(seed)
    args = held_data("data", data) if test is None else held_data("test", test)
    shown, label = check_label("progress", progress, "choose_family")
    seeds = range(seed, seed + num_seeds)
    walk = _Walk(min_gain, level, num_samples, learns=_learns(model))
    pairs: dict[str, tuple[Any, FamilyGuide]] = {}
    with (
        private_modules(),
        tqdm(desc=label, total=len(members) * num_seeds, disable=not shown, unit="fit") as bar,
    ):
        for name, family in members.items():
            results = []
            for number in seeds:
                bar.set_postfix(family=name, seed=number)
                try:
                    with pyro.get_param_store().scope(), random_state(number):
                        pair = _fresh(model, encoder, family)
                        if not pairs:
                            _check_model(*pair, data, fit_options)
                            if test is not None:
                                check_test(*copy.deepcopy(pair), args, fit_options)
                        told = _options_of(*pair, fit_options)
                        run = *pair, data, args, number, num_samples, told, "data"
                        results.append(_with_density(trial(*run), name))
                        pairs.setdefault(name, pair)
                except Exception as error:
                    error.add_note(f"choose_family: family {name}, seed {number}")
                    raise
                bar.update()
            result = xr.concat(results, "seed").assign_coords(seed=[*seeds])
            if walk.ends_with(name, name_of(family), result):
                break
    best = walk.best
    return Choice(members[best], best, *pairs[best], walk.dataset(), walk.reason([*members]))


class _Walk:
    """The steps so far, and whether there is to be another one.

    Args:
        min_gain: what a step must gain.
        level: of intervals.
        draws: of an evaluation.
        learns: whether the model has parameters that are trained.
    """

    def __init__(self, min_gain: float, level: float, draws: int, *, learns: bool) -> None:
        self.min_gain, self.level, self.draws, self.learns = min_gain, level, draws, learns
        self.results: list[xr.Dataset] = []
        self.names: list[str] = []
        self.kinds: list[str] = []
        self.below: list[int] = []
        self.at, self.row = 0, 0
        self.end = ""

    @property
    def best(self) -> str:
        """The best family so far."""
        return self.names[self.at]

    def ends_with(self, name: str, kind: str, result: xr.Dataset) -> bool:
        """Adds a family of some kind, and says whether the walk ends."""
        self.names.append(name)
        self.kinds.append(kind)
        self.results.append(result)
        if len(self.names) > 1:
            check_alike(result, self.results[0])
            self.below.append(self.at)
            self._judge()
        if self._nothing_left():
            self.end = "left"
        elif self.row >= _NOTHING:
            self.end = "row"
        return bool(self.end)

    def _judge(self) -> None:
        """Takes the last step, or counts it among those that bring nothing."""
        step = self._steps().isel(family=-1)
        if step.verdict == "yes":
            self.at, self.row = len(self.names) - 1, 0
        elif step.verdict == "no":
            held = holds(self.kinds[-1], self.kinds[self.at])
            lost = float(step.gain_upper) < 0 and not held
            self.row += not lost
        else:
            self.row = 0

    def _nothing_left(self) -> bool:
        """Whether a richer family than the best can bring nothing for its model."""
        _, upper, untrusted = self._left(self.at)
        if not (upper < self.min_gain and untrusted <= _FEW):
            return False
        one = self.results[self.at]
        passes = one["global_rate" if "total_elbo" in one else "rate"].mean()
        return not self.learns or float(passes) >= self.min_gain

    def _left(self, at: int) -> tuple[float, float, float]:
        others = [] if self.learns else self.results
        return _left(self.results[at], others, self.level, self.draws)

    def _steps(self) -> xr.Dataset:
        joined = xr.concat(self.results, "family").assign_coords(family=self.names)
        order = joined.transpose("family", "seed", ...)
        return with_steps(order, self.min_gain, self.level, self.below)

    def dataset(self) -> xr.Dataset:
        """All numbers."""
        steps, left = self._steps(), [*map(self._left, range(len(self.names)))]
        unit = {"unit": steps.gain.attrs["unit"]}
        columns = dict(
            zip(("left", "left_upper", "untrusted"), zip(*left, strict=True), strict=True)
        )
        added: dict[str, Any] = {name: ("family", [*column]) for name, column in columns.items()}
        steps = steps.assign(added)
        for name in ("left", "left_upper"):
            steps[name].attrs = unit
        steps["untrusted"].attrs = {"unit": ""}
        return steps

    def reason(self, every: Sequence[str]) -> str:
        """The recommendation in words: what to take, why, what it costs, and what is open."""
        data = self.dataset()
        unit = data.gain.attrs["unit"]
        one = data.sel(family=self.best)
        lines = [f"Take `{self.best}`: {self._why(one, unit)}."]
        known = "total_elbo" if "total_elbo" in data else "elbo"
        evidence = "log_evidence" if known == "total_elbo" else "log_likelihood"
        cost = f"{int(one.parameters)} parameters and {float(one.seconds.median()):.2g} s a fit"
        lines.append(
            f"It costs {cost}; its ELBO is {float(one[known].mean()):.2f}, and log p(x) "
            f"{float(one[evidence].mean()):.2f} {unit}."
        )
        lines.append(self._about_the_end(one, unit, every))
        for name in data.family.values[1:]:
            step = data.sel(family=name)
            if step.verdict == "undecided":
                lines.append(
                    f"Whether `{name}` is worth it over `{step.below.item()}` is undecided, "
                    f"{_interval(step)}: {step.note.item()}."
                )
        trained = [name for name in self.names if self.learns or data.parameters.sel(family=name)]
        short = [name for name in trained if data.fall.sel(family=name).isnull().any()]
        if short:
            lines.append(
                f"Whether the loss of {', '.join(short)} still fell at the end cannot be told from "
                "so few epochs, and neither can what they are worth: train longer."
            )
        return "\n".join(line for line in lines if line)

    def _why(self, one: xr.Dataset, unit: str) -> str:
        if self.at:
            return f"it gains {_interval(one)} {unit} over `{one.below.item()}`"
        if len(self.names) > 1:
            return "no step up from it is known to be worth it"
        return "it is the first of the walk"

    def _about_the_end(self, one: xr.Dataset, unit: str, every: Sequence[str]) -> str:
        """Why the walk ended, and what it leaves open."""
        over = every[len(self.names) :]
        rest = f" ({', '.join(over)} not tried)" if over else ""
        left = f"{float(one.left):.3f} (at most {float(one.left_upper):.3f}) {unit}"
        if self.end == "left":
            other = "; another decoder may be learned with another family" if self.learns else ""
            return f"A richer family could gain {left} for this model{other}{rest}."
        trusted = float(one.untrusted) <= _FEW
        gap = f"what is left to log p(x) is {left}"
        if not trusted:
            gap += f" or more: the weights of {float(one.untrusted):.0%} cannot be trusted"
        if self.end == "row":
            return f"The last two steps bring less than {self.min_gain:g} each{rest}; {gap}."
        return f"The walk went to its end; {gap}."


def _left(
    result: xr.Dataset, others: Sequence[xr.Dataset], level: float, draws: int
) -> tuple[float, float, float]:
    """What a richer family could gain, at most, and for how many data that cannot be trusted.

    Args:
        result: of a family.
        others: of families with the same model, whose draws may have found more of log p(x), as
            where a posterior has another mode; they count where they clearly did.
        level: of the interval.
        draws: of an evaluation.

    Returns:
        Log p(x) less the ELBO, the upper end of its interval, and a share.
    """
    whole = "total_elbo" in result
    known, trusted, error = _evidence(result, draws)
    for other in others:
        more, good, noise = _evidence(other, draws)
        found = good & (more - known > _CLEAR * np.hypot(error, noise) + 1e-9)
        known, error = np.where(found, more, known), np.where(found, noise, error)
    if whole:
        gap = known - result.total_elbo.values
        interval = interval_of_totals(gap, result.total_elbo_se.values, level)
    else:
        interval = crossed_interval(known - result.elbo.transpose("seed", "datum").values, level)
    return float(interval[0]), float(interval[2]), float((~trusted).mean())


def _evidence(result: xr.Dataset, draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log p(x), whether its weights can be trusted, and its error."""
    whole = "total_elbo" in result
    names = ["log_evidence" if whole else "log_likelihood", *TRUST[whole]]
    found, ess, khat = (result[name].transpose("seed", ...).values for name in names)
    # where nearly all draws count, nothing depends on the shape of their tail
    trusted = (khat <= TRUSTED) | (ess >= _EQUAL * draws)
    return found, trusted, np.sqrt(np.maximum(1 / ess - 1 / draws, 0.0))


def _interval(step: xr.Dataset) -> str:
    lower, upper = float(step.gain_lower), float(step.gain_upper)
    return f"{float(step.gain):.3f} ({lower:.3f} to {upper:.3f})"


def _fresh(model: Any, encoder: Any, family: Any) -> tuple[Any, FamilyGuide]:
    """A copy of the model and of the encoder, which may share parts, and a guide for them."""
    prior: Any = getattr(model, "prior", None)
    attached = hasattr(prior, "attach") and prior.attached
    wanted = "a prior that is made of no guide's posteriors yet"
    expect(not attached, "model", wanted, "one that another guide is attached to")
    model, encoder = copy.deepcopy((model, encoder))
    return model, FamilyGuide(model, family, encoder)


def _learns(model: Any) -> bool:
    """Whether a model has parameters that are trained."""
    return isinstance(model, nn.Module) and any(p.requires_grad for p in model.parameters())


def _options_of(model: Any, guide: FamilyGuide, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `fit`; where there is nothing to train, one epoch is enough."""
    if guide.family.channels or _learns(model):
        return dict(options)
    kept = {
        name: value for name, value in options.items() if name not in ("max_epochs", "scheduler")
    }
    return kept | {"num_epochs": 1}


def _with_density(result: xr.Dataset, name: str) -> xr.Dataset:
    """A result, which must be one of a family with a density."""
    elbo = result["total_elbo" if "total_elbo" in result else "elbo"]
    wanted = "families with a density, of which there is an ELBO"
    expect(not elbo.isnull().any(), "families", wanted, f"{name}, a point")
    return result


def _check_model(model: Any, guide: FamilyGuide, data: Any, options: Mapping[str, Any]) -> None:
    """Raises a ValueError if a model has parameters that a copy of it would share, or lack."""
    told = options.get("kwargs"), options.get("plate")
    program = task_on(*copy.deepcopy((model, guide)), data, *told).program
    own = [part for part in program.called if {*part.parameters(), *part.buffers()}]
    shared = [type(part).__name__ for part in own]
    shared += [f"pyro.param({name!r})" for name in program.constraints]
    wanted = "a torch.nn.Module that holds its networks and parameters, so that it can be copied"
    expect(not shared, "model", wanted, f"one that uses {shared} from outside of itself")
