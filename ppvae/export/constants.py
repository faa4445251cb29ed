"""What a model was told beside its data: covariates, groups, exposures, as constant data."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppvae.data.tables import Labels
from ppvae.programs.keywords import bare
from ppvae.programs.nodes import observed_nodes, plates_of


class Constants(NamedTuple):
    """Arrays by name, the names of their dims, and the coordinates of some dims."""

    arrays: dict[str, np.ndarray]
    dims: dict[str, list[str]]
    coords: dict[str, Any]


def constants_of(
    model: Any,
    given: Sequence[Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    trace: Any,
    plate: Any,
) -> Constants:
    """The arguments of a model that are no observations, by the names of its parameters.

    A table is one array, and each of its columns one more, by the name of the column.

    Args:
        model: as the user has it.
        given: its positional arguments, as the user gave them.
        args: all its arguments as tensors, those by keyword last.
        kwargs: the keyword arguments.
        trace: of the model on them.
        plate: the data plate.
    """
    names = [*_positional(model, len(given)), *kwargs]
    sizes: dict[int, set[str]] = {}
    for node in trace.nodes.values():
        if node["type"] == "sample":
            for frame in plates_of(node).values():
                own = plate is not None and frame.name == plate.name
                sizes.setdefault(frame.size, set()).add("datum" if own else frame.name)
    observed = [node["value"] for node in observed_nodes(trace)]
    found = Constants({}, {}, {})
    for position, (name, value) in enumerate(zip(names, args, strict=False)):
        if not isinstance(value, Tensor) or any(_is_of(value, data) for data in observed):
            continue
        array = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        dims = [f"{name}_dim_{axis}" for axis in range(value.dim())]
        if dims:
            plates = sizes.get(len(value), set())
            dims[0] = "datum" if "datum" in plates else next(iter(plates), dims[0])
        found.arrays[name], found.dims[name] = array.cpu().numpy(), dims
        labels = Labels(given[position]) if position < len(given) else Labels(None)
        if labels.columns is not None and len(dims) == 2:
            found.coords[dims[1]] = labels.columns
            for column, words in enumerate(labels.columns):
                if str(words) not in found.arrays:
                    found.arrays[str(words)] = found.arrays[name][:, column]
                    found.dims[str(words)] = dims[:1]
        if labels.rows is not None and dims:
            found.coords.setdefault(dims[0], labels.rows)
    return found


def _positional(model: Any, count: int) -> list[str]:
    """The names of the first arguments of a program."""
    program = bare(model)
    parameters: list[inspect.Parameter] = []
    with suppress(TypeError, ValueError):
        parameters = [*inspect.signature(getattr(program, "forward", program)).parameters.values()]
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [each.name for each in parameters if each.kind in kinds][:count]
    return names + [f"arg_{number}" for number in range(len(names), count)]


def _is_of(value: Tensor, data: Any) -> bool:
    """Whether an argument is what a site observes."""
    alike = isinstance(data, Tensor) and value.shape == data.shape and value.dtype == data.dtype
    return alike and torch.equal(value.nan_to_num(), data.nan_to_num())
