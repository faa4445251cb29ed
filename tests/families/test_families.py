"""Families: the rules for arguments, and heads against distributions written out by hand."""

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.autograd.functional import jacobian

from ppvae import Family, families

EXPECTED = {
    "deterministic": ("v",),
    "zero": (),
    "noise_only": (),
    "mean_only": ("loc",),
    "mean_only_bounded": ("loc",),
    "shared_scale": ("loc",),
    "mean_scale": ("loc", "scale"),
    "student_t": ("df", "loc", "scale"),
    "low_rank": ("loc", "cov_factor", "cov_diag"),
    "full_rank": ("loc", "scale_tril"),
    "flow": ("loc", "scale", "shape"),
}


def test_the_ladder_has_the_channels_it_says():
    assert {name: family.channels for name, family in families.LADDER.items()} == EXPECTED
    assert all(family.name == name for name, family in families.LADDER.items())


@pytest.mark.parametrize("name", list(EXPECTED))
def test_repr_says_what_it_is(name):
    shown = repr(families.LADDER[name])
    assert shown.split("(")[0] in ("Family", "Flow", "Prior")


def test_repr_rebuilds_simple_families():
    assert repr(Family(dist.Normal, scale=0.5)) == "Family(Normal, scale=0.5)"
    assert repr(families.shared_scale) == "Family(Normal, scale=shared)"


def test_alternatives_take_the_last_unless_one_is_named():
    assert Family(dist.Bernoulli).channels == ("logits",)
    assert Family(dist.Bernoulli, probs=families.Channel()).channels == ("probs",)
    named = Family(dist.MultivariateNormal, covariance_matrix=1.0)
    assert named.channels == ("loc",)


def test_bounded_mean_is_a_tanh():
    head = families.mean_only_bounded.head(4, torch.Size([3]))
    features = torch.randn(5, 4)
    raw = head.loc.linear(features)
    assert torch.allclose(head(features).loc, torch.tanh(raw / 2), atol=1e-12)


def test_shared_scale_is_one_number_for_all_data_and_coordinates():
    fn = families.shared_scale.head(4, torch.Size([3]))(torch.randn(5, 4))
    assert fn.batch_shape == (5, 3) and len(fn.scale.unique()) == 1


def test_a_number_fills_a_vector_or_a_diagonal():
    head = Family(dist.MultivariateNormal, loc=2.0, scale_tril=3.0).head(4, torch.Size([2]))
    fn = head(torch.randn(5, 4))
    assert fn.batch_shape == (5,)
    assert torch.equal(fn.loc, torch.full((5, 2), 2.0))
    assert torch.equal(fn.scale_tril, 3 * torch.eye(2).expand(5, 2, 2))


def test_full_rank_has_no_idle_parameters():
    head = families.full_rank.head(None, torch.Size([4]))
    assert sum(p.numel() for p in head.parameters()) == 4 + 4 * 5 // 2
    tril = head(None).scale_tril
    assert torch.equal(tril, tril.tril()) and (tril.diagonal() > 0).all()
    free = head.scale_tril.raw
    slope = jacobian(lambda raw: head.scale_tril.constraint and _tril(head, raw), free)
    assert (slope.abs().sum((0, 1)) > 0).all()


def _tril(head, raw):
    rows, columns = torch.tril_indices(4, 4)
    flat = torch.zeros(16).scatter(-1, rows * 4 + columns, raw).reshape(4, 4)
    return torch.distributions.transform_to(constraints.lower_cholesky)(flat)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("layers", [0, 2, 4])
def test_flow_density_against_autodiff(size, layers):
    """log q(z) = log N(eps) - log |det dz/deps|, the Jacobian taken by autodiff."""
    head = families.Flow(layers=layers, hidden=8, bins=4).head(3, torch.Size([size]))
    for parameter in head.parameters():  # far from the identity
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    features = torch.randn(1, 3)
    fn = head(features)

    def push(eps):
        for transform in fn.transforms:
            eps = transform(eps)
        return eps

    eps = torch.randn(1, size)
    z = push(eps)
    slope = jacobian(push, eps).reshape(size, size)
    expected = dist.Normal(0.0, 1.0).log_prob(eps).sum() - torch.linalg.slogdet(slope)[1]
    assert torch.allclose(head(features).log_prob(z.detach()), expected, atol=1e-8)


def test_flow_starts_near_mean_scale():
    torch.manual_seed(0)
    head = families.flow.head(3, torch.Size([4]))
    features, z = torch.randn(6, 3), torch.randn(6, 4)
    normal = dist.Normal(head.loc(features), head.scale(features)).to_event(1)
    assert torch.allclose(head(features).log_prob(z), normal.log_prob(z), atol=0.05)


BAD = {
    "not a class": (lambda: Family("Normal"), TypeError, "distribution: expected a class"),
    "plain torch": (lambda: Family(torch.distributions.Normal), TypeError, "pyro.distributions"),
    "no such argument": (lambda: Family(dist.Normal, mean=0.0), ValueError, "it has loc, scale"),
    "rule": (lambda: Family(dist.Normal, loc="x"), TypeError, "loc: expected a number.* got str"),
    "negative scale": (lambda: Family(dist.Normal, scale=-1.0), ValueError, "scale: .* got -1.0"),
    "nan": (lambda: Family(dist.Normal, loc=float("nan")), ValueError, "loc: .* got nan"),
    "discrete": (lambda: Family(dist.Binomial), ValueError, "total_count: expected a fixed number"),
    "odd layers": (lambda: families.Flow(layers=3), ValueError, "layers: .* got 3"),
    "one bin": (lambda: families.Flow(bins=1), ValueError, "bins"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input(name):
    build, error, message = BAD[name]
    with pytest.raises(error, match=message):
        build()


def test_the_density_of_a_point_is_never_a_channel():
    assert Family(dist.Delta).channels == ("v",)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Family(dist.Uniform), TypeError, "depend on one another"),
        (
            lambda: Family(dist.Normal, scale=constraints.interval(-1.0, 1.0)),
            ValueError,
            "scale: expected a constraint inside",
        ),
    ],
)
def test_arguments_that_no_channel_can_fill(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_tails_start_like_those_of_a_gaussian():
    fn = families.student_t.head(3, torch.Size([2]))(torch.zeros(4, 3))
    assert ((fn.df > 15) & (fn.df < 60)).all()
