"""Priors: what a model draws a latent from.

A prior is a module without arguments whose forward returns a Pyro distribution over one latent: its
event is the latent, and its batch is empty, since the model puts it into the plate of the data. A
prior that learns nothing may be the distribution itself.

**To add a prior**, write such a module.
"""

from ppvae.priors.reading import as_prior, distribution_of, moved

__all__ = ["as_prior", "distribution_of", "moved"]
