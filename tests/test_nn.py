"""Layers for raw data agree with their formulas; a fit in raw units is one in standard units."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ppvae import VAE, FamilyGuide, families, fit, fit_replicates, likelihoods, stage
from ppvae.nn import Affine, Expm1, FillMissing, Log1p, Standardize, mlp

SIZES = torch.tensor([1.0, 1e3, 1e6])


def table(rows=40):
    """Columns of size 1, 1e3 and 1e6, each as far from zero as it is wide."""
    unit = torch.randn(rows, 3, generator=torch.Generator().manual_seed(2))
    return (unit @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]]) + 1) * SIZES


def sequential(*layers, dtype=torch.float64):
    return nn.Sequential(*layers).to(dtype)


# ------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("shape", [(50,), (50, 3), (50, 1, 4, 4)])
def test_standardize_is_the_mean_and_deviation_of_each_column(shape):
    x = 3 * torch.randn(shape) + 7
    layer = Standardize.of(x)
    assert torch.allclose(layer.loc, x.mean(0)) and layer.loc.shape == shape[1:]
    assert torch.allclose(layer.scale, x.std(0, correction=0))
    y = layer(x)
    assert torch.allclose(y.mean(0), torch.zeros(shape[1:]), atol=1e-12)
    assert torch.allclose(y.square().mean(0), torch.ones(shape[1:]))
    assert torch.allclose(layer.inverse(y), x)
    assert torch.equal(layer.inverse.inverse(x), y)
    assert layer(x[None]).shape == (1, *shape)  # any leading dims


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e8, -1e8])
def test_an_offset_does_not_spoil_the_deviation(dtype, offset):
    """Whole numbers, of which single precision holds those divisible by eight: no rounding."""
    x = torch.arange(-500, 501)[:, None] * 8.0
    layer = Standardize.of((x + offset).to(dtype))
    exact = 8 * np.sqrt((1001**2 - 1) / 12)  # of a thousand and one numbers in a row
    eps = torch.finfo(dtype).eps
    assert layer.scale.dtype == layer.loc.dtype == dtype
    assert layer.scale.item() == pytest.approx(exact, rel=4 * eps)
    assert layer.loc.item() == offset


def test_a_column_that_does_not_vary_is_only_shifted():
    x = torch.stack([torch.full((9,), 0.1), torch.full((9,), 1e9), torch.arange(9.0)], 1)
    x[::2, 1] += 1e-7  # one unit in the last place
    layer = Standardize.of(x)
    assert layer.scale[:2].tolist() == [1.0, 1.0] and layer.scale[2] > 2
    assert layer(x)[:, 0].tolist() == [0.0] * 9
    assert Standardize.of(x[:1]).scale.tolist() == [1.0] * 3  # one datum


@pytest.mark.parametrize("factor", [1e-160, 1e200])
def test_squares_of_the_data_may_overflow_and_vanish(factor):
    x = torch.randn(20, 2)
    assert torch.allclose(Standardize.of(x * factor).scale / factor, Standardize.of(x).scale)


def test_data_of_other_kinds():
    counts = torch.tensor([[1], [3]])
    assert Standardize.of(counts).loc.dtype == torch.float64
    assert Standardize.of(counts)(counts).tolist() == [[-1.0], [1.0]]
    assert Standardize.of(counts.bool()).scale.tolist() == [1.0]
    torch.set_default_dtype(torch.float32)
    try:  # an array takes the default dtype, as it does in `fit`; a tensor keeps its own
        assert Standardize.of(counts.double().numpy()).loc.dtype == torch.float32
        assert Standardize.of(counts.double()).loc.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float64)
    x = torch.randn(5, 2, requires_grad=True)
    assert not Standardize.of(x).loc.requires_grad


def test_numbers_of_ones_own():
    assert Standardize(0.0, 255.0)(torch.tensor([[0.0, 255.0]])).tolist() == [[0.0, 1.0]]
    assert Standardize(torch.ones(2), 2.0).scale.tolist() == [2.0, 2.0]
    assert Affine(1.0, torch.tensor([2.0, 4.0]))(torch.ones(3, 2)).tolist() == [[3.0, 5.0]] * 3
    assert repr(Standardize(torch.zeros(3, 2))) == "Standardize((3, 2))"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Standardize.of([[1.0]]), TypeError, "^data: expected a tensor or array.*got list"),
        (lambda: Standardize.of(torch.tensor(1.0)), ValueError, r"^data: .*one datum, got \(\)"),
        (lambda: Standardize.of(torch.zeros(0, 3)), ValueError, r"one datum, got \(0, 3\)"),
        (lambda: Standardize.of(torch.tensor([[1.0, torch.nan]])), ValueError, "none in column 1"),
        (lambda: Standardize.of(torch.tensor([[1.0, torch.inf]])), ValueError, "got 1 infinite"),
        (lambda: FillMissing(None), TypeError, "^encoder: expected a torch.nn.Module, got None"),
        (lambda: FillMissing(mlp(3, 4), torch.nan), ValueError, "^fill: expected finite numbers"),
        (lambda: FillMissing(mlp(3, 4), learned=1), TypeError, "^learned: expected True or False"),
        (lambda: Standardize(0.0, 0.0), ValueError, "^scale: expected positive numbers, got 0.0"),
        (lambda: Affine(torch.inf), ValueError, "^loc: expected finite numbers"),
        (
            lambda: Standardize(torch.zeros(3))(torch.zeros(4, 2)),
            ValueError,
            r"^input: expected a tensor of shape \(\*, 3\), got \(4, 2\)",
        ),
        (lambda: Affine(torch.zeros(3))(torch.zeros(1)), ValueError, r"\(\*, 3\), got \(1,\)"),
        (lambda: Log1p()(torch.tensor([1.0, -0.5])), ValueError, "of at least 0, got 1 below"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_counts_by_their_logarithms():
    x = torch.tensor([0.0, 1.0, 1e-12, 1e6])
    assert torch.allclose(Log1p()(x).exp() - 1, x, atol=1e-15)
    assert torch.equal(Log1p()(x), torch.log1p(x))
    assert torch.allclose(Log1p().inverse(Log1p()(x)), x, rtol=1e-12, atol=0.0)
    assert isinstance(Expm1().inverse, Log1p)


# ------------------------------------------------------------------------- saved, moved and copied


def test_a_fresh_network_of_the_same_shape_treats_new_data_alike():
    torch.manual_seed(1)
    x, new = table(), table(60)[40:]
    layer = Standardize.of(x)
    trained = sequential(layer, mlp(3, 4), mlp(4, 3), layer.inverse)
    fresh = sequential(Standardize(torch.zeros(3)), mlp(3, 4), mlp(4, 3), Affine(torch.zeros(3)))
    assert not torch.allclose(fresh(new), trained(new), rtol=1e-3)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(new), trained(new))
    assert {"0.loc", "0.scale", "3.loc", "3.scale"} <= set(trained.state_dict())
    assert not {"0.loc", "3.scale"} & {name for name, _ in trained.named_parameters()}


def test_a_copy_and_an_inverse_have_numbers_of_their_own():
    layer = Standardize.of(table())
    inverse, twin = layer.inverse, copy.deepcopy(layer)
    before = layer.loc.clone()
    layer.loc.zero_()
    assert torch.equal(inverse.loc, before) and torch.equal(twin.loc, before)
    narrow = nn.Sequential(twin, inverse).float()
    x = table().float()
    assert narrow(x).dtype == torch.float32
    # four roundings of numbers below five scales
    assert ((narrow(x) - x).abs() / SIZES < 4 * 5 * 2**-24).all()


# ------------------------------------------------------------------------------------ in a training


def pair(raw, seed=0):
    """An autoencoder of a table in its own units, or of the standardised table: the same one."""
    torch.manual_seed(seed)
    encoder, decoder, scale = mlp(3, 8, activation=nn.Tanh), mlp(2, 8, out=3), torch.ones(3)
    if raw:
        layer = Standardize.of(table())
        encoder, decoder = sequential(layer, encoder), sequential(decoder, layer.inverse)
        scale = layer.scale
    model = VAE(decoder, 2, likelihoods.Normal(0.5 * scale))
    return model, FamilyGuide(model, families.mean_scale, encoder=encoder)


def encodings(guide, x):
    return guide.heads["z"].loc(guide.encoder(x))


TOLD = {"num_epochs": 30, "learning_rate": 0.02, "progress": False}


@pytest.mark.parametrize("way", ["eager", "staged", "replicates"])
def test_a_fit_to_a_raw_table_is_the_fit_to_the_standardised_one(way, monkeypatch):
    """The density changes by a constant, the log of the scales; all else is the same but rounding.

    Thirty steps of Adam multiply a difference in the last place by far less than 1e6. What would
    be compiled is what is staged.
    """
    monkeypatch.setattr("ppvae.training.execution.STAGE", 1 if way == "staged" else 1000)
    x = table()
    layer = Standardize.of(x)
    shift = layer.scale.log().sum().item()
    raw, plain = pair(True), pair(False)
    fixed = [(m, n) for p in raw for m, n in p.named_buffers()]
    before = [value.clone() for _, value in fixed]
    ran = fit(*plain, layer(x), seed=1, compile=False, **TOLD)
    if way == "replicates":
        two = [raw, pair(True, 1)]
        result = fit_replicates(two, x, seeds=[1, 2], **TOLD)[0]
    else:
        result = fit(*raw, x, seed=1, **TOLD)
    assert result.execution == {"replicates": "staged"}.get(way, way)
    assert result.losses == pytest.approx([loss + shift for loss in ran.losses], rel=1e-9)
    assert torch.allclose(encodings(raw[1], x), encodings(plain[1], layer(x)), atol=1e-9)
    assert not torch.allclose(encodings(pair(True)[1], x), encodings(raw[1], x), atol=0.1)  # moved
    assert all(torch.equal(b, value) for b, (_, value) in zip(before, fixed, strict=True))


def test_counts_in_a_graph_and_below_zero():
    """What a program refuses a graph makes NaN, since it cannot look at values."""
    model = VAE(mlp(2, 4, out=3), 2, likelihoods.Poisson())
    encoder = nn.Sequential(Log1p(), mlp(3, 4))
    guide = FamilyGuide(model, families.mean_scale, encoder=encoder)
    x = torch.tensor([[0.0, 1.0, 1e6], [3.0, 2.0, 1.0], [0.0, 0.0, 5.0]])
    loss = stage(model, guide, x)
    assert loss(x).isfinite() and loss(x - 4).isnan()
    with pytest.raises(ValueError, match="^input: expected counts of at least 0, got 7 below"):
        encoder(x - 4)
