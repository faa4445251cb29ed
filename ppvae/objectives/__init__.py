"""Objectives: the losses that `fit` minimises, in nats per datum, and the terms they are made of.

An objective is anything that is called as `objective(model, guide, *args, size=None, step=0)` and
returns a scalar that can be differentiated:

    fit(model, guide, x, objective=ELBO(beta=warm_up(2000), kl="sampled"))
    fit(model, guide, x, objective=IWAE(num_samples=8, gradient="doubly_reparametrized"))

Those here mean the same at every batch size: what is local to a datum is averaged over the batch,
what is global is divided by the number of data, and a `poutine.scale` of the model is kept.
**To add an objective**, write a function of that signature: `trace_pair` runs the programs, and
`terms` reads the traces.
"""

from ppvae.objectives.elbo import ELBO, negative_elbo
from ppvae.objectives.iwae import IWAE
from ppvae.objectives.schedules import WarmUp, warm_up
from ppvae.objectives.trace_terms import Terms, terms
from ppvae.programs.runs import trace_pair

__all__ = ["ELBO", "IWAE", "Terms", "WarmUp", "negative_elbo", "terms", "trace_pair", "warm_up"]
