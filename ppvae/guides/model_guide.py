"""A guide that can be copied together with its model, and pickled without it."""

import copy
from typing import Any, Self

from pyro.infer.autoguide import AutoGuide

from ppvae._scopes import UniquelyNamed


class ModelGuide(AutoGuide, UniquelyNamed):
    """An automatic guide that holds its model without owning it.

    The parameters of the model are not among those of the guide. Every copy has a name of its own
    in Pyro's param store. A pickle leaves the model out.
    """

    @property
    def model(self) -> Any:
        """The model that is guided.

        Raises:
            RuntimeError: the guide comes from a pickle.
        """
        if self._model is None:
            raise RuntimeError(
                "model: expected the guide's model, which pickle leaves out; build the guide anew "
                "and load its state_dict"
            )
        return self._model[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "master": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A guide of the same model, or of its copy, where both are copied together."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if self._model is not None:
            new._model = (memo.get(id(self.model), self.model),)
        return new
