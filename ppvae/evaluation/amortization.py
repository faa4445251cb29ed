"""Why the ELBO is below log p(x): what the family cannot represent, and what the encoder misses."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from ppvae._checks import as_doubles, check_count, check_label, check_real, expect
from ppvae._process import exclusive
from ppvae.evaluation.search import ShiftedGuide, best_shifts, new_seed, shifted_guide
from ppvae.guides.family_guide import FamilyGuide
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.objectives.weights import estimates
from ppvae.programs.runs import Runs, opened

GROUPS = 8  # of draws, moment-matched each: the error is read off their spread


@exclusive
def gaps(  # noqa: D417
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
    then L-BFGS, which is enough where the draws are exact, see below): over all arguments of the
    family that are channels, and, for a flow or a head of the user's own, over the features that go
    in. Fixed and shared arguments, the networks of a flow and the model stay what they are. The
    search ends short of the optimum, if anywhere, so `best_elbo` is rather too low. The draws of
    the search are not those of the measure, which would flatter it.

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

    Where some latents are global, all is given one draw of them (of the seed): log p(x | globals)
    of each datum, and the members of the family for its own latents. What the guide of the globals
    is worth, `evaluate` tells by its log evidence.

    Args:
        model: a Pyro model with latents in the data plate.
        guide: a `FamilyGuide` with an encoder, or of `noise_only`, of which the only member is the
            prior, so that its amortization is zero.
        *args: their arguments: data of which the first dimension is that of the data plate.
        num_samples: draws per datum of each measure, at least 16; rounded up to a multiple of 8.
        num_steps: steps of the search, each with about 16 draws, at least 1; where the last of them
            still bring something, up to two thirds as many follow.
        log_likelihood: log p(x) of shape `(N,)`, exact or better estimated; taken as it is.
        batch_size, vectorized, seed, plate, kwargs, progress: as for `evaluate`.

    Returns:
        The gaps and their parts.

    Raises:
        ValueError: the guide cannot be searched (it is no `FamilyGuide`, has no encoder, is a
            point, which has no density, or its draws are not reparametrized); the data are not
            finite; an argument is out of its range; or no latent is in the data plate.

    Cremer, Li, Duvenaud, Inference suboptimality in variational autoencoders, 2018.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.full_rank, encoder=mlp(5, 16))
        >>> result = gaps(model, guide, torch.randn(20, 5))
        >>> bool(result.approximation.mean() < 1e-3 < result.amortization.mean())
        True
    """
    num_steps = check_count("num_steps", num_steps)
    _check_guide(guide)
    draws = in_groups(num_samples)
    shown, label = check_label("progress", progress, "gaps")
    measured = []
    with opened(model, guide, args, kwargs, batch_size, vectorized, seed, plate) as runs:
        runs = check_search(runs, guide, plate)
        exact = None if log_likelihood is None else _as_array(log_likelihood, runs.plate.size)
        bar = tqdm(total=len(runs.batches) * num_steps, desc=label, disable=not shown, delay=3.0)
        for shifted, best in best_members(runs, guide, num_steps, bar):
            values = elbos(shifted, best, draws)
            if exact is None:  # from independent draws
                values |= estimates(shifted.log_weight(best, draws, new_seed()))
            measured.append(values)
    return _dataset(as_arrays(measured), exact, {"num_samples": draws, "num_steps": num_steps})


def in_groups(num_samples: Any) -> int:
    """The number of draws of a measure, rounded up to whole groups.

    Raises:
        ValueError: they are too few for an error.
    """
    return math.ceil(check_count("num_samples", num_samples, 2 * GROUPS) / GROUPS) * GROUPS


def best_members(
    runs: Runs, guide: Any, num_steps: int, bar: Any
) -> Iterator[tuple[ShiftedGuide, Tensor]]:
    """Searches the best member of the family for each datum, one minibatch after the other.

    Args:
        runs: the pair, from `check_search`.
        guide: the guide.
        num_steps: steps of the search.
        bar: a progress bar of so many steps for each minibatch, which is closed at the end.
    """
    with bar:
        for number, batch in enumerate(runs.batches, 1):
            shifted = shifted_guide(runs, guide.heads, batch)
            yield shifted, best_shifts(shifted, shifted.start, num_steps, bar.update).point
            bar.update(number * num_steps - bar.n)


def as_arrays(measured: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """What was measured of each minibatch, as arrays of all data."""
    rows = [{k: v.double().cpu().numpy() for k, v in values.items()} for values in measured]
    return {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}


def check_search(runs: Runs, guide: Any, plate: str | None) -> Runs:
    """The pair given one draw of its globals, the guide of which can be searched for each datum.

    Raises:
        ValueError: it cannot.
    """
    _check_guide(guide)
    runs = runs.given_globals()
    _check_terms(terms(*runs.traces, plate), guide)
    return runs


def _check_guide(guide: Any) -> None:
    """Raises a ValueError unless the guide answers for each datum by an encoder."""
    wanted = "a FamilyGuide with an encoder"
    expect(isinstance(guide, FamilyGuide), "guide", wanted, type(guide).__name__)
    amortized = guide.encoder is not None or not guide.family.channels
    expect(amortized, "guide", wanted, "one of global latents, whose channels are parameters")


def _check_terms(sites: Terms, guide: FamilyGuide) -> None:
    """Raises a ValueError unless each datum has a gap, along the plate of the encoder."""
    check_along(sites, guide)
    point = f"{guide.family.name}: a point's objective is no bound on log p(x), so it has no gap"
    expect(sites.log_guide, "guide", "a family with a density", point)


def check_along(sites: Terms, guide: FamilyGuide) -> None:
    """Raises a ValueError unless each datum has its own latents, along the plate of the encoder."""
    sites.check_local()
    encoded, here = guide._plates.data, sites.plate.name
    along = f"{encoded!r}, along which the batch of the encoder runs"
    expect(encoded in (None, here), "plate", along, repr(here))


def _as_array(log_likelihood: Any, size: int) -> np.ndarray:
    """The user's log p(x) as an array."""
    values = as_doubles(check_real("log_likelihood", log_likelihood))
    bad = int((~np.isfinite(values)).sum())
    came = f"shape {values.shape} with {bad} that are not finite"
    fits = values.shape == (size,) and not bad
    expect(fits, "log_likelihood", f"{size} finite numbers, one per datum", came)
    return values


def elbos(shifted: ShiftedGuide, best: Tensor, draws: int) -> dict[str, Tensor]:
    """The two ELBOs of each datum, from the same draws, with their errors."""
    seeds = seeds_of_groups()
    groups = {"elbo": elbo_groups(shifted, shifted.start, draws, seeds)}
    groups["best_elbo"] = elbo_groups(shifted, best, draws, seeds)
    groups["amortization"] = groups["best_elbo"] - groups["elbo"]
    values = {name: group.mean(0) for name, group in groups.items()}
    return values | {f"{name}_se": error_of(group) for name, group in groups.items()}


def seeds_of_groups() -> list[int]:
    """A seed for each group of draws of a measure; equal seeds pair the draws of two measures."""
    return [new_seed() for _ in range(GROUPS)]


def elbo_groups(shifted: ShiftedGuide, shifts: Tensor, draws: int, seeds: Sequence[int]) -> Tensor:
    """The ELBO of each datum by each group of draws, shape `(groups, data)`."""
    count = draws // len(seeds)
    return -torch.stack([shifted.loss(shifts, count, seed) for seed in seeds])


def error_of(groups: Tensor) -> Tensor:
    """The standard error of the mean over groups of draws, from their spread."""
    return groups.std(0) / math.sqrt(len(groups))


def _dataset(arrays: dict[str, Any], exact: np.ndarray | None, attrs: dict[str, Any]) -> xr.Dataset:
    """The result, from the two ELBOs and log p(x) with their errors."""
    arrays |= {} if exact is None else {"log_likelihood": exact}
    error = arrays.pop("log_likelihood_se", 0.0)
    for gap, elbo in (("approximation", "best_elbo"), ("gap", "elbo")):
        arrays[gap] = arrays["log_likelihood"] - arrays[elbo]
        arrays[f"{gap}_se"] = np.hypot(error, arrays.pop(f"{elbo}_se"))
    return xr.Dataset({name: ("datum", value) for name, value in arrays.items()}, attrs=attrs)
