"""Models: Pyro programs to fit; `protocol.py` writes down what a model may say of itself."""

from ppvae.models.hierarchical import HierarchicalRegression
from ppvae.models.mixture import GaussianMixture
from ppvae.models.state_space import DeepMarkov
from ppvae.models.two_level import TwoLevelVAE
from ppvae.models.vae import VAE

__all__ = ["VAE", "DeepMarkov", "GaussianMixture", "HierarchicalRegression", "TwoLevelVAE"]
