"""Guides: they draw the latent sites of any Pyro model from the heads of guide families."""

from ppvae.guides.assignment import Block
from ppvae.guides.blocks import HeavyTails
from ppvae.guides.family_guide import FamilyGuide

__all__ = ["Block", "FamilyGuide", "HeavyTails"]
