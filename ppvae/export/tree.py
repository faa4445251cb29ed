"""Arrays, and the names of what they are, laid out as the groups of a tree."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr

from ppvae._checks import expect
from ppvae.export.names import DRAWN, Dims
from ppvae.objectives.weights import estimates
from ppvae.programs.verdicts import said_of

#: the groups whose variables have no draws
_UNDRAWN = ["observed_data", "constant_data", "predictions_constant_data"]


def dataset_of(
    group: str,
    values: Mapping[str, np.ndarray],
    names: Dims,
    coords: Mapping[str, Any],
    attrs: Mapping[str, Mapping[str, Any]],
) -> xr.Dataset:
    """A group of a tree.

    Args:
        group: its name.
        values: variable -> an array, with the draws in front where the group has any.
        names: variable -> dims behind the draws, of which an array may have the first only.
        coords: dim -> coordinates, in any group.
        attrs: group -> attributes.

    Raises:
        ValueError: coordinates are not as many as the dim is long, or an array has more dims.
    """
    lead = [] if group in _UNDRAWN else [*DRAWN]
    data: dict[str, tuple[list[str], np.ndarray]] = {}
    for name, array in values.items():
        value = array[None] if lead else array[0] if group == "observed_data" else array
        own = names.get(name, ["datum"])[: value.ndim - len(lead)]
        shape, fits = value.shape[len(lead) :], len(own) == value.ndim - len(lead)
        expect(fits, "model", f"values of {name!r} along {own} (is it `vectorized`?)", shape)
        data[name] = ([*lead, *own], value)
    sizes: dict[str, int] = {}
    for dims, value in data.values():
        for dim, size in zip(dims, value.shape, strict=True):
            one = sizes.setdefault(dim, size)
            expect(one == size, "dims", f"one size of {dim!r} in {group!r}", f"{one} and {size}")
    found: dict[str, Any] = {}
    for dim, size in sizes.items():
        known = coords.get(dim)
        other = group.startswith("predictions") and known is not None and len(known) != size
        if known is not None and not other:  # new data have other rows
            expect(len(known) == size, "coords", f"{size} for {dim!r}", len(known))
        found[dim] = np.arange(size) if known is None or other else known
    return xr.Dataset(data, found, attrs.get(group, {}))


def words_of(
    model: Any, guide: Any, seed: int | None, log_weight: np.ndarray | None
) -> dict[str, Any]:
    """What drew a posterior, what a fit said of it, and what its draws are worth.

    Args:
        model: the model.
        guide: the guide.
        seed: that of the draws.
        log_weight: of the draws, where they belong to all the data; None else.
    """
    family = getattr(getattr(guide, "family", None), "name", None)
    words: dict[str, Any] = {"sampling": "independent draws of a guide"}
    words |= {"family": family} if family else {}
    words |= {} if seed is None else {"seed": seed}
    if log_weight is not None:
        found = estimates(torch.as_tensor(log_weight)[:, None])
        names = {"khat": "khat", "ess": "ess", "log_evidence": "log_likelihood"}
        words |= {name: found[key].item() for name, key in names.items()}
    return words | said_of(model, guide)


def versions() -> dict[str, str]:
    """The libraries that made a tree."""
    words = {"inference_library": "pyro-ppl", "inference_library_version": pyro.__version__}
    words |= {"creation_library": "ppvae", "creation_library_version": version("ppvae")}
    return words | {"torch_version": str(torch.__version__)}


def prior_sbc(found: xr.Dataset) -> xr.Dataset:
    """Where the truth was among the draws, from 0 to 1: one variable for each coordinate."""
    place = (found["rank"] + 0.5) / (found.attrs["num_samples"] + 1)
    labels = [str(label) for label in found["latent"].values]
    values = {name: place.isel(latent=at).values for at, name in enumerate(labels)}
    return xr.Dataset(
        {name: (DRAWN, value[None]) for name, value in values.items()},
        attrs={"reading": found.attrs["reading"]},
    )
