"""The mixture of the encodings of some data, learned themselves, as the prior."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae._checks import check_count, check_real, expect


class VampPrior(nn.Module):
    """The mixture of the posteriors of pseudo-inputs: data that training moves.

    The best prior for a given encoder is the aggregate of all its posteriors; this is the aggregate
    of a few. The first `FamilyGuide` of the model attaches itself to it; for a guide that is
    written by hand, `prior.attach(encode)` says what its posterior is.

    Args:
        inputs: some data, of shape `(components, *event)`, from which the pseudo-inputs start.
        latent: length of the latent.

    Attributes:
        inputs: the pseudo-inputs.
        logits: of the weights of the components.

    Raises:
        TypeError: the inputs are no real numbers.
        ValueError: there are none, one is not finite, or `latent` is no whole number of at least 1;
            or, in training, no encoder is attached.

    Tomczak and Welling, VAE with a VampPrior, 2018.

    Example:
        >>> from ppvae import VAE, FamilyGuide, likelihoods
        >>> prior = VampPrior(torch.randn(10, 5), latent=2)
        >>> model = VAE(nn.Linear(2, 5), 2, likelihoods.Normal(1.0), prior)
        >>> guide = FamilyGuide(model, "mean_scale", encoder=nn.Linear(5, 8))
        >>> prior().component_distribution.batch_shape
        torch.Size([10])
    """

    def __init__(self, inputs: Any, latent: int) -> None:
        super().__init__()
        values = check_real("inputs", inputs)
        full = values.dim() > 1 and values.numel() > 0
        expect(full, "inputs", "shape (components, *event)", tuple(values.shape))
        expect(torch.isfinite(values).all(), "inputs", "finite numbers", "NaN or infinite ones")
        dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
        self.inputs = nn.Parameter(values.detach().clone().to(dtype))
        self.logits = nn.Parameter(torch.zeros(len(values), dtype=dtype))
        self.latent = check_count("latent", latent)
        self._encode: tuple[Callable[[Tensor], Any], ...] = ()  # not a module of its own

    @property
    def attached(self) -> bool:
        """Whether an encoder is."""
        return bool(self._encode)

    def attach(self, encode: Callable[[Tensor], Any]) -> None:
        """Takes the posterior: a function of data `(batch, *event)`.

        What it returns is a distribution with a density, of batch shape `(batch,)` and event shape
        `(latent,)`.

        Raises:
            TypeError: it is no function.
        """
        expect(callable(encode), "encode", "a function", type(encode).__name__, TypeError)
        self._encode = (encode,)

    def forward(self) -> Any:
        """The distribution over one latent; the standard normal until an encoder is attached."""
        if not self._encode:  # a guide looks at the shapes first, without gradients
            wanted = "an encoder: a FamilyGuide of the model, or attach()"
            expect(not torch.is_grad_enabled(), "prior", wanted, "none")
            zeros = self.logits.new_zeros(self.latent)
            return dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
        fn = self._encode[0](self.inputs)
        shapes = tuple(fn.batch_shape), tuple(fn.event_shape)
        wanted = f"batch shape ({len(self.inputs)},) and event shape ({self.latent},)"
        fits = shapes == ((len(self.inputs),), (self.latent,))
        expect(fits, "encode", wanted, f"{shapes[0]} and {shapes[1]}")
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), fn)
