"""Priors: what a model draws a latent from.

A prior is a module without arguments whose forward returns a Pyro distribution over one latent: its
event shape is that of the latent, and its batch shape is empty, since the plate of the data repeats
it. Parameters of the module are learned with the model. A prior without parameters may be the
distribution itself.

**To add a prior**, write such a module; `as_prior` is how a model checks what it is given.
"""

from ppvae.priors.reading import as_prior, distribution_of, moved, parts_of

__all__ = ["as_prior", "distribution_of", "moved", "parts_of"]
