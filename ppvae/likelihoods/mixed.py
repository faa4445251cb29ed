"""The likelihood of a table with columns of several kinds."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae._checks import check_mapping, expect
from ppvae.data.adapters import Schema, schema_of
from ppvae.data.tables import Labels
from ppvae.likelihoods.base import Likelihood, valid_value


class Mixed(Likelihood):
    """A likelihood for each column of a table.

    `Mixed({(0, 1, 4): Normal(learned=True), (2,): Categorical(3), range(5, 9): Poisson()})`; the
    decoder puts out `size()` numbers, those of the first likelihood first.

    Args:
        parts: column or columns -> the likelihood of these.

    Raises:
        TypeError: a key is no whole number and no sequence of such, or what it has no likelihood.
        ValueError: the columns are not each of 0, 1, ... once.
    """

    def __init__(self, parts: Mapping[Any, Likelihood]) -> None:
        super().__init__()
        self.back: Tensor
        #: the columns and categories of the table that it was made from, where it was
        self.schema: Schema | None = None
        self.columns = [_columns(key) for key in check_mapping("parts", parts)]
        for key, part in parts.items():
            known = isinstance(part, Likelihood) and not isinstance(part, Mixed)
            wanted = f"a likelihood for columns {key}"
            expect(known, "parts", wanted, type(part).__name__, TypeError)
        self.parts = nn.ModuleList(parts.values())
        order = [column for columns in self.columns for column in columns]
        once = sorted(order) == list(range(len(order)))
        expect(once, "parts", "each of the columns 0, 1, ... once", sorted(order))
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
        self.register_buffer("back", back, persistent=False)

    @classmethod
    def of(  # type: ignore[override]
        cls, data: Any, *, parts: Mapping[Any, Likelihood], exposure: Any = None
    ) -> Self:
        """A likelihood that starts at the data's own location and scale in each column.

        Args:
            data: of shape `(rows, columns)`.
            exposure: none, since not all columns are counts.
            parts: as for the class, and copied, as they are to start at these data; for a table of
                pandas the columns may be named. The likelihood then knows the categories of a
                column by their names, whatever codes those of another table have.

        Raises:
            TypeError, ValueError: as for the class, or the data are none that it can take.
        """
        expect(exposure is None, "exposure", "none for a table of several kinds", "one")
        names = Labels(data).columns or []
        named = {_named(key, names): part for key, part in check_mapping("parts", parts).items()}
        given = {key: copy.deepcopy(part) for key, part in named.items()}
        told = [_columns(key) for key in given]
        left = [name for at, name in enumerate(names) if not any(at in each for each in told)]
        expect(not left, "parts", "a likelihood for each column", f"none for {left}")
        made = super().of(data, parts=given)
        made.schema = schema_of(data)
        return made

    def settings(self) -> list[str]:
        """Those of the parts, their columns, and the categories that are known by name."""
        pairs = zip(self._parts(), self.columns, strict=True)
        words = [f"{type(p).__qualname__} {p.settings()} for columns {c}" for p, c in pairs]
        known = self.schema
        return words if known is None else [*words, f"{known.columns}, {known.categories}"]

    def size(self, columns: int | None = None) -> int:
        """How many numbers the decoder has to put out.

        Raises:
            ValueError: there are other columns than so many.
        """
        own = len(self.back)
        expect(columns in (None, own), "columns", f"{own}, those of the parts", columns)
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        pairs = zip(self._parts(), self.columns, strict=True)
        return [part.size(len(columns)) for part, columns in pairs]

    def _parts(self) -> list[Likelihood]:
        return [part for part in self.parts if isinstance(part, Likelihood)]

    def begin(self, data: NDArray[np.float64]) -> None:
        """Starts each part at its own columns.

        Raises:
            ValueError: the data have other columns, or some that their part cannot take.
        """
        own = len(self.back)
        expect(data.ndim == 2 and data.shape[1] == own, "data", f"{own} columns", data.shape)
        for part, columns in zip(self._parts(), self.columns, strict=True):
            try:
                part.begin(data[:, columns])
            except ValueError as error:
                raise ValueError(f"{error} of columns {columns}") from None

    def forward(self, output: Tensor) -> dist.Distribution:
        """One distribution per column, each of its kind."""
        expect(
            output.shape[-1:] == (self.size(),),
            "decoder",
            f"{self.size()} outputs, which the columns take",
            tuple(output.shape),
        )
        outputs = output.split(self._sizes(), -1)
        fns = [part(own) for part, own in zip(self.parts, outputs, strict=True)]
        return Joint(fns, self.columns, self.back)


class _Each(constraints.Constraint):
    """Each column in the support of its own distribution."""

    def __init__(self, joint: "Joint") -> None:
        self.joint = joint

    def __repr__(self) -> str:
        parts = zip(self.joint.columns, self.joint.fns, strict=True)
        return "; ".join(f"columns {c}: {fn.support}" for c, fn in parts)

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        """Whether all columns are."""
        return all(fn.support.is_discrete for fn in self.joint.fns)

    def check(self, value: Tensor) -> Tensor:
        """Which elements are."""
        joint = self.joint
        parts = zip(joint.fns, joint.columns, strict=True)
        return joint.put([fn.support.check(value[..., c]) for fn, c in parts])


class Joint(dist.TorchDistribution):
    """Distributions of several kinds side by side, one for each column."""

    arg_constraints: dict[str, Any] = {}
    fixed_support = True

    def __init__(
        self,
        fns: Sequence[Any],
        columns: Sequence[list[int]],
        back: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.fns, self.columns, self.back = list(fns), columns, back
        shape = torch.broadcast_shapes(*(fn.batch_shape[:-1] for fn in fns))
        super().__init__(torch.Size((*shape, len(back))), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Of each column its own."""
        return _Each(self)

    def put(self, parts: Sequence[Tensor]) -> Tensor:
        """What was worked out for each kind, in the order of the columns."""
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([p.expand(*shape, p.shape[-1]) for p in parts], -1)[..., self.back]

    def valid_value(self) -> Tensor:
        """Of each column a value that it can take."""
        pairs = zip(self.fns, self.columns, strict=True)
        return self.put([torch.as_tensor(valid_value(fn)).expand(len(c)) for fn, c in pairs])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Joint":
        """The same for more data."""
        shape = torch.Size(batch_shape)[:-1]
        fns = [fn.expand((*shape, len(c))) for fn, c in zip(self.fns, self.columns, strict=True)]
        return Joint(fns, self.columns, self.back, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The means; NaN for categories."""
        return self.put([fn.mean for fn in self.fns])

    @property
    def variance(self) -> Tensor:
        """The variances; NaN for categories."""
        return self.put([fn.variance for fn in self.fns])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of all columns, in one dtype."""
        drawn = [fn.sample(torch.Size(sample_shape)) for fn in self.fns]
        dtype = next((d.dtype for d in drawn if d.is_floating_point()), drawn[0].dtype)
        return self.put([d.to(dtype) for d in drawn])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log densities, or probabilities, of each element."""
        if self._validate_args:
            self._validate_sample(value)
        parts = zip(self.fns, self.columns, strict=True)
        return self.put([fn.log_prob(value[..., c]) for fn, c in parts])


def _named(key: Any, names: list[str]) -> Any:
    """Columns by number, from such or from names."""
    several = [key] if isinstance(key, (str, int, np.integer)) else key
    if not isinstance(several, (Sequence, range)):
        return key
    unknown = [each for each in several if isinstance(each, str) and each not in names]
    expect(not unknown, "parts", f"columns among {names}", unknown)
    return tuple(names.index(each) if isinstance(each, str) else each for each in several)


def _columns(key: Any) -> list[int]:
    """The columns that a key names."""
    given = [key] if isinstance(key, (int, np.integer)) else key
    listed = isinstance(given, (Sequence, range)) and not isinstance(given, str)
    whole = listed and all(isinstance(c, (int, np.integer)) and c >= 0 for c in given)
    expect(whole and len(given), "parts", "columns, whole numbers from 0", repr(key), TypeError)
    return [int(c) for c in given]
