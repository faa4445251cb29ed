"""What the noise of a Gaussian decoder is beside the spread of the data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import Laplace, LogNormal, Normal, StudentT
from torch import Tensor

from ppvae.likelihoods.mixed import Joint
from ppvae.programs.layout import Place
from ppvae.programs.missing import observed_entries
from ppvae.programs.nodes import bare_distribution, observed_nodes

WORTH = 0.05  # nats per datum: a direction that gains less is not worth a latent
COPIED = 1.001e-3  # of the spread of a column, the noise at which it is copied; floors are at 1e-3
_WIDEST = 2000  # values per datum of which the covariance is looked at


class Moments(NamedTuple):
    """Sums over the data of a minibatch, by value of a datum; what is missing is left out.

    Attributes:
        size: number of data.
        seen: how many entries are observed.
        total: their sum.
        squares: the sum of their squares.
        products: those of any two values; None where an entry is missing.
        noise: the squares of the scales of the likelihood; infinite where it has none.
        gaussian: whether all of it is normal, so that these are variances.
    """

    size: int
    seen: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    products: np.ndarray | None
    noise: np.ndarray
    gaussian: bool = True


def moments_of(model_trace: Any, plate: Any) -> Moments | None:
    """Reads the data of a minibatch off the one observed site; None unless it has a scale."""
    node, *others = observed_nodes(model_trace)
    fn = bare_distribution(node["fn"])
    place = Place.of(node, plate)
    value = node["value"]
    if others or place.flat(value).shape[-1] > _WIDEST or not value.is_floating_point():
        return None
    value, scale = _scaled(fn, value)
    if torch.isinf(scale).all():
        return None
    x = place.flat(value)[0].double().cpu()  # whose squares may overflow without a word
    variance = place.flat(scale.expand(node["value"].shape))[0].double().square()
    entries = observed_entries(node)
    seen = torch.ones_like(x) if entries is None else place.flat(entries)[0].double().cpu()
    x = x * seen
    gaussian = isinstance(fn, Normal)
    products = (x.T @ x).numpy() if entries is None and gaussian else None
    noise = variance.cpu()
    counted, total, squares, noises = (e.sum(0).numpy() for e in (seen, x, x.square(), noise))
    return Moments(len(x), counted, total, squares, products, noises, gaussian)


def _scaled(fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """Values, or their logarithms, and the scale of the noise in them; infinite where it has none.

    Args:
        fn: a distribution of elements.
        value: their values.
    """
    if isinstance(fn, (Normal, Laplace, StudentT)):
        return value, fn.scale
    if isinstance(fn, LogNormal):
        return value.log(), fn.scale
    scale = torch.full_like(value, torch.inf)
    if isinstance(fn, Joint):
        value = value.clone()
        for part, columns in zip(fn.fns, fn.columns, strict=True):
            value[..., columns], scale[..., columns] = _scaled(part, value[..., columns])
    return value, scale


def directions(moments: Sequence[Moments | None]) -> dict[str, Any]:
    """The mean noise variance, and the number of principal directions that are worth a latent.

    At noise variance s2 a direction of variance l > s2 is worth `(l/s2 - 1 - log(l/s2)) / 2` nats
    per datum to a linear decoder (see `closed_form.learned_decoder`); one of less is worth nothing.
    Where entries are missing, the directions are not known. Beside these `copied`, how many values
    of a datum have noise of a thousandth of their spread or less, which every likelihood with a
    scale tells.

    Args:
        moments: of all minibatches.

    Returns:
        Attributes of a result; none where that is not known, as for data whose squares overflow.
    """
    known = [each for each in moments if each is not None]
    size = sum(each.size for each in known)
    if size < 2:
        return {}
    seen, total, squares, noise = (
        np.sum([getattr(each, name) for each in known], 0)
        for name in ("seen", "total", "squares", "noise")
    )
    if not np.isfinite(squares).all():
        return {}
    seen, each = np.maximum(seen, 1), noise / size
    mean = total / seen
    spread = (squares / seen - mean**2).clip(0)
    copied = int(((each <= COPIED**2 * spread) & (spread > 0)).sum())
    found: dict[str, Any] = {"copied": copied} if copied else {}
    if not all(each.gaussian for each in known):
        return found
    noise = float(each.mean())
    found = {"noise_variance": noise, **found}
    whole = [each.products for each in known if each.products is not None]
    if len(whole) < len(known):
        return found
    products = np.sum(whole, 0)
    ratio = np.maximum(np.linalg.eigvalsh(products / size - np.outer(mean, mean)) / noise, 1.0)
    worth = (ratio - 1 - np.log(ratio)) / 2
    return found | {"directions": int((worth > WORTH).sum())}
