"""Draws of an exact posterior, as ArviZ has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ppvae._checks import check_count, check_names
from ppvae.regression.hyper import HyperPosterior, Problem
from ppvae.regression.priors import Seed
from ppvae.regression.rows import Rows
from ppvae.regression.sampling import draw, generator_of

if TYPE_CHECKING:
    import xarray as xr


def tree_of(
    problem: Problem,
    hyper: HyperPosterior,
    rows: Rows | None,
    *,
    num_samples: int,
    seed: Seed,
    features: Sequence[str] | None,
) -> xr.DataTree:
    """Lays them out; see `ExactPosterior.to_datatree`."""
    import arviz_base

    factor, first = problem.factor, int(problem.factor.intercept)
    generator = generator_of(seed)
    size = check_count("num_samples", num_samples)
    drawn = draw(problem, hyper, size, generator)
    count = factor.columns - first
    names = factor.names if features is None else check_names("features", features, count)
    weight = drawn["weight"]
    posterior = {"weight": weight[:, first:]}
    posterior |= {"intercept": weight[:, 0]} if first else {}
    posterior |= {name: drawn[name] for name in problem.unknown}
    groups = {"posterior": {name: values[None] for name, values in posterior.items()}}
    if rows is not None:
        noise = drawn["noise"][:, None] * (1.0 if rows.sds is None else rows.sds)
        line = weight @ rows.X.T + (0.0 if rows.offset is None else rows.offset)
        logs = -(((rows.y - line) / noise) ** 2) / 2 - np.log(noise) - np.log(2 * np.pi) / 2
        logs = logs if rows.counts is None else logs * rows.counts
        new = line + noise * generator.standard_normal(line.shape)
        constant = {"X": rows.X[:, first:], **rows.sides()}
        groups |= {"posterior_predictive": {"y": new[None]}}
        groups |= {"log_likelihood": {"y": logs[None]}, "observed_data": {"y": rows.y}}
        groups |= {"constant_data": constant}
    dims = {"weight": ["feature"], "X": ["datum", "feature"]}
    dims |= {name: ["datum"] for name in ("y", "noise_sd", "offset", "counts")}
    return arviz_base.from_dict(
        groups,
        coords={} if names is None else {"feature": list(names)},
        dims=dims,
        attrs={"/": {"inference_library": "ppvae", "sampling": "independent, exact"}},
    )
