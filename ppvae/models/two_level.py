"""A variational autoencoder's generative model with two layers of latents, as a Pyro program."""

from typing import Any

import pyro
from torch import Tensor, nn

from ppvae._checks import check_count, expect
from ppvae.models.decoded import Decoded, check_conditional, check_x, observe


class TwoLevelVAE(Decoded):
    r"""The model `p(z_top) p(z_bottom | z_top) p(x | z_bottom)`: a prior that is a model itself.

    Its sites are `z_top`, `z_bottom` and `x`, in the plate `data`. The guide says in which order
    the posterior is drawn: `{"z_top": "mean_scale", "z_bottom": Block("mean_scale",
    given=["z_top"])}` goes from the top down, as the ladder of the paper; given the other way round
    it goes from the bottom up.

    Args:
        decoder: a module `(batch, bottom) -> (batch, *event)`.
        between: a module from top latents `(*, top)` to a Pyro distribution over the bottom ones,
            of batch shape `(*)` and event shape `(bottom,)`, such as
            `priors.Learned(bottom, context=top, network=mlp(top, 32))`.
        latent: the lengths of the top and of the bottom latent.
        likelihood: a module from the decoder's output to a distribution over its elements.
        prior: of the top latent: a Pyro distribution of event shape `(top,)`, or a module that
            returns one; by default standard normal.

    Raises:
        TypeError: `decoder`, `between` or `likelihood` is no module, or returns something else than
            is said here.
        ValueError: `latent` is no pair of whole numbers of at least 1, a part has another shape,
            or, in a call, the data have another shape than the decoder's output.

    Sønderby et al., Ladder variational autoencoders, 2016.

    Example:
        >>> from ppvae import likelihoods, priors
        >>> from ppvae.nn import mlp
        >>> between = priors.Learned(4, context=2, network=mlp(2, 16))
        >>> model = TwoLevelVAE(mlp(4, 16, out=5), between, (2, 4), likelihoods.Bernoulli())
        >>> model(size=3).shape
        torch.Size([3, 5])
    """

    #: every operation leaves leading dims alone, so that many draws can be made in one run
    vectorized = True

    def __init__(
        self,
        decoder: nn.Module,
        between: nn.Module,
        latent: tuple[int, int],
        likelihood: nn.Module,
        prior: Any | None = None,
    ) -> None:
        pair = isinstance(latent, (tuple, list)) and len(latent) == 2
        expect(pair, "latent", "the lengths of the top and of the bottom latent", latent)
        super().__init__(decoder, latent[0], likelihood, prior)
        self.bottom = check_count("latent", latent[1])
        check_conditional("between", between, self._zeros, self.bottom)
        self.between = between
        self.event_dim = self.example()[0].dim() - 1

    def example(self) -> tuple[Tensor, ...]:
        """Arguments of a call on one datum of zeros, from which a guide can learn the shapes."""
        return (self._datum(self._zeros.new_zeros(1, self.bottom)),)

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Runs the program.

        Args:
            x: data of shape `(batch, *event)` to condition on; None draws data.
            size: how many data to draw without `x`.

        Returns:
            The data, of shape `(batch, *event)`.
        """
        self.check_call(x)
        size = check_count("size", size) if x is None else len(x)
        with pyro.plate("data", size, dim=-1):
            top = pyro.sample("z_top", self._prior())
            bottom = pyro.sample("z_bottom", self.between(top))
            return observe(self.likelihood(self.decode(bottom)), x, self.event_dim)

    def check_call(self, x: Tensor | None = None, *others: Any) -> None:
        """Checks the arguments of a call.

        Raises:
            TypeError: the data are no tensor, or there is something else.
            ValueError: there are none.
        """
        expect(not others, "args", "data only", f"{1 + len(others)} arguments", TypeError)
        if x is not None:
            check_x(x)
