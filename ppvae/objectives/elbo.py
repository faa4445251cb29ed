"""The negative ELBO, with a weight of its rate, and a floor under the rate of each latent."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ppvae._checks import check_choice, check_count, check_number, expect
from ppvae.objectives.base import Objective, Run
from ppvae.objectives.divergence import by_coordinate, closed_kl
from ppvae.objectives.trace_terms import Terms, data_size
from ppvae.programs.masks import mask_of
from ppvae.programs.nodes import DRAWS, is_point


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
    return ELBO()(model, guide, *args, size=size, plate=plate)


def loss_of(terms: Terms, size: int | None = None) -> Tensor:
    """The negative ELBO in nats per datum, from terms; `size` is the number of data in all."""
    size = data_size(terms, size)
    signed = [(name, -value) for name, value in terms.log_likelihood.items()]
    signed += [(name, value) for name, value in terms.kl.items()]
    signed += [(name, -v) for name, v in terms.log_prior.items() if name not in terms.kl]
    signed += [(name, v) for name, v in terms.log_guide.items() if name not in terms.kl]
    loss = torch.zeros(())
    for name, value in signed:
        value = value * terms.scales[name]
        loss = loss + (value.mean() if name in terms.local else value.mean() / size)
    return loss


@dataclass(frozen=True)
class ELBO(Objective):
    r"""The negative ELBO, distortion + beta * rate; by default exactly `negative_elbo`.

    The rate is KL(q(z|x) || p(z)), summed over latent sites; for a point guide it is the penalty
    -log p(z), so that `beta=0` with a deterministic guide is the plain autoencoder.

    **With beta below 1 the loss is no bound** on -log p(x); above 1, or with free bits, it is a
    looser one than at 1. Report the plain ELBO beside it (`evaluate` does). With free bits a batch
    has a say: the mean over the batch is inside the maximum, so that smaller batches have higher
    losses on average.

    Args:
        beta: weight of the rate, at least 0: a number, or a function from the number of optimizer
            steps so far to a number, such as `warm_up(2000)`.
        free_bits: the rate of each latent counts at least so many nats per datum, and below that
            nothing pushes it down; a number or a function, as `beta`. Latents are the coordinates,
            where the divergence is a sum over them (`Independent` guide and prior), else whole
            sites; sites that a guide draws jointly are one. A global latent has that many nats for
            all the data.
        kl: "analytic", the closed form of each site that has one, or "sampled", the estimate
            log q(z) - log p(z) for all.
        num_samples: draws to average over; in one run, if the model is vectorized.

    Raises:
        ValueError: an argument is out of its range; or, in a call, a function gives such a number,
            sites do not match, a draw of the guide is not reparametrized, or `free_bits` meets a
            guide without density.

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
    free_bits: float | Tensor | Callable[[Any], Any] = 0.0
    kl: str = "analytic"
    num_samples: int = 1
    scheduled: ClassVar[tuple[str, ...]] = ("beta", "free_bits")

    def __post_init__(self) -> None:
        for name in self.scheduled:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                _check_weight(name, value)
            elif not callable(value):
                # as a number of Python's: one of NumPy's would make an array of a product
                object.__setattr__(self, name, check_number(name, value))
        check_choice("kl", self.kl, ("analytic", "sampled"))
        object.__setattr__(self, "num_samples", check_count("num_samples", self.num_samples))

    @property
    def indivisible(self) -> str:
        """With free bits, the mean over a minibatch is inside of a maximum."""
        floored = isinstance(self.free_bits, Tensor) or self.free_bits
        return "free bits look at all of a minibatch" if floored else ""

    def loss(self, draw: Callable[..., list[Run]], size: int | None) -> Tensor:
        """The loss, its `beta` and `free_bits` numbers or tensors."""
        runs = draw(self.num_samples)
        if self.kl == "sampled":
            runs = [run._replace(terms=run.terms._replace(kl={})) for run in runs]
        if self.indivisible:
            rate = floored_rate(runs, self.free_bits, size)
            distortion = _mean([_distortion(run.terms, size) for run in runs])
            return distortion + _in_dtype_of(self.beta, rate) * rate
        return _mean([_weighted(run.terms, size, self.beta) for run in runs])


def _check_weight(name: str, value: Tensor) -> None:
    """Checks a tensor as a number is checked, unless a graph is made, in which it has no value."""
    expect(not value.dim(), name, "a number, or a tensor of one", f"shape {tuple(value.shape)}")
    try:
        number = value.item() if type(value) in (Tensor, nn.Parameter) else 0.0
    except RuntimeError:  # inside of `vmap`
        return
    check_number(name, number)


def _weighted(terms: Terms, size: int | None, beta: Any) -> Tensor:
    """Distortion + beta * rate."""
    known = not isinstance(beta, Tensor)
    if known and beta == 1:
        return loss_of(terms, size)
    distortion = _distortion(terms, size)
    if known and beta == 0:  # and not 0 * inf, for a point outside the support of the prior
        return distortion
    rate = loss_of(terms._replace(log_likelihood={}), size)
    return distortion + _in_dtype_of(beta, rate) * rate


def _distortion(terms: Terms, size: int | None) -> Tensor:
    return loss_of(terms._replace(kl={}, log_prior={}, log_guide={}), size)


def _mean(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def _in_dtype_of(weight: Any, value: Tensor) -> Any:
    """A weight that is a tensor in the dtype of what it weighs, as a number would be."""
    return weight.to(value.dtype) if isinstance(weight, Tensor) else weight


def floored_rate(runs: list[Run], floor: Any, size: int | None = None) -> Tensor:
    """The rate in nats per datum, each coordinate's mean over batch and draws at least `floor`.

    A latent that the guide draws as a point has no divergence, and no floor.

    Args:
        runs: of model and guide; without `kl` in their terms where the rate is to be sampled.
        floor: nats per latent coordinate, a number or a tensor.
        size: number of data in all; by default the size of the data plate.

    Raises:
        ValueError: the guide has no density.
    """
    first, _, guide_trace = runs[0]
    expect(first.log_guide, "free_bits", "0 for a guide that draws only points", floor)
    share = 1.0 / data_size(first, size)
    points = [name for name in first.log_prior if is_point(guide_trace.nodes[name]["fn"])]
    # the sites of a joint draw are points, pieces of it, and their rate is one number; without a
    # joint draw the points have only a penalty, which is no rate and has no floor
    joint = [name for name in first.log_guide if name not in first.log_prior or name in points]
    total = _mean([_joint_rate(run.terms, points, joint, size) for run in runs])
    if joint:
        lowest = _lowest(floor, first.scales[joint[0]], total)
        total = total.clamp(min=lowest if joint[0] in first.local else lowest * share)
    for name in first.log_prior:
        if name not in points:
            rate = torch.stack([_coordinates(name, run) for run in runs]).mean(0)
            rate = rate.clamp(min=_lowest(floor, first.scales[name], rate)).sum()
            total = total + (rate if name in first.local else rate * share)
    return total


def _joint_rate(terms: Terms, points: list[str], joint: list[str], size: int | None) -> Tensor:
    """The rate of some joint draws, of which points are pieces."""
    prior = {name: terms.log_prior[name] for name in points}
    guide = {name: terms.log_guide[name] for name in joint}
    return loss_of(terms._replace(log_likelihood={}, kl={}, log_prior=prior, log_guide=guide), size)


def _lowest(floor: float | Tensor, scale: Any, rate: Tensor) -> Any:
    """The least that a rate counts for, times the mean scale of its site."""
    scale = scale.mean() if isinstance(scale, Tensor) else scale
    if isinstance(floor, Tensor):
        # none for a floor of zero, as for the number: the estimate of a rate may be negative
        return torch.where(floor > 0, _in_dtype_of(floor, rate) * scale, -math.inf)
    return floor * scale


def _coordinates(name: str, run: Run) -> Tensor:
    """Mean over batch and draws of the rate of one site, by coordinate where it splits."""
    terms, node, prior = run.terms, run.guide_trace.nodes[name], run.model_trace.nodes[name]
    pair = by_coordinate(node["fn"], prior["fn"])
    if pair is None:  # no sum over coordinates
        whole = terms.kl.get(name)
        whole = terms.log_guide[name] - terms.log_prior[name] if whole is None else whole
        return (whole * terms.scales[name]).mean()
    q, p = pair
    depth = len(node["fn"].event_shape)
    rate: Any = closed_kl(q, p) if name in terms.kl else None
    if rate is None:
        rate = q.log_prob(node["value"]) - p.log_prob(node["value"])

    def aligned(value: Any) -> Tensor:
        """What has the shape of the plates, with the event dims behind."""
        value = torch.as_tensor(value, device=rate.device)
        return value.reshape(value.shape + (1,) * depth)

    mask = mask_of(prior)
    if mask is not None:
        rate = torch.where(aligned(mask), rate, torch.zeros_like(rate))
    rate = (rate * aligned(terms.scales[name])).expand(node["fn"].shape())
    averaged = {f.dim for f in node["cond_indep_stack"] if f.name == DRAWS}
    if name in terms.local:
        averaged.add(terms.plate.dim)
    return rate.mean([dim - depth for dim in averaged]) if averaged else rate
