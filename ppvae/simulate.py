"""Data drawn from a model, with the latents that they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from ppvae._context import eval_mode, private_modules, random_state
from ppvae.sites import latent_nodes

__all__ = ["Simulation", "Uncondition", "simulate"]


class Simulation(NamedTuple):
    """Data drawn from a model.

    Attributes:
        args: the arguments of the model, with the drawn data in place of the observed ones.
        latents: latent site -> the value that the data were drawn from.
    """

    args: tuple[Any, ...]
    latents: dict[str, Tensor]


class Uncondition(UnconditionMessenger):
    """Takes the observations off, but leaves deterministic sites and factors what they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


def simulate(
    model: Callable[..., Any],
    *args: Any,
    seed: int | None = None,
    arguments: Callable[[Mapping[str, Tensor]], tuple[Any, ...]] | None = None,
) -> Simulation:
    r"""Draws latents from the prior and data given the latents; nothing is trained or changed.

    Args:
        model: a Pyro model that conditions on its arguments.
        *args: its arguments, which give the number of data and the shapes. Those that the model
            observes are replaced by drawn ones; all others (the rows X of a regression) are kept.
        seed: seeds the draws, without a trace outside; None uses the caller's stream.
        arguments: from the drawn values of the observed sites to the arguments, for a model whose
            observations are not its arguments themselves.

    Returns:
        The new arguments, and the latents by site.

    Raises:
        ValueError: an observed site's data are none of the arguments, or a prior is improper.

    Example:
        >>> import torch
        >>> from ppvae import VAE, likelihoods, simulate
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(0.1))
        >>> (x,), latents = simulate(model, torch.zeros(3, 5))
        >>> x.shape, latents["z"].shape
        (torch.Size([3, 5]), torch.Size([3, 2]))
    """
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model):
        try:
            trace = poutine.trace(Uncondition()(model)).get_trace(*args)
        except NotImplementedError as error:
            raise ValueError(f"model: expected priors that can be drawn from; {error}") from error
    latents, observed, places = {}, {}, {}
    for node in latent_nodes(trace):
        if not node["infer"].get("was_observed"):
            latents[node["name"]] = node["value"].detach()
            continue
        name, data = node["name"], node["infer"]["obs"]
        observed[name] = node["value"].detach()
        places[name] = [i for i, arg in enumerate(args) if arg is data]
    if arguments is not None:
        return Simulation(tuple(arguments(observed)), latents)
    lost = [name for name, place in places.items() if not place]
    if lost:
        raise ValueError(
            f"arguments: expected a function from observed sites to the model's arguments, since "
            f"the data of {lost} are none of them; got None"
        )
    new = list(args)
    for name, place in places.items():
        for index in place:
            new[index] = observed[name].reshape(args[index].shape)
    return Simulation(tuple(new), latents)
