"""Charts: at their origin a guide is what the curvature of the posterior says it is."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from ppvae import Family, FamilyGuide, families
from ppvae.guides.chart import Chart, Piece, pieces_of

MEAN = torch.tensor([0.5, -2.0, 100.0, 0.1], dtype=torch.float64)
_ROOT = torch.tensor(
    [[2.0, 0, 0, 0], [1.0, 0.5, 0, 0], [-3.0, 0.2, 40.0, 0], [0.1, -0.3, 2.0, 1e-3]],
    dtype=torch.float64,
)
X = torch.zeros(3)


def model(x):
    """Two sites of two numbers each, the second in a plate."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w.sum() + z.sum(), 1.0), obs=x)


def one(x):
    """The same numbers as one site."""
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)


def charted(program, family, mean=MEAN, factor=_ROOT, others=()):
    """A guide and its chart."""
    guide = FamilyGuide(program, family).setup(X)
    parameters = [*guide.parameters(), *others]
    return guide, Chart(parameters, pieces_of(guide, mean, factor), factor)


def put(chart, place):
    """Gives the parameters their values at a place, and returns these."""
    values = chart(place)
    for parameter, value in zip(chart.parameters, values, strict=True):
        parameter.data.copy_(value.reshape(parameter.shape))
    return torch.cat([value.reshape(-1) for value in values]).detach()


def test_full_rank_starts_as_the_gaussian_itself():
    guide, chart = charted(one, families.full_rank)
    assert chart.size == 4 + 10 and chart.known().all() and chart.located() == slice(0, 4)
    put(chart, torch.zeros(chart.size))
    fn = guide.heads["w"](None)
    assert torch.allclose(fn.mean, MEAN, rtol=1e-12)
    assert torch.allclose(fn.scale_tril, _ROOT, rtol=1e-9, atol=1e-12)


def test_locations_move_along_the_axes_and_a_factor_is_multiplied():
    guide, chart = charted(one, families.full_rank)
    place = torch.linspace(-0.5, 0.5, chart.size)
    put(chart, place)
    fn = guide.heads["w"](None)
    assert torch.allclose(fn.mean, MEAN + _ROOT @ place[:4], rtol=1e-12)
    inner = torch.zeros(4, 4)
    inner[*torch.tril_indices(4, 4)] = place[4:]
    inner = inner.tril(-1) + torch.diag(inner.diagonal().exp())
    assert torch.allclose(fn.scale_tril, _ROOT @ inner, rtol=1e-9, atol=1e-12)
    chart.units[0] = 10.0
    put(chart, place)
    assert torch.allclose(guide.heads["w"](None).mean, MEAN + _ROOT @ (place[:4] * chart.units[:4]))


@pytest.mark.parametrize("program", [one, model])
def test_mean_scale_starts_with_the_sds_that_are_best_for_it(program):
    """Those of one coordinate while the others are held: what is optimal for independent ones."""
    guide, chart = charted(program, families.mean_scale)
    put(chart, torch.zeros(chart.size))
    fns = [guide.heads[block.key](None) for block in guide.blocks]
    mean, sd = (
        torch.cat([getattr(fn, name).reshape(-1) for fn in fns]) for name in ("mean", "stddev")
    )
    precision = torch.linalg.inv(_ROOT @ _ROOT.T)
    assert torch.allclose(mean, MEAN) and torch.allclose(
        sd, precision.diagonal().rsqrt(), rtol=1e-5
    )
    # the sites move together, along the axes of all
    place = torch.zeros(chart.size)
    place[:4] = torch.tensor([0.1, -0.2, 0.3, 0.4])
    put(chart, place)
    mean = torch.cat([guide.heads[block.key](None).mean.reshape(-1) for block in guide.blocks])
    assert torch.allclose(mean, MEAN + _ROOT @ place[:4])


def test_a_shared_scale_starts_at_the_geometric_mean():
    guide, chart = charted(one, families.shared_scale)
    put(chart, torch.zeros(chart.size))
    expected = torch.linalg.inv(_ROOT @ _ROOT.T).diagonal().rsqrt().log().mean().exp()
    assert torch.allclose(guide.heads["w"](None).stddev, expected, rtol=1e-5)


def test_a_bounded_location_starts_inside_of_its_interval():
    guide, chart = charted(one, families.mean_only_bounded)
    assert chart.located() is None and not chart.known().any()
    put(chart, torch.zeros(chart.size))
    assert torch.allclose(guide.heads["w"](None).mean, torch.tensor([0.5, -0.9, 0.9, 0.1]))


def test_a_low_rank_has_the_sds_and_the_largest_axes():
    """Of a covariance that is one of its members up to the scale of the diagonal."""
    sd = torch.tensor([1.0, 10.0, 0.1, 3.0])
    loading = torch.tensor([[0.9, 0.0], [0.9, 0.0], [0.0, 0.8], [0.0, 0.8]])
    held = torch.eye(4) + loading @ loading.T  # the sds with the others held are not these
    factor = torch.linalg.cholesky(sd[:, None] * held * sd)
    guide, chart = charted(one, families.low_rank, factor=factor)
    put(chart, torch.zeros(chart.size))
    fn = guide.heads["w"](None)
    conditional = torch.cholesky_inverse(factor).diagonal().rsqrt()
    assert torch.allclose(fn.cov_diag, conditional**2, rtol=1e-5)
    scaled = factor / conditional[:, None]
    sizes, axes = torch.linalg.eigh(scaled @ scaled.T)
    top = axes[:, -2:] @ torch.diag(sizes[-2:] - 1) @ axes[:, -2:].T
    got = fn.cov_factor / conditional[:, None]
    assert torch.allclose(got @ got.T, top, atol=1e-9)


@pytest.mark.parametrize("family", list(families.LADDER))
def test_values_follow_from_coordinates_one_to_one(family):
    """As many coordinates as numbers, and a Jacobian that has no null space, in every family."""
    guide = FamilyGuide(one, families.LADDER[family]).setup(X)
    parameters = list(guide.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    if not 0 < count < 60:
        return
    chart = Chart(parameters, pieces_of(guide, MEAN, _ROOT), _ROOT)
    assert chart.size == count

    def values(place):
        return torch.cat([value.reshape(-1) for value in chart(place)])

    jacobian = torch.func.jacrev(values)(torch.full((count,), 0.1))
    rows = jacobian / jacobian.norm(dim=1, keepdim=True)
    assert torch.isfinite(rows).all()
    assert torch.linalg.matrix_rank(rows, tol=1e-12) == count


def test_a_positive_site_is_met_in_its_unconstrained_space():
    def positive(x):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, s), obs=x)

    mean, factor = torch.tensor([-1.5]), torch.tensor([[0.25]])
    guide, chart = charted(positive, families.mean_scale, mean, factor)
    put(chart, torch.zeros(2))
    fn = guide.heads["s"](None)
    base = fn
    while not isinstance(base, dist.Normal):
        base = base.base_dist
    assert base.loc.item() == pytest.approx(-1.5) and base.scale.item() == pytest.approx(0.25)


def test_parameters_of_which_nothing_is_known_move_alone():
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float32))
    guide, chart = charted(one, families.mean_scale, others=[weight])
    assert chart.size == 12 and chart.known().tolist() == [True] * 8 + [False] * 4
    place = torch.zeros(12)
    place[8:] = torch.tensor([0.0, 0.5, 0.0, -1.0])
    *_, value = chart(place)
    assert value.tolist() == [[1.0, 2.5], [3.0, 3.0]] and value.dtype == torch.float64
    lone = Chart([weight], [], torch.eye(0))
    assert lone.located() is None and not lone.known().any() and lone.slices() == [slice(0, 4)]
    unit = Family(dist.MultivariateNormal, scale_tril=constraints.unit_lower_cholesky)
    assert charted(one, unit)[1].known().tolist() == [True] * 4 + [False] * 16  # a whole matrix
    encoder = FamilyGuide(one, families.mean_scale, encoder=torch.nn.Linear(1, 1))
    assert pieces_of(encoder, MEAN, _ROOT) == [] == pieces_of(one, MEAN, _ROOT)


def test_pieces_keep_their_order():
    first, second = (torch.nn.Parameter(torch.zeros(size)) for size in (2, 1))
    pieces = [Piece([second], 1, lambda u: [3 * u])]
    chart = Chart([first, second], pieces, torch.eye(1))
    values = chart(torch.tensor([1.0, 2.0, 4.0]))
    assert [value.tolist() for value in values] == [[2.0, 4.0], [3.0]]
    assert chart.slices() == [slice(0, 1), slice(1, 3)]
