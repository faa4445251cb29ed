"""The loop: it reaches known optima, reports honestly, and refuses what it cannot do."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ppvae import VAE, FamilyGuide, families, fit, likelihoods
from ppvae.nn import mlp
from ppvae.training.snapshots import Diverged


def build(family="mean_scale", likelihood=None, size=4, latent=2):
    torch.manual_seed(0)
    model = VAE(mlp(latent, 8, out=size), latent, likelihood or likelihoods.Normal(0.5))
    return model, FamilyGuide(model, families.LADDER[family], mlp(size, 8))


def quiet(*args, **kwargs):
    return fit(*args, progress=False, **kwargs)


def weights(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def test_noise_only_reaches_the_independent_bernoulli_floor():
    """The best decoder of noise is the vector of frequencies, and its loss is their entropy."""
    x = (torch.rand(200, 4) < torch.tensor([0.1, 0.4, 0.7, 0.95])).double()
    p = x.mean(0)
    floor = -(p * p.log() + (1 - p) * (1 - p).log()).sum()
    model, guide = build("noise_only", likelihoods.Bernoulli())
    model.decoder = torch.nn.Linear(2, 4)
    quiet(model, guide, x, num_epochs=1500, learning_rate=0.02, seed=0)
    result = quiet(model, guide, x, num_epochs=500, learning_rate=1e-3, seed=1)
    # Adam at 1e-3 leaves weights w below 0.02, which cost w^2/8 per pixel and latent; one draw of
    # the noise for 200 data moves the loss by w/sqrt(200): together below 2e-3
    assert model.decoder.weight.abs().max() < 0.02
    assert abs(result.losses[-1] - floor) < 2e-3


@pytest.mark.parametrize(
    "kind",
    ["tensor", "array", "tuple", "tensor dataset", "dataset", "loader"],
)
def test_takes_data_of_every_kind(kind):
    x = torch.randn(20, 4)

    class Items(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return x[index]

    data = {
        "tensor": x,
        "array": x.numpy(),
        "tuple": (x,),
        "tensor dataset": TensorDataset(x),
        "dataset": Items(),
        "loader": DataLoader(TensorDataset(x), batch_size=8),
    }[kind]
    model, guide = build()
    size = None if kind == "loader" else 8
    result = quiet(model, guide, data, num_epochs=2, batch_size=size, seed=0)
    assert result.num_steps == 6 and all(map(math.isfinite, result.losses))


def test_arrays_take_the_default_dtype():
    model, guide = build()
    model.float()
    guide.float()
    torch.set_default_dtype(torch.float32)
    try:
        quiet(model, guide, np.random.default_rng(0).normal(size=(9, 4)), num_epochs=1)
    finally:
        torch.set_default_dtype(torch.float64)


def test_losses_are_nats_per_datum_and_weigh_a_smaller_last_batch_right():
    """With no step (learning rate 1e-300) and a point guide it is the loss of the full batch."""
    x = torch.randn(10, 4)
    losses = []
    for size in (10, 4, 3, 1):
        model, guide = build("deterministic")
        losses += quiet(model, guide, x, num_epochs=1, batch_size=size, learning_rate=1e-300).losses
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)


def test_the_same_seed_gives_the_same_fit_and_leaves_the_stream_alone():
    x = torch.randn(20, 4)
    state = torch.get_rng_state()
    fits = []
    for _ in range(2):
        torch.set_rng_state(state)
        model, guide = build()
        torch.set_rng_state(state)
        fits.append((quiet(model, guide, x, num_epochs=3, batch_size=7, seed=5), weights(model)))
        assert torch.equal(torch.get_rng_state(), state)
    assert fits[0][0].losses == fits[1][0].losses
    assert all(torch.equal(a, b) for a, b in zip(fits[0][1], fits[1][1], strict=True))


def test_modes_come_back_and_training_mode_is_on_inside():
    modes = []
    model, guide = build()
    model.decoder.register_forward_hook(lambda m, *_: modes.append(m.training))
    model.eval()
    guide.encoder.eval()
    quiet(model, guide, torch.randn(6, 4), num_epochs=2)
    assert modes[-1] and not model.training and not guide.encoder.training and guide.training


def test_early_stopping_goes_back_to_the_best_parameters():
    x = torch.randn(12, 4)
    model, guide = build("deterministic")
    result = quiet(
        model, guide, x[:6], num_epochs=400, learning_rate=0.05, validation=x[6:], patience=5
    )
    best = int(np.argmin(result.validation_losses))
    assert result.best_epoch == best and len(result.losses) == best + 6 < 400
    again = quiet(model, guide, x[6:], num_epochs=1, learning_rate=1e-300).losses[0]
    assert again == pytest.approx(result.validation_losses[best], rel=1e-9)


def test_history_is_a_table():
    model, guide = build()
    history = quiet(
        model, guide, torch.randn(6, 4), num_epochs=3, validation=torch.randn(2, 4)
    ).history
    assert list(history) == ["epoch", "loss", "validation_loss"]
    assert {len(column) for column in history.values()} == {3}


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LBFGS"])
def test_any_optimizer_of_torch(name):
    model, guide = build("deterministic")
    x = torch.randn(8, 4)
    optimizer = getattr(torch.optim, name)
    result = quiet(model, guide, x, num_epochs=5, learning_rate=0.01, optimizer=optimizer)
    assert result.losses[-1] < result.losses[0]


def test_progress_shows_the_label_and_the_objective(capsys):
    model, guide = build()
    fit(model, guide, torch.randn(6, 4), num_epochs=2, progress="my fit")
    shown = capsys.readouterr().err
    assert "my fit" in shown and "loss=" in shown


def test_parameters_by_plain_pyro_statements_are_trained_and_kept():
    def model(x):
        loc = pyro.param("user_loc", lambda: torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc + 0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = 3 + torch.randn(50)
    quiet(model, guide, x, num_epochs=300, learning_rate=0.05)
    # the optimum is the mean of the data, and Adam comes to rest there on a quadratic
    assert pyro.param("user_loc").item() == pytest.approx(x.mean().item(), abs=1e-3)


def test_divergence_names_step_and_term_and_keeps_finite_parameters():
    model, guide = build(likelihood=likelihoods.Poisson())
    x = torch.poisson(torch.ones(20, 4))
    with pytest.raises(Diverged, match=r"at step \d+, from log_likelihood of 'x'"):
        quiet(model, guide, x, num_epochs=200, learning_rate=1e3)
    assert all(torch.isfinite(p).all() for p in weights(model, guide))
    loss = quiet(model, guide, x, num_epochs=1, learning_rate=1e-300, seed=0).losses[0]
    assert math.isfinite(loss)


X = np.zeros((6, 4))
NAN = np.where(np.eye(6, 4) > 0, np.nan, 0.0)
BAD = {
    "nan": (NAN, {}, ValueError, "data: expected finite numbers, got 4"),
    "empty": (X[:0], {}, ValueError, "data: expected at least one datum"),
    "empty set": (TensorDataset(torch.zeros(0, 4)), {}, ValueError, "at least one datum"),
    "list of text": (["a"], {}, TypeError, "data: expected tensors, arrays"),
    "lengths": ((X, X[:3]), {}, ValueError, r"equal first dimensions, got \[3, 6\]"),
    "batch 0": (X, {"batch_size": 0}, ValueError, "batch_size: expected 1 to 6.* got 0"),
    "batch 7": (X, {"batch_size": 7}, ValueError, "batch_size: expected 1 to 6.* got 7"),
    "epochs": (
        X,
        {"num_epochs": 0},
        ValueError,
        "num_epochs: .* at least 1, got 0",
    ),
    "rate": (X, {"learning_rate": -1.0}, ValueError, "learning_rate: .* got -1.0"),
    "patience": (X, {"patience": 2}, ValueError, "patience: .*validation"),
    "width": (X[:, :3], {}, ValueError, r"encoder: expected a module that takes \[\(6, 3\)\]"),
    "validation": (X, {"validation": NAN}, ValueError, "validation: expected finite"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_changes_nothing(name):
    data, options, error, message = BAD[name]
    model, guide = build()
    before = weights(model, guide)
    with pytest.raises(error, match=message):
        quiet(model, guide, data, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model, guide), strict=True))


@pytest.mark.parametrize(
    ("likelihood", "value"), [(likelihoods.Bernoulli, 0.5), (likelihoods.Poisson, -1.0)]
)
def test_support_is_checked_on_demand(likelihood, value):
    model, guide = build(likelihood=likelihood())
    x = torch.ones(6, 4)
    x[2, 1] = value
    with pytest.raises(
        ValueError, match="data: expected values in the support of 'x'.*1 of 6 data"
    ):
        quiet(model, guide, x, check_support=True)


def test_a_decoder_of_another_width_is_named():
    model, guide = build()
    model.decoder = mlp(2, 8, out=5)
    with pytest.raises(ValueError, match=r"decoder: expected output of shape \(6, 4\), as x"):
        quiet(model, guide, torch.zeros(6, 4))


def test_nothing_to_train_beside_an_idle_encoder():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    for family in (families.noise_only, families.zero):
        guide = FamilyGuide(model, family, mlp(4, 8))
        before = weights(guide)
        assert math.isfinite(quiet(model, guide, torch.randn(6, 4), num_epochs=2).losses[-1])
        assert all(torch.equal(a, b) for a, b in zip(before, weights(guide), strict=True))


class _NanSlope(torch.nn.Module):
    """Finite values, and a gradient that is not: sqrt at zero."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 8)

    def forward(self, x):
        return torch.sqrt(0 * self.linear(x))


def test_a_gradient_that_is_not_finite_is_not_a_success():
    model, _ = build()
    guide = FamilyGuide(model, families.mean_scale, _NanSlope())
    with pytest.raises(Diverged, match="a parameter is not finite at step 1, from its gradient"):
        quiet(model, guide, torch.randn(6, 4), num_epochs=1)
    assert all(torch.isfinite(p).all() for p in weights(model, guide))


def test_divergence_at_the_first_step_is_told_like_any_other():
    model, guide = build(likelihood=likelihoods.Normal(1.0, learned=True))
    model.decoder[0].weight.data.fill_(math.nan)
    with pytest.raises(Diverged, match="at step 0, from log_likelihood of 'x'"):
        quiet(model, guide, torch.randn(6, 4))


class _OneBad(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((4,), math.nan) if index == 13 else torch.zeros(4)


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (X, {"validation": np.zeros((3, 7))}, ValueError, r"encoder: .*\(3, 7\)"),
        (
            np.ones((6, 4)),
            {"validation": np.full((3, 4), 0.5), "check_support": True},
            ValueError,
            "support of 'x'",
        ),
        (_OneBad(), {"batch_size": 5}, ValueError, "expected finite numbers, got 4"),
        ((), {}, ValueError, "data: expected at least one tensor or array, got none"),
        (
            DataLoader(TensorDataset(torch.zeros(3, 4)), batch_size=5, drop_last=True),
            {},
            ValueError,
            "at least one batch, got none",
        ),
        (np.array([["a"]]), {}, TypeError, "data: expected .* arrays of numbers.* got <U1 ndarray"),
        (torch.zeros(6, 4, dtype=torch.float32), {}, ValueError, "data: expected torch.float64"),
        (X, {"batch_size": 2.5}, ValueError, "batch_size: .* got 2.5"),
        (X, {"batch_size": True}, ValueError, "batch_size: .* got True"),
        (X, {"num_epochs": 1.5}, ValueError, "num_epochs: .* got 1.5"),
        (X, {"optimizer": 3}, TypeError, "optimizer: expected a class or function, got int"),
    ],
)
def test_nothing_is_half_done(data, options, error, message):
    model, guide = build(likelihood=likelihoods.Bernoulli())
    before = weights(model, guide)
    with pytest.raises(error, match=message):
        quiet(model, guide, data, **{"num_epochs": 2, **options})
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model, guide), strict=True))


def test_an_array_with_its_rows_reversed():
    model, guide = build()
    x = np.random.default_rng(0).normal(size=(6, 4))
    assert math.isfinite(quiet(model, guide, x[::-1], num_epochs=1).losses[0])


def test_an_encoder_that_drops_rows_is_named():
    model, guide = build()

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(4, 8)

        def forward(self, x):
            return self.net(x)[:3]

    guide.encoder = Half()
    with pytest.raises(ValueError, match=r"encoder: .*batch of the arguments \[\(6, 4\)\]; got"):
        quiet(model, guide, torch.zeros(6, 4))
