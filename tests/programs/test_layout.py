"""Where draws, data and coordinates are in the values of a trace, there and back."""

import itertools
from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import cases
from pyro import poutine

from ppvae.programs.layout import Layout, Place
from ppvae.programs.plates import data_plate
from ppvae.programs.supports import from_reals, same_support
from ppvae.programs.tracing import draws_plate, run_trace


def _mixture():
    parts = dist.LogNormal(torch.zeros(2), torch.ones(2))
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)


def _others(x):
    """Simplices and correlations, whose unconstrained shapes are others, beside a mixture."""
    left, right = pyro.plate("left", 2, dim=-3), pyro.plate("right", 3, dim=-1)
    with pyro.plate("data", len(x), dim=-2):
        with left:
            pyro.sample("s", dist.Dirichlet(torch.ones(4)))
            pyro.sample("c", dist.LKJCholesky(3, torch.tensor(2.0)))
        with right:
            pyro.sample("m", _mixture())
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


MODELS = {name: (case.model, case.args) for name, case in cases().items() if name != "own rows"}
MODELS["other shapes"] = (_others, cases()["one vector"].args)
LABELS = {
    "one vector": range(2),
    "one scalar": ["z"],
    "positive": ["a[0]", "a[1]", "b"],
    "simplex": ["s[0]", "s[1]", "s[2]", "s[3]", "g"],
    "right of steps": ["z[0,0]", "z[0,1]", "z[1,0]", "z[1,1]"],
    "steps inside": ["z[0]", "z[1]", "z[2]"],
    "hierarchy": ["mu", "theta[0]", "theta[1]", "theta[2]", "theta[3]"],
    "other shapes": [
        *(f"s[{i},{j}]" for i, j in itertools.product(range(2), range(4))),
        *(f"c[{i},{j},{k}]" for i, j, k in itertools.product(range(2), range(3), range(3))),
        *(f"m[{i}]" for i in range(3)),
    ],
}
SIZES = {"other shapes": 2 * 3 + 2 * 3 + 3, "simplex": 4, "hierarchy": 5}


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, drawn):
    """`flat` and `back`, `free` and `constrained` are inverse, in a plate of draws or without."""
    model, args = MODELS[name]
    draws = draws_plate(model, *args, draws=5) if drawn else None
    trace, one = run_trace(model, args, draws), run_trace(model, args)
    plate = data_plate(trace)
    layout = Layout.of(trace, plate, draws)
    values = {site: trace.nodes[site]["value"] for site in layout.places}
    local = all(place.datum is not None for place in layout.places.values())
    flat, state = layout.flat(values), layout.free(values)
    assert flat.shape == (5 if drawn else 1, len(args[0]) if local else 1, len(layout.labels))
    assert state.shape == (*flat.shape[:2], layout.size)
    assert layout.size == SIZES.get(name, len(layout.labels))
    assert layout.labels == list(LABELS.get(name, layout.labels))
    back, (again, log_dets) = layout.back(flat), layout.constrained(state)
    for site, place in layout.places.items():
        value, free = values[site], from_reals(place.support).inv(values[site])
        assert torch.equal(back[site].expand_as(value), value)
        assert torch.allclose(again[site].expand_as(value), value)
        log_det = from_reals(place.support).log_abs_det_jacobian(free, value)
        assert log_dets[site].shape == flat.shape[:2]
        assert torch.allclose(log_dets[site].sum(), log_det.sum())
        assert torch.equal(state[..., layout.slices[site]], place.flat(free, len(place.space)))
        if drawn:  # as if it were read off a trace without draws
            inside = Place.of(one.nodes[site], plate).inside(draws)
            assert torch.equal(inside.flat(value), place.flat(value))
            assert (inside.batch, inside.datum) == (place.batch, place.datum)


def test_coordinates_stand_where_their_labels_say():
    model, args = MODELS["other shapes"]
    draws = draws_plate(model, *args, draws=2)
    trace = run_trace(model, args, draws)
    layout = Layout.of(trace, data_plate(trace), draws)
    s, c, m = (trace.nodes[site]["value"] for site in "scm")
    flat = layout.flat({"s": s, "c": c, "m": m})
    for label, value in (
        ("s[1,2]", s[1, 1, 4, 0, 2]),
        ("c[1,2,0]", c[1, 1, 4, 0, 2, 0]),
        ("m[2]", m[1, 0, 4, 2]),
    ):
        assert flat[1, 4, layout.labels.index(label)] == value
    with pytest.raises(ValueError, match="model: expected latent sites, got none"):
        Layout.of(poutine.Trace(), None)


def plate_of(plates, latents=(), name=None):
    """The data plate for four data with such plates around them: sizes by name, outermost first.

    `latents` has the names of the plates around each latent.
    """

    def model(x):
        frames = {n: pyro.plate(n, plates[n], dim=i - len(plates)) for i, n in enumerate(plates)}
        for number, inside in enumerate([*latents, plates]):
            with ExitStack() as stack:
                for plate in inside:
                    stack.enter_context(frames[plate])
                obs = x.new_zeros(()) if number == len(latents) else None
                pyro.sample(f"site_{number}", dist.Normal(0.0, 1.0), obs=obs)

    frame = data_plate(poutine.trace(model).get_trace(torch.zeros(4)), name)
    return None if frame is None else frame.name


@pytest.mark.parametrize(
    ("plates", "latents", "name", "expected"),
    [
        ({"a": 4, "b": 5}, [], "b", "b"),  # a name decides
        ({"a": 4, "data": 3}, [("a",)], None, "data"),  # else it is `data`
        ({"a": 3, "b": 4}, [("a",)], None, "b"),  # else one of the length of the data
        ({"a": 4, "b": 4}, [("b",), ("a", "b")], None, "b"),  # that all latents share
        ({"a": 4, "b": 4}, [("a",), ("b",)], None, "a"),  # else the outermost
        ({"a": 4, "b": 4}, [], None, "a"),
        ({"a": 3, "b": 5}, [], None, "a"),
        ({"a": 3, "b": 5}, [("b",)], None, "b"),
        ({}, [], None, None),
    ],
)
def test_the_rule_for_the_data_plate(plates, latents, name, expected):
    assert plate_of(plates, latents, name) == expected


def test_a_plate_that_is_not_there():
    with pytest.raises(ValueError, match=r"plate: expected one of \['a'\], got 'rows'"):
        plate_of({"a": 4}, name="rows")


def test_supports():
    """A mixture is reached as its components are; bounds make a set, event dims do not."""
    half = dist.constraints.greater_than(0.5)
    positive, unit = dist.constraints.positive, dist.constraints.unit_interval
    assert isinstance(from_reals(_mixture().support), type(from_reals(positive)))
    assert same_support(_mixture().support, dist.constraints.independent(positive, 1))
    assert same_support(half, dist.constraints.greater_than(torch.tensor(0.5)))
    assert not same_support(half, dist.constraints.greater_than(1.0))
    ends = torch.tensor([1.0, 2.0])
    assert same_support(*[dist.constraints.interval(-ends, ends) for _ in range(2)])
    assert not same_support(unit, dist.constraints.interval(-ends, ends))
    assert not same_support(positive, dist.constraints.real)
