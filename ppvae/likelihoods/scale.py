"""What likelihoods with a location and a scale share: where the scale comes from."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppvae._checks import check_flag, expect
from ppvae.likelihoods.base import Likelihood, positive

#: A learned scale stays above this share of the data's own, where the data are known.
FLOOR = 1e-3


class Scaled(Likelihood):
    """A likelihood whose first number is a location, with a scale.

    The scale is fixed, or learned and the same for all data (one number, or one per column), or,
    with `per_datum`, the exponential of a second number of the decoder, times `scale`.

    Args:
        scale: a positive number, or a tensor that broadcasts to one event.
        learned: whether training moves it.
        per_datum: whether the decoder puts out its logarithm.

    Raises:
        TypeError: `scale` is no number, or `learned` or `per_datum` no bool.
        ValueError: `scale` is not positive and finite; in `load_state_dict`, the state is that of
            another fixed scale.
    """

    def __init__(
        self, scale: float | Tensor = 1.0, *, learned: bool = False, per_datum: bool = False
    ) -> None:
        super().__init__()
        learned = check_flag("learned", learned)
        self.per_datum = check_flag("per_datum", per_datum)
        both = learned and self.per_datum
        expect(not both, "per_datum", "False where the scale is learned for all", per_datum)
        self.spread: Tensor | None
        self.outputs = 2 if self.per_datum else 1
        self.register_buffer("spread", None)
        log_scale = positive("scale", scale).log()
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def extra_repr(self) -> str:
        """The scale, where it is fixed."""
        if isinstance(self.log_scale, nn.Parameter):
            return "learned=True"
        words = f"scale={self.scale.tolist()}" if self.log_scale.numel() < 10 else "scale=..."
        return f"{words}, per_datum=True" if self.per_datum else words

    def settings(self) -> list[str]:
        """Whether the decoder puts out the scale."""
        return ["per_datum"] if self.per_datum else []

    @property
    def scale(self) -> Tensor:
        """The scale, of the shape it was given in; what the decoder's factor is of."""
        return self._floored(self.log_scale)

    def begin(self, data: NDArray[np.float64]) -> None:
        """Starts at the mean and standard deviation of each column; of these is the decoder's unit.

        A scale that is fixed is taken as a share of that standard deviation.
        """
        sd = np.nanstd(data, 0)
        sd[sd == 0] = 1.0  # of a column that is always the same
        self.set_start(np.nanmean(data, 0))
        spread = torch.tensor(sd, dtype=torch.get_default_dtype())
        self.register_buffer("spread", spread)
        own, wide = self.log_scale.shape, spread.shape
        fits = len(own) <= len(wide) and all(
            a in (1, b) for a, b in zip(own[::-1], wide[::-1], strict=False)
        )
        expect(fits, "scale", f"numbers for columns {tuple(wide)}", f"shape {tuple(own)}")
        log_scale = self.log_scale.detach() + spread.log()
        if isinstance(self.log_scale, nn.Parameter):
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.log_scale = log_scale

    def location_and_scale(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Both, of shape `(*, columns)`, and the scale of one that broadcasts to it."""
        location, *others = self.numbers(output, self.spread)
        return location, self._floored(self.log_scale + others[0]) if self.per_datum else self.scale

    def _floored(self, log_scale: Tensor) -> Tensor:
        scale = log_scale.exp()
        return scale if self.spread is None else scale.maximum(FLOOR * self.spread)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own, saved = self.log_scale, state_dict.get(prefix + "log_scale")
        if not isinstance(own, nn.Parameter) and saved is not None and saved.shape == own.shape:
            same = torch.allclose(saved.to(own), own, atol=1e-5)
            expect(same, "scale", f"a state of scale {self.scale}", f"one of {saved.exp()}")
        super()._load_from_state_dict(state_dict, prefix, *args)
