"""Models of global latents, most of whose posteriors are known, and how the tests fit them."""

import pyro
import pyro.distributions as dist
import torch

from ppvae import fit
from ppvae._scopes import double_precision, private_modules
from ppvae.training.task import task_of, training_batches


def quiet(model, guide, args, **told):
    return fit(model, guide, args, **{"progress": False, "seed": 0, **told})


def drawn(guide, site, count, *args):
    """So many draws of a latent, by one run of its guide."""
    with double_precision(), private_modules(), torch.no_grad(), pyro.plate("draws", count, dim=-3):
        return guide(*args)[site]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(X, y):
    """A regression with a known noise, as a plain function: all of it is Gaussian."""
    prior = dist.Normal(torch.zeros(X.shape[1]), torch.tensor([200.0, 5.0, 1.0, 500.0]))
    w = pyro.sample("w", prior.to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(X @ w, 2.0), obs=y)


def columns():
    """An intercept and columns of sizes 1, 1000 and 0.001, and y around 150."""
    X = torch.cat([torch.ones(50, 1), noise(50, 3) * torch.tensor([1.0, 1e3, 1e-3])], 1)
    X[:, 2] += 2e3
    y = 150 + X[:, 1] * 2 + 0.01 * X[:, 2] + 2 * noise(50, seed=1)
    return X, y


def posterior(X, y):
    """Its mean and precision, and the log evidence."""
    sd = torch.tensor([200.0, 5.0, 1.0, 500.0], dtype=torch.float64)
    precision = X.T @ X / 4 + torch.diag(sd**-2)
    mean = torch.linalg.solve(precision, X.T @ y / 4)
    marginal = X @ torch.diag(sd**2) @ X.T + 4 * torch.eye(len(y))
    evidence = dist.MultivariateNormal(torch.zeros(len(y)), marginal).log_prob(y).item()
    return mean, precision, evidence


def logistic(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=w[0] + x * w[1]), obs=y)


def labelled(rows=40):
    x = noise(rows)
    return x, (x + noise(rows, seed=3) > 0).to(x.dtype)


def location(x):
    """The mean of Gaussian numbers: the posterior is Gaussian."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def decides(x):
    """The same, with a decision on a value, so that it cannot be mapped over draws."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w if w.item() > -50 else -w, 1.0), obs=x)


def two_modes(x):
    w = pyro.sample("w", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w * w, 1.0), obs=x)


SCORES = (
    torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
    torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
)


def schools(centred):
    def model(y, s):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
        with pyro.plate("schools", len(y)):
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, s), obs=y)

    return model


def prepared(model, guide, args):
    with private_modules():
        return task_of(model, guide, None, training_batches(model, guide, args, None, ()))
