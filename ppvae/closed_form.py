r"""The exact optimum of every family where one exists: linear decoders and linear regression.

All values are in nats, those of the two decoders per datum, and are computed in float64. With `P`
the posterior precision and `m` the posterior mean, the gap of `q = N(mean, S)` to the
log-likelihood is `(tr(P S) - Z + (mean - m)' P (mean - m) - log det P - log det S) / 2`: quadratic
in the mean, so every family with a free mean takes `m`, and what is left chooses `S`.
"""

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ppvae import families
from ppvae._checks import LEAST, MOST, check_count, check_real, check_size, expect
from ppvae.families import GuideFamily

__all__ = ["LearnedDecoder", "Optimum", "fixed_decoder", "learned_decoder", "regression"]

_LOG_2PI = math.log(2 * math.pi)
_KNOWN = "one with a closed form here"
# The families for which the optimum over decoder and guide together is known.
_LEARNED = "deterministic zero noise_only mean_only shared_scale mean_scale full_rank".split()


def _printed(result: "Optimum | LearnedDecoder") -> str:
    """Its numbers, and the shapes of its arrays."""
    parts = []
    for name, value in result._asdict().items():
        array = isinstance(value, Tensor) and value.dim()
        number = f"{float(value):.6g}" if not array else f"shape {tuple(value.shape)}"
        parts.append(f"{name}: {bool(value) if isinstance(value, bool) else number}")
    return f"{type(result).__name__}({', '.join(parts)})"


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
        mutual_information: I(x; z) for data that follow the model, a scalar; infinite for
            `deterministic`, whose code has no noise and tells any two data apart; nan for a bounded
            mean, which has no closed form: its aggregate is not Gaussian.
    """

    objective: Tensor
    rate: Tensor
    distortion: Tensor
    log_likelihood: Tensor
    mean: Tensor
    covariance: Tensor
    mutual_information: Tensor

    def __repr__(self) -> str:
        return _printed(self)

    @property
    def gap(self) -> Tensor:
        """Log p(x) less the objective."""
        return self.log_likelihood - self.objective


class LearnedDecoder(NamedTuple):
    """The best decoder and guide together, for data of a given covariance; nats per datum.

    Attributes:
        objective: mean ELBO, or log joint density of a point; its supremum if it is not attained.
        rate: mean KL(q || p), or -log p(z) of a point.
        noise: standard deviation of the likelihood.
        active: number of latents in use.
        attained: whether there is an optimum; see `learned_decoder`.
        log_likelihood: mean log p(x) under this decoder.
        mutual_information: I(x; z) for Gaussian data of this covariance, at most that for others;
            infinite for `deterministic`. The rate less this is KL(q(z) || p(z)), but for a point.
        weight: a best decoder, `(features, latent)`, along the principal axes; nan if not attained.
        bias: its bias, shape `(features,)`.
    """

    objective: float
    rate: float
    noise: float
    active: int
    attained: bool
    log_likelihood: float
    mutual_information: float
    weight: Tensor
    bias: Tensor

    def __repr__(self) -> str:
        return _printed(self)

    @property
    def distortion(self) -> float:
        """Mean of -log p(x | z) under q."""
        return -self.objective - self.rate

    @property
    def gap(self) -> float:
        """Mean log p(x) less the objective."""
        return self.log_likelihood - self.objective


def fixed_decoder(
    x: Tensor, weight: Tensor, bias: Tensor, noise: float, family: GuideFamily
) -> Optimum:
    r"""The optimum for `z ~ N(0, I)`, `x | z ~ N(W z + b, noise^2 I)` with a fixed decoder.

    Args:
        x: data, shape `(batch, features)`.
        weight: W, shape `(features, latent)`.
        bias: b, shape `(features,)`.
        noise: standard deviation, positive and finite.
        family: of the ladder, up to `mean_scale`, or `full_rank`; or a `Family` of `Normal` with a
            location that is free, in an interval or fixed, and a scale that is free, shared or
            fixed. In a (closed) interval each datum has its best mean: no encoder is better.

    Raises:
        TypeError: an array has others than real numbers.
        ValueError: the family has no closed form here; an array is empty, not finite or does not
            fit the others; the noise is not positive; or a square of them would not be a number.

    Example:
        >>> x, weight, bias = torch.randn(4, 3), torch.ones(3, 2), torch.zeros(3)
        >>> fixed_decoder(x, weight, bias, 0.5, families.full_rank).gap.abs().max() < 1e-9
        tensor(True)
    """
    x, weight, bias = _array("x", x, 2), _array("weight", weight, 2), _array("bias", bias, 1)
    for name, rows in {"weight": len(weight), "bias": len(bias)}.items():
        expect(rows == x.shape[1], name, f"{x.shape[1]} rows, one for each column of x", rows)
    return _optimum(x.double() - bias.double(), weight, noise, 1.0, family)


def regression(
    X: Tensor, y: Tensor, noise: float, prior_scale: float, family: GuideFamily
) -> Optimum:
    r"""The optimum for `w ~ N(0, t^2 I)`, `y | w ~ N(X w, noise^2 I)`, in nats in total.

    Args:
        X: shape `(rows, columns)`.
        y: shape `(rows,)`.
        noise: standard deviation of the noise, positive.
        prior_scale: t, positive.
        family: see `fixed_decoder`; `deterministic` is ridge with penalty `noise^2 / t^2`.

    Raises:
        TypeError, ValueError: as for `fixed_decoder`, or X and y differ in rows.
    """
    X, y = _array("X", X, 2), _array("y", y, 1)
    expect(len(X) == len(y), "y", f"{len(X)} rows, as X", len(y))
    optimum = _optimum(y.double()[None], X, noise, prior_scale, family)
    return optimum._replace(**{name: getattr(optimum, name)[0] for name in Optimum._fields[:5]})


def _array(name: str, value: ArrayLike | Tensor, dims: int) -> Tensor:
    """An argument as a tensor of its own dtype."""
    tensor = check_real(name, value)
    shape = tuple(tensor.shape)
    expect(len(shape) == dims and tensor.numel(), name, f"{dims} dimensions, none empty", shape)
    expect(tensor.isfinite().all(), name, "finite real numbers", "others among them")
    largest = tensor.double().abs().max().item()
    fits = largest == 0 or LEAST <= largest <= MOST
    expect(fits, name, f"numbers of a size from {LEAST} to {MOST}", largest)
    return tensor


def _optimum(x: Tensor, W: Tensor, noise: float, scale: float, family: GuideFamily) -> Optimum:
    """The optimum for data `x` less their bias and a prior of mean zero and this scale."""
    variance = check_size("noise", noise) ** 2
    W, size, prior = W.double(), W.shape[1], check_size("prior_scale", scale) ** 2
    G = W.T @ W / variance
    P = G + torch.eye(size).to(G) / prior
    mode, failed = torch.linalg.solve_ex(P, W.T @ x.T / variance)
    wanted = "a decoder whose curvature can be told from that of the prior"
    expect(not failed, "weight", wanted, "one that hides it")
    mode = mode.T
    S, low, high = _member(family, P, prior)
    mean, point, level = _closest(P, mode, low, high), not S.any(), size * math.log(prior)
    constant = x.shape[-1] * (_LOG_2PI + math.log(variance))
    best, fit = (((x - z @ W.T).square().sum(-1) / variance + constant) / 2 for z in (mode, mean))
    log_likelihood = -best - (mode.square().sum(-1) / prior + P.logdet() + level) / 2
    distortion = fit + (G * S).sum() / 2
    width = size * _LOG_2PI if point else S.trace() / prior - size - S.logdet()
    rate = (mean.square().sum(-1) / prior + width + level) / 2
    information = P.new_tensor(math.inf if point else math.nan)
    if (low == high).all() or not G.any():
        information = P.new_zeros(())
    elif not point and low.isinf().all() and high.isinf().all():
        # over data that follow the model the best means have the covariance prior - P^-1
        information = ((S + torch.linalg.solve(P, G) * prior).logdet() - S.logdet()) / 2
    return Optimum(-rate - distortion, rate, distortion, log_likelihood, mean, S, information)


def _member(family: GuideFamily, P: Tensor, prior: float) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the best member's covariance, and the bounds of its mean (equal if it is fixed)."""
    one, rules = torch.eye(len(P)).to(P), getattr(family, "rules", {})
    where, scale = rules.get("loc", rules.get("v", 0.0)), rules.get("scale")
    kind = None if isinstance(where, families.Shared) else getattr(family, "distribution", None)
    low = high = where
    if isinstance(where, families.Channel):  # inside an interval or a half-line, or free
        low = getattr(where.constraint, "lower_bound", -math.inf)
        high = getattr(where.constraint, "upper_bound", math.inf)
    if family == families.noise_only:
        S = one * prior
    elif kind is dist.Delta:
        S = 0.0 * one
    elif family == families.full_rank:
        S = P.inverse()
    elif kind is dist.Normal and isinstance(scale, (float, Tensor)):
        S = one * torch.as_tensor(scale).to(P) ** 2
    elif kind is dist.Normal and scale == families.shared:
        S = one * len(P) / P.trace()
    elif kind is dist.Normal and scale == families.Channel():
        S = one / P.diagonal()
    else:
        raise ValueError(f"family: expected {_KNOWN}, got {getattr(family, 'name', family)}")
    low, high = (torch.as_tensor(end).to(P).expand(len(P)) for end in (low, high))
    return S, low, high


def _closest(P: Tensor, target: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Finds the point m of a box that minimises `(m - target)' P (m - target)`, for each row.

    The active-set method (Nocedal and Wright, Numerical Optimization, 2006, section 16.5): minimise
    over the coordinates not held on a bound; if that leads out of the box, hold the one that is
    stopped first; if not, let go the one that is pulled inward most. It ends, at the exact minimum.
    """
    mean, one, index = target.clamp(low, high), torch.eye(len(P)).to(P), torch.arange(len(P)).to(P)
    held = mean != target
    left = (held.any(-1) & (low < high).any()).nonzero()[:, 0]
    while len(left):
        m, h = mean[left], held[left]
        H = torch.where(h[:, :, None] | h[:, None, :], one, P)
        slope = ((target[left] - m) @ P).masked_fill(h, 0.0)
        step = torch.linalg.solve(H, slope[..., None])[..., 0]
        edge = torch.where(step > 0, high, low)
        length, first = torch.where(step == 0, math.inf, (edge - m) / step).min(-1, keepdim=True)
        stopped = (index == first) & (length < 1)
        m = torch.where(stopped, edge, m + length.clamp(max=1.0) * step)
        away = target[left] - m
        pull = torch.where(m == high, -1, 1) * (away @ P) - 1e-13 * (away.abs() @ P.abs())
        most, worst = pull.masked_fill(~h, -math.inf).max(-1, keepdim=True)
        loose = (index == worst) & (length >= 1) & (most > 0)
        mean[left], held[left] = m, (h | stopped) & ~loose
        left = left[((length < 1) | (most > 0))[:, 0]]
    return mean


def learned_decoder(x: Tensor, latent: int, family: GuideFamily) -> LearnedDecoder:
    r"""The optimum over a linear decoder, its bias and noise, and a linear guide of a family.

    With `l` the eigenvalues of the data's covariance (divided by N), `r_i = sqrt(l_i) / noise` and
    `d` directions kept, `mean_scale` and `full_rank` reach probabilistic PCA; above it, at equal
    noise, `shared_scale` pays `d ln(mean r) - sum ln r`, `mean_only` `sum(r - 1 - ln r)`, and
    `noise_only` and `zero` keep nothing. The best `noise^2` is the mean discarded eigenvalue; of
    `mean_only` it solves `D noise^2 = S noise + T`, with S the sum of the kept `sqrt(l)` and T of
    the discarded `l`. A direction with `l_i < noise^2` stays idle.

    The objective of `deterministic` has a supremum that no decoder attains: it rises as the codes
    shrink, which makes -log p(z) smaller, and the decoder grows, without end. Others have one where
    the noise can fall to zero: `shared_scale` and above if the data lie in `latent` dimensions, all
    if they are equal. From `latent = features` on, the noise returned is the largest of many.

    Args:
        x: data, shape `(N, features)`.
        latent: number of latents, at least 1.
        family: of the ladder, up to `mean_scale` without `mean_only_bounded`, or `full_rank`.

    Raises:
        TypeError: there are others than real numbers among the data.
        ValueError: the family has no closed form here; the data are empty or not finite; `latent`
            is below 1, or, for `shared_scale`, above the number of features.

    Tipping and Bishop, Probabilistic principal component analysis, 1999.
    """
    x, latent = _array("x", x, 2), check_count("latent", latent)
    expect(isinstance(family, GuideFamily), "family", _KNOWN, repr(family))
    D, silent = x.shape[1], family in (families.noise_only, families.zero)
    learned = family in [families.LADDER[name] for name in _LEARNED]
    expect(learned, "family", _KNOWN, getattr(family, "name", family))
    possible = latent <= D or family != families.shared_scale
    expect(possible, "latent", f"at most {D} for this family", latent)
    bias, values, axes = _principal(x)
    kept, noise = _kept(values, 0 if silent else min(latent, D), family)
    roots = values[:kept].sqrt()
    gains = {families.mean_only: roots * noise, families.shared_scale: roots * roots.mean()}
    squares = gains.get(family, values[:kept]) - noise**2
    used, weight = int((squares > 1e-9 * noise**2).sum()), axes.new_zeros(D, latent)
    weight[:, :kept] = axes[:, :kept] * squares.clamp(min=0.0).sqrt()
    attained = noise > 0 and family != families.deterministic
    if attained:
        optimum = fixed_decoder(x, weight, bias, noise, family)
        best, rate, _, log_likelihood = (term.mean().item() for term in optimum[:4])
        S, spread = optimum.covariance, optimum.mean.T @ optimum.mean / len(x)
        information = 0.0 if silent else ((S + spread).logdet() - S.logdet()).item() / 2
    else:
        point = family in (families.deterministic, families.zero)
        rate = latent / 2 * _LOG_2PI if point else math.inf if used else 0.0
        best = -D / 2 * (_LOG_2PI + 1 + 2 * math.log(noise)) - rate if noise else math.inf
        log_likelihood = -math.inf if family == families.deterministic else math.inf
        information, weight = math.inf if used else 0.0, weight * math.nan
    terms = (log_likelihood, information)
    return LearnedDecoder(best, rate, noise, used, attained, *terms, weight, bias)


def _kept(values: Tensor, kept: int, family: GuideFamily) -> tuple[int, float]:
    """Finds how many directions to keep, and the best standard deviation of the likelihood."""
    D = len(values)
    while family == families.mean_only and kept:
        roots, rest = values[:kept].sqrt().sum().item(), values[kept:].sum().item()
        noise = (roots + math.sqrt(roots**2 + 4 * D * rest)) / (2 * D)
        if values[kept - 1] > noise**2:
            return kept, noise
        kept -= 1  # the last direction is not worth its rate
    rest = values[kept:].sum().item()
    spread = D if family == families.deterministic else D - kept
    return kept, math.sqrt(rest / spread if spread else values[-1].item())


def _principal(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, eigenvalues and eigenvectors of the covariance; what rounding may have made is zero."""
    wide, (rows, D) = x.double(), x.shape
    bias = wide.mean(0)
    centred = torch.nn.functional.pad(wide - bias, (0, 0, 0, max(0, D - rows)))  # D axes, always
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
    # the error of the decomposition, and the norm of the noise that the data were rounded with
    floor = max(rows, D) * torch.finfo(wide.dtype).eps * singular[0]
    unit = torch.finfo(x.dtype if x.is_floating_point() else wide.dtype).eps
    floor = floor + unit * wide.square().mean().sqrt() * (rows**0.5 + D**0.5)
    return bias, torch.where(singular > floor, singular, 0.0) ** 2 / rows, axes.T
