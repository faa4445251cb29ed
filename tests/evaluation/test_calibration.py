"""Calibration against linear-Gaussian models, where coverage and information have closed forms."""

import copy
import gc
import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import DENSITIES, cases
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy.stats import binom
from sklearn.datasets import load_diabetes

from ppvae import VAE, FamilyGuide, families, fit, likelihoods, plots
from ppvae._scopes import private_modules, unchecked
from ppvae.evaluation import ranks
from ppvae.evaluation.sbc import calibration
from ppvae.guides.score import terms_at
from ppvae.nn import mlp
from ppvae.objectives.trace_terms import terms
from ppvae.programs.runs import trace_pair
from ppvae.regression import LinearRegression

QUIET = {"progress": False}


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


def gain(P, Q):
    """Information of q = N(m, Q) about z ~ N(0, I): I(x;z) - KL(N(m, P^-1) || q)."""
    return 0.5 * (len(P) - (torch.linalg.solve(Q, P.inverse())).trace() - Q.logdet()).item()


def gap(P, Q):
    return 0.5 * ((P @ Q).trace() - len(P) - P.logdet() - Q.logdet()).item()


def close(found, expected, error):
    """Five standard errors, 1e-9 for what is exact."""
    return (abs(found - expected) <= 5 * error + 1e-9).all()


class Linear:
    """x = W z + noise with correlated posterior, and guides with its mean and any covariance."""

    def __init__(self, size=2000):
        self.W = torch.tensor([[1.0, 0.7], [0.2, 0.5], [-0.4, 0.3]])
        decoder = torch.nn.Linear(2, 3, bias=False)
        decoder.weight.data = self.W
        self.model = VAE(decoder, 2, likelihoods.Normal(0.6))
        self.P = torch.eye(2) + self.W.T @ self.W / 0.36
        self.mean = torch.linalg.solve(self.P, self.W.T) / 0.36
        self.x = torch.zeros(size, 3)

    def guide(self, family, scale=None):
        guide = FamilyGuide(self.model, families.LADDER[family], torch.nn.Identity())
        for name in ("loc", "v"):
            if family != "noise_only" and hasattr(guide.heads["z"], name):
                linear = getattr(guide.heads["z"], name).linear
                linear.weight.data, linear.bias.data = self.mean.clone(), torch.zeros(2)
        if scale is not None:
            linear = guide.heads["z"].get_submodule("scale").linear
            linear.weight.data.zero_()
            linear.bias.data = scale.log()
        return guide

    def exact(self):
        guide = self.guide("full_rank")
        _cholesky(guide.heads["z"].scale_tril.linear, self.P.inverse())
        return guide


def _cholesky(linear, covariance):
    """Sets a constant factor: entries below the diagonal as they are, those on it as logs."""
    factor = torch.linalg.cholesky(covariance)
    rows, columns = torch.tril_indices(*factor.shape)
    entries = factor[rows, columns]
    linear.weight.data.zero_()
    linear.bias.data = torch.where(rows == columns, entries.log(), entries)


# -- what is found, against closed forms ----------------------------------------------------------


def test_the_exact_guide_is_calibrated_and_carries_all_the_information():
    linear = Linear()
    options = {"num_simulations": 2000, "num_samples": 199, **QUIET}
    found = calibration(linear.model, linear.exact(), linear.x, **options)
    assert found.sizes == {"simulation": 2000, "latent": 2, "level": 4}
    assert found.latent.values.tolist() == ["z[0]", "z[1]"]
    assert found.uniformity_p.min() > 1e-4 and found.calibrated == 1
    levels = found.level
    assert (abs(found.coverage - levels) < 5 * np.sqrt(levels * (1 - levels) / 2000)).all()
    assert abs(found.gap) < 1e-10 and abs(found.gap_upper) < 1e-10
    assert close(found.information, linear.P.logdet().item() / 2, found.information_se)
    assert found.unit == "nats per datum"
    assert found.reading.startswith("passes: ranks are uniform in 2000 simulations")
    assert f"information {found.information:.2f}, gap 0.00" in found.reading


@pytest.mark.parametrize(
    ("family", "words"), [("mean_scale", "too narrow"), ("mean_only", "too wide")]
)
def test_coverage_information_and_gap_are_those_of_the_closed_form(family, words):
    linear = Linear(3000)
    P = linear.P
    sd = P.diagonal().rsqrt() if family == "mean_scale" else torch.ones(2)
    guide = linear.guide(family, sd if family == "mean_scale" else None)
    options = {"num_simulations": 3000, "batch_size": 1000, **QUIET}
    found = calibration(linear.model, guide, linear.x, **options)
    ratio = sd / P.inverse().diagonal().sqrt()
    for level in found.level.values:
        exact = interval_of_draws(level, ratio, 399)
        assert abs(exact - interval(level, ratio)).max() < 0.004  # vanishes with more draws
        error = np.sqrt(exact * (1 - exact) / 3000)
        assert (abs(found.coverage.sel(level=level).values - exact) < 5 * error).all()
    Q = torch.diag(sd**2)
    assert close(found.information, gain(P, Q), found.information_se)
    assert found.gap - 5 * found.gap_se < gap(P, Q) < found.gap_upper + 5 * found.gap_upper_se
    assert found.gap_upper - found.gap < 0.02
    assert found.calibrated == 0 and f"intervals {words}: 90 % intervals cover" in found.reading


def test_the_prior_passes_with_no_information_and_a_gap():
    """gap (tr P - Z + m'Pm - log det P) / 2, with E m'Pm = tr(P - I), as E mm' = I - P^-1."""
    linear = Linear(1000)
    found = calibration(linear.model, linear.guide("noise_only"), linear.x, **QUIET)
    assert found.calibrated == 1 and found.uniformity_p.min() > 1e-4
    assert found.information == 0 and found.information_se == 0
    exact = (linear.P.trace() - 2 - 0.5 * linear.P.logdet()).item()
    assert found.gap - 5 * found.gap_se < exact < found.gap_upper + 5 * found.gap_upper_se
    assert found.reading.startswith("passes, and passes nothing: the guide is the prior (info")


def test_a_point_covers_nothing_and_has_no_density():
    linear = Linear(100)
    found = calibration(linear.model, linear.guide("deterministic"), linear.x, **QUIET)
    assert set(np.unique(found["rank"])) == {0, 399}
    assert (found.coverage == 0).all() and (found.coverage_se > 0).all()
    assert found.information.isnull() and found.gap.isnull() and found.gap_upper.isnull()
    assert found.note == "a point has no density" and found.calibrated == 0
    assert "information is not known: a point has no density" in found.reading
    assert "90 % intervals cover 0 % of z[0]" in found.reading


def test_a_shifted_guide_is_told_by_its_side():
    linear = Linear(500)
    guide = linear.exact()
    guide.heads["z"].loc.linear.bias.data[1] = -0.5
    found = calibration(linear.model, guide, linear.x, **QUIET)
    assert "fails for 1 of 2 latents" in found.reading and "draws too low: " in found.reading
    assert "of the true values of z[1] are above the median" in found.reading


def _two_sites(x):
    """u = log a and b are standard normal, x = u + b + noise: one direction, two supports."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a.log() + b, 0.5), obs=x)


class _Column(torch.nn.Module):
    def forward(self, x):
        return x[:, None]


def test_a_joint_guide_of_several_sites_and_a_positive_support():
    guide = FamilyGuide(_two_sites, families.full_rank, _Column()).setup(torch.zeros(2))
    P = torch.eye(2) + torch.ones(2, 2) / 0.25
    (head,) = guide.heads.values()
    head.loc.linear.weight.data = torch.linalg.solve(P, torch.ones(2, 1)) / 0.25
    head.loc.linear.bias.data.zero_()
    _cholesky(head.scale_tril.linear, P.inverse())
    options = {"num_samples": 79, "vectorized": True, "num_simulations": 1500, **QUIET}
    found = calibration(_two_sites, guide, torch.zeros(500), **options)
    assert found.latent.values.tolist() == ["a", "b"] and found.uniformity_p.min() > 1e-4
    assert close(found.information, P.logdet().item() / 2, found.information_se)
    assert abs(found.gap_upper) < 1e-9


class Regression:
    """Diabetes, 342 rows, standardised; weights N(0, 0.5^2), noise 0.7; the exact mean field."""

    def __init__(self, rows=342):
        X, y = load_diabetes(return_X_y=True)
        X, y = ((a[:rows] - a[:rows].mean(0)) / a[:rows].std(0) for a in (X, y))
        self.args = torch.as_tensor(X), torch.as_tensor(y)
        X = self.args[0]
        self.P = X.T @ X / 0.49 + torch.eye(10) / 0.25
        self.model = LinearRegression(10, weight=dist.Normal(0.0, 0.5), noise=0.7)

    def mean(self, X, y):
        return torch.linalg.solve(self.P, X.T @ y) / 0.49

    def refit(self, model, guide, X, y):
        """What `fit` finds, without its steps."""
        guide.heads["weight"].loc.raw.data = self.mean(X, y)


def test_mean_field_covers_on_diabetes_what_was_predicted():
    """2 Phi(1.6449 q_j / s_j) - 1 with q_j = P_jj^-1/2 and s_j^2 = (P^-1)_jj; 200 data sets."""
    known = Regression()
    guide = FamilyGuide(known.model, families.mean_scale)
    fit(known.model, guide, known.args, num_epochs=500, **QUIET)
    before = guide.heads["weight"].loc.raw.detach().clone()
    options = {"num_simulations": 200, "num_samples": 199, "refit": known.refit, **QUIET}
    found = calibration(known.model, guide, *known.args, **options)
    Q = torch.diag(1 / known.P.diagonal())
    exact = interval(0.9, (Q.diagonal() / known.P.inverse().diagonal()).sqrt())
    assert exact.round(3).tolist()[4:8] == [0.212, 0.256, 0.371, 0.436]
    coverage = found.coverage.sel(level=0.9).values
    assert (abs(coverage - exact) < 5 * np.sqrt(exact * (1 - exact) / 200)).all()
    unit = known.P * 0.25  # for weights in units of their prior sd
    assert close(found.information, gain(unit, Q / 0.25), found.information_se)
    assert found.gap - 5 * found.gap_se < gap(unit, Q / 0.25) < float(found.gap_upper)
    assert found.unit == "nats per data set" and found.latent.values[6] == "weight[6]"
    assert "intervals too narrow: 90 % intervals cover" in found.reading
    assert torch.equal(before, guide.heads["weight"].loc.raw)


def test_training_a_copy_finds_what_the_closed_form_finds():
    """The same draws around means equal to 1e-6: the same ranks."""
    known = Regression(60)
    guide = FamilyGuide(known.model, families.mean_scale)
    fit(known.model, guide, known.args, num_epochs=500, **QUIET)

    def train(model, guide, *args):
        fit(model, guide, args, num_epochs=500, **QUIET)

    found = [
        calibration(known.model, guide, *known.args, num_simulations=2, refit=refit, **QUIET)
        for refit in (known.refit, train)
    ]
    assert abs(found[0]["rank"] - found[1]["rank"]).max() <= 1
    assert abs(found[0].information - found[1].information) < 1e-3


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
PAD = torch.zeros(6, 2)
ARGUMENTS = {
    "right of steps": lambda seen: (torch.cat([seen["x"].T, PAD[:, :1]], -1),),
    "told rows": lambda seen: (torch.cat([seen["x"][:, None], PAD], -1), torch.arange(6)),
}


@pytest.mark.parametrize("case", LOCAL)
@pytest.mark.parametrize("vectorized", [True, False])
def test_the_prior_of_any_model_passes(case, vectorized):
    """Ranks are uniform whatever the model; that log q = log p holds for every value."""
    case_ = cases()[case]
    guide = FamilyGuide(case_.model, families.noise_only)
    options = {"num_simulations": 240 if vectorized else 30, "vectorized": vectorized, **QUIET}
    options |= {"arguments": ARGUMENTS.get(case), "num_samples": 39 if vectorized else 9}
    found = calibration(case_.model, guide, *case_.args, **options)
    assert found.uniformity_p.min() > 1e-4 and abs(found.information) < 1e-12
    assert found.latent.values.tolist() == NAMES.get(case, found.latent.values.tolist())
    assert found["rank"].min() >= 0 and found["rank"].max() <= options["num_samples"]
    assert found.sizes["simulation"] == options["num_simulations"]


@pytest.mark.parametrize("case", [*LOCAL, "own rows", "regression", "hierarchy"])
@pytest.mark.parametrize("family", ["noise_only", "mean_scale", "full_rank", "flow", "student_t"])
def test_the_density_at_given_latents_is_that_of_the_draw(family, case):
    """An identity for every draw: the guide's own draws, given back, have the same density."""
    case_ = cases()[case]
    torch.manual_seed(0)
    guide = FamilyGuide(case_.model, DENSITIES[family], case_.encoder)
    if case == "own rows":
        guide = FamilyGuide(case_.model, families.noise_only)
    with torch.no_grad(), private_modules(), unchecked():
        pair = trace_pair(case_.model, guide, *case_.args)
        drawn = terms(*pair)
        latents = {name: pair[1].nodes[name]["value"] for name in case_.latents}
        again = terms_at(case_.model, guide, case_.args, latents, None)
    assert again is not None
    for kind in ("log_prior", "log_guide"):
        one, other = (sum(getattr(t, kind).values()) for t in (drawn, again))
        assert torch.allclose(one, other, atol=1e-6), kind


def test_discrete_latents_split_their_ties():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Binomial(3, torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    guide = FamilyGuide(model, families.noise_only)
    found = calibration(model, guide, torch.zeros(1000), vectorized=True, num_samples=19, **QUIET)
    assert found.uniformity_p.item() > 1e-4
    error = np.sqrt(found.level * (1 - found.level) / 1000)
    assert (abs(found.coverage[:, 0] - found.level) < 5 * error).all()


def test_a_guide_of_pyro_with_an_auxiliary_draw():
    """AutoMultivariateNormal set to the exact posterior: gap zero, by the density at the truth."""
    known = Regression(60)
    with private_modules():
        guide = AutoMultivariateNormal(known.model)
        guide(*known.args)

    def refit(model, guide, X, y):
        guide.loc.data = known.mean(X, y)
        factor = torch.linalg.cholesky(known.P.inverse())
        guide.scale = factor.diagonal()
        guide.scale_tril = factor / factor.diagonal()[:, None]

    options = {"num_simulations": 40, "refit": refit, **QUIET}
    before = guide.loc.detach().clone()
    found = calibration(known.model, guide, *known.args, **options)
    assert abs(found.gap) < 1e-9 and abs(found.gap_upper) < 1e-9 and found.note == ""
    exact = (known.P * 0.25).logdet().item() / 2
    assert close(found.information, exact, found.information_se)
    assert torch.equal(before, guide.loc)


def test_a_density_that_is_not_found_is_said_so():
    """z is the square of an auxiliary draw's exponential: no permutation of coordinates."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta((2 * u).exp()))

    found = calibration(model, guide, torch.zeros(50), vectorized=True, **QUIET)
    assert "was not found" in found.note and found.information.isnull()
    assert found.uniformity_p.item() > 1e-4 and "was not found" in found.reading


# -- promises -------------------------------------------------------------------------------------


def test_nothing_moves_and_the_seed_decides():
    encoder = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout()
    )
    model = VAE(mlp(2, 8, out=4), 2, likelihoods.Bernoulli())
    guide = FamilyGuide(model, families.mean_scale, encoder)
    before = [copy.deepcopy(m.state_dict()) for m in (model, guide)]
    state, x = torch.get_rng_state(), torch.zeros(9, 4)
    found = [
        calibration(model, guide, x, num_samples=19, batch_size=4, seed=seed, **QUIET)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(state, torch.get_rng_state()) and guide.encoder.training and model.training
    for module, saved in zip((model, guide), before, strict=True):
        for name, value in module.state_dict().items():
            assert name == "_extra_state" or torch.equal(value, saved[name])
    assert found[0].identical(found[1]) and not found[0]["rank"].equals(found[2]["rank"])
    assert found[0].sizes["simulation"] == 9
    more = calibration(model, guide, x, num_simulations=25, num_samples=19, **QUIET)
    assert more.sizes["simulation"] == 25


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
    linear = Linear(3)
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


def _global(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


X = torch.zeros(6)
LINEAR = Linear(6)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (LINEAR.exact, {"num_samples": 1}, "num_samples: .*at least 2, got 1"),
        (LINEAR.exact, {"batch_size": 0}, "batch_size: .* at least 1, got 0"),
        (
            LINEAR.exact,
            {"num_simulations": 1},
            "num_simulations: expected a whole number of at least 2, got 1",
        ),
        (
            LINEAR.exact,
            {"num_simulations": 0},
            "num_simulations: expected a whole number of at least 2, got 0",
        ),
        (LINEAR.exact, {"levels": (0.5, 1.0)}, r"levels: expected numbers in \(0, 1\)"),
        (LINEAR.exact, {"levels": ()}, "levels: .* at least one"),
        (LINEAR.exact, {"plate": "rows"}, "plate: expected one of"),
        (
            lambda: FamilyGuide(LINEAR.model, families.mean_scale),
            {},
            "refit: .* the parameters of a guide without encoder",
        ),
    ],
)
def test_bad_options(build, options, message):
    with pytest.raises(ValueError, match=message):
        calibration(LINEAR.model, build(), LINEAR.x, **options, **QUIET)


def test_bad_models():
    guide = FamilyGuide(_global, families.mean_scale)
    with pytest.raises(ValueError, match=r"refit: .* sites \['w'\] are outside the plate 'data'"):
        calibration(_global, guide, X, **QUIET)
    with pytest.raises(ValueError, match="all the data in the plate 'data' .* got 6 of 12"):
        calibration(_global, guide, X, refit=lambda *args: None, **QUIET)
    with pytest.raises(TypeError, match="refit: expected a function, got int"):
        calibration(_global, guide, X, refit=3, **QUIET)

    def bare(x):
        pyro.sample("x", dist.Normal(pyro.sample("w", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    with pytest.raises(ValueError, match="refit: .* the model has no plate over its data"):
        calibration(bare, FamilyGuide(bare, families.mean_scale), X[0], **QUIET)
    case = cases()["own rows"]
    with pytest.raises(ValueError, match="'data' draws a subsample of 4"):
        calibration(case.model, FamilyGuide(case.model, families.noise_only), *case.args, **QUIET)

    def nothing(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="model: expected latent sites, got none"):
        calibration(nothing, nothing, X, **QUIET)


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


def test_tiny_p_values_are_bounded_and_not_zero_by_rounding():
    tiny = ranks.uniformity(np.full((40, 1), 3), 99)
    assert 0 < tiny[0] < 1e-15
    assert ranks.uniformity(np.arange(100)[:, None], 99)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("num_samples", [7, 19, 100])
def test_uniform_ranks_are_covered_as_often_as_the_level_says(num_samples):
    every = np.arange(num_samples + 1)[:, None]
    for level in (0.3, 0.5, 0.9, 0.95):
        share, error = ranks.coverage(every, num_samples, level)
        assert share[0] == pytest.approx(level) and error[0] > 0


def test_the_picture_holds_the_ranks_the_band_and_the_coverage():
    linear = Linear(200)
    found = calibration(linear.model, linear.exact(), linear.x, num_samples=19, **QUIET)
    left, right = plots.calibration(found).axes
    lines = left.get_lines()
    assert [line.get_label() for line in lines] == ["z[0]", "z[1]"]
    share = (found["rank"].values[:, 1] < 5).mean()
    assert lines[1].get_ydata()[5] == pytest.approx(share - 5 / 20)
    points, low, high = ranks.ecdf_band(200, 19)
    band = left.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx((high - points).max())
    assert np.array_equal(right.get_lines()[1].get_ydata(), found.coverage[:, 0])
