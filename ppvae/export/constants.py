"""What a model was told beside its data: covariates, groups, exposures, as constant data."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppvae.data.tables import Labels
from ppvae.programs.keywords import bare
from ppvae.programs.nodes import latent_nodes, observed_nodes
from ppvae.programs.plates import plates_of


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
    size: int | None,
    observed: Collection[int],
) -> Constants:
    """The arguments of a model that are no observations, by the names of its parameters.

    A table is one array, and each of its columns one more, by the name of the column.

    Args:
        model: as the user has it.
        given: its positional arguments, as the user gave them.
        args: all its arguments as tensors, those by keyword last.
        kwargs: the keyword arguments.
        trace: of the model, which tells the names that are taken.
        size: number of data; None, where there is no data plate.
        observed: positions of the arguments that are observations.
    """
    names = [*_positional(model, len(given)), *kwargs]
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
    taken = {frame.name for node in nodes for frame in plates_of(node).values()}
    taken |= {"chain", "draw", "datum", "latent"} | {node["name"] for node in latent_nodes(trace)}
    found = Constants({}, {}, {})
    for position, (name, value) in enumerate(zip(names, args, strict=False)):
        if not isinstance(value, Tensor) or position in observed:
            continue
        name += "_data" * (name in taken)  # which is the name of a latent, or of a dim
        array = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        dims = [f"{name}_dim_{axis}" for axis in range(value.dim())]
        if dims:
            dims[0] = "datum" if len(value) == size else dims[0]
        found.arrays[name], found.dims[name] = array.cpu().numpy(), dims
        labels = Labels(given[position]) if position < len(given) else Labels(None)
        if labels.columns is not None and len(dims) == 2:
            found.coords[dims[1]] = labels.columns
            for column, words in enumerate(map(str, labels.columns)):
                word = f"{words}_data" if words in taken else words
                if word not in found.arrays:
                    found.arrays[word] = found.arrays[name][:, column]
                    found.dims[word] = dims[:1]
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


def observed_positions(args: Sequence[Any], trace: Any) -> list[int]:
    """Which arguments a model observes as they are."""
    values = [node["value"] for node in observed_nodes(trace)]
    return [i for i, arg in enumerate(args) if any(_is_of(arg, value) for value in values)]


def _is_of(value: Any, data: Any) -> bool:
    """Whether an argument is the very tensor that a site observes, with NaN filled in or not."""
    both = isinstance(value, Tensor) and isinstance(data, Tensor)
    if not both or value.shape != data.shape:
        return False
    if not (value.is_floating_point() and value.isnan().any()):
        return value.data_ptr() == data.data_ptr()
    return bool(((value == data) | value.isnan()).all())
