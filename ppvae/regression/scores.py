"""What a guide of a regression is worth: its objective, and its predictions."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import special
from torch import Tensor, nn

from ppvae._checks import (
    LEAST,
    MOST,
    check_array,
    check_count,
    check_real,
    check_seed,
    check_share,
    expect,
)
from ppvae._process import exclusive
from ppvae._scopes import double_precision, eval_mode, private_modules, random_state, unchecked
from ppvae.data.adapters import as_tensors, form_of
from ppvae.data.batches import batches_of
from ppvae.data.labels import check_aligned
from ppvae.programs.keywords import with_keywords
from ppvae.programs.matched_normals import matched
from ppvae.training.average import average_of, without_fallback_warnings
from ppvae.training.optimum import affordable
from ppvae.training.surface import spread_of
from ppvae.training.task import task_of

_UNSEEN = 1_000_003  # seeds of draws that no fit with a small seed has held fixed


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


class Nats(float):
    """A number of nats that was found by draws, and its standard error.

    Attributes:
        error: the standard error; that of rounding alone where the number is exact.

    Example:
        >>> value = Nats(-61.3382, 0.0021)
        >>> value, f"{value:.1f}", value - 1.0
        (-61.3382 +- 0.0021, '-61.3', -62.3382)
    """

    error: float

    def __new__(cls, value: float, error: float) -> Self:
        """Makes a number that knows its error."""
        number = super().__new__(cls, value)
        number.error = float(error)
        return number

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy is made of."""
        return Nats, (float(self), self.error)

    def __repr__(self) -> str:
        return f"{float(self)!r} +- {self.error:.2g}"

    __str__ = __repr__


@exclusive
def objective(
    model: nn.Module,
    guide: Any,
    X: Tensor,
    y: Tensor,
    *,
    num_samples: int = 10_000,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> Nats:
    """The ELBO of a guide in nats, in total over the data; nothing is changed.

    It is an average over fresh draws, which no fit has been at, and a float that has a standard
    `error`. The first two moments of the draws are exact, so that both the value and its error are
    exact up to rounding for a Gaussian guide where noise and prior are Gaussian and known. For a
    point guide it is the log joint density at the point, which is no bound.

    Args:
        model: the regression.
        guide: its guide.
        X: shape `(rows, columns)`.
        y: shape `(rows,)`.
        num_samples: number of draws; at least four, and an odd number is one less.
        seed: chooses them; the caller's random numbers stay where they are.
        kwargs: keyword arguments of both, such as the `weights` and the `offset` of the rows.

    Raises:
        TypeError: model or guide cannot be called, or the data are no tensors or arrays.
        ValueError: the data are not finite, do not fit, have other labels of their rows, or a
            density of zero; or there are no draws.

    Example:
        >>> from ppvae import FamilyGuide, families, fit
        >>> from ppvae.regression import LinearRegression
        >>> X, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 3.0])
        >>> model = LinearRegression(1, noise=1.0)
        >>> guide = FamilyGuide(model, families.full_rank)
        >>> _ = fit(model, guide, (X, y), progress=False)
        >>> value = objective(model, guide, X, y)
        >>> round(value, 3), value.error < 1e-9
        (-5.056, True)
    """
    num_samples, seed = check_count("num_samples", num_samples, 4), check_seed(seed)
    sides = kwargs if isinstance(kwargs, Mapping) else {}
    given: dict[str, Any] = {name: sides.get(name) for name in ("weights", "offset", "counts")}
    check_aligned(X=X, y=y, **given)
    data = as_tensors("X, y", (X, y), form_of(model, guide))
    model, guide, data = with_keywords(model, guide, data, kwargs)
    extra = data[2:]
    with (
        torch.no_grad(),
        private_modules(),
        eval_mode(model, guide),
        unchecked(),
        random_state(seed),
    ):
        batches = batches_of("X, y", data[:2], len(X), training=False, extra=extra)
        task = task_of(model, guide, None, batches)
        with double_precision(data[0].device), without_fallback_warnings():
            average = average_of(task)
            values = [parameter.detach().double() for parameter in task.parameters]
            point = average.smooth and not average.normals
            draws = 2 if point else affordable(average, num_samples)
            normals = matched(draws, average.normals, seed + _UNSEEN)
            chunks = enumerate(average.chunks(normals), seed + _UNSEEN)
            losses = torch.cat([average.losses(values, chunk, own) for own, chunk in chunks])
            error = 0.0 if point else spread_of(losses.unsqueeze(0), normals).item() ** 0.5
    expect(torch.isfinite(losses).all(), "X, y", "data of a finite density", -losses.mean().item())
    return Nats(-losses.mean().item(), error)


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
        ValueError: shapes or labels of rows do not fit, a number is not finite, a noise is not
            positive, there are no data or no draws, or `level` is not in (0, 1).
    """
    check_aligned(X=X, y=y)
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
