"""Where likelihoods start, what they draw, what they bear, and tables of mixed kinds.

Their densities are held against those written out in `cases.py`, by `models/test_vae.py`.
"""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import LIKELIHOODS
from scipy import special, stats

from ppvae import VAE, FamilyGuide, evaluate, families, fit, from_pyro_svi, likelihoods
from ppvae.likelihoods.negative_binomial import Overdispersed
from ppvae.likelihoods.poisson import LogPoisson
from ppvae.likelihoods.zero_inflated import Inflated
from ppvae.nn import mlp

COUNTS = np.array([[0.0, 3.0], [2.0, 40.0], [1.0, 0.0], [5.0, 12.0]])
SHARES = np.array([[0.2, 0.9], [0.3, 0.8], [0.25, 0.99]])
CODES = np.array([[0.0, 2.0], [1.0, 2.0], [0.0, 1.0]])
REAL = np.random.default_rng(0).normal(size=(50, 2)) * [3.0, 0.01] + [100.0, -1.0]

#: the likelihood from the data, and what it then says of each column for an output of zeros
STARTS = {
    "normal": (lambda: likelihoods.Normal.of(REAL, learned=True), REAL.mean(0), REAL.var(0)),
    "per datum": (lambda: likelihoods.Normal.of(REAL, per_datum=True), REAL.mean(0), REAL.var(0)),
    "fixed": (lambda: likelihoods.Normal.of(REAL, scale=0.5), REAL.mean(0), REAL.var(0) / 4),
    "laplace": (lambda: likelihoods.Laplace.of(REAL, learned=True), REAL.mean(0), 2 * REAL.var(0)),
    "student": (
        lambda: likelihoods.StudentT.of(REAL, df=4.0, learned=True), REAL.mean(0), 2 * REAL.var(0)
    ),
    "bernoulli": (lambda: likelihoods.Bernoulli.of(CODES.clip(0, 1)), [1.5 / 4, 3.5 / 4], None),
    "poisson": (lambda: likelihoods.Poisson.of(COUNTS), (COUNTS.sum(0) + 0.5) / 4, None),
    "counts": (
        lambda: likelihoods.NegativeBinomial.of(COUNTS),
        (COUNTS.sum(0) + 0.5) / 4,
        COUNTS.var(0),
    ),
    "beta": (lambda: likelihoods.Beta.of(SHARES), SHARES.mean(0), SHARES.var(0)),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_made_from_data_it_starts_at_their_location_and_scale(name):
    make, mean, variance = STARTS[name]
    made = make()
    fn = made(torch.zeros(3, made.size(2)))
    assert fn.batch_shape == (3, 2)
    assert np.allclose(fn.mean[0].detach(), mean)
    if (
        name == "counts"
    ):  # the first column varies less than a Poisson's, up to the least dispersion
        variance = np.maximum(variance, mean + 0.01 * np.square(mean))
    assert variance is None or np.allclose(fn.variance[0].detach(), variance)


def test_categories_and_grades_start_at_the_shares_of_each_column():
    smooth = np.array([[2.5, 1.5, 0.5], [0.5, 1.5, 2.5]]) / 4.5
    for made in (likelihoods.Categorical.of(CODES, categories=3),
                 likelihoods.Ordinal.of(CODES, categories=3)):  # fmt: skip
        fn = made(torch.zeros(5, made.size(2)))
        assert np.allclose(fn.probs.detach(), np.broadcast_to(smooth, (5, 2, 3)))
    logs = np.exp(REAL / 100)
    fn = likelihoods.LogNormal.of(logs, learned=True)(torch.zeros(1, 2))
    assert np.allclose(fn.base_dist.loc.detach(), np.log(logs).mean(0))
    assert np.allclose(fn.base_dist.scale.detach(), np.log(logs).std(0))
    zeros = likelihoods.ZeroInflated.of(COUNTS, counts=likelihoods.Poisson())
    fn = zeros(torch.zeros(1, 4))
    assert np.allclose(fn.mean.detach(), (COUNTS.sum(0) + 0.5) / 4 * special.expit(2))
    grey = likelihoods.ContinuousBernoulli.of(SHARES)(torch.zeros(1, 2))
    assert np.allclose(grey.probs, (SHARES.sum(0) + 0.5) / 4)


def test_a_learned_scale_does_not_run_to_zero_where_the_data_are_known():
    made = likelihoods.Normal.of(REAL, learned=True)
    with torch.no_grad():
        made.log_scale.sub_(100.0)
    assert np.allclose(made.scale.detach(), 1e-3 * REAL.std(0))
    always = likelihoods.Normal.of(np.ones((4, 1)), learned=True)  # a column without any spread
    assert always.scale.item() == 1.0


@pytest.mark.parametrize("dispersion", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("mean", [1e-3, 1.0, 1e3, 1e6])
def test_large_counts_in_single_precision(dispersion, mean):
    """Against SciPy in double precision; the numbers given are rounded to single, as are these."""
    counts = torch.tensor([0.0, 1.0, 7.0, 1e3, 1e6], dtype=torch.float32)
    log_mean = torch.tensor(math.log(mean), dtype=torch.float32, requires_grad=True)
    log_dispersion = torch.tensor(math.log(dispersion), dtype=torch.float32, requires_grad=True)
    mu, alpha = log_mean.double().exp().item(), log_dispersion.double().exp().item()
    log_p = Overdispersed(log_mean, log_dispersion).log_prob(counts)
    x = counts.double().numpy()
    expected = stats.nbinom.logpmf(x, 1 / alpha, 1 / (1 + alpha * mu))
    # SciPy's own error, of gamma functions of 1 / alpha, is below 1e-7 of the largest of them
    own = 1e-9 * special.gammaln(1 / alpha + x) if alpha < 1e-3 else 0.0
    assert (abs(log_p.detach().numpy() - expected) <= 1e-5 * abs(expected) + 1e-5 + abs(own)).all()
    assert log_p.dtype == torch.float32
    gradients = torch.autograd.grad(log_p.sum(), [log_mean, log_dispersion])
    assert all(torch.isfinite(g) for g in gradients)
    exact = ((counts.double() - mu) / (1 + alpha * mu)).sum()  # the slope in log mean
    assert gradients[0].item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-4)
    poisson = LogPoisson(log_mean).log_prob(counts)
    expected = stats.poisson.logpmf(x, mu)
    assert (abs(poisson.detach().numpy() - expected) <= 1e-6 * abs(expected) + 1e-6).all()


def test_counts_overflow_nothing():
    huge = torch.tensor([200.0, -200.0], dtype=torch.float32, requires_grad=True)
    for fn in (Overdispersed(huge, torch.tensor(0.0)),
               Inflated(Overdispersed(huge, torch.tensor(0.0)), huge.flip(0))):  # fmt: skip
        log_p = fn.log_prob(torch.tensor([3.0, 3.0]))
        assert torch.isfinite(log_p).all()
        assert torch.isfinite(torch.autograd.grad(log_p.sum(), huge)[0]).all()


BITS = torch.tensor([0.0, 1e-9, -1e-3, 0.5, -3.0, 20.0, -20.0, 79.9, 80.1, -100.0, 1e4, -1e4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 784), (3, 5, 7), (40, 9, 784), (4, 70, 28, 35)])
def test_the_density_of_bits_with_and_without_gradients(shape, dtype):
    """Against log(1 + exp(s)) by NumPy in double precision, of logits moderate and extreme.

    A sum over n elements that are worked out to some units of rounding, u, is right to 8 n u and
    8 u of the sum of their sizes.
    """
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape, dtype=dtype)
    logits[0] = BITS.to(dtype)[torch.randint(len(BITS), shape[1:])]
    events = 1 if len(shape) < 3 or shape[-1] == 784 else 2
    value = (torch.rand(shape[-events - 1 :]) < 0.4).to(dtype)
    turned = (logits * (1 - 2 * value)).double().numpy()
    each = -np.logaddexp(0, turned)
    fn = likelihoods.Bernoulli()(logits.requires_grad_())
    axes, unit = tuple(range(-events, 0)), torch.finfo(dtype).eps
    size = abs(each).sum(axes) + np.prod(shape[-events:])
    sums = fn.to_event(events).log_prob(value)
    with torch.no_grad():
        fast = fn.to_event(events).log_prob(value)
        assert (abs(fn.log_prob(value).numpy() - each) <= 8 * unit * (1 + abs(each))).all()
    for found in (sums.detach(), fast):
        assert (found.dtype, found.shape) == (dtype, logits.shape[:-events])
        assert (abs(found.numpy() - each.sum(axes)) <= 8 * unit * size).all()
    (slope,) = torch.autograd.grad(sums.sum(), logits)
    exact = value.double() - logits.detach().double().sigmoid()
    assert (slope - exact).abs().max() <= 8 * unit


def test_bits_in_other_shapes_and_in_half_precision():
    """Data with dims that the logits lack, parts of an event, and elements that are left out."""
    torch.manual_seed(0)
    with torch.no_grad():
        logits, value = torch.randn(4, 300).double(), (torch.rand(4, 300) < 0.5).double()
        fn, wide = likelihoods.Bernoulli()(logits), value.expand(2, 4, 300)
        plain, rounding = dist.Bernoulli(logits=logits), {"rtol": 1e-12, "atol": 1e-12}
        for mine, other in ((fn.to_event(1), plain.to_event(1)), (fn.to_event(), plain.to_event())):
            for x in (value, wide, value[0]):
                assert torch.allclose(mine.log_prob(x), other.log_prob(x), **rounding)
        assert torch.allclose(fn.to_event(0).log_prob(value), plain.log_prob(value), **rounding)
        seen = torch.rand(4, 300) < 0.5
        masked = fn.mask(seen).to_event(1).log_prob(value)
        assert torch.allclose(masked, (plain.log_prob(value) * seen).sum(-1), **rounding)
        more = fn.to_event(1).expand((3, 4)).log_prob(value)
        assert more.shape == (3, 4) and torch.equal(more[0], more[2])
        grey = torch.rand(4, 300)  # as one trains on, without checks: the cross-entropy
        with pytest.raises(ValueError, match="within the support"):
            fn.to_event(1).log_prob(grey)
        fn._validate_args = plain._validate_args = False
        mine, other = fn.to_event(1).log_prob(grey), plain.to_event(1).log_prob(grey)
        assert torch.allclose(mine, other, **rounding)
        half = likelihoods.Bernoulli()(logits.half()).to_event(1).log_prob(value.half())
        assert torch.allclose(half.double(), plain.log_prob(value).sum(-1), rtol=1e-2)


DRAWN = {
    "poisson": lambda: LogPoisson(torch.tensor([-1.0, 2.0])),
    "counts": lambda: Overdispersed(torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 0.5])),
    "zeros": lambda: Inflated(LogPoisson(torch.tensor([0.5, 2.0])), torch.tensor([-1.0, 0.5])),
    "beta": lambda: likelihoods.Beta(3.0)(torch.tensor([0.5, -2.0])),
    "student": lambda: likelihoods.StudentT(20.0, scale=0.5)(torch.tensor([0.5, -2.0])),
    "mixed": lambda: likelihoods.Mixed(
        {1: likelihoods.Normal(0.5), 0: likelihoods.Poisson()}
    )(torch.tensor([0.5, 1.0])),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_draws_have_the_mean_and_variance_and_the_density_sums_to_one(name):
    """Of 20,000 draws within five standard errors, by the spread of the draws themselves."""
    with torch.no_grad():
        fn = DRAWN[name]()
        x = fn.sample((20_000,))
        error = (x.var(0) / 20_000).sqrt()
        assert x.shape == (20_000, 2) and ((x.mean(0) - fn.mean).abs() < 5 * error).all()
        spread = (x - fn.mean).square()
        error = (spread.var(0) / 20_000).sqrt()
        assert ((spread.mean(0) - fn.variance).abs() < 5 * error).all()
        assert fn.support.check(x).all() and x.dtype == fn.mean.dtype
        wide = fn.expand((3, 2))
        assert wide.batch_shape == (3, 2) and wide.sample((4,)).shape == (4, 3, 2)
        assert torch.equal(wide.log_prob(x[:3]), fn.log_prob(x[:3]))
        if name in ("poisson", "counts", "zeros"):
            total = fn.log_prob(torch.arange(3000.0)[:, None].expand(-1, 2)).exp().sum(0)
            assert torch.allclose(total, torch.ones(2), atol=1e-6)


TABLE = np.column_stack([REAL, np.arange(50) % 3, np.arange(50) % 2, np.arange(50) ** 2 % 7])


def mixed(**options):
    parts = {
        (0, 1): likelihoods.Normal(learned=True),
        2: likelihoods.Categorical(3),
        (3,): likelihoods.Bernoulli(),
        range(4, 5): likelihoods.ZeroInflated(likelihoods.NegativeBinomial()),
    }
    return likelihoods.Mixed.of(TABLE, parts=parts, **options)


def test_a_table_of_mixed_columns():
    """The density is the sum of its parts, and a fit from the start of the data goes down."""
    made, x = mixed(), torch.as_tensor(TABLE)
    assert made.size() == 2 + 3 + 1 + 2
    output = torch.randn(50, 8)
    alone = [part(o) for part, o in zip(made.parts, output.split([2, 3, 1, 2], -1), strict=True)]
    columns = ([0, 1], [2], [3], [4])
    expected = [fn.log_prob(x[:, c]) for fn, c in zip(alone, columns, strict=True)]
    assert torch.equal(made(output).log_prob(x), torch.cat(expected, -1))
    model = VAE(mlp(2, 8, out=made.size()), 2, made)
    guide = FamilyGuide(model, families.mean_scale, mlp(5, 8))
    start = fit(model, guide, x, num_epochs=1, progress=False).losses[0]
    assert (
        fit(model, guide, x, num_epochs=100, learning_rate=0.01, progress=False).losses[-1] < start
    )


def test_a_second_table_does_not_move_the_likelihood_of_the_first():
    """The same parts may be told to start at two tables: each likelihood has its own."""
    parts = {0: likelihoods.Normal(learned=True)}
    first = likelihoods.Mixed.of(np.array([[49.0], [51.0]]), parts=parts)
    likelihoods.Mixed.of(np.array([[-49.0], [-51.0]]), parts=parts)
    assert first(torch.zeros(1, 1)).mean == 50.0
    assert parts[0](torch.zeros(1, 1)).mean == 0.0  # nor are the parts that were given


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_every_likelihood_is_evaluated_exported_and_loaded(kind):
    torch.manual_seed(0)
    made, x = LIKELIHOODS[kind].make(), LIKELIHOODS[kind].draw(12, 4)
    model = VAE(mlp(2, 8, out=made.size(4)), 2, made)
    guide = FamilyGuide(model, families.mean_scale, mlp(4, 8))
    found = evaluate(model, guide, x, num_samples=4, progress=False)
    assert np.isfinite(found.elbo).all()
    tree = from_pyro_svi(model, guide, x, num_samples=3, seed=0)
    assert tree.posterior_predictive["x"].shape == (1, 3, 12, 4)
    assert np.isfinite(tree.log_likelihood["x"]).all()
    twin = VAE(mlp(2, 8, out=made.size(4)), 2, LIKELIHOODS[kind].make())
    twin.load_state_dict(model.state_dict())
    output = torch.randn(3, made.size(4))
    with torch.no_grad():
        x = made(output).sample()
        assert torch.equal(twin.likelihood(output).log_prob(x), made(output).log_prob(x))


REFUSED = [
    (lambda: likelihoods.Poisson.of([[1.0, 2.0], [0.0, 2.5]]),
     r"data: expected whole numbers of at least 0, got 2.5 in row 1, column 1"),
    (lambda: likelihoods.Bernoulli.of([[1.0], [2.0]]), "data: expected zeros and ones, got 2"),
    (lambda: likelihoods.Beta.of([[1.0], [0.2]]), "data: expected numbers between 0 and 1, got 1"),
    (lambda: likelihoods.LogNormal.of([[0.0]]), "data: expected positive numbers, got 0 in row 0"),
    (lambda: likelihoods.ContinuousBernoulli.of([[1.1]]), r"numbers in \[0, 1\], got 1.1 in row 0"),
    (lambda: likelihoods.Categorical.of([[3.0]], categories=3), "whole numbers from 0 to 2, got 3"),
    (lambda: likelihoods.Ordinal.of([[-1.0]], categories=3), "whole numbers from 0 to 2, got -1"),
    (lambda: likelihoods.Normal.of([[math.nan]]), "an entry in each column, got none in column 0"),
    (lambda: likelihoods.Normal.of([[math.inf]]), "finite numbers, or NaN .*, got 1 infinite ones"),
    (lambda: likelihoods.Normal.of([1.0]), r"data: expected shape \(rows, \*event\), got \(1,\)"),
    (lambda: likelihoods.Normal.of(REAL)(torch.zeros(3, 3)), r"an output for columns \(2,\), got"),
    (lambda: likelihoods.Categorical(3)(torch.zeros(3, 4)), "is 3 times the columns, got"),
    (lambda: likelihoods.Categorical(1), "categories: expected a whole number of at least 2"),
    (lambda: likelihoods.NegativeBinomial(0.0), "dispersion: expected positive finite numbers"),
    (lambda: likelihoods.Beta(math.inf), "concentration: expected positive finite numbers"),
    (lambda: likelihoods.StudentT(0.0), "df: expected a finite positive number, got 0.0"),
    (lambda: likelihoods.Normal(learned=True, per_datum=True), "per_datum: expected False where"),
    (lambda: likelihoods.ZeroInflated(dist.Poisson), "counts: expected a likelihood of counts"),
    (lambda: likelihoods.Mixed({}), "parts: expected"),
    (lambda: likelihoods.Mixed({"a": likelihoods.Poisson()}), "parts: expected columns, who"),
    (lambda: likelihoods.Mixed({0: 1}), "parts: expected a likelihood for columns 0, got int"),
    (lambda: likelihoods.Mixed({1: likelihoods.Poisson()}), r"each of the columns 0, 1, .*\[1\]"),
    (lambda: mixed()(torch.zeros(2, 9)), "decoder: expected 8 outputs, which the col"),
    (lambda: mixed().begin(TABLE[:, :4]), r"data: expected 5 columns, got \(50, 4\)"),
    (lambda: mixed().begin(TABLE + 0.5), r"numbers from 0 to 2, .* column 0 of columns \[2\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_data_that_a_column_cannot_take_are_refused_before_training():
    made = mixed()
    model = VAE(mlp(2, 8, out=made.size()), 2, made)
    guide, x = FamilyGuide(model, families.mean_scale, mlp(5, 8)), torch.as_tensor(TABLE)
    x[7, 2] = 5.0
    message = r"support of 'x', columns \[0, 1\]: Real\(\); .* got 1 of 50 data .* row 7, column 2"
    with pytest.raises(ValueError, match=message):
        fit(model, guide, x, num_epochs=1, progress=False)


def test_a_state_with_a_start_is_not_that_of_one_without():
    own, other = likelihoods.Poisson(), likelihoods.Poisson.of(COUNTS)
    for one, two in ((own, other), (other, own)):
        with pytest.raises(ValueError, match="likelihood: expected a state with"):
            one.load_state_dict(two.state_dict())
    for one, two in (
        (likelihoods.StudentT(3.0), likelihoods.StudentT(4.0)),
        (likelihoods.Ordinal(3), likelihoods.Categorical(3)),
        (likelihoods.Beta(2.0, learned=False), likelihoods.Beta(3.0, learned=False)),
        (likelihoods.ZeroInflated(own), likelihoods.ZeroInflated(likelihoods.NegativeBinomial())),
        (likelihoods.Mixed({(0, 1): own}), likelihoods.Mixed({(1, 0): own})),
    ):
        one, two = (VAE(mlp(2, out=each.size(2)), 2, each) for each in (one, two))
        with pytest.raises(ValueError, match="likelihood: expected a state of"):
            one.load_state_dict(two.state_dict())
    twin = likelihoods.Poisson.of(COUNTS + 1)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin.start, other.start)
