"""The family whose only member is the prior of the model."""

from dataclasses import dataclass

import torch
from torch import nn

from ppvae.families.base import GuideFamily


@dataclass(frozen=True)
class Prior(GuideFamily):
    """The family whose only member is the prior itself: no information passes to the latent.

    The guide then samples from the model's own latent statements, so the prior may be learned,
    hierarchical or of any support, and the KL divergence is zero exactly.
    """

    channels = ()
    joint = False
    from_model = True

    def head(self, features: int | None, shape: torch.Size) -> nn.Module:
        """Refuses: the draws come from the model.

        Raises:
            TypeError: always.
        """
        raise TypeError("family: expected one that builds heads, got the prior of the model")
