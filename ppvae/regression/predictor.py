"""What the regressions share: the priors of a linear predictor, and the rows of their data."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution

from ppvae._checks import check_count, expect
from ppvae._scopes import UniquelyNamed
from ppvae.priors import moved
from ppvae.programs.nodes import base_of
from ppvae.regression.conjugate import ConjugateNormal
from ppvae.regression.counted import check_counts, kept
from ppvae.regression.factors import factorize
from ppvae.regression.priors import read_positive
from ppvae.regression.rows import read_rows
from ppvae.regression.units import Units
from ppvae.regression.weights import (
    check_scaled,
    positive_times,
    read_weight,
    rescaled,
    weight_of,
)

#: the default priors of the weights, and of a positive number of the likelihood
WEIGHT, POSITIVE = dist.Normal(0.0, 10.0), dist.HalfNormal(10.0)


class LinearPredictor(UniquelyNamed):
    """Linear predictors `X w + intercept + offset` with priors, for the distribution of y.

    Args:
        columns: number of columns of X, at least 1.
        weight: prior of the weights.
        intercept: True for a flat prior of it, a Normal prior of it, or False for none.
        scale: a factor of the prior scales of the weights, or a prior of such a factor, or None.
        several: how many predictors a row has, as a shape.
        free: how many intercepts a row has, as a shape.
    """

    #: every operation keeps leading dims, so that many draws can be made in one run
    vectorized = True

    def __init__(
        self,
        columns: int,
        *,
        weight: Any,
        intercept: Any,
        scale: Any,
        several: tuple[int, ...] = (),
        free: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.columns = check_count("columns", columns)
        self.weight_prior = read_weight(weight, self.columns)
        self.intercept_prior = _read_intercept(intercept)
        by_data = isinstance(scale, str) and scale == "data"
        wanted = f'a number or a prior (with scale="data", {type(self).__name__}.of(X, y, ...))'
        expect(not by_data, "scale", wanted, "'data'")
        self.scale_prior = None if scale is None else read_number("scale", scale)
        if scale is not None:
            check_scaled(self.weight_prior)
        self.weight_shape, self.intercept_shape = (*several, self.columns), free

    def words(self) -> str:
        """The priors, for a `repr`."""
        words = f"{self.columns}, weight={self.weight_prior}"
        if self.intercept_prior is not False:
            words += f", intercept={True if self.intercept_prior is None else self.intercept_prior}"
        return words if self.scale_prior is None else f"{words}, scale={self.scale_prior}"

    def check_rows(self, X: Any, y: Any, weights: Any, offset: Any, counts: Any) -> None:
        """Checks the arguments of a call.

        Raises:
            TypeError: one is no tensor of real numbers.
            ValueError: they do not fit each other, or the model.
        """
        named = {"X": X, "y": y, "weights": weights, "offset": offset, "counts": counts}
        given = {name: each for name, each in named.items() if each is not None or name == "X"}
        for name, value in given.items():
            real = isinstance(value, Tensor) and value.dtype != torch.bool
            real = real and (value.is_floating_point() or name != "X" and not value.is_complex())
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            expect(real, name, "a tensor of real numbers, floating in X", got, TypeError)
        fits = X.dim() == 2 and X.shape[1] == self.columns
        expect(fits, "X", f"shape (rows, {self.columns})", tuple(X.shape))
        for name in ("y", "weights", "offset", "counts"):
            if name in given:
                shape, wanted = tuple(given[name].shape), f"shape ({len(X)},), one for each row"
                expect(shape == (len(X),), name, f"{wanted} of X", shape)

    def check_data(
        self,
        X: Tensor,
        y: Tensor | None = None,
        weights: Tensor | None = None,
        offset: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Checks that all the data together, not just one batch, make the posterior proper.

        Raises:
            ValueError: the prior of the weights is flat and X, of rows that count, has not the rank
                of its columns; weights of rows are not positive; or counts are below zero, or all
                zero.
        """
        self.check_rows(X, None, weights, offset, counts)
        _check_weights(weights)
        check_counts(counts)
        if self.weight_prior is None:
            X, flat = kept(X, counts), self.intercept_prior is None
            ones, tiny = X.new_ones(len(X), 1), torch.finfo(X.dtype).tiny
            unit = nn.functional.normalize(torch.cat([ones, X], 1) if flat else X, dim=0, eps=tiny)
            rank, full = int(torch.linalg.matrix_rank(unit)), unit.shape[1]
            of = f"X has rank {rank - flat} and {full - flat} columns"
            expected = f"a proper prior where {of}{' beside the intercept' if flat else ''}"
            expect(rank == full, "weight", expected, "a flat one: the posterior is improper")

    def line(self, X: Tensor, scale: Tensor | None, noise: Tensor | None = None) -> Tensor:
        """Draws the weights, and returns `X w`, of shape `(*draws, rows, *several)`.

        Args:
            X: shape `(rows, columns)`.
            scale: the factor of the prior scales, or None.
            noise: the sd of the noise, where the prior of the weights depends on it.
        """
        like = X.new_zeros(self.weight_shape)
        weight = pyro.sample("weight", weight_of(self.weight_prior, like, scale, noise))
        # weights drawn in a plate of draws have the shape (draws, 1, *several, columns)
        weight = weight.squeeze(-like.dim() - 1) if weight.dim() > like.dim() else weight
        try:
            if like.dim() > 1:
                return X @ weight.mT
            return X @ weight if weight.dim() == 1 else weight @ X.T
        except RuntimeError as error:
            wanted = f"{weight.dtype}, as the weights, of which {self.columns} were drawn"
            raise ValueError(f"X: expected {wanted}, got {X.dtype}: {error}") from error

    def intercept(self, X: Tensor) -> Tensor | None:
        """Draws the intercepts, of shape `(*draws, *free)`; None where there are none."""
        prior, shape = self.intercept_prior, self.intercept_shape
        if prior is False:
            return None
        if prior is None:
            reals = (
                constraints.independent(constraints.real, len(shape)) if shape else constraints.real
            )
            return pyro.sample("intercept", dist.ImproperUniform(reals, (), shape))
        prior = moved(prior, lambda tensor: tensor.to(X)).expand(shape).to_event(len(shape))
        return pyro.sample("intercept", prior)

    def scale(self, X: Tensor) -> Tensor | None:
        """The factor of the prior scales of the weights, drawn if it is not known; None for one."""
        return None if self.scale_prior is None else number_of("scale", self.scale_prior, X)


def _check_weights(weights: Tensor | None) -> None:
    """Raises a ValueError unless weights of rows are positive and finite."""
    if weights is not None:
        good = torch.isfinite(weights) & (weights > 0)
        first = "" if good.all() else weights[~good][0].item()
        expect(good.all(), "weights", "positive finite numbers", first)


def read_number(name: str, given: Any) -> Any:
    """Reads a positive number, or its prior, or None for a flat one.

    Raises:
        TypeError: it is of another kind.
        ValueError: it is not positive, or the prior reaches below zero.
    """
    known = read_positive(given, name)
    if isinstance(known, float):
        return known
    fits = given is None or isinstance(given, TorchDistributionMixin)
    expect(fits, name, "a distribution of pyro.distributions", repr(given), TypeError)
    return given


def number_of(name: str, prior: Any, like: Tensor) -> Tensor:
    """A positive number as it is known, or drawn from its prior at a site of that name."""
    if isinstance(prior, float):
        return like.new_tensor(prior)
    if prior is None:
        return pyro.sample(name, dist.ImproperUniform(constraints.positive, (), ()))
    return pyro.sample(name, moved(prior, lambda tensor: tensor.to(like)))


def in_units_of(
    X: Any, y: Any, sides: dict[str, Any], arguments: dict[str, Any], *, response: bool
) -> tuple[int, dict[str, Any]]:
    """The number of columns, and the arguments of a model with the priors of `scale="data"`.

    Args:
        X: shape `(rows, columns)`.
        y: shape `(rows,)`.
        sides: weights, offset and counts of the rows, or None.
        arguments: as a user gave them.
        response: whether y is in the units of the predictor, as that of a linear regression is.
    """
    expect(y is not None, "y", "the target of each row", None, TypeError)
    (rows,) = read_rows(X, y, intercept=False, **sides)
    columns, scale = rows.X.shape[1], arguments.get("scale")
    if not (isinstance(scale, str) and scale == "data"):
        return columns, arguments
    ones = arguments.get("intercept", False) is not False
    units = Units.of_factor(factorize(X, y, intercept=ones, **sides))
    weight = read_weight(arguments.get("weight", WEIGHT), columns)
    if weight is not None:
        check_scaled(weight)
        relative = isinstance(weight, ConjugateNormal)
        loc, sds = map(torch.from_numpy, units.of_weights(relative=relative, response=response))
        weight = rescaled(weight, sds, loc=loc)
    found = arguments | {"weight": weight, "scale": None}
    if response:
        sd, noise = units.require_target(), arguments.get("noise", POSITIVE)
        if isinstance(noise, Distribution):
            noise = positive_times(noise, torch.as_tensor(sd))
        found |= {"noise": noise}
    return columns, found


def _read_intercept(given: Any) -> Any:
    """False for no intercept, None for a flat prior, or a Normal."""
    if isinstance(given, bool | np.bool_):
        return None if given else False
    prior = base_of(given) if isinstance(given, TorchDistributionMixin) else given
    normal = isinstance(prior, dist.Normal) and prior.batch_shape.numel() == 1
    kinds = "True, False or a Normal of pyro.distributions of one number"
    expect(normal, "intercept", kinds, repr(given), TypeError)
    return dist.Normal(prior.loc.reshape(()), prior.scale.reshape(()))
