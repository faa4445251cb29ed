"""Models and guides that are wrong, each in one way, and what is to be said of them."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pairs import linear
from torch import nn

from ppvae import VAE, FamilyGuide, families, likelihoods


class Own(Exception):
    """An error of a user's."""


class Returns(nn.Linear):
    """A decoder that returns something else."""

    def __init__(self, change):
        super().__init__(2, 3)
        self.change = change

    def forward(self, z):
        return self.change(super().forward(z))


def raises(*_):
    raise Own("mine")


def unseen(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def no_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(2))
    pyro.sample("x", dist.Normal(z.sum(-1), 0.5).to_event(1), obs=x[:, 0])


def named(site):
    """A model with a latent site of that name, and its guide."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(site, dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    return model, FamilyGuide(model, families.mean_scale, encoder=nn.Identity())


def misses(x):
    with pyro.plate("data", len(x)):
        pyro.sample("another", dist.Normal(0.0, 1.0))


def with_decoder(change):
    model = VAE(nn.Linear(2, 3), 2, likelihoods.Normal(0.5))
    guide = FamilyGuide(model, families.mean_scale, encoder=nn.Identity())
    model.decoder = Returns(change)
    return model, guide


def with_prior(prior):
    model = VAE(nn.Linear(2, 3), 2, likelihoods.Normal(0.5), prior)
    return model, FamilyGuide(model, families.mean_scale, encoder=nn.Identity())


REFUSED = (TypeError, ValueError, ArithmeticError)  # the last of which is `Diverged`
EXPECTED = (
    "^[^:]*(model|guide|decoder|encoder|likelihood|prior|refit|data|fit|validation)[^:]*: "
    "|^Expected parameter loc"  # Pyro's own words, over a program that is checked as it runs
)

#: name -> how to make a pair, the errors that are right, and a pattern of their words
PROGRAMS: dict[str, tuple[Callable[[], Any], tuple[type[Exception], ...], str]] = {
    "nothing observed": (lambda: (unseen, FamilyGuide(unseen, "mean_scale")), REFUSED, EXPECTED),
    "swapped": (lambda: linear()[::-1], REFUSED, EXPECTED),
    "no plate": (lambda: (no_plate, FamilyGuide(no_plate, "mean_scale")), REFUSED, EXPECTED),
    "a guide that misses a site": (lambda: (linear()[0], misses), REFUSED, "^guide: "),
    "a guide of no sites": (lambda: (linear()[0], frozen_guide), REFUSED, "^guide: "),
    "a decoder of a tuple": (lambda: with_decoder(lambda x: (x, x)), REFUSED, EXPECTED),
    "a decoder of a number": (lambda: with_decoder(lambda x: x.sum()), REFUSED, EXPECTED),
    "a decoder of NaN": (lambda: with_decoder(lambda x: x * math.nan), REFUSED, EXPECTED),
    "a decoder of infinity": (lambda: with_decoder(lambda x: x * math.inf), REFUSED, EXPECTED),
    "a decoder of None": (lambda: with_decoder(lambda x: None), REFUSED, EXPECTED),
    "a likelihood that is no module": (
        lambda: (VAE(nn.Linear(2, 3), 2, lambda x: x), None), REFUSED, "^likelihood: ",
    ),
    "a prior with a batch": (
        lambda: with_prior(dist.Normal(torch.zeros(4, 2), 1.0).to_event(1)), REFUSED, "^prior: ",
    ),
    "an error of its own in the model": (lambda: (raises, linear()[1]), (Own,), "mine"),
    "an error of its own in the guide": (
        lambda: (linear()[0], raises), (Own, ValueError), "mine|^guide: expected a FamilyGuide",
    ),
    "an error of its own in the decoder": (lambda: with_decoder(raises), (Own,), "mine"),
}  # fmt: skip

#: what is no mistake: latents in no plate are global (as many as there are data, which a minibatch
#: of another size is refused for), a datum may have a density of zero, and a program is staged
#: whatever its numbers are
FINE = {("no plate", measure) for measure in ("evaluate", "account", "from_pyro_svi", "stage")}
FINE |= {("no plate", "annealed_importance")}
FINE |= {("a decoder of NaN", "stage")} | {
    ("a decoder of infinity", measure)
    for measure in ("evaluate", "gaps", "annealed_importance", "from_pyro_svi", "stage")
}

#: calls with a model and its guide, and data that depend on latents of their own
PAIRED = ("fit", "evaluate", "gaps", "account", "annealed_importance", "calibration")
PAIRED += ("from_pyro_svi", "stage")


def frozen_guide(x):
    """A guide without sites."""
