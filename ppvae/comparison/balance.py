"""What `account` returns: the rows as a dataset, and as a table with a legend."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from ppvae.comparison.ledger import Measured, rows_of
from ppvae.comparison.tables import aligned, places, shown, wrapped
from ppvae.evaluation.amortization import error_of


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
        several = "datum" in data.dims
        decimals = places(data.mean_se_draws)
        numbers = ["mean", "mean_se_draws", *(["mean_se_data"] if several else []), "running"]
        rows = []
        for row in data.row.values:
            one = data.sel(row=row)
            end = one.end.item() if one.summed else "not in the sum"
            rows.append([str(row), *(shown(one[name], decimals) for name in numbers), end])
        head = ["", "nats", "+- draws", *(["+- data"] if several else []), "sum", ""]
        legend = aligned(["", ""], [*zip(data.row.values, data.words.values, strict=True)], words=1)
        count = f", a mean of {data.sizes['datum']}" if several else ""
        notes = [line for note in data.attrs["notes"] for line in wrapped(note)]
        first = f"{data.attrs['unit']}{count}"
        return "\n".join([first, *aligned(head, rows, words=1), *legend, *notes])


def balance_of(
    found: Measured,
    kinds: Mapping[str, str],
    notes: list[str],
    told: Mapping[str, Any],
    *,
    whole: bool,
) -> Account:
    """The rows of what was measured, with their units and errors.

    Args:
        found: what was measured.
        kinds: name of a rung -> name of its family.
        notes: what cannot be trusted.
        told: further attributes of the dataset.
        whole: whether the one datum is all the data.
    """
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
        "words": ("row", [row.words for row in rows.values()]),
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
    return Account(xr.Dataset(variables, coords, attrs))


def _mean_and_error(groups: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The mean over groups of draws, and its standard error."""
    return groups.mean(0).numpy(), error_of(groups).numpy()
