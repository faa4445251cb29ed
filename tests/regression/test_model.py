"""The regression twin: the program, and every family's fit against its closed-form optimum."""

import copy
import functools
import math
import warnings
from itertools import product

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import LONG
from linear import Regression, diabetes, same_one_by_one
from pyro import poutine
from sklearn.linear_model import Lasso

from ppvae import (
    FamilyGuide,
    NarrowFamily,
    closed_form,
    evaluate,
    families,
    fit,
    from_pyro_svi,
    predict,
    resample,
)
from ppvae._scopes import private_modules
from ppvae.objectives import ELBO
from ppvae.programs.tracing import draws_plate, trace_pair
from ppvae.regression import (
    ConjugateNormal,
    Horseshoe,
    LinearRegression,
    exact_posterior,
    g_prior,
    objective,
    plots,
    predictive_scores,
)


class Known(Regression):
    """Known noise 0.7 and weights N(0, 0.25 I): every optimum is known."""

    def __init__(self, name, rows=442):
        columns, units = {
            "diabetes": (10, 1.0),
            "unequal columns": (10, torch.logspace(-1, 1, 10)),
            "few columns": (4, torch.logspace(-1, 1, 4)),
            "badly scaled": (4, torch.logspace(-3, 3, 4)),  # X'X: of condition 1e12 from these
        }[name]
        super().__init__(rows, columns, units)
        self.X, self.y = self.args

    def optimum(self, family):
        return closed_form.regression(self.X, self.y, 0.7, 0.5, families.LADDER[family])


POINTS = ("deterministic", "zero")
FAMILIES = ["noise_only", "mean_only", "shared_scale", "mean_scale", "full_rank"]
SETS = ["badly scaled", "unequal columns", "diabetes"]  # each of some families; at length of all
REACHED = [*product(SETS, FAMILIES)] if LONG else [*zip(SETS * 2, FAMILIES, strict=False)]


@pytest.mark.filterwarnings("ignore::ppvae.NarrowFamily")
@pytest.mark.parametrize(("name", "family"), REACHED)
def test_fit_reaches_the_closed_form_optimum(name, family):
    """Moment-matched draws make the objective exact; what is left is the optimizer's tolerance."""
    known = Known(name)
    best = known.optimum(family)
    guide = FamilyGuide(known.model, families.LADDER[family])
    # the objective's own rounding is about 1e-13 of its largest term
    expected = pytest.approx(best.objective.item(), abs=1e-6 + 1e-11 * abs(best.objective.item()))
    if family != "noise_only":  # which has nothing to fit
        result = fit(known.model, guide, (known.X, known.y), num_epochs=1000, progress=False)
        assert -result.losses[-1] * len(known.y) == expected
        fn = guide.heads["weight"](None)
        sds = best.covariance.diagonal().sqrt()
        narrowest = float(known.optimum("full_rank").covariance.diagonal().min()) ** 0.5
        assert torch.allclose(fn.mean, best.mean, atol=1e-4 * narrowest)
        assert torch.allclose(fn.stddev.expand(len(sds)), sds, rtol=1e-4)
    assert objective(known.model, guide, known.X, known.y) == expected


def test_a_point_is_ridge_lasso_or_least_squares():
    X, y = map(torch.as_tensor, diabetes(200, 6))
    lasso = Lasso(0.49 / 0.05 / len(X), fit_intercept=False, tol=1e-15, max_iter=10**6).fit(X, y)
    gram = X.T @ X
    expected = {
        dist.Normal(0.0, 0.5): torch.linalg.solve(gram + 1.96 * torch.eye(6), X.T @ y),
        dist.Laplace(0.0, 0.05): torch.as_tensor(lasso.coef_),
        None: torch.linalg.solve(gram, X.T @ y),
    }
    for prior, weight in expected.items():
        model = LinearRegression(6, weight=prior, noise=0.7)
        guide = FamilyGuide(model, families.deterministic)
        assert fit(model, guide, (X, y), num_epochs=500, progress=False).converged
        found = guide.heads["weight"](None).v.detach()
        assert (found - weight).abs().max() < 1e-7, prior
        if prior is not None and isinstance(prior, dist.Laplace):
            assert torch.equal(found.abs() < 1e-9, weight == 0) and (weight == 0).any()


def test_unknown_noise_comes_within_the_error_of_the_draws():
    """The best Gaussian in log noise loses little to the exact posterior, and cannot beat it."""
    X, y = map(torch.as_tensor, diabetes())
    prior = {"weight": dist.Normal(0.0, 0.5), "noise": dist.HalfNormal(1.0)}
    model = LinearRegression(10, **prior)
    exact = exact_posterior(X, y, **prior)
    guide = FamilyGuide(model, families.full_rank)
    fit(model, guide, (X, y), num_epochs=500, progress=False)
    value = objective(model, guide, X, y, num_samples=4000, seed=1)
    assert exact.log_evidence - 0.05 < value < exact.log_evidence + 0.01
    tree = from_pyro_svi(model, guide, X, y, num_samples=4000, seed=0)
    weight = tree.posterior["weight"].values[0]
    error = 5 * exact.sd[:-1] / 4000**0.5
    assert (abs(weight.mean(0) - exact.mean[:-1]) < error).all()
    assert tree.posterior["noise"].dims == ("chain", "draw")


PRIORS = {
    "normal": dist.Normal(0.0, 0.5),
    "per column": dist.Normal(torch.zeros(3), torch.tensor([0.1, 1.0, 10.0])).to_event(1),
    "laplace": dist.Laplace(0.0, 0.1),
    "student": dist.StudentT(3.0, 0.0, 0.2),
    "horseshoe": Horseshoe(0.1),
    "flat": None,
}
NOISES = {"known": 0.7, "half normal": dist.HalfNormal(1.0), "flat": None}
LIKELIHOODS = {"normal": dist.Normal, "student": functools.partial(dist.StudentT, 4.0)}


@pytest.mark.parametrize("noise", list(NOISES))
@pytest.mark.parametrize("prior", list(PRIORS))
@pytest.mark.parametrize("likelihood", list(LIKELIHOODS))
def test_many_draws_at_once_are_the_same_as_one_by_one(prior, noise, likelihood):
    """Densities of a run of many draws against a loop over them, and these as they are written."""
    X, y = torch.randn(7, 3), torch.randn(7)
    priors = {"weight": PRIORS[prior], "noise": NOISES[noise]}
    model = LinearRegression(3, **priors, likelihood=LIKELIHOODS[likelihood])
    guide = FamilyGuide(model, families.mean_scale).setup(X, y)
    with private_modules():
        model_trace, _ = trace_pair(model, guide, X, y, draws=draws_plate(model, X, y, draws=4))
        model_trace.compute_log_prob()
        latents = [n for n, node in model_trace.nodes.items() if n in guide.heads]
        for draw in range(4):
            values = {name: model_trace.nodes[name]["value"][draw, 0] for name in latents}
            single = poutine.trace(poutine.condition(model, values)).get_trace(X, y)
            single.compute_log_prob()
            for name in [*latents, "y"]:
                many = model_trace.nodes[name]["log_prob"][draw]
                assert torch.allclose(many.reshape(-1), single.nodes[name]["log_prob"].reshape(-1))
            loc, scale = X @ values["weight"], values.get("noise", torch.tensor(0.7))
            expected = {"y": LIKELIHOODS[likelihood](loc, scale).log_prob(y)}
            for name, fn in priors.items():
                if isinstance(fn, torch.distributions.Distribution):
                    expected[name] = fn.log_prob(values[name])
            for name, log_prob in expected.items():
                assert torch.allclose(single.nodes[name]["log_prob_sum"], log_prob.sum())


def test_an_objective_in_single_precision(single):
    """As all is by default: the model's own numbers in double precision, of data as they are."""
    X, y = torch.randn(30, 3), torch.randn(30)
    for model in (LinearRegression(3), LinearRegression(3, noise=1.0, scale=0.1, intercept=True)):
        guide = FamilyGuide(model, families.full_rank)
        found = fit(model, guide, (X, y), progress=False)
        value = objective(model, guide, X, y)
        assert abs(value + 30 * found.losses[-1]) < 5 * value.error + 1e-3


@pytest.mark.filterwarnings("ignore::ppvae.NarrowFamily")
def test_single_precision_data():
    X, y = (torch.as_tensor(a).float() for a in diabetes())
    model = LinearRegression(10, weight=dist.Normal(0.0, 0.5), noise=0.7)
    guide = FamilyGuide(model, families.mean_scale)
    fit(model, guide, (X, y), num_epochs=200, progress=False)
    assert guide.heads["weight"](None).loc.dtype == torch.float32
    assert objective(model, guide, X, y) == pytest.approx(-494.2852, abs=0.01)


def test_predictive_scores_of_a_point_and_of_a_gaussian():
    X, y = torch.randn(50, 3), torch.randn(50)
    w = torch.tensor([0.3, -0.2, 0.1])
    point = predictive_scores(X, y, w[None], 0.7)
    log_p = dist.Normal(X @ w, 0.7).log_prob(y)
    assert point.rmse == pytest.approx((y - X @ w).square().mean().sqrt().item())
    assert point.log_density == pytest.approx(log_p.mean().item())
    inside = ((y - X @ w).abs() < 1.6448536 * 0.7).double().mean().item()
    assert point.coverage == pytest.approx(inside)
    # a Gaussian posterior predicts N(x w, s^2 + x'Sx); 20,000 draws, 5 standard errors
    draws = w + 0.4 * torch.randn(20_000, 3)
    many = predictive_scores(X, y, draws, np.full(20_000, 0.7))
    wide = dist.Normal(X @ w, (0.49 + 0.16 * X.square().sum(-1)).sqrt()).log_prob(y)
    density = dist.Normal(draws @ X.T, 0.7).log_prob(y).exp()
    error = (density.std(0) / density.mean(0) / 20_000**0.5).mean().item()
    assert many.log_density == pytest.approx(wide.mean().item(), abs=5 * error)


def test_pictures_hold_what_they_were_given():
    rows = {"a": (np.zeros(7), -np.ones(7), np.ones(7)), "b": (np.ones(7), np.zeros(7), np.ones(7))}
    panels = plots.forest(rows, list("tuvwxyz")).axes
    assert [panel.get_title() for panel in panels[:7]] == list("tuvwxyz")
    assert np.array_equal(panels[3].lines[2].get_xydata(), [[0, 1], [1, 0]])  # the first on top
    assert np.array_equal(panels[3].collections[0].get_segments()[0], [[-1, 1], [1, 1]])
    assert panels[6].axison and not panels[7].axison and panels[0].get_xlim() == (-1.45, 1.45)
    assert not any(line.get_xydata().size for line in panels[0].lines[:2])  # nothing is cut
    rows["a"] = (np.zeros(7), -np.full(7, 2.0), np.ones(7))
    left, right = plots.forest(rows, list("tuvwxyz")).axes[0].lines[:2]
    assert [*left.get_xydata()[0]] == [-1.45, 1] and left.get_marker() == "<"
    assert not right.get_xydata().size
    k, weights = np.logspace(0, 2, 5), np.eye(5)[:, :2]
    figure = plots.paths((k, weights), (k, 2 * weights), -k, (2.0, -2.0), ["x", "y"])
    panels = {panel.get_title(): panel for panel in figure.axes}
    ridge, lasso, evidence = (panels[title] for title in ("ridge", "lasso", ""))
    assert np.array_equal(ridge.lines[1].get_ydata(), weights[:, 1])
    assert np.array_equal(lasso.lines[1].get_ydata(), 2 * weights[:, 1])
    assert [line.get_label() for line in ridge.lines[:2]] == ["x", "y"]
    assert np.array_equal(evidence.lines[0].get_ydata(), -k)
    low, high = np.quantile(-k, [0.25, 1.0])
    assert np.allclose(evidence.get_ylim(), (low, high + 0.08 * (high - low)))
    middle, low, high = curve = plots.band(np.array([[0.0], [2.0]]), 0.5)
    assert np.allclose(middle, [0, 2]) and np.allclose(high - middle, 1.6448536 * 0.5, atol=1e-7)
    assert np.allclose(low, 2 * middle - high)
    figure = plots.bands([1, 2], {"a": curve, "b": curve}, (k, k), "x [m]", target="y [s]")
    assert figure.get_supxlabel() == "x [m]" and figure.get_supylabel() == "y [s]"
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["a", "b"]
    assert panels[0].get_ylim() == (2, 200)
    mean, covariance = np.array([1.0, 2.0]), np.array([[4.0, 1.0], [1.0, 1.0]])
    (axes,) = plots.overconfidence({"a": (mean, covariance)}, ("x", "y")).axes
    away = axes.lines[0].get_xydata() - mean
    # a 90 % region of two dims reaches sqrt(-2 log 0.1) sds
    distance = np.einsum("ki,ij,kj->k", away, np.linalg.inv(covariance), away)
    assert np.allclose(distance, -2 * np.log(0.1)) and np.allclose(away[:-1].mean(0), 0)


MVN = dist.MultivariateNormal(torch.zeros(3), torch.tensor([2.0, 1.0, 3.0]).diag() + 0.5)
UNIT = dist.Normal(0.0, 1.0)


CONJUGATE = [("columns", None), ("covariance", 0.5), ("g", None)]
CONJUGATE += [("columns", 0.5), ("covariance", None), ("g", 0.5)] * LONG


@pytest.mark.filterwarnings("ignore:prior and data disagree")
@pytest.mark.parametrize(("kind", "scale"), CONJUGATE)
def test_a_conjugate_prior_is_that_of_the_exact_posterior(kind, scale):
    """Evidence with a known noise to 1e-6 nats, of an unknown one to five standard errors."""
    X, y, weights, offset = rows()
    prior = {
        "columns": ConjugateNormal(1.0, [1.0, 2.0, 3.0]),
        "covariance": ConjugateNormal(covariance=MVN.covariance_matrix),
        "g": g_prior(X),
    }[kind]
    told, sides = {"weight": prior, "scale": scale}, {"weights": weights, "offset": offset}
    for noise in (0.8, dist.HalfNormal(2.0)):
        exact = exact_posterior(X, y, **sides, **told, noise=noise).log_evidence
        model = LinearRegression(3, **told, noise=noise)
        guide = FamilyGuide(model, families.full_rank)
        with warnings.catch_warnings(action="ignore", category=NarrowFamily):
            fit(model, guide, (X, y), kwargs=sides, progress=False)
        value = objective(model, guide, X, y, kwargs=sides)
        if noise == 0.8:
            assert value == pytest.approx(exact, abs=1e-6)
            continue
        assert value < exact + 5 * value.error + 1e-6
        found = evaluate(model, guide, X, y, num_samples=4000, kwargs=sides)
        assert abs(found.log_evidence.item() - exact) < 5 * found.log_evidence_se.item() < 0.2
        assert same_one_by_one(model, guide, X, y, weights, offset)


@pytest.mark.filterwarnings("ignore:prior and data disagree")
def test_both_sides_mean_the_same_by_all_arguments():
    """Model and exact posterior, of the same words: the evidence, to 1e-6 nats."""
    X, y, weights, offset = rows()
    sides = {"weights": weights, "offset": offset}
    prior = dist.Normal(torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
    for told in (
        {"weight": MVN, "noise": 0.8, "scale": 0.5, "intercept": dist.Normal(1.0, 2.0)},
        {"weight": prior, "noise": 0.8, "scale": "data"},
        {"noise": 0.8},
        {"weight": ConjugateNormal(0.0, 2.0), "noise": 0.8, "scale": "data"},
    ):
        exact = exact_posterior(X, y, **sides, **told)
        model = LinearRegression.of(X, y, **told)
        if told.get("scale") == "data":  # in units of y, and not of y less its offset
            written = told | {"weight": model.weight_prior, "scale": None}
            exact = exact_posterior(X, y, **sides, **written)
        guide = FamilyGuide(model, families.full_rank)
        fit(model, guide, (X, y), kwargs=sides, progress=False)
        value = objective(model, guide, X, y, kwargs=sides)
        assert value == pytest.approx(exact.log_evidence, abs=1e-6), told
        without = (
            exact_posterior(X, y, **told),
            exact_posterior(
                X,
                y,
                weight=model.weight_prior,
                noise=0.8,
                scale=model.scale_prior,
                intercept=told.get("intercept", False),
            ),
        )
        assert np.allclose(*(each.mean for each in without), rtol=1e-8)


def rows(number=30, columns=3):
    """Data with weights and offsets of the rows; columns in units of their own."""
    X = torch.randn(number, columns) * torch.logspace(-1, 1, columns) + 2.0
    weights, offset = torch.rand(number) + 0.5, torch.randn(number)
    return X, X.sum(1) + offset + 0.8 * torch.randn(number) / weights.sqrt(), weights, offset


def test_all_arguments_at_once_against_the_evidence_written_out():
    """Noise known: y is one Normal, and the optimum of full_rank is its density, to 1e-6 nats."""
    X, y, weights, offset = data = rows()
    wide = torch.randn(3, 3)
    covariance = wide @ wide.T + torch.eye(3)
    prior = dist.MultivariateNormal(torch.ones(3), covariance)
    model = LinearRegression(3, weight=prior, noise=0.8, scale=0.7, intercept=dist.Normal(1.0, 3.0))
    design = torch.cat([torch.ones(30, 1), X], 1)
    of_all = torch.block_diag(torch.tensor([[9.0]]), 0.49 * covariance)
    spread = design @ of_all @ design.T + torch.diag(0.64 / weights)
    known = torch.distributions.MultivariateNormal(design.sum(1) + offset, spread).log_prob(y)
    guide = FamilyGuide(model, families.full_rank)
    assert fit(model, guide, data, progress=False).converged
    keywords = {"weights": weights, "offset": offset}
    value = objective(model, guide, X, y, kwargs=keywords)
    assert value == pytest.approx(known.item(), abs=1e-6) and value.error < 1e-6
    fit(model, guide, (X, y), kwargs=keywords, progress=False)
    assert objective(model, guide, X, y, kwargs=keywords) == pytest.approx(known.item(), abs=1e-6)
    drawn = predict(model, guide, X, num_samples=3, kwargs=keywords)
    assert drawn["y"].shape == (3, 30)


def test_weights_of_rows_are_rows_divided_by_their_noise():
    """As is a noise for each row; the evidence differs by the log of what y is divided by."""
    X, y, weights, offset = rows()
    sds = 0.8 / weights.sqrt()
    exact = exact_posterior(X / sds[:, None], (y - offset) / sds, noise=1.0)
    known = exact.log_evidence - sds.log().sum().item()
    for noise, given in ((0.8, {"weights": weights}), (sds, {}), (sds.tolist(), {})):
        model = LinearRegression(3, noise=noise)
        guide = FamilyGuide(model, families.full_rank)
        keywords = given | {"offset": offset}
        fit(model, guide, (X, y), kwargs=keywords, progress=False)
        value = objective(model, guide, X, y, kwargs=keywords)
        assert value == pytest.approx(known, abs=1e-6)
        found = guide.heads["weight"](None)
        assert np.allclose(found.mean.detach(), exact.mean, atol=1e-5 * exact.sd.min())
        assert np.allclose(found.covariance_matrix.detach(), exact.covariance, rtol=1e-4, atol=1e-9)


def test_minibatches_take_the_weights_and_offsets_of_their_rows():
    """Within 0.1 nats of the evidence after 300 epochs of stochastic gradients."""
    X, y, weights, offset = rows()
    y, X = y - X.sum(1), (X - X.mean(0)) / X.std(0)
    model = LinearRegression(3, noise=0.8)
    guide = FamilyGuide(model, families.full_rank)
    told = {"batch_size": 10, "num_epochs": 300, "learning_rate": 0.03, "seed": 0}
    slower = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.987)
    with warnings.catch_warnings(action="ignore"):
        fit(model, guide, (X, y, weights, offset), **told, scheduler=slower, progress=False)
    sds = 0.8 / weights.sqrt()
    exact = exact_posterior(X / sds[:, None], (y - offset) / sds, noise=1.0)
    value = objective(model, guide, X, y, kwargs={"weights": weights, "offset": offset})
    assert -0.1 < value - (exact.log_evidence - sds.log().sum().item()) < 1e-6


def test_priors_in_the_units_of_the_data_are_those_of_standardized_data():
    """The posteriors of both, of weights and noise, in the same units, to 1e-8 of an sd."""
    X, y, *_ = (value.numpy() for value in rows())
    for intercept in (True, False):
        center = float(intercept)
        away, error = X - center * X.mean(0), y - center * y.mean()
        sds, sd = np.sqrt((away**2).mean(0)), np.sqrt((error**2).mean())
        model = LinearRegression.of(X, y, scale="data", intercept=intercept)
        told = {"weight": model.weight_prior, "noise": model.noise_prior, "intercept": intercept}
        ours, theirs = (
            exact_posterior(X, y, **told),
            exact_posterior(away / sds, error / sd, intercept=intercept),
        )
        units = np.append(sd / sds, sd)
        first = int(intercept)
        assert np.allclose(ours.sd[first:], theirs.sd[first:] * units, rtol=1e-8)
        assert np.allclose(
            ours.mean[first:], theirs.mean[first:] * units, atol=1e-8 * ours.sd.min()
        )
    gamma = LinearRegression.of(X, y, scale="data", noise=dist.Gamma(2.0, 3.0)).noise_prior
    error = np.sqrt((y**2).mean())
    same = dist.Gamma(2.0, 3.0 / error).log_prob(torch.tensor(0.7))
    assert torch.allclose(gamma.log_prob(torch.tensor(0.7, dtype=torch.float64)), same)
    assert gamma.support.lower_bound == 0.0
    wide = dist.MultivariateNormal(torch.ones(3), torch.eye(3))
    made = LinearRegression.of(X, y, scale="data", weight=wide, noise=0.5)
    units = error / np.sqrt((X**2).mean(0))
    assert np.allclose(made.weight_prior.covariance_matrix, np.diag(units**2))
    assert np.allclose(made.weight_prior.loc, units) and made.noise_prior == 0.5


def test_an_unknown_scale_and_an_intercept_against_the_exact_evidence():
    """The guide's importance weights find it, to five of their standard errors."""
    X, y = map(torch.as_tensor, diabetes(60, 3))
    priors = {"weight": dist.Normal(0.0, 1.0), "scale": dist.HalfNormal(0.5)}
    exact = exact_posterior(X, y, **priors, noise=dist.HalfNormal(1.0))
    model = LinearRegression(3, **priors, noise=dist.HalfNormal(1.0))
    guide = FamilyGuide(model, families.full_rank)
    fit(model, guide, (X, y), progress=False)
    value = objective(model, guide, X, y)
    assert exact.log_evidence - 0.2 < value < exact.log_evidence + 5 * value.error
    found = evaluate(model, guide, X, y, num_samples=4000)
    away = found.log_evidence.item() - exact.log_evidence
    assert abs(away) < 5 * found.log_evidence_se.item() < 0.1
    one_by_one = evaluate(model, guide, X, y, num_samples=50, vectorized=False)
    assert abs(one_by_one.log_evidence.item() - exact.log_evidence) < 0.5


def test_positive_weights_against_a_grid():
    """A half-normal prior, which no Gaussian answers: evidence and mean by integration."""
    X, y = torch.randn(40, 1), torch.randn(40)
    y = y + 0.4 * X[:, 0]
    model = LinearRegression(1, weight=dist.HalfNormal(0.3), noise=1.0)
    guide = FamilyGuide(model, families.full_rank)
    with pytest.warns(NarrowFamily):
        fit(model, guide, (X, y), progress=False)
    w = torch.linspace(0, 2, 20_001)
    log_joint = dist.Normal(X * w, 1.0).log_prob(y[:, None]).sum(0)
    log_joint = log_joint + dist.HalfNormal(0.3).log_prob(w)
    evidence = (torch.logsumexp(log_joint, 0) + math.log(1e-4)).item()
    mean = torch.softmax(log_joint, 0) @ w
    sd = (torch.softmax(log_joint, 0) @ (w - mean).square()).sqrt()
    found = resample(model, guide, X, y, num_samples=1000, progress=False)
    drawn = found.latents["weight"]
    assert drawn.min() > 0 and abs(drawn.mean() - mean) < 5 * sd / 1000**0.5
    assert abs(found.gain.log_evidence.item() - evidence) < 0.03  # the best of 64 has a gap
    value = objective(model, guide, X, y)
    assert evidence - 0.2 < value < evidence + 5 * value.error


def test_sparse_weights_against_a_grid():
    """A Laplace prior, two correlated columns."""
    X = torch.randn(30, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.7]])
    y = 0.5 * X[:, 0] + torch.randn(30)
    model = LinearRegression(2, weight=dist.Laplace(0.0, 0.2), noise=1.0)
    guide = FamilyGuide(model, families.full_rank)
    fit(model, guide, (X, y), progress=False)
    axis = torch.linspace(-2, 3, 501)
    w = torch.cartesian_prod(axis, axis)
    log_joint = dist.Normal(w @ X.T, 1.0).log_prob(y).sum(1)
    log_joint = log_joint + dist.Laplace(0.0, 0.2).log_prob(w).sum(1)
    evidence = (torch.logsumexp(log_joint, 0) + 2 * math.log(0.01)).item()
    chances = torch.softmax(log_joint, 0)
    mean = chances @ w
    sd = (chances @ (w - mean).square()).sqrt()
    found = evaluate(model, guide, X, y, num_samples=4000)
    assert abs(found.log_evidence.item() - evidence) < 5 * found.log_evidence_se.item() < 0.1
    drawn = resample(model, guide, X, y, num_samples=1000, progress=False).latents["weight"]
    assert ((drawn.mean(0) - mean).abs() < 5 * sd / 1000**0.5).all()


WIDER = {
    "correlated": {"weight": MVN, "scale": dist.HalfNormal(1.0)},
    "normal": {"scale": dist.HalfNormal(1.0), "intercept": True},
    "laplace": {"weight": dist.Laplace(torch.zeros(3), 1.0), "scale": 2.0, "intercept": UNIT},
    "student": {"weight": dist.StudentT(3.0), "scale": dist.HalfCauchy(1.0)},
    "positive": {"weight": dist.HalfNormal(1.0), "scale": dist.HalfCauchy(1.0), "noise": 0.5},
    "horseshoe": {"weight": Horseshoe(), "intercept": True, "noise": torch.full((30,), 0.5)},
}


@pytest.mark.parametrize("name", list(WIDER))
def test_all_arguments_in_many_draws_are_as_one_by_one(name):
    data = rows()
    model = LinearRegression(3, **WIDER[name])
    guide = FamilyGuide(model, families.mean_scale).setup(*data)
    assert same_one_by_one(model, guide, *data) and same_one_by_one(model, guide, *data[:2])


def test_an_objective_is_that_of_draws_that_no_fit_has_seen():
    """Few draws are fitted (32 here); the error holds against many more, of other seeds."""
    X, y = map(torch.as_tensor, diabetes(60, 4))
    model = LinearRegression(4, likelihood=functools.partial(dist.StudentT, 4.0))
    guide = FamilyGuide(model, families.full_rank)
    fit(model, guide, (X, y), seed=0, progress=False)
    value, other = objective(model, guide, X, y), objective(model, guide, X, y, seed=1)
    many = objective(model, guide, X, y, num_samples=200_000, seed=2)
    assert 0 < many.error < value.error < 0.02
    for each in (value, other):
        assert abs(each - many) < 5 * math.hypot(each.error, many.error)
    assert objective(model, guide, X, y) == value and copy.deepcopy(value).error == value.error
    assert f"{value:.2f}" == f"{float(value):.2f}" and repr(value) == f"{value.error:.2g}".join(
        [f"{float(value)!r} +- ", ""]
    )


X3, Y3, TORCH = np.zeros((4, 3)), np.zeros(4), torch.distributions
X4, Y4 = torch.zeros(4, 3), torch.zeros(4)
WIDE, ZERO = dist.Normal(torch.zeros(3), 1.0), dist.Normal(0.0, 0.0, validate_args=False)
MATRIX = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
GAMMA, NAN = dist.Gamma(1.0, 1.0), torch.tensor([1.0, -2.0, 1.0, 1.0])
BAD = [
    (lambda: LinearRegression(0), "columns: expected a whole number of at least 1, got 0"),
    (lambda: LinearRegression(2.5), "columns: expected a whole number of at least 1, got 2.5"),
    (lambda: LinearRegression(2, noise=-1.0), "noise: expected a finite positive number, got -1.0"),
    (lambda: Horseshoe(0.0), "scale: expected a finite positive number, got 0.0"),
    (lambda: LinearRegression(2, weight="a"), "weight: .* a Horseshoe or None, got str"),
    (lambda: LinearRegression(2, weight=WIDE), r"weight: .* \(\) or \(2,\), got \(3,\)"),
    (lambda: LinearRegression(3, weight=MATRIX), r"weight: .* shape \(3,\), got \(2,\)"),
    (lambda: LinearRegression(2, weight=ZERO), "weight: .* finite scale"),
    (lambda: LinearRegression(2)(torch.zeros(4, 3)), r"X: .* \(rows, 2\), got \(4, 3\)"),
    (lambda: LinearRegression(3)(torch.zeros(4, 3), torch.zeros(5)), r"y: .*\(4,\), .* got \(5,\)"),
    (lambda: predictive_scores(X3, Y3, np.zeros((1, 2)), 1.0), r"weight: .* got \(1, 2\)"),
    (lambda: predictive_scores(X3, Y3, np.zeros((1, 3)), 1.0, level=1.0), "level: .* got 1.0"),
    (lambda: predictive_scores(X3, Y3, np.zeros((1, 3)), 1.0, level="a"), "level: .* got 'a'"),
    (lambda: predictive_scores(X3, Y3[:, None], np.zeros((1, 3)), 1.0), r"y: .* got \(4, 1\)"),
    (lambda: predictive_scores(X3, Y3, np.zeros((0, 3)), 1.0), "weight: .* got none"),
    (lambda: predictive_scores(X3, Y3, np.zeros((2, 3)), np.ones(4)), r"noise: .* got \(4,\)"),
    (lambda: predictive_scores(X3, Y3, np.zeros((1, 3)), 0.0), "noise: .* positive .* got 0.0"),
    (lambda: predictive_scores(X3, Y3, np.zeros((1, 3)), math.nan), "noise: .* finite"),
    (lambda: plots.band(np.zeros((4, 2)), 1.0, level=1.5), "level: .* got 1.5"),
    (lambda: LinearRegression(2, likelihood=3), "likelihood: .* got 3"),
    (lambda: LinearRegression(2, weight=dist.Poisson(1.0)), "weight: expected a continuous prior"),
    (lambda: LinearRegression(2, noise=TORCH.HalfNormal(1.0)), "noise: .* pyro.distributions"),
    (lambda: LinearRegression(2, weight=TORCH.Normal(0.0, 1.0)), "weight: .* pyro.distributions"),
    (lambda: LinearRegression(2, scale="data"), r"scale: .* LinearRegression.of\(X, y, ...\)"),
    (lambda: LinearRegression(2, scale=-1.0), "scale: expected a finite positive number, got -1.0"),
    (lambda: LinearRegression(2, weight=None, scale=2.0), "scale: expected None with weight=None"),
    (lambda: LinearRegression(2, weight=GAMMA, scale=2.0), "scale: expected None for a prior that"),
    (lambda: LinearRegression(2, weight=Horseshoe(), scale=2.0), "scale: .* Horseshoe"),
    (lambda: LinearRegression(2, intercept=GAMMA), "intercept: expected True, False or a Normal"),
    (lambda: LinearRegression(2, intercept=1.0), "intercept: expected True, False or a Normal"),
    (lambda: LinearRegression(2, noise=[1.0, -1.0]), "noise: expected positive numbers, got -1.0"),
    (lambda: LinearRegression(3, noise=[1.0, 2.0])(X4, Y4), "X: expected 2 rows, .* got 4"),
    (lambda: LinearRegression(3)(X4, Y4, Y4[:3]), r"weights: expected shape \(4,\), .* \(3,\)"),
    (lambda: LinearRegression(3)(X4, Y4, offset=1.0), "offset: expected a tensor .* got float"),
    (lambda: LinearRegression(3).check_data(X4, Y4, NAN), "weights: expected positive .* got -2.0"),
    (lambda: LinearRegression.of(X3, Y3, scale="data"), "y: expected values that vary"),
    (lambda: LinearRegression(2, weight=ConjugateNormal(0.0, [1.0] * 3)), r"weight: .* \(3,\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


@pytest.mark.filterwarnings("ignore::ppvae.NarrowFamily")
@pytest.mark.parametrize("family", [n for n in families.LADDER if n not in (*POINTS, *FAMILIES)])
def test_no_objective_lies_above_the_evidence(family):
    """A bound is a bound: also where densities lose digits (tails at their Gaussian end)."""
    known = Known("few columns", rows=60)
    guide = FamilyGuide(known.model, families.LADDER[family])
    told = {"num_epochs": 40, "seed": 0, "progress": False}
    if family == "flow":  # whose draws would be taken one by one, if they were held fixed
        told |= {"objective": ELBO(num_samples=2), "num_epochs": 300, "learning_rate": 0.01}
    fit(known.model, guide, (known.X, known.y), **told)
    value = objective(known.model, guide, known.X, known.y, num_samples=4000, seed=1)
    # log p - log q has a sd of a few nats, or of many far from the optimum, below the evidence
    assert value < known.optimum("full_rank").log_likelihood + 0.3


def test_a_flat_prior_needs_the_rank_of_the_columns():
    X, y = torch.randn(20, 3), torch.randn(20)
    none = X * torch.tensor([1.0, 1.0, 0.0])
    for bad in (X[:2], none, none.float()):
        model = LinearRegression(3, weight=None, noise=0.7)
        guide = FamilyGuide(model, families.full_rank)
        with pytest.raises(ValueError, match="weight: .* rank 2 and 3 columns, got a flat one"):
            fit(model, guide, (bad, y[: len(bad)].to(bad)), progress=False)


def test_a_known_noise_in_any_form_and_the_former_name_of_the_likelihood():
    for noise in (0.7, torch.tensor([0.7], dtype=torch.float32), np.float32(0.7)):
        assert LinearRegression(3, noise=noise).noise_prior == 0.7
    torch.set_default_dtype(torch.float32)
    assert LinearRegression(3, noise=1 / 3).noise_prior == 1 / 3
    torch.set_default_dtype(torch.float64)
    with pytest.warns(DeprecationWarning, match="likelihood"):
        assert LinearRegression(3, errors=dist.Laplace).likelihood is dist.Laplace


def test_a_call_without_columns_is_refused_by_name():
    with pytest.raises(TypeError, match="^X: expected a tensor of real numbers, .* got NoneType"):
        LinearRegression(2)(None)


def test_units_of_the_data_are_those_of_rows_with_weights_and_offsets():
    """The same priors as those of the exact posterior, to the last digits of the evidence."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 2, generator=generator) * torch.tensor([3.0, 0.1])
    y = 5 + X.sum(1) + torch.randn(40, generator=generator)
    sides = {"weights": torch.rand(40, generator=generator) + 0.5, "offset": torch.arange(40.0) / 9}
    priors = dict(
        weight=dist.Normal(0.0, 2.0), noise=1.0, scale="data", intercept=dist.Normal(5, 9)
    )
    model = LinearRegression.of(X, y, **sides, **priors)
    guide = FamilyGuide(model, families.full_rank)
    fit(model, guide, (X, y), kwargs=sides, progress=False)
    exact = exact_posterior(X, y, **sides, **priors)
    value = objective(model, guide, X, y, kwargs=sides)
    assert value == pytest.approx(exact.log_evidence, rel=1e-8)
