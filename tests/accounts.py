"""Accounts, and what they are held against: sums of their rows, and integrals over a grid."""

import math

import pyro.distributions as dist
import torch
from linear import close
from scipy.optimize import minimize

from ppvae import account

LADDER = ("noise_only", "mean_only", "mean_scale", "full_rank")
ROWS = ["noise", "prior_cost", "mean_channel", "scale_channel", "correlations", "beyond_gaussian"]


def measure(model, guide, *args, **options):
    return account(model, guide, *args, **{"num_steps": 45, "progress": False} | options).dataset


def row(found, name):
    return found.nats.sel(row=name).values


def sums(found, end, bound=1e-9):
    """Whether the rows sum to log p(x), and on to an end."""
    inside = found.where(found.summed, drop=True)
    last = inside.end.values.tolist().index("log p(x)")
    half = inside.nats.isel(row=slice(last + 1)).sum("row")
    return close(half, found.log_likelihood, bound) and close(inside.nats.sum("row"), end, bound)


class Grid:
    """A latent of one dimension, all integrals over which are sums over a grid."""

    def __init__(self, log_joint, log_likelihood, reach=12.0):
        self.z = torch.linspace(-reach, reach, 6001)
        self.width = float(self.z[1] - self.z[0])
        self.joint, self.likelihood = log_joint(self.z), log_likelihood(self.z)  # (data, grid)
        self.log_p = self.joint.logsumexp(-1) + math.log(self.width)
        self.posterior = torch.softmax(self.joint, -1)

    @property
    def noise(self):
        return (self.posterior * self.likelihood).sum(-1)

    def elbo(self, datum, loc, scale):
        log_q = dist.Normal(loc, scale).log_prob(self.z)
        q = torch.softmax(log_q, -1)
        return float((q * (self.joint[datum] - log_q)).sum())

    def best(self, datum, start, scale=None):
        """The ELBO of the best Gaussian, or of the best one of a fixed scale."""

        def loss(raw):
            return -self.elbo(datum, raw[0], math.exp(raw[1]) if scale is None else scale)

        first = [start, -0.5] if scale is None else [start]
        return -minimize(loss, first, method="Nelder-Mead", options={"xatol": 1e-5}).fun
