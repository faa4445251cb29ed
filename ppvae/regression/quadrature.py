r"""One-dimensional integrals of densities that are known up to a constant.

An integrand on the line is followed outwards from its modes to where it no longer counts, that
range is cut into panels, and a panel is halved until its Legendre series has converged (Gauss-
Legendre nodes; Trefethen, *Is Gauss quadrature better than Clenshaw-Curtis?*, 2008). The series
also gives the distribution function and, by Newton steps, its inverse.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.polynomial import legendre

from ppvae.regression.roots import increasing_root

# Logs of positive numbers are kept within this, so that their squares are floats.
LIMIT = 300.0
_ORDER = 20
_POINTS, _WEIGHTS = legendre.leggauss(_ORDER)
# Values at the nodes -> coefficients of the Legendre series through them.
_TO_SERIES = legendre.legvander(_POINTS, _ORDER - 1).T * _WEIGHTS
_TO_SERIES *= (np.arange(_ORDER) + 0.5)[:, None]
_TOLERANCE = 1e-12

Integrands = Callable[[np.ndarray], np.ndarray]


class Quadrature:
    r"""The integrals of some functions on the line, and the first one's distribution.

    Args:
        edges: ends of the panels, ascending, shape `(panels + 1,)`.
        log_values: logs of the integrands at the nodes, shape `(panels, order, integrands)`.

    Attributes:
        nodes: abscissas, shape `(panels, order)`, ascending.
        log_weights: logs of the probabilities that the first integrand puts on the nodes.
        log_totals: log integrals, shape `(integrands,)`.
    """

    def __init__(self, edges: np.ndarray, log_values: np.ndarray) -> None:
        self.edges = edges
        self.nodes, measure = _panel_nodes(edges[:-1], edges[1:])
        peaks = _peaks(log_values.reshape(-1, log_values.shape[-1]))
        values = np.exp(log_values - peaks)
        totals = np.einsum("pk,pkm->m", measure, values)
        self.log_totals = peaks + np.log(totals)
        self.log_weights = np.log(measure) + log_values[..., 0] - self.log_totals[0]
        widths = np.diff(edges) / 2
        self._density = _TO_SERIES @ (values[..., 0].T * widths / totals[0])
        self._integral = legendre.legint(self._density, lbnd=-1)
        steps = legendre.legval(1.0, self._integral)
        self._below = np.concatenate([[0.0], np.cumsum(steps)])

    def distribution(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The probability below each point, and the density there."""
        inside = (points >= self.edges[0]) & (points <= self.edges[-1])
        points = np.clip(points, self.edges[0], self.edges[-1])
        panel, x = self.locate(points)
        below = self._below[panel] + legendre.legval(x, self._integral[:, panel], tensor=False)
        density = legendre.legval(x, self._density[:, panel], tensor=False)
        widths = (self.edges[panel + 1] - self.edges[panel]) / 2
        return below / self._below[-1], inside * density / widths

    def inverse(self, probabilities: np.ndarray) -> np.ndarray:
        """The points with these probabilities below them, by bracketed Newton steps."""
        target = np.asarray(probabilities) * self._below[-1]
        panel = np.searchsorted(self._below, target, side="right") - 1
        panel = np.clip(panel, 0, len(self.edges) - 2)
        integral, density = self._integral[:, panel], self._density[:, panel]
        size = np.maximum(target, 1e-300)
        target = target - self._below[panel]

        def residual(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            value = legendre.legval(x, integral, tensor=False) - target
            return value / size, legendre.legval(x, density, tensor=False) / size

        x = increasing_root(residual, np.full(target.shape, -1.0), np.ones(target.shape))
        low, high = self.edges[panel], self.edges[panel + 1]
        return low + (high - low) * (x + 1) / 2

    def locate(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The panel of each point, and its place there on [-1, 1]."""
        panel = np.clip(np.searchsorted(self.edges, points) - 1, 0, len(self.edges) - 2)
        low, high = self.edges[panel], self.edges[panel + 1]
        return panel, 2 * (points - low) / (high - low) - 1

    @staticmethod
    def interpolation(x: np.ndarray) -> np.ndarray:
        """Weights that carry values at the nodes of a panel to places x on it, `(x, order)`."""
        return legendre.legvander(x, _ORDER - 1) @ _TO_SERIES


def integrate(
    log_integrands: Integrands,
    *,
    center: float = 0.0,
    lower: float = -LIMIT,
    upper: float = LIMIT,
    drop: float = 45.0,
) -> Quadrature:
    r"""Integrates positive functions over a line, all on the same nodes.

    Args:
        log_integrands: maps points `(k,)` to logs `(k, integrands)`; minus infinity is allowed.
        center: where to look first.
        lower: lower end of the line.
        upper: upper end of the line.
        drop: the integrands are followed down to `exp(-drop)` of their highest value.

    Raises:
        ValueError: an integrand is nowhere positive.
    """
    grid, values = _scan(log_integrands, center, lower, upper, drop)
    finite = np.isfinite(values).any(0)
    if not finite.all():
        raise ValueError("the density of the posterior is zero wherever it was looked at")
    modes = []
    for column in range(values.shape[1]):
        modes += _modes(log_integrands, grid, values, column, drop)
    tops = _peaks(np.vstack([values, log_integrands(np.array(modes))]))
    low = _edge(log_integrands, grid, min(modes), tops - drop)
    high = _edge(log_integrands, grid[::-1], max(modes), tops - drop)
    return _refine(log_integrands, np.unique([low, *modes, high]), tops)


def _scan(
    f: Integrands, center: float, lower: float, upper: float, drop: float
) -> tuple[np.ndarray, np.ndarray]:
    """A grid wide enough to see all of the integrands, and their values on it."""
    center = float(np.clip(center, lower, upper))
    left, right = max(lower, center - 20), min(upper, center + 20)
    grid = np.linspace(left, right, 81)
    values = f(grid)
    while True:
        floor = _peaks(values) - drop
        pieces = []
        if left > lower and not np.all(values[0] < floor):
            left, end = max(lower, left - 40), left
            pieces.append(np.linspace(left, end, 80, endpoint=False))
        if right < upper and not np.all(values[-1] < floor):
            right, end = min(upper, right + 40), right
            pieces.append(np.linspace(right, end, 80, endpoint=False))
        if not pieces:
            return grid, values
        new = np.concatenate(pieces)
        grid, values = np.concatenate([grid, new]), np.vstack([values, f(new)])
        order = np.argsort(grid)
        grid, values = grid[order], values[order]


def _modes(
    f: Integrands, grid: np.ndarray, values: np.ndarray, column: int, drop: float
) -> list[float]:
    """The modes of one integrand that count, to within a fraction of their width."""
    h = values[:, column]
    padded = np.concatenate([[-np.inf], h, [-np.inf]])
    local = np.isfinite(h) & (h >= padded[:-2]) & (h >= padded[2:])
    found = []
    for i in sorted(np.flatnonzero(local).tolist(), key=lambda i: -float(h[i]))[:8]:
        low, high = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
        for _ in range(12):
            points = np.linspace(low, high, 17)
            around = f(points)[:, column]
            best = int(np.argmax(around))
            below, above = max(best - 1, 0), min(best + 1, 16)
            low, high = points[below], points[above]
            if around[best] - min(around[below], around[above]) < 0.5:
                break
        found.append((around[best], points[best]))
    top = max(found)[0]
    return [float(point) for value, point in found if value > top - drop]


def _edge(f: Integrands, grid: np.ndarray, mode: float, floor: np.ndarray) -> float:
    """Where, between the first grid point and a mode, an integrand starts to count."""
    direction = np.sign(mode - grid[0])
    path = grid[(mode - grid) * direction > 0]
    if not len(path):
        return float(grid[0])
    counts = np.append((f(path) > floor).any(1), True)
    path = np.append(path, mode)
    first = int(np.argmax(counts))
    if first == 0:
        return float(path[0])
    outside, inside = path[first - 1], path[first]
    for _ in range(12):
        points = np.linspace(outside, inside, 17)
        values = f(points)
        first = max(1, int(np.argmax((values > floor).any(1))))
        outside, inside = points[first - 1], points[first]
        if (values[first - 1] > floor - 10).any():
            break
    return float(outside)


_MOST_PANELS = 100_000


def _refine(f: Integrands, edges: np.ndarray, tops: np.ndarray) -> Quadrature:
    """Halves panels until the Legendre series of every integrand has converged on each."""
    tolerance = max(_TOLERANCE, 20 * np.finfo(float).eps * (1 + np.abs(tops).max()))
    low, high = edges[:-1], edges[1:]
    done_low, done_high, done_values = [], [], []
    finished = np.zeros(len(tops))
    while len(low):
        if len(low) > _MOST_PANELS:
            raise ArithmeticError(
                f"the quadrature did not converge: more than {_MOST_PANELS} panels at a time"
            )
        nodes, measure = _panel_nodes(low, high)
        log_values = f(nodes.ravel()).reshape(*nodes.shape, -1)
        values = np.exp(log_values - tops)
        pieces = np.einsum("pk,pkm->pm", measure, values)
        tail = np.abs(np.einsum("ck,pkm->cpm", _TO_SERIES[-3:], values)).max(0)
        error = tail * (high - low)[:, None]
        total = finished + pieces.sum(0)
        good = (error <= tolerance * total).all(1)
        good |= high - low <= 1e-13 * np.maximum(1.0, np.abs(low))
        done_low.append(low[good])
        done_high.append(high[good])
        done_values.append(log_values[good])
        finished = finished + pieces[good].sum(0)
        low, high = low[~good], high[~good]
        middle = (low + high) / 2
        low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
    low, high = np.concatenate(done_low), np.concatenate(done_high)
    order = np.argsort(low)
    edges = np.append(low[order], high[order][-1])
    return Quadrature(edges, np.concatenate(done_values)[order])


def _panel_nodes(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = (high - low)[:, None] / 2
    return low[:, None] + half * (_POINTS + 1), half * _WEIGHTS


def _peaks(log_values: np.ndarray) -> np.ndarray:
    """The highest values by column, where there is one; zero stands for none."""
    top = log_values.max(0)
    return np.where(np.isfinite(top), top, 0.0)
