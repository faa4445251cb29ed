"""What is printed of a public object is short and says what it is."""

import pyro.distributions as dist
import pytest
import torch
from pairs import build, data

from ppvae import Family, closed_form, families, fit, likelihoods, nn, objectives, stage
from ppvae.models import GaussianMixture, HierarchicalRegression
from ppvae.regression import Horseshoe, LinearRegression, evidence_maximum, exact_posterior

X = torch.linspace(-1, 1, 12).reshape(6, 2).square().cumsum(0)
Y = torch.arange(6.0)


def posterior():
    return exact_posterior(X, Y, weight=dist.Normal(0.0, 1.0), noise=dist.HalfNormal(1.0))


#: name -> how it is made, and the first line
PRINTED = {
    "family": (lambda: Family(dist.Normal, scale=0.5), "Family(Normal, scale=0.5)"),
    "flow": (lambda: families.flow, "Flow(layers=2, hidden=64, bins=8)"),
    "guide": (lambda: build()[1], "FamilyGuide("),
    "model": (lambda: build()[0], "VAE("),
    "likelihood": (lambda: likelihoods.Normal(0.5), "Normal(scale=0.5)"),
    "objective": (lambda: objectives.IWAE(4), "IWAE(num_samples=4, gradient='pathwise')"),
    "fit": (lambda: fit(*build(), data(), num_epochs=2, progress=False), "Fit by stochastic"),
    "staged": (
        lambda: stage(*build(), data(), objective=objectives.IWAE(4)),
        "Staged(IWAE(num_samples=4, gradient='pathwise') of VAE and FamilyGuide, recorded on (10,",
    ),
    "layer": (lambda: nn.Standardize.of(data()), "Standardize((3,))"),
    "posterior": (posterior, "ExactPosterior of 3 numbers given 6 rows, log evidence -"),
    "leave-one-out": (lambda: posterior().loo(), "LeaveOneOut of 6 rows: -"),
    "maximum": (lambda: evidence_maximum(X, Y, noise=1.0), "EvidenceMaximum at scale "),
    "prior": (Horseshoe, "Horseshoe(scale=1.0)"),
    "regression": (lambda: LinearRegression(2, noise=0.7), "LinearRegression(2, weight=Normal("),
    "groups": (lambda: HierarchicalRegression(2, 5, tau=1.0), "HierarchicalRegression(2, 5, mu="),
    "mixture": (
        lambda: GaussianMixture(3, 2, "diag", means=dist.Normal(0.0, 1.0)),
        "GaussianMixture(3, 2, 'diag', means=Normal(loc: 0.0, scale: 1.0))",
    ),
    "optimum": (
        lambda: closed_form.regression(X, Y, 1.0, 1.0, families.mean_scale), "Optimum(objective: -"
    ),
    "best decoder": (
        lambda: closed_form.learned_decoder(data(), 1, families.mean_scale),
        "LearnedDecoder(objective: -",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_it_is_short_and_says_what_it_is(name):
    make, first = PRINTED[name]
    text = repr(make())
    assert text.startswith(first), text
    assert len(text.splitlines()) < 20 and len(text) < 700 and " object at " not in text


def test_the_guide_says_its_family():
    assert "  (family): Family(Normal)" in repr(build()[1]).splitlines()


def test_the_numbers_of_a_posterior_stand_in_a_table_unless_there_are_many():
    found = posterior()
    head, scores, columns, *rows = repr(found).splitlines()
    assert f"{found.log_evidence:.4f} nats" in head
    assert scores.startswith(f"R2 {found.r2:.4f}, leave-one-out {found.loo().total:.4f} nats")
    assert columns.split() == ["mean", "sd", "5", "%", "95", "%"]
    table = torch.tensor([list(map(float, row.split()[1:])) for row in rows])
    low, high = map(torch.as_tensor, found.quantile([0.05, 0.95]))
    wanted = torch.stack([torch.as_tensor(found.mean), torch.as_tensor(found.sd), low, high], 1)
    assert torch.allclose(table, wanted, rtol=5e-4)  # four digits
    assert [row.split()[0] for row in rows] == found.names
    wide = exact_posterior(torch.randn(5, 31), Y[:5], noise=1.0)
    assert len(repr(wide).splitlines()) == 2
    assert f"{found.loo().total:.4f} nats" in repr(found.loo())
