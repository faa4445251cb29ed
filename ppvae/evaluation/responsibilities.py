"""The posterior probabilities of discrete latents, which are summed out, averaged over draws."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae.programs.enumeration import probabilities, values_of
from ppvae.programs.layout import Place


class Responsibilities:
    """Adds up the probabilities of the values of discrete latents, run by run."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.local: dict[str, bool] = {}

    def add(self, trace: Any, count: int, plate: Any, draws: Any = None) -> None:
        """Adds those of a trace of the model with so many draws, in a plate of draws or without."""
        nodes = {n["name"]: n for c in getattr(trace, "components", []) for n in c.discrete}
        for name, chances in probabilities(trace).items():
            node = {**nodes[name], "value": chances}
            place = Place.of(node, plate, draws, events=1)
            rows = place.front(chances).double()
            total = rows.sum(0) if len(rows) == count else rows.mean(0) * count
            self.sums[name] = self.sums.get(name, torch.zeros(())) + total
            self.values[name], self.local[name] = values_of(nodes[name]), place.datum is not None
        self.count += count

    def arrays(self) -> dict[str, np.ndarray]:
        """Site -> probabilities, `(datum, *plates, values)`; one row for a site of all data."""
        return {name: (total / self.count).cpu().numpy() for name, total in self.sums.items()}

    def variables(self, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Variables of a dataset from `arrays` of all data, and their coordinates."""
        variables, coords = {}, {}
        for name, local in self.local.items():
            value = arrays[name] if local else arrays[name][0]
            inner = [f"{name}_dim_{n}" for n in range(value.ndim - 1 - local)]
            dims = [*(["datum"] if local else []), *inner, f"{name}_value"]
            variables[f"{name}_responsibility"] = (dims, value, {"unit": "probability"})
            own = self.values[name]
            coords[f"{name}_value"] = own.cpu().numpy() if own.dim() == 1 else np.arange(len(own))
        return variables, coords
