"""What a model may say of itself, beyond being a Pyro program."""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ppvae._checks import expect


class Model(Protocol):
    """A Pyro model, and five things that it may offer besides; a plain function offers none.

    **To write a model** for this library, write a Pyro model: a function or module whose
    `pyro.sample` statements for one datum stand in a plate, best called `data`. Each of the other
    members may be left out, and then the library does without:

    - `vectorized`: True if the program may run inside further plates to the left of its own, so
      that many draws are made in one run. All its operations must leave leading dimensions alone.
      `ppvae.programs.tracing.is_vectorized` asks.
    - `example()`: arguments of a call, such as one datum of zeros, from which a `FamilyGuide` with
      an encoder learns the shapes before its first call. `example_of` asks.
    - `check_data(*args)`: raises a ValueError if the data are not such as the model can explain;
      `fit` calls it once before the first step, on all data, with those of its `kwargs` that the
      method has arguments for. `check_data_of` asks.
    - `check_call(*args)`: raises a TypeError or ValueError if arguments do not fit the model; it is
      asked where a guide fails on them, which would blame the encoder.
    - `present(*args, **kwargs)`: which members of the latents that the model masks
      (`poutine.mask`) are there: site -> True and False over the plates of the site, as the mask
      is. A `FamilyGuide` then leaves the others out of log q, so that it can be trained by plain
      Pyro, too, and gives zeros for their values to what depends on them. It must not depend on
      draws. `present_in` asks, at each call of a guide.
    """

    vectorized: bool

    def example(self) -> tuple[Any, ...]:
        """Arguments of a call, from which a guide can learn the shapes."""

    def check_data(self, *args: Any) -> None:
        """Raises a ValueError unless the model can explain the data."""

    def present(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """Latent site -> which of its members count; sites that all count may be left out."""


def example_of(model: Any) -> tuple[Any, ...] | None:
    """Arguments of a call of the model, or None if it offers none."""
    example = getattr(model, "example", None)
    return None if example is None else example()


def check_data_of(model: Any, /, *args: Any, **kwargs: Any) -> None:
    """Lets the model check the data, if it offers to, with those keyword arguments that it takes.

    Raises:
        ValueError: the model refuses the data.
    """
    check = getattr(model, "check_data", None)
    if callable(check):
        takes = inspect.signature(check).parameters
        check(*args, **{name: value for name, value in kwargs.items() if name in takes})


def present_in(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Latent site -> which of its members count, in a call of the model; empty if all do.

    Raises:
        TypeError: the model says something else than True and False by site.
    """
    present = getattr(model, "present", None)
    if not callable(present):
        return {}
    found = present(*args, **kwargs)
    masks = isinstance(found, Mapping) and all(isinstance(m, Tensor) for m in found.values())
    wanted = "True and False by latent site from its `present`"
    expect(masks, "model", wanted, type(found).__name__, TypeError)
    for name, mask in found.items():
        expect(mask.dtype == torch.bool, "model", f"{wanted}, {name!r}", mask.dtype, TypeError)
    return dict(found)
