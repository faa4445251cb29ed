"""Distributions of draws that were carried through bijections."""

from typing import Any, NoReturn

import pyro.distributions as dist


class Carried(dist.TransformedDistribution):  # type: ignore[misc]
    """A distribution carried through bijections, which says that its moments are not known."""

    @property
    def mean(self) -> NoReturn:
        """Raises a NotImplementedError: there is no closed form."""
        self._refuse("mean")

    @property
    def variance(self) -> NoReturn:
        """Raises a NotImplementedError: there is no closed form."""
        self._refuse("variance")

    def _refuse(self, what: str) -> NoReturn:
        kind: Any = type(self.base_dist).__name__
        through = ", ".join(type(step).__name__ for step in self.transforms)
        told = f"the {what} of a {kind} through {through} has no closed form: draws have one, "
        raise NotImplementedError(told + "as `.sample((1000,)).mean(0)`")
