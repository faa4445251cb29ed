"""Verdicts follow from numbers, and name them."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from global_latents import (
    labelled,
    location,
    logistic,
    noise,
    prepared,
    quiet,
    two_modes,
)
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value

from ppvae import FamilyGuide, NarrowFamily, NotConverged, encode, families, fit
from ppvae._checks import TROUBLE
from ppvae._scopes import private_modules
from ppvae.objectives.weights import khat
from ppvae.programs.layout import Layout
from ppvae.training import verdict
from ppvae.training.mode import Mode
from ppvae.training.optimum import Optimum, allowed_gap
from ppvae.training.task import task_of, training_batches

narrow = pytest.mark.filterwarnings("ignore::ppvae.NarrowFamily")


def test_few_steps_are_told_with_their_number():
    guide = FamilyGuide(logistic, families.mean_scale)
    words = r"stopped before the optimum: the Newton step is \S+ posterior sds, at w\[[01]\]; give"
    with pytest.warns(NotConverged, match=f"^fit: {words}") as caught:
        result = quiet(logistic, guide, labelled(), num_epochs=1)
    (warning,) = [each for each in caught if each.category is NotConverged]
    assert result.converged is False and warning.filename == quiet.__code__.co_filename
    assert warning.message.args[0] == f"fit: {result.verdict} ({TROUBLE})"
    first, second, third, fourth = repr(result).split("\n")
    assert (
        fourth
        == result.execution_reason
        == "not staged: the optimum is found at once, in few steps"
    )
    assert first.startswith("Fit by L-BFGS (eager): 1 steps, ") and first.endswith(" s")
    assert second == f"loss {result.losses[-1]:.6g} nats per datum" and third == result.verdict


def test_another_mode_that_matters_is_a_reason_to_warn():
    """The posterior of `w` is the same for `-w`: a half of the mass is left out."""
    guide = FamilyGuide(two_modes, families.full_rank)
    with pytest.warns(NarrowFamily, match="it leaves out a mode with some 50% of the mass"):
        result = quiet(two_modes, guide, 4 + noise(9))
    assert result.converged and "there is another mode, " in result.verdict
    assert result.verdict.endswith(" nats above this one")
    with private_modules(), torch.no_grad():
        draws = torch.stack([guide(4 + noise(9))["w"] for _ in range(2000)])
    times = float((draws.square().mean() / draws.var()).sqrt())  # the sd of both signs
    told = float(re.search(r"its sd is (\S+) times", result.verdict)[1])
    assert told == pytest.approx(times, rel=0.1)  # two digits, and 2,000 draws
    assert "where w is " in result.verdict


def test_modes_that_hardly_matter_are_no_reason_to_warn():
    """Their moments with the mode are those of a mixture of two Gaussians, written out here."""
    states = noise(20_000, 2)

    def told(weight, at, sd):
        mode = Mode(1.0, weight, torch.tensor([0.0, at]), torch.tensor([1.0, sd]))
        return verdict._left_out([mode], states, ["a", "b"])

    assert told(0.1, 2.5, 1.0) == ""  # among the draws
    share = 1 / 101
    both = (1 - share + share * 0.25 + share * (1 - share) * 64) ** 0.5
    words = told(0.01, 8.0, 0.5)
    assert words.startswith("it leaves out a mode with some 1% of the mass, where b is 8 ")
    assert float(re.search(r"its sd is (\S+) times", words)[1]) == pytest.approx(both, rel=0.05)
    assert told(0.005, 8.0, 0.5) == "" and told(0.01, 6.0, 0.5) == ""
    (far, near) = (Mode(0.0, w, torch.tensor([9.0, 0.0]), torch.ones(2)) for w in (0.2, 1.0))
    assert "some 50%" in verdict._left_out([far, near], states, ["a", "b"])


def test_a_mode_that_was_asked_for_is_no_reason_to_warn():
    """Where the user says from where to start, other modes are told and no more."""
    start = init_to_value(values={"w": torch.tensor(-1.5)})
    guide = FamilyGuide(two_modes, families.full_rank, init_loc_fn=start)
    result = quiet(two_modes, guide, 4 + noise(9))
    assert result.converged and "there is another mode, " in result.verdict
    with private_modules():
        assert guide.median(4 + noise(9))["w"] < -1.5


def test_a_family_that_cannot_move_is_too_narrow():
    guide = FamilyGuide(location, families.mean_only)
    with pytest.warns(NarrowFamily, match="too narrow: .*the sd of w is") as caught:
        result = quiet(location, guide, noise(3))
    (warning,) = [each for each in caught if each.category is NarrowFamily]
    assert result.converged and warning.filename == quiet.__code__.co_filename
    assert issubclass(NarrowFamily, UserWarning) and not issubclass(NarrowFamily, NotConverged)


def test_moments_are_held_on_the_support_too():
    """Of a rate after no event at all: Gamma(1, 2), whose sd is 1/2, beside that of a LogNormal.

    Its sample sd of 10,000 draws is known to 0.07 of itself (its kurtosis is some 200): four times
    that are allowed.
    """

    def no_event(x):
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    guide = FamilyGuide(no_event, families.mean_scale)
    with pytest.warns(NarrowFamily, match=r"the sd of rate itself is 1\.\d+ of the rew") as caught:
        quiet(no_event, guide, torch.zeros(1))
    said = next(str(each.message) for each in caught if each.category is NarrowFamily)
    times = float(re.search(r"itself is (\S+) of", said)[1])
    base = encode(no_event, guide, torch.zeros(1)).base_dist
    sd = dist.LogNormal(base.mean, base.stddev).stddev.item()
    assert abs(math.log(times * 0.5 / sd)) < 0.28


def test_a_tail_of_equal_weights_is_no_reason_to_warn():
    """Weights within a percent of each other; k-hat sees only their tail, which is heavy."""
    generator = torch.Generator().manual_seed(0)
    tail = 1e-4 * torch.rand(4000, generator=generator).pow(-1.0).clamp_max(2000)
    states = noise(4000, 1)
    assert khat(tail) > 0.7
    words, too_narrow = verdict._narrowness(-tail, [(states, ["w"])])
    assert not too_narrow and "k-hat" in words
    assert words.endswith("100% of the draws count, the tail of the others does not")
    words, too_narrow = verdict._narrowness(-5000 * tail, [(states, ["w"])])
    assert too_narrow and "k-hat is trusted up to 0.7" in words


def test_moments_that_are_off_name_their_site():
    """Draws of N(0, 1) reweighted to N(m, s): what they are off by is known."""
    states = noise(20_000, 2)
    for mean, sd, words in [
        (0.5, 1.0, r"the mean of b is 0.\d\d sd from the reweighted one"),
        (0.0, 0.7, r"the sd of b is 1.4\d of the reweighted one"),
        (0.1, 0.9, None),
    ]:
        other = dist.Normal(mean, sd).log_prob(states[:, 1])
        losses = dist.Normal(0.0, 1.0).log_prob(states[:, 1]) - other
        said, too_narrow = verdict._narrowness(losses, [(states, ["a", "b"])])
        assert too_narrow == (words is not None)
        if words is not None:
            assert re.match(words, said), said


@pytest.mark.parametrize("seed", [5, 8, 10])
def test_moments_with_heavy_tails_are_not_known_well(seed):
    """Weights that say nothing of exp(5 z), of which the largest of 4,000 draws make the sd."""
    losses = noise(4000, seed=seed)
    wide = (5 * noise(4000, 1, seed=3)).exp()
    weights = torch.softmax(-losses, 0)
    assert verdict._off(weights, wide, ["b"])  # with the errors of a Gaussian
    assert not verdict._off(weights, wide, ["b"], heavy=True)
    assert not verdict._heavier(weights, wide, ["b"])


def test_a_tail_that_the_draws_do_not_reach_is_a_reason_to_warn():
    """A scale of two data: its sd by quadrature, and by a LogNormal, which falls off too fast."""

    def scale(x):
        s = pyro.sample("s", dist.HalfCauchy(0.01))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, s), obs=x)

    x = torch.tensor([3.0, 4.0])
    guide = FamilyGuide(scale, families.mean_scale)
    words = (
        r"s itself has a tail too heavy for its sd to be known \(k-hat \S+\): there the posterior"
    )
    with pytest.warns(NarrowFamily, match=words):
        quiet(scale, guide, x)
    s = torch.linspace(-10, 20, 30_001).exp()
    density = s * dist.HalfCauchy(0.01).log_prob(s).exp()  # on the axis of its logarithm
    density = density * dist.Normal(0.0, s).log_prob(x[:, None]).sum(0).exp()
    density = density / density.sum()
    exact = (density @ s.square() - (density @ s).square()).sqrt().item()
    base = encode(scale, guide, x).base_dist
    assert dist.LogNormal(base.mean, base.stddev).stddev.item() < 0.6 * exact


@pytest.mark.parametrize("seed", range(3))
def test_a_heavy_tail_that_the_draws_have_is_no_reason_to_warn(seed):
    """LogNormals, of which a sample sd is not known either.

    Where those that are furthest weigh three times as much as others, the draws fall short.
    """
    s = (1.5 * noise(10_000, 1, seed=seed)).exp()
    for heavier in (False, True):
        weights = torch.ones(10_000)
        if heavier:
            weights[s[:, 0].topk(100).indices] = 3.0
        shape = khat((weights * (s[:, 0] - (weights @ s) / weights.sum()).square()).log())
        assert shape > 0.7
        assert bool(verdict._heavier(weights / weights.sum(), s, ["s"])) == heavier


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("correlation", "too_narrow"), [(0.4, False), (0.6, True)])
def test_a_divergence_that_is_large_is_a_reason_to_warn(seed, correlation, too_narrow):
    """A mean field for two latents of sd 1: its sds are 0.92 and 0.8, and for each it is 0.044 and
    0.11 nats off.
    """
    sd = math.sqrt(1 - correlation**2)
    states = sd * noise(10_000, 2, seed=seed)
    both = torch.tensor([[1.0, correlation], [correlation, 1.0]])
    losses = dist.Normal(0.0, sd).log_prob(states).sum(-1)
    losses = losses - dist.MultivariateNormal(torch.zeros(2), both).log_prob(states)
    words, found = verdict._narrowness(losses, [(states, ["a", "b"])])
    assert found == too_narrow
    assert ("; sds may be too small by 25% or more; a wider one may gain 0." in words) == too_narrow


def mode(above):
    return Mode(above, 1.0, torch.tensor([9.0]), torch.ones(1))


def optimum(**changes):
    layout = Layout.of(poutine.trace(location).get_trace(noise(3)), None)
    told = {"values": [], "losses": [1.0], "draws": 1, "step": 0.001, "site": "w"}
    told |= {"error": 0.0, "excess": 0.0, "others": [], "layout": layout}
    return Optimum(**(told | changes))


@pytest.mark.parametrize(
    ("changes", "converged", "words"),
    [
        ({}, True, "at the optimum: the Newton step is 0.001 posterior sds, at w$"),
        ({"step": 0.01}, False, "stopped before the optimum: the Newton step is 0.01 "),
        ({"step": math.nan}, False, "stopped before .* nan"),
        ({"step": 0.0099}, True, "at the optimum"),
        (
            {"others": [mode(7.0), mode(4.9)]},
            True,
            "; there is another mode, 4.9 nats above this one$",
        ),
        ({"others": [mode(5.0)]}, True, "at w$"),
        (
            {"draws": 64, "error": 0.1},
            False,
            "too few draws; 64 draws held fixed .* 0.1 posterior sds in a mean",
        ),
        ({"draws": 0, "step": 0.05}, False, "stopped before the optimum"),
    ],
)
def test_verdicts_follow_from_the_numbers(changes, converged, words):
    task = prepared(location, FamilyGuide(location, families.deterministic), noise(3))
    said = verdict.judge(task, optimum(**changes), seed=0)
    assert said.converged is converged and not said.narrow
    assert re.search(words, said.words), said.words


def test_draws_that_were_overfitted_are_told():
    """The loss that was reached with fixed draws is far below the one of fresh ones."""
    guide = FamilyGuide(location, families.full_rank)
    task = prepared(location, guide, noise(3))
    said = verdict.judge(task, optimum(draws=32, error=0.01, losses=[-50.0]), seed=0)
    assert said.converged is False
    assert re.match("the ELBO of fresh draws is 1[56]. nats below", said.words)
    assert allowed_gap(1) == 0.1 and allowed_gap(100) == 2.5


def test_steps_that_end_away_from_the_posterior_are_told():
    """A loss that is flat to a tenth of a nat per datum says little of latents of 400 data."""
    X = noise(400, 3)
    y = X @ torch.tensor([1.0, -1.0, 0.5]) + noise(400)
    precision = X.T @ X + torch.eye(3)
    mean, sd = torch.linalg.solve(precision, X.T @ y), precision.inverse().diagonal().sqrt()

    def lines(X, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal((X * w).sum(-1), 1.0), obs=y)

    guide = FamilyGuide(lines, families.mean_scale)
    words = "ended away from the posterior, or the family is too narrow for it: .* reweighted one"
    with pytest.warns(NotConverged, match=words) as caught:
        result = fit(lines, guide, (X, y), batch_size=50, seed=0, progress=False)
    with private_modules():
        middle, low = guide.quantiles([0.5, 0.1587], X, y)["w"].detach()
    assert ((middle - mean).abs() / sd).max() > 0.25 or ((middle - low) / sd).max() > 1.25
    assert result.converged is None and result.verdict.startswith("flat after")
    assert sum(each.category is NotConverged for each in caught) == 1


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_steps_are_held_against_the_posterior_given_all_the_data(off):
    """The exact posterior, and one whose second mean is moved by one of its sds."""
    X = torch.linalg.qr(noise(40, 2))[0] * 5  # so that the weights are independent
    y = X @ torch.tensor([1.0, -1.0]) + noise(40)
    mean, sd = X.T @ y / 26, torch.tensor(26.0).rsqrt()

    def lines(X, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal((X * w).sum(-1), 1.0), obs=y)

    guide = FamilyGuide(lines, families.mean_scale).setup(X, y)
    head = guide.heads["w"]
    with torch.no_grad():
        head.loc.raw.copy_(mean + off * sd * torch.tensor([0.0, 1.0]))
        head.scale.raw.copy_(head.scale.raw + (sd / head(None).scale).log())  # exp is its map
    torch.testing.assert_close(head(None).scale, sd.expand(2))
    with private_modules():
        task = task_of(lines, guide, None, training_batches(lines, guide, (X, y), 10, ()))
        found = verdict.judge_steps(task, "flat", seed=0)
    if not off:
        assert found is None
        return
    assert found.converged is None and found.narrow and found.words.startswith("flat; but the ")
    # 1,000 draws, of which exp(-1) count as much: an error of 0.05 or so
    told = float(re.search(r"the mean of w\[1\] is (\S+) sd from", found.words)[1])
    assert told == pytest.approx(1.0, abs=0.25)
    evidence = dist.MultivariateNormal(torch.zeros(40), torch.eye(40) + X @ X.T).log_prob(y)
    assert -found.loss * 40 == pytest.approx(evidence.item() - 0.5, abs=0.15)  # KL of one sd
