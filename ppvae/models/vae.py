"""The generative model of a variational autoencoder, as a Pyro program."""

from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae._checks import check_count, expect
from ppvae.models.decoded import Decoded, check_x, observe
from ppvae.nn import one_hot


class VAE(Decoded):
    r"""The model `p(z) p(x | z)`: a prior, a decoder and a likelihood.

    Its sites are `z` and `x`, in the plate `data`. What is usually called the encoder is no part of
    it: that is a guide (`FamilyGuide`). Called with data the model conditions on them; called
    without, it draws some.

    With a **context**, such as labels or covariates, it is `p(z | c) p(x | z, c)`: it is called as
    `model(x, c)`, the decoder gets the latent and the context side by side, the encoder both
    arguments (`nn.Concatenate` joins them), and the prior the context, if it is a conditional one.

    Args:
        decoder: a module `(batch, latent) -> (batch, *event)`; with a context from
            `(batch, latent + context)`.
        latent: length of the latent, at least 1.
        likelihood: a module from the decoder's output to a distribution over its elements, such as
            `likelihoods.Bernoulli()`.
        prior: a Pyro distribution over one latent, of event shape `(latent,)` and batch shape `()`,
            or a module without arguments whose forward returns one (a learned prior); by default
            standard normal. See `ppvae.priors`.
        context: how many numbers the context of a datum is, of shape `(batch, context)`; or how
            many labels there are, which come as `(batch,)` codes from 0 and are given to the
            networks as zeros and a one. By default there is none.

    Raises:
        TypeError: `decoder` or `likelihood` is no module, or what the likelihood or the prior
            returns is no Pyro distribution, or the decoder's output no real numbers.
        ValueError: `latent` is no whole number of at least 1, the prior has another shape, the
            decoder does not take the latent or returns no tensor of one datum, or, in a call, its
            output has not the shape of `x`, or the context is none of that number; and in
            `load_state_dict`, the state is that of another
            kind of likelihood or prior, or of another fixed prior.

    Kingma and Welling, Auto-encoding variational Bayes, 2014.

    Example:
        >>> from ppvae import likelihoods
        >>> from ppvae.nn import mlp
        >>> model = VAE(mlp(2, 16, out=5), latent=2, likelihood=likelihoods.Bernoulli())
        >>> model(size=3).shape
        torch.Size([3, 5])
    """

    #: every operation leaves leading dims alone, so that many draws can be made in one run
    vectorized = True

    def __init__(
        self,
        decoder: nn.Module,
        latent: int,
        likelihood: nn.Module,
        prior: Any | None = None,
        *,
        context: int | None = None,
    ) -> None:
        super().__init__(decoder, latent, likelihood, prior, context)
        self.event_dim = self.example()[0].dim() - 1

    def _features(self, context: Any) -> Tensor | None:
        """The context as numbers `(batch, context)`; labels become zeros and a one."""
        if self.context is None:
            expect(context is None, "context", "none, as the model was made without", "one")
            return None
        wanted = f"a tensor of shape (batch, {self.context}), or of (batch,) labels"
        got = getattr(context, "shape", type(context).__name__)
        expect(isinstance(context, Tensor) and context.dim() in (1, 2), "context", wanted, got)
        if context.dim() == 2:
            expect(context.shape[1] == self.context, "context", wanted, tuple(context.shape))
            return context.to(self._zeros.dtype)
        return one_hot(context, self.context, "context").to(self._zeros.dtype)

    def example(self) -> tuple[Tensor, ...]:
        """Arguments of a call on one datum of zeros, from which a guide can learn the shapes."""
        context = () if self.context is None else (self._zeros.new_zeros(1, self.context),)
        return (self._datum(torch.cat([self._zeros.expand(1, -1), *context], -1)), *context)

    def forward(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        exposure: Tensor | None = None,
        size: int = 1,
    ) -> Tensor:
        """Runs the program.

        Args:
            x: data of shape `(batch, *event)` to condition on; None draws data.
            context: of each datum, where the model has one.
            exposure: of likelihoods of counts: what the means are multiplied by, such as a library
                size, of shape `(batch,)` or `(batch, *event)`.
            size: how many data to draw without `x`, where there is no context.

        Returns:
            The data, of shape `(batch, *event)`.
        """
        features = self.check_call(x, context)
        given = x if features is None or x is not None else features
        with pyro.plate("data", size if given is None else len(given), dim=-1):
            z = pyro.sample("z", self._prior(features))
            fn = self._likelihood(self._decode(z, features), exposure)
            return observe(fn, x, self.event_dim)

    def check_call(
        self, x: Tensor | None = None, context: Tensor | None = None, *others: Any
    ) -> Tensor | None:
        """Checks the arguments of a call, and returns the context as numbers.

        Raises:
            TypeError: the data or the context are no tensor, or there is something else.
            ValueError: there are none, or the context does not fit the model or the data.
        """
        told = f"{2 + len(others)} arguments"
        expect(not others, "args", "data, and a context at most", told, TypeError)
        features = self._features(context)
        if x is not None:
            check_x(x)
            if features is not None:
                expect(len(features) == len(x), "context", f"{len(x)} rows, as x", len(features))
        return features

    def _likelihood(self, output: Tensor, exposure: Tensor | None = None) -> Any:
        if exposure is None:
            return self.likelihood(output)
        able = getattr(self.likelihood, "takes_exposure", False)
        kind = type(self.likelihood).__name__
        expect(able, "exposure", "none for this likelihood, which is not of counts", kind)
        return self.likelihood(output, exposure)

    def _decode(self, z: Tensor, features: Tensor | None) -> Tensor:
        if features is not None:
            z = torch.cat([z, features.expand(*z.shape[:-1], -1)], -1)
        return super().decode(z)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The decoder's output for latents with any number of leading dims, `(*, latent)`.

        The context, if the model has one, is that of the last of these, `(batch, context)`.
        """
        return self._decode(z, self._features(context))

    def mean(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The mean of `p(x | z)` for latents of shape `(*, latent)`, of shape `(*, *event)`."""
        mean: Tensor = self._likelihood(self.decode(z, context)).mean
        return mean

    def draw_prior(self, size: int, context: Tensor | None = None) -> Tensor:
        """Draws of the latent from the prior, of shape `(size, latent)`.

        A conditional prior takes a context of `size` rows.
        """
        fn = self._prior(self._features(context) if context is not None else None)
        return fn.expand([check_count("size", size, 0)]).sample()
