"""The rate of a guide with a floor under each latent coordinate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import check_choice, check_count, check_number
from ppvae.objectives.base import check_reparametrized, read_terms, runs
from ppvae.objectives.divergence import by_coordinate, closed_kl
from ppvae.objectives.trace_terms import Terms, data_size, terms
from ppvae.programs.nodes import is_point
from ppvae.programs.runs import trace_pair


def negative_elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    size: int | None = None,
    plate: str | None = None,
) -> Tensor:
    """The negative ELBO in nats per datum, from one draw, with closed KL where there is one.

    Local terms are averaged over the batch and global ones divided by the number of data, so that
    the value means the same at every batch size. A scale set by the model is kept. For a point
    guide this is the penalised negative log-likelihood, which is no bound.

    Args:
        model: a Pyro model.
        guide: its guide; every draw must be reparametrized.
        *args: their arguments: one minibatch.
        size: number of data in all; by default the size of the data plate.
        plate: name of the data plate, see `data_plate`.

    Returns:
        A scalar that can be differentiated.

    Raises:
        ValueError: sites do not match, or a draw of the guide is not reparametrized.
    """
    model_trace, guide_trace = trace_pair(model, guide, *args)
    parts = terms(model_trace, guide_trace, plate)
    check_reparametrized(parts, guide_trace)
    return loss_of(parts, size)


def loss_of(parts: Terms, size: int | None = None) -> Tensor:
    """The negative ELBO in nats per datum of terms that were read."""
    size = data_size(parts, size)
    signed = [(name, -value) for name, value in parts.log_likelihood.items()]
    signed += [(name, value) for name, value in parts.kl.items()]
    signed += [(name, -v) for name, v in parts.log_prior.items() if name not in parts.kl]
    signed += [(name, v) for name, v in parts.log_guide.items() if name not in parts.kl]
    loss = torch.zeros(())
    for name, value in signed:
        value = value * parts.scales[name]
        loss = loss + (value.mean() if name in parts.local else value.mean() / size)
    return loss


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
            check_number("beta", self.beta)
        check_number("free_bits", self.free_bits)
        check_choice("kl", self.kl, ("analytic", "sampled"))
        check_count("num_samples", self.num_samples)

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
        parts = read_terms(pairs, plate)
        if self.kl == "sampled":
            parts = [part._replace(kl={}) for part in parts]
        beta = self.beta(step) if callable(self.beta) else self.beta
        if self.free_bits:
            rate = floored_rate(pairs, parts, self.free_bits, size)
            distortion = _mean([_distortion(part, size) for part in parts])
            return distortion + _like(beta, rate) * rate
        return _mean([_weighted(part, size, beta) for part in parts])


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


def floored_rate(
    pairs: list[Any], parts: list[Terms], floor: float, size: int | None = None
) -> Tensor:
    """The rate in nats per datum, each coordinate's mean over batch and draws at least `floor`.

    A latent that the guide draws as a point has no divergence, and no floor.

    Args:
        pairs: the traces of model and guide of each run.
        parts: their terms, without `kl` where the rate is to be sampled.
        floor: nats per latent coordinate.
        size: number of data in all; by default the size of the data plate.

    Raises:
        ValueError: the guide has no density.
    """
    first = parts[0]
    if not first.log_guide:
        raise ValueError(f"free_bits: expected 0 for a guide that draws only points; got {floor}")
    total, share = torch.zeros(()), 1.0 / data_size(first, size)
    pieces = [name for name in first.log_prior if is_point(pairs[0][1].nodes[name]["fn"])]
    for name in first.log_prior:
        if name in pieces:
            continue
        values = [
            _coordinates(name, model_trace, guide_trace, part)
            for (model_trace, guide_trace), part in zip(pairs, parts, strict=True)
        ]
        lowest = floor * _mean_scale(first.scales[name])
        rate = torch.stack(values).mean(0).clamp(min=lowest).sum()
        total = total + (rate if name in first.local else rate * share)
    return total + _joint_rate(parts, pieces, floor, share)


def _joint_rate(parts: list[Terms], pieces: list[str], floor: float, share: float) -> Tensor:
    """The rate of the pieces of joint draws, which is one number, or the penalty of points."""
    first, total = parts[0], torch.zeros(())
    drawn = [n for n in first.log_guide if n not in first.log_prior or n in pieces]
    for part in parts:
        for sign, names, values in ((-1, pieces, part.log_prior), (1, drawn, part.log_guide)):
            for name in names:
                value = sign * (values[name] * part.scales[name]).mean() / len(parts)
                total = total + (value if name in part.local else value * share)
    if not drawn:
        return total
    lowest = floor * _mean_scale(first.scales[drawn[0]])
    return total.clamp(min=lowest if drawn[0] in first.local else lowest * share)


def _mean_scale(scale: Any) -> Any:
    return scale.mean() if isinstance(scale, Tensor) else scale


def _coordinates(name: str, model_trace: Any, guide_trace: Any, parts: Terms) -> Tensor:
    """Mean over batch and draws of the rate of one site, by coordinate where it splits."""
    node, prior = guide_trace.nodes[name], model_trace.nodes[name]
    q, p = node["fn"], prior["fn"]
    depth = len(q.event_shape)
    pair = by_coordinate(q, p)
    if pair is None:  # no sum over coordinates
        whole = parts.kl.get(name)
        whole = parts.log_guide[name] - parts.log_prior[name] if whole is None else whole
        return (whole * parts.scales[name]).mean()
    q, p = pair
    closed = closed_kl(q, p) if name in parts.kl else None
    rate: Any = q.log_prob(node["value"]) - p.log_prob(node["value"]) if closed is None else closed

    def aligned(value: Any) -> Tensor:
        """What has the shape of the plates, with the event dims behind."""
        value = torch.as_tensor(value, device=rate.device)
        return value.reshape(value.shape + (1,) * depth)

    if prior["mask"] is not None:
        rate = torch.where(aligned(prior["mask"]), rate, torch.zeros_like(rate))
    rate = (rate * aligned(parts.scales[name])).expand(node["fn"].shape())
    averaged = {f.dim for f in node["cond_indep_stack"] if f.name == "_draws"}
    if name in parts.local:
        averaged.add(parts.plate.dim)
    dims = [dim - depth for dim in averaged]
    return rate.mean(dims) if dims else rate
