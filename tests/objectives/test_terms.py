"""Terms and loss: against Pyro's objectives, closed forms, and themselves on half batches."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, FAMILIES, cases
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from ppvae import VAE, FamilyGuide, families, likelihoods
from ppvae._scopes import private_modules
from ppvae.objectives import negative_elbo, terms, trace_pair
from ppvae.objectives.divergence import closed_kl

FAMILY = pytest.mark.parametrize("family", list(FAMILIES))


@FAMILY
@pytest.mark.parametrize("case", CASES)
def test_terms_sum_to_the_elbo_of_pyro(family, case):
    """Sampled terms with the same seed are Pyro's Trace_ELBO, up to rounding."""
    case = cases()[case]
    guide = FamilyGuide(case.model, FAMILIES[family], case.encoder).setup(*case.args)
    with private_modules(), torch.no_grad():
        torch.manual_seed(3)
        expected = -Trace_ELBO().loss(case.model, guide, *case.args)
        torch.manual_seed(3)
        parts = terms(*trace_pair(case.model, guide, *case.args))
    scale = 1.0 if parts.plate is None else parts.plate.full_size / parts.plate.size
    total = 0.0
    for sign, values in ((1, parts.log_likelihood), (1, parts.log_prior), (-1, parts.log_guide)):
        for name, value in values.items():
            factor = scale if name in parts.local else 1.0
            total += sign * factor * float(value.sum())
    assert total == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "family", ["mean_scale", "full_rank", "low_rank", "student_t", "shared_scale"]
)
def test_closed_kl_is_the_mean_of_the_sampled_one(family):
    """5 standard errors of 200,000 draws; where torch knows the pair, exactly."""
    fn = FAMILIES[family].head(3, torch.Size([4]))(torch.randn(1, 3))
    fn = fn if FAMILIES[family].joint else fn.to_event(1)
    prior = dist.Normal(torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 1.5]))
    exact = closed_kl(fn, prior.to_event(1))
    with torch.no_grad():
        z = fn.sample((200_000,))
        sampled = fn.log_prob(z) - prior.to_event(1).log_prob(z)
    error = 5 * sampled.std() / len(z) ** 0.5
    assert (sampled.mean() - exact).abs() < error
    if family in ("full_rank", "low_rank"):
        twin = dist.MultivariateNormal(prior.loc, scale_tril=torch.diag(prior.scale))
        dense = dist.MultivariateNormal(fn.mean, fn.covariance_matrix)
        assert torch.allclose(exact, torch.distributions.kl_divergence(dense, twin), atol=1e-10)


def test_a_point_has_no_divergence():
    assert closed_kl(dist.Delta(torch.zeros(2), event_dim=1), dist.Normal(0, 1).expand([2])) is None


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_a_point_is_pyros_per_datum_at_every_batch_size(name):
    """Nothing but rows is random, so the mean over halves is the whole, where a model takes these.

    Global latents count once, whatever the batch, and a subsample stands for all the data.
    """
    model, args, encoder, _ = cases()[name]
    guide = FamilyGuide(model, families.deterministic, encoder).setup(*args)
    losses = []
    with private_modules(), torch.no_grad():
        for loss in (negative_elbo, Trace_ELBO().loss):
            torch.manual_seed(0)
            losses.append(float(loss(model, guide, *args)))
        assert losses[0] == pytest.approx(losses[1] / (24 if name == "told rows" else 6), rel=1e-12)
        if name != "own rows":
            parts = ([arg[rows] for arg in args] for rows in (slice(3), slice(3, None)))
            halves = [float(negative_elbo(model, guide, *part, size=6)) for part in parts]
            assert losses[0] == pytest.approx(sum(halves) / 2, rel=1e-12)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_the_log_determinants_of_pyros_autoguides_count(kind, plain_pyro):
    """They stand in the `log_density` of a `Delta` on each constrained site."""

    def model(x):
        w = pyro.sample("w", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w.sum(), s), obs=x)

    x = torch.randn(5)
    guide = kind(model)
    guide(x)
    model_trace, guide_trace = trace_pair(model, guide, x)
    parts = terms(model_trace, guide_trace)
    assert sum(v.sum() for v in parts.log_guide.values()).item() == pytest.approx(
        guide_trace.log_prob_sum().item(), rel=1e-12
    )


def test_a_guide_without_an_encoder_has_parameters_for_each_datum(plain_pyro):
    model = VAE(torch.nn.Linear(2, 3), 2, likelihoods.Normal(1.0))
    x = torch.randn(5, 3)
    guide = FamilyGuide(model, families.mean_scale)
    assert guide(x)["z"].shape == (5, 2)
    assert guide.heads["z"].loc.raw.numel() == 10
