"""What a fit is worth, per datum and in total, in nats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ppvae._batches import draw_runs, minibatches, prepared
from ppvae._context import eval_mode, private_modules, random_state, unchecked
from ppvae.objective import Terms, is_vectorized, terms, trace_pair
from ppvae.sites import latent_nodes

__all__ = ["evaluate"]


def evaluate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 512,
    batch_size: int = 256,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
) -> xr.Dataset:
    r"""Measures a guide with local latents on data, without touching a weight or a buffer.

    Per datum (dim `datum`), in nats: `distortion` -E log p(x|z); `rate` KL(q(z|x) || p(z));
    `objective` -(distortion + rate); `elbo`, the same where it is a bound; `log_likelihood`
    log p(x), from below, as the log of the mean importance weight over all draws; `ess`, the
    effective number of those draws. For a point guide (`deterministic`) the rate is the penalty
    -log p(z) and the objective a penalised log-likelihood: no bound, so `elbo` and
    `log_likelihood` are NaN. Per coordinate (dim `latent`), for a model with one latent site that
    is a vector: `mean_variance`, the variance over the data of the mean of q, and `active`, whether
    it is above 0.01; `kl`, where it splits over coordinates.

    Attributes of the result: `bound`, whether the objective is one; `stochastic`, whether two
    encodings of the same data differ; `num_samples`.

    Args:
        model: a Pyro model.
        guide: its guide.
        *args: their arguments: data of which the first dimension is that of the data plate.
        num_samples: draws per datum, at least 2.
        batch_size: data per run.
        vectorized: run many draws at once, which the model must be written for (all operations
            leave leading dims alone); by default only where the model says so, as `VAE` does.
        seed: seeds the draws, without a trace outside; None uses the caller's stream.
        plate: name of the data plate; by default `data`, or else the outermost one.

    Returns:
        The measures, with dims `datum` and `latent`.

    Raises:
        ValueError: the data are not finite, an argument is out of its range, or some latent site is
            outside the data plate.

    Burda, Grosse, Salakhutdinov, Importance weighted autoencoders, 2016 (log p(x), active units).
    """
    if num_samples < 2 or batch_size < 1:
        raise ValueError(
            f"num_samples, batch_size: expected at least 2 and 1, got {num_samples}, {batch_size}"
        )
    args = prepared(args)
    if vectorized is None:
        vectorized = is_vectorized(model)
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model, guide):
        with unchecked():
            parts = _read(model, guide, args, plate)[0]
            _check_local(parts)
            batches = [
                _evaluate_batch(model, guide, batch, num_samples, plate, vectorized=vectorized)
                for batch in minibatches(model, guide, args, parts.plate, batch_size, plate)
            ]
    return _dataset(batches, num_samples)


def _read(
    model: Any, guide: Any, args: tuple[Any, ...], plate: str | None, draws: Any = None
) -> tuple[Terms, dict[str, Any]]:
    model_trace, guide_trace = trace_pair(model, guide, *args, draws=draws)
    parts = terms(model_trace, guide_trace, plate)
    sites = {n["name"]: (guide_trace.nodes[n["name"]], n) for n in latent_nodes(model_trace)}
    return parts, sites


def _check_local(parts: Terms) -> None:
    if parts.plate is None:
        raise ValueError("model: expected a plate over the data, got none")
    outside = (set(parts.log_prior) | set(parts.log_likelihood)) - parts.local
    if outside:
        raise ValueError(
            f"model: expected all sites in the plate {parts.plate.name!r}; outside: "
            f"{sorted(outside)}"
        )


def _evaluate_batch(
    model: Any,
    guide: Any,
    args: tuple[Any, ...],
    num_samples: int,
    plate: str | None,
    *,
    vectorized: bool,
) -> dict[str, np.ndarray]:
    parts, sites = _read(model, guide, args, plate)
    point = not parts.log_guide
    widest = max(
        [n["value"].numel() for pair in sites.values() for n in pair]
        + [a.numel() for a in args if isinstance(a, Tensor)]
    )
    weights, distortion, rate, means, first = [], [], [], [], None
    differ = False
    total = 2 if point else num_samples
    for count, draws in draw_runs(model, args, total, widest if vectorized else None):
        parts, drawn = _read(model, guide, args, plate, draws)
        size = (count, parts.plate.size)
        log_p = sum(parts.log_likelihood.values()) + sum(parts.log_prior.values())
        log_q = sum(parts.log_guide.values(), start=torch.zeros(()))
        weights.append((log_p - log_q).expand(size))
        distortion.append(parts.distortion.expand(size))
        rate.append(parts.rate.expand(size))
        if len(drawn) == 1:
            ((node, _),) = drawn.values()
            value = node["value"]
            values = value.expand((count, *value.shape)) if draws is None else value
            first = values[0] if first is None else first
            differ = differ or bool((values != first).any())
            means.append(values.sum(0))
    log_w = torch.cat(weights)
    found = {
        "distortion": torch.cat(distortion).mean(0),
        "rate": torch.cat(rate).mean(0),
        "log_likelihood": log_w.logsumexp(0) - math.log(len(log_w)),
        "ess": 1 / torch.softmax(log_w, 0).square().sum(0),
    }
    if point:
        found["log_likelihood"] = found["ess"] = torch.full_like(found["rate"], math.nan)
    if len(sites) == 1 and means:
        ((node, prior),) = sites.values()
        if node["value"].dim() == 2:
            found |= _coordinates(node["fn"], prior["fn"], sum(means) / len(log_w))
    result = {name: value.double().cpu().numpy() for name, value in found.items()}
    result["differ"], result["point"] = np.array(differ), np.array(point)
    return result


def _coordinates(guide: Any, prior: Any, mean_of_draws: Tensor) -> dict[str, Tensor]:
    """Measures of shape `(batch, latent)`: the mean of q, and the KL where it splits."""
    found = {}
    try:
        found["mean"] = guide.mean.expand(mean_of_draws.shape)
    except NotImplementedError:
        found["mean"] = mean_of_draws
    independent = torch.distributions.Independent
    if isinstance(guide, independent) and isinstance(prior, independent):
        try:
            kl = torch.distributions.kl_divergence(guide.base_dist, prior.base_dist)
            found["kl"] = kl.expand(mean_of_draws.shape)
        except NotImplementedError:
            pass
    return found


def _dataset(batches: list[dict[str, np.ndarray]], num_samples: int) -> xr.Dataset:
    point = any(bool(batch.pop("point")) for batch in batches)
    differ = any([bool(batch.pop("differ")) for batch in batches])
    arrays = {k: np.concatenate([batch[k] for batch in batches]) for k in batches[0]}
    mean, kl = arrays.pop("mean", None), arrays.pop("kl", None)
    arrays["objective"] = -(arrays["distortion"] + arrays["rate"])
    arrays["elbo"] = np.full_like(arrays["rate"], math.nan) if point else arrays["objective"]
    variables: dict[str, Any] = {name: ("datum", value) for name, value in arrays.items()}
    if mean is not None:
        variance = mean.var(0)
        variables["mean_variance"] = ("latent", variance)
        variables["active"] = ("latent", variance > 0.01)
    if kl is not None:
        variables["kl"] = ("latent", kl.mean(0))
    attrs = {"bound": int(not point), "stochastic": int(differ), "num_samples": num_samples}
    return xr.Dataset(variables, attrs=attrs)
