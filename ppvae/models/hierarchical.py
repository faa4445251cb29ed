"""A regression whose coefficients differ between groups, as a Pyro program."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ppvae._checks import check_count, expect
from ppvae._scopes import UniquelyNamed
from ppvae.models.unknowns import prior_or_values, sampled


class HierarchicalRegression(UniquelyNamed):
    r"""The model `y ~ Normal(X w[group], noise)` with `w[g] ~ Normal(mu, tau)` for each group g.

    Sites `mu` and `tau` (shape `(columns,)`: mean and sd, over groups, of each coefficient),
    `noise`, `weight` (shape `(columns,)`, in the plate `groups`) and `y`, in the plate `data`. What
    is known is no site. A column of ones in X makes intercepts that vary, any other column slopes.

    All groups inform `mu` and `tau`, and these each group: the fewer rows a group has, the nearer
    its coefficients are to `mu` (partial pooling).

    The coefficients are drawn as they are written here (centred). A guide draws them around that
    prior, as a non-centred program would, by `Block(family, prior="location_scale")`, or depending
    on it by `Block(family, given=["mu", "tau"])`; NUTS does by Pyro's `LocScaleReparam(0.0)`.

    Args:
        columns: number of columns of X, at least 1.
        groups: number of groups, at least 1.
        mu: prior of the means, a univariate distribution with scalar or per-column arguments; or
            the means, where they are known: a number, or one per column.
        tau: likewise of the sds over groups, positive; the smaller, the more alike are the groups.
        noise: likewise of the sd of the noise, one for all.

    Raises:
        TypeError: a prior is no distribution of Pyro's and no number, or an argument of a call no
            tensor of real numbers.
        ValueError: a number is none of those above, a prior has the wrong shape or support, or, in
            a call, X, group and y do not fit, or a group is none of 0, ..., groups - 1 (where the
            call is no graph).

    Gelman and Hill, Data analysis using regression and multilevel/hierarchical models, 2007.

    Example:
        >>> from ppvae import FamilyGuide
        >>> model = HierarchicalRegression(columns=2, groups=3)
        >>> X, group = torch.randn(6, 2), torch.tensor([0, 0, 1, 2, 2, 2])
        >>> guide = FamilyGuide(model, "mean_scale").setup(X, group, model(X, group))
        >>> guide(X, group)["weight"].shape
        torch.Size([3, 2])
    """

    #: every operation leaves leading dims alone, so that many draws can be made in one run
    vectorized = True

    def __init__(
        self,
        columns: int,
        groups: int,
        *,
        mu: Distribution | float | Tensor = dist.Normal(0.0, 1.0),  # noqa: B008 (immutable)
        tau: Distribution | float | Tensor = dist.HalfNormal(1.0),  # noqa: B008
        noise: Distribution | float | Tensor = dist.HalfNormal(1.0),  # noqa: B008
    ) -> None:
        super().__init__()
        self.columns, self.groups = check_count("columns", columns), check_count("groups", groups)
        shape = (self.columns,)
        self.mu = prior_or_values("mu", mu, shape, constraints.real)
        self.tau = prior_or_values("tau", tau, shape, constraints.positive)
        self.noise = prior_or_values("noise", noise, (), constraints.positive)

    def __repr__(self) -> str:
        priors = f"mu={self.mu}, tau={self.tau}, noise={self.noise}"
        return f"HierarchicalRegression({self.columns}, {self.groups}, {priors})"

    def forward(self, X: Tensor, group: Tensor, y: Tensor | None = None) -> Tensor:
        """Runs the program.

        Args:
            X: shape `(rows, columns)`.
            group: the group of each row, shape `(rows,)`, a whole number from 0.
            y: shape `(rows,)`, to condition on; None draws it.

        Returns:
            y, of shape `(rows,)`.
        """
        self.check_call(X, group, y)
        mu = sampled("mu", self.mu, X.new_zeros(self.columns))
        tau = sampled("tau", self.tau, X.new_zeros(self.columns))
        noise = sampled("noise", self.noise, X.new_zeros(()))
        with pyro.plate("groups", self.groups, dim=-1):
            weight = pyro.sample("weight", dist.Normal(mu, tau).to_event(1))
        with pyro.plate("data", len(X), dim=-1):
            loc = (X * weight[..., group.long(), :]).sum(-1)
            return pyro.sample("y", dist.Normal(loc, noise), obs=y)

    def check_call(self, X: Tensor, group: Tensor, y: Tensor | None = None) -> None:
        """Checks the arguments of a call.

        Raises:
            TypeError: one is no tensor of real numbers.
            ValueError: they do not fit the model or each other.
        """
        given = {"X": X, "group": group} | ({} if y is None else {"y": y})
        for name, value in given.items():
            real = isinstance(value, Tensor) and not value.is_complex()
            real = real and (value.is_floating_point() or name != "X")
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            expect(real, name, "a tensor of real numbers, floating in X", got, TypeError)
            if name == "X":
                fits = X.dim() == 2 and X.shape[1] == self.columns
                expect(fits, "X", f"shape (rows, {self.columns})", tuple(X.shape))
            else:
                one, fits = "one for each row of X", value.shape == X.shape[:1]
                expect(fits, name, f"shape ({len(X)},), {one}", tuple(value.shape))
        if not torch.compiler.is_compiling():  # a graph cannot look at values
            unknown = ((group < 0) | (group >= self.groups) | (group != group.long())).nonzero()
            first = "".join(f"{group[i].item():g} in row {i}" for i in unknown[:1, 0].tolist())
            expect(not first, "group", f"whole numbers from 0 to {self.groups - 1}", first)
