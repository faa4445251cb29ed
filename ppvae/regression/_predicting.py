"""Predictions of an exact posterior: for each row a mixture of Normals, without Monte Carlo."""

from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import pyro
import torch
from scipy import special
from torch import Tensor

from ppvae._scopes import eval_mode, private_modules
from ppvae.guides import FamilyGuide
from ppvae.regression.exact import ExactPosterior
from ppvae.regression.hyper import mixture_quantiles
from ppvae.regression.linear_algebra import pieces
from ppvae.regression.priors import Array

# Points of the posterior of noise and scale that together have less than this are left out.
_NEGLIGIBLE = 1e-15


class Prediction(NamedTuple):
    """The predictive distribution of each row, a mixture over the posterior of noise and scale.

    Attributes:
        shares: probabilities of the components, shape `(components,)`.
        means: shape `(components, rows)`.
        spreads: variances of the line given a component, shape `(components, rows)`.
        noises: variances of the noise, shape `(components, 1)`.
    """

    shares: Array
    means: Array
    spreads: Array
    noises: Array

    @property
    def mean(self) -> Array:
        """Shape `(rows,)`."""
        return self.shares @ self.means

    @property
    def variances(self) -> Array:
        """Of new data given a component, shape `(components, rows)`."""
        return self.spreads + self.noises

    @property
    def epistemic_sd(self) -> Array:
        """What is unknown of the line, shape `(rows,)`: more data make it smaller."""
        return np.sqrt(self.shares @ (self.spreads + (self.means - self.mean) ** 2))

    @property
    def noise_sd(self) -> Array:
        """That of the noise, a root mean square over its posterior, shape `(rows,)`."""
        return np.broadcast_to(np.sqrt(self.shares @ self.noises), self.means.shape[1:])

    @property
    def sd(self) -> Array:
        """Of new data, shape `(rows,)`."""
        return np.hypot(self.epistemic_sd, self.noise_sd)

    def interval(self, level: float = 0.9) -> tuple[Array, Array]:
        """Ends of the central interval, each of shape `(rows,)`."""
        levels = np.array([1 - level, 1 + level]) / 2
        low, high = mixture_quantiles(self.shares, self.means, np.sqrt(self.variances), levels)
        return low, high

    def cdf(self, y: Array) -> Array:
        """Probability of less than y, shape `(rows,)`."""
        return self.shares @ special.ndtr((y - self.means) / np.sqrt(self.variances))

    def log_prob(self, y: Array) -> Array:
        """Log density of y, in nats, shape `(rows,)`."""
        logs = -(((y - self.means) ** 2) / self.variances + np.log(2 * np.pi * self.variances)) / 2
        return special.logsumexp(logs, 0, b=self.shares[:, None])


def predict_rows(posterior: ExactPosterior, X: Array) -> Prediction:
    """Predicts rows of shape `(rows, columns)`, without the column of ones."""
    problem, hyper = posterior.problem, posterior.hyper
    gaussian = problem.gaussian
    design = np.column_stack([*[np.ones(len(X))] * problem.factor.intercept, X])
    order = np.argsort(hyper.shares)
    kept = np.sort(order[np.cumsum(hyper.shares[order]) > _NEGLIGIBLE])
    shares = hyper.shares[kept] / hyper.shares[kept].sum()
    log_noise, log_scale = (hyper.log_numbers[name][kept] for name in ("noise", "scale"))
    means = np.empty((len(kept), len(X)))
    spreads, coordinates = np.empty_like(means), gaussian.coordinates(log_noise, log_scale)
    for part in pieces(len(X), len(gaussian.loc)):
        rows = design[part] @ gaussian.basis
        means[:, part] = design[part] @ gaussian.loc + coordinates[0] @ rows.T
        spreads[:, part] = coordinates[1] @ (rows**2).T
    return Prediction(shares, means, spreads, np.exp(2 * log_noise)[:, None])


def draw_latents(
    guide: FamilyGuide, args: tuple[Tensor, ...], size: int, seed: int
) -> dict[str, Array]:
    """Draws of the latents, `(size, *event)`, that leave no trace in the streams of the caller."""
    scopes = torch.random.fork_rng(devices=[]), torch.no_grad(), private_modules(), eval_mode(guide)
    with ExitStack() as stack:
        for scope in (*scopes, pyro.plate("draws", size, dim=-2)):
            stack.enter_context(scope)
        torch.manual_seed(seed)
        values = guide(*args)
    shapes = {name: (size, *value.shape[1:]) for name, value in values.items()}
    return {
        name: values[name].expand(shape)[:, 0].detach().numpy() for name, shape in shapes.items()
    }
