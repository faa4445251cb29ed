"""Which family draws which latent site of a model, and where its channels come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from ppvae._checks import check_choice, expect
from ppvae.families.ladder import as_family
from ppvae.programs.nodes import Node, is_finite_discrete

#: What fills the channels of a block: an encoder, parameters of its own, or parameters that all
#: members of a plate have in common.
Source = Literal["encoder", "free", "shared"]


@dataclass(frozen=True)
class Block:
    """How some latent sites of a model are drawn: by which family, and what its channels depend on.

    Args:
        family: a guide family, or its name in the ladder.
        source: what fills the channels: "encoder", for the sites in the plate that its batch runs
            along; "free", parameters for each site, and for each member of the plates around it;
            "shared", parameters that all members of `plate` have in common. By default the encoder,
            where there is one for the site, and else parameters.
        plate: the plate of a shared block; by default the only one around its sites. For an encoder
            the plate that its batch runs along, if that is not plain.
        given: latent sites that the block depends on, by names or patterns: the head takes their
            values, in unconstrained space, beside the features. They are drawn before. "previous"
            stands for the site before it among those of the block (a Markov chain), "upstream" for
            all sites that the model draws before.
        prior: what the block takes from the model's own prior of the site, given all that is drawn
            before: "location" adds the prior's location, in unconstrained space, to the draw (its
            mean, where it has no location); "location_scale" first multiplies the draw by the
            prior's scale, so that the family is that of a non-centred latent. For families over the
            reals. Costs a run of the model as far as its latents.

    Raises:
        TypeError: the family is none, or an argument has a wrong type.
        ValueError: an argument is none of those above, or a shared or free block names an encoder's
            plate.

    Hoffman and Blei, Structured stochastic variational inference, 2015 (`given`); the prior's
    location as in Pyro's `AutoHierarchicalNormalMessenger`.

    Example:
        >>> Block("mean_scale", given=["mu"]).given
        ('mu',)
    """

    family: Any
    source: Source | None = None
    plate: str | None = None
    given: Any = ()
    prior: Literal["location", "location_scale"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", as_family(self.family))
        check_choice("source", self.source, (None, "encoder", "free", "shared"))
        check_choice("prior", self.prior, (None, "location", "location_scale"))
        named = self.plate is None or isinstance(self.plate, str)
        expect(named, "plate", "a name", repr(self.plate), TypeError)
        expect(self.source != "free" or self.plate is None, "plate", "none for a free block", self)
        given = (self.given,) if isinstance(self.given, str) else self.given
        named = isinstance(given, Sequence) and all(isinstance(name, str) for name in given)
        expect(named, "given", "names of latent sites", repr(self.given), TypeError)
        given = tuple(given)
        object.__setattr__(self, "given", given)
        plain = not (self.given or self.prior or self.source)
        own = getattr(self.family, "from_model", False)
        expect(plain or not own, "family", "one with heads, in a block that says more", self.family)

    @property
    def name(self) -> str:
        """The name of the family, with what more the block says."""
        told = {key: value for key, value in vars(self).items() if key != "family" and value}
        said = [f"{key}={value!r}" for key, value in told.items()]
        return f"{self.family.name}({', '.join(said)})" if said else self.family.name


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a site is named by one of some names and patterns."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


class Group(NamedTuple):
    """Latent sites that one entry of an assignment is for."""

    block: Block
    names: tuple[str, ...]
    pattern: bool


class BySite:
    """A guide family for each latent site: one for all, or by names, groups and patterns.

    It has `channels`, `name`, `joint` and `from_model` as a family has, for what asks a guide.

    Args:
        families: a family, its name or a `Block`, for all sites; or a mapping to such from a name,
            a pattern ("z_*", "*" for the rest), or a tuple of names and patterns.
        argument: what errors call them.

    Raises:
        TypeError: a key or a value is not what it should be.
        ValueError: the mapping is empty.
    """

    def __init__(self, families: Any, argument: str = "family") -> None:
        whole = not isinstance(families, Mapping)
        entries = {"*": families} if whole else dict(families)
        expect(entries, argument, "a family for every latent site", "none")
        self.entries: dict[tuple[str, ...], Block] = {}
        for key, value in entries.items():
            names = (key,) if isinstance(key, str) else key
            named = isinstance(names, tuple) and names and all(isinstance(n, str) for n in names)
            wanted = "a mapping from names of latent sites, or tuples of them, to families"
            expect(named, argument, wanted, repr(key), TypeError)
            block = value if isinstance(value, Block) else Block(as_family(value, argument))
            self.entries[names] = block
        self.one = next(iter(self.entries.values())).family if whole else None

    @property
    def families(self) -> list[Any]:
        """The families, in the order of the entries."""
        return [block.family for block in self.entries.values()]

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of what carries information to any latent."""
        return tuple(dict.fromkeys(name for family in self.families for name in family.channels))

    @property
    def joint(self) -> bool:
        """Whether one of the families is joint."""
        return any(family.joint for family in self.families)

    @property
    def from_model(self) -> bool:
        """Whether all sites are drawn by the model itself."""
        return all(getattr(family, "from_model", False) for family in self.families)

    @property
    def name(self) -> str:
        """The families by the sites that they draw, as `z: mean_scale; mu, tau: full_rank`."""
        parts = [f"{', '.join(names)}: {block.name}" for names, block in self.entries.items()]
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"{{{self.name}}}"

    def head(self, features: int | None, shape: Any) -> Any:
        """Refuses: the families of the sites build the heads."""
        raise TypeError(f"family: expected that of one site, got {self.name}")

    def family_of(self, name: str) -> Any:
        """The family that draws a site."""
        return self._entry(name)[1].family

    def leaves_out(self, node: Node) -> bool:
        """Whether a site is one that objectives sum out: discrete, finite, and of no entry.

        An entry with a discrete family draws it; and so does one that names it, if it can.
        """
        if not is_finite_discrete(node["fn"]):
            return False
        try:
            names, block = self._entry(node["name"])
        except LookupError:
            return True
        if self.one is not None and self.from_model:
            return False  # then the guide is the prior of all
        support = getattr(block.family, "support", None)
        return names == ("*",) and (support is None or not support.is_discrete)

    def _entry(self, name: str) -> tuple[tuple[str, ...], Block]:
        """The entry that names a site, or the first whose pattern fits; "*" comes last."""
        for names, block in self.entries.items():
            if name in names:
                return names, block
        last = sorted(self.entries, key=lambda names: names == ("*",))
        for names in last:
            if fits(name, names):
                return names, self.entries[names]
        raise LookupError(name)

    def groups(self, sites: Sequence[str]) -> list[Group]:
        """The sites of a model by their entries, in the order of the first site of each.

        Raises:
            ValueError: a site has no entry, or an entry no site.
        """
        found: dict[tuple[str, ...], list[str]] = {}
        for name in sites:
            try:
                found.setdefault(self._entry(name)[0], []).append(name)
            except LookupError:
                wanted = "an entry for every latent site ('*' stands for the rest)"
                came = f"none for {name!r} among {[*self.entries]}"
                raise ValueError(f"family: expected {wanted}, got {came}") from None
        for names in self.entries:
            for pattern in names if names != ("*",) else ():
                used = any(fits(name, (pattern,)) for name in found.get(names, ()))
                expect(
                    used, "family", f"names or patterns of the latent sites {list(sites)}", pattern
                )
        return [
            Group(self.entries[names], tuple(group), len(names) == 1 and names[0] not in sites)
            for names, group in found.items()
        ]


def upstream(
    block: Block, name: str, group: Sequence[str], sites: Sequence[str]
) -> tuple[str, ...]:
    """The sites that a block is given where it draws one or more sites.

    Args:
        block: what is said of the sites.
        name: the first of those that are drawn together.
        group: the sites that the block is for.
        sites: all latent sites, in the order of the model.

    Returns:
        Their names, in the order of the model.

    Raises:
        ValueError: a name or pattern fits no other site.
    """
    wanted: set[str] = set()
    for pattern in block.given:
        if pattern == "previous":
            before = [other for other in group if sites.index(other) < sites.index(name)]
            wanted |= set(before[-1:])
        elif pattern == "upstream":
            wanted |= set(sites[: sites.index(name)])
        else:
            found = {site for site in sites if fits(site, (pattern,))} - {name}
            expect(found, "given", f"names of latent sites of the model, {list(sites)}", pattern)
            wanted |= found
    return tuple(site for site in sites if site in wanted)
