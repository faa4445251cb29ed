"""Evaluation against the linear-Gaussian model, where every number has a closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import VAE, FamilyGuide, evaluate, families, likelihoods
from ppvae.nn import mlp


class Linear:
    """x = W z + mu + noise: the exact posterior, and log p(x), written out densely."""

    def __init__(self, scale=0.7):
        torch.manual_seed(0)
        self.W, self.mu, self.scale = torch.randn(4, 2), torch.randn(4), scale
        decoder = torch.nn.Linear(2, 4)
        decoder.weight.data, decoder.bias.data = self.W, self.mu
        self.model = VAE(decoder, 2, likelihoods.Normal(scale))
        self.x = self.model(size=20).detach()
        pyro.clear_param_store()
        self.precision = torch.eye(2) + self.W.T @ self.W / scale**2
        self.gain = torch.linalg.solve(self.precision, self.W.T) / scale**2
        covariance = self.W @ self.W.T + scale**2 * torch.eye(4)
        self.log_p = dist.MultivariateNormal(self.mu, covariance).log_prob(self.x)

    def guide(self, family, scale):
        """A guide with the exact posterior mean and the given covariance factor."""
        guide = FamilyGuide(self.model, families.LADDER[family], torch.nn.Identity())
        head = guide.heads["z"]
        head.loc.linear.weight.data = self.gain
        head.loc.linear.bias.data = -self.gain @ self.mu
        if family == "full_rank":
            rows, columns = torch.tril_indices(2, 2)
            raw = torch.where(rows == columns, scale[rows, columns].log(), scale[rows, columns])
            head.scale_tril.linear.weight.data.zero_()
            head.scale_tril.linear.bias.data = raw
        elif family == "mean_scale":
            head.scale.linear.weight.data.zero_()
            head.scale.linear.bias.data = scale.log()
        return guide


def test_with_the_exact_guide_every_draw_gives_log_p():
    linear = Linear()
    guide = linear.guide("full_rank", torch.linalg.cholesky(linear.precision.inverse()))
    found = evaluate(linear.model, guide, linear.x, num_samples=8, batch_size=7)
    log_p = linear.log_p.numpy()
    assert abs(found.log_likelihood.values - log_p).max() < 1e-10
    assert abs(found.ess.values - 8).max() < 1e-8
    # the rate is exact and the distortion an average: their sum has the spread of 8 draws
    spread = math.sqrt((linear.W.T @ linear.W / linear.scale**2).diagonal().sum())
    assert abs(found.elbo.values - log_p).max() < 5 * spread * 3 / math.sqrt(8)


@pytest.mark.parametrize("family", ["mean_only", "mean_scale"])
def test_gap_and_rate_are_those_of_the_closed_form(family):
    """gap = (tr PS - Z - log det P - log det S)/2 and rate = (tr S + |m|^2 - Z - log det S)/2."""
    linear = Linear()
    P = linear.precision
    sd = torch.ones(2) if family == "mean_only" else P.diagonal().rsqrt()
    found = evaluate(linear.model, linear.guide(family, sd), linear.x, num_samples=4000)
    S = torch.diag(sd**2)
    mean = (linear.x - linear.mu) @ linear.gain.T
    rate = 0.5 * (S.trace() + mean.square().sum(-1) - 2 - S.logdet())
    assert abs(found.rate.values - rate.numpy()).max() < 1e-10
    gap = 0.5 * ((P @ S).trace() - 2 - P.logdet() - S.logdet())
    G = P - torch.eye(2)
    # the distortion's variance over draws of the guide: quadratic plus linear part, 20 * 4000 draws
    variance = 0.5 * (G @ S @ G @ S).trace() + (S @ G @ G).trace() * mean.square().sum(-1).max()
    error = 5 * math.sqrt(variance / (20 * 4000))
    assert abs(float((linear.log_p.numpy() - found.elbo.values).mean()) - float(gap)) < error


def test_importance_sampling_comes_from_below_and_near():
    """E[estimate] <= log p by Jensen; with 4,000 draws the bias is below 0.01 nats here."""
    linear = Linear()
    guide = linear.guide("mean_scale", linear.precision.diagonal().rsqrt())
    found = evaluate(linear.model, guide, linear.x, num_samples=4000)
    difference = found.log_likelihood.values - linear.log_p.numpy()
    error = (1 / found.ess.values) ** 0.5  # delta method: sd of the log of the mean weight
    assert (abs(difference) < 5 * error).all() and abs(difference.mean()) < 0.01


def test_vectorized_and_single_draws_measure_the_same():
    linear = Linear()
    guide = linear.guide("mean_only", None)
    many = evaluate(linear.model, guide, linear.x, num_samples=400)
    single = evaluate(linear.model, guide, linear.x, num_samples=400, vectorized=False, seed=1)
    for name in ("rate", "mean_variance", "kl"):
        assert abs(many[name].values - single[name].values).max() < 1e-10
    error = 5 * float(many.distortion.std()) * 2 / math.sqrt(400)
    assert abs(float((many.distortion - single.distortion).mean())) < error


def test_active_units_and_coordinates():
    linear = Linear()
    guide = linear.guide("mean_scale", torch.ones(2))
    guide.heads["z"].loc.linear.weight.data[1] = 0
    found = evaluate(linear.model, guide, linear.x, num_samples=2)
    assert found.active.values.tolist() == [True, False]
    mean = (linear.x - linear.mu) @ linear.gain.T
    assert float(found.mean_variance[0]) == pytest.approx(float(mean[:, 0].var(unbiased=False)))
    assert float(found.kl.sum()) == pytest.approx(float(found.rate.mean()), rel=1e-10)


@pytest.mark.parametrize("family", list(families.LADDER))
def test_every_family_and_nothing_moves(family):
    model = VAE(mlp(2, 8, out=4), 2, likelihoods.Bernoulli())
    encoder = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout()
    )
    guide = FamilyGuide(model, families.LADDER[family], encoder)
    before = [{k: v for k, v in m.state_dict().items()} for m in (model, guide)]
    before = [{k: v.clone() for k, v in s.items() if k != "_extra_state"} for s in before]
    state = torch.get_rng_state()
    found = evaluate(model, guide, torch.ones(9, 4), num_samples=6, batch_size=4)
    assert torch.equal(state, torch.get_rng_state()) and guide.encoder.training
    for module, saved in zip((model, guide), before, strict=True):
        assert all(torch.equal(module.state_dict()[k], v) for k, v in saved.items())
    point = family in ("deterministic", "zero")
    assert found.bound == (not point) and found.stochastic == (not point)
    assert found.elbo.isnull().all() == point
    assert abs(found.objective + found.rate + found.distortion).max() < 1e-12
    assert found.sizes == {"datum": 9, "site": 2, "latent": 2}


def test_a_model_that_cannot_be_vectorized_is_run_draw_by_draw():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.dim() == 2
            pyro.sample("x", dist.Normal(z.sum(1), 1.0), obs=x[:, 0])

    guide = FamilyGuide(model, families.full_rank, mlp(3, 4))
    found = evaluate(model, guide, torch.randn(5, 3), num_samples=3)
    assert found.log_likelihood.notnull().all()


def _outside(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "num_samples.*got 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"plate": "rows"}, "plate: expected one of"),
    ],
)
def test_bad_options(options, message):
    linear = Linear()
    with pytest.raises(ValueError, match=message):
        evaluate(linear.model, linear.guide("mean_only", None), linear.x, **options)


def test_bad_data_and_models():
    linear = Linear()
    guide = linear.guide("mean_only", None)
    with pytest.raises(ValueError, match="args: expected finite numbers"):
        evaluate(linear.model, guide, linear.x * math.nan)
    outside = FamilyGuide(_outside, families.mean_scale)
    with pytest.raises(ValueError, match=r"all sites in the plate 'data'; outside: \['w'\]"):
        evaluate(_outside, outside, linear.x)


def test_the_same_guards_as_the_export():
    linear = Linear()
    guide = linear.guide("mean_only", None)
    assert evaluate(linear.model, guide, linear.x.numpy(), num_samples=2).sizes["datum"] == 20
    with pytest.raises(ValueError, match="args: expected at least one datum, got none"):
        evaluate(linear.model, guide, linear.x[:0])

    def own_rows(x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows, 0])

    with pytest.raises(ValueError, match="'data' draws a subsample of 4"):
        evaluate(own_rows, FamilyGuide(own_rows, families.mean_scale, mlp(4, 4)), linear.x)

    def fixed(x):
        with pyro.plate("data", 20):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    guide = FamilyGuide(fixed, families.mean_scale, mlp(4, 4))
    assert evaluate(fixed, guide, linear.x, num_samples=2, batch_size=7).sizes["datum"] == 20
