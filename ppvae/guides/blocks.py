"""How the families of a guide share out the latent sites of a model among their heads."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae._scopes import random_state, stacklevel
from ppvae.families.half import HALF
from ppvae.guides.assignment import Block, BySite, upstream
from ppvae.guides.sites import Site, only_plate, read_site
from ppvae.programs.nodes import Node
from ppvae.programs.supports import is_real, same_support


class Encoded(NamedTuple):
    """What the encoder of a site gives.

    Attributes:
        encoder: the key of the encoder.
        frame: the plate that its batch runs along.
        steps: number of its rows for one datum, of features `(batch, steps, features)`, or None.
    """

    encoder: str
    frame: Any
    steps: int | None = None


class Drawn(NamedTuple):
    """Latent sites that are drawn together, and what draws them.

    Attributes:
        key: the name of the head.
        shape: shape of the latent that the head draws.
        sites: the sites.
        flat: whether all coordinates come from one auxiliary draw, a vector that is cut into the
            sites' pieces; needed for several sites, and for plates to the left of the data.
        family: the family of the head; it is `from_model` where the model draws the site.
        over_reals: whether the head draws in unconstrained space.
        frame: the plate along which features run, or whose members share parameters; or None.
        encoder: the key of the encoder that feeds the head; None where parameters are free.
        given: the sites whose values go into the head.
        padding: number of zeros that go in behind, where the first of a chain has no site before.
        prior: what it takes from the model's prior; see `Block`.
        step: which of the encoder's steps goes in; None for all features.
        per_member: whether the inner plate has a step for each of its members.
        late: whether the site is drawn in a run of the model, or depends on one that is.
    """

    key: str
    shape: torch.Size
    sites: tuple[Site, ...]
    flat: bool
    family: Any
    over_reals: bool = True
    frame: Any = None
    encoder: str | None = None
    given: tuple[str, ...] = ()
    padding: int = 0
    prior: str | None = None
    step: int | None = None
    per_member: bool = False
    late: bool = False

    @property
    def from_model(self) -> bool:
        """Whether the model's own statement draws the site."""
        return bool(getattr(self.family, "from_model", False))

    @property
    def in_model(self) -> bool:
        """Whether the draw waits for a run of the model."""
        return self.from_model or self.prior is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sites."""
        return tuple(site.name for site in self.sites)

    def lengths(self, features: Tensor) -> dict[str, int]:
        """Plate -> number of its members that the features of the encoder are for."""
        inner = [f for f in self.sites[0].frames if self.per_member and f.dim > self.frame.dim]
        return {self.frame.name: len(features)} | {f.name: features.shape[1] for f in inner}

    def width(self, sites: Mapping[str, Site]) -> int:
        """How many numbers the given sites, and the padding, put into the head."""
        return self.padding + sum(sites[name].seen_from(self.frame) for name in self.given)


def divide(by_site: BySite, nodes: list[Node], encoded: Mapping[str, Encoded]) -> list[Drawn]:
    """Assigns the sites to heads, in an order in which all that is given is drawn before.

    A joint family has one head for all sites of an entry (and one for those that an encoder feeds,
    beside one for the others, if a pattern has both), an elementwise family one for each.

    Args:
        by_site: the families.
        nodes: the latent nodes in a trace of the model, in their order.
        encoded: site -> its encoder, for the sites in the plate of one.

    Raises:
        ValueError: a family cannot represent one of its sites, sites are not what their block says,
            or they are given one another in a circle.
    """
    by_name = {node["name"]: node for node in nodes}
    together: list[list[Drawn]] = []
    for group in by_site.groups([*by_name]):
        block = group.block
        parts: dict[Any, list[tuple[Encoded, Node]]] = {}
        for name in group.names:
            way = _way(block, by_name[name], encoded)
            parts.setdefault(
                (way.encoder, None if way.frame is None else way.frame.name), []
            ).append((way, by_name[name]))
        split = block.family.joint and len(parts) > 1 and not group.pattern
        wanted = f"a group {group.names} of sites that one encoder feeds, or that are all free"
        expect(not split, "family", wanted, "a joint family for sites of both kinds")
        for part in parts.values():
            together.append(_heads(block, group.names, part, [*by_name]))
    drawn = _distinct(together)
    sites = {site.name: site for each in drawn for site in each.sites}
    drawn.sort(key=lambda each: [*by_name].index(each.names[0]))
    return _in_order([_padded(each, drawn, sites) for each in drawn])


def _way(block: Block, node: Node, encoded: Mapping[str, Encoded]) -> Encoded:
    """Where the channels of a site come from; the encoder is "" where they are parameters."""
    found = encoded.get(node["name"])
    if getattr(block.family, "from_model", False):
        return Encoded("", None)
    if block.source == "shared":
        return Encoded("", only_plate(node, block.plate))
    if block.source == "encoder":
        wanted = f"an encoder for {node['name']!r}, and the site in the plate of its batch"
        expect(found, "encoder", wanted, f"none among those for {[*encoded]}")
    free = block.source == "free" or found is None
    return Encoded("", None) if free or found is None else found


def _heads(
    block: Block, names: Sequence[str], part: list[tuple[Encoded, Node]], order: Sequence[str]
) -> list[Drawn]:
    """The heads of the sites of one entry that get their channels from one place."""
    family, way = block.family, part[0][0]
    own = getattr(family, "from_model", False)
    sites = [read_site(node, way.frame, drawn=not own) for _, node in part]
    if own:
        shape = torch.Size()
        return [Drawn(_key(s), shape, (s,), flat=False, family=family) for s in sites]
    heads = []
    for group in [sites] if family.joint else [[site] for site in sites]:
        first, size = group[0], sum(site.size for site in group)
        own = [site for site in group if not _is_over_reals(family, site, size)]
        shape = first.event_shape if own else first.space
        vector = len(shape) == 1 and not first.right
        member = way.steps is not None and first.right == (way.steps,) and not family.joint
        shape = shape if family.joint or member else first.right + shape
        flat = len(group) > 1 or bool(first.left) or (family.joint and not vector)
        if flat and own:
            raise ValueError(_misfit(family, own[0]) + ", in these plates or beside other sites")
        step = None
        if way.steps is not None and not member:
            steps = f"{way.steps} sites, one for each step of the features, or a plate of them"
            expect(len(sites) == way.steps and not family.joint, "encoder", steps, list(names))
            step = sites.index(first)
            same = (first.space, first.right) == (sites[0].space, sites[0].right)
            expect(same, "encoder", f"one shape for all of {list(names)}", first.name)
        key = "joint" if flat and family.joint else _key(sites[0] if step is not None else first)
        chain = "previous" in block.given and family.joint
        expect(
            not chain, "given", "another word for a joint family, which has no order", block.given
        )
        given = upstream(block, first.name, names, order)
        given = tuple(name for name in given if name not in {site.name for site in group})
        alone = "a site by itself: a vector for a joint family, in no plate left of the encoder's"
        expect(not (flat and block.prior), "prior", alone, [*names])
        over = not own or block.prior is None
        expect(over, "prior", "a family over the reals", family.name)
        known = {"frame": way.frame, "encoder": way.encoder or None, "given": given}
        known |= {"prior": block.prior, "step": step, "per_member": member}
        shape = torch.Size([size]) if flat else shape
        heads.append(Drawn(key, shape, tuple(group), flat, family, not own, **known))
    return heads


def _distinct(together: list[list[Drawn]]) -> list[Drawn]:
    """The heads of all entries, with names that no others have; within one, steps share a head."""
    several = sum(head.key == "joint" for heads in together for head in heads) > 1
    names: dict[tuple[Any, ...], str] = {}
    drawn = []
    for number, heads in enumerate(together):
        for head in heads:
            key = f"joint_{_key(head.sites[0])}" if several and head.key == "joint" else head.key
            whose = number, key, None if head.step is not None else head.names
            while whose not in names:
                if key in names.values():
                    key += "_"
                else:
                    names[whose] = key
            drawn.append(head._replace(key=names[whose]))
    return drawn


def _padded(drawn: Drawn, heads: list[Drawn], sites: Mapping[str, Site]) -> Drawn:
    """A step of a chain with as many numbers as the others, which have a site before them."""
    for name in drawn.given:
        inside = {frame.name for frame in drawn.sites[0].frames}
        beyond = next((h for h in heads if name in h.names and h.encoder is not None), None)
        fits = beyond is None or beyond.frame.name in inside
        what = f"for {list(drawn.names)}, which are outside of the plate of {name!r}"
        expect(fits, "given", "sites of which every member has its own", what)
    alike = [head.width(sites) for head in heads if head.key == drawn.key]
    return drawn._replace(padding=max(alike) - drawn.width(sites))


def _in_order(heads: list[Drawn]) -> list[Drawn]:
    """The heads such that each comes after those it is given; the model's own draws are last.

    Raises:
        ValueError: there is a circle.
    """
    waiting, done = list(heads), set[str]()
    ordered: list[Drawn] = []
    while waiting:
        ready = [head for head in waiting if done.issuperset(head.given)]
        early = [head for head in ready if not head.in_model] or ready
        circle = f"{[name for head in waiting for name in head.names]} depend on one another"
        expect(early, "given", "sites that can be drawn before", circle)
        late = early[0].in_model or any(head.late for head in ordered)
        several = late and early[0].flat
        expect(not several, "family", "sites drawn one by one after the model's", early[0].names)
        ordered.append(early[0]._replace(late=late))
        done |= set(early[0].names)
        waiting.remove(early[0])
    return _as_the_model(ordered, heads)


def _as_the_model(ordered: list[Drawn], heads: list[Drawn]) -> list[Drawn]:
    """The heads, of which those behind one that waits for the model wait, too, where they can.

    Then the guide draws in the order of the model, which divergences in closed form ask for.
    """
    place = {head.names: number for number, head in enumerate(heads)}
    behind = min((place[head.names] for head in ordered if head.late), default=len(heads))
    late = {h.names for h in ordered if h.late or (place[h.names] > behind and not h.flat)}
    for head in reversed(heads):
        after = [h for h in heads if set(h.given) & set(head.names)]
        if not all(h.names in late and place[h.names] > place[head.names] for h in after):
            late -= {head.names}
    kept = [head._replace(late=head.late or head.names in late) for head in ordered]
    return sorted(kept, key=lambda head: head.late)


@contextmanager
def representing(family: Any, site: Site) -> Iterator[None]:
    """Where a head is built or tried for a site: an error names family and site."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{_misfit(family, site)}; {error}") from error


class HeavyTails(UserWarning):
    """A family has heavier tails than the map to the support of a latent site can bear."""


def check_tails(fn: Any, block: Drawn) -> None:
    """Warns if draws from a head have tails that some exponential map makes too heavy.

    A quadratic log density, as of a Gaussian, bears the map to a positive number. Of one that falls
    along a line, as Laplace's does, or more slowly, the image has no mean if its scale is above
    one, or ever; then the ELBO has none, and draws overflow.

    Args:
        fn: what the head returned: a distribution in unconstrained space, or a point.
        block: the sites that it is for.
    """
    if not block.over_reals or isinstance(fn, (Tensor, dist.Delta)):
        return
    steep = [site.name for site in block.sites if _grows_exponentially(site)]
    if steep and _is_heavy(fn):
        what = f"family: the tails of {block.family.name} are too heavy for the exponential map to"
        warnings.warn(
            f"{what} the support of {steep}: their draws may have no mean, nor the ELBO; a family "
            "with Gaussian tails, as mean_scale, bears it",
            HeavyTails,
            stacklevel=stacklevel(),
        )


def check_draws(fn: Any, dtype: torch.dtype) -> None:
    """Raises a RuntimeError if PyTorch has no draws of half precision of what a head returned."""
    if dtype in HALF and not isinstance(fn, Tensor):
        fn.sample()


def _grows_exponentially(site: Site) -> bool:
    """Whether the map to the support of a site grows like exp."""
    if site.transform is None:
        return False
    return bool(site.transform(torch.full(site.space, 60.0)).abs().max() > 1e20)


def _is_heavy(fn: Any) -> bool:
    """Whether minus the log density grows more slowly than a square, far out on either side."""
    like = fn.sample()
    tails = [[fn.log_prob(torch.full_like(like, s * at)) for at in (1e4, 1e8)] for s in (-1, 1)]
    return any(bool((far / near < 1e6).any()) for near, far in tails)


def _is_over_reals(family: Any, site: Site, joint_size: int) -> bool:
    """Whether the family lives on the reals, and reaches the site through a bijection."""
    support = getattr(family, "support", None)
    if support is None:  # only a head can tell
        with representing(family, site), torch.no_grad(), random_state(None, keep=True):
            shape = torch.Size([joint_size]) if family.joint else site.right + site.space
            fn = family.head(None, shape)(None)
            point = isinstance(fn, (Tensor, dist.Delta))
            support = constraints.real if point else fn.support
    real = is_real(support)
    fits = not site.support.is_discrete if real else same_support(support, site.support)
    if not fits:
        raise ValueError(_misfit(family, site))
    return real


def _misfit(family: Any, site: Site) -> str:
    words = (
        f"family: {family.name} cannot represent the latent site {site.name!r}, whose "
        f"support is {site.support} with event shape {tuple(site.event_shape)}"
    )
    if site.support.is_discrete:
        words += (
            "; discrete latents of finitely many values are summed out if the mapping leaves them "
            "out. One of infinitely many values can be truncated (a Categorical over those that "
            "matter) or summed out by hand (a negative binomial is a Poisson of a gamma); and a "
            "vector of discrete values can be one value each in a plate"
        )
    return words


def _key(site: Site) -> str:
    """A name for the head that `ModuleDict` takes: no dots, and none of its own attributes."""
    key = site.name.replace(".", "_")
    return f"{key}_" if hasattr(nn.ModuleDict, key) else key
