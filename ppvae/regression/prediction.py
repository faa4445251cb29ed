"""What a posterior predicts for new rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ppvae._checks import check_array, check_count, check_flag, check_share
from ppvae.data.labels import check_aligned
from ppvae.regression.combinations import Combinations
from ppvae.regression.hyper import HyperPosterior, Problem, make_problem
from ppvae.regression.priors import Array, Seed
from ppvae.regression.quantiles import check_levels
from ppvae.regression.sampling import draw, generator_of


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    r"""The posterior predictive distribution of new data, exactly: a mixture of Gaussians for each.

    What is not known of the line (epistemic) and the noise around it are told apart: the variance
    of a new y is the sum of their squared sds. Moments that do not exist are `nan` for means and
    `inf` for sds. `ExactPosterior.predict` makes it.

    Args:
        problem: the data and the priors.
        hyper: the posterior of noise and scale.
        rows: X with the column of ones, shape `(rows, columns)`.
        offset: of the linear predictor, shape `(rows,)`.
        noise: noise sds relative to that of a row of weight one, shape `(rows,)`.
        labels: of the rows, or None where they came without.
    """

    problem: Problem
    hyper: HyperPosterior
    rows: Array
    offset: Array
    noise: Array
    labels: Any = None

    def __repr__(self) -> str:
        count, shown = len(self.rows), slice(0, 10)
        low, high = self.interval()
        columns = {
            "mean": self.mean,
            "sd": self.sd,
            "epistemic": self.epistemic_sd,
            "noise": self.noise_sd,
            "5 %": low,
            "95 %": high,
        }
        head = f"Prediction of {count} rows"
        lines = [head, " " * 6 + "".join(f"{name:>11s}" for name in columns)]
        for row, values in enumerate(zip(*(each[shown] for each in columns.values()), strict=True)):
            lines.append(f"{row:>6d}" + "".join(f"{value:11.4g}" for value in values))
        return "\n".join([*lines, *["   ..."] * (count > 10)])

    @cached_property
    def _noisy(self) -> Combinations:
        made = Combinations.of_rows(self.problem, self.hyper, self.rows, self.noise)
        return replace(made, center=made.center + self.offset)

    @cached_property
    def _line(self) -> Combinations:
        return replace(self._noisy, noise=np.zeros(len(self.rows)))

    @cached_property
    def mean(self) -> Array:
        """Means, shape `(rows,)`."""
        return self._line.mean

    @cached_property
    def epistemic_sd(self) -> Array:
        """Sds of the line: what more data would take away, shape `(rows,)`."""
        return np.sqrt(self._line.variance)

    @cached_property
    def noise_sd(self) -> Array:
        """Roots of the expected noise variance, shape `(rows,)`."""
        only = replace(self._noisy, along=0 * self._noisy.along, unseen=0 * self._noisy.unseen)
        return np.sqrt(only.variance)

    @cached_property
    def sd(self) -> Array:
        """Sds of the new data, shape `(rows,)`."""
        return np.sqrt(self._noisy.variance)

    def interval(self, level: float = 0.9, *, line: bool = False) -> tuple[Array, Array]:
        """Central intervals of the new data, or of the line, each end of shape `(rows,)`.

        Args:
            level: how probable they are, in (0, 1).
            line: of the line alone, without the noise.

        Raises:
            TypeError, ValueError: `level` is no number in (0, 1).
        """
        level = check_share("level", level)
        of = self._line if check_flag("line", line) else self._noisy
        low, high = of.quantile(np.array([1 - level, 1 + level]) / 2)
        return low, high

    def quantile(self, q: ArrayLike) -> Array:
        """Quantiles of the new data.

        Args:
            q: probabilities between 0 and 1, a number or shape `(k,)`.

        Returns:
            Shape `(rows,)` for a number, `(k, rows)` for several.

        Raises:
            TypeError, ValueError: they are no numbers between 0 and 1.
        """
        levels, several = check_levels(q)
        table = self._noisy.quantile(levels)
        return table if several else table[0]

    def cdf(self, y: ArrayLike) -> Array:
        """How probable it is that each new datum is below y, shape `(rows,)`, to some 1e-15.

        Args:
            y: shape `(rows,)`.

        Raises:
            TypeError, ValueError: they are no finite numbers, one for each row, or have labels
                that are not those of X.
        """
        return self._noisy.cdf(self._values(y))

    def log_prob(self, y: ArrayLike) -> Array:
        """Log predictive densities, in nats per datum, shape `(rows,)`.

        Args:
            y: shape `(rows,)`.

        Raises:
            TypeError, ValueError: they are no finite numbers, one for each row, or have labels
                that are not those of X.
        """
        values = self._values(y)
        logs, exact = self._noisy.log_prob(values)
        for i in np.flatnonzero(~exact):
            logs[i] = self._with_datum(int(i), values[i])
        return logs

    def _with_datum(self, i: int, y: float) -> float:
        """The log density of one datum by the evidence that the data have with it."""
        problem = self.problem
        row = np.append(self.rows[i], y - self.offset[i]) / self.noise[i]
        more = problem.factor.followed_by(row[None], np.log(self.noise[i]))
        return (
            make_problem(more, problem.weight, problem.numbers).integrate().log_total
            - self.hyper.log_total
        )

    def sample(self, num_samples: int, seed: Seed = None, *, line: bool = False) -> Array:
        """Independent draws of all the new data together, shape `(num_samples, rows)`.

        Args:
            num_samples: number of draws, at least 0.
            seed: a seed or a NumPy generator; no global random state is used.
            line: of the line alone, without the noise.

        Raises:
            TypeError, ValueError: as for `ExactPosterior.sample`.
        """
        generator = generator_of(seed)
        size = check_count("num_samples", num_samples, 0)
        drawn = draw(self.problem, self.hyper, size, generator)
        lines = drawn["weight"] @ self.rows.T + self.offset
        if check_flag("line", line):
            return lines
        return lines + drawn["noise"][:, None] * self.noise * generator.standard_normal(lines.shape)

    def _values(self, y: ArrayLike) -> Array:
        check_aligned("", self.labels, y=y)
        return check_array("y", y, (len(self.rows),))
