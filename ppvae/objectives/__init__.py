r"""Objectives: the losses that `fit` can minimise, in nats per datum.

An objective is anything that is called as `objective(model, guide, *args, size=None, step=0)` and
returns a scalar that can be differentiated:

    fit(model, guide, x, objective=ELBO(beta=warm_up(2000), kl="sampled"))
    fit(model, guide, x, objective=IWAE(num_samples=8, gradient="doubly_reparametrized"))

Those here mean the same at every batch size: what is local to a datum is averaged over the batch,
what is global is divided by the number of data, and a `poutine.scale` of the model is kept.
**To add an objective**, write a function of that signature; `objective.terms` reads its terms.
"""

from ppvae.objectives.base import Cut, check_reparametrized, runs
from ppvae.objectives.divergence import by_coordinate, closed_kl
from ppvae.objectives.elbo import ELBO, floored_rate, loss_of, negative_elbo
from ppvae.objectives.iwae import IWAE, averaged, log_joint_and_guide, path
from ppvae.objectives.schedules import WarmUp, warm_up
from ppvae.objectives.trace_terms import Terms, common_scale, data_size, log_density, terms

__all__ = [
    "Cut",
    "ELBO",
    "IWAE",
    "Terms",
    "WarmUp",
    "averaged",
    "by_coordinate",
    "check_reparametrized",
    "closed_kl",
    "common_scale",
    "data_size",
    "floored_rate",
    "log_density",
    "log_joint_and_guide",
    "loss_of",
    "negative_elbo",
    "path",
    "runs",
    "terms",
    "warm_up",
]
