r"""Objectives: the losses that `fit` can minimise, in nats per datum.

An objective is anything that is called as `objective(model, guide, *args, size=None, step=0)` and
returns a scalar that can be differentiated:

    fit(model, guide, x, objective=ELBO(beta=warm_up(2000), kl="sampled"))
    fit(model, guide, x, objective=IWAE(num_samples=8, gradient="doubly_reparametrized"))

Those here mean the same at every batch size: what is local to a datum is averaged over the batch,
what is global is divided by the number of data, and a `poutine.scale` of the model is kept.
**To add an objective**, write a function of that signature; `objective.terms` reads its terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae._free_bits import floored_rate
from ppvae._importance import Cut, averaged, log_joint_and_guide, path, runs
from ppvae.objective import Terms, check_reparametrized, loss_of, terms

__all__ = ["ELBO", "IWAE", "WarmUp", "warm_up"]


@dataclass(frozen=True)
class ELBO:
    r"""The negative ELBO, distortion + beta * rate; by default exactly `objective.negative_elbo`.

    The rate is KL(q(z|x) || p(z)), summed over latent sites; for a point guide it is the penalty
    -log p(z), so that `beta=0` with a deterministic guide is the plain autoencoder.

    **With beta other than 1, or with free bits, the loss is no bound** on -log p(x): report the
    plain ELBO beside it (`evaluate` does). With free bits a batch has a say: the mean over the
    batch is inside the maximum, so that smaller batches have higher losses on average.

    Args:
        beta: weight of the rate, at least 0: a number, or a function from the number of optimizer
            steps so far to a number, such as `warm_up(2000)`.
        free_bits: the rate of each latent counts at least so many nats per datum, and below that
            nothing pushes it down. Latents are the coordinates, where the divergence is a sum over
            them (`Independent` guide and prior), else whole sites; sites that a guide draws
            jointly are one. A global latent has that many nats for all the data.
        kl: "analytic", the closed form of each site that has one, or "sampled", the estimate
            log q(z) - log p(z) for all.
        num_samples: draws to average over; in one run, if the model is vectorized.

    Raises:
        ValueError: an argument is out of its range; or, in a call, sites do not match, a draw of
            the guide is not reparametrized, or `free_bits` meets a guide without density.

    Kingma and Welling, 2014; Higgins et al., beta-VAE, 2017; Kingma et al., Improved variational
    inference with inverse autoregressive flow, 2016 (free bits).

    Example:
        >>> from ppvae import VAE, FamilyGuide, families, likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(mlp(2, 16, out=5), latent=2, likelihood=likelihoods.Normal(0.1))
        >>> guide = FamilyGuide(model, families.mean_scale, encoder=mlp(5, 16))
        >>> ELBO(beta=2.0)(model, guide, torch.randn(8, 5)).shape
        torch.Size([])
    """

    beta: float | Tensor | Callable[[Any], Any] = 1.0
    free_bits: float = 0.0
    kl: str = "analytic"
    num_samples: int = 1

    def __post_init__(self) -> None:
        if not (callable(self.beta) or isinstance(self.beta, Tensor)):
            _check_weight("beta", self.beta)
        _check_weight("free_bits", self.free_bits)
        _check_choice("kl", self.kl, ("analytic", "sampled"))
        _check_count("num_samples", self.num_samples)

    def __call__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        size: int | None = None,
        plate: str | None = None,
        step: Any = 0,
    ) -> Tensor:
        """The loss.

        Args:
            model: a Pyro model.
            guide: its guide; every draw must be reparametrized.
            *args: their arguments: one minibatch.
            size: number of data in all; by default the size of the data plate.
            plate: name of the data plate; by default `data`, or else the outermost one.
            step: number of steps of the optimizer so far, for a `beta` that is a function.

        Returns:
            A scalar in nats per datum.
        """
        pairs = runs(model, guide, args, self.num_samples)
        parts = _read(pairs, plate)
        if self.kl == "sampled":
            parts = [part._replace(kl={}) for part in parts]
        beta = self.beta(step) if callable(self.beta) else self.beta
        if self.free_bits:
            rate = floored_rate(pairs, parts, self.free_bits, size)
            distortion = _mean([_distortion(part, size) for part in parts])
            return distortion + _like(beta, rate) * rate
        return _mean([_weighted(part, size, beta) for part in parts])


@dataclass(frozen=True)
class IWAE:
    r"""The negative importance-weighted bound: -log of the mean weight p(x, z) / q(z|x) of K draws.

    It falls as K grows, from the negative ELBO at one draw (with sampled KL) towards -log p(x). The
    mean over draws is inside the logarithm, per datum; the mean over the batch, and a scale of the
    model, are outside, so that every batch gives an unbiased estimate of the same bound.

    With more draws the gradient of the guide drowns in noise (Rainforth et al., Tighter variational
    bounds are not necessarily better, 2018). `gradient="doubly_reparametrized"` has the same mean;
    near the posterior a far smaller variance for the guide's parameters, and none at all where the
    guide is exact (far from it, early in training, it may be larger). It takes a derivative inside
    the loss, which costs about a quarter more, and which `torch.export` does not trace.

    Args:
        num_samples: draws K; in one run, if the model is vectorized.
        gradient: "pathwise", or "doubly_reparametrized".

    Raises:
        ValueError: an argument is out of its range; or, in a call, sites do not match, a draw of
            the guide is not reparametrized or a point, sites are scaled differently, or latents are
            neither all local, nor all global with all the data in the batch.

    Burda, Grosse, Salakhutdinov, Importance weighted autoencoders, 2016; Tucker et al., Doubly
    reparameterized gradient estimators for Monte Carlo objectives, 2019; with one draw the latter
    is that of Roeder et al., Sticking the landing, 2017.
    """

    num_samples: int = 8
    gradient: str = "pathwise"

    def __post_init__(self) -> None:
        _check_count("num_samples", self.num_samples)
        _check_choice("gradient", self.gradient, ("pathwise", "doubly_reparametrized"))

    def __call__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        size: int | None = None,
        plate: str | None = None,
        step: Any = 0,
    ) -> Tensor:
        """The loss; arguments and result as those of `ELBO`. The value ignores `step`."""
        cuts: list[Cut] | None = None if self.gradient == "pathwise" else []
        parts = _read(runs(model, guide, args, self.num_samples, cuts), plate)
        log_p, log_q = log_joint_and_guide(parts, size)
        log_w = log_p - log_q
        bound = log_w.logsumexp(0) - math.log(self.num_samples)
        loss = -averaged(bound, parts[0], size)
        if cuts is None:
            return loss
        # explicit parameters of p: sum w d log p; by way of the draws: sum w^2 dlog w/dz dz. The
        # explicit ones of q are gone: on average they are what takes w to w^2 (Tucker et al.)
        share = log_w.softmax(0).detach()
        squared = averaged((share**2 * log_w).sum(0), parts[0], size)
        explicit = averaged((share * log_p).sum(0), parts[0], size)
        surrogate = explicit + path(cuts, squared)
        return loss.detach() - (surrogate - surrogate.detach())


@dataclass(frozen=True)
class WarmUp:
    """A number that moves in a straight line with the steps of the optimizer; see `warm_up`."""

    steps: int
    start: float
    end: float

    def __post_init__(self) -> None:
        _check_count("steps", self.steps)
        _check_weight("start", self.start)
        _check_weight("end", self.end)

    def __call__(self, step: Any) -> Any:
        """The number at a step, counted from 0; a tensor, if the step is one."""
        share = step / self.steps
        share = share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0)
        return self.start + (self.end - self.start) * share


def warm_up(steps: int, start: float = 0.0, end: float = 1.0) -> WarmUp:
    """A schedule for `beta`: from `start` at step 0 in a straight line to `end` at step `steps`.

    Args:
        steps: steps of the optimizer until the end is reached, at least 1.
        start: the number at step 0, at least 0.
        end: the number from step `steps` on, at least 0.

    Returns:
        A function from a step to the number; it can be pickled.

    Raises:
        ValueError: an argument is out of its range.

    Bowman et al., Generating sentences from a continuous space, 2016; Sonderby et al., Ladder
    variational autoencoders, 2016.

    Example:
        >>> beta = warm_up(2000)
        >>> beta(0), beta(500), beta(9999)
        (0.0, 0.25, 1.0)
    """
    return WarmUp(steps, start, end)


def _read(pairs: list[Any], plate: str | None) -> list[Terms]:
    parts = []
    for model_trace, guide_trace in pairs:
        parts.append(terms(model_trace, guide_trace, plate))
        check_reparametrized(parts[-1], guide_trace)
    return parts


def _weighted(parts: Terms, size: int | None, beta: Any) -> Tensor:
    """Distortion + beta * rate."""
    known = not isinstance(beta, Tensor)
    if known and beta == 1:
        return loss_of(parts, size)
    distortion = _distortion(parts, size)
    if known and beta == 0:  # and not 0 * inf, for a point outside the support of the prior
        return distortion
    rate = loss_of(parts._replace(log_likelihood={}), size)
    return distortion + _like(beta, rate) * rate


def _like(beta: Any, rate: Tensor) -> Any:
    """A weight that is a tensor in the dtype of what it weighs, as a number would be."""
    return beta.to(rate.dtype) if isinstance(beta, Tensor) else beta


def _distortion(parts: Terms, size: int | None) -> Tensor:
    return loss_of(parts._replace(kl={}, log_prior={}, log_guide={}), size)


def _mean(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def _check_count(name: str, value: Any) -> None:
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def _check_weight(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")
