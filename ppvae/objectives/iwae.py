"""The importance-weighted bound, and the doubly reparametrized estimate of its gradient."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae._checks import check_choice, check_count, expect
from ppvae.objectives.base import Objective, Run
from ppvae.objectives.trace_terms import Terms, common_scale, data_size
from ppvae.programs.nodes import is_point


@dataclass(frozen=True)
class IWAE(Objective):
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
        object.__setattr__(self, "num_samples", check_count("num_samples", self.num_samples))
        check_choice("gradient", self.gradient, ("pathwise", "doubly_reparametrized"))

    @property
    def unstageable(self) -> str:
        """The estimate that is not pathwise takes a derivative, which `torch.export` leaves out."""
        inside = "takes a derivative inside the loss"
        return "" if self.gradient == "pathwise" else f"{self.gradient} {inside}"

    def loss(self, draw: Callable[..., list[Run]], size: int | None) -> Tensor:
        """The loss."""
        cut = None if self.gradient == "pathwise" else _Cut()
        runs = [run.terms for run in draw(self.num_samples, cut)]
        log_p, log_q = log_joint_and_guide(runs, size)
        log_w = log_p - log_q
        bound = log_w.logsumexp(0) - math.log(self.num_samples)
        loss = -averaged(bound, runs[0], size)
        if cut is None:
            return loss
        # explicit parameters of p: sum w d log p; by way of the draws: sum w^2 dlog w/dz dz. The
        # explicit ones of q are gone: on average they are what takes w to w^2 (Tucker et al.)
        share = log_w.softmax(0).detach()
        squared = averaged((share**2 * log_w).sum(0), runs[0], size)
        explicit = averaged((share * log_p).sum(0), runs[0], size)
        surrogate = explicit + cut.path(squared)
        return loss.detach() - (surrogate - surrogate.detach())


def log_joint_and_guide(runs: list[Terms], size: int | None) -> tuple[Tensor, Tensor]:
    """Log p(x, z) and log q(z) of the terms of each run, shape `(draws, batch)`, in nats.

    If all latents are global there is one weight for all the data, and the shape is `(draws,)`.

    Raises:
        ValueError: the guide has a point, or these are no weights of importance (see `IWAE`).
    """
    first = runs[0]
    points = sorted(set(first.log_prior) - set(first.log_guide))
    expect(
        first.is_dense,
        "guide",
        "a density for every latent site",
        f"a guide where {points} are points",
    )
    local = bool({*first.log_prior, *first.log_guide} & first.local)
    if local:
        first.check_local()
    elif first.plate is not None:
        given, full_size = first.plate.size, first.plate.full_size
        full = size or full_size or given
        wanted = f"all {full} data in one batch, as one weight of a global latent is of all of them"
        expect(given == full and full_size in (None, given), "batch_size", wanted, given)

    def stacked(values: list[Tensor]) -> Tensor:
        """One run of many draws, or many runs of one, with the draws in front."""
        value = torch.stack(values)
        return value[0] if value.dim() > 1 + local else value

    return stacked([run.log_joint for run in runs]), stacked([run.log_q for run in runs])


def averaged(values: Tensor, terms: Terms, size: int | None) -> Tensor:
    """Values per datum, or one for all the data, in nats per datum, times the model's scale.

    Raises:
        ValueError: some sites are scaled and others are not, so that the scale is not a factor.
    """
    scale = common_scale(list(terms.scales.values()))
    expect(scale is not None, "model", "one poutine.scale around all sites", terms.scales)
    if values.dim():
        return (values * scale).mean()
    number = not (isinstance(scale, Tensor) and scale.dim())
    expect(number, "model", "a scale that is one number, beside global latents", "a tensor")
    return values * scale / data_size(terms, size)


class _Cut(Messenger):
    """Cuts the graph at every draw of a guide, so that what follows sees a leaf in its place.

    Attributes:
        runs: for each run, pairs of a draw, with the graph that leads back to the guide's
            parameters, and the leaf of the same value; in the order of drawing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[list[tuple[Tensor, Tensor]]] = []

    def __enter__(self) -> Self:
        self.runs.append([])
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        hidden = site_is_subsample(msg) or msg["is_observed"] or is_point(msg["fn"])
        if hidden or not msg["value"].requires_grad:
            return
        leaf = msg["value"].detach().requires_grad_()
        self.runs[-1].append((msg["value"], leaf))
        msg["value"] = leaf

    def path(self, value: Tensor) -> Tensor:
        """A scalar with the gradient that `value` has by way of the draws, and no other."""
        leaves = [leaf for run in self.runs for _, leaf in run]
        slopes = iter(_slopes(value, leaves) if leaves else ())
        paths = [_path(run, [next(slopes) for _ in run]) for run in self.runs]
        return sum(paths, start=torch.zeros(()))


def _path(draws: list[tuple[Tensor, Tensor]], slopes: list[Tensor]) -> Tensor:
    """Takes the slope at each leaf, the others held fixed, back to the parameters of the draws."""
    total = torch.zeros(())
    for (drawn, leaf), slope in zip(reversed(draws), reversed(slopes), strict=True):
        if total.requires_grad:  # later draws may follow from this one
            slope = slope + _slopes(total, [leaf])[0]
        total = total + (slope * drawn).sum()
    return total


def _slopes(value: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
