"""Models of which more is known: a linear one, all of it in closed form, and small ones."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

from ppvae import VAE, FamilyGuide, families, likelihoods, simulate
from ppvae._scopes import private_modules
from ppvae.nn import mlp
from ppvae.programs.nodes import latent_nodes
from ppvae.programs.tracing import draws_plate, trace_pair
from ppvae.regression import LinearRegression


def diabetes(rows=442, columns=10):
    """The first rows and columns of the diabetes data, standardized over all rows, as arrays."""
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    X, y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()
    return X[:rows, :columns], y[:rows]


def observed_only(row, mean, covariance):
    """Log p of the entries of a datum that are not NaN, under a normal distribution of all."""
    seen = ~row.isnan()
    if not seen.any():
        return 0.0
    fn = dist.MultivariateNormal(mean[seen], covariance[seen][:, seen])
    return fn.log_prob(row[seen]).item()


def holes(x, *, seed=0, share=0.3):
    """Data of which each entry is missing with some probability, and the first datum whole."""
    generator = torch.Generator().manual_seed(seed)
    x = x.clone()
    x[torch.rand(x.shape, generator=generator) < share] = math.nan
    x[0] = math.nan
    return x


def exact_pair(columns=4, noise=0.5):
    """A linear model and the guide that is its posterior given what is observed of each datum."""
    weight = torch.randn(columns, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, noise).to_event(1), obs=x)

    def guide(x):
        seen = (~x.isnan()).to(x.dtype)
        precision = torch.eye(2) + torch.einsum("nd,di,dj->nij", seen, weight, weight) / noise**2
        mean = torch.linalg.solve(precision, (x.nan_to_num(0.0) @ weight) / noise**2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))

    return model, guide, weight @ weight.T + noise**2 * torch.eye(columns)


class Linear:
    """x = W z + b + noise, data drawn from it, and guides that can be set to anything.

    `P` is the precision of the posterior, `mean` its mean for each datum.
    """

    def __init__(self, W=None, size=20, noise=0.5, b=None):
        torch.manual_seed(0)
        self.W, self.noise = torch.randn(5, 3) if W is None else torch.as_tensor(W), noise
        outputs, self.latents = self.W.shape
        self.b = torch.randn(outputs) if b is None else b
        decoder = nn.Linear(self.latents, outputs)
        decoder.weight.data, decoder.bias.data = self.W.clone(), self.b.clone()
        self.model = VAE(decoder, self.latents, likelihoods.Normal(noise))
        (self.x,), self.true = simulate(self.model, torch.zeros(size, outputs), seed=1)
        self.P = torch.eye(self.latents) + self.W.T @ self.W / noise**2
        self.encoder = torch.linalg.solve(self.P, self.W.T) / noise**2
        self.mean = (self.x - self.b) @ self.encoder.T
        covariance = self.W @ self.W.T + noise**2 * torch.eye(outputs)
        self.log_p = dist.MultivariateNormal(self.b, covariance).log_prob(self.x).numpy()
        self.best_sd = self.P.diagonal().rsqrt()

    def guide(self, family, sd=None, *, shift=0.0, error=0.0, encoder=None):
        """The mean of the posterior plus a shift, with the family's best scale or this one.

        All weights are off by a random error of that size.
        """
        torch.manual_seed(1)
        guide = FamilyGuide(self.model, family, encoder or nn.Identity())
        factor = torch.linalg.cholesky(self.P.inverse())
        rows, columns = torch.tril_indices(*factor.shape)
        factor = torch.where(torch.eye(len(factor)) > 0, factor.abs().log(), factor)
        biases = {
            "loc": shift - self.encoder @ self.b,
            "v": -self.encoder @ self.b,
            "scale": (self.best_sd if sd is None else torch.as_tensor(sd)).log(),
            "scale_tril": factor[rows, columns],
        }
        for name, argument in guide.heads["z"].named_children() if family.channels else ():
            if name in biases and argument.linear is not None:
                weight = torch.zeros_like(argument.linear.weight)
                if name in ("loc", "v") and encoder is None:
                    weight = self.encoder
                argument.linear.weight.data = weight + error * torch.randn_like(weight)
                bias = biases[name].expand(len(weight))
                argument.linear.bias.data = bias + error * torch.randn_like(bias)
        return guide

    def exact(self):
        """The guide that is the posterior."""
        return self.guide(families.full_rank)

    def gap(self, covariance, away=0.0):
        """KL from N(mean + away, covariance) to the posterior: log p(x) - ELBO."""
        away = torch.as_tensor(away) * torch.ones(self.latents)
        spread = (self.P @ covariance).diagonal(dim1=-2, dim2=-1).sum(-1) - self.latents
        spread = spread + ((away @ self.P) * away).sum(-1)
        return (spread - self.P.logdet() - covariance.logdet()) / 2

    def elbo(self, guide):
        """The ELBO of a Gaussian guide for each datum."""
        with torch.no_grad():
            fn = guide.heads["z"](guide.encoder(self.x))
        joint = isinstance(fn, dist.MultivariateNormal)
        covariance = fn.covariance_matrix if joint else torch.diag_embed(fn.variance)
        return self.log_p - self.gap(covariance, fn.mean - self.mean).numpy()

    def information(self, covariance):
        """E log q(z*|x) - log p(z*) of N(mean, covariance): I(x;z) less KL(posterior || q)."""
        inside = torch.linalg.solve(covariance, self.P.inverse()).trace()
        return 0.5 * (self.latents - inside - covariance.logdet()).item()


class Regression:
    """The diabetes data with noise 0.7 and weights N(0, 0.25 I), of which the posterior is known.

    `P` is its precision. Columns may be multiplied by `units`.
    """

    def __init__(self, rows=442, columns=10, units=1.0):
        X, y = map(torch.as_tensor, diabetes(rows, columns))
        self.args, one = (X * units, y), torch.eye(columns)
        self.priors = {"weight": dist.Normal(0.0, 0.5), "noise": 0.7}
        self.model = LinearRegression(columns, **self.priors)
        self.P = self.args[0].T @ self.args[0] / 0.49 + one / 0.25
        self.factor = torch.linalg.cholesky(self.P.inverse())

    def mean(self, X, y):
        return torch.linalg.solve(self.P, X.T @ y) / 0.49

    def guide(self, family):
        """Of the family, mean_scale or full_rank, the best member."""
        guide = FamilyGuide(self.model, family).setup(*self.args)
        head, size = guide.heads["weight"], len(self.P)
        head.loc.raw.data = self.mean(*self.args)
        if family is families.full_rank:
            logs = torch.where(torch.eye(size) > 0, self.factor.abs().log(), self.factor)
            head.scale_tril.raw.data = logs[tuple(torch.tril_indices(size, size))]
        else:
            head.scale.raw.data = self.P.diagonal().rsqrt().log()
        return guide


def local(prior, observe):
    """A model of a latent z for each datum, and of x with the distribution `observe(z)`."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", observe(z), obs=x)

    return model


T, S = 0.3, 0.7


def hierarchy_of(spread, noise):
    """Latents with an sd around one of all the data, each seen with noise."""

    def hierarchy(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, spread))
            pyro.sample("x", dist.Normal(z[..., None], noise).to_event(1), obs=x)

    hierarchy.vectorized = True
    return hierarchy


hierarchy = hierarchy_of(T, S)


class Column(nn.Module):
    """An encoder of numbers; of any other arguments it sees the first."""

    def __init__(self):
        super().__init__()
        self.net = mlp(1, 8)

    def forward(self, x, *others):
        return 0.5 * self.net(x.reshape(-1, 1)).tanh()


# from the drawn values of the models in `cases` to their arguments, where these are not the data
_PAD = torch.zeros(6, 2)
ARGUMENTS = {
    "right of steps": lambda seen: (torch.cat([seen["x"].T, _PAD[:, :1]], -1),),
    "told rows": lambda seen: (torch.cat([seen["x"][:, None], _PAD], -1), torch.arange(6)),
    "own rows": lambda seen: (seen["x"],),
    "hierarchy": lambda seen: (torch.cat([seen["x"][:, None], _PAD], -1),),
}


def close(value, expected, bound=1e-6):
    """Whether two arrays are equal up to a bound."""
    return bool(np.abs(np.asarray(value) - np.asarray(expected)).max() < bound)


def within(value, expected, error):
    """Whether an estimate is within five standard errors, and 1e-9 for what is exact."""
    return bool((abs(value - expected) <= 5 * error + 1e-9).all())


def same_one_by_one(model, guide, *args, draws=4):
    """Whether a run of many draws has the densities of runs of one draw, at every site."""
    alike = []
    with private_modules():
        many, _ = trace_pair(model, guide, *args, draws=draws_plate(model, *args, draws=draws))
        many.compute_log_prob()
        latents = [node["name"] for node in latent_nodes(many)]
        names = [*latents, *many.observation_nodes]
        for draw in range(draws):
            values = {name: many.nodes[name]["value"][draw, 0] for name in latents}
            one = poutine.trace(poutine.condition(model, values)).get_trace(*args)
            one.compute_log_prob()
            for name in names:
                log_probs = (trace.nodes[name]["log_prob"] for trace in (many, one))
                together, alone = (value.reshape(-1) for value in log_probs)
                together = together.reshape(draws, -1)[draw]
                alike.append(torch.allclose(together, alone) and len(together) == len(alone))
    return all(alike) and len(names) == len(set(names))
