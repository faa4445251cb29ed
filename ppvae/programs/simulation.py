"""Data drawn from a model, with the latents that they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from ppvae._checks import expect
from ppvae._scopes import eval_mode, private_modules, random_state
from ppvae.data.adapters import prepared
from ppvae.programs.nodes import latent_nodes
from ppvae.programs.runs import given, run_trace


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
        if not (msg["infer"].get("_deterministic") or isinstance(msg["fn"], dist.Unit)):
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
        seed: seeds the draws, and leaves the caller's stream where it was; None, as in all
            functions that draw, uses that stream.
        arguments: from the drawn values of the observed sites to the arguments, for a model whose
            observations are not its arguments themselves.

    Returns:
        The new arguments, and the latents by site.

    Raises:
        ValueError: nothing is observed, an observed site's data are none of the arguments or those
            of another site too, a prior is improper, or the model is no recipe for data: it has a
            factor, or the data have a part in their own distribution (an autoregressive decoder).

    Example:
        >>> import torch
        >>> from ppvae import VAE, likelihoods, simulate
        >>> model = VAE(torch.nn.Linear(2, 5), latent=2, likelihood=likelihoods.Normal(0.1))
        >>> (x,), latents = simulate(model, torch.zeros(3, 5))
        >>> x.shape, latents["z"].shape
        (torch.Size([3, 5]), torch.Size([3, 2]))
    """
    args = prepared(args)
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model):
        try:
            trace = poutine.trace(Uncondition()(model)).get_trace(*args)
        except NotImplementedError as error:
            raise ValueError(
                f"model: expected distributions that can be drawn from; {error}"
            ) from error
        factors = [name for name, n in trace.nodes.items() if isinstance(n.get("fn"), dist.Unit)]
        wanted = "sample statements only, since nothing can be drawn from a factor"
        expect(not factors, "model", wanted, factors)
        nodes = latent_nodes(trace)
        observed = {n["name"]: n for n in nodes if n["infer"].get("was_observed")}
        expect(observed, "model", "observed sites", "none for these arguments")
        latents = {n["name"]: n["value"] for n in nodes if n["name"] not in observed}
        if arguments is not None:
            values = {name: node["value"] for name, node in observed.items()}
            return Simulation(tuple(arguments(values)), latents)
        new = _replaced(args, observed)
        again = run_trace(given(model, trace, latents), new)
        for name, node in observed.items():
            fns: list[Any] = [t.nodes[name]["fn"] for t in (trace, again)]
            before, after = (fn.log_prob(node["value"]) for fn in fns)
            same = torch.allclose(before, after, rtol=1e-4, atol=1e-4, equal_nan=True)
            wanted = f"a distribution of {name!r} that does not depend on its own data"
            expect(same, "model", wanted, "another one for other data")
    return Simulation(new, latents)


def _replaced(args: tuple[Any, ...], observed: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments with the drawn data in place of the observed ones."""
    new = list(args)
    site_of: dict[int, str] = {}
    wanted = "a function from observed sites to the model's arguments, since"
    for name, node in observed.items():
        indices = [i for i, arg in enumerate(args) if arg is node["infer"]["obs"]]
        lost = f"{wanted} the data of {name!r} are none of them"
        expect(indices, "arguments", lost, None)
        for index in indices:
            other = site_of.setdefault(index, name)
            twice = f"{wanted} {other!r} and {name!r} observe the same one"
            expect(other == name, "arguments", twice, None)
            new[index] = _like(node, args[index])
    return tuple(new)


def _like(node: Any, data: Tensor) -> Tensor:
    """A drawn value in the shape of the data, and in their dtype where that loses nothing."""
    value = node["value"]
    wanted = f"data of shape {tuple(value.shape)} at {node['name']!r}, as its distribution"
    expect(value.numel() == data.numel(), "model", wanted, tuple(data.shape))
    value = value.reshape(data.shape)
    whole = data.is_floating_point() or node["fn"].support.is_discrete
    return value.to(data.dtype) if whole else value
