r"""Guide families: distributions of which some arguments are channels.

A *channel* is an argument that carries information to the latent: from the datum, through an
encoder, or, for a global latent, from a free parameter. Every other argument is fixed, or shared.

===================== ========================== ==================
family                expression                 channels
===================== ========================== ==================
`deterministic`       `Delta(v)`                 v
`zero`                `Delta(0)`                 none
`noise_only`          the prior itself           none
`mean_only`           `Normal(loc, 1)`           loc
`mean_only_bounded`   `Normal(loc in (-1,1), 1)` loc
`shared_scale`        `Normal(loc, sigma)`       loc
`mean_scale`          `Normal(loc, scale)`       loc, scale
`student_t`           `StudentT(df, loc, scale)` df, loc, scale
`low_rank`            `LowRankMultivariate...`   loc, two factors
`full_rank`           `MultivariateNormal`       loc, scale_tril
`flow`                a normalizing flow         loc, scale, shape
===================== ========================== ==================

**To add a family**, write one line: `Family(dist.AsymmetricLaplace)`. For a head that is not the
application of one distribution to its arguments, give an object with the attributes `channels`,
`joint`, `name` and a method `head(features, shape)` that builds a module whose forward returns a
distribution (see `Flow`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from pyro.nn import ConditionalDenseNN, DenseNN
from torch import Tensor, nn
from torch.distributions import transform_to

__all__ = [
    "LADDER",
    "Channel",
    "Family",
    "Flow",
    "Prior",
    "Shared",
    "deterministic",
    "flow",
    "full_rank",
    "low_rank",
    "mean_only",
    "mean_only_bounded",
    "mean_scale",
    "noise_only",
    "shared",
    "shared_scale",
    "student_t",
    "zero",
]

Constraint = constraints.Constraint

# Where a free parameter starts, for the arguments that set a width: narrow, as Pyro's autoguides.
_FREE_START = {"scale": 0.1, "scale_tril": 0.1, "cov_diag": 0.01}


@dataclass(frozen=True)
class Channel:
    """Marks an argument as a channel, where its constraint or shape has to be said.

    Args:
        constraint: what the values must satisfy; by default what the distribution asks for.
        columns: last dimension of a matrix argument of shape `(size, columns)`, for arguments such
            as `cov_factor`; by default a matrix is square.
    """

    constraint: Constraint | None = None
    columns: int | None = None


@dataclass(frozen=True)
class Shared:
    """Marks an argument as learned and the same for all data and all coordinates.

    Args:
        constraint: what the value must satisfy; by default what the distribution asks for.
    """

    constraint: Constraint | None = None


shared = Shared()


class Family:
    r"""A guide family: a distribution and, for each of its arguments, where the value comes from.

    A number (or tensor) fixes an argument; a constraint makes it a channel inside that constraint;
    the marker `shared` makes it one learned number; left out, it is a channel under the
    distribution's own constraint. Of alternatives (`probs` or `logits`; `covariance_matrix`,
    `precision_matrix` or `scale_tril`) the one that is named counts, otherwise the last.

    Args:
        distribution: a class from `pyro.distributions`.
        **arguments: rules for the arguments of the distribution, as above.

    Raises:
        TypeError: `distribution` is not a class of `pyro.distributions`, or a rule has a wrong type.
        ValueError: the distribution has no argument of that name, or no value can satisfy the rule.

    Example:
        >>> import pyro.distributions as dist
        >>> Family(dist.AsymmetricLaplace).channels
        ('loc', 'scale', 'asymmetry')
        >>> Family(dist.Normal, scale=0.5)
        Family(Normal, scale=0.5)
    """

    def __init__(self, distribution: Callable[..., Any], **arguments: Any) -> None:
        if not (
            inspect.isclass(distribution)
            and issubclass(distribution, dist.torch_distribution.TorchDistributionMixin)
        ):
            raise TypeError(
                f"distribution: expected a class of pyro.distributions, got {distribution!r}"
            )
        self.distribution = distribution
        self.arguments = arguments
        self.rules = _rules(distribution, arguments)

    @property
    def name(self) -> str:
        """The name in the ladder, or the expression that builds the family."""
        return _ladder_name(self) or repr(self)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the arguments that carry information to the latent."""
        return tuple(name for name, rule in self.rules.items() if isinstance(rule, Channel))

    @property
    def joint(self) -> bool:
        """Whether one distribution spans several coordinates, which it can then correlate."""
        own = self.distribution.arg_constraints
        return any(_event_dim(own[name]) > 0 for name in self.rules)

    def head(self, features: int | None, shape: torch.Size) -> nn.Module:
        """Builds the module that makes the distribution.

        Args:
            features: length of the encoder's output; None makes the channels free parameters.
            shape: shape of the latent; one dimension for a joint family.

        Returns:
            A module; its forward takes features of shape `(*, features)` (or None) and returns a
            distribution over `(*, *shape)`, whose last dimension is the event of a joint family.
        """
        return _Head(self, features, torch.Size(shape))

    def __repr__(self) -> str:
        given = [f", {name}={_show(rule)}" for name, rule in self.arguments.items()]
        return f"Family({self.distribution.__name__}{''.join(given)})"


class Prior:
    """The family whose only member is the prior itself: no information passes to the latent.

    The guide then samples from the model's own latent statements, so the prior may be learned,
    hierarchical or of any support, and the KL divergence is zero exactly.
    """

    channels: tuple[str, ...] = ()
    joint = False
    name = "noise_only"

    def __repr__(self) -> str:
        return "Prior()"


class Flow:
    r"""A conditional normalizing flow: `z = loc + scale * T(eps)`, with everything from the features.

    `T` chains affine couplings (which bend and correlate) and one elementwise spline (which
    reshapes the marginals). All parts have closed-form inverses, so both sampling and scoring cost
    one pass. It starts at the identity, so that the family contains `mean_scale` and begins there.

    Args:
        layers: number of affine couplings; used in pairs of opposite order, so an even number.
        hidden: width of the networks of the couplings and the spline.
        bins: segments of the spline in each coordinate, on (-3, 3).

    Raises:
        ValueError: `layers` is odd or negative, or `hidden` or `bins` is too small.

    Dinh et al., Density estimation using Real NVP, 2017; Dolatabadi et al., Invertible generative
    modeling using linear rational splines, 2020.
    """

    channels = ("loc", "scale", "shape")
    joint = True

    def __init__(self, *, layers: int = 2, hidden: int = 64, bins: int = 8) -> None:
        if layers < 0 or layers % 2:
            raise ValueError(f"layers: expected an even number of at least 0, got {layers}")
        if hidden < 1 or bins < 2:
            raise ValueError(f"hidden, bins: expected at least 1 and 2, got {hidden} and {bins}")
        self.layers, self.hidden, self.bins = layers, hidden, bins

    @property
    def name(self) -> str:
        """The name in the ladder, or the expression that builds the family."""
        return _ladder_name(self) or repr(self)

    def head(self, features: int | None, shape: torch.Size) -> nn.Module:
        """Builds the flow's module; arguments and result as those of `Family.head`."""
        return _FlowHead(self, features, shape[0])

    def __repr__(self) -> str:
        return f"Flow(layers={self.layers}, hidden={self.hidden}, bins={self.bins})"


class _Argument(nn.Module):
    """One learned argument: a linear function of the features, or a free parameter."""

    def __init__(
        self,
        constraint: Constraint,
        shape: torch.Size,
        features: int | None,
        start: float | None = None,
    ) -> None:
        super().__init__()
        self.constraint = constraint
        self.triangular = constraint is constraints.lower_cholesky
        if self.triangular:  # only the entries that count, so that no parameter is idle
            rows, columns = torch.tril_indices(shape[-2], shape[-1])
            self.register_buffer("place", rows * shape[-1] + columns, persistent=False)
            self.shape, self.raw_shape = shape, torch.Size([len(rows)])
        else:
            self.shape = self.raw_shape = torch.Size(transform_to(constraint).inverse_shape(shape))
        self.linear = self.raw = None
        if features is not None:
            self.linear = nn.Linear(features, self.raw_shape.numel())
        else:
            raw = 0.01 * torch.randn(self.raw_shape)
            if start is not None:
                with torch.no_grad():
                    if self.triangular:
                        raw[rows == columns] += torch.tensor(start).log()
                    else:
                        raw += transform_to(constraint).inv(torch.full(shape, start))
            self.raw = nn.Parameter(raw)

    def forward(self, features: Tensor | None) -> Tensor:
        if self.linear is None:
            raw = self.raw
        else:
            raw = self.linear(features)
            raw = raw.reshape(raw.shape[:-1] + self.raw_shape)
        if self.triangular:
            flat = raw.new_zeros(raw.shape[:-1] + (self.shape.numel(),))
            index = self.place.expand(raw.shape)
            raw = flat.scatter(-1, index, raw).reshape(raw.shape[:-1] + self.shape)
        return transform_to(self.constraint)(raw)


class _Head(nn.Module):
    """Applies the family's distribution to its arguments."""

    def __init__(self, family: Family, features: int | None, shape: torch.Size) -> None:
        super().__init__()
        self.family, self.shape = family, shape
        own = family.distribution.arg_constraints
        for name, rule in family.rules.items():
            if isinstance(rule, (Channel, Shared)):
                constraint = rule.constraint or own[name]
                if constraints.is_dependent(constraint):  # Delta's value: any real number
                    constraint = constraints.real
                size = _argument_shape(rule, own[name], family.joint, shape)
                source = features if isinstance(rule, Channel) else None
                start = _FREE_START.get(name) if features is None else None
                self.add_module(name, _Argument(constraint, size, source, start))
            else:
                value = _fixed(rule, _event_dim(own[name]), shape)
                self.register_buffer(name, value, persistent=False)

    def forward(self, features: Tensor | None = None) -> Any:
        values = {}
        for name in self.family.rules:
            value = getattr(self, name)
            values[name] = value(features) if isinstance(value, _Argument) else value
        batch = features.shape[:-1] if features is not None else torch.Size()
        fn = self.family.distribution(**values)
        return fn.expand(batch if self.family.joint else batch + self.shape)


class _FlowHead(nn.Module):
    def __init__(self, family: Flow, features: int | None, size: int) -> None:
        super().__init__()
        self.size = size
        self.context = None if features is not None else nn.Parameter(torch.zeros(1))
        width = features or 1
        shape, free = torch.Size([size]), features is None
        self.loc = _Argument(constraints.real, shape, features)
        self.scale = _Argument(constraints.positive, shape, features, 0.1 if free else None)
        left, hidden = size // 2, [family.hidden]
        self.couplings = nn.ModuleList()
        for _ in range(family.layers if size > 1 else 0):
            net = ConditionalDenseNN(left, width, hidden, [size - left] * 2, nn.Tanh())
            nn.init.zeros_(net.layers[-1].weight)
            nn.init.zeros_(net.layers[-1].bias)
            self.couplings.append(transforms.ConditionalAffineCoupling(left, net))
        knots = [size * family.bins, size * family.bins, size * (family.bins - 1)]
        net = DenseNN(width, hidden, [*knots, size * family.bins], nn.Tanh())
        nn.init.zeros_(net.layers[-1].weight)
        nn.init.zeros_(net.layers[-1].bias)
        # slopes are softplus(raw) and must be 1 inside, as outside, for the identity
        nn.init.constant_(net.layers[-1].bias[2 * knots[0] : sum(knots)], 0.5413248)
        self.spline = transforms.ConditionalSpline(net, size, family.bins)

    def forward(self, features: Tensor | None = None) -> Any:
        context = self.context if features is None else features
        loc, scale = self.loc(features), self.scale(features)
        flip = torch.arange(self.size - 1, -1, -1, device=loc.device)
        chain: list[Any] = []
        for coupling in self.couplings:
            chain += [coupling.condition(context), transforms.Permute(flip)]
        chain.append(self.spline.condition(context))
        chain.append(transforms.AffineTransform(loc, scale, event_dim=1, cache_size=1))
        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return dist.TransformedDistribution(base, chain)


def _rules(distribution: Any, given: dict[str, Any]) -> dict[str, Any]:
    """One rule (a `Channel`, a `Shared` or a fixed value) for each argument that is used."""
    own = distribution.arg_constraints
    signature = inspect.signature(distribution.__init__).parameters
    names = [name for name in signature if name in own]
    for name, rule in given.items():
        if name not in names:
            raise ValueError(
                f"{name}: {distribution.__name__} has no such argument; it has {', '.join(names)}"
            )
        if not isinstance(rule, (int, float, Tensor, Constraint, Channel, Shared)):
            raise TypeError(
                f"{name}: expected a number, a tensor, a constraint, `Channel` or `shared`, "
                f"got {type(rule).__name__}"
            )
    alternatives = [name for name in names if signature[name].default is None]
    chosen = [name for name in alternatives if name in given] or alternatives[-1:]
    rules: dict[str, Any] = {}
    for name in names:
        if name in alternatives and name not in chosen:
            continue
        rule = given.get(name, Channel())
        if isinstance(rule, Constraint):
            rule = Channel(rule)
        if not isinstance(rule, (Channel, Shared)):
            _check_fixed(name, rule, own[name])
        elif not constraints.is_dependent(own[name]) and own[name].is_discrete:
            raise ValueError(f"{name}: expected a fixed number, since it is discrete; got {rule}")
        rules[name] = rule
    return rules


def _check_fixed(name: str, value: Any, constraint: Constraint) -> None:
    tensor = _fixed(value, _event_dim(constraint), torch.Size([1]))
    ok = torch.isfinite(tensor).all()
    if not constraints.is_dependent(constraint):
        ok = ok and constraint.check(tensor).all()
    if not ok:
        raise ValueError(f"{name}: expected a finite value in {constraint}, got {value}")


def _fixed(value: Any, event_dim: int, shape: torch.Size) -> Tensor:
    """A fixed argument as a tensor; one number fills a vector, or the diagonal of a matrix."""
    tensor = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if tensor.dim() or event_dim == 0:
        return tensor
    return tensor.expand(shape) if event_dim == 1 else tensor * torch.eye(shape[-1])


def _event_dim(constraint: Constraint) -> int:
    return 0 if constraints.is_dependent(constraint) else constraint.event_dim


def _argument_shape(rule: Any, own: Constraint, joint: bool, shape: torch.Size) -> torch.Size:
    """Shape of a learned argument for a latent of the given shape."""
    event_dim = _event_dim(own)
    if event_dim == 0:
        return torch.Size() if joint or isinstance(rule, Shared) else shape
    if event_dim == 1:
        return shape
    columns = getattr(rule, "columns", None) or shape[-1]
    return torch.Size([shape[-1], columns])


def _show(rule: Any) -> str:
    return "shared" if rule == shared else f"{rule}"


def _ladder_name(family: Any) -> str | None:
    return next((name for name, member in LADDER.items() if member is family), None)


deterministic = Family(dist.Delta, log_density=0.0)
zero = Family(dist.Delta, v=0.0, log_density=0.0)
noise_only = Prior()
mean_only = Family(dist.Normal, scale=1.0)
mean_only_bounded = Family(dist.Normal, loc=constraints.interval(-1.0, 1.0), scale=1.0)
shared_scale = Family(dist.Normal, scale=shared)
mean_scale = Family(dist.Normal)
# df > 2: below, the variance is infinite, and with it the divergence from a Gaussian prior
student_t = Family(dist.StudentT, df=constraints.greater_than(2.0))
low_rank = Family(dist.LowRankMultivariateNormal, cov_factor=Channel(columns=2))
full_rank = Family(dist.MultivariateNormal)
flow = Flow()

#: The ladder, from no channel to a channel of any shape: name -> family.
LADDER: dict[str, Any] = {
    "deterministic": deterministic,
    "zero": zero,
    "noise_only": noise_only,
    "mean_only": mean_only,
    "mean_only_bounded": mean_only_bounded,
    "shared_scale": shared_scale,
    "mean_scale": mean_scale,
    "student_t": student_t,
    "low_rank": low_rank,
    "full_rank": full_rank,
    "flow": flow,
}
