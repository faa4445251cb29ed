"""Guide families for amortized inference in Pyro: from the autoencoder to the full posterior."""

from ppvae import closed_form, data, families, likelihoods, nn, plots
from ppvae.convert import from_pyro_svi
from ppvae.evaluate import evaluate
from ppvae.families import Family
from ppvae.fit import Fit, fit
from ppvae.guides import FamilyGuide
from ppvae.simulate import simulate
from ppvae.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "Family",
    "FamilyGuide",
    "Fit",
    "closed_form",
    "data",
    "evaluate",
    "families",
    "fit",
    "from_pyro_svi",
    "likelihoods",
    "nn",
    "plots",
    "simulate",
]
