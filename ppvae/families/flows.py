"""Normalizing flows: the family, and its head."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from pyro.nn import ConditionalDenseNN, DenseNN
from torch import Tensor, nn

from ppvae._checks import check_count, expect
from ppvae.families.base import GuideFamily, check_head
from ppvae.families.carried import Carried
from ppvae.families.half import HALF, InHalf, dtype_in_half, widened
from ppvae.families.heads import Argument

_SHAPE = torch.Size()


@dataclass(frozen=True, kw_only=True)
class Flow(GuideFamily):
    r"""A conditional normalizing flow: `z = loc + scale * T(eps)`, all of it from the features.

    `T` chains affine couplings (which bend and correlate) and one elementwise spline (which
    reshapes the marginals). All parts have closed-form inverses, so both sampling and scoring cost
    one pass. It starts near the identity: the family contains `mean_scale` and begins there.
    Without features, as for global latents, the scale is a triangular matrix, and the family
    contains `full_rank`.

    Args:
        layers: number of affine couplings; used in pairs of opposite order, so an even number.
        hidden: width of the networks of the couplings and the spline.
        bins: segments of the spline in each coordinate, on (-3, 3).

    Raises:
        ValueError: `layers` is odd or negative, or `hidden` or `bins` is too small.

    Dinh et al., Density estimation using Real NVP, 2017; Dolatabadi et al., Invertible generative
    modeling using linear rational splines, 2020.
    """

    layers: int = 2
    hidden: int = 64
    bins: int = 8

    channels = ("loc", "scale", "shape")
    joint = True
    support = constraints.real

    def __post_init__(self) -> None:
        for name, least in {"layers": 0, "hidden": 1, "bins": 2}.items():
            object.__setattr__(self, name, check_count(name, getattr(self, name), least))
        expect(self.layers % 2 == 0, "layers", "an even number", self.layers)

    def head(self, features: int | None, shape: torch.Size) -> nn.Module:
        """Builds the flow's module; arguments and result as those of `Family.head`."""
        features, shape = check_head(self, features, shape)
        return FlowHead(self, features, shape[0])


def _whole(network: nn.Module, call: Callable[..., Any], *args: Tensor) -> Any:
    """Calls a network in the precision of its weights, under autocast, too.

    What it puts out is in single precision at least, since splines refuse less.
    """
    weight = next(network.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        with torch.autocast(weight.device.type, enabled=False):
            found = call(*(arg.to(weight.dtype) for arg in args))
    elif weight.dtype in HALF:
        found = call(*(arg.to(weight.dtype) for arg in args))
    else:
        return call(*args)
    return tuple(map(widened, found)) if isinstance(found, tuple) else widened(found)


class _Flowing(InHalf, Carried):
    """What a flow makes of a Gaussian, also of latents of half precision."""

    def sample(self, sample_shape: Any = _SHAPE) -> Tensor:
        """A draw, of the dtype of the latent."""
        return self._round(super().sample(sample_shape))


class _Net(DenseNN):
    def forward(self, context: Tensor) -> Any:  # type: ignore[override]
        return _whole(self, super().forward, context)


class _CouplingNet(ConditionalDenseNN):
    def forward(self, x: Tensor, context: Tensor) -> Any:
        return _whole(self, super().forward, x, context)


class FlowHead(nn.Module):
    """Conditional couplings and a spline, scaled and shifted; the head of `families.Flow`."""

    def __init__(self, family: Any, features: int | None, size: int) -> None:
        super().__init__()
        self.size = size
        self.context = None if features is not None else nn.Parameter(torch.ones(1))
        width, shape = features or 1, torch.Size([size])
        self.loc = Argument(constraints.real, shape, features)
        if features is None:
            self.scale_tril = Argument(constraints.lower_cholesky, shape + shape, None, 0.1)
        else:
            self.scale = Argument(constraints.positive, shape, features)
        left, hidden = size // 2, [family.hidden]
        self.couplings = nn.ModuleList()
        for _ in range(family.layers if size > 1 else 0):
            net = _CouplingNet(left, width, hidden, [size - left] * 2, nn.Tanh())
            _silence(net)
            self.couplings.append(transforms.ConditionalAffineCoupling(left, net))
        knots = [size * family.bins, size * family.bins, size * (family.bins - 1)]
        last = _Net(width, hidden, [*knots, size * family.bins], nn.Tanh())
        # slopes are softplus(raw) and must be 1 inside, as outside, for the identity
        _silence(last)[2 * knots[0] : sum(knots)] = math.log(math.e - 1)
        self.spline = transforms.ConditionalSpline(last, size, family.bins)

    def forward(self, features: Tensor | None = None) -> Any:
        """The distribution over vectors, of batch shape `(*)`."""
        context = self.context if features is None else features
        inputs: Any = [] if features is None else [features]
        loc = _whole(self, self.loc, *inputs)
        flip = torch.arange(self.size - 1, -1, -1, device=loc.device)
        chain: list[Any] = []
        couplings: Any = self.couplings
        for coupling in couplings:
            chain += [coupling.condition(context), transforms.Permute(flip)]
        chain.append(self.spline.condition(context))
        if features is None:
            tril = widened(self.scale_tril(None))
            chain.append(transforms.LowerCholeskyAffine(loc, tril, cache_size=1))
        else:
            scale = _whole(self, self.scale, *inputs)
            chain.append(transforms.AffineTransform(loc, scale, event_dim=1, cache_size=1))
        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        fn = _Flowing(base, chain)
        fn.narrow = dtype_in_half(next(self.loc.parameters()))
        return fn


def _silence(net: Any) -> Tensor:
    """Makes the output of a network of Pyro's almost zero; returns the last bias, as data."""
    last = net.layers[-1]
    nn.init.normal_(last.weight, std=1e-4)
    nn.init.zeros_(last.bias)
    return last.bias.data
