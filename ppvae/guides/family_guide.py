"""One guide for every family: it samples each latent site of a model from the family's head."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae._scopes import eval_mode, private_modules, random_state
from ppvae.guides.assignment import Block, BySite, fits
from ppvae.guides.blocks import Drawn, Encoded, check_draws, check_tails, divide, representing
from ppvae.guides.draws import draw, on_support
from ppvae.guides.encoding import encode, keywords_of
from ppvae.guides.in_model import draw_in_model, shifted
from ppvae.guides.inputs import inputs_of
from ppvae.guides.marginals import Instead, joint_of, quantiles_of
from ppvae.guides.model_guide import ModelGuide
from ppvae.guides.plates import Plates, read_plates
from ppvae.guides.sites import Site, encoder_plate
from ppvae.guides.start import start_at, starting_values
from ppvae.models.protocol import example_of, present_in
from ppvae.programs.keywords import bare
from ppvae.programs.missing import LeaveOut
from ppvae.programs.nodes import (
    Node,
    dtype_of,
    has_tensor_bounds,
    is_inside,
    is_point,
    latent_nodes,
    mask_of,
    prototype,
    same_support,
)


class FamilyGuide(ModelGuide):
    r"""A guide that draws the latent sites of a model from one family, or each from its own.

    With an encoder the sites in the plate that its batch runs along are local: for each datum,
    features `h = encoder(*args)` fill the channels of `q(z | x)`. All others, or all without an
    encoder, are global: the channels are free parameters.

    Families over the reals reach a constrained site through `biject_to(support)`, with the
    log-determinant counted; a family over another support (`Family(dist.Gamma)`) is used as it is
    where its support is the site's. A joint family (`full_rank`, `low_rank`, `flow`) spans all
    sites of its entry at once, but never local ones with global ones. A point (`deterministic`,
    `zero`) is a point of the constrained space, as in Pyro's `AutoDelta`; its objective is a
    penalised log-likelihood and no bound.

    The parameters are made by the first call, or explicitly by `setup(*args)`, or by
    `load_state_dict`; and at once, where there is an encoder and the model offers `example()`, as
    `VAE` does. A state can be loaded only into a guide of the family that it was saved from.

    Args:
        model: any Pyro model with latent sites; the guide takes the same arguments.
        family: a guide family, such as `families.mean_scale`, or its name in the ladder; or a
            mapping to such from the names of latent sites, from patterns such as "z_*" ("*" for the
            rest), or from tuples of these, whose sites a joint family draws together. A `Block` in
            the place of a family says more: what a site depends on, and where its channels come
            from.
        encoder: a module `*args -> features` of shape `(batch, features)`, which also gets the
            keyword arguments of the model that its `forward` names; or a mapping to such
            from names or patterns, where sites have encoders of their own, along the plates that
            they stand in (as a plate of groups). With features of shape `(batch, steps, features)`
            the sites of an entry, or the members of a plate inside that of the batch, take one step
            each, and share one head.
        plate: name of the plate that the encoder's batch runs along; by default `data`, or else, of
            the plates around latent sites (that they all share, if there are such), the one with
            as many members as the batch.
        create_plates: as in Pyro's autoguides, a function of the model's arguments that returns
            plates to use.
        init_loc_fn: as in Pyro's autoguides (`pyro.infer.autoguide.initialization`), a function
            from a sample statement of a trace to the value at which the location of the site
            starts, where that is a parameter of its own; `fit` searches the mode from there.

    Raises:
        TypeError: `family` or `encoder` is not what it should be.
        ValueError: when the parameters are made: a family cannot represent a site, a site has no
            family or a pattern no site, the encoder's output does not fit, or no latent site is in
            a plate of its batch. Later: a plate whose members have parameters changes its size.

    Warns:
        HeavyTails: when the parameters are made: draws of the family are mapped to the support of a
            site by an exponential function, for which their tails are too heavy.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from ppvae.nn import mlp
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)
        >>> x = torch.randn(10, 3)
        >>> guide = FamilyGuide(model, "mean_scale", encoder=mlp(3, 16)).setup(x)
        >>> guide.heads["z"].loc.linear
        Linear(in_features=16, out_features=2, bias=True)

        Local latents that depend on a global one:

        >>> from ppvae import Block
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)
        >>> by_site = {"mu": "mean_scale", "z": Block("mean_scale", given=["mu"])}
        >>> guide = FamilyGuide(model, by_site, encoder=mlp(3, 16))
        >>> {name: tuple(value.shape) for name, value in guide(x).items()}
        {'mu': (), 'z': (10,)}
    """

    # where a guide that was pickled before knows no better
    _asks = True  # whether the model has a word on which latents count
    _named: dict[str, tuple[str, ...]] = {}  # encoder -> keyword arguments that it names

    def __init__(
        self,
        model: Callable[..., Any],
        family: Any,
        encoder: nn.Module | Mapping[Any, nn.Module] | None = None,
        *,
        plate: str | None = None,
        create_plates: Callable[..., Any] | None = None,
        init_loc_fn: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        by_name = dict(encoder) if isinstance(encoder, Mapping) else {}
        modules: list[Any] = (
            [*by_name.values()] if by_name else [] if encoder is None else [encoder]
        )
        known = all(isinstance(module, nn.Module) for module in modules)
        named = all(isinstance(n, (str, tuple)) for n in by_name)
        wanted = "a torch.nn.Module, or a mapping from latent sites to such"
        expect(known and named, "encoder", wanted, repr(encoder), TypeError)
        programs = {"model": model, "create_plates": create_plates, "init_loc_fn": init_loc_fn}
        for name, program in programs.items():
            kind, known = type(program).__name__, callable(program) or program is None
            fits = known and not (name == "model" and program is None)
            expect(fits, name, "a function or module", kind, TypeError)
        expect(plate is None or isinstance(plate, str), "plate", "a name", repr(plate), TypeError)
        super().__init__(model, create_plates=create_plates)
        self._by_site, self.init_loc_fn = BySite(family), init_loc_fn
        self.family, self.plate = self._by_site.one or self._by_site, plate
        self._encoded_by: dict[str, tuple[str, ...]] = {}
        if by_name:
            keys = {name: (name,) if isinstance(name, str) else name for name in by_name}
            self._encoded_by = {f"{number}": names for number, names in enumerate(keys.values())}
            self.encoder: Any = nn.ModuleDict(dict(zip(self._encoded_by, modules, strict=True)))
        else:
            self.encoder = encoder
        self.heads = nn.ModuleDict()
        self._made: dict[str, _Made] = {}
        self._named: dict[str, tuple[str, ...]] = {}
        self._features: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self._depths: dict[str, int] = {}
        self._blocks: list[Drawn] = []
        self._first: list[Drawn] = []
        self._late: dict[str, Drawn] = {}
        self._sites: dict[str, Site] = {}
        self._plates, self._ready = Plates(), False
        example = None if encoder is None else example_of(model)  # else each datum has its own
        if example is not None:
            try:
                self.setup(*example)
            except ValueError as error:
                error.add_note(
                    "the shapes are those of the model's example(): its decoder's output"
                )
                raise

    def __repr__(self) -> str:
        first, *others = super().__repr__().splitlines()
        return "\n".join([first, f"  (family): {self.family!r}", *others])

    @property
    def blocks(self) -> tuple[Drawn, ...]:
        """The latent sites in the groups that are drawn together; none before `setup`."""
        return tuple(self._blocks)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The latent sites in the order of the model; none before `setup`."""
        return tuple(self._sites.values())

    @property
    def drawn(self) -> frozenset[str]:
        """Names of the plates that draw a subsample of their own."""
        return self._plates.drawn

    @property
    def held(self) -> frozenset[str]:
        """Names of the plates that have parameters for each of their members."""
        return self._plates.held

    def setup(self, *args: Any, **kwargs: Any) -> "FamilyGuide":
        """Looks at the model once, on its arguments, and makes the parameters.

        Trains nothing, uses up no random numbers but those of the initial values, and changes no
        buffer.
        """
        with torch.no_grad(), poutine.block(), private_modules(), eval_mode(self, self.model):
            with random_state(None, keep=True):
                trace = prototype(self.model, args, kwargs)
                every = latent_nodes(trace)
                if any(has_tensor_bounds(node["fn"].support) for node in every):
                    _check_supports(every, prototype(self.model, args, kwargs))
            expect(every, "model", "latent sites", "none")
            present = present_in(bare(self.model), args, kwargs)
            _check_present(every, present)
            nodes = [node for node in every if not self._by_site.leaves_out(node)]
            with LeaveOut():  # whatever is missing: only shapes are wanted
                encoded, features = self._encoders_of(nodes, args, kwargs)
        blocks = divide(self._by_site, nodes, encoded)
        sites = {site.name: site for block in blocks for site in block.sites}
        self._sites = {node["name"]: sites[node["name"]] for node in nodes}
        starts: dict[str, Tensor] = {}
        if self.init_loc_fn is not None:
            with private_modules(), eval_mode(self, self.model):
                starts = starting_values(self.init_loc_fn, self.model, args, kwargs)
        values = [node["value"] for node in every]
        like = torch.zeros((), dtype=dtype_of(*values, *args), device=values[0].device)
        for block in blocks:
            if block.from_model:
                continue
            width = block.width(self._sites) + self._features.get(block.encoder or "", 0)
            made = _Made(block.shape, width or None, block.sites[0].name, block.encoder)
            known = self._made.get(block.key, made)
            expected = (
                f"a latent of shape {tuple(known.shape)} for the head {block.key!r}, as before"
            )
            expect(known.shape == block.shape, "model", expected, tuple(block.shape))
            expected = f"{known.width} inputs of the head {block.key!r}, as before"
            expect(known.width == made.width, "model", expected, made.width)
            fresh = block.key not in self.heads
            with representing(block.family, block.sites[0]):
                self._build(block.key, made, like)
                if fresh and starts:
                    start_at(self.heads[block.key], block, starts)
                with torch.no_grad(), random_state(None, keep=True), eval_mode(self):
                    near: Any = _like(self, made, like)
                    some = torch.zeros(1, width).to(near) if width else None
                    fn = self.heads[block.key](some)
                    check_tails(fn, block)
                    check_draws(fn, near.dtype)
        frames = {way.frame.name: way for way in encoded.values()}
        whole = {n: len(features[w.encoder]) == w.frame.full_size for n, w in frames.items()}
        self._plates = read_plates(trace, nodes, blocks, whole)
        self._blocks, self._ready = blocks, True
        self._asks = hasattr(bare(self.model), "present")
        self._first = [block for block in blocks if not block.late]
        self._late = {block.sites[0].name: block for block in blocks if block.late}
        prior: Any = getattr(self.model, "prior", None)
        if hasattr(prior, "attach") and not prior.attached:  # it is made of posteriors
            prior.attach(self.posterior)
        return self

    def _encoders(self) -> dict[str, tuple[tuple[str, ...], nn.Module]]:
        """Key -> the sites that an encoder is for, and the encoder; "all" is that for all sites."""
        if self._encoded_by:
            encoders = self.encoder
            return {key: (names, encoders[key]) for key, names in self._encoded_by.items()}
        encoder = self.encoder  # once, since Pyro registers a module wherever it is asked for
        return {} if encoder is None else {"all": (("*",), encoder)}

    def _encoders_of(
        self, nodes: list[Node], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Encoded], dict[str, Tensor]]:
        """Site -> its encoder, and encoder -> features; runs each encoder that a site wants."""
        names = [node["name"] for node in nodes]
        groups = self._by_site.groups(names)
        blocks = {name: group.block for group in groups for name in group.names}
        open_ = [n for n in names if _may_be_encoded(blocks[n])]
        encoded: dict[str, Encoded] = {}
        features: dict[str, Tensor] = {}
        for key, (patterns, module) in self._encoders().items():
            wanted = [n for n in open_ if fits(n, patterns) and n not in encoded]
            for pattern in patterns if key != "all" else ():
                used = any(fits(n, (pattern,)) for n in names)
                expect(used, "encoder", f"names or patterns of the latent sites {names}", pattern)
            if not wanted:
                continue
            frames = [frame for node in nodes for frame in node["cond_indep_stack"]]
            self._named[key] = keywords_of(module)
            result = self._encode(key, module, args, kwargs, *(frame.size for frame in frames))
            features[key], self._features[key] = result, result.shape[-1]
            self._rows[key], self._depths[key] = len(result), result.dim()
            plates = {blocks[n].plate for n in wanted} - {None}
            expect(len(plates) < 2, "plate", "one plate for the sites of an encoder", plates)
            plate = next(iter(plates), self.plate)
            rows = [node for node in nodes if node["name"] in wanted]
            frame = encoder_plate(rows, len(result), plate, names)
            steps = result.shape[1] if result.dim() == 3 else None
            inside = [node["name"] for node in rows if is_inside(node, frame)]
            encoded |= {name: Encoded(key, frame, steps) for name in inside}
        return encoded, features

    def _encode(
        self,
        key: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *rows: int,
    ) -> Tensor:
        """The features of an encoder: as many rows as an argument has, or as once before."""
        named = self._named.get(key, ()) if kwargs else ()
        kwargs = {name: kwargs[name] for name in named if name in kwargs}
        known = [*rows, *([self._rows[key]] if key in self._rows else [])]
        depths = (2, 3) if key not in self._depths else (self._depths[key],)
        return encode(module, args, kwargs, self._features.get(key), known, depths)

    def posterior(self, *args: Any) -> Any:
        """The distribution q(z | x) of the one latent site of a model, for data.

        Args:
            *args: the arguments of the encoder.

        Returns:
            A Pyro distribution on the support of the site, of batch shape `(batch,)`.

        Raises:
            ValueError: there is no encoder, or more than one site, or plates inside that of the
                data, or the family has no density.
        """
        wanted = "an encoder, and one latent site in the plate of the data"
        one = len(self._blocks) == 1 and len(self._blocks[0].sites) == 1
        one = one and self._blocks[0].encoder == "all" and not self._blocks[0].flat
        one = one and not self._blocks[0].prior
        expect(one and not self._blocks[0].sites[0].right, "guide", wanted, f"{self.family.name}")
        (block,) = self._blocks
        features = encode(self.encoder, args, {}, self._features["all"])
        fn = on_support(self.heads[block.key](features), block)
        dense = not is_point(fn)
        expect(dense, "family", "one with a density, for a prior that is made of it", fn)
        return fn

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The distribution of all unconstrained latents as one vector, as in `AutoContinuous`.

        The coordinates are those of `blocks`, one behind the other.

        Args:
            *args: the arguments of the model.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: a latent has no density, or depends on data or on other latents, or the
                density is not known as a whole: several blocks that are not Gaussian.
        """
        self._made_for(args, kwargs)
        return joint_of(self, partial(self._drawn, args, kwargs))

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent, `(*plates, *event)` by site; as `quantiles` for 0.5."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The quantiles of each latent under the guide, by site.

        They are those of each coordinate in unconstrained space, mapped to the support: of a number
        its own, and of a vector such as a simplex one that is in the support. They are exact where
        a formula is known (Gaussian and Student's t families, and others with an `icdf`), and else,
        as of flows and of sites that depend on other latents, those of 1,000 draws of a stream of
        their own. Of a point all are the point.

        Args:
            quantiles: numbers from 0 to 1.
            *args: the arguments of the model.
            **kwargs: its keyword arguments.

        Returns:
            Site -> values of shape `(quantiles, *plates, *event)`.

        Raises:
            ValueError: a quantile is not from 0 to 1, or a plate draws a subsample, whose members
                the values would be of.
        """
        self._made_for(args, kwargs)
        return quantiles_of(self, quantiles, partial(self._drawn, args, kwargs))

    def _made_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Makes the parameters, if there was no call before."""
        if not self._ready:
            self.setup(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every latent site; takes the model's arguments and returns the values by name."""
        return self._drawn(args, kwargs)

    def _drawn(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], instead: Instead | None = None
    ) -> dict[str, Tensor]:
        """Draws every latent site, from what its head returns, or from what is put in its place."""
        self._made_for(args, kwargs)
        listed = None if self.master is None else self.master().plates
        present = present_in(bare(self.model), args, kwargs) if self._asks else {}
        late = self._late
        draws: dict[str, Tensor] = {}
        features: dict[str, Tensor] = {}
        plates: dict[str, Any] | None = None
        for key, (_, module) in self._encoders().items() if self._features else ():
            if key in self._features:
                features[key] = self._encode(key, module, args, kwargs)
        if self._first or features:

            def rows_in_model(plate: str) -> Tensor:
                return prototype(self.model, args, kwargs).nodes[plate]["value"]

            lengths: dict[str, int] = {}
            for block in self._blocks:
                if block.encoder is not None:
                    lengths |= block.lengths(features[block.encoder])
            own = self._create_plates(*args, **kwargs)
            plates = self._plates.make(lengths, own, args, rows_in_model)
        heads = self.heads  # once, as above
        through = partial(self._through_head, heads, features, plates or {}, present, instead)
        for block in self._first:
            fn = through(block, draws)
            name = f"_{self._pyro_name}_{block.key}"
            draws |= draw(fn, block, plates or {}, self._plates, name, present)
        if late:

            def posterior(name: str, prior: Any, values: Mapping[str, Tensor]) -> Any:
                block = late[name]
                if block.from_model:
                    return None
                fn = through(block, values)
                if block.prior is not None:
                    fn = shifted(fn, prior, block.sites[0], block.prior)
                return on_support(fn, block)

            call, rows = (args, kwargs), self._plates.drawn
            drawn = plates if listed is None else listed
            draws |= draw_in_model(self.model, call, draws, late, posterior, rows, drawn)
        return draws

    def _through_head(
        self,
        heads: nn.ModuleDict,
        features: Mapping[str, Tensor],
        plates: Mapping[str, Any],
        present: Mapping[str, Tensor],
        instead: Instead | None,
        block: Drawn,
        values: Mapping[str, Tensor],
    ) -> Any:
        """What the head of a block returns for the features and the values so far."""
        rows = features.get(block.encoder) if block.encoder is not None else None
        if rows is not None:
            rows = self._plates.rows(rows, plates[block.frame.name])
        into = inputs_of(block, rows, values, self._sites, present)
        thinned = [] if block.flat else block.sites[0].thinned
        if thinned:
            index = [(dim, plates[name].indices) for dim, name in thinned]
            fn = heads[block.key](into, rows=index)
        else:
            fn = heads[block.key](into)
        return fn if instead is None else instead(block, fn)

    def _build(self, key: str, made: "_Made", like: Tensor | None = None) -> None:
        """Makes a head that is not there yet, like the encoder's last layer or like a latent."""
        self._made[key] = made
        if key not in self.heads:
            head = self._by_site.family_of(made.site).head(made.width, made.shape)
            near = _like(self, made, like)
            self.heads[key] = head if near is None else head.to(near.device, near.dtype)

    def get_extra_state(self) -> dict[str, Any]:
        """The family, and the shapes from which `load_state_dict` makes the heads."""
        heads = {key: made.state() for key, made in self._made.items()}
        return {
            "features": self._features,
            "rows": self._rows,
            "heads": heads,
            "family": self.family.name,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Does nothing: the heads were made before their parameters were read."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state = state_dict.get(prefix + "_extra_state") or {}
        names = (self.family.name, repr(self.family))
        saved = state.get("family", names[0])
        expect(saved in names, "family", f"a state of {names[0]}", f"one of {saved}")
        if state and not self._made:
            state = _as_now(state)
            self._features, self._rows = dict(state["features"]), dict(state["rows"])
            for key, made in state["heads"].items():
                self._build(key, _Made.of(made))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Made(NamedTuple):
    """How a head was made: the shape of its latent, its inputs, a site of it, and its encoder."""

    shape: torch.Size
    width: int | None
    site: str
    encoder: str | None

    def state(self) -> dict[str, Any]:
        """The parts, as a state dict holds them."""
        return self._asdict() | {"shape": list(self.shape)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "_Made":
        """The parts from a state dict."""
        return cls(**{**state, "shape": torch.Size(state["shape"])})


def _check_supports(nodes: list[Node], again: Any) -> None:
    """Raises a ValueError if a support in one trace is another in the next, of other draws."""
    for node in nodes:
        name, support = node["name"], node["fn"].support
        same = name not in again.nodes or same_support(support, again.nodes[name]["fn"].support)
        wanted = f"a support of {name!r} that does not depend on other latents"
        expect(same, "model", wanted, support)


def _check_present(nodes: list[Node], present: Mapping[str, Tensor]) -> None:
    """Raises a ValueError if a model says of its latents what its masks do not."""
    known = {node["name"]: mask_of(node) for node in nodes}
    for name, counts in present.items():
        wanted = f"latent sites in its `present`, {[*known]}"
        expect(name in known, "model", wanted, name)
        mask = torch.as_tensor(True if known[name] is None else known[name])  # noqa: FBT003
        same = mask.shape == counts.shape or not mask.dim()
        same = same and bool((mask.to(counts.device) == counts).all())
        expect(same, "model", f"the mask of {name!r} from its `present`", "something else")


def _as_now(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved state; one from before families went by site had one encoder for all heads."""
    if "heads" in state:
        return state
    width = state["features"]
    encoder = None if width is None else "all"
    made = {"width": width, "encoder": encoder}
    heads = {key: made | {"shape": shape, "site": key} for key, shape in state["shapes"].items()}
    return {"features": {} if width is None else {"all": width}, "rows": {}, "heads": heads}


def _may_be_encoded(block: Block) -> bool:
    """Whether a block has channels that an encoder may fill."""
    own = getattr(block.family, "from_model", False)
    return block.source in (None, "encoder") and not own


def _like(guide: FamilyGuide, made: _Made, like: Tensor | None) -> Tensor | None:
    """A tensor of the device and the dtype that a head should have."""
    encoder = None if made.encoder is None else guide._encoders()[made.encoder][1]
    weights = () if encoder is None else encoder.parameters()
    return [like, *(weight for weight in weights if weight.is_floating_point())][-1]
