"""One guide for every family: it samples each latent site of a model from the family's head."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae._scopes import eval_mode, private_modules, random_state
from ppvae.families.ladder import as_family
from ppvae.guides.blocks import Block, check_tails, divide, representing, source_of
from ppvae.guides.draws import draw, draw_from_model, on_support
from ppvae.guides.encoding import encode
from ppvae.guides.model_guide import ModelGuide
from ppvae.guides.plates import Plates, read_plates
from ppvae.guides.sites import encoder_plate
from ppvae.models.protocol import example_of
from ppvae.programs.missing import LeaveOut
from ppvae.programs.nodes import dtype_of, is_point, latent_nodes, prototype


class FamilyGuide(ModelGuide):
    r"""A guide that draws every latent site of a model from one family.

    With an encoder the latents are local: for each datum, features `h = encoder(*args)` fill the
    channels of `q(z | x)`. Without, they are global: the channels are free parameters.

    Families over the reals reach a constrained site through `biject_to(support)`, with the
    log-determinant counted; a family over another support (`Family(dist.Gamma)`) is used as it is
    where its support is the site's. A joint family (`full_rank`, `low_rank`, `flow`) spans all
    sites at once. A point (`deterministic`, `zero`) is a point of the constrained space, as in
    Pyro's `AutoDelta`; its objective is a penalised log-likelihood and no bound.

    The parameters are made by the first call, or explicitly by `setup(*args)`, or by
    `load_state_dict`; and at once, where there is an encoder and the model offers `example()`, as
    `VAE` does. A state can be loaded only into a guide of the family that it was saved from.

    Args:
        model: any Pyro model with latent sites; the guide takes the same arguments.
        family: a guide family, such as `families.mean_scale`, or its name in the ladder.
        encoder: a module `*args -> features` of shape `(batch, features)`.
        plate: name of the plate that the encoder's batch runs along; by default `data`, or else, of
            the plates that all latent sites share, the one with as many members as the batch.
        create_plates: as in Pyro's autoguides, a function of the model's arguments that returns
            plates to use.

    Raises:
        TypeError: `family` or `encoder` is not what it should be.
        ValueError: when the parameters are made: the family cannot represent a site, the encoder's
            output does not fit, or the latent sites share no plate.

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
    """

    def __init__(
        self,
        model: Callable[..., Any],
        family: Any,
        encoder: nn.Module | None = None,
        *,
        plate: str | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        known = encoder is None or isinstance(encoder, nn.Module)
        expect(known, "encoder", "a torch.nn.Module", repr(encoder), TypeError)
        for name, program in {"model": model, "create_plates": create_plates}.items():
            kind, known = type(program).__name__, callable(program) or program is None
            fits = known and not (name == "model" and program is None)
            expect(fits, name, "a function or module", kind, TypeError)
        expect(plate is None or isinstance(plate, str), "plate", "a name", repr(plate), TypeError)
        super().__init__(model, create_plates=create_plates)
        self.family, self.plate = as_family(family), plate
        self.encoder = encoder
        self.heads = nn.ModuleDict()
        self._head_shapes: dict[str, torch.Size] = {}
        self._features: int | None = None
        self._blocks: list[Block] = []
        self._plates = Plates()
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
    def blocks(self) -> tuple[Block, ...]:
        """The latent sites in the groups that are drawn together; none before `setup`."""
        return tuple(self._blocks)

    def setup(self, *args: Any, **kwargs: Any) -> "FamilyGuide":
        """Looks at the model once, on its arguments, and makes the parameters.

        Trains nothing, uses up no random numbers but those of the initial values, and changes no
        buffer.
        """
        source, features = source_of(self.family, self.encoder), None
        with torch.no_grad(), poutine.block(), private_modules(), eval_mode(self, self.model):
            with random_state(None, keep=True):
                trace = prototype(self.model, args, kwargs)
            if self.encoder is not None and source == "encoder":
                with LeaveOut():  # whatever is missing: only shapes are wanted
                    features = encode(self.encoder, args, self._features)
                self._features = features.shape[-1]
        nodes = latent_nodes(trace)
        expect(nodes, "model", "latent sites", "none")
        data = None if features is None else encoder_plate(trace, len(features), self.plate)
        blocks = divide(self.family, nodes, data, source)
        values = [node["value"] for node in nodes]
        like = torch.zeros((), dtype=dtype_of(*values, *args), device=values[0].device)
        for block in blocks if source != "model" else []:
            known = self._head_shapes.get(block.key, block.shape)
            expected = f"a latent of shape {tuple(known)} for the head {block.key!r}, as before"
            expect(known == block.shape, "model", expected, tuple(block.shape))
            with representing(self.family, block.sites[0]):
                self._build(block.key, block.shape, like)
                with torch.no_grad(), random_state(None, keep=True), eval_mode(self):
                    fn = self.heads[block.key](None if features is None else features[:1])
                    check_tails(fn, block)
        self._plates = read_plates(trace, nodes, data, features)
        self._blocks = blocks
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
        one = one and self._blocks[0].source == "encoder" and not self._blocks[0].flat
        expect(one and not self._blocks[0].sites[0].right, "guide", wanted, f"{self.family.name}")
        (block,) = self._blocks
        assert self.encoder is not None
        fn = on_support(self.heads[block.key](encode(self.encoder, args, self._features)), block)
        dense = not is_point(fn)
        expect(dense, "family", "one with a density, for a prior that is made of it", fn)
        return fn

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every latent site; takes the model's arguments and returns the values by name."""
        if not self._blocks:
            self.setup(*args, **kwargs)
        sources = {block.source for block in self._blocks}
        if "model" in sources:
            listed = None if self.master is None else self.master().plates
            return draw_from_model(self.model, args, kwargs, self._plates.drawn, listed)
        encoder, heads, features = self.encoder, self.heads, None
        if encoder is not None and "encoder" in sources:
            features = encode(encoder, args, self._features)

        def rows_in_model(plate: str) -> Tensor:
            return prototype(self.model, args, kwargs).nodes[plate]["value"]

        plates = self._plates.make(features, self._create_plates(*args, **kwargs), rows_in_model)
        if features is not None:
            features = self._plates.rows(features, plates)
        draws: dict[str, Tensor] = {}
        for block in self._blocks:
            right = bool(block.sites[0].right) and not block.flat
            fn = heads[block.key](self._plates.align(features, right=right))
            draws |= draw(fn, block, plates, self._plates, f"_{self._pyro_name}_{block.key}")
        return draws

    def _build(self, key: str, shape: torch.Size, like: Tensor | None = None) -> None:
        """Makes a head that is not there yet, like the encoder's last layer or like a latent."""
        self._head_shapes[key] = shape
        if key not in self.heads:
            head = self.family.head(self._features, shape)
            weights = () if self.encoder is None else self.encoder.parameters()
            near = [like, *(weight for weight in weights if weight.is_floating_point())][-1]
            self.heads[key] = head if near is None else head.to(near.device, near.dtype)

    def get_extra_state(self) -> dict[str, Any]:
        """The family, and the shapes from which `load_state_dict` makes the heads."""
        shapes = {key: list(shape) for key, shape in self._head_shapes.items()}
        return {"features": self._features, "shapes": shapes, "family": self.family.name}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Does nothing: the heads were made before their parameters were read."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state = state_dict.get(prefix + "_extra_state") or {}
        names = (self.family.name, repr(self.family))
        saved = state.get("family", names[0])
        expect(saved in names, "family", f"a state of {names[0]}", f"one of {saved}")
        if state and not self._head_shapes:
            self._features = state["features"]
            for key, shape in state["shapes"].items():
                self._build(key, torch.Size(shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
