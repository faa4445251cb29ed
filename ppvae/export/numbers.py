"""Values of discrete sites as whole numbers, in as few bytes as hold them."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from pyro.distributions import constraints

from ppvae._checks import expect
from ppvae.export.names import Groups
from ppvae.programs.nodes import Node, bare_distribution

_NO_VALUES = "log_likelihood", "log_prior", "sample_stats"  # groups of densities


def small_numbers(groups: Groups, nodes: Iterable[Node]) -> None:
    """Makes bytes of bits and of codes of few categories, where none is missing."""
    few = [node for node in nodes if _fits_a_byte(bare_distribution(node["fn"]).support)]
    for group, name in _of_sites(groups, few):
        if np.isfinite(group[name]).all():
            group[name] = group[name].astype(np.int8)


def whole_numbers(groups: Groups, nodes: Iterable[Node]) -> None:
    """Makes whole numbers of the values of other discrete sites, where none is missing."""
    for group, name in _of_sites(groups, nodes):
        if group[name].dtype != np.int8 and np.isfinite(group[name]).all():
            small = abs(group[name]).max() < np.iinfo(np.int32).max
            group[name] = group[name].astype(np.int32 if small else np.int64)


def large_numbers(groups: Groups, nodes: Iterable[Node]) -> None:
    """Makes whole numbers of 64 bits of the values of other discrete sites, of some of the draws.

    Raises:
        ValueError: one is no number.
    """
    for group, name in _of_sites(groups, nodes):
        if group[name].dtype != np.int8:
            bad = int((~np.isfinite(group[name])).sum())
            expect(not bad, "model", f"draws of {name!r} that are whole numbers", f"{bad} others")
            group[name] = group[name].astype(np.int64)


def _of_sites(groups: Groups, nodes: Iterable[Node]) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """The groups that have values of the discrete ones of some sites, and the names of these."""
    names = {node["name"] for node in nodes if node["fn"].support.is_discrete}
    for group in [values for key, values in groups.items() if key not in _NO_VALUES]:
        for name in names & group.keys():
            yield group, name


def _fits_a_byte(support: Any) -> bool:
    """Whether a site has bits, or few categories that are known beforehand."""
    if support is constraints.boolean:
        return True
    bounds = [getattr(support, f"{end}_bound", None) for end in ("lower", "upper")]
    return all(isinstance(bound, int) and abs(bound) <= 127 for bound in bounds)
