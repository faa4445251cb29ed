"""Numbers of a model that have a prior, or are known."""

from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution, constraints

from ppvae._checks import check_real, expect
from ppvae._scopes import random_state
from ppvae.priors import moved


def check_prior(name: str, prior: Any, shape: tuple[int, ...], support: Any) -> Any:
    """Checks the prior of numbers.

    Args:
        name: of the argument.
        prior: a distribution over them; where its batch is empty, each has the same.
        shape: of the numbers, of which the last dims are those of the support.
        support: a constraint that they keep.

    Raises:
        TypeError: it is no distribution of Pyro's.
        ValueError: it is discrete, or its shape or its support are others.
    """
    ours = isinstance(prior, TorchDistributionMixin)
    expect(ours, name, "a distribution of pyro.distributions", repr(prior), TypeError)
    expect(not prior.support.is_discrete, name, "a continuous prior", prior)
    batch, event = shape[: len(shape) - support.event_dim], shape[len(shape) - support.event_dim :]
    fits = tuple(prior.event_shape) == event and tuple(prior.batch_shape) in ((), batch)
    wanted = f"a prior of batch shape () or {batch} and event shape {event}"
    expect(fits, name, wanted, f"{tuple(prior.batch_shape)} and {tuple(prior.event_shape)}")
    outside = support is constraints.positive and prior.support.check(-torch.ones(shape)).any()
    with random_state(None, keep=True), torch.no_grad():
        inside = support.check(prior.sample()).all()
    expect(inside and not outside, name, f"a prior of {support}", prior)
    return prior


def check_values(name: str, values: Any, shape: tuple[int, ...], support: Any) -> Tensor:
    """Known numbers as a tensor of that shape, or a single one.

    Raises:
        TypeError: they are no real numbers.
        ValueError: they have another shape, or one is not finite or not in the support.
    """
    found = check_real(name, values)
    fits, came = tuple(found.shape) in ((), shape), f"shape {tuple(found.shape)}"
    expect(fits, name, f"a prior, or numbers of shape () or {shape}", came)
    fine = torch.isfinite(found) & support.check(found)
    expect(fine.all(), name, f"finite numbers, {support}", found.tolist())
    return found.detach().clone()


def prior_or_values(name: str, given: Any, shape: tuple[int, ...], support: Any) -> Any:
    """What is given for some numbers: a prior, or what they are; both checked."""
    check = check_prior if isinstance(given, Distribution) else check_values
    return check(name, given, shape, support)


def sampled(name: str, given: Any, like: Tensor, batch: int = 0) -> Tensor:
    """Draws numbers from their prior, or takes those that are known.

    Args:
        name: of the site.
        given: the prior or the values.
        like: zeros with their shape, dtype and device.
        batch: how many of the dims are those of plates.
    """
    if isinstance(given, Tensor):
        return given.to(like).expand(like.shape)
    prior = moved(given, lambda tensor: tensor.to(like))
    prior = prior.expand(like.shape[: like.dim() - prior.event_dim])
    drawn: Tensor = pyro.sample(name, prior.to_event(len(prior.batch_shape) - batch))
    return drawn
