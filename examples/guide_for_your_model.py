"""Every guide family on a Pyro model of your own, by plain SVI (three minutes; writes nothing).

The model is a small one for counts: each shop has a positive rate and a mix of three products (a
simplex), and we see how many of each it sold. Neither latent is Gaussian, and the library has
never seen the model; only the argument `family` changes from row to row.

    python examples/guide_for_your_model.py
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

from ppvae import Family, FamilyGuide, evaluate, families
from ppvae.nn import mlp

SHOPS = 300


def model(sold: torch.Tensor) -> None:
    """Counts of shape (shops, 3)."""
    with pyro.plate("data", len(sold)):
        rate = pyro.sample("rate", dist.LogNormal(3.0, 1.0))
        mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
        expected = rate[..., None] * mix
        pyro.sample("sold", dist.Poisson(expected).to_event(1), obs=sold)


class Encoder(torch.nn.Module):
    """Any module from the model's arguments to features (batch, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 32)

    def forward(self, sold: torch.Tensor) -> torch.Tensor:
        """Counts are best seen on a log scale."""
        return self.net(torch.log1p(sold))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pyro.set_rng_seed(args.seed)
    rate = dist.LogNormal(3.0, 1.0).sample((SHOPS,))
    mix = dist.Dirichlet(torch.ones(3)).sample((SHOPS,))
    sold = dist.Poisson(rate[:, None] * mix).sample()

    # one line adds a family; Laplace's tails would be too heavy for a rate, as student_t's are
    yours = {"bounded_scale": Family(dist.Normal, scale=dist.constraints.interval(0.05, 0.5))}
    print("family              objective  log p(x)  mean |rate error|     (nats per shop)")
    for name, family in {**families.LADDER, **yours}.items():
        guide = FamilyGuide(model, family, encoder=Encoder())
        if family.channels:
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
            for _ in range(args.steps):
                svi.step(sold)
        draws = Predictive(model, guide=guide, num_samples=100)(sold)
        error = (draws["rate"].mean(0) - rate).abs().mean()
        found = evaluate(model, guide, sold, num_samples=100)
        mark = " " if found.bound else "*"
        objective, log_p = float(found.objective.mean()), float(found.log_likelihood.mean())
        print(f"{name:18s} {objective:10.2f}{mark} {log_p:8.2f}  {error:17.2f}")
    print("* a point: a penalised log-likelihood, which is no bound on log p(x)")


if __name__ == "__main__":
    main()
