"""Draws latents where the model draws them: there its prior, given all before, is at hand."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform

from ppvae._checks import expect
from ppvae.families.rules import support_of
from ppvae.guides.sites import Site
from ppvae.programs.nodes import bare_distribution, base_of, is_finite_discrete, latent_nodes
from ppvae.programs.supports import is_real

#: From the name of a site, the prior of the model and the values so far to the guide's
#: distribution, or None where it is the prior.
Posterior = Callable[[str, Any, Mapping[str, Tensor]], Any]


class _Enough(BaseException):
    """All that was wanted of a run of the model is drawn."""


class _Drawing(Messenger):
    """Sets the values that are known, and draws the others from the guide, at their statements."""

    def __init__(self, values: dict[str, Tensor], wanted: set[str], posterior: Posterior) -> None:
        super().__init__()
        self.values, self.wanted, self.posterior = values, wanted, posterior

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values:
            msg["value"], msg["done"] = self.values[name], True
        elif name in self.wanted:
            fn = self.posterior(name, msg["fn"], self.values)
            if fn is not None:
                shape = torch.broadcast_shapes(fn.batch_shape, msg["fn"].batch_shape)
                msg["fn"] = fn.expand(shape)

        elif self.wanted and not msg["is_observed"] and is_finite_discrete(msg["fn"]):
            wanted = f"sites whose prior depends on no discrete latent, for {sorted(self.wanted)}"
            came = f"{name!r}, which is summed out, drawn before"
            expect(site_is_subsample(msg), "family", wanted, came)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.wanted:
            self.values[msg["name"]] = msg["value"]
            self.wanted = self.wanted - {msg["name"]}


class _Stopping(Messenger):
    """Ends a run of the model after the last of some sites."""

    def __init__(self, wanted: Iterable[str]) -> None:
        super().__init__()
        self.wanted = set(wanted)

    def _pyro_post_sample(self, msg: Any) -> None:
        self.wanted.discard(msg["name"])
        # an exporter that follows the calls of modules loses its way where one is left by an error;
        # and in a graph, what nothing depends on costs nothing
        if not self.wanted and not torch.compiler.is_compiling():
            raise _Enough


def draw_in_model(
    model: Any,
    call: tuple[Any, Any],
    values: Mapping[str, Tensor],
    wanted: Iterable[str],
    posterior: Posterior,
    drawn: frozenset[str],
    plates: Mapping[str, Any] | None,
) -> dict[str, Tensor]:
    """Runs the model as far as the last of some latent sites, and draws them there.

    Args:
        model: the model.
        call: its arguments and keyword arguments.
        values: site -> value, for the sites that are drawn already.
        wanted: names of the sites to be drawn.
        posterior: says from what.
        drawn: names of the plates that draw a subsample of their own.
        plates: by name the plates that have drawn theirs already; None if none has.

    Returns:
        The values by the names of the sites that were wanted.
    """
    names = list(wanted)
    rows = {name: plates[name].indices for name in drawn if name in plates} if plates else {}

    def hide(msg: Any) -> bool:
        if site_is_subsample(msg):  # recorded once: here, or by what has drawn before
            return plates is not None or msg["name"] not in drawn
        return msg["type"] != "sample" or msg["name"] not in names

    args, kwargs = call
    recorder = TraceMessenger()
    with suppress(_Enough), recorder, _Stopping(names), poutine.block(hide_fn=hide):
        with _Drawing(dict(values), set(names), posterior), poutine.condition(data=rows):
            model(*args, **kwargs)
    return {node["name"]: node["value"] for node in latent_nodes(recorder.trace)}


class Around(NamedTuple):
    """The location and the scale of a prior, in unconstrained space; None where it has none."""

    location: Tensor
    scale: Tensor | None


def around(prior: Any, site: Site) -> Around:
    """Reads the location and the scale of a prior, of shape `(*batch, *space)`.

    Raises:
        ValueError: it has neither a location nor a finite mean.
    """
    fn = bare_distribution(prior)
    base = fn
    if isinstance(fn, torch.distributions.TransformedDistribution):
        inner = base_of(fn.base_dist)
        base = inner if _maps(fn.transforms) == _maps([site.transform]) else fn
    if is_real(support_of(base)) and hasattr(base, "loc"):
        scale = getattr(base, "scale", None)
        scale = (
            base.variance.sqrt() if scale is None and hasattr(base, "covariance_matrix") else scale
        )
        return Around(base.loc, scale)
    mean = _middle(fn)
    known = type(mean) in (Tensor, torch.nn.Parameter)  # in a graph it has no value
    finite = mean is not None and (not known or bool(torch.isfinite(mean).all()))
    expect(finite, "prior", f"a prior of {site.name!r} with a location, or a finite mean", fn)
    return Around(mean if site.transform is None else site.transform.inv(mean), None)


def _middle(fn: Any) -> Any:
    """The mean of a distribution, or where the location of what it is made of goes, or None."""
    with suppress(NotImplementedError):
        return fn.mean
    base = base_of(getattr(fn, "base_dist", None))
    if not hasattr(base, "loc"):
        return None
    value = base.loc
    for transform in fn.transforms:
        value = transform(value)
    return value


def _maps(transforms: Iterable[Any]) -> list[Any]:
    """The classes of some transforms, one behind the other, without what changes nothing."""
    kinds: list[Any] = []
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            kinds += _maps(transform.parts)
        elif isinstance(transform, IndependentTransform):
            kinds += _maps([transform.base_transform])
        elif isinstance(transform, AffineTransform):
            numbers = transform.loc, transform.scale
            plain = all(isinstance(number, (int, float)) for number in numbers)
            kinds += [] if plain and numbers == (0, 1) else [numbers if plain else transform]
        else:
            kinds.append(type(transform))
    return kinds


def shifted(fn: Any, prior: Any, site: Site, how: str) -> Any:
    """The distribution of `location + scale * draw`, or of `location + draw`.

    Args:
        fn: of the head: a distribution over the reals, or a tensor, which is a point.
        prior: the model's prior of the site.
        site: the site.
        how: "location" or "location_scale".

    Raises:
        ValueError: the prior has not what is asked for.
    """
    location, scale = around(prior, site)
    if how == "location":
        scale = None
    else:
        expect(scale is not None, "prior", f"a prior of {site.name!r} with a scale", prior)
    factor: Any = torch.ones_like(location) if scale is None else scale
    if isinstance(fn, Tensor):
        return location + factor * fn
    if isinstance(fn, dist.Delta):
        return dist.Delta(location + factor * fn.v, event_dim=fn.event_dim)
    names = set(fn.arg_constraints)
    if {"loc", "scale"} <= names and names <= {"loc", "scale", "df"}:
        held = {"df": fn.df} if "df" in names else {}
        return type(fn)(**held, loc=location + factor * fn.loc, scale=factor * fn.scale)
    return dist.TransformedDistribution(
        fn, [AffineTransform(location, factor, event_dim=len(fn.event_shape), cache_size=1)]
    )  # with the cache a draw is scored by the very noise that made it
