"""A guide that is copied and pickled together with its model."""

import copy
from typing import Any, Self

from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule

from ppvae._scopes import UniquelyNamed


class ModelGuide(AutoGuide, UniquelyNamed):
    """An automatic guide that holds its model without owning it.

    The parameters of the model are not among those of the guide. Every copy has a name of its own
    in Pyro's param store. A pickle has the model in it, so that a pair stays one; a model that is a
    function must then be one that pickle finds by its name, and is not defined inside another.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {**PyroModule.__getstate__(self), "master": None}  # weak, and the list's to set

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A guide of the same model, or of its copy, where that was copied before."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self._model)] = (memo.get(id(self.model), self.model),)
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new
