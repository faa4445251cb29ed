"""A guide's encoders and heads: how they are made, run, saved and loaded."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppvae._checks import expect
from ppvae._scopes import eval_mode, random_state
from ppvae.guides.assignment import Block, BySite, fits
from ppvae.guides.blocks import Drawn, Encoded, check_draws, check_tails, representing
from ppvae.guides.encoding import encode, keywords_of
from ppvae.guides.model_guide import ModelGuide
from ppvae.guides.sites import encoder_plate
from ppvae.guides.start import start_at
from ppvae.programs.nodes import Node
from ppvae.programs.plates import is_inside


class Made(NamedTuple):
    """How a head was made: the shape of its latent, its inputs, a site of it, and its encoder."""

    shape: torch.Size
    width: int | None
    site: str
    encoder: str | None

    def state(self) -> dict[str, Any]:
        """The parts, as a state dict holds them."""
        return self._asdict() | {"shape": list(self.shape)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Made":
        """The parts from a state dict."""
        return cls(**{**state, "shape": torch.Size(state["shape"])})


class HeadedGuide(ModelGuide):
    """A guide with a head for each block of latents, and encoders that feed them.

    Args:
        model: the model.
        family: a family for all sites, or by site; see `FamilyGuide`.
        encoder: one for all sites, or by site, or None.
        plate: name of the plate that an encoder's batch runs along, or None.
        create_plates: as in Pyro's autoguides.
    """

    #: encoder -> keyword arguments that it names; none where an old pickle does not say
    _named: Mapping[str, tuple[str, ...]] = {}

    def __init__(
        self,
        model: Callable[..., Any],
        family: Any,
        encoder: nn.Module | Mapping[Any, nn.Module] | None,
        plate: str | None,
        create_plates: Callable[..., Any] | None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self._by_site = BySite(family)
        self.family, self.plate = self._by_site.one or self._by_site, plate
        self._encoded_by: dict[str, tuple[str, ...]] = {}
        if isinstance(encoder, Mapping) and encoder:
            names = [(name,) if isinstance(name, str) else name for name in encoder]
            self._encoded_by = {f"{number}": each for number, each in enumerate(names)}
            modules = zip(self._encoded_by, encoder.values(), strict=True)
            self.encoder: Any = nn.ModuleDict(dict(modules))
        else:
            self.encoder = encoder
        self.heads = nn.ModuleDict()
        self._made: dict[str, Made] = {}
        self._named = {}
        self._features: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self._depths: dict[str, int] = {}

    def __repr__(self) -> str:
        first, *others = super().__repr__().splitlines()
        return "\n".join([first, f"  (family): {self.family!r}", *others])

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
            self._named = {**self._named, key: keywords_of(module)}
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

    def _make(
        self, block: Drawn, width: int | None, like: Tensor, starts: Mapping[str, Tensor]
    ) -> None:
        """Makes the head of a block, if it is not there yet, and tries it once.

        Args:
            block: the block.
            width: number of its inputs.
            like: a latent.
            starts: site -> where its location starts, or nothing.

        Raises:
            ValueError: the head was made for another latent, or cannot represent this one.
        """
        made = Made(block.shape, width, block.sites[0].name, block.encoder)
        known = self._made.get(block.key, made)
        expected = f"a latent of shape {tuple(known.shape)} for the head {block.key!r}, as before"
        expect(known.shape == block.shape, "model", expected, tuple(block.shape))
        expected = f"{known.width} inputs of the head {block.key!r}, as before"
        expect(known.width == made.width, "model", expected, made.width)
        fresh = block.key not in self.heads
        with representing(block.family, block.sites[0]):
            self._build(block.key, made, like)
            if fresh and starts:
                start_at(self.heads[block.key], block, starts)
            with torch.no_grad(), random_state(None, keep=True), eval_mode(self):
                near: Any = self._near(made, like)
                some = torch.zeros(1, width).to(near) if width else None
                fn = self.heads[block.key](some)
                check_tails(fn, block)
                check_draws(fn, near.dtype)

    def _build(self, key: str, made: Made, like: Tensor | None = None) -> None:
        """Makes a head that is not there yet, like the encoder's last layer or like a latent."""
        self._made[key] = made
        if key not in self.heads:
            head = self._by_site.family_of(made.site).head(made.width, made.shape)
            near = self._near(made, like)
            self.heads[key] = head if near is None else head.to(near.device, near.dtype)

    def _near(self, made: Made, like: Tensor | None) -> Any:
        """A tensor of the device and the dtype that a head should have."""
        encoder = None if made.encoder is None else self._encoders()[made.encoder][1]
        weights = () if encoder is None else encoder.parameters()
        return [like, *(weight for weight in weights if weight.is_floating_point())][-1]

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
                self._build(key, Made.of(made))
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_encoder(encoder: Any) -> None:
    """Raises a TypeError unless it is a module, or a mapping to such from latent sites, or None."""
    by_name = dict(encoder) if isinstance(encoder, Mapping) else {}
    modules = [*by_name.values()] if by_name else [] if encoder is None else [encoder]
    known = all(isinstance(module, nn.Module) for module in modules)
    named = all(isinstance(n, (str, tuple)) for n in by_name)
    wanted = "a torch.nn.Module, or a mapping from latent sites to such"
    expect(known and named, "encoder", wanted, repr(encoder), TypeError)


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
