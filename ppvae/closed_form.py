r"""The exact optimum of every family where one exists: linear decoders and linear regression.

All values are in nats; those of the two decoders per datum. With `P` the posterior precision and
`m` the posterior mean, the gap of `q = N(mean, S)` to the log-likelihood is
`(tr(P S) - Z + (mean - m)' P (mean - m) - log det P - log det S) / 2`: quadratic in the mean, so
every family with a free mean takes `m`, and what is left chooses `S`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae import families

__all__ = ["LearnedDecoder", "Optimum", "fixed_decoder", "learned_decoder", "regression"]


class Optimum(NamedTuple):
    """The best member of a family for a Gaussian posterior; values in nats.

    For a decoder they have shape `(batch,)`, for a regression they are scalars in total. For a
    point the objective is the log joint density, no bound: it can lie above the log-likelihood.

    Attributes:
        objective: ELBO, or log joint density of a point.
        rate: KL(q || p), or -log p(z) of a point.
        distortion: -E log p(x | z).
        log_likelihood: log p(x), the log evidence.
        mean: mean of q, shape `(*, latent)`.
        covariance: covariance of q, `(latent, latent)`; zero for a point.
    """

    objective: Tensor
    rate: Tensor
    distortion: Tensor
    log_likelihood: Tensor
    mean: Tensor
    covariance: Tensor

    @property
    def gap(self) -> Tensor:
        """Log p(x) less the objective."""
        return self.log_likelihood - self.objective


class LearnedDecoder(NamedTuple):
    """The best decoder and guide together, for data of a given covariance; nats per datum.

    Attributes:
        objective: mean ELBO; for a point its supremum, which no decoder attains.
        rate: mean KL(q || p); nan for a point.
        noise: standard deviation of the likelihood.
        active: number of latents in use; a direction with an eigenvalue below the noise variance
            collapses in every family.
        attained: whether there is an optimum.
    """

    objective: float
    rate: float
    noise: float
    active: int
    attained: bool

    @property
    def distortion(self) -> float:
        """Mean of -log p(x | z) under q."""
        return -self.objective - self.rate


def fixed_decoder(x: Tensor, weight: Tensor, bias: Tensor, noise: float, family: Any) -> Optimum:
    r"""The optimum for `z ~ N(0, I)`, `x | z ~ N(W z + b, noise^2 I)` with a fixed decoder.

    Args:
        x: data, shape `(batch, features)`.
        weight: W, shape `(features, latent)`.
        bias: b, shape `(features,)`.
        noise: standard deviation, positive.
        family: of the ladder: `deterministic`, `zero`, `noise_only`, `mean_only`, `shared_scale`,
            `mean_scale` or `full_rank`.

    Raises:
        ValueError: the family has no closed form here, or the noise is not positive.
    """
    if not noise > 0:
        raise ValueError(f"noise: expected a positive number, got {noise}")
    one = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return _optimum(x - bias, weight, noise, one, family)


def regression(X: Tensor, y: Tensor, noise: float, prior_scale: float, family: Any) -> Optimum:
    r"""The optimum for `w ~ N(0, t^2 I)`, `y | w ~ N(X w, noise^2 I)`, in nats in total.

    Args:
        X: shape `(rows, columns)`.
        y: shape `(rows,)`.
        noise: standard deviation of the noise, positive.
        prior_scale: t, positive.
        family: see `fixed_decoder`; `deterministic` is ridge with penalty `noise^2 / t^2`.

    Raises:
        ValueError: the family has no closed form here, or a scale is not positive.
    """
    if not (noise > 0 and prior_scale > 0):
        raise ValueError(
            f"noise, prior_scale: expected positive numbers, got {noise} and {prior_scale}"
        )
    precision = torch.eye(X.shape[1], dtype=X.dtype, device=X.device) / prior_scale**2
    found = _optimum(y[None], X, noise, precision, family)
    names = [name for name in Optimum._fields if name != "covariance"]
    return found._replace(**{name: getattr(found, name)[0] for name in names})


def _optimum(x: Tensor, W: Tensor, noise: float, prior: Tensor, family: Any) -> Optimum:
    """The optimum for data `x` less their bias and a prior of mean zero and this precision."""
    variance = noise**2
    P = prior + W.T @ W / variance
    mean = torch.linalg.solve(P, W.T @ x.T / variance).T
    size, features = len(P), x.shape[-1]
    log_2pi = math.log(2 * math.pi)
    fit = (x.square().sum(-1) / variance - ((mean @ P) * mean).sum(-1)) / 2
    halves = (P.logdet() - prior.logdet()) / 2
    log_likelihood = -fit - features / 2 * (log_2pi + math.log(variance)) - halves
    covariances = {
        families.deterministic: torch.zeros_like(P),
        families.zero: torch.zeros_like(P),
        families.noise_only: prior.inverse(),
        families.mean_only: torch.eye(size, dtype=P.dtype, device=P.device),
        families.shared_scale: torch.eye(size, dtype=P.dtype, device=P.device) * size / P.trace(),
        families.mean_scale: torch.diag(1 / P.diagonal()),
        families.full_rank: P.inverse(),
    }
    if family not in covariances:
        name = getattr(family, "name", family)
        raise ValueError(f"family: expected one with a closed form here, got {name}")
    S = covariances[family]
    if family in (families.zero, families.noise_only):
        mean = torch.zeros_like(mean)
    away = x - mean @ W.T
    spread = (W @ S * W).sum()
    distortion = (away.square().sum(-1) + spread) / (2 * variance)
    distortion = distortion + features / 2 * (log_2pi + math.log(variance))
    rate = ((mean @ prior) * mean).sum(-1) / 2 - prior.logdet() / 2
    if family in (families.deterministic, families.zero):
        rate = rate + size / 2 * log_2pi
    else:
        rate = rate + ((prior @ S).trace() - size - S.logdet()) / 2
    return Optimum(-rate - distortion, rate, distortion, log_likelihood, mean, S)


def learned_decoder(x: Tensor, latent: int, family: Any) -> LearnedDecoder:
    r"""The optimum over a linear decoder, its bias and noise, and a linear guide of a family.

    With `l` the eigenvalues of the data's covariance (divided by N), `r_i = sqrt(l_i) / noise` and
    `d` directions kept, `mean_scale` and `full_rank` reach probabilistic PCA; above it, at equal
    noise, `shared_scale` pays `d ln(mean r) - sum ln r`, `mean_only` `sum(r - 1 - ln r)` and
    `noise_only` keeps nothing. For `deterministic` the objective grows without end as the codes
    shrink and the decoder grows: its supremum is returned.

    Args:
        x: data, shape `(N, features)`, with more features than `latent`.
        latent: number of latents, at least 1.
        family: see `fixed_decoder`, without `zero`.

    Raises:
        ValueError: the family has no closed form here, or there are too few features.

    Tipping and Bishop, Probabilistic principal component analysis, 1999.
    """
    if not 1 <= latent < x.shape[1]:
        raise ValueError(f"latent: expected 1 to {x.shape[1] - 1}, got {latent}")
    centred = (x - x.mean(0)).double()
    values = torch.linalg.svdvals(centred) ** 2 / len(x)
    values = torch.cat([values, values.new_zeros(x.shape[1] - len(values))])
    D, log_2pi = x.shape[1], math.log(2 * math.pi)
    if family is families.deterministic:
        variance = values[latent:].sum().item() / D
        value = -D / 2 * (log_2pi + math.log(variance) + 1) - latent / 2 * log_2pi
        return LearnedDecoder(value, math.nan, math.sqrt(variance), latent, attained=False)
    if family is families.noise_only:
        latent = 0
    elif family not in _RATES:
        name = getattr(family, "name", family)
        raise ValueError(f"family: expected one with a closed form here, got {name}")
    while True:
        kept, rest = values[:latent], values[latent:].sum().item()
        noise = math.sqrt(rest / (D - latent))
        if family is families.mean_only:
            roots = kept.sqrt().sum().item()
            noise = (roots + math.sqrt(roots**2 + 4 * D * rest)) / (2 * D)
        if latent == 0 or kept[-1].item() > noise**2:
            break
        latent -= 1  # the last direction is not worth its rate
    r = kept.sqrt() / noise
    best = -(D * log_2pi + kept.log().sum() + (D - latent) * 2 * math.log(noise)) / 2
    best = best - (latent + rest / noise**2) / 2
    paid, rate = _RATES[family](r) if latent else (r.sum(), r.sum())
    value = (best - paid).item()
    return LearnedDecoder(value, rate.item(), noise, latent, attained=True)


def _shared(r: Tensor) -> tuple[Tensor, Tensor]:
    P, level = r * r.mean(), 1 / r.mean() ** 2
    squares = (P - 1) * r**2 / P**2
    return len(r) * r.mean().log() - r.log().sum(), (level + squares - 1 - level.log()).sum() / 2


# family -> from r what it pays above probabilistic PCA at equal noise, and its rate
_RATES: dict[Any, Any] = {
    families.mean_only: lambda r: ((r - 1 - r.log()).sum(), (r - 1).sum() / 2),
    families.shared_scale: _shared,
    families.mean_scale: lambda r: (0 * r.sum(), r.log().sum()),
    families.full_rank: lambda r: (0 * r.sum(), r.log().sum()),
}
