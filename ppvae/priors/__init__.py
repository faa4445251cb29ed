"""Priors: what a model draws a latent from.

A prior is a module without arguments whose forward returns a Pyro distribution over one latent: its
event shape is that of the latent, and its batch shape is empty, since the plate of the data repeats
it. Parameters of the module are learned with the model. A prior without parameters may be the
distribution itself.

`Learned`, `Mixture`, `VampPrior` and `ARD` are learned with the model; `Mixture.of(codes)` is
fitted to the codes of any encoder afterwards.

**To add a prior**, write such a module, and a row in `tests/cases.py`; `as_prior` is how a model
checks what it is given. If it has a method `attach`, the first `FamilyGuide` of the model hands
it the function from data to its posterior, and asks its `attached` whether one did.
"""

from ppvae.priors.learned import ARD, Learned
from ppvae.priors.mixture import Mixture
from ppvae.priors.reading import as_prior, distribution_of, moved, parts_of
from ppvae.priors.vamp import VampPrior

__all__ = [
    "ARD",
    "Learned",
    "Mixture",
    "VampPrior",
    "as_prior",
    "distribution_of",
    "moved",
    "parts_of",
]
