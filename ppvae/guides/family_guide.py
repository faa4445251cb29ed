"""One guide for every family: it samples each latent site of a model from the family's head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppvae._scopes import eval_mode, private_modules, random_state, unique_name
from ppvae.families.prior import Prior
from ppvae.guides.blocks import Part, divide
from ppvae.guides.plates import Plates
from ppvae.guides.sites import data_frame, read_site
from ppvae.programs.nodes import draws_its_rows, dtype_of, is_real, latent_nodes, prototype


class FamilyGuide(AutoGuide):
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
    `VAE` does.

    Args:
        model: any Pyro model with latent sites; the guide takes the same arguments.
        family: a guide family, such as `families.mean_scale`.
        encoder: a module `*args -> features` of shape `(batch, features)`.
        plate: name of the plate that the encoder's batch runs along; by default `data`, or else
            the only plate that all latent sites share.
        create_plates: as in Pyro's autoguides, a function of the model's arguments that returns
            plates to use.

    Raises:
        TypeError: `family` or `encoder` is not what it should be.
        ValueError: when the parameters are made: the family cannot represent a site, the encoder's
            output does not fit, or the latent sites share no plate.
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
        if not hasattr(family, "channels"):
            raise TypeError(f"family: expected a guide family, got {family!r}")
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected a torch.nn.Module, got {encoder!r}")
        super().__init__(model, create_plates=create_plates)
        self._pyro_name = unique_name(self)
        self.family, self.plate = family, plate
        self.encoder = encoder
        self.heads = nn.ModuleDict()
        self._head_shapes: dict[str, tuple[int, ...]] = {}
        self._features: int | None = None
        self._parts: list[Part] = []
        self._is_set_up = False
        self._plates = Plates({}, None, frozenset(), sees_all=True)
        if encoder is not None and hasattr(model, "example"):  # else each datum has its own
            self.setup(*model.example())

    def setup(self, *args: Any, **kwargs: Any) -> FamilyGuide:
        """Looks at the model once, on its arguments, and makes the parameters.

        Trains nothing, uses up no random numbers but those of the initial values, and changes no
        buffer.
        """
        with torch.no_grad(), poutine.block(), private_modules(), eval_mode(self, self.model):
            with random_state(None, keep=True):
                trace = prototype(self.model, args, kwargs)
            nodes = latent_nodes(trace)
            if not nodes:
                raise ValueError("model: expected latent sites, got none")
            data, sees_all = None, True
            if self.encoder is not None and not isinstance(self.family, Prior):
                features = self._encode(self.encoder, args)
                data = data_frame(nodes, len(features), self.plate)
                sees_all = len(features) == data.full_size
                self._features = features.shape[-1]
        named: dict[str, Any] = trace.nodes
        self._plates = Plates(
            frames={frame.name: frame for node in nodes for frame in node["cond_indep_stack"]},
            data=None if data is None else data.name,
            drawn=frozenset(name for name, node in named.items() if draws_its_rows(node)),
            sees_all=sees_all,
        )
        if not isinstance(self.family, Prior):
            parts = divide(self.family, [read_site(node, data) for node in nodes])
            values = [node["value"] for node in nodes]
            like = torch.zeros((), dtype=dtype_of(*values, *args), device=values[0].device)
            self._build({part.key: part.shape for part in parts}, like)
            self._parts = parts
        self._is_set_up = True
        return self

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every latent site; takes the model's arguments and returns the values by name."""
        if not self._is_set_up:
            self.setup(*args, **kwargs)
        if isinstance(self.family, Prior):
            return self._draw_from_prior(args, kwargs)
        encoder, heads, features = self.encoder, self.heads, None
        if encoder is not None:
            features = self._encode(encoder, args)
        given = self._given_plates(args, kwargs)
        plates = self._plates.make(self._model, features, args, kwargs, given)
        if features is not None:
            features = self._plates.rows(features, plates)
        draws: dict[str, Tensor] = {}
        for part in self._parts:
            aligned = features
            if features is not None:
                right = bool(part.sites[0].right) and not part.flat
                aligned = self._plates.align(features, right=right)
            draw = self._draw_flat if part.flat else self._draw
            draws.update(draw(heads[part.key](aligned), part, plates))
        return draws

    def _build(self, shapes: dict[str, Iterable[int]], like: Tensor | None = None) -> None:
        """Makes the heads that are not there yet, beside the encoder or like a latent."""
        near = like if self.encoder is None else next(self.encoder.parameters(), like)
        for key, shape in shapes.items():
            shape = tuple(shape)
            if self._head_shapes.setdefault(key, shape) != shape:
                raise ValueError(
                    f"model: expected a latent of shape {self._head_shapes[key]} for the head "
                    f"{key!r}, as at the first call; got {shape}"
                )
            if key not in self.heads:
                head = self.family.head(self._features, torch.Size(shape))
                self.heads[key] = head if near is None else head.to(near.device, near.dtype)

    @property
    def model(self) -> Any:
        """The model that is guided."""
        if self._model is None:
            raise RuntimeError(
                "model: expected the guide's model, which pickle leaves out; build the guide anew "
                "and load its state_dict"
            )
        return self._model[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "master": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pyro_name = unique_name(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> FamilyGuide:
        """A guide of the same model, or of its copy, where both are copied together."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if self._model is not None:
            new._model = (memo.get(id(self.model), self.model),)
        return new

    def get_extra_state(self) -> dict[str, Any]:
        """The shapes from which `load_state_dict` makes the heads, before any call."""
        shapes = {key: list(shape) for key, shape in self._head_shapes.items()}
        return {"features": self._features, "shapes": shapes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Does nothing: the heads were made before their parameters were read."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state = state_dict.get(prefix + "_extra_state")
        if state and not self._head_shapes:
            self._features = state["features"]
            self._build(state["shapes"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- sampling ----------------------------------------------------------------------------

    def _encode(self, encoder: nn.Module, args: tuple[Any, ...]) -> Tensor:
        came = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]
        try:
            features = encoder(*args)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"encoder: expected a module that takes {came}; {error}") from error
        width = "features" if self._features is None else self._features
        shape = tuple(getattr(features, "shape", ()))
        if len(shape) != 2 or width not in ("features", shape[-1]):
            raise ValueError(
                f"encoder: expected features of shape (batch, {width}) for arguments {came}, got "
                f"{shape or type(features).__name__}"
            )
        tensors = [a for a in args if isinstance(a, Tensor)]
        if tensors and not any(len(features) in a.shape for a in tensors):
            raise ValueError(
                f"encoder: expected features of shape (batch, {width}), with the batch of the "
                f"arguments {came}; got {shape}"
            )
        return features

    def _given_plates(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The plates of the guide list that this guide is in, or those of the user."""
        if self.master is not None:
            return self.master().plates
        given = self.create_plates(*args, **kwargs) if self.create_plates is not None else []
        return {p.name: p for p in ([given] if isinstance(given, pyro.plate) else given)}

    def _draw_from_prior(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Runs the model's own latent statements, in the plates that are there."""
        model, drawn = self.model, self._plates.drawn
        if self.master is not None:
            plates = self.master().plates
            rows = {name: plates[name].indices for name in drawn if name in plates}
            model = poutine.condition(model, data=rows)

        def hide(msg: Any) -> bool:
            if site_is_subsample(msg):  # recorded once: by this guide, or by the list it is in
                return self.master is not None or msg["name"] not in drawn
            return msg["type"] != "sample" or msg["is_observed"]

        trace = poutine.trace(poutine.block(model, hide_fn=hide)).get_trace(*args, **kwargs)
        return {node["name"]: node["value"] for node in latent_nodes(trace)}

    def _draw(self, fn: Any, part: Part, plates: dict[str, Any]) -> dict[str, Tensor]:
        """Samples one site from its own distribution."""
        (site,) = part.sites
        if isinstance(fn, Tensor):
            fn = dist.Delta(fn)
        if isinstance(fn, dist.Delta):
            value = fn.v if is_real(site.support) else site.transform(fn.v)
            fn = dist.Delta(value, event_dim=len(site.event_shape))
        else:
            through = is_real(fn.support) and not is_real(site.support)
            if not self.family.joint:
                fn = fn.to_event(len(site.space if through else site.event_shape))
            if through:
                fn = dist.TransformedDistribution(fn, [site.transform])
        with ExitStack() as stack:
            for frame in site.frames:
                stack.enter_context(plates[frame.name])
            return {site.name: pyro.sample(site.name, fn)}

    def _draw_flat(self, fn: Any, part: Part, plates: dict[str, Any]) -> dict[str, Tensor]:
        """Samples all coordinates at once and hands each site its piece, as `AutoContinuous`."""
        with ExitStack() as stack:
            if self._plates.data is not None:
                stack.enter_context(plates[self._plates.data])
            name = f"_{self._pyro_name}_{part.key}"
            joint = fn if self.family.joint else fn.to_event(1)
            flat = pyro.sample(name, joint, infer={"is_auxiliary": True})
        draws = {}
        pieces = flat.split([site.size for site in part.sites], dim=-1)
        for site, piece in zip(part.sites, pieces, strict=True):
            with ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(plates[frame.name])
                value = unconstrained = self._plates.shape(piece, site)
                if not is_real(site.support):
                    value = site.transform(unconstrained)
                    if not isinstance(fn, dist.Delta) and am_i_wrapped():
                        # a factor, and not Delta's log_density, which analytic KL would forget
                        slope = site.transform.log_abs_det_jacobian(unconstrained, value)
                        pyro.factor(f"{name}_{site.name}_log_det", -slope, has_rsample=True)
                fn_site = dist.Delta(value, event_dim=len(site.event_shape))
                infer: Any = {"is_piece": True}
                draws[site.name] = pyro.sample(site.name, fn_site, infer=infer)
        return draws
