"""What the noise of a Gaussian decoder is beside the spread of the data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import Normal

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
        noise: the variances of the Gaussian likelihood.
    """

    size: int
    seen: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    products: np.ndarray | None
    noise: np.ndarray


def moments_of(model_trace: Any, plate: Any) -> Moments | None:
    """Reads the data of a minibatch off the one observed site; None unless it is Gaussian."""
    node, *others = observed_nodes(model_trace)
    fn = bare_distribution(node["fn"])
    place = Place.of(node, plate)
    x = place.flat(node["value"])[0].double().cpu()  # whose squares may overflow without a word
    if others or not isinstance(fn, Normal) or x.shape[1] > _WIDEST:
        return None
    variance = place.flat(fn.variance.expand(node["value"].shape))[0]
    entries = observed_entries(node)
    seen = torch.ones_like(x) if entries is None else place.flat(entries)[0].double().cpu()
    x = x * seen
    products = None if entries is not None else (x.T @ x).numpy()
    noise = variance.double().cpu()
    counted, total, squares, noises = (e.sum(0).numpy() for e in (seen, x, x.square(), noise))
    return Moments(len(x), counted, total, squares, products, noises)


def directions(moments: Sequence[Moments | None]) -> dict[str, Any]:
    """The mean noise variance, and the number of principal directions that are worth a latent.

    At noise variance s2 a direction of variance l > s2 is worth `(l/s2 - 1 - log(l/s2)) / 2` nats
    per datum to a linear decoder (see `closed_form.learned_decoder`); one of less is worth nothing.
    Where entries are missing, the directions are not known. Beside these `copied`, how many values
    of a datum have noise of a thousandth of their spread or less.

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
    mean, noise = total / seen, float(each.mean())
    spread = (squares / seen - mean**2).clip(0)
    copied = int(((each <= COPIED**2 * spread) & (spread > 0)).sum())
    found: dict[str, Any] = {"noise_variance": noise} | ({"copied": copied} if copied else {})
    whole = [each.products for each in known if each.products is not None]
    if len(whole) < len(known):
        return found
    products = np.sum(whole, 0)
    ratio = np.maximum(np.linalg.eigvalsh(products / size - np.outer(mean, mean)) / noise, 1.0)
    worth = (ratio - 1 - np.log(ratio)) / 2
    return found | {"directions": int((worth > WORTH).sum())}
