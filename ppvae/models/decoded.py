"""What models with a decoder share: its checks and shapes, the prior, and states of one meaning."""

from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae._checks import check_count, expect
from ppvae._scopes import UniquelyNamed, eval_mode, random_state
from ppvae.priors import as_prior, distribution_of, moved, parts_of


class Decoded(UniquelyNamed):
    """A model of a latent with a prior, a decoder and a likelihood; the base of those here.

    Args:
        decoder: a module `(batch, latent) -> (batch, *event)`.
        latent: length of the latent that `prior` is for.
        likelihood: a module from the decoder's output to a distribution over its elements.
        prior: a Pyro distribution over one latent or a module that returns one; None for the
            standard normal.
        context: how many numbers the context of a datum is; None for none.

    Raises:
        TypeError, ValueError: as `VAE` says.
    """

    def __init__(
        self,
        decoder: nn.Module,
        latent: int,
        likelihood: nn.Module,
        prior: Any | None,
        context: int | None = None,
    ) -> None:
        super().__init__()
        for name, module in {"decoder": decoder, "likelihood": likelihood}.items():
            check_module(name, module)
        self.decoder, self.latent = decoder, check_count("latent", latent)
        self.likelihood = likelihood
        like = next(decoder.parameters(), torch.zeros(()))
        zeros = torch.zeros(self.latent, dtype=like.dtype, device=like.device)
        self.register_buffer("_zeros", zeros, persistent=False)
        self.context = None if context is None else check_count("context", context)
        self.prior = None if prior is None else as_prior(prior, self.latent, self.context)

    def _prior(self, context: Tensor | None = None) -> Any:
        if self.prior is None:
            return dist.Normal(self._zeros, torch.ones_like(self._zeros)).to_event(1)
        return distribution_of(self.prior, context)

    @property
    def schema(self) -> Any:
        """The columns and categories of a table, where the likelihood was made from one."""
        return getattr(self.likelihood, "schema", None)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """What `.to()` and its like do to each tensor; a fixed prior goes along."""
        super()._apply(fn, recurse)
        self.prior = self.prior if isinstance(self.prior, nn.Module) else moved(self.prior, fn)
        return self

    def _datum(self, z: Tensor) -> Tensor:
        """A datum of zeros, of shape `(1, *event)`, for one input of the decoder."""
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
        return output.new_zeros(fn.shape())

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's output for its inputs with any number of leading dims, `(*, latent)`."""
        output = self.decoder(z.reshape(-1, z.shape[-1]) if z.dim() != 2 else z)
        whole = isinstance(output, Tensor) and output.dim() > 0
        came = getattr(output, "shape", type(output).__name__)
        expect(whole, "decoder", "an output of shape (batch, *event)", came)
        return output if z.dim() == 2 else output.reshape(z.shape[:-1] + output.shape[1:])

    def mean(self, z: Tensor) -> Tensor:
        """The mean of the likelihood for inputs of the decoder `(*, latent)`, `(*, *event)`."""
        mean: Tensor = self.likelihood(self.decode(z)).mean
        return mean

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


def check_x(x: Any) -> None:
    """Raises a TypeError unless data are a tensor, a ValueError if there are none."""
    got, wanted = type(x).__name__, "a tensor of shape (batch, *event)"
    expect(isinstance(x, Tensor) and x.dim() > 0, "x", wanted, got, TypeError)
    expect(len(x), "x", "at least one datum", "none")


def observe(fn: Any, x: Tensor | None, event_dim: int) -> Tensor:
    """Samples the site `x` from what a likelihood returned, or conditions it on data.

    Raises:
        ValueError: the data have another shape than the decoder's output.
    """
    fn = fn.to_event(event_dim - fn.event_dim)
    if x is not None:
        fits = fn.shape()[-x.dim() :] == x.shape and x.dim() == event_dim + 1
        wanted = f"output of shape {tuple(x.shape)}, as x"
        expect(fits, "decoder", wanted, tuple(fn.shape()))
    drawn: Tensor = pyro.sample("x", fn, obs=x)
    return drawn


def check_module(name: str, module: Any) -> None:
    """Raises a TypeError unless a part of a model is a module."""
    known = isinstance(module, nn.Module)
    expect(known, name, "a torch.nn.Module", repr(module), TypeError)


def check_conditional(name: str, module: Any, given: Tensor, latent: int) -> None:
    """Checks a module from a latent to the distribution of another one.

    Args:
        name: of the argument.
        module: takes latents `(*, given)`; returns a Pyro distribution over `(*, latent)`.
        given: one latent, of shape `(given,)`.
        latent: length of the other latent.

    Raises:
        TypeError: it is no module, or returns something else.
        ValueError: it does not take the latent, or its distribution is of another shape.
    """
    check_module(name, module)
    with eval_mode(module), torch.no_grad(), random_state(None, keep=True):
        for shape in ((1, len(given)), (3, 2, len(given))):
            try:
                fn = module(given.expand(shape))
            except RuntimeError as error:
                wanted = f"expected a module that takes shape {shape}, got one that does not"
                raise ValueError(f"{name}: {wanted}: {error}") from error
            kind = "a module that returns a Pyro distribution"
            expect(isinstance(fn, dist.Distribution), name, kind, repr(fn), TypeError)
            shapes = tuple(fn.event_shape), tuple(fn.batch_shape)
            wanted = f"event shape ({latent},) and batch shape {shape[:-1]} for {shape}"
            expect(shapes == ((latent,), shape[:-1]), name, wanted, f"{shapes[0]} and {shapes[1]}")


def _alike(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists have the same words and, up to the rounding of a dtype, numbers."""
    return len(some) == len(others) and all(
        isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(a.double(), b.double())
        if isinstance(a, Tensor)
        else a == b
        for a, b in zip(some, others, strict=True)
    )
