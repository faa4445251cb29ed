"""Exact posteriors of the same data under several models, ranked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from ppvae._checks import check_mapping, expect
from ppvae.regression.exact import ExactPosterior

if TYPE_CHECKING:
    import pandas as pd


def compare(posteriors: Mapping[str, ExactPosterior]) -> pd.DataFrame:
    """Ranks posteriors of the same data by exact leave-one-out, with their evidence beside it.

    Args:
        posteriors: by name, at least one; their rows, given as arrays, are the same, and their
            columns may differ.

    Returns:
        A row for each, the best first: `elpd_loo`, the sum of the log predictive densities of each
        datum given all others, and its standard error `se`; `elpd_diff`, how far it is below the
        best, and the standard error `dse` of that, all nan where the posterior without one datum is
        improper; `log_evidence`, nan where a flat prior leaves it undefined, and `probability`,
        that of the model if all that have an evidence are equally probable before; `r2`. All but
        the last two in nats.

    Raises:
        TypeError: they are no posteriors, by name.
        ValueError: there are none, they are of other data than the first, or the data came in
            blocks or count several times.

    Reference:
        Vehtari, Gelman, Gabry, *Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC*, 2017.

    Example:
        >>> from ppvae.regression import exact_posterior
        >>> X, y = [[1.0, 0.0], [2.0, 1.0], [3.0, 0.0]], [1.0, 2.0, 3.5]
        >>> both = exact_posterior(X, y, noise=1.0)
        >>> first = exact_posterior([row[:1] for row in X], y, noise=1.0)
        >>> compare({"both": both, "first": first}).index.tolist()
        ['first', 'both']
    """
    import pandas as pd

    named = check_mapping("posteriors", posteriors)
    target = None
    rows: dict[str, dict[str, float]] = {}
    densities = {}
    for name, posterior in named.items():
        where, kind = f"posteriors, {name}", type(posterior).__name__
        expect(isinstance(posterior, ExactPosterior), where, "an ExactPosterior", kind, TypeError)
        told = "one that keeps its rows: X and y were given as arrays"
        expect(posterior.rows is not None, where, told, "none")
        target = posterior.rows.y if target is None else target
        same = np.array_equal(posterior.rows.y, target)
        expect(same, where, "the same y as the first has", "another")
        once = posterior.rows.counts is None
        expect(once, where, "one whose rows count once each", "counts")
        loo = posterior.loo()
        densities[name] = loo.pointwise
        rows[name] = {
            "elpd_loo": loo.total,
            "se": loo.standard_error,
            "log_evidence": posterior.log_evidence,
            "r2": posterior.r2,
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table = table.sort_values("elpd_loo", ascending=False, kind="stable")
    best = densities[table.index[0]]
    away = {name: best - densities[name] for name in table.index}
    table["elpd_diff"] = [each.sum() for each in away.values()]
    table["dse"] = [np.sqrt(len(each)) * each.std() for each in away.values()]
    evidence = table["log_evidence"].to_numpy()
    total = special.logsumexp(evidence[~np.isnan(evidence)]) if (~np.isnan(evidence)).any() else 0.0
    table["probability"] = np.exp(evidence - total)
    order = ["elpd_loo", "se", "elpd_diff", "dse", "log_evidence", "probability", "r2"]
    return table[order]
