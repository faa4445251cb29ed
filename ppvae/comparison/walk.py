"""The steps of a choice: which are taken, where they end, and what is said of that."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from ppvae.comparison.ledger import holds
from ppvae.comparison.steps import TRUST, crossed_interval, interval_of_totals, with_steps
from ppvae.comparison.trials import Settings, check_alike
from ppvae.objectives.weights import TRUSTED

_EQUAL = 0.75  # share of effective draws, above which no tail of the weights matters
_FEW = 0.05  # share of the data whose weights need not be trusted
_CLEAR = 4.0  # errors by which draws of another family must find more of log p(x) to count
_NOTHING = 2  # steps in a row that bring nothing, after which the walk ends


class Walk:
    """The steps so far, and whether there is to be another one.

    Args:
        told: what a step must gain, and how it is measured.
        learns: whether the model has parameters that are trained.
    """

    steps: xr.Dataset

    def __init__(self, told: Settings, *, learns: bool) -> None:
        self.min_gain, self.level, self.learns = told.min_gain, told.level, learns
        self.draws = told.num_samples
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
        joined = xr.concat(self.results, "family").assign_coords(family=self.names)
        order = joined.transpose("family", "seed", ...)
        self.steps = with_steps(order, self.min_gain, self.level, self.below)
        if self.below:
            self._judge()
        if self._nothing_left():
            self.end = "left"
        elif self.row >= _NOTHING:
            self.end = "row"
        return bool(self.end)

    def _judge(self) -> None:
        """Takes the last step, or counts it among those that bring nothing."""
        step = self.steps.isel(family=-1)
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

    def dataset(self) -> xr.Dataset:
        """All numbers."""
        names = ("left", "left_upper", "untrusted")
        columns = zip(*map(self._left, range(len(self.names))), strict=True)
        nats = {"unit": self.steps.gain.attrs["unit"]}
        units = nats, nats, {"unit": ""}
        added = zip(names, columns, units, strict=True)
        return self.steps.assign({name: ("family", [*each], unit) for name, each, unit in added})

    def reason(self, data: xr.Dataset, every: Sequence[str]) -> str:
        """The recommendation in words: what to take, why, what it costs, and what is open.

        Args:
            data: all numbers, of `dataset`.
            every: the names of all families, also of those that were not tried.
        """
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
        nats, most = (round(float(each), 3) + 0.0 for each in (one.left, one.left_upper))
        left = f"{nats:.3f} (at most {most:.3f}) {unit}"  # and no minus before a zero
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
