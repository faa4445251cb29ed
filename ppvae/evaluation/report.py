"""The result of `evaluate` as a table, and in words."""

import math

import numpy as np
import pandas as pd
import xarray as xr
from scipy import special

from ppvae._checks import TROUBLE, check_number, expect
from ppvae.evaluation.directions import WORTH
from ppvae.evaluation.hierarchy import percent
from ppvae.evaluation.measures import ACTIVE
from ppvae.objectives.weights import TRUSTED


def summary(found: xr.Dataset) -> pd.DataFrame:
    """A table of totals: the mean over the data and its standard error.

    Where some latents are global, `elbo` and `log_evidence` are those of all the data, with Monte
    Carlo errors; `rate` and `distortion` are means over the data, given the globals.

    The standard error is over the data, and holds the Monte Carlo error of each; that of `active`,
    the number of active latents, comes from the error of each latent's variance. `khat > 0.7` is
    the share of the data for which importance sampling cannot be trusted. For a point guide, which
    has no density, `objective` is a penalised log-likelihood and stands alone.

    Args:
        found: a result of `evaluate`.

    Returns:
        One row per measure; columns `mean`, `se` and `unit`.

    Raises:
        ValueError: `found` is no result of `evaluate`.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, evaluate, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.noise_only)
        >>> table = summary(evaluate(model, guide, torch.randn(20, 5)))
        >>> float(table.loc["rate", "mean"]), table.loc["rate", "unit"]
        (0.0, 'nats per datum')
    """
    _check(found)
    rows: dict[str, tuple[float, float, str]] = {}
    if "total_objective" in found:
        rows = _rows_of_all(found)
        return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "se", "unit"])
    names = ["elbo", "rate", "distortion", "log_likelihood"]
    for name in names if found.bound else ["objective", "rate", "distortion"]:
        rows[name] = (*_mean(found[name]), found[name].attrs["unit"])
    if found.bound:
        for name in ("mutual_information", "aggregate_kl"):
            rows[name] = (*_total(found, name), found[name].attrs["unit"])
        rows["ess"] = (*_mean(found.ess), f"of {found.num_samples} {found.ess.attrs['unit']}")
        above = (found.khat > TRUSTED).where(found.khat.notnull())
        rows[f"khat > {TRUSTED}"] = (*_mean(above), "share of the data")
    rows["active"] = (*_active(found), f"of {found.sizes['latent']} latents")
    if math.isfinite(found.attrs.get("cap", math.inf)):
        rows["cap"] = (found.cap, 0.0, "nats per latent")
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "se", "unit"])


def reading(found: xr.Dataset, *, beta: float = 1.0) -> str:
    """What the numbers of `evaluate` mean, in sentences, one per line.

    Says what the last `fit` said of itself, how tight the bound is, what passes through the
    latents, which of them collapsed and the likely cause, and whether the guide can be trusted;
    that the objective of a point is none; that values are copied without noise; and, if something
    is wrong, where to read what to do.

    Args:
        found: a result of `evaluate`.
        beta: what the rate was weighted with in training.

    Raises:
        ValueError: `found` is no result of `evaluate`, or `beta` no number of at least 0.

    Example:
        >>> import torch
        >>> from ppvae import VAE, FamilyGuide, evaluate, families, likelihoods
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(1.0))
        >>> guide = FamilyGuide(model, families.noise_only)
        >>> lines = reading(evaluate(model, guide, torch.randn(20, 5))).splitlines()
        >>> lines[1]
        'The latents tell 0.00 +- 0.00 nats of each datum.'
        >>> lines[-1][:37]
        '2 of 2 latents collapsed (0, 1): the '
    """
    _check(found)
    beta = check_number("beta", beta)
    if "total_objective" in found:
        return "\n".join([*_training(found), *_of_all(found)])
    lines = [*_training(found), *(_bound(found) if found.bound else _point(found))]
    lines += _copied(found)
    lines.append(_collapse(found, beta))
    collapsed = not found.active.all() and found.attrs.get("channels") != "none"
    if (
        collapsed
        or "copied" in found.attrs
        or found.attrs.get("converged") == 0
        or found.bound
        and (found.khat > TRUSTED).any()
    ):
        lines.append(f"What to do: {TROUBLE}.")
    return "\n".join(lines)


def _rows_of_all(found: xr.Dataset) -> dict[str, tuple[float, float, str]]:
    """The rows for a model with global latents."""
    rows: dict[str, tuple[float, float, str]] = {}
    if found.bound:
        rows["elbo"] = (*_total(found, "total_elbo"), "nats")
        rows["log_evidence"] = (*_total(found, "log_evidence"), "nats")
    else:
        rows["objective"] = (float(found.total_objective), math.nan, "nats")
    apart = bool(found.global_rate.notnull())
    if apart:
        rows["global_rate"] = (float(found.global_rate), math.nan, "nats")
    if "distortion" in found:
        for name in ("rate", "distortion") if apart else ("distortion",):
            rows[name] = (*_mean(found[name]), found[name].attrs["unit"])
    if found.bound:
        rows["evidence_ess"] = (float(found.evidence_ess), math.nan, "draws of the globals")
        rows["evidence_khat"] = (float(found.evidence_khat), math.nan, "")
        if found.get("khat", xr.DataArray([])).notnull().any():
            rows[f"khat > {TRUSTED}"] = (*_mean(found.khat > TRUSTED), "share of the data")
    return rows


def _of_all(found: xr.Dataset) -> list[str]:
    """The sentences on a model some of whose latents belong to all the data."""
    if not found.bound:
        return [
            f"The objective of all the data, {float(found.total_objective):.2f}, is a penalised "
            "log-likelihood: some latent is a point, so it is no bound on log p(x)."
        ]
    (elbo, error), (log_p, log_p_se) = _total(found, "total_elbo"), _total(found, "log_evidence")
    khat, unknown = float(found.evidence_khat), found.log_evidence_se.attrs.get("reason", "")
    told = f"{log_p:.2f} or more" if unknown else f"{log_p:.2f} +- {log_p_se:.2f}"
    about = "at least" if unknown else "about"
    lines = [
        f"The ELBO of all the data is {elbo:.2f} +- {error:.2f} nats; log p(x) is {told} by "
        f"importance sampling, so the gap is {about} {log_p - elbo:.2f}.",
    ]
    if unknown:
        lines.append(f"How far log p(x) is off is not known: {unknown}.")
    if found.global_rate.isnull():
        lines.append("The guide draws globals and locals together, so their rates are not told.")
    else:
        rate = float(found.global_rate)
        lines.append(f"The globals take {rate:.2f} nats of all the data.")
    if found.get("rate", xr.DataArray([0.0])).mean() > 0:
        lines.append(f"The local latents take {float(found.rate.mean()):.2f} nats of each datum.")
    if math.isnan(khat):
        lines.append("k-hat of the globals cannot be told from so few draws.")
    elif khat > TRUSTED:
        lines.append(
            f"k-hat of the globals is {khat:.2f}, above {TRUSTED}: the guide misses parts of their "
            "posterior, and log p(x) by importance sampling cannot be trusted; a wider family, or "
            f"`annealed_importance`, gives a better estimate. What to do: {TROUBLE}."
        )
    else:
        lines.append(f"k-hat of the globals is {khat:.2f}: their weights are well behaved.")
    share = float((found.get("khat", xr.DataArray([0.0])) > TRUSTED).mean())
    if share > 0:
        lines.append(
            f"k-hat of the local latents is above {TRUSTED} for {percent(share)} of the data: "
            "there the guide misses parts of their posterior, and log p(x) comes out too low. "
            "A joint family, `refine` or more draws bring it nearer."
        )
    return lines


def _check(found: xr.Dataset) -> None:
    known = isinstance(found, xr.Dataset) and "bound" in found.attrs
    known = known and ("distortion" in found or "total_objective" in found)
    expect(known, "found", "a result of evaluate", type(found).__name__)


def _mean(values: xr.DataArray) -> tuple[float, float]:
    """The mean over the data and its standard error."""
    error = values.values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.values.mean()), float(error)


def _total(found: xr.Dataset, name: str) -> tuple[float, float]:
    """A number of all the data and its standard error."""
    return float(found[name]), float(found[f"{name}_se"])


def _active(found: xr.Dataset) -> tuple[float, float]:
    """The number of active latents, and its error, from the normal error of each variance."""
    variance, error = found.mean_variance.values, found.mean_variance_se.values
    with np.errstate(divide="ignore", invalid="ignore"):
        away = np.where(error > 0, np.abs(variance - ACTIVE) / error, math.inf)
    chance = special.ndtr(-away)  # that the latent is on the other side
    return float(found.active.sum()), float(np.sqrt((chance * (1 - chance)).sum()))


def _training(found: xr.Dataset) -> list[str]:
    """The sentence on the fit, if there is one to tell of."""
    if "verdict" not in found.attrs:
        return []
    if found.attrs.get("converged") == 0:
        first = "Train longer before you judge by what follows, or take another family"
        return [f"{first}: {found.verdict}."]
    return [f"The fit says: {found.verdict}."]


def _point(found: xr.Dataset) -> list[str]:
    """The sentences on a guide that is a point."""
    return [
        f"The objective, {float(found.objective.mean()):.2f}, is a penalised log-likelihood: a "
        "point has no density, so it is no bound on log p(x) and must not be compared with an "
        "ELBO.",
        "Its rate is the penalty -log p(z), no divergence.",
    ]


def _bound(found: xr.Dataset) -> list[str]:
    """The sentences on a guide that has a density."""
    (elbo, error), (rate, _) = _mean(found.elbo), _mean(found.rate)
    log_p, size = float(found.log_likelihood.mean()), found.sizes["datum"]
    lines = [
        f"The ELBO is {elbo:.2f} +- {error:.2f} nats per datum, at a rate of {rate:.2f}; log p(x) "
        f"is at least {log_p:.2f}, so the gap is {log_p - elbo:.2f} or more."
    ]
    carried, carried_se = _total(found, "mutual_information")
    if carried > math.log(size) - max(0.1, 2 * carried_se):
        lines.append(
            f"The latents tell all these {size} data apart: I(x; z) is at its limit here, log N = "
            f"{math.log(size):.2f}, and more data would show more."
        )
    elif math.isnan(carried):
        lines.append(
            "There is no I(x; z): some data have latents that others have not, or a rate is "
            "infinite."
        )
    else:
        carried = round(carried, 2) + 0.0  # no negative zero
        lines.append(f"The latents tell {carried:.2f} +- {carried_se:.2f} nats of each datum.")
    apart, apart_se = _total(found, "aggregate_kl")
    if apart > max(1.0, 2 * apart_se):
        lines.append(
            f"The aggregate posterior is {apart:.2f} +- {apart_se:.2f} nats from the prior: "
            "some draws from the prior decode to what is unlike the data."
        )
    cap = found.attrs.get("cap", math.inf)
    if 0 < cap < math.inf:
        lines.append(
            f"The family can carry no more than {cap:.4f} nats per latent, "
            f"{cap * found.sizes['latent']:.2f} in all."
        )
    return [*lines, _trust(found.khat.dropna("datum").values)]


def _trust(khats: np.ndarray) -> str:
    """Whether the importance weights can be trusted."""
    if not len(khats):
        return "k-hat cannot be told from so few draws."
    share = float((khats > TRUSTED).mean())
    if share == 0:
        return f"k-hat is below {TRUSTED} for all data: the importance weights are well behaved."
    return (
        f"k-hat is above {TRUSTED} for {percent(share)} of the data: there the guide misses "
        "parts of the posterior, and neither it nor log p(x) by importance sampling can be "
        "trusted; `annealed_importance` gives a better estimate, a wider family a better guide."
    )


def _copied(found: xr.Dataset) -> list[str]:
    """The sentence on values that have next to no noise, if there are any."""
    copied = found.attrs.get("copied", 0)
    if not copied:
        return []
    return [
        f"The decoder's noise is a thousandth of the spread, or less, for {copied} of the values "
        "of a datum: these are copied, and the smaller a learned scale, the higher the ELBO, which "
        "then says nothing of the others. Fix the scale, or leave these columns out."
    ]


def _collapse(found: xr.Dataset, beta: float) -> str:
    """Which latents collapsed, and why."""
    active = int(found.active.sum())
    names = [str(name) for name in found.latent.values[~found.active.values]]
    if not names:
        return f"All {active} latents are active."
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    collapsed = f"{len(names)} of {len(found.latent)} latents collapsed ({listed}): "
    return collapsed + _cause(found, beta, active)


def _cause(found: xr.Dataset, beta: float, active: int) -> str:
    """Why latents collapsed, as far as the figures tell."""
    if found.attrs.get("channels") == "none":
        return "the family has no channel, so nothing can pass."
    directions = found.attrs.get("directions")
    at_noise = f"at the decoder's noise variance of {found.attrs.get('noise_variance', 0):.3g}, "
    if directions is not None and active >= directions:
        where = f"only {directions}" if directions else "none"
        return (
            f"{at_noise}{where} of the principal directions of the data are worth {WORTH} nats or "
            "more to a linear decoder. Take fewer latents, or a smaller noise."
        )
    if beta > 1:
        return (
            f"beta = {beta:g} makes a latent pay {beta:g} nats of fit for every nat it carries, "
            "which these do not earn."
        )
    stuck = "training stuck at the prior (see objectives.warm_up and free_bits), or a beta above 1"
    if directions is not None:
        return (
            f"{at_noise}{directions} principal directions of the data are worth a latent, so there "
            f"is use for more; the likely cause is {stuck}."
        )
    if active == 0:
        return f"the likely cause is {stuck}, or a decoder that models the data without latents."
    return "the data may have no use for more than the others, or the cause is " + stuck + "."
