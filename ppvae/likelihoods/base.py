"""What all likelihoods share: how many numbers they take per column, and where they start."""

from typing import Any, Self

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae._checks import as_doubles, check_array, check_real, expect
from ppvae.data.adapters import real_numbers


class Likelihood(nn.Module):
    """A likelihood that takes `outputs` numbers of the decoder for each column of the data.

    Attributes:
        outputs: how many; of more than one the decoder puts out all first ones, then all second
            ones.
        takes_exposure: whether it can be called with an exposure of each datum, too, by which the
            means are multiplied, as those of counts can.
        start: what is added to the first ones, of shape `(columns,)`; None without data.
    """

    outputs = 1
    takes_exposure = False
    start: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", None)

    @classmethod
    def of(cls, data: Any, *, exposure: Any = None, **options: Any) -> Self:
        """A likelihood that starts at the data's own location (and scale, where it has one).

        Args:
            data: of shape `(rows, columns)`, or `(rows, *event)`.
            exposure: of counts, what their means are to be multiplied by, of shape `(rows,)`.
            **options: of the class.

        Raises:
            TypeError, ValueError: the data are no finite numbers, or none that it can take.
        """
        made, values = cls(**options), table(data)
        begin: Any = made.begin
        if exposure is None:
            begin(values)
        else:
            wanted = "none for this likelihood, which is not of counts"
            expect(made.takes_exposure, "exposure", wanted, cls.__name__)
            share = check_array("exposure", exposure, (len(values),))
            expect((share > 0).all(), "exposure", "positive numbers", share.min())
            begin(values, share.reshape(-1, *[1] * (values.ndim - 1)))
        return made

    def exposed(self, log_mean: Tensor, exposure: Tensor | None) -> Tensor:
        """The log means of counts under an exposure, of shape `(batch,)` or that of the means.

        Raises:
            TypeError: the exposure is no real numbers.
            ValueError: one is not positive, or they do not fit the means.
        """
        if exposure is None:
            return log_mean
        exposure = check_real("exposure", exposure).to(log_mean)
        if not torch.compiler.is_compiling():
            bad = (~(exposure > 0)).nonzero()
            got = f"{exposure[tuple(bad[0])].item():g} in row {bad[0, 0]}" if len(bad) else ""
            expect(not len(bad), "exposure", "positive numbers", got)
        exposure = exposure.unsqueeze(-1) if exposure.dim() == 1 else exposure
        shape = tuple(exposure.shape)
        fits = len(shape) == 2 and shape[0] == log_mean.shape[-2]
        fits = fits and shape[1] in (1, log_mean.shape[-1])
        wanted = f"shape ({log_mean.shape[-2]},), one for each datum, or that of the data"
        expect(fits, "exposure", wanted, shape)
        return log_mean + exposure.log()

    def begin(self, data: NDArray[np.float64]) -> None:
        """Sets the start from data of shape `(rows, *event)`, in double precision.

        A likelihood that takes an exposure takes one here, too, of shape `(rows, 1, ...)`.
        """
        raise NotImplementedError

    def set_start(self, start: Any) -> None:
        """Keeps a start in the default dtype."""
        self.register_buffer("start", torch.as_tensor(start, dtype=torch.get_default_dtype()))

    def settings(self) -> list[str]:
        """What it was made with and is no parameter; a state of others is refused."""
        return []

    def size(self, columns: int) -> int:
        """How many numbers the decoder has to put out for so many columns."""
        return self.outputs * columns

    def numbers(self, output: Tensor, unit: Tensor | None = None) -> list[Tensor]:
        """The numbers of each kind, of shape `(*, columns)`; the start is added to the first.

        Args:
            output: of the decoder.
            unit: what the first ones are multiplied by, before.

        Raises:
            ValueError: the last dimension of the output cannot be so divided, or has another
                number of columns than the data of the start.
        """
        several = self.outputs > 1
        if several:
            width = output.shape[-1] if output.dim() else 0
            wanted = f"an output whose last dimension is {self.outputs} times the columns"
            expect(width and width % self.outputs == 0, "decoder", wanted, tuple(output.shape))
        parts = [*output.unflatten(-1, (self.outputs, -1)).unbind(-2)] if several else [output]
        if self.start is not None:
            shape = self.start.shape
            fits = parts[0].shape[parts[0].dim() - len(shape) :] == shape
            expect(fits, "decoder", f"an output for columns {tuple(shape)}", tuple(output.shape))
            parts[0] = (parts[0] if unit is None else parts[0] * unit) + self.start
        return parts

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "start")
        alike = (saved is None) == (self.start is None)
        got = "one without" if saved is None else "one with"
        expect(
            alike, "likelihood", f"a state {'with' if got[-1] == 't' else 'without'} a start", got
        )
        super()._load_from_state_dict(state_dict, prefix, *args)


def positive(name: str, value: Any) -> Tensor:
    """Positive finite numbers as a tensor in the default dtype.

    Raises:
        TypeError: they are no real numbers.
        ValueError: one is not positive and finite.
    """
    tensor = check_real(name, value).to(torch.get_default_dtype())
    fine = not isinstance(value, bool) and (torch.isfinite(tensor) & (tensor > 0)).all()
    expect(fine, name, "positive finite numbers", value)
    return tensor.detach().clone()


def table(data: Any) -> NDArray[np.float64]:
    """Data as doubles of shape `(rows, *event)`; NaN where an entry is missing.

    Raises:
        TypeError: they are no real numbers.
        ValueError: there is no row, a number is infinite, or nothing is observed in a column.
    """
    values = as_doubles(real_numbers("data", data))
    expect(values.ndim > 1 and len(values), "data", "shape (rows, *event)", values.shape)
    bad = int(np.isinf(values).sum())
    expect(not bad, "data", "finite numbers, or NaN where one is missing", f"{bad} infinite ones")
    empty = np.argwhere(seen(values) == 0)
    where = ", ".join(map(str, empty[0])) if len(empty) else ""
    expect(not len(empty), "data", "an entry in each column", f"none in column {where}")
    with np.errstate(over="ignore"):
        small = np.isfinite(np.nansum(values**2, 0)).all()
    expect(small, "data", "numbers whose squares are numbers", f"up to {np.nanmax(abs(values)):g}")
    return values


def seen(data: NDArray[np.float64]) -> NDArray[np.int_]:
    """How many entries of each column are observed."""
    return np.asarray((~np.isnan(data)).sum(0))


def valid_value(fn: Any) -> Any:
    """A value that each element of a distribution can take; None where its support is not known.

    A distribution of elements of several kinds says it by a method of this name.
    """
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    if hasattr(fn, "valid_value"):
        return fn.valid_value()
    try:
        support = fn.support
    except NotImplementedError:
        return None
    low, high = (getattr(support, f"{end}_bound", None) for end in ("lower", "upper"))
    if isinstance(support, type(constraints.real)):
        return 0.0
    if support.is_discrete:
        return 0.0 if low is None else low
    if low is None:
        return None if high is None else high - 1
    return low + 1 if high is None else (low + high) / 2


def taken(values: NDArray[np.float64], good: NDArray[np.bool_], kind: str) -> None:
    """Raises a ValueError that names the first datum and column that a likelihood cannot take."""
    good = good | np.isnan(values)
    if not good.all():
        row, *column = place = tuple(np.argwhere(~good)[0].tolist())
        where = f"{values[place]:g} in row {row}, column {', '.join(map(str, column))}"
        raise ValueError(f"data: expected {kind}, got {where}")
