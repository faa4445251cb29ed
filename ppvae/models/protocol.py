"""What a model may say of itself, beyond being a Pyro program."""

from typing import Any, Protocol


class Model(Protocol):
    """A Pyro model, and four things that it may offer besides; a plain function offers none.

    **To write a model** for this library, write a Pyro model: a function or module whose
    `pyro.sample` statements for one datum stand in a plate, best called `data`. Each of the other
    members may be left out, and then the library does without:

    - `vectorized`: True if the program may run inside further plates to the left of its own, so
      that many draws are made in one run. All its operations must leave leading dimensions alone.
      `ppvae.programs.runs.is_vectorized` asks.
    - `example()`: arguments of a call, such as one datum of zeros, from which a `FamilyGuide` with
      an encoder learns the shapes before its first call. `example_of` asks.
    - `check_data(*args)`: raises a ValueError if the data are not such as the model can explain;
      `fit` calls it once before the first step, on all data. `check_data_of` asks.
    - `check_call(*args)`: raises a TypeError or ValueError if arguments do not fit the model; it is
      asked where a guide fails on them, which would blame the encoder.
    """

    vectorized: bool

    def example(self) -> tuple[Any, ...]:
        """Arguments of a call, from which a guide can learn the shapes."""

    def check_data(self, *args: Any) -> None:
        """Raises a ValueError unless the model can explain the data."""


def example_of(model: Any) -> tuple[Any, ...] | None:
    """Arguments of a call of the model, or None if it offers none."""
    example = getattr(model, "example", None)
    return None if example is None else example()


def check_data_of(model: Any, *args: Any) -> None:
    """Lets the model check the data, if it offers to.

    Raises:
        ValueError: the model refuses the data.
    """
    check = getattr(model, "check_data", None)
    if check is not None:
        check(*args)
