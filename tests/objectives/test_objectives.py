"""Terms and objectives: Pyro's, identities, closed forms, and themselves on half batches.

Stochastic tests allow 5 standard errors of the mean over independent calls.
"""

import math
import pickle
from functools import partial
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, DENSITIES, FAMILIES, cases
from linear import Linear
from pairs import data, linear
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.distributions import kl_divergence
from torch.overrides import TorchFunctionMode

from ppvae import VAE, FamilyGuide, families, fit, likelihoods
from ppvae._scopes import private_modules
from ppvae.nn import mlp
from ppvae.objectives import ELBO, IWAE, at_step, negative_elbo, terms, trace_pair, warm_up
from ppvae.objectives.divergence import closed_kl
from ppvae.regression import LinearRegression, exact_posterior

KINDS = ["pathwise", "doubly_reparametrized"]
LOSSES = [ELBO(kl="sampled", num_samples=3), ELBO(beta=0.5, num_samples=2)]
LOSSES += [IWAE(3, kind) for kind in KINDS]
LOSS = pytest.mark.parametrize("loss", LOSSES, ids=["sampled", "beta", "iwae", "dreg"])


@pytest.fixture(autouse=True)
def private():
    with private_modules():
        yield


class Noise(TorchFunctionMode):
    """Hands out given standard normal numbers by shape: all draws at once, or one by one."""

    def __init__(self, *noise):
        super().__init__()
        self.whole = {tuple(n.shape): n for n in noise}
        self.single = {tuple(n.shape[1:]): iter(n) for n in noise}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.normal_ and len(args) == 1:
            shape = tuple(result.shape)
            if shape in self.whole:
                return self.whole[shape].clone()
            if shape in self.single:
                return next(self.single[shape]).clone()
        return result


def build(family="mean_scale"):
    return *linear(family), data(8)


def parameters(*modules):
    return list({id(p): p for m in modules for p in m.parameters()}.values())


def gradient(loss, wrt):
    slopes = torch.autograd.grad(loss, wrt, retain_graph=True, materialize_grads=True)
    return torch.cat([slope.reshape(-1) for slope in slopes])


def seeded(call, *args, seed=0, **options):
    torch.manual_seed(seed)
    return call(*args, **options)


# --- the terms -----------------------------------------------------------------------------------


#: whose log-determinants stand in the `log_density` of a `Delta` on each constrained site
AUTO = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}


@pytest.mark.parametrize(
    ("family", "case"), [*product(FAMILIES, CASES), *product(AUTO, ["regression", "positive"])]
)
def test_terms_sum_to_the_elbo_of_pyro(family, case):
    """Sampled terms with the same seed are Pyro's Trace_ELBO, up to rounding."""
    case = cases()[case]
    if family in AUTO:
        guide = AUTO[family](case.model)
        guide(*case.args)
    else:
        guide = FamilyGuide(case.model, FAMILIES[family], case.encoder).setup(*case.args)
    with torch.no_grad():
        expected = -seeded(Trace_ELBO().loss, case.model, guide, *case.args)
        parts = terms(*seeded(trace_pair, case.model, guide, *case.args))
    scale = 1.0 if parts.plate is None else parts.plate.full_size / parts.plate.size
    total = weight = 0.0
    for sign, values in ((1, parts.log_likelihood), (1, parts.log_prior), (-1, parts.log_guide)):
        for name, value in values.items():
            factor = scale if name in parts.local else 1.0
            total += sign * factor * float(value.sum())
            weight += sign * float(value.sum())
    assert total == pytest.approx(expected, rel=1e-9)
    assert float(parts.log_weight.sum()) == pytest.approx(weight, rel=1e-9)  # of these data


def correlated(*batch):
    root = torch.randn(*batch, 3, 3)
    covariance = root @ root.mT + torch.eye(3)
    return dist.MultivariateNormal(torch.randn(*batch, 3), covariance_matrix=covariance)


def of_low_rank(*batch):
    root, rest = torch.randn(*batch, 3, 2), torch.rand(*batch, 3) + 0.1
    return dist.LowRankMultivariateNormal(torch.randn(*batch, 3), root, rest)


@pytest.mark.parametrize("guide", [correlated, of_low_rank])
def test_the_divergence_from_a_correlated_prior_is_that_of_pytorch(guide):
    """Which asks for sizes as numbers, so that no graph is for batches of any size."""
    for own, other in product([(), (5,), (4, 5)], [(), (5,), (4, 1)]):
        q, p = guide(*own), correlated(*other)
        torch.testing.assert_close(closed_kl(q, p), kl_divergence(q, p), rtol=1e-12, atol=1e-12)
    q, p = (fn(4, 5).to_event(1) for fn in (guide, correlated))
    torch.testing.assert_close(closed_kl(q, p), kl_divergence(q, p), rtol=1e-12, atol=0)
    assert closed_kl(p, p).abs().max() < 1e-12


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


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_a_point_is_pyros_per_datum_at_every_batch_size(name):
    """Nothing but rows is random, so the mean over halves is the whole, where a model takes these.

    Global latents count once, whatever the batch, and a subsample stands for all the data.
    """
    model, args, encoder, _ = cases()[name]
    guide = FamilyGuide(model, families.deterministic, encoder).setup(*args)
    with torch.no_grad():
        whole = float(seeded(negative_elbo, model, guide, *args))
        pyros = seeded(Trace_ELBO().loss, model, guide, *args)
        assert whole == pytest.approx(pyros / (24 if name == "told rows" else 6), rel=1e-12)
        if name != "own rows":
            parts = ([arg[rows] for arg in args] for rows in (slice(3), slice(3, None)))
            halves = [float(negative_elbo(model, guide, *part, size=6)) for part in parts]
            assert whole == pytest.approx(sum(halves) / 2, rel=1e-12)


# --- the ELBO -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("family", ["deterministic", "mean_scale", "full_rank"])
@pytest.mark.parametrize("case", ["one vector", "positive", "told rows", "regression"])
def test_beta_weighs_the_rate_and_nothing_else(case, family, kl):
    case = cases()[case]
    guide = FamilyGuide(case.model, families.LADDER[family], case.encoder).setup(*case.args)
    parts = terms(*seeded(trace_pair, case.model, guide, *case.args))
    parts = parts._replace(kl={}) if kl == "sampled" else parts
    rate = parts.rate.mean() / (6 if case.encoder is None else 1)
    for beta in (0, 1, 2):
        value = seeded(ELBO(beta=beta, kl=kl), case.model, guide, *case.args)
        expected = parts.distortion.mean() + beta * rate
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)


def test_beta_zero_and_a_point_is_the_plain_autoencoder():
    """Squared error and nothing else, even for points that the prior does not allow."""
    net = nn.Linear(3, 2)
    prior = dist.Uniform(2 * torch.ones(2), 3 * torch.ones(2), validate_args=False).to_event(1)
    model, x = VAE(nn.Linear(2, 3), 2, likelihoods.Normal(0.7), prior), data(8)
    model.prior._validate_args = False

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(net(x), event_dim=1))

    error = (x - model.decoder(net(x))).square().sum(-1).mean() / (2 * 0.7**2)
    constant = 1.5 * math.log(2 * math.pi * 0.7**2)
    torch.testing.assert_close(ELBO(beta=0)(model, guide, x), error + constant)
    assert torch.isinf(ELBO()(model, guide, x))


def test_warm_up_is_a_straight_line_that_can_be_pickled():
    schedule = pickle.loads(pickle.dumps(warm_up(10, start=0.5, end=2.5)))
    assert [schedule(step) for step in (0, 1, 5, 10, 11)] == [0.5, 0.7, 1.5, 2.5, 2.5]
    assert warm_up(4, start=1.0, end=0.0)(3) == 0.25
    assert torch.equal(schedule(torch.tensor(5.0)), torch.tensor(1.5))
    both = ELBO(beta=schedule, free_bits=warm_up(4))
    assert at_step(both, 1) == ELBO(beta=0.7, free_bits=0.25)
    assert at_step(ELBO(), 1) == ELBO() and at_step(print, 1) is print
    model, guide, x = build()
    loss = ELBO(beta=warm_up(4))
    value = [seeded(loss, model, guide, x, step=step) for step in (0, 1, torch.tensor(3.0), 9)]
    line = torch.lerp(value[0], value[3], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(torch.stack(value[1:3]), line)
    constant = ELBO(beta=torch.tensor(0.25))
    torch.testing.assert_close(seeded(constant, model, guide, x), value[1])


@LOSS
def test_one_vectorized_run_is_many_single_ones(loss):
    model, guide, x = build("full_rank")
    wrt, noise = parameters(model, guide), torch.randn(loss.num_samples, 8, 2)
    outcomes = []
    for model.vectorized in (True, False):
        with Noise(noise):
            value = loss(model, guide, x)
        outcomes.append((value.detach(), gradient(value, wrt)))
    torch.testing.assert_close(*outcomes, rtol=1e-11, atol=1e-12)


def test_looking_at_the_plates_moves_no_buffer():
    model, guide, x = build()
    model.decoder = nn.Sequential(model.decoder, nn.BatchNorm1d(3))
    ELBO(num_samples=4)(model, guide, x)
    assert int(model.decoder[1].num_batches_tracked) == 1 and model.training


def with_global(x, rows):
    with poutine.scale(scale=0.5):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 8, subsample=rows):
        with poutine.scale(scale=0.25):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        fn = dist.Normal(z.sum(-1, keepdim=True) + w.sum(), 0.5)
        pyro.sample("x", fn.to_event(1), obs=x)


class TwoPart(nn.Module):
    """A guide for one global and one local latent."""

    def __init__(self):
        super().__init__()
        self.loc, self.net = nn.Parameter(torch.randn(3)), nn.Linear(3, 4)

    def forward(self, x, rows):
        pyro.sample("w", dist.Normal(self.loc, 0.5).to_event(1))
        with pyro.plate("data", 8, subsample=rows):
            loc, raw = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


@pytest.mark.parametrize("way", ["batch", "rows", "global"])
@LOSS
def test_half_batches_average_to_the_full_one(loss, way):
    """Value and gradient, the draws of each datum held fixed, whatever says the number of data."""
    x, rows = torch.randn(8, 3), torch.arange(8)
    noise, other = torch.randn(loss.num_samples, 8, 2), torch.randn(loss.num_samples, 3)
    args, size = (x, rows), None
    if way == "batch":
        (model, guide, _), args, size = build(), (x,), 8
    elif way == "rows":
        model, _, encoder, _ = cases()["told rows"]
        model = poutine.scale(model, scale=0.5)
        guide = FamilyGuide(model, families.mean_scale, encoder).setup(x[:4], rows[:4])
    else:
        model, guide = with_global, TwoPart()
        if isinstance(loss, IWAE):
            with pytest.raises(ValueError, match=r"all sites in the plate 'data'.*\['w'\]"):
                loss(model, guide, *args)
            return

    def of(part):
        with Noise(noise[:, part], other):
            return loss(model, guide, *(arg[part] for arg in args), size=size)

    whole, halves = of(rows), (of(rows[:4]) + of(rows[4:])) / 2
    torch.testing.assert_close(whole, halves, rtol=1e-12, atol=0)
    wrt = [p for p in parameters(guide) if p.requires_grad]
    torch.testing.assert_close(gradient(whole, wrt), gradient(halves, wrt), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("family", ["deterministic", "mean_scale", "full_rank"])
@LOSS
def test_a_scale_around_the_whole_model_scales_the_loss(loss, family):
    """The guide knows nothing of it, and its joint draw belongs to two sites of the model."""
    case = cases()["positive"]
    guide = FamilyGuide(case.model, families.LADDER[family], case.encoder).setup(*case.args)
    if family == "deterministic" and isinstance(loss, IWAE):
        return
    scaled = seeded(loss, poutine.scale(case.model, scale=0.25), guide, *case.args)
    torch.testing.assert_close(scaled, 0.25 * seeded(loss, case.model, guide, *case.args))
    weights = torch.linspace(0.5, 2, 6)
    one = seeded(loss, poutine.scale(case.model, scale=weights), guide, *case.args)
    assert torch.isfinite(one)


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_a_scale_around_a_latent_scales_its_rate(kl):
    def model(x, scale=0.25):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=scale):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    x = torch.randn(6, 3)
    guide = FamilyGuide(model, families.mean_scale, mlp(3, 8)).setup(x)
    value = seeded(ELBO(kl=kl), model, guide, x)
    plain = poutine.scale(model, scale=1.0)
    expected = seeded(ELBO(beta=0.25, kl=kl), lambda x: plain(x, scale=1.0), guide, x)
    torch.testing.assert_close(value, expected)
    with pytest.raises(ValueError, match=r"one poutine.scale around all sites, got \{'z': 0.25"):
        IWAE()(model, guide, x)


@pytest.mark.parametrize("loss", [ELBO(kl="sampled"), ELBO(free_bits=1e-300), IWAE(2)])
def test_what_the_model_masks_counts_nothing(loss):
    """A masked latent has no rate, and the guide is not paid for spreading there."""

    def model(x, mask=True):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    x, mask = torch.randn(6, 3), torch.tensor([True, False, True, True, False, True])
    guide = FamilyGuide(model, families.mean_scale, mlp(3, 8)).setup(x)
    noise = torch.randn(2, 6, 2)
    with Noise(noise[: loss.num_samples]):
        masked = loss(poutine.mask(model, mask=mask), guide, x)
    with Noise(noise[: loss.num_samples, mask]):
        expected = loss(model, guide, x[mask]) * 4 / 6
    torch.testing.assert_close(masked, expected)


def two_latents(x, mask_a=None, mask_b=None):
    def sample(name, fn, mask):
        return pyro.sample(name, fn if mask is None else fn.mask(mask))

    with pyro.plate("data", len(x)):
        a = sample("a", dist.Normal(torch.zeros(()), 1.0), mask_a)
        b = sample("b", dist.LogNormal(torch.zeros(()), 1.0), mask_b)
        pyro.sample("x", dist.Normal(a, b), obs=x[:, 0])


def test_a_joint_draw_counts_nothing_for_the_rows_that_all_its_latents_are_masked_in():
    """Of the others it counts what it counts of them alone, its log-determinant, too."""
    x, mask = torch.randn(6, 1), torch.tensor([True, False, True, True, False, True])
    guide = FamilyGuide(two_latents, families.full_rank, encoder=mlp(1, 4)).setup(x)
    with poutine.trace() as trace:
        guide(x)
    whole = partial(poutine.replay, trace=trace.trace)

    def log_guide(mask):
        model = poutine.trace(whole(two_latents)).get_trace(x, mask, mask)
        return sum(terms(model, trace.trace).log_guide.values())

    torch.testing.assert_close(log_guide(mask), log_guide(None) * mask)
    every = torch.ones(6, dtype=torch.bool)
    torch.testing.assert_close(log_guide(every), log_guide(None))
    with poutine.trace() as other:
        whole(two_latents)(x, every)
    torch.testing.assert_close(
        sum(terms(other.trace, trace.trace).log_guide.values()), log_guide(None)
    )


@pytest.mark.parametrize("kind", ["full_rank", "flow", AutoMultivariateNormal])
def test_a_joint_draw_of_latents_that_are_masked_differently_is_refused(kind):
    """The density of the part that is not masked would be wanted."""
    mask = torch.tensor([True, False, True])
    told = {"mask_b": mask}
    guide = kind(two_latents) if callable(kind) else FamilyGuide(two_latents, kind, mlp(1, 4))
    with pytest.raises(ValueError, match="drawn one by one where the model masks some.*'b'"):
        negative_elbo(partial(two_latents, **told), guide, torch.randn(3, 1))
    one_by_one = FamilyGuide(two_latents, families.mean_scale, mlp(1, 4))
    assert negative_elbo(partial(two_latents, **told), one_by_one, torch.randn(3, 1)).isfinite()


# --- many draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["noise_only", "mean_scale", "student_t", "full_rank", "flow"])
@pytest.mark.parametrize("case", CASES)
def test_one_draw_is_the_elbo_with_sampled_kl(case, family, kind):
    """The same value and gradient; if doubly reparametrized, but for the score of the guide.

    The score, of mean zero, is the slope of log q in the parameters with the draws held fixed.
    """
    model, args, encoder, _ = cases()[case]
    guide = FamilyGuide(model, DENSITIES[family], encoder).setup(*args)
    value = seeded(IWAE(1, kind), model, guide, *args)
    elbo = seeded(ELBO(kl="sampled"), model, guide, *args)
    torch.testing.assert_close(value, elbo, rtol=1e-9, atol=1e-9)
    if family == "noise_only":
        return
    wrt = parameters(guide)
    expected = gradient(elbo, wrt)
    if kind == "doubly_reparametrized":
        trace = seeded(poutine.trace(guide).get_trace, *args)
        for _, node in trace.iter_stochastic_nodes():
            node["value"] = node["value"].detach()
        again = poutine.trace(poutine.replay(guide, trace=trace)).get_trace(*args)
        expected -= gradient(again.log_prob_sum() / (24 if case == "told rows" else 6), wrt)
    torch.testing.assert_close(gradient(value, wrt), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", [IWAE(1), IWAE(7), ELBO(kl="sampled", num_samples=4)])
def test_with_the_exact_guide_every_draw_gives_the_likelihood(loss):
    """A linear-Gaussian VAE has its posterior and its evidence in closed form."""
    known = Linear(size=8)
    guide, expected = known.exact(), torch.as_tensor(-known.log_p.mean()).expand(3)
    value = [seeded(loss, known.model, guide, known.x, seed=seed) for seed in range(3)]
    torch.testing.assert_close(torch.stack(value), expected, rtol=1e-12, atol=0)


def test_all_draws_are_for_the_rows_that_the_plate_drew():
    """With the exact guide the loss is that of one of the data, and no mixture."""
    x = torch.tensor([0.0, 2.0, 5.0])

    def model(x):
        with pyro.plate("data", 3, subsample_size=1) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", 3, subsample_size=1) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    singles = -dist.Normal(0.0, 2**0.5).log_prob(x)
    for model.vectorized in (False, True):
        value = torch.stack([IWAE(5)(model, guide, x) for _ in range(20)])
        nearest = (value[:, None] - singles).abs().min(-1)
        assert nearest.values.max() < 1e-12 and nearest.indices.unique().numel() == 3


@pytest.mark.parametrize("vectorized", [True, False])
def test_global_latents_have_one_weight_for_all_the_data(vectorized):
    """With the exact posterior every draw gives the evidence; a part of the data cannot."""
    X, y, priors = (
        torch.randn(9, 2),
        torch.randn(9),
        {"weight": dist.Normal(0.0, 1.0), "noise": 0.5},
    )
    exact, model = exact_posterior(X, y, **priors), LinearRegression(2, **priors)
    posterior = dist.MultivariateNormal(*map(torch.as_tensor, (exact.mean, exact.covariance)))

    def guide(X, y):
        pyro.sample("weight", posterior)

    model.vectorized = vectorized
    for kind in KINDS:
        value = IWAE(4, kind)(model, guide, X, y, size=9)
        assert value.item() == pytest.approx(-exact.log_evidence / 9, rel=1e-11)
    with pytest.raises(ValueError, match="expected all 18 data in one batch.*got 9"):
        IWAE()(model, guide, X, y, size=18)


def test_dreg_follows_draws_that_follow_from_others():
    """By hand, exactly: with the explicit parameters of log q held fixed, and squared weights.

    A parameter of the model has the gradient of the bound.
    """
    x, noise = torch.randn(5), torch.randn(3, 3, 5)
    a, b, c, d = wrt = [torch.randn((), requires_grad=True) for _ in range(4)]
    spread = torch.tensor(0.7, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            u, v, w = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "uvw")
            pyro.sample("x", dist.Normal(u + v * w, spread), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(a * x, d.exp()))
            v = pyro.sample("v", dist.Normal(b * u + c * x, 0.5))
            pyro.sample("w", dist.Normal(d * u * v, (b * v).exp()))

    with Noise(noise.reshape(9, 5)):
        value = IWAE(3, "doubly_reparametrized")(model, guide, x)
    e, f, g = noise.unbind(1)
    u = a * x + d.exp() * e
    v = b * u + c * x + 0.5 * f
    w = d * u * v + (b * v).exp() * g
    A, B, C, D = (p.detach() for p in wrt)
    log_q = dist.Normal(A * x, D.exp()).log_prob(u) + dist.Normal(B * u + C * x, 0.5).log_prob(v)
    log_q = log_q + dist.Normal(D * u * v, (B * v).exp()).log_prob(w)
    log_p = sum(dist.Normal(0.0, 1.0).log_prob(z) for z in (u, v, w))
    log_w = log_p + dist.Normal(u + v * w, spread).log_prob(x) - log_q
    share = log_w.softmax(0).detach()
    expected = -(share**2 * log_w).sum(0).mean()
    bound = -(log_w.logsumexp(0) - math.log(3)).mean()
    torch.testing.assert_close(value, bound)
    slopes = torch.cat([gradient(expected, wrt), gradient(bound, [spread])])
    torch.testing.assert_close(gradient(value, [*wrt, spread]), slopes, rtol=1e-10, atol=0)


def test_dreg_runs_a_guide_with_dropout_once():
    model, guide, x = build()
    guide.encoder = nn.Sequential(guide.encoder, nn.Dropout(0.5))
    value = [seeded(IWAE(3, kind), model, guide, x) for kind in KINDS]
    torch.testing.assert_close(value[0], value[1], rtol=1e-12, atol=0)


# --- free bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_free_bits_lift_each_coordinate_to_the_floor(beta):
    """The maximum is of the mean over the batch; below it the guide's coordinate feels no rate."""
    model, guide, x = build()
    fn = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].base_dist
    rate = ((fn.loc**2 + fn.scale**2 - 1) / 2 - fn.scale.log()).mean(0)
    floor = rate.detach().mean().item()
    assert rate.min() < floor - 0.01 < floor + 0.01 < rate.max()
    loss = [seeded(ELBO(beta=b, free_bits=f), model, guide, x) for b, f in ((0, 0), (beta, floor))]
    expected = beta * (rate.max() + floor)
    torch.testing.assert_close(loss[1] - loss[0], expected)
    head = guide.heads["z"].loc.linear.bias
    (slope,) = torch.autograd.grad(loss[1] - loss[0], head)
    low = int(rate.argmin())
    assert abs(slope[low]) < 1e-15 and abs(slope[1 - low]) > 1e-3


# how many floors count per datum: coordinates where the divergence splits, sites where not (through
# a transform, or a plate to the left); global latents count once for all 6 data
FLOORS = {
    "one vector": 2,
    "one scalar": 1,
    "positive": 2,
    "simplex": 2,
    "left of pixels": 2,
    "right of steps": 1,
    "steps inside": 3,
    "told rows": 2,
    "own rows": 2,
    "regression": (3 + 1) / 6,
    "hierarchy": (1 + 4) / 6,
}


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_a_floor_above_every_rate_counts_the_latents(case, kl):
    """The loss is then the distortion and the floors, all halved here; a joint draw has one."""
    model, args, encoder, _ = cases()[case]
    for family, count in {"mean_scale": FLOORS[case], "full_rank": 1 if encoder else 1 / 6}.items():
        guide = FamilyGuide(model, families.LADDER[family], encoder).setup(*args)
        high, none = (
            seeded(loss, poutine.scale(model, scale=0.5), guide, *args)
            for loss in (ELBO(kl=kl, free_bits=1e4, num_samples=2), ELBO(beta=0, num_samples=2))
        )
        assert (high - none).item() == pytest.approx(0.5e4 * count, rel=1e-9)


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("family", ["mean_scale", "full_rank"])
@pytest.mark.parametrize(
    "case", ["one vector", "positive", "hierarchy", "right of steps", "steps inside"]
)
def test_a_floor_below_every_rate_changes_nothing(case, family, kl):
    """Also with several draws and a scale, and for each shape of plates."""
    case = cases()[case]
    model = poutine.scale(case.model, scale=0.5)
    guide = FamilyGuide(case.model, families.LADDER[family], case.encoder).setup(*case.args)
    for name, p in guide.named_parameters():  # N(1.5, 1), so that each rate is above the floor
        p.data.fill_(1.5 if ".loc." in name and name.endswith(("bias", "raw")) else 0.0)
    low, none = (
        seeded(ELBO(kl=kl, free_bits=f, num_samples=4), model, guide, *case.args) for f in (1e-9, 0)
    )
    torch.testing.assert_close(low, none, rtol=1e-12, atol=0)


# --- fit, and what is refused ---------------------------------------------------------------------


def test_an_objective_gets_the_number_of_data_and_of_steps():
    calls = []

    def objective(model, guide, *args, size=None, step=0):
        calls.append((len(args[0]), size, step))
        return negative_elbo(model, guide, *args, size=size)

    *pair, x = build()
    fit(*pair, x, objective=objective, num_epochs=3, batch_size=4, progress=False)
    # one call before, and in the first step a second look, with Pyro's checks on
    assert calls == [(4, 8, 0), (4, 8, 0), *((4, 8, step) for step in range(6))]


def test_only_the_plain_elbo_goes_to_the_quasi_newton_method():
    x, model, results = torch.randn(9, 2), LinearRegression(2, noise=1.0), []
    for objective in (None, ELBO(), ELBO(beta=2.0), IWAE(2)):
        guide = FamilyGuide(model, families.full_rank)
        options = {"objective": objective, "num_epochs": 2, "seed": 0, "progress": False}
        results.append(fit(model, guide, (x, x.sum(-1)), **options))
    methods, converged = ["L-BFGS"] * 2 + ["stochastic gradient"] * 2, [True, True, None, None]
    assert [result.method for result in results] == methods
    assert [result.converged for result in results] == converged


POINTS = r"guide: expected a density for every latent site, got .* \['z'\] are points"
REFUSED = [
    (lambda: ELBO(beta=-1), "beta: expected a finite number of at least 0, got -1"),
    (lambda: ELBO(beta=math.nan), "beta: expected a finite number of at least 0, got nan"),
    (lambda: ELBO(beta=torch.tensor(math.nan)), "beta: .* finite number of at least 0, got nan"),
    (lambda: ELBO(free_bits=torch.ones(2)), r"free_bits: .* or a tensor of one, got shape \(2,\)"),
    (lambda: ELBO(beta="1"), "beta: expected a finite number of at least 0, got '1'"),
    (lambda: ELBO(lambda step: 1.0 - step)(*build(), step=2), "beta: .* at least 0, got -1.0"),
    (lambda: ELBO(free_bits=-0.1), "free_bits: expected a finite number of at least 0"),
    (lambda: ELBO(free_bits=0.1)(*build("deterministic")), "free_bits: .* draws only points"),
    (lambda: ELBO(kl="closed"), r"kl: expected one of \['analytic', 'sampled'\], got 'closed'"),
    (lambda: ELBO(num_samples=0), "num_samples: expected a whole number of at least 1, got 0"),
    (lambda: IWAE(2.5), "num_samples: expected a whole number of at least 1, got 2.5"),
    (lambda: IWAE(2, "dreg"), r"gradient: expected one of \['pathwise', .*\], got 'dreg'"),
    (lambda: IWAE(2)(*build("deterministic")), POINTS),
    (lambda: IWAE(2, "doubly_reparametrized")(*build("deterministic")), POINTS),
    (lambda: warm_up(0), "steps: expected a whole number of at least 1, got 0"),
    (lambda: warm_up(5, start=-1.0), "start: expected a finite number of at least 0, got -1.0"),
    (lambda: warm_up(5, end=math.inf), "end: expected a finite number of at least 0, got inf"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@LOSS
def test_programs_that_do_not_fit_are_refused(loss):
    def model(x):
        with pyro.plate("data", len(x)):
            z, w = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "zw")
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    def guide(x, fn, names):
        with pyro.plate("data", len(x)):
            for name in names:
                pyro.sample(name, fn)

    normal, coin = dist.Normal(0.0, 1.0), dist.Bernoulli(logits=torch.zeros((), requires_grad=True))
    for fn, names, options, message in [
        (normal, "z", {}, r"misses \['w'\]"),
        (normal, "zw", {"plate": "rows"}, r"plate: expected one of \['data'\], got 'rows'"),
        (coin, "zw", {}, "'z' is drawn from Bernoulli"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(model, partial(guide, fn=fn, names=names), torch.randn(4), **options)


@pytest.mark.parametrize("size", [0, -1, 2.5, math.nan, "x", True])
@pytest.mark.parametrize("loss", [negative_elbo, ELBO(), IWAE(2)])
def test_the_number_of_data_is_a_whole_one(loss, size):
    with pytest.raises(ValueError, match="^size: expected a whole number of at least 1, got"):
        loss(*build(), data(), size=size)
