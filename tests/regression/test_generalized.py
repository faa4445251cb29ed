"""Generalized linear models: their points are other libraries', their posteriors those of grids."""

import copy
import math
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import statsmodels.api as sm
import torch
from linear import same_one_by_one
from scipy import optimize, stats
from sklearn.linear_model import LogisticRegression, PoissonRegressor

from ppvae import (
    FamilyGuide,
    NarrowFamily,
    evaluate,
    families,
    fit,
    from_pyro_svi,
    likelihoods,
    predict,
    resample,
    simulate,
)
from ppvae.regression import ConjugateNormal, GeneralizedLinear, Horseshoe, objective

SD = 0.7
NORMAL = dist.Normal(0.0, SD)
QUIET = {"progress": False, "seed": 0}


def design(rows=200):
    X = torch.randn(rows, 3) * torch.tensor([1.0, 2.0, 0.5]) + 0.3
    return X, X @ torch.tensor([0.5, -0.2, 0.4]) + 0.3


def binary(rows=200):
    X, line = design(rows)
    return X, torch.bernoulli(torch.sigmoid(line))


def classes(rows=200):
    X, line = design(rows)
    logits = torch.stack([torch.zeros(rows), line, -line], -1)
    return X, torch.distributions.Categorical(logits=logits).sample()


def counts(rows=200, dispersion=0.0):
    """Counts, and the logs of their exposures."""
    X, line = design(rows)
    offset = 0.3 * torch.randn(rows)
    mean = (line + offset).exp()
    if dispersion:
        one = torch.full((rows,), 1 / dispersion)
        mean = mean * torch.distributions.Gamma(one, one).sample()
    return X, torch.poisson(mean), offset


def point(model, *data, **keywords):
    """The mode, by site."""
    guide = FamilyGuide(model, families.deterministic)
    assert fit(model, guide, data, kwargs=keywords or None, **QUIET).converged
    tree = from_pyro_svi(model, guide, *data, num_samples=1, kwargs=keywords or None)
    return {name: tree.posterior[name].values[0, 0] for name in guide.heads}


def same(found, expected):
    return abs(np.asarray(found) - np.asarray(expected)).max() < 1e-6


def test_a_penalized_point_is_logistic_regression():
    X, y = binary()
    theirs = LogisticRegression(C=SD**2, tol=1e-14, max_iter=10**5).fit(X, y)
    ours = point(GeneralizedLinear(3, likelihoods.Bernoulli(), weight=NORMAL, intercept=True), X, y)
    assert same(ours["weight"], theirs.coef_[0]) and same(ours["intercept"], theirs.intercept_)
    model = GeneralizedLinear(3, likelihoods.Bernoulli(), weight=NORMAL, intercept=True)
    truths = point(model, X, y > 0)
    assert same(truths["weight"], ours["weight"])


def test_a_penalized_point_is_multinomial_logistic_regression():
    """The weights of all classes are penalized; intercepts are free, and held against class 0."""
    X, y = classes()
    likelihood = likelihoods.Categorical(3)
    for intercept in (True, False):
        options = {"fit_intercept": intercept, "tol": 1e-11, "max_iter": 10**5, "C": SD**2}
        theirs = LogisticRegression(solver="newton-cg", **options).fit(X, y)
        model = GeneralizedLinear(3, likelihood, weight=NORMAL, intercept=intercept)
        ours = point(model, X, y)
        assert same(ours["weight"], theirs.coef_)
        if intercept:
            assert same(ours["intercept"], (theirs.intercept_ - theirs.intercept_[0])[1:])


def test_a_penalized_point_is_a_poisson_regression():
    X, y, _ = counts()
    theirs = PoissonRegressor(alpha=1 / SD**2 / len(X), tol=1e-14, max_iter=10**5).fit(X, y)
    ours = point(GeneralizedLinear(3, likelihoods.Poisson(), weight=NORMAL, intercept=True), X, y)
    assert same(ours["weight"], theirs.coef_) and same(ours["intercept"], theirs.intercept_)


@pytest.mark.parametrize("kind", ["binary", "poisson", "negative binomial"])
def test_a_point_with_flat_priors_is_a_generalized_linear_model(kind):
    X, y, offset = counts(dispersion=0.5)
    likelihood, told, theirs = {
        "binary": (likelihoods.Bernoulli(), {}, sm.families.Binomial()),
        "poisson": (likelihoods.Poisson(), {}, sm.families.Poisson()),
        "negative binomial": (
            likelihoods.NegativeBinomial(),
            {"dispersion": 0.5},
            sm.families.NegativeBinomial(alpha=0.5),
        ),
    }[kind]
    y = y.clamp_max(1) if kind == "binary" else y
    model = GeneralizedLinear(3, likelihood, weight=None, intercept=True, **told)
    ours = point(model, X, y, offset=offset)
    both = sm.add_constant(X.numpy())
    fitted = sm.GLM(y.numpy(), both, family=theirs, offset=offset.numpy()).fit(tol=1e-14)
    assert same(np.append(ours["intercept"], ours["weight"]), fitted.params)
    if kind != "binary":  # a guide that draws a point has the likelihood at it as its objective
        guide = FamilyGuide(model, families.deterministic)
        fit(model, guide, (X, y), kwargs={"offset": offset}, **QUIET)
        value = objective(model, guide, X, y, kwargs={"offset": offset})
        assert value == pytest.approx(fitted.llf, abs=1e-6) and value.error == 0


def test_an_unknown_dispersion_is_the_maximum_likelihood_one():
    X, y, offset = counts(dispersion=0.5)
    unknown = {"weight": None, "dispersion": None, "intercept": True}
    ours = point(
        GeneralizedLinear(3, likelihoods.NegativeBinomial(), **unknown), X, y, offset=offset
    )
    model = sm.NegativeBinomial(y.numpy(), sm.add_constant(X.numpy()), offset=offset.numpy())
    theirs = model.fit(disp=0, method="newton", maxiter=1000, tol=1e-12)
    assert same([ours["intercept"], *ours["weight"], ours["dispersion"]], theirs.params)


def test_classes_against_a_reference_are_a_multinomial_logit():
    X, y = classes()
    theirs = sm.MNLogit(y.numpy(), sm.add_constant(X.numpy())).fit(disp=0, tol=1e-14)
    model = GeneralizedLinear(
        3, likelihoods.Categorical(3), weight=None, intercept=True, reference=0
    )
    ours = point(model, X, y)
    assert same(np.column_stack([ours["intercept"], ours["weight"]]), theirs.params.T)
    # against another class all differences are the same
    model = GeneralizedLinear(
        3, likelihoods.Categorical(3), weight=None, intercept=True, reference=2
    )
    other = point(model, X, y)
    whole = np.vstack([np.zeros(3), ours["weight"]])
    assert same(other["weight"], (whole - whole[2])[:2])


def test_robust_regression_is_the_maximum_of_its_likelihood():
    """Location and scale by SciPy; weights of rows divide the square of the scale."""
    X, line = design()
    weights = torch.rand(200) + 0.5
    y = line + torch.distributions.StudentT(4.0).sample((200,)) / weights.sqrt()
    unknown = {"weight": None, "noise": None, "intercept": True}
    ours = point(GeneralizedLinear(3, likelihoods.StudentT(4.0), **unknown), X, y, weights=weights)
    both = sm.add_constant(X.numpy())

    def loss(theta):
        scale = np.exp(theta[-1]) / np.sqrt(weights.numpy())
        return -stats.t(4.0, both @ theta[:-1], scale).logpdf(y.numpy()).sum()

    start = np.append(np.linalg.lstsq(both, y.numpy())[0], 0.0)
    theirs = optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-7}).x
    found = [ours["intercept"], *ours["weight"], np.log(ours["noise"])]
    assert abs(np.array(found) - theirs).max() < 1e-5  # of the derivatives by differences


def on_grid(log_joint, axes):
    """Log evidence, mean and sd of a density of few dims, by sums over a grid."""
    places = torch.cartesian_prod(*axes)
    logs = torch.cat([log_joint(each) for each in places.split(20_000)])
    step = sum(math.log(axis[1] - axis[0]) for axis in axes)
    chances = torch.softmax(logs, 0)
    mean = chances @ places
    return logs.logsumexp(0).item() + step, mean, (chances @ (places - mean).square()).sqrt()


def check_posterior(model, data, grid, stack):
    """Evidence and means of a guide's weighted draws, to five of their standard errors."""
    evidence, mean, sd = grid
    guide = FamilyGuide(model, families.full_rank)
    fit(model, guide, data, **QUIET)
    value = objective(model, guide, *data)
    assert evidence - 0.3 < value < evidence + 5 * value.error
    found = evaluate(model, guide, *data, num_samples=4000)
    assert found.log_evidence_se < 0.02
    assert abs(found.log_evidence.item() - evidence) < 5 * found.log_evidence_se.item()
    drawn = stack(resample(model, guide, *data, num_samples=1000, **QUIET).latents)
    assert ((drawn.mean(0) - mean).abs() < 5 * sd / 1000**0.5).all()


def test_a_logistic_posterior_against_a_grid():
    X, y = binary(30)
    X = X[:, :1]
    model = GeneralizedLinear(
        1, likelihoods.Bernoulli(), weight=dist.Normal(0.0, 2.0), intercept=dist.Normal(0.0, 3.0)
    )

    def log_joint(place):
        b, w = place.T[..., None]
        logits = b + w * X[:, 0]
        p = torch.distributions.Bernoulli(logits=logits).log_prob(y).sum(1)
        return p + dist.Normal(0.0, 3.0).log_prob(b[:, 0]) + dist.Normal(0.0, 2.0).log_prob(w[:, 0])

    axis = torch.linspace(-4, 5, 451)
    grid = on_grid(log_joint, (axis, axis))
    stack = lambda found: torch.stack([found["intercept"], found["weight"][:, 0]], -1)  # noqa: E731
    check_posterior(model, (X, y), grid, stack)


def test_a_poisson_posterior_against_a_grid_of_three_dims():
    X, y, _ = counts(25)
    model = GeneralizedLinear(3, likelihoods.Poisson(), weight=NORMAL)

    def log_joint(place):
        p = torch.distributions.Poisson((place @ X.T).exp()).log_prob(y).sum(1)
        return p + NORMAL.log_prob(place).sum(1)

    axes = [torch.linspace(-2, 2, 101)] * 3  # sds of about 0.2: the sum is exact
    check_posterior(model, (X, y), on_grid(log_joint, axes), lambda found: found["weight"])


def test_a_robust_posterior_against_a_grid():
    X, line = design(40)
    X = X[:, :1]
    y = line + torch.distributions.StudentT(3.0).sample((40,))
    priors = {"weight": dist.Normal(0.0, 2.0), "noise": dist.HalfNormal(2.0)}
    model = GeneralizedLinear(1, likelihoods.StudentT(3.0), **priors)

    def log_joint(place):
        w, s = place.T[..., None]
        p = torch.distributions.StudentT(3.0, w * X[:, 0], s).log_prob(y).sum(1)
        pairs = zip(priors.values(), (w, s), strict=True)
        return p + sum(fn.log_prob(value[:, 0]) for fn, value in pairs)

    grid = on_grid(log_joint, (torch.linspace(-2, 3, 501), torch.linspace(0.005, 5, 500)))
    stack = lambda found: torch.stack([found["weight"][:, 0], found["noise"]], -1)  # noqa: E731
    check_posterior(model, (X, y), grid, stack)


def test_symmetric_classes_are_identified_by_their_prior():
    """Their sum is not in the data: its posterior is the prior; the evidence is that of a grid."""
    X, y = classes(20)
    X, y = X[:, :1], y.clamp_max(1)
    model = GeneralizedLinear(1, likelihoods.Categorical(2), weight=dist.Normal(0.0, 1.0))
    guide = FamilyGuide(model, families.full_rank)
    fit(model, guide, (X, y), **QUIET)
    fn = guide.heads["joint"](None)
    both = torch.ones(2)
    assert abs(both @ fn.mean.detach()) < 1e-3
    assert both @ fn.covariance_matrix.detach() @ both == pytest.approx(2.0, rel=1e-3)
    w = torch.linspace(-10, 10, 20_001)  # the difference, N(0, 2) beforehand
    logs = torch.distributions.Bernoulli(logits=w * X).log_prob(y[:, None].double()).sum(0)
    logs = logs + dist.Normal(0.0, 2**0.5).log_prob(w)
    evidence = logs.logsumexp(0).item() + math.log(1e-3)
    found = evaluate(model, guide, X, y, num_samples=4000)
    assert abs(found.log_evidence.item() - evidence) < 5 * found.log_evidence_se.item() < 0.1


MVN = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5)
MODELS = {
    "bernoulli": (likelihoods.Bernoulli(), {"intercept": True, "scale": dist.HalfNormal(1.0)}),
    "poisson": (likelihoods.Poisson(), {"weight": MVN, "scale": 0.3}),
    "negative binomial": (likelihoods.NegativeBinomial(), {"intercept": dist.Normal(0.0, 1.0)}),
    "student": (likelihoods.StudentT(4.0), {"weight": dist.Laplace(0.0, 1.0), "intercept": True}),
    "log normal": (likelihoods.LogNormal(), {"weight": None, "noise": None}),
    "classes": (likelihoods.Categorical(4), {"intercept": True, "scale": dist.HalfNormal(1.0)}),
    "reference": (
        likelihoods.Categorical(4),
        {"intercept": dist.Normal(0.0, 1.0), "weight": MVN, "scale": 0.3, "reference": 2},
    ),
    "horseshoe of classes": (likelihoods.Categorical(4), {"weight": Horseshoe()}),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_many_draws_at_once_are_as_one_by_one(name):
    """And what is drawn is of the kind of the data; it goes through predict and the ArviZ tree."""
    likelihood, told = MODELS[name]
    X, _ = design(12)
    y = torch.arange(12.0) % 4 + (name == "log normal")
    y = y.clamp_max(1) if name == "bernoulli" else y
    model = GeneralizedLinear(3, likelihood, **told)
    guide = FamilyGuide(model, families.mean_scale).setup(X, y)
    assert same_one_by_one(model, guide, X, y)
    values = predict(model, guide, X, num_samples=5)["y"]
    assert values.shape == (5, 12)
    inside = {"Bernoulli": values <= 1, "Categorical": values < 4, "LogNormal": values > 0}
    assert inside.get(type(likelihood).__name__, values == values).all()
    if name.startswith(("student", "log")):
        weights = torch.rand(12) + 0.5
        assert same_one_by_one(model, guide, X, y, weights)
    else:
        assert (values == values.round()).all() and (values >= 0).all()
    assert repr(model).startswith(f"GeneralizedLinear({type(likelihood).__name__}(")
    tree = from_pyro_svi(model, guide, X, y, num_samples=5)
    assert tree.log_likelihood["y"].shape == (1, 5, 12)


def test_it_is_saved_copied_simulated_and_trained_on_minibatches():
    """What is loaded has the objective of what was saved; minibatches come near to it."""
    X, y, offset = counts(40, dispersion=0.5)
    told = {"weight": NORMAL, "dispersion": dist.HalfNormal(1.0), "intercept": NORMAL}
    models = [GeneralizedLinear(3, likelihoods.NegativeBinomial(), **told) for _ in range(2)]
    guides = [FamilyGuide(model, families.mean_scale) for model in models]
    assert not list(models[0].parameters())  # the dispersion is a latent
    with warnings.catch_warnings(action="ignore", category=NarrowFamily):
        fit(models[0], guides[0], (X, y), kwargs={"offset": offset}, **QUIET)
    sides = {"offset": offset}
    value = objective(models[0], guides[0], X, y, kwargs=sides)
    for made, saved in zip((models[1], guides[1]), (models[0], guides[0]), strict=True):
        made.load_state_dict(saved.state_dict())
    assert objective(models[1], guides[1], X, y, kwargs=sides) == value
    assert objective(*copy.deepcopy((models[0], guides[0])), X, y, kwargs=sides) == value
    (_, drawn), latents = simulate(models[0], X, y, seed=0)
    assert drawn.shape == y.shape and set(latents) == {"weight", "intercept", "dispersion"}
    guide = FamilyGuide(models[0], families.mean_scale)
    told = {"batch_size": 10, "num_epochs": 300, "learning_rate": 0.02}
    fit(models[0], guide, (X, y), kwargs=sides, **told, **QUIET)
    assert value - 0.3 < objective(models[0], guide, X, y, kwargs=sides) < value + 0.05


def test_priors_in_the_units_of_the_data():
    """Columns in other units have the same posterior in theirs: the same objective, to 1e-6."""
    X, y = binary(50)
    sizes = torch.tensor([1.0, 100.0, 0.01])
    values = []
    for columns in (X, X * sizes):
        for kind in (dist.Laplace, dist.Normal):
            told = {"weight": kind(0.0, 1.0), "intercept": dist.Normal(0.0, 1.0)}
            model = GeneralizedLinear.of(columns, y, likelihoods.Bernoulli(), scale="data", **told)
            units = 1 / columns.std(0, correction=0)
            assert torch.allclose(model.weight_prior.scale, units, rtol=1e-12)
        values.append(point(model, columns, y)["weight"])
    assert same(values[0], values[1] * sizes.numpy())
    robust = GeneralizedLinear.of(X, 3.0 * y, likelihoods.StudentT(4.0), scale="data")
    sd = 3.0 * y.square().mean().sqrt()
    assert torch.allclose(robust.number_prior.scale, 10.0 * sd)


X4, Y4 = torch.ones(4, 2) * torch.arange(4.0)[:, None], torch.zeros(4)
BIT, COUNT, KIND = likelihoods.Bernoulli(), likelihoods.Poisson(), likelihoods.Categorical(3)
BAD = [
    (lambda: GeneralizedLinear(2, "a"), "likelihood: expected one of ppvae.likelihoods"),
    (lambda: GeneralizedLinear(2, likelihoods.Beta()), "likelihood: .* learns nothing"),
    (lambda: GeneralizedLinear(2, likelihoods.Ordinal(3)), "likelihood: .* learns nothing"),
    (
        lambda: GeneralizedLinear(2, likelihoods.StudentT(per_datum=True)),
        "likelihood: expected one that takes one number per datum",
    ),
    (lambda: GeneralizedLinear(2, likelihoods.StudentT(scale=2.0)), "likelihood: .* noise, got"),
    (
        lambda: GeneralizedLinear(2, likelihoods.NegativeBinomial(2.0)),
        "likelihood: expected a dispersion of 1: the model's is its argument dispersion",
    ),
    (
        lambda: GeneralizedLinear(2, likelihoods.Bernoulli.of(torch.ones(2, 1))),
        "likelihood: expected one without a start",
    ),
    (
        lambda: GeneralizedLinear(2, BIT, weight=ConjugateNormal(0.0, 1.0)),
        "weight: expected a prior without the noise",
    ),
    (lambda: GeneralizedLinear(2, BIT, noise=1.0), r"noise: expected none for Bernoulli\(\)"),
    (lambda: GeneralizedLinear(2, COUNT, dispersion=1.0), "dispersion: expected none for Poisson"),
    (lambda: GeneralizedLinear(2, BIT, reference=0), "reference: expected none without classes"),
    (lambda: GeneralizedLinear(2, KIND, reference=3), "reference: expected a class below 3, got 3"),
    (lambda: GeneralizedLinear(2, KIND, weight=None), "weight: .* classes, or a reference"),
    (lambda: GeneralizedLinear(2, BIT)(X4, Y4, Y4 + 1), r"weights: expected none for Bernoulli"),
    (lambda: GeneralizedLinear(2, KIND)(X4, Y4, offset=Y4), "offset: expected none for classes"),
    (lambda: GeneralizedLinear(3, BIT)(X4), r"X: expected shape \(rows, 3\), got \(4, 2\)"),
    (
        lambda: GeneralizedLinear(2, BIT, intercept=True).check_data(X4, Y4),
        "y: expected 2 different values at least, got 1 and flat priors",
    ),
    (
        lambda: GeneralizedLinear(2, COUNT, weight=None).check_data(X4, Y4),
        "weight: expected a proper prior where X has rank 1 and 2 columns",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


def test_flat_priors_of_data_that_are_told_apart_are_refused():
    """Complete and quasi-complete separation, and counts whose zeros can be told from the rest."""
    one = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    bits, zero = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([[-1.0], [0.0], [0.0], [2.0]])
    classes = torch.tensor([0.0, 1.0, 2.0, 1.0])
    both = torch.cat([one, one**2], 1)
    flat = dict(weight=None, intercept=True)
    for X, y, likelihood, more in (
        (one, bits, likelihoods.Bernoulli(), {}),
        (zero, torch.tensor([0.0, 0.0, 1.0, 1.0]), likelihoods.Bernoulli(), {}),
        (both, classes, likelihoods.Categorical(3), {"reference": 0}),
        (one.clamp(max=1.0), torch.tensor([0.0, 0.0, 3.0, 2.0]), likelihoods.Poisson(), {}),
    ):
        model = GeneralizedLinear(X.shape[1], likelihood, **flat, **more)
        with pytest.raises(ValueError, match="^weight: expected a proper prior, as these data"):
            model.check_data(X, y)
        GeneralizedLinear(X.shape[1], likelihood, intercept=True, **more).check_data(X, y)
    model = GeneralizedLinear(1, likelihoods.Bernoulli(), **flat)
    model.check_data(one, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    # a row that tells them apart by an error, and does not count
    mixed = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="^weight: "):
        model.check_data(one, mixed[0], counts=mixed[1])
    model = GeneralizedLinear(1, likelihoods.Poisson(), **flat)
    model.check_data(one, torch.tensor([1.0, 0.0, 0.0, 3.0]))
