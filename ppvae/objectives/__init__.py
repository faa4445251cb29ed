"""Objectives: the losses that `fit` can minimise, in nats per datum, and the terms of them.

An objective is anything that is called as `objective(model, guide, *args, size=None, step=0)` and
returns a scalar that can be differentiated (`Objective` says how to add one):

    fit(model, guide, x, objective=ELBO(beta=warm_up(2000), kl="sampled"))
    fit(model, guide, x, objective=IWAE(num_samples=8, gradient="doubly_reparametrized"))

Those here mean the same at every batch size: what is local to a datum is averaged over the batch,
what is global is divided by the number of data, and a `poutine.scale` of the model is kept.
"""

from ppvae.objectives.base import Objective, at_step
from ppvae.objectives.elbo import ELBO, negative_elbo
from ppvae.objectives.iwae import IWAE
from ppvae.objectives.schedules import WarmUp, warm_up
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.tracing import trace_pair

__all__ = [
    "ELBO",
    "IWAE",
    "Objective",
    "Terms",
    "WarmUp",
    "at_step",
    "negative_elbo",
    "terms",
    "trace_pair",
    "warm_up",
]
