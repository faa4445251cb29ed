"""Many draws of a guide for each datum: their runs, their weights, and gradients through them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import check_choice, check_count
from ppvae.objectives.base import Cut, read_terms, runs
from ppvae.objectives.trace_terms import Terms, common_scale, data_size


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
        check_count("num_samples", self.num_samples)
        check_choice("gradient", self.gradient, ("pathwise", "doubly_reparametrized"))

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
        parts = read_terms(runs(model, guide, args, self.num_samples, cuts), plate)
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


def log_joint_and_guide(parts: list[Terms], size: int | None) -> tuple[Tensor, Tensor]:
    """Log p(x, z) and log q(z) of the terms of each run, shape `(draws, batch)`, in nats.

    If all latents are global there is one weight for all the data, and the shape is `(draws,)`.

    Raises:
        ValueError: the guide has a point, or these are no weights of importance (see `IWAE`).
    """
    first = parts[0]
    _check_density(first)
    names = set(first.log_prior) | set(first.log_guide)
    local = bool(names & first.local)
    if local:
        outside = (names | set(first.log_likelihood)) - first.local
        if outside:
            raise ValueError(
                f"model: expected all sites in the plate {first.plate.name!r}, or all latent "
                f"sites outside, for weights of importance; outside: {sorted(outside)}"
            )
    else:
        _check_all_data(first, size)
    log_p, log_q = [part.log_joint for part in parts], [part.log_q for part in parts]
    return _stacked(log_p, local=local), _stacked(log_q, local=local)


def averaged(values: Tensor, parts: Terms, size: int | None) -> Tensor:
    """Values per datum, or one for all the data, in nats per datum, times the model's scale.

    Raises:
        ValueError: some sites are scaled and others are not, so that the scale is not a factor.
    """
    scale = common_scale(list(parts.scales.values()))
    if scale is None:
        raise ValueError(
            f"model: expected one poutine.scale around all sites, got {parts.scales}; weights of "
            "importance have no meaning else"
        )
    if values.dim():
        return (values * scale).mean()
    if isinstance(scale, Tensor) and scale.dim():
        raise ValueError("model: expected a scale that is one number, beside global latents")
    return values * scale / data_size(parts, size)


def path(cuts: list[Cut], value: Tensor) -> Tensor:
    """A scalar with the gradient that `value` has by way of the draws of all runs, and no other."""
    leaves = [leaf for cut in cuts for _, leaf in cut.draws]
    total = torch.zeros(())
    if not leaves:
        return total
    slopes = iter(_slopes(value, leaves))
    for cut in cuts:
        total = total + _path(cut.draws, [next(slopes) for _ in cut.draws])
    return total


def _path(draws: list[tuple[Tensor, Tensor]], slopes: list[Tensor]) -> Tensor:
    """Takes the slope at each leaf, the others held fixed, back to the parameters of the draws."""
    total = torch.zeros(())
    for (drawn, leaf), slope in zip(reversed(draws), reversed(slopes), strict=True):
        if total.requires_grad:  # later draws may follow from this one
            slope = slope + _slopes(total, [leaf])[0]
        total = total + (slope * drawn).sum()
    return total


def _slopes(value: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _check_density(parts: Terms) -> None:
    points = sorted(set(parts.log_prior) - set(parts.log_guide))
    joint = set(parts.log_guide) - set(parts.log_prior)
    if points and not joint:
        raise ValueError(
            f"guide: expected a density for every latent site; {points} are points, which have "
            "none, and no weight of importance"
        )


def _check_all_data(parts: Terms, size: int | None) -> None:
    frame = parts.plate
    if frame is None:
        return
    full = size or frame.full_size or frame.size
    if frame.size != full or frame.full_size not in (None, frame.size):
        raise ValueError(
            f"batch_size: expected all {full} data in one batch, since the latent sites are "
            f"global, and a weight of importance belongs to all the data; got {frame.size}"
        )


def _stacked(runs: list[Tensor], *, local: bool) -> Tensor:
    """One run of many draws, or many runs of one, with the draws in front."""
    value = torch.stack(runs)
    return value[0] if value.dim() > 1 + local else value
