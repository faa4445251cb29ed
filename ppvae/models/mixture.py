"""A mixture of normal distributions, as a Pyro program whose assignments are summed out."""

from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from pyro.ops.indexing import Vindex
from torch import Tensor

from ppvae._checks import check_choice, check_count, check_real, check_seed, expect
from ppvae._scopes import UniquelyNamed, random_state
from ppvae.models.unknowns import check_prior, sampled


class GaussianMixture(UniquelyNamed):
    r"""The model `x ~ Normal(means[part], covariances[part])` with `part ~ Categorical(weights)`.

    Sites `part` and `x`, in the plate `data`. `part`, which component a datum is from, is discrete:
    all functions of the library sum it out exactly, and `evaluate` returns its posterior
    probabilities, `part_responsibility`. The covariance of a component is that of its `scales` (its
    sds, of each column) and, where it is full, its `correlations` (their Cholesky factor).

    Weights, means, scales and correlations are parameters, which `fit` brings to a maximum of the
    likelihood, with any guide: there is nothing to draw. Or each has a prior, and is then a latent
    site of all the data, the last three in the plate `components`.

    The likelihood has as many equal maxima as the components have orders, others that are lower,
    and no upper bound: a component on one single datum may be as narrow as it likes. So start at
    the data (`of`), and give the scales a prior where there are few data for a component.

    Args:
        components: number of components, at least 1.
        columns: number of columns of the data, at least 1.
        covariance: "full", where each component has its own covariance matrix, or "diag", where it
            has no correlations; as scikit-learn calls them.
        weights: a prior over `(components,)`, such as `dist.Dirichlet(torch.ones(3))`; by default
            they are a parameter, and so are the others.
        means: a univariate prior with arguments that are scalars or of shape
            `(components, columns)`.
        scales: likewise, on the positive numbers.
        correlations: a prior over Cholesky factors, `dist.LKJCholesky(columns)`; none for "diag".

    Attributes:
        weights: shape `(components,)`; at first all equal.
        means: shape `(components, columns)`; at first standard normal draws.
        scales: shape `(components, columns)`; at first one.
        correlations: shape `(components, columns, columns)`; at first none.

    Raises:
        TypeError: a prior is no distribution of Pyro's, or in a call, x is no tensor of real
            numbers.
        ValueError: a number or a word is none of those above, or a prior or x has another shape.

    McLachlan and Peel, Finite mixture models, 2000.

    Example:
        >>> from ppvae import FamilyGuide, evaluate
        >>> x = torch.cat([torch.randn(40, 2), 5 + torch.randn(60, 2)])
        >>> model = GaussianMixture.of(x, components=2)
        >>> guide = FamilyGuide(model, "mean_scale")  # draws nothing: there are no other latents
        >>> evaluate(model, guide, x).part_responsibility.shape
        (100, 2)
    """

    #: every operation leaves leading dims alone, so that many draws can be made in one run
    vectorized = True

    def __init__(
        self,
        components: int,
        columns: int,
        covariance: str = "full",
        *,
        weights: Any | None = None,
        means: Any | None = None,
        scales: Any | None = None,
        correlations: Any | None = None,
    ) -> None:
        super().__init__()
        self.components = check_count("components", components)
        self.columns = check_count("columns", columns)
        check_choice("covariance", covariance, ("full", "diag"))
        expect(covariance == "full" or correlations is None, "correlations", "none for diag", "one")
        self.covariance = covariance
        shape = self.components, self.columns
        starts = {
            "weights": (torch.full(shape[:1], 1 / self.components), constraints.simplex),
            "means": (torch.randn(shape), constraints.real),
            "scales": (torch.ones(shape), constraints.positive),
        }
        if covariance == "full":
            eye = torch.eye(self.columns).repeat(self.components, 1, 1)
            starts["correlations"] = eye, constraints.corr_cholesky
        given = {"weights": weights, "means": means, "scales": scales, "correlations": correlations}
        self.register_buffer("_zeros", torch.zeros(()), persistent=False)
        self.priors = {name: prior for name, prior in given.items() if prior is not None}
        self.shapes = {name: start.shape for name, (start, _) in starts.items()}
        for name, (start, support) in starts.items():
            if name in self.priors:
                check_prior(name, self.priors[name], tuple(start.shape), support)
            else:
                setattr(self, name, PyroParam(start, support, max(support.event_dim, 1)))

    def extra_repr(self) -> str:
        """What `repr` says in its brackets."""
        priors = "".join(f", {name}={prior}" for name, prior in self.priors.items())
        return f"{self.components}, {self.columns}, {self.covariance!r}{priors}"

    @classmethod
    def of(
        cls, x: Any, components: int, covariance: str = "full", *, seed: int = 0, **priors: Any
    ) -> Self:
        """A mixture that starts at the data: means at rows far from each other, equal scales.

        Args:
            x: data of shape `(batch, columns)`, without missing values.
            components: number of components, at most that of the data.
            covariance: as in the class.
            seed: of the choice of rows.
            **priors: as in the class.

        Raises:
            TypeError, ValueError: x is no such table, or as the class does.

        Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007.
        """
        table = check_real("x", x)
        fits = table.dim() == 2 and len(table) >= check_count("components", components)
        wanted = f"shape (batch, columns), with at least {components} data"
        expect(fits, "x", wanted, tuple(table.shape))
        table = table.detach().to(torch.get_default_dtype())
        expect(torch.isfinite(table).all(), "x", "finite numbers", "others")
        scale = table.std(0)
        varies = (scale > 0) & torch.isfinite(scale)
        expect(varies.all(), "x", "columns that vary, of finite sds", scale.tolist())
        unit = table / scale
        with random_state(check_seed(seed)):
            model = cls(components, table.shape[1], covariance, **priors)
            rows = torch.randint(len(table), (1,)).tolist()
            while len(rows) < model.components:
                away = torch.cdist(unit, unit[rows]).min(1).values.square()
                expect(away.any(), "x", f"at least {components} different data", len(rows))
                rows.append(int(torch.multinomial(away, 1)))
        if "means" not in model.priors:
            model.means = table[rows]
        if "scales" not in model.priors:
            model.scales = scale.expand(model.components, -1) / model.components ** (
                1 / model.columns
            )
        return model

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Runs the program.

        Args:
            x: data of shape `(batch, columns)` to condition on; None draws data.
            size: how many data to draw without `x`.

        Returns:
            The data, of shape `(batch, columns)`.
        """
        self.check_call(x)
        size = check_count("size", size) if x is None else len(x)
        weights = self._of("weights", 0)
        with pyro.plate("components", self.components, dim=-1):
            means, scales = self._of("means", 1), self._of("scales", 1)
            full = self.covariance == "full"
            correlations = self._of("correlations", 1) if full else None
        with pyro.plate("data", size, dim=-1):
            part = pyro.sample("part", dist.Categorical(weights))
            loc, scale = (Vindex(v.unsqueeze(-3))[..., part, :] for v in (means, scales))
            fn: Any = dist.Normal(loc, scale).to_event(1)
            if correlations is not None:
                tril = Vindex(correlations.unsqueeze(-4))[..., part, :, :]
                fn = dist.MultivariateNormal(loc, scale_tril=scale[..., None] * tril)
            return pyro.sample("x", fn, obs=x)

    def check_call(self, x: Tensor | None = None) -> None:
        """Checks the argument of a call.

        Raises:
            TypeError: it is no tensor of real numbers.
            ValueError: it has another shape.
        """
        if x is not None:
            real = isinstance(x, Tensor) and x.is_floating_point()
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            expect(real, "x", "a tensor of real numbers", got, TypeError)
            fits = x.dim() == 2 and x.shape[1] == self.columns
            expect(fits, "x", f"shape (batch, {self.columns})", tuple(x.shape))

    def _of(self, name: str, batch: int) -> Tensor:
        """A parameter, or a draw from its prior, with so many dims of plates."""
        if name in self.priors:
            return sampled(name, self.priors[name], self._zeros.expand(self.shapes[name]), batch)
        value: Tensor = getattr(self, name)
        return value
