"""What a guide with global latents is worth: the data together, and each datum given the globals.

A global latent belongs to all the data, so the bound and log p(x) are numbers of all data together:
with `g` the globals, `log p(x) = log E_q(g) [p(g) / q(g) prod_n p(x_n | g)]`. For each draw of `g`
the local latents of every datum are drawn anew, many times, so that `p(x_n | g)` is an average of
weights of its own, and no weight is a product over the data of single draws.

The log of such an average is too low by half the square of its relative error, and the sum of the
logs over the data by many nats, which draws of the globals need not show. So the error of log p(x)
holds half of the sum of these squares; and it is NaN where the weights of some datum have a tail
from which no error follows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae.evaluation.responsibilities import Responsibilities
from ppvae.objectives.nested import draws_locals, inner_run
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.objectives.weights import (
    TRUSTED,
    effective_sample_size,
    estimates,
    khat,
    log_mean_weight,
    log_mean_weight_se,
)
from ppvae.programs.layout import Layout, Place
from ppvae.programs.nodes import drawn_nodes, latent_nodes
from ppvae.programs.plates import is_inside
from ppvae.programs.runs import Runs

GLOBALS = 32  # draws of the globals, where each of them has draws of the locals
_SHARE = 8  # one in so many of the draws that are asked for is made of the locals, for each global
_JUDGED = 4  # draws of the globals for which the weights of each datum are looked at


def by_parts(
    runs: Runs, num_samples: int, shares: Responsibilities
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Measures a pair some of whose latents are outside of the data plate, in nats.

    Args:
        runs: the pair.
        num_samples: draws of the globals, if the guide draws no locals; else an eighth of it for
            each of 32 draws of the globals.
        shares: is told of every run of the model.

    Returns:
        Numbers per datum given the globals, averaged over them, none where the model has no data
        plate; and numbers of all the data. NaN stands for what cannot be told apart.
    """
    plate = None if runs.plate is None else runs.plate.name
    whole = terms(*runs.traces, plate)
    size = 0 if whole.plate is None else whole.plate.size
    sums, outer, inner, bounds = _Means(size), [], [], []
    for parts, log_inner in _draws(runs, plate, whole.plate, num_samples, shares):
        for part, count in parts:
            sums.add(part, count)
        first = parts[0][0]
        if log_inner is None:
            for part, count in parts:  # without latents, each datum has a weight of its own
                weight = part.log_weight.sum(-1) if part.is_local else part.log_weight
                outer.append(weight.double().expand(count))
                bounds.append(outer[-1])
        else:
            weight = first.part(local=False).log_weight.double().reshape(-1)[:1]
            outer.append(weight + log_mean_weight(log_inner).sum())
            bounds.append(weight + log_inner.mean(0).sum())
            inner.append(log_inner)
    log_weight = torch.cat(outer)
    numbers, evidence = sums.per_datum(), _evidence(log_weight)
    if inner:
        judged = inner[:_JUDGED]
        numbers["log_likelihood"] = torch.stack([log_mean_weight(w) for w in inner]).mean(0)
        numbers["ess"] = torch.stack([effective_sample_size(w) for w in judged]).mean(0)
        numbers["khat"] = torch.stack([khat(w).to(w) for w in judged]).mean(0)
        known = (numbers["khat"] <= TRUSTED).all()  # NaN, of few draws, is not known either
        low = torch.stack([log_mean_weight_se(w).square().sum() for w in inner]).mean() / 2
        error = torch.hypot(evidence["log_evidence_se"], low) if known else math.nan
        evidence["log_evidence_se"] = error
    totals, unknown = sums.totals() | evidence, torch.full((size,), math.nan)
    if whole.is_dense:
        bound = torch.cat(bounds)  # whose error vanishes where the guide is the posterior
        spread = bound.std() / math.sqrt(len(bound)) if len(bound) > 1 else math.nan
        totals |= {"total_objective": bound.mean(), "total_elbo": bound.mean()}
        totals |= {"total_elbo_se": spread}
    else:
        numbers |= dict.fromkeys(("elbo", "log_likelihood", "ess", "khat"), unknown)
        unsaid = "total_elbo", "total_elbo_se", *evidence
        totals |= dict.fromkeys(unsaid, math.nan)
    if not splits(runs):
        numbers |= dict.fromkeys(("rate", "objective", "elbo", "log_likelihood"), unknown)
        totals["global_rate"] = math.nan
    arrays = {name: value.cpu().numpy() for name, value in numbers.items()}
    return arrays, {name: float(value) for name, value in totals.items()}


def _draws(
    runs: Runs, plate: str | None, frame: Any, num_samples: int, shares: Responsibilities
) -> Iterator[tuple[list[tuple[Terms, int]], Tensor | None]]:
    """Draws of the globals: terms of some runs with their numbers of draws, and local weights.

    The weights of the locals have shape `(draws, datum)`; None where the guide draws none.
    """
    if not draws_locals(runs, frame):
        for count, draws in runs.draws(runs.args, num_samples, runs.traces):
            pair = runs.pair(runs.args, draws)
            shares.add(pair[0], count, frame, draws)
            yield [(terms(*pair, plate), count)], None
        return
    for _ in range(GLOBALS):
        _, trace = runs.pair(runs.args)
        parts, logs = [], []
        for count, draws in runs.draws(runs.args, max(2, num_samples // _SHARE), runs.traces):
            inner = inner_run(runs, trace, frame, draws)
            shares.add(inner.model_trace, count, frame, draws)
            parts.append((inner.terms, count))
            logs.append(inner.log_weight.expand(count, inner.terms.plate.size))
        yield parts, torch.cat(logs)


def splits(runs: Runs) -> bool:
    """Whether the guide draws the latents in the data plate apart from all others.

    Else its density does not split into those of each datum and that of the globals.
    """
    frame, (model_trace, guide_trace) = runs.plate, runs.traces
    if frame is None:
        return True
    drawn = drawn_nodes(guide_trace)
    inner = {node["name"]: node for node in latent_nodes(model_trace) if is_inside(node, frame)}
    inner = {name: node for name, node in inner.items() if name not in drawn}  # pieces, or points
    if not inner:
        return True
    own = [n for n in drawn.values() if is_inside(n, frame) and n["infer"].get("is_auxiliary")]
    places = Layout({name: Place.of(node, frame) for name, node in inner.items()})
    points = not any(node["infer"].get("is_auxiliary") for node in drawn.values())
    sizes = [Place.of(node, frame).size for node in own]
    return points or sum(sizes) == places.size


@dataclass
class _Means:
    """Means over draws of the terms, of each datum and of what belongs to all data."""

    size: int
    count: int = 0
    likelihood: Any = 0.0
    rate: Any = 0.0
    outer_likelihood: Any = 0.0
    outer_rate: Any = 0.0

    def add(self, parts: Terms, count: int) -> None:
        """Adds the terms of a run of so many draws."""
        own, rest = parts.part(local=True), parts.part(local=False)

        def rows(value: Tensor) -> Tensor:
            return value.double().expand(count, self.size).sum(0)

        self.count += count
        self.likelihood = self.likelihood - rows(own.distortion)
        self.rate = self.rate + rows(own.rate)
        self.outer_likelihood = self.outer_likelihood - count * rest.distortion.double().mean()
        self.outer_rate = self.outer_rate + count * rest.rate.double().mean()

    def per_datum(self) -> dict[str, Tensor]:
        """Distortion, rate and bound of each datum, given the globals."""
        likelihood, rate = self.likelihood / self.count, self.rate / self.count
        unknown = torch.full_like(rate, math.nan)
        numbers = {"distortion": -likelihood, "rate": rate}
        numbers |= {"objective": likelihood - rate, "elbo": likelihood - rate}
        return numbers | {"log_likelihood": likelihood, "ess": unknown, "khat": unknown}

    def totals(self) -> dict[str, Any]:
        """The objective of all data, and the rate of the globals."""
        outer = self.outer_likelihood - self.outer_rate
        whole = ((self.likelihood - self.rate).sum() + outer) / self.count
        return {"total_objective": whole, "global_rate": self.outer_rate / self.count}


def why_unknown(khats: np.ndarray) -> str:
    """Why the error of log p(x) is NaN, from k-hat of the local weights; empty if it is not."""
    few, many = np.isnan(khats).any(), (khats > TRUSTED).mean()
    if few or not many:
        return "k-hat of the local latents cannot be told from so few draws" if few else ""
    return f"k-hat of the local latents is above {TRUSTED} for {percent(many)} of the data"


def percent(share: float) -> str:
    """A share that is not zero, in whole per cents."""
    return f"{100 * share:.0f} %" if share >= 0.005 else "less than 1 %"


def _evidence(log_weight: Tensor) -> dict[str, Any]:
    """Log p(x) of all data from weights of draws of the globals, and whether to trust it."""
    found = estimates(log_weight[:, None])
    return {
        "log_evidence": found["log_likelihood"],
        "log_evidence_se": found["log_likelihood_se"],
        "evidence_ess": found["ess"],
        "evidence_khat": found["khat"],
    }
