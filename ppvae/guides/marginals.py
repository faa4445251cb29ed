"""Medians and quantiles of what a guide draws, and its density as one vector."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from scipy import special
from torch import Tensor

from ppvae._checks import check_array, check_real, expect
from ppvae._scopes import eval_mode, private_modules, random_numbers, random_state
from ppvae.families.banded import PrecisionNormal
from ppvae.guides.blocks import Drawn
from ppvae.guides.sites import Site
from ppvae.programs.nodes import DRAWS
from ppvae.programs.runs import BUDGET
from ppvae.programs.supports import from_reals, is_real

#: What a head returned, to what is drawn from in its place.
Instead = Callable[[Drawn, Any], Any]
#: A call of a guide, in which the one takes the place of the other.
Call = Callable[[Instead | None], Mapping[str, Tensor]]

_DRAWS = 1000  # where no formula is known
_GAUSSIANS = (dist.MultivariateNormal, dist.LowRankMultivariateNormal, PrecisionNormal)


def quantiles_of(guide: Any, levels: Sequence[float] | Tensor, call: Call) -> dict[str, Tensor]:
    """The quantiles of each latent coordinate under a guide, in unconstrained space, mapped back.

    Args:
        guide: a `FamilyGuide` that is set up.
        levels: shape `(levels,)`, from 0 to 1.
        call: calls it.

    Returns:
        Site -> values of shape `(levels, *plates, *event)`.

    Raises:
        ValueError: a level is not from 0 to 1, or a plate draws a subsample.
    """
    shares = check_array("quantiles", check_real("quantiles", levels), ("quantiles",))
    levels = torch.as_tensor(shares, device="cpu").double()
    inside = len(levels) > 0 and bool(((levels >= 0) & (levels <= 1)).all())
    expect(inside, "quantiles", "numbers from 0 to 1", levels.tolist())
    parts = sorted(
        frame.name for site in guide.sites for frame in site.frames if frame.name in guide.drawn
    )
    expect(not parts, "model", "plates with all their members", f"subsamples of {parts}")
    with _apart(guide):
        known: set[str] = set()
        one = call(partial(_at, 0.5, known))
        some = any(site.name not in known for site in guide.sites)
        drawn = _drawn(guide, one, call) if some else {}
        at = {level: call(partial(_at, level, known)) for level in _both_ways(levels)}
    found = {}
    for site in guide.sites:
        if site.name in known:
            ways = [1 - level if _is_falling(site) else level for level in levels.tolist()]
            found[site.name] = torch.stack([at[way][site.name] for way in ways])
        else:
            found[site.name] = _of_draws(drawn[site.name], levels, site)
    return found


def joint_of(guide: Any, call: Call) -> Any:
    """The distribution of all unconstrained coordinates, block behind block.

    Args:
        guide: a `FamilyGuide` that is set up.
        call: calls it.

    Raises:
        ValueError: the guide does not draw from one density that is known as a whole.
    """
    fns: list[Any] = []

    def kept(block: Drawn, fn: Any) -> Any:
        plain = block.frame is None and not block.given and not block.in_model and block.over_reals
        wanted = "latents that are drawn from free parameters, and depend on nothing else"
        expect(plain, "guide", wanted, f"{[*block.names]} (see `posterior` for one of an encoder)")
        dense = not isinstance(fn, (Tensor, dist.Delta))
        expect(dense, "guide", "a density of every latent", f"a point for {[*block.names]}")
        flat = block.family.joint or isinstance(fn, dist.Normal)
        expect(flat, "guide", "joint families, or Gaussian ones", block.family.name)
        fns.append(fn if block.family.joint else _vector(fn))
        return fn

    with _apart(guide):
        call(kept)
    expect(fns, "guide", "latents with free parameters", guide.family.name)
    if all(isinstance(fn, dist.Normal) for fn in fns):
        loc, scale = (torch.cat([getattr(fn, name) for fn in fns]) for name in ("loc", "scale"))
        return dist.Normal(loc, scale).to_event(1)
    if len(fns) == 1:
        return fns[0]
    gaussian = all(isinstance(fn, (dist.Normal, *_GAUSSIANS)) for fn in fns)
    expect(gaussian, "guide", "one joint family, or Gaussian ones", f"{guide.family.name}")
    factor = torch.block_diag(*map(_factor, fns))
    return dist.MultivariateNormal(torch.cat([fn.mean for fn in fns]), scale_tril=factor)


@contextmanager
def _apart(guide: Any) -> Any:
    """A run of a guide that nothing outside sees, of a stream of its own."""
    with ExitStack() as stack:
        for scope in (torch.no_grad(), poutine.block(), private_modules()):
            stack.enter_context(scope)
        stack.enter_context(eval_mode(guide, guide.model))
        yield stack.enter_context(random_state(0))


def _drawn(guide: Any, one: Mapping[str, Tensor], call: Call) -> dict[str, Tensor]:
    """Draws `(draws, *shape)` by site: as many in one run as memory takes.

    One by one, where the model draws some of them, or waits for them, and might have no room for
    another plate, and where an encoder draws, so that each has features of its own.
    """
    frames = [frame for site in guide.sites for frame in site.frames]
    at_once = max(1, min(_DRAWS, BUDGET // max(value.numel() for value in one.values())))
    if guide._late or any(frame.dim is None for frame in frames) or _encodes_noise(guide, call):
        at_once = 1
    left = min((frame.dim for frame in frames if frame.dim is not None), default=0) - 1
    runs = []
    for first in range(0, _DRAWS, at_once):
        count = min(at_once, _DRAWS - first)
        with pyro.plate(DRAWS, count, dim=left) if at_once > 1 else nullcontext():
            values = call(None)
        runs.append({k: v.reshape(count, *one[k].shape) for k, v in values.items()})
    return {name: torch.cat([run[name] for run in runs]) for name in one}


def _encodes_noise(guide: Any, call: Call) -> bool:
    """Whether an encoder draws random numbers."""
    before: list[list[Tensor]] = []
    drawn: list[bool] = []

    def enter(*_: Any) -> None:
        before.append(random_numbers())

    def leave(*_: Any) -> None:
        pairs = zip(before.pop(), random_numbers(), strict=True)
        drawn.append(any(not torch.equal(*pair) for pair in pairs))

    with ExitStack() as stack:
        for _, module in guide._encoders().values():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        call(None)
    return any(drawn)


def _both_ways(levels: Tensor) -> list[float]:
    """The levels and those from the other end, for maps that fall."""
    return [*dict.fromkeys([*levels.tolist(), *(1 - levels).tolist()])]


def _at(level: float, known: set[str], block: Drawn, fn: Any) -> Any:
    """The point at which every coordinate has a quantile, and the names of its sites; or `fn`."""
    value = None if block.given or block.in_model else _quantile(fn, level)
    if value is None or not block.over_reals:
        return fn
    known |= set(block.names)
    return value


def _quantile(fn: Any, level: float) -> Tensor | None:
    """A quantile of each coordinate of what a head returned; None where no formula is known."""
    if isinstance(fn, (Tensor, dist.Delta)):
        value: Tensor = fn if isinstance(fn, Tensor) else fn.v
        return value
    if isinstance(fn, _GAUSSIANS):
        fn = dist.Normal(fn.mean, fn.variance.sqrt())
    if isinstance(fn, dist.StudentT):
        unit = special.stdtrit(fn.df.detach().cpu().double().numpy(), level)
        return fn.loc + fn.scale * torch.as_tensor(unit).to(fn.scale)
    try:
        return None if fn.event_dim else fn.icdf(fn.sample().new_tensor(level))
    except NotImplementedError:
        return None


def _is_falling(site: Site) -> bool:
    """Whether a site gets smaller where its unconstrained coordinate grows."""
    try:
        return site.transform is not None and bool(torch.as_tensor(site.transform.sign < 0).any())
    except NotImplementedError:  # a map of vectors
        return False


def _of_draws(values: Tensor, levels: Tensor, site: Site) -> Tensor:
    """Quantiles of draws `(draws, *shape)`, `(levels, *shape)`."""
    discrete = site.support.is_discrete
    bent = not (discrete or is_real(site.support))
    transform = from_reals(site.support) if bent else None
    free = values if transform is None else transform.inv(values)
    levels = 1 - levels if _is_falling(site) else levels
    method: Any = "inverted_cdf" if discrete else "linear"
    found = np.quantile(free.cpu().double().numpy(), levels.numpy(), axis=0, method=method)
    value = torch.as_tensor(found).to(values)
    return value if transform is None else transform(value)


def _vector(fn: Any) -> Any:
    """A Gaussian of single numbers, of batch shape `(size,)`."""
    return dist.Normal(fn.loc.flatten(), fn.scale.flatten())


def _factor(fn: Any) -> Tensor:
    """A Cholesky factor of the covariance of a Gaussian."""
    if isinstance(fn, dist.Normal):
        return torch.diag(fn.scale)
    known = getattr(fn, "scale_tril", None)
    return torch.linalg.cholesky(fn.covariance_matrix) if known is None else known
