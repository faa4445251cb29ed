"""Random numbers from standard normal ones, and sets of these whose moments are exact."""

import numpy as np
import pyro.distributions as dist
import torch
from global_latents import noise
from scipy import stats

from ppvae.programs.given_normals import GivenNormals
from ppvae.programs.matched_normals import matched


def test_matched_numbers_have_the_moments_of_a_standard_normal():
    normals = matched(40, 6, seed=0)
    assert normals.shape == (40, 6) and normals.dtype == torch.float64
    assert torch.equal(normals[:20], -normals[20:])  # so all odd moments are zero
    assert torch.allclose(normals.T @ normals / 40, torch.eye(6), atol=1e-12)
    assert normals.mean(0).abs().max() < 1e-15 and normals.pow(3).mean(0).abs().max() < 1e-14
    assert torch.equal(normals, matched(40, 6, seed=0))
    assert not torch.equal(normals, matched(40, 6, seed=1))
    few = matched(8, 6, seed=0)  # too few for a covariance
    assert few.shape == (8, 6) and torch.equal(few[:4], -few[4:])
    assert torch.allclose(matched(14, 6, 0).T @ matched(14, 6, 0) / 14, torch.eye(6), atol=1e-9)


def test_random_numbers_follow_from_normal_ones():
    z = noise(60)
    with GivenNormals(z) as mode:
        normal = dist.Normal(torch.tensor(1.0), 2.0).rsample((10,))
        uniform = dist.Uniform(torch.tensor(-1.0), 3.0).rsample((2, 5))
        gap = dist.Exponential(torch.tensor(2.0)).rsample((10,))
        laplace = dist.Laplace(torch.tensor(0.0), 1.0).rsample((10,))
        filled = torch.empty(10).uniform_(2.0, 4.0)
        single = torch.empty(3, dtype=torch.float32).normal_()
        assert mode.count == 53
        other = torch.randint(10**6, (5,))  # which follow from no normal ones
    assert mode.count == 53 and len(other.unique()) > 1
    assert torch.allclose(normal, 1 + 2 * z[:10])
    assert torch.allclose(uniform.reshape(-1), -1 + 4 * torch.special.ndtr(z[10:20]))
    assert torch.allclose(gap, -torch.special.ndtr(z[20:30]).log() / 2)
    assert laplace.unique().numel() == 10
    assert torch.allclose(filled, 2 + 2 * torch.special.ndtr(z[40:50]))
    assert single.dtype == torch.float32 and torch.allclose(single.double(), z[50:53])
    with GivenNormals() as mode:
        assert not torch.empty(4).normal_().any()
    assert mode.count == 4


def test_gamma_numbers_are_quantiles_and_smooth_in_their_shape():
    """Held against SciPy's quantiles in both tails, and against slopes where they are closed.

    With F for what is below, dx/da = -(dF/da) / f; of shape 1 that is an integral (here by the
    trapezoid rule in log x) of log x, less the digamma function.
    """
    z = torch.linspace(-7, 7, 15)
    shapes = torch.tensor([0.3, 1.0, 4.0, 60.0]).unsqueeze(1).expand(4, 15).requires_grad_()
    with GivenNormals(z.repeat(4)) as mode:
        x = dist.Gamma(shapes, torch.tensor(2.0)).rsample() * 2
    assert mode.count == 60
    a, n = shapes.detach(), z.expand(4, 15)
    below, above = stats.gamma(a), stats.norm
    exact = np.where(n < 0, below.ppf(above.cdf(n)), below.isf(above.sf(n)))
    assert np.allclose(x.detach(), exact, rtol=1e-12)
    (slope,) = torch.autograd.grad(x.sum(), shapes)
    grid = torch.exp(torch.linspace(-60, 0, 100_001)) * x[1].detach().unsqueeze(1)
    parts = (grid.log() - torch.digamma(torch.tensor(1.0))) * torch.exp(-grid) * grid
    change = torch.trapezoid(parts, dx=60 / 100_000, dim=1)
    assert torch.allclose(slope[1, :11], (-change * x[1].detach().exp())[:11], rtol=1e-5)

    def one(shape, row):
        with GivenNormals(row):
            return torch._standard_gamma(shape).sum()

    rows = noise(5, 3)
    alone = torch.stack([one(a[:, 0][:3], row) for row in rows])
    assert torch.equal(torch.func.vmap(one, in_dims=(None, 0))(a[:, 0][:3], rows), alone)
