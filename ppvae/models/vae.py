"""The generative model of a variational autoencoder, as a Pyro program."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae._checks import check_count, expect
from ppvae._scopes import UniquelyNamed, eval_mode, random_state
from ppvae.nn import one_hot
from ppvae.priors import as_prior, distribution_of, moved, parts_of


class VAE(UniquelyNamed):
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
        super().__init__()
        for name, module in {"decoder": decoder, "likelihood": likelihood}.items():
            known = isinstance(module, nn.Module)
            expect(known, name, "a torch.nn.Module", repr(module), TypeError)
        self.decoder, self.latent = decoder, check_count("latent", latent)
        self.likelihood = likelihood
        like = next(decoder.parameters(), torch.zeros(()))
        zeros = torch.zeros(self.latent, dtype=like.dtype, device=like.device)
        self.register_buffer("_zeros", zeros, persistent=False)
        self.context = None if context is None else check_count("context", context)
        self.prior = None if prior is None else as_prior(prior, self.latent, self.context)
        self.event_dim = self.example()[0].dim() - 1

    def _prior(self, context: Tensor | None) -> Any:
        if self.prior is None:
            return dist.Normal(self._zeros, torch.ones_like(self._zeros)).to_event(1)
        return distribution_of(self.prior, context)

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

    @property
    def schema(self) -> Any:
        """The columns and categories of a table, where the likelihood was made from one."""
        return getattr(self.likelihood, "schema", None)

    def _apply(self, fn: Any, recurse: bool = True) -> "VAE":  # noqa: FBT001, FBT002
        """What `.to()` and its like do to each tensor; a fixed prior goes along."""
        super()._apply(fn, recurse)
        self.prior = self.prior if isinstance(self.prior, nn.Module) else moved(self.prior, fn)
        return self

    def example(self) -> tuple[Tensor, ...]:
        """Arguments of a call on one datum of zeros, from which a guide can learn the shapes."""
        context = () if self.context is None else (self._zeros.new_zeros(1, self.context),)
        z = torch.cat([self._zeros.expand(1, -1), *context], -1)
        with eval_mode(self), torch.no_grad(), random_state(None, keep=True):
            try:
                output = self.decoder(z)
            except RuntimeError as error:
                raise ValueError(
                    f"decoder: expected a module that takes shape {tuple(z.shape)}, got one "
                    f"that does not: {error}"
                ) from error
            came = getattr(output, "shape", type(output).__name__)
            whole = isinstance(output, Tensor) and output.shape[:1] == (1,)
            expect(whole, "decoder", "an output of shape (1, *event) for one latent", came)
            real = output.is_floating_point()
            expect(real, "decoder", "an output of real numbers", output.dtype, TypeError)
            try:
                fn = self.likelihood(output)
            except RuntimeError as error:
                shape = tuple(output.shape)
                raise ValueError(
                    f"likelihood: expected a module that takes shape {shape}, got one that does "
                    f"not: {error}"
                ) from error
        kind = "a module that returns a Pyro distribution"
        expect(isinstance(fn, dist.Distribution), "likelihood", kind, repr(fn), TypeError)
        one = fn.shape()[:1] == (1,)
        expect(one, "likelihood", "a distribution of shape (1, *event) for one datum", fn.shape())
        return (output.new_zeros(fn.shape()), *context)

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
            fn = fn.to_event(self.event_dim - fn.event_dim)
            if x is not None:
                fits = fn.shape()[-x.dim() :] == x.shape and x.dim() == self.event_dim + 1
                wanted = f"output of shape {tuple(x.shape)}, as x"
                expect(fits, "decoder", wanted, tuple(fn.shape()))
            return pyro.sample("x", fn, obs=x)

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
            got, wanted = type(x).__name__, "a tensor of shape (batch, *event)"
            expect(isinstance(x, Tensor) and x.dim() > 0, "x", wanted, got, TypeError)
            expect(len(x), "x", "at least one datum", "none")
            if features is not None:
                expect(len(features) == len(x), "context", f"{len(x)} rows, as x", len(features))
        return features

    def get_extra_state(self) -> dict[str, Any]:
        """What of prior and likelihood is no parameter: their kinds, and a fixed prior's values."""
        learned = [name for name, _ in self.likelihood.named_parameters()]
        settings: list[str] = getattr(self.likelihood, "settings", list)()
        learned_prior = isinstance(self.prior, nn.Module)
        return {
            "likelihood": [type(self.likelihood).__qualname__, *learned, *settings],
            "prior": [type(self.prior).__qualname__] if learned_prior else parts_of(self.prior),
            "context": [f"{self.context}"],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Does nothing: a state of another prior or likelihood was refused before."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own, saved = self.get_extra_state(), state_dict.setdefault(prefix + "_extra_state", {})
        for name in saved.keys() & own.keys():
            expect(_alike(own[name], saved[name]), name, f"a state of {own[name]}", saved[name])
        super()._load_from_state_dict(state_dict, prefix, *args)

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
        output = self.decoder(z.reshape(-1, z.shape[-1]) if z.dim() != 2 else z)
        whole = isinstance(output, Tensor) and output.dim() > 0
        came = getattr(output, "shape", type(output).__name__)
        expect(whole, "decoder", "an output of shape (batch, *event)", came)
        return output if z.dim() == 2 else output.reshape(z.shape[:-1] + output.shape[1:])

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


def _alike(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists have the same words and, up to the rounding of a dtype, numbers."""
    return len(some) == len(others) and all(
        isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(a.double(), b.double())
        if isinstance(a, Tensor)
        else a == b
        for a, b in zip(some, others, strict=True)
    )
