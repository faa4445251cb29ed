"""The contract of guide families, with the recipe for a new one, and what makes them values."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ppvae._checks import check_count, expect

#: The names of the families in the ladder, which `ladder.py` fills in: family -> name.
NAMES: dict[Any, str] = {}


def check_head(family: Any, features: Any, shape: Any) -> tuple[int | None, torch.Size]:
    """The arguments of `GuideFamily.head` as whole numbers.

    Raises:
        TypeError: `shape` is no sequence.
        ValueError: there is something else than whole numbers among them, or the family is joint
            and the shape has not one dimension.
    """
    features = None if features is None else check_count("features", features)
    several = isinstance(shape, Sequence) and not isinstance(shape, str)
    expect(several, "shape", "the shape of a latent", repr(shape), TypeError)
    fits = len(shape) == 1 or not family.joint
    expect(fits, "shape", "one dimension, since the family is joint", tuple(shape))
    return features, torch.Size(check_count("shape", length) for length in shape)


class GuideFamily(ABC):
    r"""A guide family: a value that builds, for a latent of any shape, the module that draws it.

    **To add a family** whose members are one distribution with different arguments, write
    `Family(dist.AsymmetricLaplace)`. For any other, write a subclass that gives

    - `channels`: the names of what carries information to the latent;
    - `joint`: True if one head spans the coordinates of all latent sites and may correlate them,
      False if every site has a head of its own;
    - `head(features, shape)`: the module, see below;
    - `support`, where it is known without a head. A family over the reals serves every continuous
      latent site, through the bijection from the reals to the site's support. A family over any
      other set serves the sites that have this support. If `support` is None, a guide builds a head
      with `features=None` for each site and reads the support of what it returns.

    Make the subclass a frozen dataclass. Families are values: equal if they were made from equal
    parts, with equal hashes, so that copies and pickles are equal to the original and have its
    name. `ppvae/families/flows.py` is an example of a family with a head of its own.

    A guide also takes an object of any other class with `channels`, `joint`, `name` and `head`.
    """

    #: Names of the arguments that carry information to the latent.
    channels: tuple[str, ...]

    #: Whether one distribution spans several coordinates, which it can then correlate.
    joint: bool

    #: What the draws of a head satisfy; None if only a head can tell.
    support: Any = None

    #: Whether a guide runs the latent statements of the model itself, and so builds no heads.
    from_model: bool = False

    @abstractmethod
    def head(self, features: int | None, shape: torch.Size) -> nn.Module:
        """Builds the module that makes the distribution of the latent.

        Args:
            features: length of the encoder's output; None makes the channels free parameters.
            shape: shape of the latent; one dimension for a joint family.

        Returns:
            A module; its forward takes features of shape `(*, features)` (or None) and returns a
            distribution over `(*, *shape)`, of which the last dimension is the event of a joint
            family and no other is one, or a tensor of that shape, which stands for a point.
        """

    @property
    def name(self) -> str:
        """The name in the ladder, or else the expression that builds the family."""
        return NAMES.get(self, repr(self))
