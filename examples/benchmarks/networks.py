"""The networks and the data that all rows of the benchmark have in common."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ppvae import VAE, FamilyGuide, families, likelihoods
from ppvae.nn import conv_decoder, conv_encoder, mlp

DATA, BATCH, RATE = 4096, 128, 1e-3


def networks(size: str, device: str) -> tuple[VAE, FamilyGuide]:
    """Model and guide: `inputs-hidden-latent`, or `conv-latent` for images of 28 x 28."""
    torch.manual_seed(0)
    first, *hidden, latent = size.split("-")
    if first == "conv":
        image = (1, 28, 28), 16, 32
        encoder, decoder = conv_encoder(*image), conv_decoder(int(latent), *image)
    else:
        widths = [int(width) for width in hidden]
        encoder = mlp(int(first), *widths)
        decoder = mlp(int(latent), *widths[::-1], out=int(first))
    model = VAE(decoder, int(latent), likelihoods.Bernoulli()).to(device)
    return model, FamilyGuide(model, families.mean_scale, encoder.to(device)).to(device)


def images(size: str, device: str) -> Tensor:
    """Binary data, drawn from a linear model with eight latents."""
    first, random = size.split("-")[0], torch.Generator().manual_seed(0)
    shape = (1, 28, 28) if first == "conv" else (int(first),)
    z, w = torch.randn(DATA, 8, generator=random), torch.randn(8, *shape, generator=random)
    chance = torch.sigmoid(torch.tensordot(z, w, 1) - 1)
    return (torch.rand(chance.shape, generator=random) < chance).float().to(device)


class HandWritten(nn.Module):
    """The negative ELBO per datum in plain PyTorch, with a copy of our networks."""

    def __init__(self, model: VAE, guide: FamilyGuide) -> None:
        super().__init__()
        head = guide.heads["z"]
        parts = guide.encoder, head.loc.linear, head.scale.linear, model.decoder
        self.encoder, self.loc, self.log_scale, self.decoder = copy.deepcopy(parts)

    def forward(self, x: Tensor) -> Tensor:
        """The loss of a batch."""
        features = self.encoder(x)
        loc, log_scale = self.loc(features), self.log_scale(features)
        scale = log_scale.exp()
        logits = self.decoder(loc + scale * torch.randn_like(loc))
        distortion = binary_cross_entropy_with_logits(logits, x, reduction="sum")
        rate = (0.5 * (loc.square() + scale.square() - 1) - log_scale).sum()
        return (distortion + rate) / len(x)
