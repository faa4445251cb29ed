"""What the noise of a Gaussian decoder is beside the spread of the data."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pyro.distributions import Normal

from ppvae.programs.layout import Place
from ppvae.programs.nodes import base_of, observed_nodes

WORTH = 0.05  # nats per datum: a direction that gains less is not worth a latent
COPIED = 1.001e-3  # of the spread of a column, the noise at which it is copied; floors are at 1e-3
_WIDEST = 2000  # values per datum of which the covariance is looked at


# sums over the data of a minibatch (their number, the values, the products of any two values), and
# the variance of its Gaussian likelihood per value, summed too
Moments = tuple[int, np.ndarray, np.ndarray, np.ndarray]


def moments_of(model_trace: Any, plate: Any) -> Moments | None:
    """Reads the data of a minibatch off the one observed site; None unless it is Gaussian."""
    nodes = observed_nodes(model_trace)
    fn = base_of(nodes[0]["fn"])
    x = Place.of(nodes[0], plate).flat(nodes[0]["value"])[0]
    if len(nodes) > 1 or not isinstance(fn, Normal) or x.shape[1] > _WIDEST:
        return None
    rows = x.double().cpu()  # whose squares may overflow without a word
    variance = Place.of(nodes[0], plate).flat(fn.variance.expand(nodes[0]["value"].shape))[0]
    noise = variance.double().cpu().sum(0).numpy()
    return len(rows), rows.sum(0).numpy(), (rows.T @ rows).numpy(), noise


def directions(moments: Sequence[Moments | None]) -> dict[str, Any]:
    """The mean noise variance, and the number of principal directions that are worth a latent.

    At noise variance s2 a direction of variance l > s2 is worth `(l/s2 - 1 - log(l/s2)) / 2` nats
    per datum to a linear decoder (see `closed_form.learned_decoder`); one of less is worth nothing.
    Beside these `copied`, how many values of a datum have noise of a thousandth of their spread or
    less.

    Args:
        moments: of all minibatches.

    Returns:
        Attributes of a result; none where that is not known, as for data whose squares overflow.
    """
    known = [each for each in moments if each is not None]
    if sum(each[0] for each in known) < 2:
        return {}
    size, total, products, noise = (sum(column) for column in zip(*known, strict=True))
    mean, each = total / size, noise / size
    noise = float(each.mean())
    if not np.isfinite(products).all():
        return {}
    spread = (np.diag(products) / size - mean**2).clip(0)
    copied = int(((each <= COPIED**2 * spread) & (spread > 0)).sum())
    ratio = np.maximum(np.linalg.eigvalsh(products / size - np.outer(mean, mean)) / noise, 1.0)
    worth = (ratio - 1 - np.log(ratio)) / 2
    found = {"noise_variance": noise, "directions": int((worth > WORTH).sum())}
    return found | ({"copied": copied} if copied else {})
