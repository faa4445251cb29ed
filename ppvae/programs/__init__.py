r"""Data drawn from a model, with the latents that they came from."""

from ppvae.programs.simulation import Simulation, Uncondition, simulate

__all__ = ["Simulation", "Uncondition", "simulate"]
