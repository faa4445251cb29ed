"""Missing entries: NaN among observed values is left out of the likelihood, exactly.

The densities of the elements of a datum are summed, those of missing elements left out: that is the
density of what was observed, since the elements are independent given the latents. What stood in
their places has no part in it.
"""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae.likelihoods.base import valid_value
from ppvae.programs.keywords import Wrapper
from ppvae.programs.nodes import Node


class NanMasked(Wrapper):
    """A program that takes NaN for what is not observed; made by `nan_masked`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the program."""
        with LeaveOut():
            return self.program(*args, **kwargs)


def nan_masked(program: Any) -> NanMasked:
    """A program that takes NaN among its data for what is not observed.

    A model leaves these entries out of the likelihood of every site whose elements are independent;
    those of `MultivariateNormal`, say, are not. A `FamilyGuide` gives zeros to its encoder in their
    places, unless that takes NaN itself, as `nn.FillMissing` does.

    `fit`, `evaluate` and all other functions that are given data wrap model and guide by it, where
    a number is NaN. It is for programs that are run by hand, as `SVI(nan_masked(model),
    nan_masked(guide), ...)`.

    Args:
        program: a Pyro model or guide.

    Returns:
        A module that holds the program and is called as it is.

    Raises:
        TypeError: the program is no function or module.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> import pyro
        >>> x = torch.tensor([0.0, float("nan")])
        >>> poutine.trace(nan_masked(model)).get_trace(x).log_prob_sum()
        tensor(-0.9189)
    """
    expect(callable(program), "program", "a function or module", type(program).__name__, TypeError)
    return program if isinstance(program, NanMasked) else NanMasked(program)


def is_nan_masked() -> bool:
    """Whether a program is running for which NaN is what was not observed."""
    return any(isinstance(each, LeaveOut) for each in _PYRO_STACK)


def takes_missing(encoder: nn.Module) -> bool:
    """Whether an encoder takes NaN itself, in any of its parts; else it gets zeros."""
    return any(getattr(part, "takes_missing", False) for part in encoder.modules())


def observed_entries(node: Node) -> Tensor | None:
    """Which entries of the value of a site are observed, of its shape; None, if all are."""
    entries: Tensor | None = node["infer"].get("observed_entries")
    return entries


class LeaveOut(Messenger):
    """Takes NaN out of what is observed, where the elements of a site are independent."""

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not msg["is_observed"] or msg["infer"].get("_deterministic"):
            return
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        observed = ~torch.isnan(value)
        fn, valid = _masked(msg["fn"], observed), valid_value(msg["fn"])
        if fn is None or valid is None:  # NaN stays, and so is the density
            return
        filler = torch.as_tensor(valid, dtype=value.dtype, device=value.device)
        msg["value"], msg["fn"] = torch.where(observed, value, filler), fn
        msg["infer"]["observed_entries"] = observed


def _masked(fn: Any, observed: Tensor) -> Any:
    """A distribution without the elements that are not observed; None, if they depend on others."""
    if isinstance(fn, torch.distributions.Independent):
        base = _masked(fn.base_dist, observed)
        return None if base is None else base.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        base = _masked(fn.base_dist, observed)
        return None if base is None else base.mask(fn._mask)
    alone = not fn.event_shape and not isinstance(fn, (dist.Unit, dist.Delta))
    return fn.mask(observed) if alone else None
