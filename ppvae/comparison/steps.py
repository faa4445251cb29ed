"""What a step from one family to another gains, for other seeds and data, and what that says."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy import special

#: numbers of each datum, and of all the data, that results of trials have
MEASURES = ["elbo", "log_likelihood", "rate", "distortion"]
TOTALS = ["total_elbo", "total_elbo_se", "log_evidence", "global_rate"]
#: of the weights behind log p(x), the same two
TRUST = ["ess", "khat"], ["evidence_ess", "evidence_khat"]
#: of a gain by what it costs
RATES = ["gain_per_parameter", "gain_per_second"]


def crossed_interval(differences: np.ndarray, level: float = 0.95) -> list[np.ndarray]:
    r"""The mean of differences, its interval for new seeds and new data, and two standard errors.

    For `d[s, i] = m + a[s] + b[i] + c[s, i]` with S seeds and N data the variance of the mean is
    `var(a) / S + var(b) / N + var(c) / (S N)`. The spread over seeds of the means over data tells
    the first and last term, that over data of the means over seeds the last two. Each standard
    error is widened by Student's t, of S - 1 and of N - 1 degrees, and the half-widths are added in
    quadrature. `c`, with the error of the draws in it, counts twice: the interval is rather too
    wide. (Satterthwaite's degrees for the sum cover too little where few seeds differ much.)

    Args:
        differences: shape `(*, seeds, data)`, at least two of each.
        level: the least probability to cover the mean.

    Returns:
        The mean, the ends of the interval, and the standard errors over seeds and over data; `(*)`.
    """
    seeds, data = differences.shape[-2:]
    over_seeds = differences.mean(-1).std(-1, ddof=1) / math.sqrt(seeds)
    over_data = differences.mean(-2).std(-1, ddof=1) / math.sqrt(data)
    t = special.stdtrit([seeds - 1, data - 1], (1 + level) / 2)
    mean, half = differences.mean((-2, -1)), np.hypot(t[0] * over_seeds, t[1] * over_data)
    return [mean, mean - half, mean + half, over_seeds, over_data]


def interval_of_totals(
    differences: np.ndarray, errors: np.ndarray, level: float = 0.95
) -> list[np.ndarray]:
    r"""The mean of differences of totals, its interval for new seeds and draws, and two errors.

    For `d[s] = m + a[s] + e[s]` with S seeds the variance of the mean is `(var(a) + var(e)) / S`,
    all of which the spread over seeds tells, as far as S - 1 degrees of freedom can. The Monte
    Carlo error of each, which is known, is added in quadrature and counts twice: the interval is
    rather too wide, and that of the draws alone where all seeds end at one optimum.

    Args:
        differences: shape `(*, seeds)`, at least two.
        errors: their Monte Carlo errors, of the same shape.
        level: the least probability to cover the mean.

    Returns:
        The mean, the ends of the interval, and the standard errors over seeds and of the draws.
    """
    seeds = differences.shape[-1]
    over_seeds = differences.std(-1, ddof=1) / math.sqrt(seeds)
    of_draws = np.sqrt((errors**2).mean(-1) / seeds)
    t, z = special.stdtrit(seeds - 1, (1 + level) / 2), special.ndtri((1 + level) / 2)
    mean, half = differences.mean(-1), np.hypot(t * over_seeds, z * of_draws)
    return [mean, mean - half, mean + half, over_seeds, of_draws]


def still_to_come(fall: np.ndarray, error: np.ndarray) -> np.ndarray:
    """How far falls over the last quarter of the epochs may go on; zero if they may be noise.

    A loss that falls like 1 / epoch has, at the end, three times as far to go as it fell over the
    last quarter, 1 / (3T/4) - 1 / T = (1 / T) / 3, and one that falls faster has less. Two standard
    errors of the fall are taken off as noise. NaN, from too few epochs, counts as zero.
    """
    return np.nan_to_num(3 * np.sign(fall) * np.maximum(np.abs(fall) - 2 * error, 0.0))


def with_steps(
    results: xr.Dataset, min_gain: float, level: float, below: Sequence[int] | None = None
) -> xr.Dataset:
    """Means over the data, and what each family gains over one below, with the verdict.

    Args:
        results: of `trial`, with dims `family` and `seed`.
        min_gain: what a step must gain.
        level: of its interval.
        below: for each family but the first the number of the one it is held against; by default
            the one before it.
    """
    results = results.drop_vars([*TRUST[0], *TRUST[1]], errors="ignore")
    whole = "total_elbo" in results
    under = [*range(results.sizes["family"] - 1)] if below is None else [*below]

    def up(values: Any) -> np.ndarray:
        array = np.asarray(values)
        return array[1:] - array[under]

    if whole:
        errors = results.total_elbo_se.values
        errors = np.hypot(errors[1:], errors[under])
        interval = interval_of_totals(up(results.total_elbo), errors, level)
    else:
        interval = crossed_interval(up(results.elbo), level)
    gain, lower, upper = interval[:3]
    fall = results.fall.mean("seed").values
    error = np.sqrt((results.fall_se**2).sum("seed").values) / results.sizes["seed"]
    drift, falling = up(fall), np.abs(still_to_come(fall, error)) > min_gain
    left = still_to_come(drift, np.hypot(error[1:], error[under]))
    yes, no, point = lower > min_gain, upper < min_gain, np.isnan(gain)
    turns = (lower + np.minimum(left, 0) <= min_gain) & (upper + np.maximum(left, 0) >= min_gain)
    names = ["gain", "gain_lower", "gain_upper", "gain_se_seeds"]
    names.append("gain_se_draws" if whole else "gain_se_data")
    steps = dict(zip(names, interval, strict=True), below=results.family.values[under])
    steps["gain_drift"] = np.where(point, math.nan, drift)
    for name, total in zip(RATES, (results.parameters, results.seconds), strict=True):
        cost = up(total.median("seed"))
        steps[name] = gain / np.where(cost > 0, cost, math.nan)
    steps["verdict"] = np.select([point, turns, yes], ["", "undecided", "yes"], "no")
    more = "more seeds or draws" if whole else "more seeds, test data or draws"
    notes = {
        "no verdict, a point has no ELBO: its objective is no bound": point,
        "the gain still moved at the end (see gain_drift): train longer": turns & (yes | no),
        "the loss still fell at the end (see fall): train longer": falling[1:] | falling[under],
        f"the interval holds {min_gain:g}: {more} would tell": turns,
    }
    steps["note"] = np.select(list(notes.values()), list(notes), "")
    columns = {
        name: ("family", [math.nan if values.dtype.kind == "f" else "", *values.tolist()])
        for name, values in steps.items()
    }
    options: dict[str, Any] = {"min_gain": min_gain, "level": level}
    if whole:
        unit = "nats of all the data"
        options |= {"num_data": int(results.num_data[0, 0]), "unit": unit}
        means = results.drop_vars("num_data")
    else:
        unit = "nats per datum"
        options["num_data"] = results.sizes["datum"]
        means = results.mean("datum", skipna=False)
    means = means.assign(parameters=results.parameters.isel(seed=0)).assign(columns)
    for name in (*MEASURES, *TOTALS, "fall", "fall_se", *names, "gain_drift"):
        if name in means:
            means[name].attrs["unit"] = unit
    means.attrs = options
    return means
