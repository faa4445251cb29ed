r"""The posterior of the noise and of the prior scale, on which that of the weights depends."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ppvae.regression.priors import PositivePrior
from ppvae.regression.quadrature import Quadrature, integrate
from ppvae.regression.roots import increasing_root

# Log integrands `(k, integrands)` at logs of the noise and of the scale, each `(k,)`; the first is
# the joint density of the data and the two logs, the others only have to be resolved as well.
LogJoint = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Unknown(NamedTuple):
    """A positive number: known, or with a prior.

    Attributes:
        value: its log, if it is known; otherwise where to look for it first.
        prior: its prior; None if it is known.
    """

    value: float
    prior: PositivePrior | None

    @property
    def known(self) -> bool:
        """Whether the number is known."""
        return self.prior is None


class HyperPosterior:
    r"""A posterior of noise and scale as weighted nodes, which makes the rest a finite mixture.

    Both unknown, the quadrature over the scale is the outer one: at each of its nodes the noise has
    a quadrature of its own.

    Attributes:
        log_noise: logs of the noise at the nodes, shape `(nodes,)`.
        log_scale: logs of the prior scale.
        log_weights: logs of their probabilities.
        log_totals: log integrals, shape `(integrands,)`.
    """

    def __init__(
        self, noise: Unknown, scale: Unknown, outer: Quadrature | None, inner: list[Quadrature]
    ) -> None:
        self._noise, self._scale, self._outer, self._inner = noise, scale, outer, inner
        first = outer or inner[0]
        self.log_totals = first.log_totals
        nodes, self.log_weights = first.nodes.ravel(), first.log_weights.ravel()
        if outer is None:
            known = noise if noise.known else scale
            others = np.full(len(nodes), known.value)
            pair = (others, nodes) if noise.known else (nodes, others)
        else:
            sizes = [quadrature.nodes.size for quadrature in inner]
            pair = (np.concatenate([q.nodes.ravel() for q in inner]), np.repeat(nodes, sizes))
            within = np.concatenate([q.log_weights.ravel() for q in inner])
            self.log_weights = np.repeat(self.log_weights, sizes) + within
        self.log_noise, self.log_scale = pair

    def noise_quantile(self, probabilities: np.ndarray) -> np.ndarray:
        """Quantiles of the noise, which must be unknown."""
        if self._outer is None:
            return np.exp(self._inner[0].inverse(probabilities))
        shares = np.exp(self._outer.log_weights.ravel())
        inner = [(w, q) for w, q in zip(shares, self._inner, strict=True) if w > 1e-17]
        low = np.full(probabilities.shape, min(q.edges[0] for _, q in inner))
        high = np.full(probabilities.shape, max(q.edges[-1] for _, q in inner))

        def residual(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            parts = [
                (w * value, w * slope) for w, q in inner for value, slope in [q.distribution(u)]
            ]
            value, slope = np.sum(parts, axis=0)
            return value / probabilities - 1, slope / probabilities

        return np.exp(increasing_root(residual, low, high))

    def scale_quantile(self, probabilities: np.ndarray) -> np.ndarray:
        """Quantiles of the prior scale, which must be unknown."""
        return np.exp((self._outer or self._inner[0]).inverse(probabilities))

    def sample(self, size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Independent draws of the logs of noise and scale, by inverse distribution functions."""
        first, second = generator.random((2, size))
        if self._outer is None:
            drawn = self._inner[0].inverse(first)
            known = np.full(size, (self._noise if self._noise.known else self._scale).value)
            return (known, drawn) if self._noise.known else (drawn, known)
        log_scale = self._outer.inverse(first)
        panels, places = self._outer.locate(log_scale)
        log_noise = np.empty(size)
        order = self._outer.nodes.shape[1]
        for panel in np.unique(panels):
            here = panels == panel
            # The quantile at a fixed probability is a smooth function of the scale.
            inner = self._inner[panel * order : (panel + 1) * order]
            values = np.stack([q.inverse(second[here]) for q in inner], -1)
            log_noise[here] = (Quadrature.interpolation(places[here]) * values).sum(-1)
        return log_noise, log_scale


class _Known(HyperPosterior):
    """Noise and scale are both known: one node."""

    def __init__(self, noise: Unknown, scale: Unknown, log_totals: np.ndarray) -> None:
        self.log_noise, self.log_scale = np.array([noise.value]), np.array([scale.value])
        self.log_weights, self.log_totals = np.zeros(1), log_totals

    def sample(self, size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return np.full(size, self.log_noise[0]), np.full(size, self.log_scale[0])


def hyper_posterior(
    log_joint: LogJoint, noise: Unknown, scale: Unknown, *, drop: float = 45.0
) -> HyperPosterior:
    r"""Integrates over the noise, the prior scale, or both.

    Args:
        log_joint: the log integrands (see `LogJoint`).
        noise: the noise sd.
        scale: the factor of the prior sds.
        drop: see `integrate`.
    """
    if noise.known and scale.known:
        value = log_joint(np.array([noise.value]), np.array([scale.value]))[0]
        return _Known(noise, scale, value)

    def over(unknown: Unknown, function: Callable[[np.ndarray], np.ndarray]) -> Quadrature:
        assert unknown.prior is not None
        return integrate(
            function,
            center=unknown.value,
            lower=unknown.prior.lower,
            upper=unknown.prior.upper,
            drop=drop,
        )

    def over_noise(log_scale: float) -> Quadrature:
        return over(noise, lambda u: log_joint(u, np.full(len(u), log_scale)))

    if scale.known:
        return HyperPosterior(noise, scale, None, [over_noise(scale.value)])
    if noise.known:
        found = over(scale, lambda v: log_joint(np.full(len(v), noise.value), v))
        return HyperPosterior(noise, scale, None, [found])
    cache: dict[float, Quadrature] = {}

    def integrated(log_scales: np.ndarray) -> np.ndarray:
        for value in log_scales.tolist():
            if value not in cache:
                cache[value] = over_noise(value)
        return np.stack([cache[value].log_totals for value in log_scales.tolist()])

    outer = over(scale, integrated)
    return HyperPosterior(noise, scale, outer, [cache[v] for v in outer.nodes.ravel().tolist()])
