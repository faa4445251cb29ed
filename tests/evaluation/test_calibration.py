"""Calibration against linear-Gaussian models, where coverage and information have closed forms."""

import gc
import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import cases
from linear import ARGUMENTS, Linear, Regression, local, within
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from scipy.stats import binom

from ppvae import FamilyGuide, calibration, families, fit
from ppvae._scopes import private_modules
from ppvae.evaluation import ranks
from ppvae.regression import LinearRegression

QUIET = {"progress": False}
W = [[1.0, 0.7], [0.2, 0.5], [-0.4, 0.3]]


def build(size=2000):
    return Linear(W, size=size, noise=0.6)


def interval(level, ratio):
    """Coverage of a central interval of N(m, q^2) for a truth from N(m, s^2), ratio = q / s."""
    normal = torch.distributions.Normal(0.0, 1.0)
    z = normal.icdf(torch.tensor((1 + level) / 2))
    return (2 * normal.cdf(z * ratio) - 1).numpy()


def interval_of_draws(level, ratio, num_samples):
    """The same with the ends taken from draws: given q's share u below the truth, the rank is
    binomial; averaged over quantiles of the truth.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = normal.icdf((torch.arange(4000) + 0.5) / 4000)
    below = normal.cdf(truth[:, None] / ratio).numpy()
    first, end = ((num_samples + 1) * (1 + sign * level) / 2 for sign in (-1, 1))
    inside = [binom.cdf(round(place) - 1, num_samples, below) for place in (end, first)]
    return (inside[0] - inside[1]).mean(0)


# -- results against closed forms -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("full_rank", "passes: ranks are uniform in 2400 simulations (smallest p"),
        ("mean_scale", "intervals too narrow: 90 % intervals cover"),
        ("mean_only", "intervals too wide: 90 % intervals cover"),
    ],
)
def test_coverage_information_and_gap_are_those_of_the_closed_form(family, words):
    linear = build(2400)
    sds = {"mean_scale": linear.best_sd, "mean_only": torch.ones(2)}
    Q = torch.diag(sds[family] ** 2) if family in sds else linear.P.inverse()
    guide = linear.guide(families.LADDER[family])
    options = {"num_simulations": 2400, "batch_size": 1000, **QUIET}
    found = calibration(linear.model, guide, linear.x, **options)
    ratio = (Q.diagonal() / linear.P.inverse().diagonal()).sqrt()
    for level in found.level.values:
        exact = interval_of_draws(level, ratio, 399)
        assert abs(exact - interval(level, ratio)).max() < 0.004  # vanishes with more draws
        error = np.sqrt(exact * (1 - exact) / 2400)
        assert within(found.coverage.sel(level=level).values, exact, error)
    assert within(found.information, linear.information(Q), found.information_se)
    gap = linear.gap(Q).item()
    assert within(found.gap, gap, found.gap_se) or found.gap < gap
    assert within(found.gap_upper, gap, found.gap_upper_se) or found.gap_upper > gap
    assert found.gap_upper - found.gap < 0.02 and words in found.reading
    assert found.sizes == {"simulation": 2400, "latent": 2, "level": 4}
    assert found.calibrated == (family == "full_rank") and found.note == ""
    assert (found.uniformity_p.min() > 1e-4) == (family == "full_rank")
    assert found.unit == "nats per datum" and found.num_samples == 399
    if family == "full_rank":
        assert abs(found.gap) < 1e-10 and abs(found.gap_upper) < 1e-10


def test_the_prior_passes_with_no_information_and_a_gap():
    """gap (tr P - Z + m'Pm - log det P) / 2, with E m'Pm = tr(P - I), as E mm' = I - P^-1."""
    linear = build(1000)
    guide = linear.guide(families.noise_only)
    found = calibration(linear.model, guide, linear.x, **QUIET)
    assert found.calibrated == 1 and found.uniformity_p.min() > 1e-4
    assert found.information == 0 and found.information_se == 0
    exact = (linear.P.trace() - 2 - 0.5 * linear.P.logdet()).item()
    assert found.gap - 5 * found.gap_se < exact < found.gap_upper + 5 * found.gap_upper_se
    assert found.reading.startswith("passes, and passes nothing: the guide is the prior (info")


def test_a_point_covers_nothing_and_has_no_density():
    linear = build(100)
    found = calibration(linear.model, linear.guide(families.deterministic), linear.x, **QUIET)
    assert set(np.unique(found["rank"])) == {0, 399}
    # binomial with one rank more inside and one outside
    assert (found.coverage == 0).all() and np.allclose(found.coverage_se, math.sqrt(101 / 102**3))
    assert found.information.isnull() and found.gap.isnull() and found.gap_upper.isnull()
    assert found.note == "a point has no density" and found.calibrated == 0
    assert "information is not known: a point has no density" in found.reading


def test_a_gap_is_infinite_where_the_guide_leaves_the_support():
    """The prior draws what the uniform distribution of some data leaves out."""
    model = local(dist.Normal(0.0, 1.0), lambda z: dist.Uniform(z - 1.0, z + 1.0))
    found = calibration(model, FamilyGuide(model, families.noise_only), torch.zeros(20), **QUIET)
    assert found.gap == found.gap_upper == math.inf and np.isfinite(found.information)


def test_a_shifted_guide_is_told_by_its_side():
    linear = build(500)
    guide = linear.exact()
    guide.heads["z"].loc.linear.bias.data[1] -= 0.5
    found = calibration(linear.model, guide, linear.x, **QUIET)
    assert "fails for 1 of 2 latents" in found.reading and "draws too low: " in found.reading
    assert "of the true values of z[1] are above the median" in found.reading


def test_mean_field_covers_on_diabetes_what_was_predicted():
    """2 Phi(1.6449 q_j / s_j) - 1 with q_j = P_jj^-1/2 and s_j^2 = (P^-1)_jj; 200 data sets.

    For information and gap the weights are in units of their prior sd.
    """
    known = Regression()
    guide = known.guide(families.mean_scale)

    def refit(model, guide, X, y):
        """What `fit` finds, without its steps."""
        guide.heads["weight"].loc.raw.data = known.mean(X, y)

    before = guide.heads["weight"].loc.raw.detach().clone()
    options = {"num_simulations": 200, "num_samples": 199, "refit": refit, **QUIET}
    found = calibration(known.model, guide, *known.args, **options)
    P, Q = known.P * 0.25, torch.diag(1 / known.P.diagonal()) / 0.25
    exact = interval(0.9, (Q.diagonal() / P.inverse().diagonal()).sqrt())
    coverage = found.coverage.sel(level=0.9).values
    assert within(coverage, exact, np.sqrt(exact * (1 - exact) / 200))
    information = 0.5 * (10 - torch.linalg.solve(Q, P.inverse()).trace() - Q.logdet()).item()
    assert within(found.information, information, found.information_se)
    gap = 0.5 * ((P @ Q).trace() - 10 - P.logdet() - Q.logdet()).item()
    assert found.gap - 5 * found.gap_se < gap < float(found.gap_upper)
    assert found.unit == "nats per data set" and found.latent.values[6] == "weight[6]"
    assert "intervals too narrow: 90 % intervals cover" in found.reading
    assert torch.equal(before, guide.heads["weight"].loc.raw)


def test_a_guide_of_pyro_with_an_auxiliary_draw():
    """AutoMultivariateNormal set to the exact posterior: gap zero, by the density at the truth."""
    known = Regression(60)
    with private_modules():
        guide = AutoMultivariateNormal(known.model)
        guide(*known.args)

    def refit(model, guide, X, y):
        guide.loc.data, guide.scale = known.mean(X, y), known.factor.diagonal()
        guide.scale_tril = known.factor / guide.scale[:, None]

    before = guide.loc.detach().clone()
    options = {"num_simulations": 40, "refit": refit, **QUIET}
    found = calibration(known.model, guide, *known.args, **options)
    assert abs(found.gap) < 1e-9 and abs(found.gap_upper) < 1e-9 and found.note == ""
    assert within(found.information, (known.P * 0.25).logdet().item() / 2, found.information_se)
    assert torch.equal(before, guide.loc)


# -- any model and any guide ----------------------------------------------------------------------

LOCAL = ["one vector", "one scalar", "positive", "simplex", "left of pixels", "right of steps"]
LOCAL += ["steps inside", "told rows"]
NAMES = {
    "one scalar": ["z"],
    "positive": ["a[0]", "a[1]", "b"],
    "left of pixels": ["z[0]", "z[1]"],
    "right of steps": ["z[0,0]", "z[0,1]", "z[1,0]", "z[1,1]"],
    "steps inside": ["z[0]", "z[1]", "z[2]"],
}


@pytest.mark.parametrize("case", LOCAL)
@pytest.mark.parametrize("vectorized", [True, False])
def test_the_prior_of_any_model_passes(case, vectorized):
    """Ranks are uniform whatever the model; that log q = log p holds for every value."""
    case_ = cases()[case]
    guide = FamilyGuide(case_.model, families.noise_only)
    options = {"num_simulations": 180 if vectorized else 30, "vectorized": vectorized, **QUIET}
    options |= {"arguments": ARGUMENTS.get(case), "num_samples": 39 if vectorized else 9}
    found = calibration(case_.model, guide, *case_.args, **options)
    assert found.uniformity_p.min() > 1e-4 and abs(found.information) < 1e-12
    assert found.latent.values.tolist() == NAMES.get(case, found.latent.values.tolist())
    assert found["rank"].min() >= 0 and found["rank"].max() <= options["num_samples"]
    assert found.sizes["simulation"] == options["num_simulations"]


def test_discrete_latents_split_their_ties():
    model = local(dist.Binomial(3, torch.tensor(0.4)), lambda k: dist.Normal(k, 1.0))
    guide = FamilyGuide(model, families.noise_only)
    found = calibration(model, guide, torch.zeros(1000), vectorized=True, num_samples=19, **QUIET)
    assert found.uniformity_p.item() > 1e-4
    error = np.sqrt(found.level * (1 - found.level) / 1000)
    assert within(found.coverage[:, 0] - found.level, 0.0, error)


def test_a_density_that_is_not_found_is_said_so():
    """z is the square of an auxiliary draw's exponential: no permutation of coordinates."""
    model = local(dist.LogNormal(0.0, 2.0), lambda z: dist.Normal(z, 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta((2 * u).exp()))

    found = calibration(model, guide, torch.zeros(50), vectorized=True, **QUIET)
    assert "was not found" in found.note and found.information.isnull() and found.gap.notnull()
    assert found.uniformity_p.item() > 1e-4 and "was not found" in found.reading


# -- promises -------------------------------------------------------------------------------------


def test_all_guides_see_the_same_data():
    """The simulations depend on the seed only; their number on the data, or on what is asked."""
    linear, seen = build(9), []

    def arguments(values):
        seen.append(values["x"])
        return (values["x"],)

    options = {"num_samples": 9, "batch_size": 4, "arguments": arguments, "seed": 3, **QUIET}
    for family in (families.mean_scale, families.full_rank):
        found = calibration(linear.model, linear.guide(family), linear.x, **options)
        assert found.sizes["simulation"] == 9
    assert [len(x) for x in seen] == [4, 4, 1] * 2
    assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))
    more = calibration(linear.model, linear.exact(), linear.x, num_simulations=25, **options)
    assert more.sizes["simulation"] == 25 and [len(x) for x in seen[6:]] == [4, 4, 1] * 2 + [4, 4]


def test_a_refit_works_on_copies():
    """Frozen model, copied guide, copied `pyro.param`s; also when the refit fails half-way."""
    user = pyro.param("user_scale", torch.tensor(1.0), constraint=constraints.positive)
    start = user.detach().clone()
    model, X, y = LinearRegression(2, noise=0.7), torch.randn(8, 2), torch.randn(8)
    seen = []

    def guide(X, y):
        scale = pyro.param("user_scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("weight", dist.Normal(torch.zeros(2), scale).to_event(1))

    def refit(frozen, copied, X, y):
        seen.append(y)
        assert frozen is not model and copied is guide
        with torch.no_grad():
            pyro.param("user_scale").unconstrained().add_(1.0)
        if len(seen) == 12:
            raise RuntimeError("stop")

    options = {"num_simulations": 10, "num_samples": 9, "refit": refit, **QUIET}
    calibration(model, guide, X, y, **options)
    assert torch.equal(pyro.param("user_scale"), start) and not torch.equal(seen[0], seen[1])
    with pytest.raises(RuntimeError, match="stop"):
        calibration(model, guide, X, y, **options)
    assert torch.equal(pyro.param("user_scale"), start)

    def broken(X, y):
        pyro.sample("weight", dist.Normal(torch.zeros(2), math.nan).to_event(1))

    with pytest.raises(ValueError, match="guide: expected draws that are numbers, got NaN") as info:
        calibration(model, broken, X, y, num_samples=9, refit=lambda *args: None, **QUIET)
    pyro.param("user_other", torch.tensor(2.0))
    del info  # with it goes what the error kept alive
    gc.collect()
    assert list(pyro.get_param_store()) == ["user_scale", "user_other"]


def test_a_refit_cannot_train_the_model():
    """Each datum has channels of its own here; the decoder could fit the data, and must not."""
    linear = build(3)
    model = torch.nn.Sequential(linear.model)

    def refit(model, guide, x):
        start = [p.clone() for p in guide.parameters()]
        fit(model, guide, x, num_epochs=2, learning_rate=0.1, **QUIET)
        assert torch.equal(model[0].decoder.weight, linear.W)
        assert not any(torch.equal(p, s) for p, s in zip(guide.parameters(), start, strict=True))

    guide = FamilyGuide(model, families.mean_scale).setup(linear.x)
    options = {"num_simulations": 3, "num_samples": 9, "refit": refit, **QUIET}
    found = calibration(model, guide, linear.x, **options)
    assert found.latent.values.tolist()[:3] == ["z[0,0]", "z[0,1]", "z[1,0]"]
    assert linear.model.decoder.weight.requires_grad and found.sizes["latent"] == 6


def test_with_a_refit_the_information_is_that_of_all_the_data():
    linear = build(3)
    options = {"num_simulations": 60, "num_samples": 9, "refit": lambda *args: None, **QUIET}
    found = calibration(linear.model, linear.exact(), linear.x, **options)
    exact = 3 * linear.information(linear.P.inverse())
    assert within(found.information, exact, found.information_se) and exact > 1


def _global(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def _bare(x):
    pyro.sample("x", dist.Normal(pyro.sample("w", dist.Normal(0.0, 1.0)), 1.0), obs=x)


def test_models_and_guides_that_need_a_refit():
    def refused(message, model, guide, x, error=ValueError, **options):
        with pytest.raises(error, match=message):
            calibration(model, guide, x, **options, **QUIET)

    x, guide = torch.zeros(6), FamilyGuide(_global, families.mean_scale)
    refused(r"refit: .* sites \['w'\] are outside the plate 'data'", _global, guide, x)
    whole = "all the data in the plate 'data' .* got 6 of 12"
    refused(whole, _global, guide, x, refit=lambda *args: None)
    refused("refit: expected a function, got int", _global, guide, x, error=TypeError, refit=3)
    bare = FamilyGuide(_bare, families.mean_scale)
    refused("refit: .* the model has no plate over its data", _bare, bare, torch.tensor(0.0))
    linear = build(6)
    alone = FamilyGuide(linear.model, families.mean_scale)
    with private_modules():
        several = AutoGuideList(linear.model)
        several.append(AutoNormal(linear.model))
    for guide in (alone, several):
        refused("refit: .* a guide without encoder", linear.model, guide, linear.x)


# -- ranks ----------------------------------------------------------------------------------------


def test_the_p_value_and_the_band_are_exact():
    """All 5^4 sets of four ranks: a p-value of v comes with chance v, and the band holds."""
    every = np.array(list(itertools.product(range(5), repeat=4))).T
    p = ranks.uniformity(every, 4)
    for value in np.unique(p):
        assert (p <= value + 1e-12).mean() == pytest.approx(value, abs=1e-12)
    for level in (0.5, 0.8, 0.95):
        points, low, high = ranks.ecdf_band(4, 4, level)
        assert points.tolist() == [0.2, 0.4, 0.6, 0.8]
        ecdf = ranks.ecdf_of(every, 4)
        inside = ((ecdf >= low[:, None]) & (ecdf <= high[:, None])).all(0)
        assert inside.mean() >= level - 1e-12
        assert np.array_equal(inside, p > 1 - level + 1e-12)  # the band and the test agree


def test_p_values_at_the_edges():
    """Tiny ones are bounded and not zero by rounding; of many draws fifty points are looked at."""
    tiny = ranks.uniformity(np.full((40, 1), 3), 99)
    assert 0 < tiny[0] < 1e-15
    assert ranks.uniformity(np.arange(100)[:, None], 99)[0] == pytest.approx(1.0)
    points, _, _ = ranks.ecdf_band(10, 999)
    assert np.allclose(points, np.arange(1, 50) / 50)
    rng = np.random.default_rng(0)
    p = ranks.uniformity(rng.integers(0, 100, (60, 2000)), 99)  # at most uniform, as it is discrete
    for level in (0.05, 0.2, 0.5):
        assert abs((p <= level).mean() - level) < 5 * math.sqrt(level * (1 - level) / 2000) + 0.01


@pytest.mark.parametrize("num_samples", [7, 19, 100])
def test_uniform_ranks_are_covered_as_often_as_the_level_says(num_samples):
    every = np.arange(num_samples + 1)[:, None]
    for level in (0.3, 0.5, 0.9, 0.95):
        share, error = ranks.coverage(every, num_samples, level)
        smooth = (len(every) * level + 1) / (len(every) + 2)
        assert share[0] == pytest.approx(level)
        assert error[0] == pytest.approx(math.sqrt(smooth * (1 - smooth) / (len(every) + 2)))
