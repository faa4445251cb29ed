"""What a guide of a regression is worth: its objective, and its predictions."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import special
from torch import Tensor, nn

from ppvae._checks import LEAST, MOST, check_array, check_count, check_real, check_share, expect
from ppvae._process import exclusive
from ppvae._scopes import eval_mode, private_modules
from ppvae.data.adapters import as_tensors, form_of
from ppvae.objectives.matched import average_loss
from ppvae.programs.keywords import with_keywords


class PredictiveScores(NamedTuple):
    """How well draws of a posterior predict data.

    Attributes:
        rmse: root mean square error of the predictive mean.
        log_density: log predictive density in nats per datum, averaged over the data.
        coverage: share of the data inside the central predictive interval.
    """

    rmse: float
    log_density: float
    coverage: float


@exclusive
def objective(
    model: nn.Module, guide: Any, X: Tensor, y: Tensor, *, num_samples: int = 256, seed: int = 0
) -> float:
    """The ELBO of a guide in nats, in total over the data; nothing is changed.

    It is averaged over moment-matched draws, and therefore exact for a Gaussian guide where noise
    and prior are Gaussian and known; else its error is that of so many draws, or less. For a point
    guide it is the log joint density at the point, which is no bound.

    Args:
        model: the regression.
        guide: its guide.
        X: shape `(rows, columns)`.
        y: shape `(rows,)`.
        num_samples: number of draws, above the number of latent coordinates.
        seed: chooses them; the caller's random numbers stay where they are.

    Raises:
        TypeError: model or guide cannot be called, or the data are no tensors or arrays.
        ValueError: the data are not finite, do not fit, or have a density of zero; or there are no
            draws.
    """
    num_samples = check_count("num_samples", num_samples)
    data = as_tensors("X, y", (X, y), form_of(model, guide))
    model, guide, data = with_keywords(model, guide, data, None)
    with torch.no_grad(), private_modules(), eval_mode(model, guide):
        loss = average_loss(model, guide, data, draws=num_samples, seed=seed)
        total = -loss().item() * len(X)
    expect(math.isfinite(total), "X, y", "data of a finite density", total)
    return total


def predictive_scores(
    X: ArrayLike, y: ArrayLike, weight: ArrayLike, noise: ArrayLike, *, level: float = 0.9
) -> PredictiveScores:
    r"""Scores the prediction `p(y) = mean_s N(y; x w_s, noise_s)` of draws of a posterior.

    The integral over the noise is done in closed form for each draw: no data are drawn.

    Args:
        X: shape `(rows, columns)`.
        y: shape `(rows,)`.
        weight: draws of the weights, shape `(draws, columns)`; one row for a point.
        noise: draws of the noise sd, shape `(draws,)`, or one number.
        level: of the interval, in (0, 1).

    Raises:
        TypeError: there are others than real numbers among the arguments.
        ValueError: shapes do not fit, a number is not finite, a noise is not positive, there are no
            data or no draws, or `level` is not in (0, 1).
    """
    X = check_array("X", X, ("rows", "columns"))
    y, weight = check_array("y", y, (len(X),)), check_array("weight", weight, ("draws", X.shape[1]))
    expect(len(y), "y", "at least one datum", "none")
    expect(len(weight), "weight", "at least one draw", "none")
    sds = check_real("noise", noise)
    noise = check_array("noise", sds, (len(weight),)[: sds.dim()])
    expect((noise > 0).all(), "noise", "positive numbers", noise.min())
    level, means = check_share("level", level), X @ weight.T
    sizes = {"X, weight": abs(means).max(), "y": abs(y).max(), "noise": 1 / noise.min()}
    for name, size in sizes.items():
        expect(size <= MOST, name, f"numbers of sizes from {LEAST} to {MOST}", size)
    z = (y[:, None] - means) / noise
    log_density = -(z**2) / 2 - np.log(noise) - np.log(2 * np.pi) / 2
    below = special.ndtr(z).mean(1)
    return PredictiveScores(
        rmse=float(np.sqrt(np.mean((y - means.mean(1)) ** 2))),
        log_density=float((special.logsumexp(log_density, 1) - np.log(means.shape[1])).mean()),
        coverage=float((abs(below - 0.5) <= level / 2).mean()),
    )
