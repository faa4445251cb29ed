"""Generalized linear models as Pyro programs: counts, classes, and data with outliers."""

import copy
from typing import Any, Self

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution
from torch.func import functional_call

from ppvae import likelihoods
from ppvae._checks import as_doubles, check_count, expect
from ppvae.likelihoods.categorical import Codes
from ppvae.likelihoods.scale import Scaled
from ppvae.regression.conjugate import ConjugateNormal
from ppvae.regression.counted import kept, observed
from ppvae.regression.predictor import (
    POSITIVE,
    WEIGHT,
    LinearPredictor,
    in_units_of,
    number_of,
    read_number,
)
from ppvae.regression.separation import separates, vanishes
from ppvae.regression.weights import Horseshoe

# kind of likelihood -> its site that is a latent here, and which of its tensors has the logarithm
_UNKNOWN = {Scaled: ("noise", "log_scale"), likelihoods.NegativeBinomial: ("dispersion", "raw")}


class GeneralizedLinear(LinearPredictor):
    r"""The model `y ~ likelihood(X w + intercept + offset)`, with priors as `LinearRegression`.

    ============================== ================================ ==============================
    likelihood                     the linear predictor is          further latents
    ============================== ================================ ==============================
    `Bernoulli()`                  the logit
    `Categorical(K)`               the logits of K classes
    `Poisson()`                    the log mean
    `NegativeBinomial()`           the log mean                     `dispersion`: variance = mean
                                                                    + dispersion mean^2
    `StudentT(df)`, `Laplace()`,   the location (of the logarithm)  `noise`, the scale
    `Normal()`, `LogNormal()`
    ============================== ================================ ==============================

    An offset is added to the linear predictor: of counts the logarithm of the exposure. Sites:
    `scale` (where it is unknown), `intercept` (where there is one), `weight`, `noise` or
    `dispersion` (where it is unknown) and `y`, in the plate `data`.

    **Classes.** Weights have the shape `(K, columns)` and the prior is the same for each class,
    which identifies them, if it is proper; only differences between classes say something of the
    data. Flat intercepts are those against class 0, of shape `(K - 1,)`. With `reference=k` the
    logit of class k is zero, and weights have the shape `(K - 1, columns)`, as those of the other
    classes against it; then all priors may be flat.

    Args:
        columns: number of columns of X, at least 1.
        likelihood: of those in the table; or another one of one number per datum, and without
            parameters.
        weight: as for `LinearRegression`; of classes, for each of them.
        noise: scale of the likelihood, where it has one: a positive number, a distribution on the
            positive reals, or None for a flat prior.
        dispersion: that of a `NegativeBinomial`, in the same ways.
        scale: as for `LinearRegression`.
        intercept: as for `LinearRegression`.
        reference: the class whose logit is zero; None for none.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: as `LinearRegression`; or the likelihood has a scale, a dispersion or a start of
            its own, or there is an argument that it has no use for, or weights of classes are flat
            and there is no reference.

    McCullagh and Nelder, *Generalized linear models*, 1989.

    Example:
        >>> from ppvae import FamilyGuide, families, fit
        >>> X, y = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([0.0, 1.0, 3.0])
        >>> model = GeneralizedLinear(1, likelihoods.Poisson(), weight=None, intercept=True)
        >>> guide = FamilyGuide(model, families.deterministic)
        >>> fit(model, guide, (X, y), progress=False).converged
        True
        >>> round(guide.heads["weight"](None).mean.item(), 4)
        1.5132
    """

    def __init__(
        self,
        columns: int,
        likelihood: likelihoods.Likelihood,
        *,
        weight: Distribution | Horseshoe | None = WEIGHT,
        noise: float | Distribution | None = POSITIVE,
        dispersion: float | Distribution | None = POSITIVE,
        scale: float | Distribution | None = None,
        intercept: bool | Distribution = False,
        reference: int | None = None,
    ) -> None:
        _check_likelihood(likelihood)
        wanted = "a prior without the noise (a LinearRegression takes this one)"
        relative = isinstance(weight, ConjugateNormal)
        expect(not relative, "weight", wanted, weight, TypeError)
        classes = getattr(likelihood, "categories", None)
        expect(classes or reference is None, "reference", "none without classes", reference)
        others = () if classes is None else (classes - 1,)
        several = others if classes is None or reference is not None else (classes,)
        flat = not isinstance(intercept, Distribution)
        super().__init__(
            columns,
            weight=weight,
            intercept=intercept,
            scale=scale,
            several=several,
            free=others if flat else several,
        )
        self.classes, self.reference = classes, reference
        if reference is not None:
            self.reference = check_count("reference", reference, 0)
            below = self.reference < (classes or 0)
            expect(below, "reference", f"a class below {classes}", reference)
        known = weight is not None or classes is None or reference is not None
        expect(known, "weight", "a proper prior of the weights of classes, or a reference", None)
        self.likelihood = copy.deepcopy(likelihood)
        self.unknown = _unknown_of(likelihood)
        if self.unknown is not None:  # a latent here, and no parameter
            own = getattr(self.likelihood, self.unknown[1]).detach()
            delattr(self.likelihood, self.unknown[1])
            self.likelihood.register_buffer(self.unknown[1], own)
        self.number_prior = None
        for name, given in {"noise": noise, "dispersion": dispersion}.items():
            if self.unknown is not None and name == self.unknown[0]:
                self.number_prior = read_number(name, given)
            else:
                expect(given is POSITIVE, name, f"none for {likelihood}", given)

    @classmethod
    def of(
        cls,
        X: Any,
        y: Any,
        likelihood: likelihoods.Likelihood,
        *,
        weights: Any = None,
        offset: Any = None,
        counts: Any = None,
        **arguments: Any,
    ) -> Self:
        """A model for some data, whose priors may be in their units.

        Args:
            X: shape `(rows, columns)`.
            y: shape `(rows,)`.
            likelihood: as for the class.
            weights: of the rows, as a call will have them.
            offset: of the rows.
            counts: of the rows.
            **arguments: those of the class. With `scale="data"` the prior of the weights is meant
                for columns of standard deviation one: it is divided by sd(x_j). Where the
                likelihood has a scale, y is meant to have standard deviation one, too, as for
                `LinearRegression.of`.

        Raises:
            TypeError, ValueError: as the class and `LinearRegression.of`.
        """
        response = isinstance(likelihood, Scaled) and not isinstance(
            likelihood, likelihoods.LogNormal
        )
        sides = {"weights": weights, "counts": counts}
        sides["offset"] = offset if response else None  # else it is none of the units of y
        columns, arguments = in_units_of(X, y, sides, arguments, response=response)
        return cls(columns, likelihood, **arguments)

    def __repr__(self) -> str:
        kind = f"{type(self.likelihood).__name__}({self.likelihood.extra_repr()})"
        further = "" if self.unknown is None else f", {self.unknown[0]}={self.number_prior}"
        further += "" if self.reference is None else f", reference={self.reference}"
        return f"GeneralizedLinear({kind}, {self.words()}{further})"

    def check_data(
        self,
        X: Tensor,
        y: Tensor | None = None,
        weights: Tensor | None = None,
        offset: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Checks that all the data together, not just one batch, can make the posterior proper.

        Raises:
            ValueError: of rows that count: the prior of the weights is flat and X has not the rank
                of its columns, or the intercept's or theirs is, and y is always the same or a class
                is missing; the prior is flat and classes, or bits, can be told apart without an
                error, or zero counts from the others; weights of rows are not positive; or counts
                are below zero, or all zero.
        """
        super().check_data(X, y, weights, offset, counts)
        flat = self.intercept_prior is None or self.weight_prior is None
        if y is None or not flat or isinstance(self.likelihood, Scaled):
            return
        count = 2 if self.classes is None else self.classes
        values = kept(y, counts).unique()
        got = f"{len(values)} and flat priors: the posterior is improper"
        expect(len(values) >= count, "y", f"{count} different values at least", got)
        if self.weight_prior is None:
            wanted = "a proper prior, as these data are told apart without an error"
            got = "a flat one: the posterior is improper, and the likelihood has no maximum"
            expect(not self._apart(kept(X, counts), kept(y, counts)), "weight", wanted, got)

    def _apart(self, X: Tensor, y: Tensor) -> bool:
        """Whether the likelihood has no maximum."""
        ones = X.new_ones(len(X), 1 if self.intercept_prior is None else 0)
        columns, values = as_doubles(torch.cat([ones, X], 1)), as_doubles(y)
        if self.classes is None and not isinstance(self.likelihood, likelihoods.Bernoulli):
            return vanishes(columns, values)
        return separates(columns, values.astype(int), self.classes or 2)

    def forward(
        self,
        X: Tensor,
        y: Tensor | None = None,
        weights: Tensor | None = None,
        offset: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Runs the program.

        Args:
            X: shape `(rows, columns)`.
            y: shape `(rows,)`, to condition on, of classes the numbers from 0, and True is 1; None
                draws it.
            weights: shape `(rows,)`, where there is a `noise`: its square in a row is divided by
                the weight of the row.
            offset: shape `(rows,)`, added to the linear predictor; not of classes.
            counts: shape `(rows,)`, at least 0: how often a row counts, by which its log density
                is multiplied; need not be whole. Where y is drawn it has no effect.

        Returns:
            y, of shape `(rows,)`.
        """
        y = y.to(X.dtype) if isinstance(y, Tensor) and y.dtype == torch.bool else y
        self.check_rows(X, y, weights, offset, counts)
        scale, intercept = self.scale(X), self.intercept(X)
        loc = self._with_reference(self.line(X, scale))
        number = self._number(X, weights)
        loc = loc if intercept is None else loc + self._with_reference(intercept)
        expect(offset is None or self.classes is None, "offset", "none for classes", "one")
        loc = loc if offset is None else loc + offset
        with pyro.plate("data", len(X), dim=-1):
            obs = None if y is None else y.to(loc.dtype)
            fn = observed(self._observed(loc, number), obs, counts)
            return pyro.sample("y", fn, obs=obs)

    def _number(self, X: Tensor, weights: Tensor | None) -> Tensor | None:
        """The noise of each row, or the dispersion; None where the likelihood has none."""
        noise = self.unknown is not None and self.unknown[0] == "noise"
        expect(weights is None or noise, "weights", f"none for {self.likelihood}", "some")
        if self.unknown is None:
            return None
        number = number_of(self.unknown[0], self.number_prior, X)
        return number if weights is None else number / weights.sqrt()

    def _with_reference(self, values: Tensor) -> Tensor:
        """Adds the zeros of the class that others are held against, where there is one."""
        if self.classes is None or values.shape[-1] == self.classes:
            return values
        at = self.reference or 0
        zero = torch.zeros_like(values[..., :1])
        return torch.cat([values[..., :at], zero, values[..., at:]], -1)

    def _observed(self, loc: Tensor, number: Tensor | None) -> TorchDistributionMixin:
        """The distribution of y."""
        if self.classes is not None:
            return Codes(logits=loc)
        if self.unknown is None or number is None:
            return self.likelihood(loc)
        return functional_call(self.likelihood, {self.unknown[1]: number.log()}, (loc,))


def _unknown_of(likelihood: Any) -> tuple[str, str] | None:
    """The site of the number that a likelihood has beside its location, and its tensor."""
    found = [both for kind, both in _UNKNOWN.items() if isinstance(likelihood, kind)]
    return found[0] if found else None


def _check_likelihood(likelihood: Any) -> None:
    """Raises an error unless a likelihood can be that of one number of the linear predictor."""
    known, kind = isinstance(likelihood, likelihoods.Likelihood), type(likelihood).__name__
    expect(known, "likelihood", "one of ppvae.likelihoods, such as Bernoulli()", kind, TypeError)
    one = likelihood.outputs == 1 or isinstance(likelihood, likelihoods.Categorical)
    expect(one, "likelihood", "one that takes one number per datum, or a Categorical", likelihood)
    started = likelihood.start is not None or hasattr(likelihood, "shares")
    expect(not started, "likelihood", "one without a start (the intercept is that)", likelihood)
    own = {"scale": "noise", "dispersion": "dispersion"}
    for name, argument in own.items():
        value = getattr(likelihood, name, None)
        fits = value is None or value.numel() == 1 and value.item() == 1.0
        expect(fits, "likelihood", f"a {name} of 1: the model's is its argument {argument}", value)
    learned = [n for n, p in likelihood.named_parameters() if p.requires_grad]
    expect(
        _unknown_of(likelihood) or not learned,
        "likelihood",
        "one that learns nothing by itself",
        likelihood,
    )
