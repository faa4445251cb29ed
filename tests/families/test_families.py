"""Families: values with a name, rules for arguments, and heads against densities written out."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from cases import FAMILIES
from pyro.distributions import constraints
from torch.autograd.functional import jacobian

from ppvae import Family, families
from ppvae.programs.supports import is_real

CHANNELS = dict(deterministic="v", zero="", noise_only="", mean_only="loc", shared_scale="loc")
CHANNELS |= dict(mean_only_bounded="loc", mean_scale="loc scale", student_t="df loc scale")
CHANNELS |= dict(low_rank="loc cov_factor cov_diag", full_rank="loc scale_tril")
CHANNELS |= dict(flow="loc scale shape")
TWO, THREE = torch.Size([2]), torch.Size([3])


def test_the_ladder_has_the_names_and_channels_it_says():
    assert set(CHANNELS) == set(families.LADDER)
    for name, family in families.LADDER.items():
        assert family.channels == tuple(CHANNELS[name].split())
        assert family.name == name and getattr(families, name) is family
        assert families.as_family(name) is family and families.as_family(family) is family


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_is_a_value(name):
    """Copies are equal, under one hash, with one name, and make the same numbers."""
    family = FAMILIES[name]
    for other in (copy.copy(family), copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
        assert other == family and hash(other) == hash(family) and other.name == family.name
        assert repr(other) == repr(family)
        if name != "noise_only":
            torch.manual_seed(0)
            one = family.head(4, TWO).state_dict()
            torch.manual_seed(0)
            assert all(torch.equal(v, one[k]) for k, v in other.head(4, TWO).state_dict().items())
    equal = ["mean_only_bounded", "bounded"] if "bounded" in name else [name]  # one has two names
    assert [key for key, other in FAMILIES.items() if other == family] == equal


def test_families_are_equal_by_their_members_and_not_by_how_they_were_written():
    half = Family(dist.Normal, scale=0.5)
    for other in (
        Family(dist.Normal, scale=torch.tensor(0.5)),
        Family(dist.Normal, scale=torch.tensor(0.5).numpy()[()], loc=families.Channel()),
        Family(dist.Normal, loc=families.Channel(start=3.0), scale=0.5),
    ):
        assert other == half and hash(other) == hash(half)
    for other in (
        Family(dist.Normal, scale=0.6),
        Family(dist.Normal, scale=torch.tensor([0.5, 0.5])),
        Family(dist.Normal, loc=constraints.interval(-1, 1), scale=0.5),
        Family(dist.Normal, loc=families.shared, scale=0.5),
        Family(dist.Laplace, scale=0.5),
    ):
        assert other != half
    bounds = [Family(dist.Normal, loc=constraints.interval(-1, b), scale=1) for b in (1, 2)]
    assert [family.name for family in bounds] == ["mean_only_bounded", repr(bounds[1])]
    assert families.Flow() == families.flow != families.Flow(hidden=1, bins=2)
    columns = [families.Channel(columns=number) for number in (2, 3)]
    ranks = [Family(dist.LowRankMultivariateNormal, cov_factor=rule) for rule in columns]
    assert ranks[0] == families.low_rank != ranks[1]


def test_repr_is_the_expression():
    assert repr(families.shared_scale) == "Family(Normal, scale=shared)"
    widths = torch.tensor([0.1, 2.0])
    assert repr(Family(dist.Normal, scale=widths)) == "Family(Normal, scale=[0.1, 2. ])"
    assert repr(Family(dist.Normal, scale=widths.float())) == "Family(Normal, scale=[0.1, 2. ])"
    assert repr(families.flow) == "Flow(layers=2, hidden=64, bins=8)"
    assert families.noise_only.name == "noise_only" and repr(families.noise_only) == "Prior()"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "noise_only"])
@pytest.mark.parametrize("features", [None, 4])
def test_a_head_returns_what_its_family_says(name, features):
    family = FAMILIES[name]
    batch = torch.Size([] if features is None else [5])
    fn = family.head(features, THREE)(None if features is None else torch.randn(5, 4))
    assert fn.batch_shape == (batch if family.joint else batch + THREE)
    assert fn.shape() == batch + THREE
    assert is_real(family.support) and is_real(fn.support)
    with pytest.raises(TypeError, match="expected one that builds heads"):
        families.noise_only.head(features, THREE)


def test_the_support_is_that_of_the_distribution_if_its_class_has_one():
    assert Family(dist.Gamma).support is dist.Gamma.support
    assert Family(dist.GeneralizedPareto).support is None  # it depends on the arguments


def test_bounded_mean_is_a_tanh():
    head = families.mean_only_bounded.head(4, THREE)
    features = torch.randn(5, 4)
    raw = head.loc.linear(features)
    assert torch.allclose(head(features).loc, torch.tanh(raw / 2), atol=1e-12)


def test_a_number_fills_a_vector_or_a_diagonal():
    fn = Family(dist.MultivariateNormal, loc=2.0, scale_tril=3.0).head(4, TWO)(torch.randn(5, 4))
    assert torch.equal(fn.loc, torch.full((5, 2), 2.0))
    assert torch.equal(fn.scale_tril, 3 * torch.eye(2).expand(5, 2, 2))


def test_full_rank_has_no_idle_parameters():
    head = families.full_rank.head(None, torch.Size([4]))
    assert sum(p.numel() for p in head.parameters()) == 4 + 4 * 5 // 2
    tril, raw = head(None).scale_tril, head.scale_tril.raw
    rows, columns = torch.tril_indices(4, 4)
    expected = torch.where(rows == columns, raw.exp(), raw)
    assert torch.allclose(tril[rows, columns], expected) and torch.equal(tril, tril.tril())


def _begins(distribution, name, start):
    return Family(distribution, **{name: families.Channel(start=start)})


STARTS = [  # family, argument, features, where it starts
    (families.student_t, "df", 3, 30.0),
    (families.student_t, "df", None, 30.0),
    (families.mean_scale, "scale", None, 0.1),
    (families.mean_scale, "scale", 3, 1.0),
    (families.full_rank, "scale_tril", None, 0.1),
    (families.low_rank, "cov_diag", None, 0.01),
    (_begins(dist.Normal, "loc", 200.0), "loc", 3, 200.0),
    (Family(dist.Normal, scale=families.Shared(start=2.0)), "scale", 3, 2.0),
    (_begins(dist.MultivariateNormal, "scale_tril", 3.0), "scale_tril", 3, 3.0),
    (_begins(dist.MultivariateNormal, "covariance_matrix", 2.0), "covariance_matrix", None, 2.0),
]


@pytest.mark.parametrize(("family", "name", "features", "start"), STARTS)
def test_where_arguments_start(family, name, features, start):
    """Before the transform: five standard deviations of a parameter, or the bound of a bias."""
    argument = getattr(family.head(features, TWO), name)
    value = argument(None if features is None else torch.zeros(3))
    goal = torch.tensor(start) * (torch.eye(2) if value.dim() == 2 else torch.ones(value.shape))
    inverse = torch.distributions.transform_to(argument.constraint).inv
    free = argument.linear is None
    assert (inverse(value) - inverse(goal)).abs().max() < (0.05 if free else 3**-0.5)


@pytest.mark.parametrize("low", [0.1, 0.5])
def test_a_default_start_outside_the_constraint_is_left_out(low):
    for constraint in (constraints.greater_than(low), constraints.interval(low, 2.0)):
        for features in (None, 3):
            head = Family(dist.Normal, scale=constraint).head(features, TWO)
            fn = head(None if features is None else torch.zeros(4, 3))
            assert constraint.check(fn.scale).all() and (fn.scale > low + 0.2).all()
            fn.scale.sum().backward()
            assert all(p.grad is not None for p in head.scale.parameters())


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("layers", [0, 2, 4])
def test_flow_density_against_autodiff(size, layers):
    """log q(z) = log N(eps) - log |det dz/deps|, the Jacobian taken by autodiff."""
    head = families.Flow(layers=layers, hidden=8, bins=4).head(3, torch.Size([size]))
    assert len(head.couplings) == (layers if size > 1 else 0)
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


def _normal(**rules):
    return lambda: Family(dist.Normal, **rules)


def _of(distribution):
    return lambda: Family(distribution)


def _flow(**options):
    return lambda: families.Flow(**options)


INSIDE = "scale: expected a constraint inside"
BAD = [
    (_of("Normal"), TypeError, "distribution: expected a class"),
    (_of(torch.distributions.Normal), TypeError, "pyro.distributions"),
    (_of(dist.Uniform), TypeError, "depend on one another"),
    (_of(dist.Independent), TypeError, "base_distribution"),
    (_of(dist.TransformedDistribution), TypeError, "transforms"),
    (_of(dist.MixtureSameFamily), TypeError, "component_distribution"),
    (_of(dist.ImproperUniform), TypeError, "learned arguments alone"),
    (_of(dist.Unit), TypeError, r"draws shape \(2, 0\)"),
    (_of(dist.SpanningTree), TypeError, "got SpanningTree"),
    (_of(dist.OMTMultivariateNormal), TypeError, "LowerTriangular"),
    (_of(dist.Binomial), ValueError, "total_count: expected a fixed number"),
    (_normal(mean=0.0), ValueError, "it has loc, scale"),
    (_normal(scale=True), TypeError, "scale: expected a number.* got bool"),
    (_normal(scale=torch.tensor(1 + 0j)), TypeError, "scale: expected real numbers"),
    (_normal(scale=families.Channel(start="a")), TypeError, "scale: expected real numbers"),
    (_normal(loc="x"), TypeError, "loc: expected a number.* got str"),
    (_normal(loc=float("nan")), ValueError, "loc: .* got nan"),
    (_normal(scale=-1.0), ValueError, "scale: .* got -1.0"),
    (_normal(scale=families.Channel(start=-1.0)), ValueError, "scale: .* got -1.0"),
    (_normal(scale=constraints.interval(-1.0, 1.0)), ValueError, INSIDE),
    (_normal(scale=constraints.interval(2.0, 1.0)), ValueError, INSIDE),
    (_normal(scale=constraints.interval(1.0, 1.0)), ValueError, INSIDE),
    (_normal(scale=constraints.simplex), ValueError, INSIDE),
    (_normal(scale=constraints.boolean), ValueError, INSIDE),
    (_flow(layers=3), ValueError, "layers: .* got 3"),
    (_flow(layers=-2), ValueError, "layers: .* got -2"),
    (_flow(hidden=0), ValueError, "hidden: .* 1, got 0"),
    (_flow(bins=1), ValueError, "bins: .* 2, got 1"),
    (lambda: families.as_family("bayes"), TypeError, "family: .*'zero'.* got 'bayes'"),
    (lambda: families.as_family(dist.Normal), TypeError, "expected a guide family"),
    (lambda: families.as_family(families.Flow), TypeError, "expected a guide family"),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()
