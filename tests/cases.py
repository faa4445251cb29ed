"""The registry: every generic test runs over these families, likelihoods and models."""

import builtins
import itertools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from scipy import special, stats
from torch import nn

from ppvae import Family, families, likelihoods, priors
from ppvae.nn import mlp

LONG = "PPVAE_LONG" in os.environ  # as `.ci/long` sets it


def in_turn(rows, columns, each):
    """Pairs: each row with so many columns, which take turns; in the long form with all of them."""
    turns = itertools.cycle(columns)
    return [(row, next(turns)) for row in rows for _ in range(len(columns) if LONG else each)]


FAMILIES: dict[str, Any] = {
    **families.LADDER,
    "asymmetric_laplace": Family(dist.AsymmetricLaplace),
    "half_scale": Family(dist.Normal, scale=0.5),
    "bounded": Family(dist.Normal, loc=constraints.interval(-1.0, 1.0), scale=1.0),
    "shared_cholesky": Family(dist.MultivariateNormal, scale_tril=families.shared),
    "big_flow": families.Flow(layers=4, hidden=8, bins=4),
}

DENSITIES = {name: f for name, f in FAMILIES.items() if name not in ("deterministic", "zero")}


class Likelihood(NamedTuple):
    """One kind of data: how to make the likelihood, data for it, and its density written out."""

    make: Callable[[], Any]
    draw: Callable[..., torch.Tensor]
    log_prob: Callable[..., torch.Tensor]


def _gauss(scale):
    return lambda out, x: dist.Normal(out, torch.as_tensor(scale)).log_prob(x)


def _by(log_p, outputs=1):
    """A density that SciPy has, of as many numbers of the decoder per column."""

    def log_prob(out, x):
        numbers = np.split(out.detach().double().numpy(), outputs, -1)
        return torch.as_tensor(log_p(x.double().numpy(), *numbers)).to(out.dtype)

    return log_prob


def _grey(x, logit):
    """Of the density C p^x (1 - p)^(1 - x) on [0, 1]; its integral is (2 p - 1) / logit(p)."""
    p = special.expit(logit)
    return x * np.log(p) + (1 - x) * np.log1p(-p) + np.log(logit / (2 * p - 1))


def _grades(x, place):
    """Four grades, whose thresholds start at the quarters of a logistic distribution."""
    ends = np.array([-np.inf, *special.logit([0.25, 0.5, 0.75]), np.inf])
    code = x.astype(int)
    return np.log(special.expit(ends[code + 1] - place) - special.expit(ends[code] - place))


def _mixed(out, x):
    """Two columns of a Normal, one of ones, and one of three categories, of the third one."""
    a, b = _gauss(0.3)(out[..., :2], x[..., [1, 3]]).unbind(-1)
    one, third = -nn.functional.softplus(-out[..., 2]), out[..., 3:].log_softmax(-1)[..., 2]
    return torch.stack([one, a, third, b], -1)


WIDTHS = [0.1, 0.2, 0.3, 0.4]  # one for each of four features

LIKELIHOODS = {
    "bernoulli": Likelihood(
        likelihoods.Bernoulli, torch.ones, lambda out, x: out - nn.functional.softplus(out)
    ),
    "poisson": Likelihood(
        likelihoods.Poisson,
        lambda *shape: torch.full(shape, 3.0),
        lambda out, x: 3 * out - out.exp() - math.log(6),
    ),
    "normal": Likelihood(lambda: likelihoods.Normal(0.3), torch.randn, _gauss(0.3)),
    "learned": Likelihood(lambda: likelihoods.Normal(0.3, learned=True), torch.randn, _gauss(0.3)),
    "per feature": Likelihood(
        lambda: likelihoods.Normal(torch.tensor(WIDTHS), learned=True), torch.randn, _gauss(WIDTHS)
    ),
    "per datum": Likelihood(
        lambda: likelihoods.Normal(0.3, per_datum=True),
        torch.randn,
        _by(lambda x, a, b: stats.norm.logpdf(x, a, 0.3 * np.exp(b)), 2),
    ),
    "laplace": Likelihood(
        lambda: likelihoods.Laplace(0.3, learned=True),
        torch.randn,
        _by(lambda x, a: stats.laplace.logpdf(x, a, 0.3)),
    ),
    "log normal": Likelihood(
        lambda: likelihoods.LogNormal(0.3, learned=True),
        lambda *shape: torch.randn(*shape).exp(),
        _by(lambda x, a: stats.lognorm.logpdf(x, 0.3, scale=np.exp(a))),
    ),
    "student": Likelihood(
        lambda: likelihoods.StudentT(3.0, scale=0.3, learned=True),
        torch.randn,
        _by(lambda x, a: stats.t.logpdf(x, 3.0, a, 0.3)),
    ),
    "student per datum": Likelihood(
        lambda: likelihoods.StudentT(scale=0.3, per_datum=True),
        torch.randn,
        _by(lambda x, a, b, c: stats.t.logpdf(x, 2 + np.log1p(np.exp(c)), a, 0.3 * np.exp(b)), 3),
    ),
    "grey": Likelihood(likelihoods.ContinuousBernoulli, torch.rand, _by(_grey)),
    "beta": Likelihood(
        lambda: likelihoods.Beta(5.0),
        lambda *shape: 0.05 + 0.9 * torch.rand(*shape),
        _by(lambda x, a: stats.beta.logpdf(x, 5 * special.expit(a), 5 * special.expit(-a))),
    ),
    "categories": Likelihood(
        lambda: likelihoods.Categorical(3),
        lambda *shape: torch.randint(3, shape).to(torch.get_default_dtype()),
        _by(lambda x, *a: np.choose(x.astype(int), special.log_softmax(np.stack(a), 0)), 3),
    ),
    "grades": Likelihood(
        lambda: likelihoods.Ordinal(4),
        lambda *shape: torch.randint(4, shape).to(torch.get_default_dtype()),
        _by(_grades),
    ),
    "counts": Likelihood(
        lambda: likelihoods.NegativeBinomial(0.7),
        lambda *shape: torch.arange(math.prod(shape)).reshape(shape) % 7.0,
        _by(lambda x, a: stats.nbinom.logpmf(x, 1 / 0.7, 1 / (1 + 0.7 * np.exp(a)))),
    ),
    "zeros": Likelihood(
        lambda: likelihoods.ZeroInflated(likelihoods.Poisson()),
        lambda *shape: torch.arange(math.prod(shape)).reshape(shape) % 4.0,
        _by(
            lambda x, a, b: np.log(
                special.expit(b) * (x == 0) + special.expit(-b) * stats.poisson.pmf(x, np.exp(a))
            ),
            2,
        ),
    ),
    "mixed": Likelihood(
        lambda: likelihoods.Mixed({(1, 3): likelihoods.Normal(0.3), 0: likelihoods.Bernoulli(),
                                   (2,): likelihoods.Categorical(3)}),
        lambda n, _: torch.tensor([[1.0, 0.5, 2.0, -0.2]]).repeat(n, 1),
        _mixed,
    ),
}  # fmt: skip


class Learned(nn.Module):
    """A prior that is a module."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self):
        return dist.Normal(self.loc, 0.8).to_event(1)


def _mixture(kind):
    parts = kind(torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), 0.7).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([1.0, 3.0])), parts)


def _of_parts(z):
    """Log density of the mixture of Normals in `_mixture`."""
    away = (z[..., None, :] - torch.tensor([[-1.0, 0.5], [1.0, 0.0]])) / 0.7
    parts = -0.5 * away.square().sum(-1) - math.log(2 * math.pi * 0.49)
    return (parts + torch.tensor([0.25, 0.75]).log()).logsumexp(-1)


def _affine():
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [dist.transforms.AffineTransform(1.0, 2.0)])


def _set(prior, **values):
    """A prior of given parameters."""
    for name, value in values.items():
        getattr(prior, name).data = torch.tensor(value)
    return prior


def _ard():
    return _set(priors.ARD(2), log_scale=[math.log(2.0), math.log(0.5)])


def _learned(full):
    prior = priors.Learned(2, "full_rank" if full else "mean_scale")
    prior.head.loc.raw.data = torch.tensor([1.0, -1.0])
    if full:  # what the triangle holds before its transform: rows, with logarithms on the diagonal
        prior.head.scale_tril.raw.data = torch.tensor([0.0, 0.5, math.log(2.0)])
    return prior


def _parts(full):
    """Two components, of weights 1/4 and 3/4."""
    prior = priors.Mixture(2, 2, full=full)
    raw = torch.tensor([0.7, 0.7]).log()
    raw = raw.diag_embed().expand(2, 2, 2) if full else raw.expand(2, 2)
    loc = [[-1.0, 0.5], [1.0, 0.0]]
    return _set(prior, logits=[0.0, math.log(3.0)], loc=loc, raw=raw.tolist())


def _tilted(z):
    """Of mean (1, -1) and the triangle ((1, 0), (0.5, 2))."""
    first = z[..., 0] - 1
    second = (z[..., 1] + 1 - 0.5 * first) / 2
    return -0.5 * (first**2 + second**2) - math.log(2 * math.pi) - math.log(2)


#: name -> how to make a prior of two latents, and its log density written out
PRIORS: dict[str, tuple[Callable[[], Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "standard": (lambda: None, lambda z: -0.5 * z.square().sum(-1) - math.log(2 * math.pi)),
    "module": (
        Learned,
        lambda z: (
            -0.5 * ((z - torch.tensor([0.5, -0.5])) / 0.8).square().sum(-1)
            - math.log(2 * math.pi * 0.64)
        ),
    ),
    "flow": (_affine, lambda z: -((z - 1).square()).sum(-1) / 8 - math.log(8 * math.pi)),
    "mixture": (lambda: _mixture(dist.Normal), _of_parts),
    "positive mixture": (
        lambda: _mixture(dist.LogNormal),
        lambda z: _of_parts(z.log()) - z.log().sum(-1),
    ),
    "learned": (
        lambda: _learned(full=False),
        lambda z: -0.5 * (z - torch.tensor([1.0, -1.0])).square().sum(-1) - math.log(2 * math.pi),
    ),
    "tilted": (lambda: _learned(full=True), _tilted),
    "relevance": (
        _ard,
        lambda z: -0.5 * (z / torch.tensor([2.0, 0.5])).square().sum(-1) - math.log(2 * math.pi),
    ),
    "learned mixture": (lambda: _parts(full=False), _of_parts),
    "full mixture": (lambda: _parts(full=True), _of_parts),
}


class Case(NamedTuple):
    model: Any
    args: tuple[Any, ...]
    encoder: Any = None
    latents: dict[str, tuple[int, ...]] = {}


N = 6


def _one(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample(
            "x", dist.Normal(z.sum(-1, keepdim=True) + torch.zeros(3), 0.5).to_event(1), obs=x
        )


def _scalar(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None] + torch.zeros(3), 0.5).to_event(1), obs=x)


def _positive(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        loc = (a.sum(-1) + b)[..., None] + torch.zeros(3)
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def _simplex(x):
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Dirichlet(torch.ones(4)))
        g = pyro.sample("g", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(s[..., :3] * g[..., None], 0.5).to_event(1), obs=x)


def _left_of_pixels(x):
    """Latents in a plate that is not the rightmost one."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("pixels", 3, dim=-1):
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)


def _right_of_steps(x):
    """Several latents per datum, in a plate to the left of the data."""
    with pyro.plate("steps", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[:, :2].T)


def _steps_inside(x):
    """Several latents per datum, in a plate to the right of the data."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("steps", 3, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def _told_rows(x, rows):
    with pyro.plate("data", 4 * N, subsample=rows):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[:, 0])


def _own_rows(x):
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x[rows, 0])


def _regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((w * x).sum(-1), s), obs=y)


def _hierarchy(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 4):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(theta.sum(-1, keepdim=True), 1.0), obs=x[:, 0])


class Encoder(nn.Module):
    """Takes whatever the model takes and looks at the first argument only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 8)

    def forward(self, x, *rest):
        return self.net(x)


def cases() -> dict[str, Case]:
    """Models with local latents (an encoder) and global ones (none)."""
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
    rows, y = torch.arange(N), x.sum(-1)
    return {
        "one vector": Case(_one, (x,), Encoder(), {"z": (N, 2)}),
        "one scalar": Case(_scalar, (x,), Encoder(), {"z": (N,)}),
        "positive": Case(_positive, (x,), Encoder(), {"a": (N, 2), "b": (N,)}),
        "simplex": Case(_simplex, (x,), Encoder(), {"s": (N, 4), "g": (N,)}),
        "left of pixels": Case(_left_of_pixels, (x,), Encoder(), {"z": (N, 1, 2)}),
        "right of steps": Case(_right_of_steps, (x,), Encoder(), {"z": (2, N, 2)}),
        "steps inside": Case(_steps_inside, (x,), Encoder(), {"z": (N, 3)}),
        "told rows": Case(_told_rows, (x, rows), Encoder(), {"z": (N, 2)}),
        "own rows": Case(_own_rows, (x,), Encoder(), {"z": (4, 2)}),
        "regression": Case(_regression, (x, y), None, {"w": (3,), "s": ()}),
        "hierarchy": Case(_hierarchy, (x,), None, {"mu": (), "theta": (4,)}),
    }


CASES = list(cases())


class Own:
    """A family that is no `GuideFamily`, and does not say its support; `kind` is made of a mean."""

    channels, joint, name = ("loc",), False, "own"

    def __init__(self, kind):
        self.kind, self.asked = kind, []

    def head(self, features, shape):
        self.asked.append(features)
        return OwnHead(self.kind, features or 1, shape)


class OwnHead(nn.Module):
    def __init__(self, kind, features, shape):
        super().__init__()
        self.kind, self.shape = kind, shape
        self.net = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, shape.numel()))

    def forward(self, features):
        features = torch.ones(2, 1) if features is None else features
        return self.kind(self.net(features).reshape(*features.shape[:-1], *self.shape))


def world():
    """What belongs to the process and not to a call."""
    return [
        torch.random.get_rng_state().tolist(),
        sorted(pyro.get_param_store().keys()),
        sorted(pyro.settings.get().items()),
        torch.distributions.Distribution._validate_args,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
        builtins.len,
    ]
