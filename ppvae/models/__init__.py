r"""The variational autoencoder's generative model, as a Pyro program."""

from ppvae.models.vae import VAE

__all__ = ["VAE"]
