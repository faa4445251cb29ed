"""Data drawn from a model, with the latents that they came from."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from ppvae._checks import expect
from ppvae._process import exclusive
from ppvae._scopes import eval_mode, private_modules, random_state
from ppvae.programs.keywords import prepared_call
from ppvae.programs.nodes import latent_nodes, trace_of
from ppvae.programs.tracing import given, run_trace


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


@exclusive
def simulate(
    model: Callable[..., Any],
    *args: Any,
    seed: int | None = None,
    arguments: Callable[[Mapping[str, Tensor]], tuple[Any, ...]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
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
        kwargs: keyword arguments of the model, which it does not observe; they are kept.

    Returns:
        The new arguments, and the latents by site.

    Raises:
        TypeError: an observed site's data are no real numbers in a tensor.
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
    known, kind = arguments is None or callable(arguments), type(arguments).__name__
    expect(known, "arguments", "a function", kind, TypeError)
    positional = len(args)
    model, _, args = prepared_call(model, model, args, kwargs, missing=False)
    with torch.no_grad(), private_modules(), random_state(seed), eval_mode(model):
        trace = _drawn(model, args)
        nodes = latent_nodes(trace)
        observed = {n["name"]: n for n in nodes if n["infer"].get("was_observed")}
        expect(observed, "model", "observed sites", "none for these arguments")
        latents = {n["name"]: n["value"] for n in nodes if n["name"] not in observed}
        if arguments is not None:
            values = {name: node["value"] for name, node in observed.items()}
            return Simulation(tuple(arguments(values)), latents)
        new = _replaced(args, observed, positional)
        _check_recipe(trace, run_trace(given(model, trace, latents), new), observed)
    return Simulation(new[:positional], latents)


def _drawn(model: Any, args: tuple[Any, ...]) -> Any:
    """A trace of the model with its observations taken off."""
    try:
        trace = trace_of(Uncondition()(model), args)
    except NotImplementedError as error:
        raise ValueError(
            f"model: expected distributions that can be drawn from; {error}"
        ) from error
    factors = [name for name, node in trace.nodes.items() if isinstance(node.get("fn"), dist.Unit)]
    only = "sample statements only, since nothing can be drawn from a factor"
    expect(not factors, "model", only, factors)
    return trace


def _check_recipe(trace: Any, again: Any, observed: Mapping[str, Any]) -> None:
    """Raises if other data change the distribution that data were drawn from."""
    for name, node in observed.items():
        fns: list[Any] = [t.nodes[name]["fn"] for t in (trace, again)]
        before, after = (fn.log_prob(node["value"]) for fn in fns)
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"model: expected a distribution of {name!r} that does not depend on its own "
                "data; other data changed it"
            )


def _replaced(args: tuple[Any, ...], observed: Mapping[str, Any], count: int) -> tuple[Any, ...]:
    """The arguments, with drawn data in place of those of the first `count` that are observed."""
    wanted = "a function from observed sites to the model's arguments, since"
    new = list(args)
    taken: dict[int, str] = {}
    for name, node in observed.items():
        indices = [i for i, arg in enumerate(args[:count]) if arg is node["infer"]["obs"]]
        lost = f"{wanted} the data of {name!r} are none of them"
        expect(indices, "arguments", lost, None)
        for index in indices:
            both = f"{wanted} {taken.get(index)!r} and {name!r} observe the same one"
            expect(index not in taken, "arguments", both, None)
            taken[index] = name
            new[index] = _in_shape_of_data(node, args[index])
    return tuple(new)


def _in_shape_of_data(node: Any, data: Tensor) -> Tensor:
    """A drawn value in the shape of the data, and in their dtype where that loses nothing."""
    value = node["value"]
    real = isinstance(data, Tensor) and not data.is_complex()
    came = getattr(data, "dtype", type(data).__name__)
    expect(real, "args", f"real numbers in a tensor at {node['name']!r}", came, TypeError)
    wanted = f"data of shape {tuple(value.shape)} at {node['name']!r}, as its distribution"
    expect(value.numel() == data.numel(), "model", wanted, tuple(data.shape))
    value = value.reshape(data.shape)
    whole = data.is_floating_point() or node["fn"].support.is_discrete
    return value.to(data.dtype) if whole else value
