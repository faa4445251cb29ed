"""Normal priors of weights in units of the noise: conjugate ones, and Zellner's."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributions import Distribution, Normal

from ppvae._checks import LEAST, MOST, check_array, check_flag, check_real, check_size, expect
from ppvae.priors import moved


class ConjugateNormal:
    r"""A Normal prior of weights in units of the noise sd s: `w ~ N(loc, s^2 V)` given s.

    With an inverse gamma prior on `s^2` it is the conjugate prior (normal-inverse-gamma).

    Args:
        loc: mean, a number or shape `(weights,)`.
        scale: root of the diagonal of V, a number or shape `(weights,)`.
        covariance: V itself, shape `(weights, weights)`, in place of `scale`.

    Raises:
        TypeError: there are others than real numbers, or both or neither of the two are given.
        ValueError: shapes do not fit, a scale is not positive, or V is not positive definite.

    Reference:
        Gelman et al., *Bayesian Data Analysis*, 2013, section 14.8.

    Example:
        >>> ConjugateNormal(0.0, 10.0)
        ConjugateNormal(Normal(loc: 0.0, scale: 10.0))
    """

    def __init__(
        self, loc: ArrayLike = 0.0, scale: ArrayLike | None = None, *, covariance: Any = None
    ) -> None:
        one = (scale is None) != (covariance is None)
        got = "neither" if scale is None else "both"
        expect(one, "scale, covariance", "one of the two", got, TypeError)
        name = "scale" if covariance is None else "covariance"
        given = check_real(name, scale if covariance is None else covariance)
        middle = check_real("loc", loc)
        wide = given.dtype in (torch.float32, torch.float64)
        kind = given.dtype if wide else torch.get_default_dtype()
        given, middle = given.to(kind), middle.to(kind)
        if covariance is None:
            positive = bool((torch.isfinite(given) & (given > 0)).all())
            expect(positive, "scale", "positive numbers", given)
            fits = given.dim() < 2 and middle.dim() < 2
            fits = fits and len({1, *given.shape, *middle.shape}) <= 2
            got = f"{tuple(middle.shape)} and {tuple(given.shape)}"
            expect(fits, "loc, scale", "numbers, or one for each weight", got)
            self.prior: Distribution = dist.Normal(middle, given)
        else:
            square = given.dim() == 2 and given.shape[0] == given.shape[1]
            expect(square, "covariance", "shape (weights, weights)", tuple(given.shape))
            fits = middle.dim() == 0 or middle.shape == given.shape[:1]
            expect(fits, "loc", f"a number or shape ({len(given)},)", tuple(middle.shape))
            even = torch.isfinite(given).all() and torch.allclose(given, given.T)
            even = even and not int(torch.linalg.cholesky_ex(given)[1])
            expect(even, "covariance", "a positive definite matrix", f"{given!r:.60}")
            self.prior = dist.MultivariateNormal(middle.expand(len(given)), given)

    @classmethod
    def of_root(cls, root: Tensor) -> "ConjugateNormal":
        """With mean zero and the lower triangular root of V, shape `(weights, weights)`."""
        made = cls(0.0, 1.0)
        made.prior = dist.MultivariateNormal(root.new_zeros(len(root)), scale_tril=root)
        return made

    def __repr__(self) -> str:
        return f"ConjugateNormal({self.prior})"

    def given(self, noise: Tensor, columns: int) -> Distribution:
        """The prior of the weights given the noise sd.

        Args:
            noise: of any shape.
            columns: number of weights.

        Returns:
            A distribution of batch shape that of the noise and event shape `(columns,)`.
        """
        prior: Any = moved(self.prior, lambda tensor: tensor.to(noise))
        if isinstance(prior, Normal):
            loc, scale = prior.loc.expand(columns), prior.scale.expand(columns)
            return dist.Normal(loc, scale * noise[..., None]).to_event(1)
        return dist.MultivariateNormal(
            prior.loc, scale_tril=prior.scale_tril * noise[..., None, None]
        )


def g_prior(X: Any, g: float | None = None, *, intercept: bool = False) -> ConjugateNormal:
    r"""Zellner's g-prior, of weights that are as correlated as the data would make them.

    .. math:: w \sim N\big(0, g s^2 (X'X)^{-1}\big)

    Args:
        X: shape `(rows, columns)`, of independent columns.
        g: how many times wider than least squares from X; the number of rows by default, which
            is as much information as one row has.
        intercept: subtract the means from the columns, for a model with an intercept.

    Raises:
        TypeError: X is no array of real numbers, or `intercept` is no bool.
        ValueError: g is not positive, or there are no columns, or none that are independent and of
            a size that has a square.

    Reference:
        Zellner, *On assessing prior distributions and Bayesian regression analysis with g-prior
        distributions*, 1986.
    """
    columns = check_array("X", X, ("rows", "columns"))
    if check_flag("intercept", intercept):
        columns = columns - columns.mean(0)
    g = float(len(columns)) if g is None else check_size("g", g)
    expect(columns.shape[1], "X", "at least one column", "none")
    sizes = np.abs(columns).max(0, initial=0.0)
    bad = sizes[((sizes > 0) & (sizes < LEAST)) | (sizes > MOST)]
    expect(not len(bad), "X", f"columns of a size from {LEAST} to {MOST}", f"{bad[:1].sum():g}")
    # the root from the triangle of the columns, in turned order, as X'X would lose digits
    lengths = np.linalg.norm(columns, axis=0)
    unit = columns / np.where(lengths > 0, lengths, 1.0)
    rank = int(np.linalg.matrix_rank(unit)) if unit.size else 0
    expect(rank == unit.shape[1], "X", f"{unit.shape[1]} independent columns", rank)
    triangle: Any = np.linalg.qr(unit[:, ::-1], mode="r")
    root = np.linalg.inv(triangle[::-1, ::-1]) / lengths[:, None] * np.sqrt(g)
    root = np.tril(root * np.sign(np.diag(root)))
    return ConjugateNormal.of_root(torch.from_numpy(root))
