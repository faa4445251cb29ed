"""A search for each datum, against the best member of a family in closed form."""

import pickle

import numpy as np
import pytest
import torch
from linear import Linear, close
from pyro import poutine
from pyro.infer import Predictive
from torch import nn

from ppvae import Block, FamilyGuide, closed_form, evaluate, families, gaps, refine
from ppvae._scopes import private_modules

QUIET = {"progress": False}


@pytest.mark.parametrize("family", ["mean_only", "mean_scale", "full_rank"])
@pytest.mark.parametrize("batch_size", [5, 256])
def test_a_bad_encoder_is_brought_to_the_best_member(family, batch_size):
    linear = Linear(size=12)
    best = closed_form.fixed_decoder(
        linear.x, linear.W, linear.b, linear.noise, families.LADDER[family]
    ).objective.numpy()
    guide = linear.guide(families.LADDER[family], error=0.1)
    before = {
        name: value.clone() for name, value in guide.state_dict().items() if "extra" not in name
    }
    refined = refine(linear.model, guide, linear.x, num_steps=60, batch_size=batch_size, **QUIET)
    assert close(refined.gain.elbo, linear.elbo(guide)) and close(refined.gain.refined_elbo, best)
    assert close(refined.gain.gain, best - linear.elbo(guide)) and close(refined.gain.gain_se, 0.0)
    assert refined.size == 12 and refined.family == guide.family
    for name, value in guide.named_parameters():
        assert torch.equal(value, before[name])
    with private_modules(), torch.no_grad():
        fn = poutine.trace(refined).get_trace(linear.x).nodes["z"]["fn"]
    joint = hasattr(fn, "covariance_matrix")
    covariance = fn.covariance_matrix if joint else torch.diag_embed(fn.variance)
    assert close(linear.log_p - linear.gap(covariance, fn.mean - linear.mean).numpy(), best)
    found = evaluate(linear.model, refined, linear.x, num_samples=50, batch_size=5, **QUIET)
    if family == "full_rank":
        # within 1e-6 nats of the optimum, as above, log weights have a variance of twice that
        error = 5 * (2e-6 / 50) ** 0.5
        assert close(found.log_likelihood, linear.log_p, error) and close(found.ess, 50.0, 1e-3)


def test_the_gain_is_what_gaps_has_said_and_no_step_loses():
    linear = Linear(size=12)
    guide = linear.guide(families.mean_scale, error=0.1)
    said = gaps(linear.model, guide, linear.x, num_steps=60, **QUIET)
    refined = refine(linear.model, guide, linear.x, num_steps=60, **QUIET)
    assert close(refined.gain.gain, said.amortization)
    few = refine(linear.model, guide, linear.x, num_steps=3, **QUIET)
    assert (few.gain.gain > -1e-9).all() and (few.gain.gain <= refined.gain.gain + 1e-9).all()


def test_it_is_a_guide_of_these_data_only(plain_pyro):
    linear = Linear(size=12)
    guide = linear.guide(families.mean_scale, error=0.1)
    refined = refine(linear.model, guide, linear.x, num_steps=5, **QUIET)
    drawn = Predictive(linear.model, guide=refined, num_samples=3)(linear.x)
    assert drawn["z"].shape == (3, 12, 3)
    with pytest.raises(
        ValueError, match="args: expected the 12 data that the guide was refined for"
    ):
        refined(linear.x[:5])
    other = FamilyGuide(linear.model, "mean_scale")
    with pytest.raises(ValueError, match="guide: expected a FamilyGuide with an encoder"):
        refine(linear.model, other, linear.x, **QUIET)


def test_latents_that_are_given_others_are_searched_together():
    """A chain z_0 -> z_1 whose encoder knows nothing: each step gets a shift of its own."""
    import pyro
    import pyro.distributions as dist

    def chain(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_0", dist.Normal(0.0, 1.0))
            z = pyro.sample("z_1", dist.Normal(z, 0.7))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    chain.vectorized = True
    x = torch.linspace(-1.0, 1.0, 6)[:, None]
    by_site = {"z_0": Block("mean_scale", given=["z_1"]), "z_1": "mean_scale"}
    torch.manual_seed(0)
    guide = FamilyGuide(chain, by_site, nn.Linear(1, 3)).setup(x)
    with torch.no_grad():  # the slope of z_0 on z_1 is that of the posterior, the rest is not
        slope = 1 / 0.49 / (1 + 1 / 0.49)
        guide.heads["z_0"].loc.linear.weight[:, -1] = slope
        guide.heads["z_0"].scale.linear.weight[:, -1] = 0.0
    exact = dist.Normal(0.0, (1 + 0.49 + 0.25) ** 0.5).log_prob(x[:, 0])
    refined = refine(chain, guide, x, num_steps=300, num_samples=512, **QUIET)
    with private_modules():
        found = evaluate(chain, refined, x, num_samples=2000, **QUIET)
    assert (refined.gain.gain > 0).all()
    assert np.allclose(refined.gain.refined_elbo, exact.numpy(), atol=0.01)
    assert np.allclose(found.log_likelihood, exact.numpy(), atol=0.01) and (found.ess > 1950).all()
    assert pickle.loads(pickle.dumps(refined.gain)).equals(refined.gain)
