"""Latents that some data have and others have not: a model says so, and its guide listens."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from ppvae import Block, FamilyGuide, evaluate, fit, likelihoods, models, priors, stage
from ppvae._scopes import private_modules
from ppvae.nn import mlp
from ppvae.objectives import ELBO
from ppvae.programs.missing import nan_masked
from ppvae.programs.tracing import trace_pair

LENGTHS = torch.tensor([4, 1, 3, 2])
N, STEPS = len(LENGTHS), 4
BEHIND = torch.arange(STEPS) >= LENGTHS[:, None]


class Steps(nn.Module):
    """Each step is its own features."""

    def forward(self, x, lengths=None):
        return x


def markov(family="mean_scale", given=("previous",), prior=None):
    torch.manual_seed(0)
    transition = priors.Learned(2, context=2, network=mlp(2, 8))
    model = models.DeepMarkov(mlp(2, 8, out=3), transition, 2, likelihoods.Normal(0.5))
    return model, FamilyGuide(model, {"z_*": Block(family, given=given, prior=prior)}, Steps())


def data():
    return torch.randn(N, STEPS, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("wrap", [lambda program: program, nan_masked])
def test_the_loss_of_plain_pyro_is_that_of_the_sequences_cut_to_their_ends(elbo, wrap, plain_pyro):
    """At the same draws, and so are its gradients."""
    model, guide = markov()
    x = data()
    guide.setup(x, LENGTHS)
    with torch.no_grad():
        values = poutine.trace(guide).get_trace(x, LENGTHS)
    z = [values.nodes[f"z_{t}"]["value"] for t in range(STEPS)]
    parameters = [*model.parameters(), *guide.parameters()]
    (head,) = guide.heads.values()
    expected = torch.zeros(())
    for row, length in enumerate(LENGTHS.tolist()):
        drawn = {f"z_{t}": z[t][row : row + 1] for t in range(length)}
        cut = poutine.condition(model, data=drawn)
        nodes = poutine.trace(cut).get_trace(x[row : row + 1, :length]).nodes
        expected = expected - nodes["x"]["fn"].log_prob(nodes["x"]["value"]).sum()
        for t in range(length):
            before = z[t - 1][row] if t else torch.zeros(2)
            q = head(torch.cat([x[row, t], before])).to_event(1)
            p, value = nodes[f"z_{t}"]["fn"], z[t][row]
            rate = q.log_prob(value) - p.log_prob(value)
            rate = torch.distributions.kl_divergence(q, p) if elbo is TraceMeanField_ELBO else rate
            expected = expected + rate.sum()
    found = elbo().differentiable_loss(wrap(model), poutine.replay(wrap(guide), values), x, LENGTHS)
    assert torch.allclose(found, expected, rtol=1e-12)
    slopes = [torch.autograd.grad(value, parameters) for value in (found, expected)]
    for slope, wanted in zip(*slopes, strict=True):
        assert torch.allclose(slope, wanted, rtol=1e-10, atol=1e-12)
    with private_modules():
        torch.manual_seed(3)
        ours = ELBO(kl="sampled" if elbo is Trace_ELBO else "analytic")(model, guide, x, LENGTHS)
        torch.manual_seed(3)
        theirs = elbo().differentiable_loss(model, guide, x, LENGTHS)
    assert torch.allclose(N * ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("prior", [None, "location_scale"])
def test_what_stands_and_is_drawn_behind_an_end_reaches_nothing(prior):
    """Neither a loss nor a gradient, be it NaN; and a step of SVI moves nothing there."""
    model, guide = markov(prior=prior)
    guide.setup(data(), LENGTHS)
    found = []
    for other, drawn in ((0.0, 1.0), (math.nan, 1e6)):
        x = torch.where(BEHIND[..., None], other, data())
        with private_modules():
            torch.manual_seed(2)
            _, trace = trace_pair(model, guide, data(), LENGTHS)
            for t in range(STEPS):
                value = trace.nodes[f"z_{t}"]["value"]
                value = torch.where(BEHIND[:, t, None], drawn * value, value)
                trace.nodes[f"z_{t}"]["value"] = value.detach()
            program = poutine.replay(nan_masked(guide), trace)
            loss = Trace_ELBO().differentiable_loss(nan_masked(model), program, x, LENGTHS)
        parameters = [*model.parameters(), *guide.parameters()]
        found.append([loss, *torch.autograd.grad(loss, parameters)])
    for one, two in zip(*found, strict=True):
        assert torch.isfinite(one).all() and torch.equal(one, two)


@pytest.mark.parametrize("prior", [None, "location_scale"])
def test_an_untrained_chain_with_a_wide_step_does_not_run_away(prior):
    """The scale of each step grows exponentially with the one before: without zeros some of these
    rows are infinite within a few steps.
    """
    model, guide = markov(prior=prior)
    x = torch.randn(1000, 30, 3)
    lengths = torch.ones(1000)
    with private_modules(), torch.no_grad():
        guide(x[:2], lengths[:2])
        for head in guide.heads.values():
            head.scale.linear.weight *= 3
        _, trace = trace_pair(model, guide, x, lengths)
    drawn = torch.stack([trace.nodes[f"z_{t}"]["value"] for t in range(30)])
    assert drawn.isfinite().all() and drawn[2:].abs().max() < 100
    found = evaluate(model, guide, x, lengths, num_samples=2, progress=False)
    assert found.elbo.notnull().all()


def test_fit_and_graphs_take_sequences_that_end():
    model, guide = markov()
    x = data()
    losses = fit(model, guide, (x, LENGTHS), num_epochs=2, seed=0, progress=False).losses
    assert all(map(math.isfinite, losses))
    staged = stage(model, guide, x, LENGTHS)
    with private_modules():
        for lengths in (LENGTHS, LENGTHS.flip(0)):  # which are no constants of the graph
            torch.manual_seed(5)
            expected = ELBO()(model, guide, x, lengths)
            torch.manual_seed(5)
            assert torch.allclose(staged(x, lengths), expected, rtol=1e-9)


class Told(nn.Module):
    """Some data have latents, of which one has several members; it says what it is told to say."""

    def __init__(self, present):
        super().__init__()
        self.told = present

    def present(self, x, seen):
        return self.told(x, seen)

    def forward(self, x, seen):
        with pyro.plate("data", len(x), dim=-2):
            with poutine.mask(mask=seen[:, None]):
                a = pyro.sample("a", dist.LogNormal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("inner", 2, dim=-1), poutine.mask(mask=seen[:, None]):
                b = pyro.sample("b", dist.Normal(a.log(), 1.0))
            with poutine.mask(mask=seen[:, None]):
                pyro.sample("x", dist.Normal(b.sum(-1, keepdim=True), 1.0), obs=x)


def own(x, seen):
    return {"a": seen[:, None], "b": seen[:, None]}


class First(nn.Module):
    def forward(self, x, seen):
        return x


SEEN = torch.tensor([True, False, True])
EACH = {
    "alone": "mean_scale",
    "given": {"a": "mean_scale", "b": Block("mean_scale", given="a")},
    "joint": {"a": "mean_scale", "b": "full_rank"},
    "together": "full_rank",
}


@pytest.mark.parametrize("families", list(EACH.values()), ids=list(EACH))
def test_the_loss_is_that_of_the_data_that_have_latents(families, plain_pyro):
    """Of elementwise and joint families, beside an inner plate, at the same draws."""
    model, x = Told(own), torch.randn(3, 1)
    torch.manual_seed(0)
    guide = FamilyGuide(model, families, First()).setup(x, SEEN)
    trace = poutine.trace(guide).get_trace(x, SEEN)
    found = Trace_ELBO().loss(model, poutine.replay(guide, trace), x, SEEN)
    for node in trace.nodes.values():
        if node["type"] == "sample" and isinstance(node["value"], torch.Tensor):
            whole = node["value"].dim() and len(node["value"]) == 3
            node["value"] = node["value"][SEEN] if whole else node["value"]
    few = Trace_ELBO().loss(model, poutine.replay(guide, trace), x[SEEN], SEEN[SEEN])
    assert math.isclose(found, few, rel_tol=1e-12)
    with private_modules():
        torch.manual_seed(4)
        ours = ELBO(kl="sampled")(model, guide, x, SEEN).item()
        torch.manual_seed(4)
        theirs = Trace_ELBO().loss(model, guide, x, SEEN)
    assert math.isclose(3 * ours, theirs, rel_tol=1e-12)


def test_a_model_whose_word_is_not_its_mask_is_refused():
    x = torch.zeros(3, 1)
    for told, error, message in (
        (lambda x, seen: {"a": ~seen[:, None]}, ValueError, "model: expected the mask of 'a' from"),
        (lambda x, seen: {"c": seen}, ValueError, r"model: expected latent sites in its `present`"),
        (lambda x, seen: {"a": 1.0 * seen}, TypeError, "model: expected True and False .*'a', got"),
        (lambda x, seen: seen, TypeError, "True and False by latent site .*, got Tensor"),
    ):
        with pytest.raises(error, match=message):
            FamilyGuide(Told(told), "mean_scale", First()).setup(x, SEEN)


def test_svi_takes_a_step(plain_pyro):
    model, guide = markov()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert math.isfinite(svi.step(data(), LENGTHS)) and math.isfinite(svi.step(data(), LENGTHS))
