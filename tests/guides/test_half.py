"""Guides in half precision, and under autocast: every family of the ladder, and `Banded`."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import VAE, Block, FamilyGuide, evaluate, families, fit, likelihoods
from ppvae._scopes import private_modules
from ppvae.nn import mlp
from ppvae.objectives import negative_elbo
from ppvae.programs.tracing import trace_pair

FAMILIES = {**families.LADDER, "banded": families.Banded(1)}
HALF = torch.bfloat16  # keeps 8 bits: a number is rounded by at most 2^-9 of itself


def pair(family, encoded):
    """A model and a guide of it, whose numbers are those of half precision."""
    torch.manual_seed(0)
    model = VAE(mlp(3, 8, out=5), latent=3, likelihood=likelihoods.Normal(0.5))
    guide = FamilyGuide(model, family, mlp(5, 8) if encoded else None)
    x = torch.randn(16, 5).to(HALF).float()
    guide.setup(x)
    for part in (model, guide):
        part.to(HALF).float()
    return model, guide, x


def run(model, guide, x):
    """Draws and a loss at the same noise, and which parameters of the guide have a gradient."""
    with private_modules():
        torch.manual_seed(1)
        draws = trace_pair(model, guide, x)[1].nodes["z"]["value"]
        torch.manual_seed(1)
        loss = negative_elbo(model, guide, x)
    guide.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in guide.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    return draws.detach(), loss.detach(), set(grads)


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES.values()), ids=list(FAMILIES))
def test_half_precision_is_single_precision_up_to_rounding(family, encoded, single):
    """Noise of the same seed is the same but for rounding.

    A draw is a sum of a few numbers below 4, each rounded by at most 2^-9 of itself, and so are
    their weights; a loss is a mean of squares of such.
    """
    model, guide, x = pair(family, encoded)
    half_model, half_guide = copy.deepcopy((model, guide))
    half = run(half_model.to(HALF), half_guide.to(HALF), x.to(HALF))
    z, loss, known = run(model, guide, x)
    assert half[0].dtype == HALF and z.dtype == torch.float32
    with torch.autocast("cpu", HALF):
        auto = run(model, guide, x)
    for other_z, other_loss, grads in (half, auto):
        assert (other_z.float() - z).abs().max() < 2**-5
        assert abs(other_loss - loss) < 2**-6 * loss
        assert grads == known


@pytest.mark.parametrize("family", ["student_t", "low_rank", "full_rank", "flow"])
def test_a_fit_in_half_precision(family, single):
    model, guide, x = pair(family, encoded=True)
    model.to(HALF), guide.to(HALF)
    losses = fit(model, guide, x.to(HALF), num_epochs=2, seed=0, progress=False).losses
    assert all(map(math.isfinite, losses))
    found = evaluate(model, guide, x.to(HALF), num_samples=4, progress=False)
    assert found.elbo.notnull().all()
    shifted = Block(family, prior="location")
    other = FamilyGuide(model, shifted, mlp(5, 8).to(HALF)).setup(x.to(HALF))
    assert run(model, other, x.to(HALF))[0].dtype == HALF


def test_a_family_without_draws_of_half_precision_is_named(single):
    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Exponential(x.new_ones(len(x))))
            pyro.sample("x", dist.Normal(s.unsqueeze(-1), 1.0).to_event(1), obs=x)

    guide = FamilyGuide(model, families.Family(dist.Gamma), mlp(2, 4).to(HALF))
    x = torch.zeros(3, 2, dtype=HALF)
    with pytest.raises(ValueError, match="family: Family.Gamma. cannot .* 's'.*'BFloat16'"):
        guide.setup(x)
