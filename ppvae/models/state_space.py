"""A state-space model of sequences, as a Pyro program."""

from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae._checks import check_count, expect
from ppvae.models.decoded import Decoded, check_conditional


class DeepMarkov(Decoded):
    r"""The deep Markov model: `p(z_0) p(z_t | z_{t-1})`, and `p(x_t | z_t)` at each step.

    Its sites are the states `z_0`, `z_1`, ..., one for each step and each of shape `(latent,)`, and
    the sequence `x`, all in the plate `data`. The encoder is no part of it: a `FamilyGuide` with
    features `(batch, steps, features)` and `{"z_*": Block("mean_scale", given="previous")}` draws
    the states as a chain, too.

    Called as `model(x)` with sequences of one length, or as `model(x, lengths)` with such as end
    earlier: what stands behind an end, be it zeros or NaN, counts nothing, neither in the
    likelihood nor in prior and guide (`poutine.mask`), and what a guide draws there means nothing:
    whatever follows, follows on zeros. A `FamilyGuide` can be trained by plain Pyro, too; another
    guide needs a mask of its own there. Steps that were not observed, in the middle, are NaN. A
    joint family, such as `families.Banded`, draws all states of all sequences: it takes those that
    end earlier without their lengths, as sequences whose last steps are NaN, and log p(x) is the
    same.

    Args:
        decoder: a module `(batch, latent) -> (batch, *event)`, from a state to its observation.
        transition: a module from states `(*, latent)` to a Pyro distribution over the next ones, of
            batch shape `(*)` and event shape `(latent,)`, such as
            `priors.Learned(latent, context=latent, network=mlp(latent, 32))`.
        latent: length of a state, at least 1.
        likelihood: a module from the decoder's output to a distribution over its elements.
        prior: of the first state: a Pyro distribution of event shape `(latent,)`, or a module that
            returns one; by default standard normal.

    Raises:
        TypeError: `decoder`, `transition` or `likelihood` is no module, or returns something else
            than is said here.
        ValueError: `latent` is no whole number of at least 1, a part has another shape, or, in a
            call, the sequences or their lengths do not fit the model.

    Krishnan, Shalit and Sontag, Structured inference networks for nonlinear state space models,
    2017.

    Example:
        >>> from ppvae import likelihoods, priors
        >>> from ppvae.nn import mlp
        >>> transition = priors.Learned(2, context=2, network=mlp(2, 16))
        >>> model = DeepMarkov(mlp(2, 16, out=3), transition, 2, likelihoods.Normal(0.1))
        >>> model(steps=5, size=4).shape
        torch.Size([4, 5, 3])
    """

    #: every operation leaves leading dims alone, so that many draws can be made in one run
    vectorized = True

    def __init__(
        self,
        decoder: nn.Module,
        transition: nn.Module,
        latent: int,
        likelihood: nn.Module,
        prior: Any | None = None,
    ) -> None:
        super().__init__(decoder, latent, likelihood, prior)
        check_conditional("transition", transition, self._zeros, self.latent)
        self.transition = transition
        self.event_shape = self._datum(self._zeros.expand(1, -1)).shape[1:]

    def forward(
        self,
        x: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        steps: int | None = None,
        size: int = 1,
    ) -> Tensor:
        """Runs the program.

        Args:
            x: sequences of shape `(batch, steps, *event)` to condition on; None draws some.
            lengths: how many steps each has, from 1 to `steps`, of shape `(batch,)`; by default all
                of them.
            steps: how many to draw, without `x`.
            size: how many sequences to draw, without `x`.

        Returns:
            The sequences, of shape `(batch, steps, *event)`.
        """
        self.check_call(x, lengths)
        expect(x is not None or steps is not None, "x", "sequences, or `steps` without", None)
        size = check_count("size", size) if x is None else len(x)
        steps = check_count("steps", steps) if x is None else x.shape[1]
        present = {} if x is None else self.present(x, lengths)
        with pyro.plate("data", size, dim=-1):
            states: list[Tensor] = []
            for t in range(steps):
                mask: Any = present.get(f"z_{t}")
                fn = self.transition(_kept(states[-1], mask)) if states else self._prior()
                with nullcontext() if mask is None else poutine.mask(mask=mask):
                    states.append(_kept(pyro.sample(f"z_{t}", fn), mask))
            fn = self.likelihood(self.decode(torch.stack(states, -2)))
            inner = len(self.event_shape) - fn.event_dim  # dims of one step that are of its batch
            if present:
                inside = torch.stack([*present.values()], -1)
                fn = fn.mask(inside.reshape(*inside.shape, *[1] * inner))
            return pyro.sample("x", fn.to_event(1 + inner), obs=x)

    def present(self, x: Tensor, lengths: Tensor | None = None, **others: Any) -> dict[str, Tensor]:
        """State -> whether each sequence has it, `(batch,)`; the arguments are those of a call."""
        if lengths is None:
            return {}
        return {f"z_{t}": t < lengths for t in range(x.shape[1])}

    def check_call(
        self, x: Tensor | None = None, lengths: Tensor | None = None, *others: Any
    ) -> None:
        """Checks the arguments of a call.

        Raises:
            TypeError: the sequences or the lengths are no tensor of real numbers, or there is
                something else.
            ValueError: they do not fit the model or one another.
        """
        told = f"{2 + len(others)} arguments"
        expect(not others, "args", "sequences, and their lengths at most", told, TypeError)
        if x is None:
            expect(lengths is None, "lengths", "none without x", "some")
            return
        expect(isinstance(x, Tensor), "x", "a tensor", type(x).__name__, TypeError)
        event = ", ".join(["batch", "steps", *map(str, self.event_shape)])
        fits = x.dim() == 2 + len(self.event_shape) and x.shape[2:] == self.event_shape
        fits = fits and min(x.shape[:2]) > 0
        expect(fits, "x", f"shape ({event}), as the decoder's output", tuple(x.shape))
        if lengths is None:
            return
        kind = getattr(lengths, "dtype", type(lengths).__name__)
        dense = isinstance(lengths, Tensor) and lengths.layout is torch.strided
        real = dense and lengths.dtype != torch.bool and not lengths.is_complex()
        real = real and lengths.device == x.device and not lengths.is_meta
        expect(real, "lengths", "a dense tensor of whole numbers where x is", kind, TypeError)
        wanted = f"shape ({len(x)},), one for each sequence"
        expect(lengths.shape == x.shape[:1], "lengths", wanted, tuple(lengths.shape))
        if not torch.compiler.is_compiling():
            bad = ~((lengths >= 1) & (lengths <= x.shape[1]) & (lengths == lengths.round()))
            row = bad.nonzero()
            got = f"{lengths[row[0, 0]].item():g} in row {row[0, 0]}" if len(row) else ""
            expect(not len(row), "lengths", f"whole numbers from 1 to {x.shape[1]}", got)


def _kept(state: Tensor, mask: Tensor | None) -> Tensor:
    """A state, and zeros behind an end, so that nothing runs away there."""
    return state if mask is None else torch.where(mask.unsqueeze(-1), state, 0.0)
