"""Verdicts on the families: against the closed forms, and the interval against what it promises."""

import copy
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from cases import LONG, world
from linear import Linear
from pairs import slowing
from torch import nn
from torch.utils.data import TensorDataset

from ppvae import (
    VAE,
    Family,
    FamilyGuide,
    NotConverged,
    closed_form,
    evaluate,
    families,
    fit,
    likelihoods,
)
from ppvae.comparison import (
    choose_family,
    compare_families,
    crossed_interval,
    still_to_come,
    with_steps,
)
from ppvae.comparison.tables import aligned, places, shown
from ppvae.training.course import last_fall

QUICK = {"progress": False, "num_samples": 600, "num_seeds": 2}


def rotated(values, size):
    """Data whose covariance has exactly these eigenvalues, in a basis of its own."""
    x = torch.randn(size, len(values))
    u = torch.linalg.svd(x - x.mean(0), full_matrices=False)[0]
    basis = torch.linalg.qr(torch.randn(len(values), len(values)))[0]
    return u * math.sqrt(size) * torch.tensor(values).sqrt() @ basis.T


class Frozen(Linear):
    """A linear model with its decoder frozen, and an encoder with features to spare to train."""

    def __init__(self, W, noise):
        super().__init__(W, size=500, noise=noise, b=torch.zeros(4))
        self.test, self.models = self.x[:50], []

    def __call__(self):
        self.models.append(copy.deepcopy(self.model).requires_grad_(False))
        return self.models[-1], nn.Linear(len(self.W), 32)


def verdicts(found):
    return found.dataset.verdict.values.tolist()


def test_linear_gaussian_data_want_one_shared_scale_and_no_more():
    """Two equal eigenvalues: shared_scale and full_rank have one and the same optimum.

    mean_only pays `sum(r - 1 - ln r)` above it at equal noise, and takes another noise. The data
    are given, so that the gain is off by the training and by the draws only. 120,000 draws, with a
    standard deviation of at most 3 nats, are off by 0.009; the training was by 0.02 at most for
    four sets of data.
    """
    x = rotated([4.0, 4.0, 0.5, 0.5, 0.5], 100)

    def build():  # a small noise to begin with, so that no latent collapses on the way
        model = VAE(nn.Linear(2, 5), 2, likelihoods.Normal(0.4, learned=True))
        return model, nn.Linear(5, 32)

    names, options = ["mean_only", "shared_scale", "full_rank"], slowing(200, 0.05, 0.01)
    found = compare_families(build, names, x.repeat(10, 1), x, **options, **QUICK)
    assert verdicts(found) == ["", "yes", "no"], f"\n{found}"
    best = [closed_form.learned_decoder(x, 2, families.LADDER[name]).objective for name in names]
    assert max(best[1:]) - min(best[1:]) < 1e-9 and best[1] - best[0] > 0.8
    assert float(found.dataset.gain[1]) == pytest.approx(best[1] - best[0], abs=0.05)
    assert abs(found.dataset.elbo.mean("seed") - best).max() < 0.05


def test_no_third_channel_where_the_posterior_is_mean_field():
    """Orthogonal columns of equal length: the posterior is spherical, and mean_scale is exact."""
    frozen = Frozen(torch.linalg.qr(torch.randn(4, 2))[0], 0.8)
    assert abs(frozen.gap(torch.diag(frozen.best_sd**2))) < 1e-9
    names = ["mean_scale", *["student_t"] * LONG, "flow"]
    options = slowing(60, 0.02, 0.002) | QUICK | {"num_seeds": 3}
    found = compare_families(frozen, names, frozen.x, frozen.test, **options)
    assert verdicts(found) == ["", *["no"] * (len(names) - 1)], f"\n{found}"


def test_a_correlated_posterior_wants_full_rank():
    """The exact gain is the gap of mean_scale, 0.62 nats; the training was off by 0.002."""
    frozen = Frozen([[1.0, 0.9], [0.9, 1.0], [0.5, 0.2], [1.0, 1.0]], 0.7)
    names, options = ["mean_scale", "full_rank"], slowing(70, 0.05, 0.004)
    found = compare_families(frozen, names, frozen.x, frozen.test, **options, **QUICK)
    step, gap = found.dataset.sel(family="full_rank"), frozen.gap(torch.diag(frozen.best_sd**2))
    assert step.verdict == "yes", f"\n{found}"
    assert float(step.gain) == pytest.approx(gap.item(), abs=0.06)
    assert step.gain_lower < gap.item() < step.gain_upper
    # the encoder, and the channels: 4 and 5 numbers for two latents
    assert found.dataset.parameters.values.tolist() == [5 * 32 + 4 * 33, 5 * 32 + 5 * 33]
    assert float(step.gain_per_parameter) == pytest.approx(float(step.gain) / 33)
    more = found.dataset.seconds.median("seed").diff("family").item()
    per_second = float(step.gain) / more if more > 0 else math.nan
    assert float(step.gain_per_second) == pytest.approx(per_second, nan_ok=True)
    assert len(frozen.models) == 4
    assert all(torch.equal(model.decoder.weight, frozen.W) for model in frozen.models)


def test_discrete_latents_are_summed_out_of_all_families():
    """A mixture in one column and a normal latent behind another: all is known in closed form.

    That nothing passes costs what it costs of the normal latent alone, and not what drawing the
    class would cost, 12 nats. The prior's ELBO is a mean of 60 * 600 * 2 draws, of which one has an
    sd of 2 sqrt(2 + 4 y^2); five errors. The gain is off by the training, too.
    """
    x = torch.stack([torch.randn(60) + 4 * torch.randn(60).sign(), 1.1 * torch.randn(60)], -1)
    coins = torch.tensor([0.4, 0.6])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(coins))
            seen = dist.Normal(torch.stack([8.0 * k - 4.0 + 0 * z, z + 0.0 * k], -1), spread)
            pyro.sample("x", seen.to_event(1), obs=x)

    model.vectorized = True
    spread = torch.tensor([1.0, 0.5])
    parts = dist.Normal(torch.tensor([-4.0, 4.0]), 1.0).log_prob(x[:, :1]) + coins.log()
    mixture, y = parts.logsumexp(-1), x[:, 1]
    nothing = mixture + dist.Normal(0.0, 0.5).log_prob(y) - 2
    log_p = mixture + dist.Normal(0.0, math.sqrt(1.25)).log_prob(y)
    error = 5 * (2 * (2 + 4 * y**2).mean().sqrt() / math.sqrt(60 * 1200)).item()
    told = slowing(100, 0.05, 0.005) | QUICK | {"num_samples": 600}
    pair = ["noise_only", "mean_scale"]
    found = compare_families(lambda: (model, nn.Linear(2, 4)), pair, x, **told)
    chosen = choose_family(model, x, encoder=nn.Linear(2, 4), families=pair, **told)
    for data in (found.dataset, chosen.dataset):
        assert data.verdict.values.tolist() == ["", "yes"]
        elbo = data.elbo.sel(family="noise_only").mean().item()
        assert elbo == pytest.approx(nothing.mean().item(), abs=error)
        gain = (log_p - nothing).mean().item()
        assert data.gain[1].item() == pytest.approx(gain, abs=error + 0.02)
        likelihood = data.log_likelihood.sel(family="mean_scale").mean().item()
        assert likelihood == pytest.approx(log_p.mean().item(), abs=0.02)


def test_a_curved_posterior_wants_a_flow():
    """And the gap to log p(x) that importance sampling sees becomes smaller.

    Only `z1 + z0^2` is seen, so that the posterior lies along a parabola.
    """
    x = 0.5 + 0.3 * torch.randn(300, 1)

    class Bend(nn.Module):
        def forward(self, z):
            return z[..., 1:] + z[..., :1] ** 2

    def build():
        model = VAE(Bend(), 2, likelihoods.Normal(0.3))
        return model, nn.Sequential(nn.Linear(1, 32), nn.Tanh())

    names, options = ["full_rank", "flow"], slowing(150, 0.01, 0.003)
    found = compare_families(build, names, x, x[:50], **options, **QUICK)
    assert verdicts(found) == ["", "yes"], f"\n{found}"
    gap = (found.dataset.log_likelihood - found.dataset.elbo).mean("seed")
    assert gap[1] < gap[0]


@pytest.mark.parametrize("seeds", [2, 3, 6])
@pytest.mark.parametrize("spread", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 1, 1), (0.5, 1, 0.1)])
def test_the_interval_covers_at_least_as_often_as_it_says(seeds, spread):
    """Crossed effects of seeds, data and both; 5 standard errors of a share of 4,000 below 0.9."""
    rng = np.random.default_rng(0)
    a, b, c = spread
    differences = a * rng.standard_normal((4000, seeds, 1)) + b * rng.standard_normal((4000, 1, 30))
    differences = 0.7 + differences + c * rng.standard_normal((4000, seeds, 30))
    mean, lower, upper, over_seeds, over_data = crossed_interval(differences, 0.9)
    share = ((lower < 0.7) & (0.7 < upper)).mean()
    assert share > 0.9 - 5 * math.sqrt(0.09 / 4000)
    if spread in ((1, 0, 0), (0, 1, 0)):  # one source alone: no more than it says, either
        assert share < 0.9 + 5 * math.sqrt(0.09 / 4000)
    # in the mean the two variances hold those of the mean, with c / (S N) counted twice
    exact = a**2 / seeds + b**2 / 30 + 2 * c**2 / (30 * seeds)
    found = over_seeds**2 + over_data**2
    assert abs(found.mean() - exact) < 5 * found.std() / math.sqrt(4000) + 1e-12
    assert np.allclose(mean, (lower + upper) / 2)


def test_what_is_still_to_come_beyond_the_noise():
    # a loss like 1 / epoch falls by 1 / 100 of its scale after epoch 100
    fall = last_fall(7 + 5 / np.arange(1, 101)).size
    assert still_to_come(np.array(fall), np.array(0.0)) == pytest.approx(5 / 100, rel=0.05)
    assert still_to_come(np.array(math.nan), np.array(math.nan)) == 0
    assert still_to_come(np.array(-0.3), np.array(0.1)) == pytest.approx(-0.3)
    # noise alone: the slope is normal with this error, beyond two of them in a share of 0.06 (t)
    noise = np.random.default_rng(0).standard_normal((2000, 100))
    seen = [still_to_come(*np.array(last_fall(row)[:2])) != 0 for row in noise]
    assert np.mean(seen) < 0.06 + 5 * math.sqrt(0.06 * 0.94 / 2000)


def steps_of(gain, fall, error=1e-6):
    """One step with this gain, almost without noise, up to a family whose loss fell so far."""
    elbo = np.zeros((2, 3, 50)) + np.array([0, gain]).reshape(2, 1, 1)
    elbo[1] += 0.001 * np.random.default_rng(0).standard_normal((3, 50))
    falls = np.zeros((2, 3)) + np.array([0.0, fall]).reshape(2, 1)
    over = {name: (("family", "seed"), falls) for name in ("fall", "seconds", "parameters")}
    over["fall_se"] = (("family", "seed"), np.full((2, 3), error))
    found = xr.Dataset(over | {"elbo": (("family", "seed", "datum"), elbo)})
    found = found.assign_coords(family=["a", "b"], seed=[0, 1, 2])
    step = with_steps(found, 0.05, 0.95).isel(family=1)
    return step.verdict.item(), step.note.item()


def test_a_verdict_that_training_could_turn_is_none():
    fell, moved = "the loss still fell", "the gain still moved"
    # the errors of three seeds and two families: 3 * (0.1 - 2 * 0.05 * sqrt(2 / 3)) = 0.055
    yes = {(0.2, 0.0): "", (0.2, 0.1): fell}
    no = {(0.01, 0.0): "", (0.01, -0.1): fell, (-0.01, 0.1, 0.05): fell}  # away from the threshold
    open_ = {(0.01, 0.1): moved, (0.2, -0.1): moved, (0.01, 0.1, 0.05): moved}
    open_ |= {(0.05, 0.0): "the interval holds"}
    for verdict, steps in (("yes", yes), ("no", no), ("undecided", open_)):
        for step, note in steps.items():
            said = steps_of(*step)
            assert said[0] == verdict and said[1].startswith(note) and bool(said[1]) == bool(note)


def plain():
    """A small model on four features, to be trained for a moment."""
    return VAE(nn.Linear(2, 4), 2, likelihoods.Normal(0.5)), nn.Linear(4, 3)


SHORT = {"num_epochs": 2, "num_samples": 4, "progress": False}
PAIR = ["mean_only", "mean_scale"]


def test_one_family_under_two_names_gains_exactly_nothing():
    """Start, minibatches, draws of the training and of the evaluation: all are paired."""
    x = torch.randn(30, 4)
    pair = [families.mean_scale, Family(dist.Normal, scale=dist.constraints.positive)]
    found = compare_families(plain, pair, x, x[:9], batch_size=8, **SHORT).dataset
    assert (found.gain[1] == 0) and (found.elbo[0] == found.elbo[1]).all()
    assert found.elbo[0].values.std() > 0  # while the seeds differ
    assert found.verdict[1] == "no" and found.below.values.tolist() == ["", "mean_scale"]
    assert found.gain_per_parameter[1].isnull()  # it adds no parameter
    again = compare_families(plain, pair, x, x[:9], batch_size=8, seed=1, **SHORT).dataset
    assert (again.elbo.sel(seed=[1, 2]) == found.elbo.sel(seed=[1, 2])).all()
    assert again.seed.values.tolist() == [1, 2, 3]


def one_of(family, seed):
    """The guide that a comparison starts with."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, encoder = plain()
        return FamilyGuide(model, family, encoder)


def test_the_numbers_are_those_of_fit_and_evaluate():
    """Trained on a data set; measured on the training data, where there are no others."""
    x = torch.randn(30, 4)
    found = compare_families(plain, ["mean_only", "full_rank"], x, num_seeds=2, seed=5, **SHORT)
    guide = one_of(families.full_rank, seed=6)
    fitted = fit(guide.model, guide, TensorDataset(x), num_epochs=2, seed=6, progress=False)
    row = evaluate(guide.model, guide, x, num_samples=4, seed=6, progress=False)
    for name in ("elbo", "rate", "distortion", "log_likelihood"):
        one = found.dataset[name].sel(family="full_rank", seed=6)
        assert float(one) == pytest.approx(float(row[name].mean()), abs=1e-12)
    assert len(fitted.losses) == 2 and found.dataset.fall.isnull().all()  # too few epochs to tell
    assert found.dataset.attrs == {"min_gain": 0.05, "level": 0.95, "num_data": 30}
    gain = (found.dataset.elbo[1] - found.dataset.elbo[0]).mean()
    assert float(found.dataset.gain[1]) == pytest.approx(float(gain), abs=1e-12)


def test_points_have_no_verdict_and_idle_encoders_do_not_count():
    names = ["deterministic", "zero", "noise_only", "mean_only"]
    found = compare_families(plain, names, torch.randn(20, 4), **SHORT)
    data = found.dataset
    assert data.verdict.values.tolist()[:3] == ["", "", ""] and data.verdict[3] != ""
    assert "a point" in data.note.values[2] and data.gain[:3].isnull().all()
    assert data.elbo[:2].isnull().all() and data.rate[:2].isnull().all()
    assert data.distortion.notnull().all() and data.elbo[2:].notnull().all()
    assert data.parameters.values.tolist() == [23, 0, 0, 23]  # 15 of the encoder, 8 of the channel
    assert data.fall[1:3].isnull().all() or (data.fall[1:3] == 0).all()
    text = str(found)
    assert all(name in text for name in names) and "verdict" in text and "a point" in text
    assert text.splitlines()[1].split()[0] == "deterministic" and "nan" not in text.lower()
    assert all(len(line) < 89 for line in text.splitlines())


def test_numbers_are_shown_by_their_errors():
    assert [places(error) for error in (12.0, 0.4, 0.04, 0.001, 0.0, math.nan)] == [
        1,
        2,
        3,
        3,
        3,
        3,
    ]
    assert places([3.0, 0.2, 0.0, math.nan]) == 2 and places(20.0, least=2) == 2
    assert [shown(-0.0001), shown(1.25, 1), shown(math.nan)] == ["0.000", "1.2", ""]
    long = "site: a family of a long name; other: another"
    lines = aligned(["", "x"], [["a", "1.0"], [long, "22.0"]])
    assert lines == ["      x", "a   1.0", long, "   22.0"]


def test_nothing_global_moves_and_every_run_starts_anew(plain_pyro):
    """Also `pyro.param` statements of a plain model, which live in Pyro's global store."""
    calls = []

    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=x[:, 0])

    def build():
        calls.append(torch.rand(1).item())
        return model, nn.Linear(4, 3)

    pyro.param("scale", torch.tensor(7.0), constraint=dist.constraints.positive)
    outside, numbers = world(), np.random.get_state()[1].copy()
    pair = [families.mean_scale, Family(dist.Normal, scale=dist.constraints.positive)]
    found = compare_families(build, pair, torch.ones(20, 4), **SHORT)
    assert world() == outside and (np.random.get_state()[1] == numbers).all()
    assert pyro.param("scale").item() == pytest.approx(7.0)
    assert len(calls) == 6 and calls[::2] == calls[1::2] and len(set(calls)) == 3
    assert found.dataset.gain[1] == 0  # the second family did not go on with the first one's scale


def test_a_run_that_stopped_early_has_ended():
    """Without the patience the validation loss is the one that tells."""
    x = torch.randn(40, 4)
    options = {"validation": x[:20], "learning_rate": 0.1, "progress": False}
    run = partial(compare_families, plain, PAIR, x[20:], num_seeds=2, num_samples=4, **options)
    long = run(num_epochs=400, patience=1).dataset
    assert (long.fall == 0).all() and (long.fall_se == 0).all()
    found = run(num_epochs=20)
    guide = one_of(families.mean_scale, seed=1)
    fitted = fit(guide.model, guide, x[20:], seed=1, num_epochs=20, **options)
    fall = found.dataset.fall.sel(family="mean_scale", seed=1)
    assert float(fall) == pytest.approx(last_fall(fitted.validation_losses).size, abs=1e-9)
    with pytest.warns(NotConverged, match="not flat after"):  # and without `num_epochs`
        bounded = run(max_epochs=20).dataset
    assert (bounded.fall != 0).all() and "still fell" in str(bounded.note[1].item())


REFUSED = [
    ({"families": "mean_only"}, ValueError, "families: expected at least two, got 'mean_only'"),
    ({"families": ["mean_only"]}, ValueError, "families: expected at least two"),
    ({"families": ["mean_only", "bayes"]}, TypeError, "families: expected a guide .* got 'bayes'"),
    ({"families": ["mean_only", dist.Normal]}, TypeError, "families: .* got <class"),
    ({"families": ["mean_only", families.mean_only]}, ValueError, "families: expected different"),
    ({"num_seeds": 1}, ValueError, "num_seeds: expected a whole number of at least 2, got 1"),
    ({"num_samples": 1}, ValueError, "num_samples: .* got 1"),
    ({"min_gain": -0.1}, ValueError, "min_gain: .* got -0.1"),
    ({"level": 1.0}, ValueError, "level: .* got 1.0"),
    ({"test": torch.ones(1, 4)}, ValueError, "test: expected at least 2 data, got 1"),
    ({"test": torch.tensor(1.0)}, ValueError, "test: expected at least 2 data, got 1"),
    ({"test": torch.ones(3, 4).double() * 1e200}, ValueError, "test: .* ELBO, got 3 of an inf"),
    ({"test": torch.full((3, 4), math.inf)}, ValueError, "test: expected finite numbers"),
    ({"test": TensorDataset(torch.ones(6, 4))}, TypeError, "test: .* a tensor, .* TensorDataset"),
    ({"build": lambda: plain()[0]}, TypeError, "build: expected a model and an .* got VAE"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_input(options, error, message):
    given = {"build": plain, "families": PAIR, "train": torch.randn(6, 4)} | SHORT
    with pytest.raises(error, match=message):
        compare_families(**(given | options))


def test_a_build_that_does_not_start_anew():
    once = plain()
    with pytest.raises(ValueError, match="build: expected fresh networks") as caught:
        compare_families(lambda: once, PAIR, torch.randn(6, 4), **SHORT)
    assert "family mean_scale, seed 0" in caught.value.__notes__[0]
