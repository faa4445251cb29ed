"""Why the ELBO falls short of log p(x): what the family cannot say, and what the encoder misses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from ppvae._checks import check_count, expect
from ppvae.evaluation.search import Offsets, adam, quasi_newton
from ppvae.families.prior import Prior
from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.objectives.weights import (
    effective_sample_size,
    khat,
    log_mean_weight,
    log_mean_weight_se,
)
from ppvae.programs.runs import opened

_GROUPS = 8  # of draws, moment-matched each: the error is read off their spread


_DRAWS = 16  # in each step of the search


_SINGLE_DRAWS = 8  # the same where they are made one by one


_MOST = 64  # draws in a step, where a datum has many coordinates to match


_CHOICE = 64  # draws that choose between two answers of the search


def gaps(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_samples: int = 512,
    num_steps: int = 300,
    batch_size: int = 256,
    log_likelihood: Any = None,
    vectorized: bool | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool | str = True,
) -> xr.Dataset:
    r"""Splits log p(x) - ELBO of an encoder into an approximation and an amortization gap.

    Per datum (dim `datum`), in nats: `elbo` of the encoder's q; `best_elbo` of the best member of
    the family for that datum; `log_likelihood` log p(x); `approximation` = log_likelihood -
    best_elbo, what no member of the family can represent; `amortization` = best_elbo - elbo, what
    the encoder fails to find; `gap`, their sum.

    The best member is found by a search for each datum that starts at the encoder's answer (Adam,
    then L-BFGS): over all arguments of the family that are channels, and, for a flow or a head of
    the user's own, over the features that go in. Fixed and shared arguments, the networks of a flow
    and the model stay what they are. The search ends short of the optimum, if anywhere, so
    `best_elbo` is rather too low. The draws of the search are not those of the measure, which would
    flatter it.

    Errors: `approximation_se`, `amortization_se` and `gap_se` are standard errors over the draws,
    per datum, from the spread of 8 groups of draws; they leave out what the search missed. The
    standard normal numbers of a group are moment-matched (mean zero and identity covariance for
    each datum, if it has at most num_samples / 8 - 1 coordinates). So the expectation of a
    quadratic is exact: Gaussian families on linear-Gaussian models come out to rounding, with
    errors of zero. Elsewhere a bias of order 8 / num_samples stays, well below the error of one
    datum. Both ELBOs use the same random numbers, so their difference is sharper than either.

    By default `log_likelihood` is the log of the mean of `num_samples` importance weights, with
    independent draws from the best member: a lower bound in expectation, with `ess`, the effective
    number of draws, and `khat` as in `evaluate`. Where `ess` is small or `khat` above 0.7 the
    approximation gap is understated: give a better estimate, such as that of `annealed_importance`.

    Args:
        model: a Pyro model in which all sites are local.
        guide: a `FamilyGuide` with an encoder, or of `noise_only`, of which the only member is the
            prior, so that its amortization is zero.
        *args: their arguments: data of which the first dimension is that of the data plate.
        num_samples: draws per datum of each measure, at least 16; rounded up to a multiple of 8.
        num_steps: steps of the search, each with about 16 draws; at least 1.
        batch_size: data per run.
        log_likelihood: log p(x) of shape `(N,)`, exact or better estimated; taken as it is.
        vectorized: run many draws at once, which the model must be written for (all operations
            leave leading dims alone); by default only where the model says so, as `VAE` does.
        seed: seeds the draws, without a trace outside; None uses the caller's stream.
        plate: name of the data plate; by default `data`, or else the outermost one.
        kwargs: keyword arguments of model and guide.
        progress: show a progress bar when it takes long; a string is its label.

    Returns:
        The gaps and their parts.

    Raises:
        ValueError: the guide is none that this can search (no `FamilyGuide`, no encoder, a point,
            which has no density, or draws that are not reparametrized); the data are not finite; an
            argument is out of its range; or some site is outside the data plate.

    Cremer, Li, Duvenaud, Inference suboptimality in variational autoencoders, 2018.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.full_rank, encoder=mlp(5, 16))
        >>> found = gaps(model, guide, torch.randn(20, 5))
        >>> bool(found.approximation.mean() < 1e-3 < found.amortization.mean())
        True
    """
    num_samples = check_count("num_samples", num_samples, 2 * _GROUPS)
    num_steps = check_count("num_steps", num_steps)
    _check_guide(guide)
    draws = math.ceil(num_samples / _GROUPS) * _GROUPS
    label = progress if isinstance(progress, str) else "gaps"
    options: dict[str, Any] = {"kwargs": kwargs, "batch_size": batch_size, "vectorized": vectorized}
    measures = []
    with opened(model, guide, args, seed=seed, plate=plate, **options) as runs:
        _check_terms(terms(*runs.traces, plate), guide)
        exact = None if log_likelihood is None else _checked(log_likelihood, runs.plate.size)
        total = len(runs.batches) * num_steps
        with tqdm(total=total, desc=label, disable=not progress, delay=3.0) as bar:
            for number, batch in enumerate(runs.batches, 1):
                offsets = Offsets(runs, guide.heads, batch, plate)
                with offsets.attached():
                    best = _search(offsets, num_steps, bar.update)
                    measures.append(_measure(offsets, best, draws, sample=exact is None))
                bar.update(number * num_steps - bar.n)
    arrays = {k: np.concatenate([each[k] for each in measures]) for k in measures[0]}
    return _dataset(arrays, exact, {"num_samples": draws, "num_steps": num_steps})


def _check_guide(guide: Any) -> None:
    wanted = "guide: expected a FamilyGuide with an encoder"
    if not isinstance(guide, FamilyGuide):
        raise ValueError(f"{wanted}, got {type(guide).__name__}")
    if guide.encoder is None and not isinstance(guide.family, Prior):
        raise ValueError(f"{wanted}, got one of global latents, whose channels are parameters")


def _check_terms(parts: Terms, guide: Any) -> None:
    """Raises a ValueError unless the gaps can be measured."""
    parts.check_local()
    if not parts.log_guide:
        raise ValueError(
            f"guide: expected a family with a density, got {guide.family.name}: the objective of a "
            "point is no bound on log p(x), so there is no gap"
        )
    encoded, here = guide._plates.data, parts.plate.name
    along = f"{encoded!r}, along which the batch of the encoder runs"
    expect(encoded in (None, here), "plate", along, repr(here))


def _checked(log_likelihood: Any, size: int) -> np.ndarray:
    if isinstance(log_likelihood, Tensor):
        log_likelihood = log_likelihood.detach().cpu()
    values = np.asarray(log_likelihood, dtype=float)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise ValueError(
            f"log_likelihood: expected {size} finite numbers, one per datum, got shape "
            f"{values.shape} with {int((~np.isfinite(values)).sum())} that are not finite"
        )
    return values


def _new_seed() -> int:
    return int(torch.randint(2**62, ()))


def _search(offsets: Offsets, steps: int, tick: Callable[[], Any]) -> Tensor:
    """The offsets of the best member for each datum.

    First Adam on fresh draws; then L-BFGS on a few fixed ones, which ends exactly where the draws
    are exact, as on linear-Gaussian models. Elsewhere it may fit those draws, and then the answer
    of Adam is kept; with more unknowns than random numbers it would, so it is left out.
    """
    start = offsets.zero
    if not start.shape[1]:
        return start
    draws = max(_DRAWS if offsets.vectorized else _SINGLE_DRAWS, offsets.coordinates + 2)
    draws = draws if draws <= _MOST else 2 * _DRAWS

    def slope(place: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        tick()
        return offsets.slope(place, draws, seed)

    share = steps // 3 if start.shape[1] <= draws * offsets.coordinates else 0
    rates = offsets.step_sizes()
    found = adam(lambda place: slope(place, _new_seed()), start, steps - share, rates)
    found = _better(offsets, start, found)
    if share:
        seed = _new_seed()
        last = quasi_newton(lambda place: slope(place, seed), found, share)
        found = _better(offsets, found, last)
    return found


def _better(offsets: Offsets, one: Tensor, other: Tensor) -> Tensor:
    """For each datum the better of two places, on draws of their own."""
    seed = _new_seed()
    losses = [offsets.loss(place, _CHOICE, seed) for place in (one, other)]
    return torch.where((losses[1] < losses[0])[:, None], other, one)


def _measure(offsets: Offsets, best: Tensor, draws: int, *, sample: bool) -> dict[str, np.ndarray]:
    """The two ELBOs of each datum from the same draws, and log p(x), with their errors."""
    groups = []
    for _ in range(_GROUPS):
        seed = _new_seed()
        elbo = best_elbo = -offsets.loss(offsets.zero, draws // _GROUPS, seed)
        if best.shape[1]:
            best_elbo = -offsets.loss(best, draws // _GROUPS, seed)
        groups.append(torch.stack([elbo, best_elbo, best_elbo - elbo]))
    values = torch.stack(groups)
    means, errors = values.mean(0), values.std(0) / math.sqrt(_GROUPS)
    found = {"elbo": means[0], "best_elbo": means[1]}
    found |= {"elbo_se": errors[0], "best_elbo_se": errors[1], "amortization_se": errors[2]}
    seed = _new_seed()
    if sample:
        offsets.place(best)
        found |= _importance_sampling(offsets, draws, seed)
    return {name: value.double().cpu().numpy() for name, value in found.items()}


def _importance_sampling(offsets: Offsets, draws: int, seed: int) -> dict[str, Tensor]:
    """Log p(x) from below, from independent draws at the place where the offsets are."""
    weights = []
    for parts, count in offsets.terms(draws, seed):
        weights.append(parts.log_weight.expand(count, offsets.plate.size))
    log_w = torch.cat(weights).double()
    return {
        "log_likelihood": log_mean_weight(log_w),
        "log_likelihood_se": log_mean_weight_se(log_w),
        "ess": effective_sample_size(log_w),
        "khat": khat(log_w),
    }


def _dataset(arrays: dict[str, Any], exact: np.ndarray | None, attrs: dict[str, Any]) -> xr.Dataset:
    elbo, best = arrays["elbo"], arrays["best_elbo"]
    log_p = exact if exact is not None else arrays["log_likelihood"]
    error = arrays.get("log_likelihood_se", np.zeros(len(log_p)))
    columns = {
        "elbo": elbo,
        "best_elbo": best,
        "log_likelihood": log_p,
        "approximation": log_p - best,
        "amortization": best - elbo,
        "gap": log_p - elbo,
        "approximation_se": np.hypot(error, arrays["best_elbo_se"]),
        "amortization_se": arrays["amortization_se"],
        "gap_se": np.hypot(error, arrays["elbo_se"]),
    }
    if exact is None:
        columns |= {"ess": arrays["ess"], "khat": arrays["khat"]}
    return xr.Dataset({name: ("datum", value) for name, value in columns.items()}, attrs=attrs)
