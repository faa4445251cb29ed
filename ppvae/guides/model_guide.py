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

    @property
    def model(self) -> Any:
        """The model that is guided."""
        (model,), copies = self._model, self.__dict__.pop("_copies", {})
        if id(model) in copies:
            self._model = (copies[id(model)],)
        return self._model[0]

    def __getstate__(self) -> dict[str, Any]:
        _ = self.model  # looked up, so that the copies are not kept
        return {**PyroModule.__getstate__(self), "master": None}  # weak, and the list's to set

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A guide of the same model, or of its copy, where both are copied together.

        The model may be copied after the guide, so that its copy is looked up when it is wanted.
        """
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = self.__getstate__()
        memo[id(self._model)] = self._model
        new.__setstate__(copy.deepcopy(state, memo))
        new.__dict__["_copies"] = memo
        return new
