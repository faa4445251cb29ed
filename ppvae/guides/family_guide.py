"""One guide for every family: it samples each latent site of a model from the family's head."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae._scopes import eval_mode, private_modules, random_state
from ppvae.guides.blocks import Drawn, divide
from ppvae.guides.draws import draw, on_support
from ppvae.guides.encoding import encode
from ppvae.guides.headed import HeadedGuide, Made, check_encoder
from ppvae.guides.in_model import draw_in_model, shifted
from ppvae.guides.inputs import inputs_of
from ppvae.guides.marginals import Instead, joint_of, quantiles_of
from ppvae.guides.plates import Plates, read_plates
from ppvae.guides.sites import Site, check_present, check_supports
from ppvae.guides.start import starting_values
from ppvae.models.protocol import example_of, present_in
from ppvae.programs.keywords import bare
from ppvae.programs.missing import LeaveOut
from ppvae.programs.nodes import dtype_of, is_point, latent_nodes, prototype
from ppvae.programs.supports import has_tensor_bounds


class FamilyGuide(HeadedGuide):
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

    #: whether the model has a word on which latents count; True where an old pickle does not say
    _asks = True

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
        check_encoder(encoder)
        programs = {"model": model, "create_plates": create_plates, "init_loc_fn": init_loc_fn}
        for name, program in programs.items():
            kind, known = type(program).__name__, callable(program) or program is None
            fits = known and not (name == "model" and program is None)
            expect(fits, name, "a function or module", kind, TypeError)
        expect(plate is None or isinstance(plate, str), "plate", "a name", repr(plate), TypeError)
        super().__init__(model, family, encoder, plate, create_plates)
        self.init_loc_fn = init_loc_fn
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
                    check_supports(every, prototype(self.model, args, kwargs))
            expect(every, "model", "latent sites", "none")
            present = present_in(bare(self.model), args, kwargs)
            check_present(every, present)
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
            self._make(block, width or None, like, starts)
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


_Made = Made  # the name in older pickles
