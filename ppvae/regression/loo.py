r"""Exact leave-one-out of a linear regression: each datum predicted from all others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ppvae._checks import expect
from ppvae.regression.factors import Factor, check_factor, each_of, triangle_of
from ppvae.regression.hyper import TOLERANCE, HyperPosterior, Problem, make_problem
from ppvae.regression.linear_algebra import pieces
from ppvae.regression.priors import Array
from ppvae.regression.rows import Rows

# Below this share of a datum's own variance its closed-form leave-one-out density loses digits.
_LEAST_SHARE = 1e-6
# How far from one a row of an orthogonal matrix may be long.
_ROUNDING = 1e-10
# A column of a block is at most so much longer than that of all rows, by rounding.
_MOST = 1 + 1e-6


class LeaveOneOut(NamedTuple):
    """Leave-one-out log predictive densities, in nats.

    Attributes:
        pointwise: log p(y_i | all other data), shape `(rows,)`; nan where the posterior without
            datum i is improper. Of shape `(0,)` where only the sums were kept.
        total: their sum, the expected log predictive density of ArviZ's `elpd_loo`.
        standard_error: of the total as an estimate, `sqrt(rows) * sd(pointwise)`.
        rows: number of data.
    """

    pointwise: Array
    total: float
    standard_error: float
    rows: int

    def __repr__(self) -> str:
        return f"LeaveOneOut of {self.rows} rows: {words_of(self)}"

    @staticmethod
    def of(pointwise: Array) -> LeaveOneOut:
        """Sums densities of single data, in nats, of shape `(rows,)`."""
        rows = len(pointwise)
        spread = float(np.sqrt(rows) * pointwise.std()) if rows else 0.0
        return LeaveOneOut(pointwise, float(pointwise.sum()), spread, rows)

    @staticmethod
    def combine(parts: Iterable[LeaveOneOut]) -> LeaveOneOut:
        """Adds up the results of blocks of rows.

        The densities of single data are kept, in the order of the blocks, where all blocks have
        them. The standard error is that of all rows: its square is the sum of squared differences
        from the mean, within the blocks and between them (Chan, Golub, LeVeque, *Algorithms for
        computing the sample variance*, 1983).

        Args:
            parts: what `ExactPosterior.loo` returned for each block.

        Raises:
            TypeError: one is no `LeaveOneOut`.
            ValueError: there are none.
        """
        parts = list(each_of("parts", parts, LeaveOneOut))
        expect(parts, "parts", "at least one", "none")
        for part in parts:
            kind = type(part).__name__
            expect(isinstance(part, LeaveOneOut), "parts", "each a LeaveOneOut", kind, TypeError)
        rows, total = sum(part.rows for part in parts), sum(part.total for part in parts)
        squares = sum(part.standard_error**2 for part in parts)
        for part in parts:
            if part.rows:
                squares += part.rows * (part.total / part.rows - total / rows) ** 2
        pointwise = np.concatenate([part.pointwise for part in parts])
        whole = pointwise if len(pointwise) == rows else np.empty(0)
        return LeaveOneOut(whole, total, float(np.sqrt(squares)), rows)


def words_of(loo: LeaveOneOut) -> str:
    """The sum and its standard error, or why there is none."""
    lost = int(np.isnan(loo.pointwise).sum())
    if lost:
        these = "one of the rows" if lost == 1 else f"any of {lost} rows"
        return f"undefined (the posterior is improper without {these})"
    return f"{loo.total:.4f} nats (standard error {loo.standard_error:.4f})"


def log_predictive(
    problem: Problem, hyper: HyperPosterior, data: Rows, others: Factor | None
) -> Array:
    """Log p(y_i | all other data) of a block of the data, in nats, of shape `(rows,)`.

    It is the sum over the points of the lattice where that is exact; else the others are fitted.

    Args:
        problem: all data, and the priors.
        hyper: the posterior of noise and scale given all data.
        data: the block's rows.
        others: all rows but the block's; None where the block is all of them, or is not known.

    Raises:
        ValueError: too few rows remain for a proper posterior; the others are not all but the
            block, or a column of the block is longer than that of all rows; or others are not given
            where they have to be fitted.
    """
    factor, gaussian = problem.factor, problem.gaussian
    proper = "noise" not in problem.unknown or problem.has_moment("noise", 1)
    expect(proper, "loo", "more rows", "an improper posterior where one of them is left out")
    rest = 0 if others is None else check_factor("others", others, factor).rows
    whole = len(data) + rest == factor.rows
    expect(
        whole or others is None and len(data) < factor.rows,
        "X, y" if others is None else "others",
        f"a block of the {factor.rows} rows of the posterior, and others that are the rest of them",
        f"{len(data)} rows and {rest} others",
    )
    if whole:
        log_sds = data.log_sds.sum() + (0.0 if others is None else others.log_sds)
        same = abs(log_sds - factor.log_sds) <= 1e-9 * (factor.rows + abs(factor.log_sds))
        expect(
            same, "weights, noise", "those of the rows as the posterior was given them", "others"
        )
    block = data.even()
    X, y = block[:, :-1], block[:, -1]
    with np.errstate(over="ignore"):
        longer = np.linalg.norm(block, axis=0) > _MOST * np.linalg.norm(factor.triangle, axis=0)
    told, got = "rows of the posterior's own data", "others: a column is longer than in all data"
    expect(not longer.any(), "X" if longer[:-1].any() else "y", told, got)
    rows, away = X @ gaussian.basis, y - X @ gaussian.loc
    pointwise, exact = np.empty(len(y)), np.empty(len(y), dtype=bool)
    for part in pieces(len(y), len(hyper.shares)):
        pointwise[part], exact[part] = _by_points(problem, hyper, rows[part], away[part])
    if "noise" in problem.unknown and factor.rows - 1 == gaussian.rank:
        # without a datum the others can be fitted exactly, as all the data cannot, and the noise
        # may go to zero, where the difference of densities is lost in their rounding
        exact[:] = False
    again = np.flatnonzero(~exact)
    told = "the factor of all rows but this block's, as data decide much by themselves"
    expect(whole or not len(again), "others", told, f"none, for {len(again)} such data")
    beside = () if others is None else (others.triangle,)
    for i in again:
        triangle = triangle_of(*beside, np.delete(block, i, 0))
        left = factor._replace(triangle=triangle, rows=factor.rows - 1)
        try:
            without = make_problem(left, problem.weight, problem.numbers)
            pointwise[i] = hyper.log_total - without.integrate().log_total
        except ValueError:  # the posterior without the datum is improper
            pointwise[i] = np.nan
    return pointwise - data.log_sds


def _by_points(
    problem: Problem, hyper: HyperPosterior, rows: Array, away: Array
) -> tuple[Array, Array]:
    r"""Log predictive densities of data, and whether these have kept their digits.

    With a datum's row u of the left singular vectors, and what is left of it beside them and the
    flat weights, l, and of its y, r, both zero where these are as many as the data,

    .. math:: 1 - h = l + \sum_j \frac{u_j^2}{1 + S_j^2 t^2 / s^2}, \qquad
        e = r + \sum_j \frac{u_j c_j}{1 + S_j^2 t^2 / s^2}

    Args:
        problem: all data, and the priors.
        hyper: the posterior of noise and scale given all data.
        rows: rows of X in the coordinates of the posterior, shape `(k, rank)`.
        away: y less what the prior means predict, shape `(k,)`.
    """
    gaussian = problem.gaussian
    log_noise, log_scale = hyper.log_numbers.values()
    flat, seen = rows[:, : gaussian.flat], rows[:, gaussian.flat :] / np.exp(gaussian.log_singular)
    squares = (seen**2).sum(1)
    rest = 1 - (flat**2).sum(1) - squares
    left = away - np.hstack([flat, seen]) @ gaussian.target
    alone = problem.factor.rows == gaussian.rank
    if alone:  # where what is left is rounding, and tells how good the vectors are
        good = (np.abs(rest) < _ROUNDING) & (squares > _LEAST_SHARE)
        rest, left = 0 * rest, 0 * left
    of_prior = gaussian.prior_share(log_noise, log_scale).T
    share = rest[:, None] + seen**2 @ of_prior
    residual = left[:, None] + (seen * gaussian.target[gaussian.flat :]) @ of_prior
    good = good if alone else share @ hyper.shares > _LEAST_SHARE
    share = np.maximum(share, 1e-300)
    with np.errstate(over="ignore", divide="ignore"):
        misfit = (residual * np.exp(-log_noise)) ** 2 / share
        logs = (np.log(share) - np.log(2 * np.pi) - misfit) / 2 - log_noise
        inverse = np.log(hyper.shares) - logs
    top = inverse.max(1)
    # the posterior without the datum must have died out where the other is small, and half of the
    # points must give the same sum
    sums = np.exp(inverse - top[:, None]) @ hyper.checks()
    error = np.abs(sums[:, 1:]).max(1) / sums[:, 0]
    return -top - np.log(sums[:, 0]), (error < TOLERANCE) & good
