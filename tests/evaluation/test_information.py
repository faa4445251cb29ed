"""What the latents tell of the data, k-hat, and the table and the words made of `evaluate`."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, FAMILIES, cases
from pyro.distributions import constraints
from scipy import integrate

from ppvae import VAE, Family, FamilyGuide, evaluate, families, likelihoods, reading, summary
from ppvae.families.family import cap
from ppvae.objectives.weights import khat


def pair(family, *, loc=1.0, scale=None, noise=1.0, features=1):
    """A linear decoder with one latent, and a guide with mean `loc * x[0]` and a fixed scale."""
    decoder = torch.nn.Linear(1, features)
    torch.nn.init.ones_(decoder.weight)
    torch.nn.init.zeros_(decoder.bias)
    model = VAE(decoder, 1, likelihoods.Normal(noise))
    guide = FamilyGuide(model, family, torch.nn.Identity())
    if family.channels:
        head = guide.heads["z"]
        head.loc.linear.weight.data = loc * torch.eye(1, features)
        head.loc.linear.bias.data.zero_()
        if scale is not None:
            head.scale.linear.weight.data.zero_()
            head.scale.linear.bias.data.fill_(math.log(scale))
    return model, guide


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [20, 60])
def test_mutual_information_is_that_of_the_mixture(scale, size):
    """With one latent the aggregate posterior is a mixture on the line: quadrature is exact."""
    x = 1.5 * torch.randn(size, 1) + 0.3
    found = evaluate(*pair(families.mean_scale, scale=scale), x, num_samples=2, batch_size=17)

    def aggregate(z):
        return (
            np.exp(-0.5 * ((z - x.numpy()[:, 0]) / scale) ** 2).mean()
            / scale
            / math.sqrt(2 * math.pi)
        )

    def integrand(z):
        q = aggregate(z)
        return q * (math.log(q) + 0.5 * z**2 + 0.5 * math.log(2 * math.pi)) if q > 0 else 0.0

    places = sorted(x[:, 0].tolist())
    exact, _ = integrate.quad(integrand, -12, 12, points=places, limit=500)
    rate = float((0.5 * (scale**2 + x**2 - 1) - math.log(scale)).mean())
    assert float(found.rate.mean()) == pytest.approx(rate)
    error = 5 * float(found.mutual_information_se) + 1e-9
    assert abs(float(found.aggregate_kl) - exact) < error < 0.8
    assert abs(float(found.mutual_information) - (rate - exact)) < error


def test_mutual_information_is_at_most_log_n():
    """Narrow posteriors far apart: each draw tells its datum, and log N is all there is to tell."""
    x = torch.arange(10.0)[:, None]
    found = evaluate(*pair(families.mean_scale, scale=1e-3), x, num_samples=2)
    assert float(found.mutual_information) == pytest.approx(math.log(10), abs=1e-9)
    assert float(found.mutual_information_se) < 1e-9
    assert "tell all these 10 data apart" in reading(found)


def test_a_channel_that_is_not_used_tells_nothing():
    x = torch.randn(30, 1)
    for found in (
        evaluate(*pair(families.noise_only), x),
        evaluate(*pair(families.mean_only, loc=0.0), x),
    ):
        assert abs(float(found.mutual_information)) < 1e-9
        assert abs(float(found.aggregate_kl)) < 1e-9
        assert not found.active.any()


@pytest.mark.parametrize(
    "name", [n for n in CASES if n not in ("regression", "hierarchy", "own rows")]
)
@pytest.mark.parametrize(
    "family", ["mean_scale", "full_rank", "noise_only", "deterministic", "flow"]
)
def test_terms_by_site_sum_to_the_objective(name, family):
    case = cases()[name]
    guide = FamilyGuide(case.model, FAMILIES[family], case.encoder)
    found = evaluate(case.model, guide, *case.args, num_samples=8, batch_size=4)
    assert abs(found.terms.sum("site") - found.objective).max() < 1e-6
    observed = [site for site in found.site.values if site == "x"]
    assert abs(found.terms.sel(site=observed).sum("site") + found.distortion).max() < 1e-6
    assert set(found.site.values) - {"guide"} == {*case.latents, "x"}
    expected = sum(math.prod(shape) for shape in case.latents.values()) // found.sizes["datum"]
    assert found.sizes["latent"] == expected
    point = family == "deterministic"
    assert found.mutual_information.isnull() == point
    if not point:
        assert float(found.mutual_information) <= math.log(found.sizes["datum"]) + 1e-12
        total = float(found.mutual_information + found.aggregate_kl)
        assert total == pytest.approx(float(found.rate.mean()))


def test_vectorized_runs_and_single_ones_tell_the_same():
    """Several sites, one of them positive, drawn jointly: both kinds of run agree."""
    case = cases()["positive"]
    guide = FamilyGuide(case.model, families.full_rank, case.encoder)
    found = [
        evaluate(case.model, guide, *case.args, num_samples=400, vectorized=v)
        for v in (True, False)
    ]
    for name in ("mutual_information", "aggregate_kl"):
        error = 5 * math.hypot(*(float(f[f"{name}_se"]) for f in found))
        assert abs(float(found[0][name] - found[1][name])) < error
    variance = [found[i].mean_variance.sel(latent="b").item() for i in (0, 1)]
    assert variance[0] == pytest.approx(variance[1], abs=0.1)
    assert list(found[0].latent.values) == ["a[0]", "a[1]", "b"]


def test_the_variance_of_an_estimated_mean_is_not_inflated():
    """With few draws the mean of q, where it has no closed form, is noisy: that is taken off."""
    case = cases()["positive"]
    guide = FamilyGuide(case.model, families.full_rank, case.encoder)
    head = guide.setup(*case.args).heads
    for argument in head.modules():
        if isinstance(argument, torch.nn.Linear):  # the same q for all data
            torch.nn.init.zeros_(argument.weight)
    x = torch.randn(3000, 3)
    found = evaluate(case.model, guide, x, num_samples=4, vectorized=True)
    error = found.mean_variance_se.values
    assert (found.mean_variance.values < 5 * error).all() and (error < 0.2).all()


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_khat_finds_the_shape_of_pareto_weights(k):
    """Weights u^-k have shape k. PSIS adds ten pseudo-observations of 0.5 to its M in the tail."""
    draws, rows = 4000, 200
    tail = 3 * math.sqrt(draws)
    log_w = -k * np.log(np.random.default_rng(0).uniform(size=(rows, draws)))
    expected = (k * tail + 0.5 * 10) / (tail + 10)
    error = (1 + k) / math.sqrt(tail * rows)  # of the maximum likelihood estimate
    assert (
        abs(khat(torch.as_tensor(log_w).T).mean() - expected) < 5 * error + 0.01
    )  # and its bias, of order 1/M


def test_khat_at_the_edges():
    rng = np.random.default_rng(0)
    equal = 3 + 1e-12 * rng.standard_normal((2, 100))
    assert khat(torch.as_tensor(equal).T).tolist() == [0.0, 0.0]
    assert khat(torch.as_tensor(rng.standard_normal((24, 2)))).isnan().all()
    broken = rng.standard_normal((2, 100))
    broken[0, 3] = np.nan
    assert khat(torch.as_tensor(broken).T).isnan().tolist() == [True, False]


@pytest.mark.parametrize(("ratio", "low", "high"), [(0.1, 0.7, 1.2), (0.8, -0.5, 0.5)])
def test_a_guide_that_is_too_narrow_has_a_large_khat(ratio, low, high):
    """N(m, ratio S) for a posterior N(m, S) has weights of shape 1 - ratio."""
    model, guide = pair(families.mean_scale, loc=0.5, scale=math.sqrt(0.5 * ratio))
    found = evaluate(model, guide, torch.randn(40, 1), num_samples=4000)
    assert low < float(found.khat.mean()) < high
    words = reading(found)
    assert ("cannot be trusted" in words or "can be trusted" in words) == (ratio < 0.5)


def test_cap():
    """0.3368 nats: `I = A^2 - E log cosh(A^2 + A eps)`, here as an entropy by quadrature."""

    def density(y):
        return 0.5 * sum(math.exp(-0.5 * (y - m) ** 2) for m in (-1, 1)) / math.sqrt(2 * math.pi)

    entropy, _ = integrate.quad(lambda y: -density(y) * math.log(density(y)), -20, 20)
    capacity = entropy - 0.5 * math.log(2 * math.pi * math.e)
    assert cap(families.mean_only_bounded) == pytest.approx(capacity, abs=1e-9)
    assert cap(families.mean_only_bounded) == pytest.approx(0.3368, abs=5e-5)
    half = Family(dist.Normal, loc=constraints.interval(-0.5, 0.5), scale=0.5)
    assert cap(half) == pytest.approx(capacity, abs=1e-9)
    wide = Family(dist.Normal, loc=constraints.interval(-4.0, 4.0), scale=1.0)
    assert 1.0 < cap(wide) < 0.5 * math.log(17)
    assert cap(families.mean_scale) == cap(families.deterministic) == math.inf
    assert cap(families.noise_only) == 0


def test_the_information_of_a_bounded_mean_is_below_its_cap():
    """Means at the two ends carry all that there is room for; in between less."""
    x = torch.cat([torch.full((200, 1), -1.0), torch.full((200, 1), 1.0)])
    model, guide = pair(families.mean_only_bounded, loc=40.0)
    found = evaluate(model, guide, x, num_samples=2)
    told, error = float(found.mutual_information), 5 * float(found.mutual_information_se)
    assert abs(told - found.cap) < error < 0.15
    assert "no more than 0.3368 nats per latent" in reading(found)


def test_summary_has_means_and_errors():
    x = torch.randn(50, 1)
    found = evaluate(*pair(families.mean_scale, scale=0.7), x)
    table = summary(found)
    for name in ("elbo", "rate", "distortion", "log_likelihood", "ess"):
        assert table.loc[name, "mean"] == pytest.approx(float(found[name].mean()))
        assert table.loc[name, "se"] == pytest.approx(
            float(found[name].std(ddof=1)) / math.sqrt(50)
        )
    # a variance of 1 +- 0.2 is 5 errors above 0.01: inactive with a chance of 3e-7
    assert table.loc["active", "mean"] == 1 and table.loc["active", "se"] < 1e-3
    share = float((found.khat > 0.7).mean())
    assert table.loc["khat > 0.7", "mean"] == share
    one = summary(evaluate(*pair(families.mean_scale, scale=0.7), x[:1]))
    assert math.isnan(one.loc["elbo", "se"])


def test_the_error_of_the_number_of_active_units():
    """A variance of the mean right at the limit counts as active half of the time."""
    x = torch.randn(4000, 1)
    x = (x - x.mean()) / x.std(correction=0) * 0.1
    found = evaluate(*pair(families.mean_only), x, num_samples=2)
    assert float(found.mean_variance[0]) == pytest.approx(0.01)
    assert summary(found).loc["active", "se"] == pytest.approx(0.5, abs=1e-3)


def linear(latent, noise, **options):
    """Data with two directions of variance 9 and 4 beside noise of variance 0.09, and a guide."""
    x = torch.randn(400, 6) * torch.tensor([3.0, 2.0, 0.3, 0.3, 0.3, 0.3])
    model = VAE(torch.nn.Linear(latent, 6), latent, likelihoods.Normal(noise))
    guide = FamilyGuide(model, families.mean_scale, torch.nn.Identity())
    head = guide.heads["z"]
    torch.nn.init.zeros_(head.loc.linear.weight)
    for unit in range(options.get("used", 0)):
        head.loc.linear.weight.data[unit, unit] = 0.3
    return evaluate(model, guide, x, num_samples=30)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda: linear(4, 0.3, used=2), "only 2 of the principal directions"),
        (lambda: linear(2, 4.0), "none of the principal directions"),
        (lambda: linear(2, 0.3), "training stuck at the prior"),
        (lambda: linear(2, 0.3, used=1), "there is use for more"),
    ],
)
def test_the_cause_of_a_collapse(found, words):
    text = reading(found())
    assert "collapsed" in text and words in text


def test_beta_is_named_as_the_cause():
    found = linear(2, 0.3)
    assert "beta = 4 makes a latent pay" in reading(found, beta=4.0)


def test_reading_of_a_point_and_of_noise():
    model = VAE(torch.nn.Linear(2, 3), 2, likelihoods.Bernoulli())
    x = (torch.rand(9, 3) > 0.5).double()
    guide = FamilyGuide(model, families.deterministic, torch.nn.Linear(3, 4))
    found = evaluate(model, guide, x)
    assert "no bound on log p(x)" in reading(found) and "elbo" not in summary(found).index
    assert summary(found).loc["objective", "mean"] == pytest.approx(float(found.objective.mean()))
    noise = evaluate(model, FamilyGuide(model, families.noise_only, torch.nn.Linear(3, 4)), x)
    assert "no channel, so nothing can pass" in reading(noise)
    stuck = FamilyGuide(model, families.mean_scale, torch.nn.Linear(3, 4))
    for parameter in stuck.heads.parameters():
        torch.nn.init.zeros_(parameter)
    assert "a decoder that models the data without latents" in reading(evaluate(model, stuck, x))


@pytest.mark.parametrize("function", [summary, reading])
def test_other_things_are_refused(function):
    with pytest.raises(ValueError, match="found: expected a result of evaluate, got dict"):
        function({})
