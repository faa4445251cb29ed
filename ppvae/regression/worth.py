"""Is being Bayesian worth it over regularised least squares, for one's own data?"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy import special

from ppvae._checks import check_array, check_count, check_flag, check_share, expect
from ppvae.data.labels import check_aligned, check_columns, names_of
from ppvae.families import mean_scale
from ppvae.guides import FamilyGuide
from ppvae.regression._drawing import draw_latents
from ppvae.regression.combinations import Combinations
from ppvae.regression.exact import exact_posterior
from ppvae.regression.model import Horseshoe, LinearRegression
from ppvae.regression.priors import Array, Integers
from ppvae.regression.ridge import Ridge, squared_errors
from ppvae.regression.rows import Values
from ppvae.regression.units import PRIORS
from ppvae.training import NarrowFamily, NotConverged, fit

FULL, BY_EVIDENCE = "full posterior", "posterior by evidence"
# Draws of a guide that its predictions are averaged over.
_DRAWS = 4000
#: Methods that predict a Normal with one sd.
POINTS = (
    "least squares",
    "ridge by evidence",
    "ridge by leave-one-out",
    "ridge by cross-validation",
)


class Method(NamedTuple):
    """How well one method predicts data that it has not seen.

    Attributes:
        log_density: nats, shape `(rows,)`; in the units of y.
        error: y less the predicted mean, shape `(rows,)`.
        inside: whether y is in the central interval, shape `(rows,)`.
        note: what a guide's fit says, or nothing.
    """

    log_density: Array
    error: Array
    inside: NDArray[np.bool_]
    note: str = ""

    @property
    def rmse(self) -> float:
        """Root mean square error, in the units of y."""
        return float(np.sqrt(np.mean(self.error**2)))

    @property
    def coverage(self) -> float:
        """Share of the data inside of the interval."""
        return float(self.inside.mean())


class RidgePath(NamedTuple):
    """What a ridge regression is at each penalty, in nats per datum, each of shape `(k,)`.

    A prediction is a Normal about that of the ridge regression, whose sd is the root mean square of
    the leave-one-out errors; in training that of the residuals.

    Attributes:
        penalties: for each row of standardised data.
        training: log density of the data that it was fitted to.
        leave_one_out: of each datum by all others.
        evidence: log evidence at the best noise, less that of the largest penalty, plus what leave-
            one-out is there: its height has no meaning.
        held_out: of data that were held out.
        chosen: method -> penalty that it chooses, from all the data.
    """

    penalties: Array
    training: Array
    leave_one_out: Array
    evidence: Array
    held_out: Array
    chosen: dict[str, float]


@dataclass(frozen=True, eq=False, repr=False)
class Worth:
    """What the full posterior adds to a point; `print` it, and draw it with `plots.worth`.

    `worth_of_bayes` makes it.

    Args:
        methods: name -> how it predicts, all for the same data.
        path: along the penalties.
        line_share: share of the variance of the full posterior's predictions that is of the line.
        rows: number of data.
        columns: number of columns.
        held_out: which data were held out, in words.
        level: of the intervals.
        missing: points that have no noise left to estimate.
    """

    methods: Mapping[str, Method]
    path: RidgePath
    line_share: float
    rows: int
    columns: int
    held_out: str
    level: float = 0.9
    missing: tuple[str, ...] = ()

    @property
    def best_point(self) -> str:
        """The point with the highest held-out log density: chosen with hindsight, in its favour."""
        points = [name for name in POINTS if name in self.methods]
        return max(points, key=lambda name: float(self.methods[name].log_density.mean()))

    @property
    def gain(self) -> tuple[float, float]:
        """Nats per datum of the full posterior over the best point, with the standard error."""
        return self.gain_over(self.best_point)

    def gain_over(self, name: str) -> tuple[float, float]:
        """Nats per datum of the full posterior over a method, with the standard error, of pairs.

        Raises:
            ValueError: there is no such method.
        """
        expect(name in self.methods, "name", f"one of {list(self.methods)}", repr(name))
        gains = self.methods[FULL].log_density - self.methods[name].log_density
        return float(gains.mean()), float(gains.std() / np.sqrt(len(gains)))

    @property
    def verdict(self) -> str:
        """The answer, in words."""
        best, full = self.methods[self.best_point], self.methods[FULL]
        gain, error = self.gain
        size = f"{abs(gain):.3f} nats per datum (standard error {error:.3f})"
        over = f"the best point, {self.best_point}"
        if gain > 2 * error:
            word = f"Yes: the full posterior predicts better than {over}, by {size}."
        elif gain < -2 * error:
            word = f"No: the full posterior predicts worse than {over}, by {size}."
        else:
            word = f"It makes no difference that these data show: {size} from {over}."
        if gain > 2 * error and gain < 0.01:
            word = f"Hardly: the full posterior predicts better than {over}, but only by {size}."
        words = [
            word,
            f"Of {self.level:.0%} intervals its own have {full.coverage:.0%} of the data",
        ]
        words[-1] += f", and those of the point {best.coverage:.0%}."
        words.append(
            f"What is unknown of the line is {self.line_share:.0%} of the variance of a prediction:"
            " a point leaves that out, or counts it as noise that is equal for all rows."
        )
        if "least squares" in self.methods and self.best_point != "least squares":
            gain, error = self.gain_over("least squares")
            words.append(f"Over least squares it gains {gain:.3f} ({error:.3f}).")
        elif self.missing:
            words.append("Least squares has no noise left to estimate: there are too few rows.")
        return " ".join(words)

    def __repr__(self) -> str:
        lines = [f"{self.rows} rows, {self.columns} columns; {self.held_out}", ""]
        head = f"{'method':27s}{'log density':>12s}  {'full posterior gains':>20s}"
        lines.append(f"{head}{'RMSE':>11s}{f'{self.level:.0%} have':>10s}")
        for name, method in self.methods.items():
            gain, error = self.gain_over(name)
            gains = "" if name == FULL else f"{gain:.4f} ({error:.4f})"
            lines.append(
                f"{name:27s}{method.log_density.mean():12.4f}  {gains:>20s}"
                f"{method.rmse:#11.4g}{method.coverage:10.1%}"
            )
        noted = (f"{name}: {method.note}" for name, method in self.methods.items() if method.note)
        lines += [line for note in noted for line in ("", textwrap.fill(note, 96))]
        return "\n".join([*lines, "", textwrap.fill(self.verdict, 96)])


def worth_of_bayes(
    X: Values,
    y: Values,
    *,
    test: tuple[Values, Values] | None = None,
    num_folds: int = 5,
    level: float = 0.9,
    guides: bool = False,
    seed: int = 0,
) -> Worth:
    r"""Predicts held-out data by points and by posteriors, and says what the full one adds.

    Data are given as they are loaded: each method sees them standardised by the means and sds of
    its training part, and all results are in the units of y. The methods are

    - least squares, and ridge regressions whose penalty is that of the highest evidence (empirical
      Bayes), of the least exact leave-one-out error, or of the least error of folds. Each predicts
      a Normal with one noise sd, which is estimated in the same way: from the residuals and their
      degrees of freedom, by the evidence, or as the root mean square of the errors;
    - the posterior of weights and intercept at the noise and the prior scale of highest evidence;
    - the full posterior, of noise and scale, too, exactly;
    - with `guides`, a mean-field guide of the same regression, and one of a regression with a
      horseshoe prior, which take seconds. The first has the prior scale of the highest evidence:
      with the unknown one of the full posterior, on which all weights depend, a mean field takes up
      to ten times as long and predicts better as often as worse.

    Args:
        X: shape `(rows, columns)`.
        y: shape `(rows,)`.
        test: X and y of data that are held out; by default each part of `num_folds` is in turn.
        num_folds: parts that the rows are cut into at random, at least 2.
        level: of the central intervals, in (0, 1).
        guides: fit the guides too.
        seed: of the folds, and of the guides, at least 0.

    Raises:
        TypeError: there are others than real numbers among the data.
        ValueError: shapes, labels of rows or names of columns do not fit, or a number is not
            finite; rows are too few for the folds; y is an exact function of the columns.

    Reference:
        MacKay, *Bayesian interpolation*, 1992; Gneiting, Raftery, *Strictly proper scoring rules,
        prediction, and estimation*, 2007.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> worth = worth_of_bayes(*load_diabetes(return_X_y=True))
        >>> print(worth.verdict[:47])
        It makes no difference that these data show: 0.
    """
    check_aligned(X=X, y=y)
    names, X = names_of(X), check_array("X", X, ("rows", "columns"))
    y = check_array("y", y, (len(X),))
    expect(X.shape[1], "X", "at least one column", "none")
    folds, seed = check_count("num_folds", num_folds, 2), check_count("seed", seed, 0)
    least = max(2 * folds, 6)
    expect(len(y) >= least, "X", f"at least {least} rows", len(y))
    level, guides = check_share("level", level), check_flag("guides", guides)
    expect(np.ptp(y) > 0, "y", "numbers that differ", f"{y[0]} only")
    generator = np.random.default_rng(seed)
    if test is None:
        parts = _parts(len(y), folds, generator)
        told, order = f"{folds} folds", np.concatenate(parts).argsort()
        splits = [Split(*_without(X, y, part), X[part], y[part]) for part in parts]
    else:
        pair = isinstance(test, (list, tuple)) and len(test) == 2
        expect(pair, "test", "a pair (X, y)", f"{test!r:.60}", TypeError)
        check_aligned(" of test", X=test[0], y=test[1])
        new = check_array("test", test[0], ("rows", X.shape[1]))
        check_columns("test", names_of(test[0]), names)
        expect(len(new), "test", "at least one row", "none")
        splits = [Split(X, y, new, check_array("test", test[1], (len(new),)))]
        told, order = f"{len(new)} others held out", np.arange(len(new))
    found: dict[str, list[Method]] = {}
    shares, held_out = [], []
    for index, split in enumerate(splits):
        inner = _parts(len(split.y), folds, generator)
        methods = _points(split, inner, level)
        methods[FULL], share = _full(split, level)
        if guides:
            methods |= _guided(split, level, seed + index)
        shares.append(share)
        held_out.append(_held_out(split))
        for name, method in methods.items():
            found.setdefault(name, []).append(method)
    whole = {n: _joined(many, order) for n, many in found.items() if len(many) == len(splits)}
    parts = _parts(len(y), folds, generator) if test is None else inner
    path = _path(X, y, np.hstack(held_out).mean(1), parts)
    return Worth(
        whole,
        path,
        float(np.mean(np.concatenate(shares))),
        len(y),
        X.shape[1],
        f"{told}; each method standardises by its training part",
        level,
        tuple(name for name in POINTS if name not in whole),
    )


@dataclass(frozen=True, eq=False)
class Split:
    """Data to learn from, `(rows, columns)` and `(rows,)`, and others to predict."""

    X: Array
    y: Array
    new: Array
    target: Array

    @cached_property
    def ridge(self) -> Ridge:
        """The ridge regressions of the first, in whose units all is standardised."""
        return Ridge.of(self.X, self.y)

    @property
    def spread(self) -> float:
        """The sd of y."""
        return float(self.ridge.units.spread[-1])

    def standardized(self) -> tuple[Array, Array, Array, Array]:
        """All four in the units of the first two."""
        pairs = (self.X, self.y), (self.new, self.target)
        first, others = (self.ridge.units.standardize(np.column_stack(pair)) for pair in pairs)
        return first[:, :-1].copy(), first[:, -1].copy(), others[:, :-1], others[:, -1]


def _parts(rows: int, count: int, generator: np.random.Generator) -> list[Integers]:
    return np.array_split(generator.permutation(rows), count)


def _without(X: Array, y: Array, part: Integers) -> tuple[Array, Array]:
    return np.delete(X, part, 0), np.delete(y, part)


def _normal(y: Array, mean: Array, sd: Any, level: float) -> Method:
    """The scores of Normal predictions."""
    z = (y - mean) / sd
    logs = -(z**2) / 2 - np.log(sd) - np.log(2 * np.pi) / 2
    return Method(logs, y - mean, np.abs(z) <= special.ndtri((1 + level) / 2))


def _chosen(
    ridge: Ridge, X: Array, y: Array, parts: list[Integers]
) -> dict[str, tuple[float, float]]:
    """Method -> its penalty and noise sd; least squares only where rows are left for the noise."""
    grid, none = ridge.penalties, np.zeros(1)
    found = {}
    free = len(y) - 1 - len(ridge.singular)
    if free > 0:
        residual = ridge.errors(none)[0]
        found["least squares"] = 0.0, float(np.sqrt((residual**2).sum() / free))
    log_evidence, noise = ridge.evidence(grid)
    best = log_evidence.argmax()
    found["ridge by evidence"] = float(grid[best]), float(noise[best])
    ways = (ridge.errors(grid)[1] ** 2).mean(1), squared_errors(X, y, grid, parts)
    for name, squares in zip(POINTS[2:], ways, strict=True):
        best = squares.argmin()
        found[name] = float(grid[best]), float(np.sqrt(squares[best]))
    return found


def _points(split: Split, parts: list[Integers], level: float) -> dict[str, Method]:
    ridge, new, target = split.ridge, split.new, split.target
    found = {}
    for name, (penalty, noise) in _chosen(ridge, split.X, split.y, parts).items():
        exact = "numbers that are no exact function of the columns of X"
        expect(noise > 1e-9 * split.spread, "y", exact, f"a noise of {noise:.1e}")
        mean = ridge.predict(new, np.array([penalty]))[0]
        found[name] = _normal(target, mean, noise, level)
        if name == "ridge by evidence":
            sd = noise * np.sqrt(1 + ridge.spread(new, penalty))
            posterior = _normal(target, mean, sd, level)
    return {**found, BY_EVIDENCE: posterior}


def _full(split: Split, level: float) -> tuple[Method, Array]:
    """The scores of the full posterior, and the share of variances that is of the line."""
    X, y, new, target = split.standardized()
    posterior = exact_posterior(X, y, intercept=True, **PRIORS)
    prediction = posterior.predict(new)
    mixture = Combinations.of_rows(
        posterior.problem, posterior.hyper.thinned(), prediction.rows, prediction.noise
    )
    method = Method(
        mixture.log_prob(target)[0] - np.log(split.spread),
        split.spread * (target - prediction.mean),
        np.abs(mixture.cdf(target) - 0.5) <= level / 2,
    )
    return method, (prediction.epistemic_sd / prediction.sd) ** 2


def _guided(split: Split, level: float, seed: int) -> dict[str, Method]:
    """The scores of guides of the regression of standardised data about their means."""
    X, y, new, target = split.standardized()
    grid = split.ridge.penalties
    log_evidence, noises = split.ridge.evidence(grid)
    best = log_evidence.argmax()
    scale = noises[best] / split.spread / np.sqrt(grid[best])
    priors: dict[str, Any] = {
        "mean field": dist.Normal(0.0, scale),
        "horseshoe, mean field": Horseshoe(),
    }
    found = {}
    for name, prior in priors.items():
        model = LinearRegression(X.shape[1], weight=prior, noise=PRIORS["noise"])
        guide = FamilyGuide(model, mean_scale)
        data = torch.from_numpy(X), torch.from_numpy(y)
        with warnings.catch_warnings():  # the note says what they would
            warnings.simplefilter("ignore", NotConverged)
            warnings.simplefilter("ignore", NarrowFamily)
            note = fit(model, guide, data, seed=seed, progress=False).verdict
        drawn = draw_latents(guide, data, _DRAWS, seed)
        means, noise = drawn["weight"] @ new.T, drawn["noise"][:, None]
        z = (target - means) / noise
        logs = special.logsumexp(-(z**2) / 2 - np.log(noise), 0) - np.log(2 * np.pi) / 2
        found[name] = Method(
            logs - np.log(_DRAWS * split.spread),
            split.spread * (target - means.mean(0)),
            np.abs(special.ndtr(z).mean(0) - 0.5) <= level / 2,
            note,
        )
    return found


def _held_out(split: Split) -> Array:
    """Log densities of new data along the path, shape `(k, rows)`."""
    ridge = split.ridge
    noise = np.sqrt((ridge.errors(ridge.penalties)[1] ** 2).mean(1, keepdims=True))
    means = ridge.predict(split.new, ridge.penalties)
    return -(((split.target - means) / noise) ** 2) / 2 - np.log(noise) - np.log(2 * np.pi) / 2


def _path(X: Array, y: Array, held_out: Array, parts: list[Integers]) -> RidgePath:
    ridge, rows = Ridge.of(X, y), len(y)
    grid = ridge.penalties
    training, left_out = (
        -(np.log(2 * np.pi * (errors**2).mean(1)) + 1) / 2 for errors in ridge.errors(grid)
    )
    evidence = ridge.evidence(grid)[0] / rows
    evidence += left_out[-1] - evidence[-1]
    chosen = {name: penalty / rows for name, (penalty, _) in _chosen(ridge, X, y, parts).items()}
    return RidgePath(grid / rows, training, left_out, evidence, held_out, chosen)


def _joined(methods: list[Method], order: Integers) -> Method:
    """The scores of all folds, in the order of the rows."""
    logs, errors, inside = (
        np.concatenate([method[part] for method in methods])[order] for part in range(3)
    )
    return Method(logs, errors, inside, methods[0].note)
