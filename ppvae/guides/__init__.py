r"""One guide for every family: it samples each latent site of a model from the family's head."""

from ppvae.guides.family_guide import FamilyGuide

__all__ = ["FamilyGuide"]
