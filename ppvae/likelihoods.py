"""Likelihoods: modules that turn what a decoder puts out into a distribution over the data.

**To add a likelihood**, write a module whose forward takes the decoder's output, of shape
`(*, *event)` with any number of leading dimensions, and returns a Pyro distribution over its
elements, of that batch shape; `VAE` declares which of them are the event. Parameters of the module
are learned with the decoder.
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae._checks import check_real, expect

__all__ = ["Bernoulli", "Normal", "Poisson"]


class Bernoulli(nn.Module):
    """The likelihood of binary data; the decoder's output is the logits."""

    def forward(self, output: Tensor) -> dist.Distribution:
        """One Bernoulli distribution per element."""
        return dist.Bernoulli(logits=output)


class Poisson(nn.Module):
    """The likelihood of counts; the decoder's output is the log rates."""

    def forward(self, output: Tensor) -> dist.Distribution:
        """One Poisson distribution per element."""
        return dist.Poisson(output.exp())


class Normal(nn.Module):
    """The likelihood of real data; the decoder's output is the means, the scale that of all data.

    `Normal(0.1)` has a fixed scale, `Normal(1.0, learned=True)` one learned scale that starts at 1,
    and `Normal(torch.ones(64), learned=True)` a learned scale per feature.

    Args:
        scale: standard deviation, a positive number, or a tensor that broadcasts to one event.
        learned: whether training moves it.

    Raises:
        TypeError: `scale` is no number, or `learned` no bool.
        ValueError: `scale` is not positive and finite; in `load_state_dict`, the state is that of
            another fixed scale.
    """

    def __init__(self, scale: float | Tensor = 1.0, *, learned: bool = False) -> None:
        super().__init__()
        expect(isinstance(learned, bool), "learned", "True or False", repr(learned), TypeError)
        value = check_real("scale", scale).to(torch.get_default_dtype())
        fine = not isinstance(scale, bool) and (torch.isfinite(value) & (value > 0)).all()
        expect(fine, "scale", "positive finite numbers", scale)
        log_scale = value.detach().clone().log()
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def extra_repr(self) -> str:
        """The scale, where it is fixed."""
        learned = isinstance(self.log_scale, nn.Parameter)
        return "learned=True" if learned else f"scale={self.scale.tolist()}"

    @property
    def scale(self) -> Tensor:
        """The standard deviation, of the shape it was given in."""
        return self.log_scale.exp()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own, saved = self.log_scale, state_dict.get(prefix + "log_scale")
        if not isinstance(own, nn.Parameter) and saved is not None and saved.shape == own.shape:
            same = torch.allclose(saved.to(own), own, atol=1e-5)
            expect(same, "scale", f"a state of scale {self.scale}", f"one of {saved.exp()}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, output: Tensor) -> dist.Distribution:
        """One Normal distribution per element."""
        return dist.Normal(output, self.scale)
