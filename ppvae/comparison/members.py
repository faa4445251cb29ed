"""The families that a call names, by the names that results have for them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ppvae._checks import expect
from ppvae.guides.assignment import BySite
from ppvae.programs.nodes import is_finite_discrete, latent_nodes


def members_of(families: Any, least: int = 2) -> dict[str, Any]:
    """The families by name, at least so many of them.

    Args:
        families: what `FamilyGuide` takes as such, in order; or a mapping to them from names.
        least: how many there must be.

    Raises:
        TypeError: one is no family, or a name is no string.
        ValueError: there are too few, or one is there twice.
    """
    wanted = "at least two" if least == 2 else f"at least {least}"
    if isinstance(families, Mapping):
        named = all(isinstance(name, str) and name for name in families)
        expect(named, "families", "names of them", repr([*families]), TypeError)
        expect(len(families) >= least, "families", wanted, repr(families))
        return {name: family for name, family in families.items() if name_of(family)}
    several = isinstance(families, Sequence) and not isinstance(families, (str, bytes))
    expect(several and len(families) >= least, "families", wanted, repr(families))
    members = {name_of(family): family for family in families}
    expect(len(members) == len(families), "families", "different ones", repr(families))
    return members


def _is_of(guide: Any, family: Any) -> bool:
    """Whether a guide is of a family, which another one may have the name of."""
    given, own = guide.family, BySite(family, "families")
    if isinstance(given, BySite):
        return given.entries == own.entries
    return own.one is not None and own.entries == BySite(given).entries


def own_of(guide: Any, traces: Any, members: Mapping[str, Any]) -> str | None:
    """The name under which the family of a guide is among some, or None."""
    if any(is_finite_discrete(node["fn"]) for node in latent_nodes(traces[1])):
        return None  # the rungs sum out what it draws
    return next((n for n, family in members.items() if _is_of(guide, family)), None)


def prior_of(members: Mapping[str, Any]) -> str | None:
    """The name under which the prior is among some families, or None."""
    return next((n for n, family in members.items() if name_of(family) == "noise_only"), None)


def summing_out(family: Any) -> Any:
    """A family as rungs have it: discrete latents are summed out by all of them or by none.

    As the family of a guide, the prior draws them, and would be charged for that; by patterns it
    leaves them to the objective, as every other family does.
    """
    by_site = BySite(family, "families")
    return {"*": family} if by_site.one is not None and by_site.from_model else family


def name_of(family: Any) -> str:
    """The name of what `FamilyGuide` takes as a family."""
    by_site = BySite(family, "families")
    (block, *_) = by_site.entries.values()
    return block.name if by_site.one is not None else by_site.name
