"""A Gaussian mixture: held against scikit-learn's, and against sums written out."""

import copy

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture as Theirs

from ppvae import FamilyGuide, evaluate, fit, from_pyro_svi, simulate, stage
from ppvae._scopes import private_modules
from ppvae.models import GaussianMixture
from ppvae.objectives import ELBO
from ppvae.programs.tracing import draws_plate, trace_pair

K, COLUMNS = 3, 4
QUIET = {"progress": False}
KINDS = ["full", "diag"]


def iris():
    return torch.as_tensor(load_iris().data)


def parameters(theirs):
    """Those of scikit-learn's mixture, as scales and correlations."""
    weights, means, cov = map(
        torch.as_tensor, (theirs.weights_, theirs.means_, theirs.covariances_)
    )
    if theirs.covariance_type == "diag":
        return {"weights": weights, "means": means, "scales": cov.sqrt()}
    scales = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    tril = torch.linalg.cholesky(cov) / scales[..., None]
    return {"weights": weights, "means": means, "scales": scales, "correlations": tril}


def like(theirs):
    model = GaussianMixture(K, COLUMNS, theirs.covariance_type)
    for name, value in parameters(theirs).items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_and_responsibilities_are_those_of_scikit_learn(kind):
    """At the same parameters; there is nothing to draw, so every number is exact."""
    x = iris()
    theirs = Theirs(K, covariance_type=kind, random_state=0).fit(x.numpy())
    model = like(theirs)
    found = evaluate(model, FamilyGuide(model, "mean_scale"), x, num_samples=2, **QUIET)
    assert np.allclose(found.log_likelihood, theirs.score_samples(x.numpy()), atol=1e-6)
    assert np.allclose(found.part_responsibility, theirs.predict_proba(x.numpy()), atol=1e-6)
    assert found.log_evidence.item() == pytest.approx(theirs.score(x.numpy()) * 150, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_ends_where_the_em_algorithm_has_nothing_to_add(kind):
    """EM raises the likelihood from wherever it starts, but at a maximum."""
    x = iris()
    model = GaussianMixture.of(x, K, kind, seed=1)
    guide = FamilyGuide(model, "mean_scale")
    for rate in (0.05, 0.005):
        fit(model, guide, x, num_epochs=200, learning_rate=rate, **QUIET)
    scales, tril = model.scales.detach(), torch.eye(COLUMNS)
    if kind == "full":
        tril = model.correlations.detach()
    tril = scales[..., None] * tril
    precision = torch.linalg.inv(tril @ tril.mT).numpy()
    start = {"weights_init": model.weights.detach(), "means_init": model.means.detach().numpy()}
    start["weights_init"] = (start["weights_init"] / start["weights_init"].sum()).numpy()
    start["precisions_init"] = precision if kind == "full" else (1 / scales**2).numpy()
    theirs = Theirs(K, covariance_type=kind, tol=1e-9, max_iter=500, **start).fit(x.numpy())
    ours = evaluate(model, guide, x, num_samples=2, **QUIET).log_likelihood.mean().item()
    assert theirs.score(x.numpy()) - ours < 1e-3  # nats per datum


PRIORS = {
    "weights": dist.Dirichlet(torch.ones(K)),
    "means": dist.Normal(torch.zeros(K, 2), 3.0),
    "scales": dist.LogNormal(0.0, 0.5),
    "correlations": dist.LKJCholesky(2, 2.0),
}


@pytest.mark.parametrize("names", [("means",), ("weights", "scales"), tuple(PRIORS)])
def test_with_priors_the_density_is_the_sum_written_out_also_of_many_draws_at_once(names):
    x, draws = torch.randn(6, 2), 4
    model = GaussianMixture(K, 2, **{name: PRIORS[name] for name in names})
    guide = FamilyGuide(model, "mean_scale").setup(x)
    with private_modules(), torch.no_grad():
        plate = draws_plate(model, x, draws=draws)
        trace, _ = trace_pair(model, guide, x, draws=plate)
    trace.compute_log_prob()
    assert {n for n in PRIORS if n in trace.nodes and trace.nodes[n]["type"] == "sample"} == {
        *names
    }
    shapes = {"weights": (K,), "means": (K, 2), "scales": (K, 2), "correlations": (K, 2, 2)}
    value = {
        name: trace.nodes[name]["value"].reshape(draws, *shape)
        if name in names
        else getattr(model, name).detach().expand(draws, *shape)
        for name, shape in shapes.items()
    }
    for d in range(draws):
        weights, means, scales, tril = (value[name][d] for name in shapes)
        logs = [
            weights[k].log()
            + dist.MultivariateNormal(means[k], scale_tril=scales[k].diag() @ tril[k]).log_prob(x)
            for k in range(K)
        ]
        found = trace.nodes["x"]["log_prob"].reshape(draws, -1)[d]
        assert torch.allclose(found, torch.logsumexp(torch.stack(logs), 0))
        for name in names:
            log_p = PRIORS[name].log_prob(value[name][d])
            assert torch.allclose(trace.nodes[name]["log_prob"][d].sum(), log_p.sum())


def test_one_component_with_a_prior_has_the_evidence_of_a_normal():
    """x ~ Normal(m, 1) with m ~ Normal(0, 3): log p(x) is that of one multivariate normal."""
    x = torch.randn(12, 2) + 1.0
    model = GaussianMixture(1, 2, "diag", means=dist.Normal(0.0, 3.0))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    guide = FamilyGuide(model, "mean_scale")
    fit(model, guide, x, **QUIET)
    covariance = torch.eye(12) + 9.0
    log_p = dist.MultivariateNormal(torch.zeros(12), covariance).log_prob(x.T).sum().item()
    for vectorized in (True, False):
        found = evaluate(model, guide, x, num_samples=32, vectorized=vectorized, **QUIET)
        assert found.log_evidence.item() == pytest.approx(log_p, abs=1e-3)


def test_what_people_do_with_it():
    """A mixture that is known gives back its own draws, in minibatches and in a graph too."""
    centre = torch.tensor([[-6.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    model = GaussianMixture(K, 2)
    model.means = centre
    (x,), latents = simulate(model, torch.zeros(300, 2), seed=0)
    assert (x - centre[latents["part"]]).norm(dim=1).max() < 5  # sds, of 300 pairs
    with private_modules():
        assert model(size=7).shape == (7, 2)
    state = torch.get_rng_state()
    learned = GaussianMixture.of(x, K)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(learned.means, GaussianMixture.of(x.numpy(), K).means)
    guide = FamilyGuide(learned, "mean_scale")
    fit(learned, guide, x, num_epochs=40, batch_size=100, learning_rate=0.1, seed=0, **QUIET)
    found = evaluate(learned, guide, x, num_samples=2, **QUIET)
    nearest = torch.cdist(learned.means.detach(), centre).argmin(1)
    assert nearest.unique().numel() == K
    told = nearest[found.part_responsibility.values.argmax(1)]
    assert torch.equal(told, latents["part"])
    tree = from_pyro_svi(learned, guide, x, num_samples=5, seed=0)
    assert tree.posterior["part"].shape == (1, 5, 300)
    with private_modules():
        expected = ELBO()(learned, guide, x)
    assert torch.allclose(stage(learned, guide, x)(x), expected, rtol=1e-9)
    other = copy.deepcopy(learned)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other.correlations, learned.correlations)


def _model(**given):
    return lambda: GaussianMixture(**{"components": 3, "columns": 2} | given)


X = torch.randn(6, 2, dtype=torch.float64)
CONSTANT = torch.ones(6, 2)
BAD = [
    (_model(components=0), ValueError, "components: expected a whole number"),
    (_model(columns=True), ValueError, "columns: expected a whole number"),
    (_model(covariance="tied"), ValueError, r"covariance: expected one of \['full', 'diag'\]"),
    (_model(covariance="diag", correlations=1), ValueError, "correlations: expected none for diag"),
    (_model(weights=dist.Dirichlet(torch.ones(4))), ValueError, r"weights: .* event shape \(3,\)"),
    (_model(means=dist.Normal(torch.zeros(2), 1.0)), ValueError, r"means: .* or \(3, 2\)"),
    (_model(means=3.0), TypeError, "means: expected a distribution of pyro.distributions"),
    (_model(scales=dist.Normal(0.0, 1.0)), ValueError, "scales: expected a prior of"),
    (_model(correlations=dist.LKJCholesky(3)), ValueError, r"correlations: .* \(2, 2\)"),
    (lambda: GaussianMixture(3, 2)(torch.zeros(4, 3)), ValueError, r"x: expected shape \(batch, 2"),
    (lambda: GaussianMixture(3, 2)(X.long()), TypeError, "x: expected a tensor of real numbers"),
    (lambda: GaussianMixture.of(X, 7), ValueError, "x: expected .* at least 7 data"),
    (lambda: GaussianMixture.of(X[0], 1), ValueError, r"x: expected shape \(batch, columns\)"),
    (lambda: GaussianMixture.of(X * torch.nan, 2), ValueError, "x: expected finite numbers"),
    (lambda: GaussianMixture.of(CONSTANT, 2), ValueError, "x: expected columns that vary"),
    (lambda: GaussianMixture.of(X * 1e200, 2), ValueError, "x: expected .* of finite sds"),
    (lambda: GaussianMixture.of(X[:2].repeat(3, 1), 3), ValueError, "x: .* 3 different .* got 2"),
    (lambda: GaussianMixture.of("x", 2), TypeError, "x: expected real numbers"),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()
