"""A Gaussian mixture as the prior: learned with the model, or fitted to codes afterwards."""

from typing import Any, Self

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae._checks import check_array, check_count, check_flag, check_real, check_seed, expect
from ppvae._scopes import random_state


class Mixture(nn.Module):
    """A mixture of normal distributions with learned weights, locations and scales.

    Args:
        latent: length of the latent.
        components: how many there are.
        full: whether each has correlations of its own.

    Attributes:
        logits: of the weights, shape `(components,)`.
        loc: the locations, shape `(components, latent)`; they start at standard normal draws.
        raw: the logarithms of the scales, of that shape; with `full` triangular matrices of shape
            `(components, latent, latent)`, with logarithms on the diagonal.

    Raises:
        TypeError: `full` is no bool.
        ValueError: a number is no whole one of at least 1.

    Dilokthanakul et al., Deep unsupervised clustering with Gaussian mixture variational
    autoencoders, 2016.

    Example:
        >>> prior = Mixture(2, components=3)
        >>> prior().event_shape, prior().mixture_distribution.probs.shape
        (torch.Size([2]), torch.Size([3]))
    """

    def __init__(self, latent: int, components: int = 10, *, full: bool = False) -> None:
        super().__init__()
        latent, components = check_count("latent", latent), check_count("components", components)
        self.full = check_flag("full", full)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent))
        shape = (components, latent, latent) if self.full else (components, latent)
        self.raw = nn.Parameter(torch.zeros(shape))

    @classmethod
    def of(cls, codes: Any, components: int = 10, *, full: bool = True, seed: int = 0) -> Self:
        """The mixture that fits codes best, by scikit-learn's EM algorithm.

        A deterministic autoencoder has no density by which its latents could be drawn; with this
        one, as `model.prior = Mixture.of(encode(model, guide, x).mean)`, it generates data.

        Args:
            codes: shape `(N, latent)`, at least as many as components.
            components: how many there are.
            full: whether each has correlations of its own.
            seed: of the starting points.

        Raises:
            ImportError: scikit-learn is not installed.
            TypeError, ValueError: the codes are no finite numbers of that shape, or too few.

        Ghosh et al., From variational to deterministic autoencoders, 2020.
        """
        from sklearn.mixture import GaussianMixture

        count = check_count("components", components)
        array = check_array("codes", check_real("codes", codes), ("N", "latent"))
        expect(len(array) >= count, "codes", f"at least {count}, the components", len(array))
        kind = "full" if check_flag("full", full) else "diag"
        found = GaussianMixture(count, covariance_type=kind, random_state=check_seed(seed) % 2**32)
        with np.errstate(over="ignore"):
            small = np.isfinite((array**2).sum())
        expect(small, "codes", "numbers whose squares are numbers", f"up to {abs(array).max():g}")
        found.fit(array)
        with random_state(None, keep=True):
            made = cls(array.shape[1], count, full=full)
        covariance = torch.as_tensor(found.covariances_)
        with torch.no_grad():
            made.logits.copy_(torch.as_tensor(found.weights_).log())
            made.loc.copy_(torch.as_tensor(found.means_))
            if full:
                tril = torch.linalg.cholesky(covariance)
                made.raw.copy_(tril.tril(-1) + tril.diagonal(dim1=-2, dim2=-1).log().diag_embed())
            else:
                made.raw.copy_(covariance.log() / 2)
        return made

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factors of the covariances, shape `(components, latent, latent)`."""
        if not self.full:
            return self.raw.exp().diag_embed()
        return self.raw.tril(-1) + self.raw.diagonal(dim1=-2, dim2=-1).exp().diag_embed()

    def forward(self) -> Any:
        """The distribution over one latent."""
        if self.full:
            parts: Any = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)
        else:
            parts = dist.Normal(self.loc, self.raw.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), parts)
