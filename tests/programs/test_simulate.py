"""Simulation from models: the draws are the model's, and what is no recipe for data is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, cases
from linear import ARGUMENTS, local
from pyro import poutine

from ppvae import VAE, likelihoods, simulate
from ppvae.regression import LinearRegression


def test_moments_are_those_of_the_model():
    """x = W z + b + noise: mean b, covariance W W' + noise^2 I, cross-covariance W."""
    size = 40_000
    model = VAE(torch.nn.Linear(2, 3), 2, likelihoods.Normal(0.5))
    W, b = model.decoder.weight.detach(), model.decoder.bias.detach()
    (x,), latents = simulate(model, torch.zeros(size, 3), seed=0)
    joined = torch.cat([latents["z"], x - b], -1)
    one = torch.eye(2)
    exact = torch.cat(
        [torch.cat([one, W.T], -1), torch.cat([W, W @ W.T + 0.25 * torch.eye(3)], -1)]
    )
    scale = exact.diagonal().sqrt()
    assert (joined.mean(0).abs() < 5 * scale / size**0.5).all()
    # Var of a product of Gaussians is s_i^2 s_j^2 + c_ij^2, at most twice s_i^2 s_j^2
    error = 5 * (2.0 / size) ** 0.5 * scale[:, None] * scale
    assert ((joined.T @ joined / size - exact).abs() < error).all()


@pytest.mark.parametrize("name", CASES)
def test_every_model_gives_back_what_it_takes(name):
    model, args, _, shapes = cases()[name]
    arguments = ARGUMENTS.get(name)
    seen = {}

    def spy(values):
        seen.update(values)
        return arguments(values)

    new, latents = simulate(model, *args, seed=0, arguments=spy if arguments else None)
    assert {site: tuple(value.shape) for site, value in latents.items()} == shapes
    assert len(new) == len(args)
    if name != "own rows":  # four of six data come back
        assert all(
            a.shape == b.shape and a.dtype == b.dtype for a, b in zip(new, args, strict=True)
        )
        poutine.condition(model, data=latents)(*new)
    again = simulate(model, *args, seed=0, arguments=arguments)
    assert all(torch.equal(latents[site], again.latents[site]) for site in latents)
    other = simulate(model, *args, seed=1, arguments=arguments)
    assert not any(torch.equal(latents[site], other.latents[site]) for site in latents)


def test_covariates_are_kept():
    X, y = torch.randn(7, 3), torch.randn(7)
    model = LinearRegression(3, noise=0.7)
    (new_X, new_y), latents = simulate(model, X, y, seed=3)
    assert new_X is X and not torch.equal(new_y, y) and latents["weight"].shape == (3,)
    assert not new_y.requires_grad


def test_a_decoder_in_training_mode_is_run_in_evaluation_mode():
    layers = torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)
    model = VAE(torch.nn.Sequential(*layers), 2, likelihoods.Normal(1e-3))
    (x,), latents = simulate(model, torch.zeros(50, 3), seed=0)
    with torch.no_grad():
        assert (model.eval().mean(latents["z"]) - x).abs().max() < 1e-2  # noise 1e-3


@pytest.mark.parametrize(
    ("fn", "given", "returned"),
    [
        (dist.Poisson(3.0), torch.long, torch.long),
        (dist.Poisson(3.0), torch.float32, torch.float32),
        (dist.Normal(0.0, 1.0), torch.float32, torch.float32),
        (dist.Normal(0.0, 1.0), torch.long, torch.float32),  # that of the distribution
    ],
)
def test_the_dtype_of_the_data_is_kept_where_nothing_is_lost(fn, given, returned):
    model = local(dist.Normal(0.0, 1.0), lambda z: fn)
    assert simulate(model, torch.zeros(4, dtype=given)).args[0].dtype == returned


def test_deterministic_sites_and_masks_do_no_harm():
    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            double = pyro.deterministic("double", 2 * z)
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(double, 1e-3), obs=x)

    (x, seen), latents = simulate(model, torch.zeros(5), torch.arange(5) % 2 == 0)
    assert list(latents) == ["z"] and seen.dtype == torch.bool
    assert (x - 2 * latents["z"]).abs().max() < 1e-2


def _of(*observed, plate=None):
    """A model of one latent z and of observed sites, functions of z and the data."""

    def model(x):
        with pyro.plate("data", len(x) if plate is None else plate):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for number, (fn, obs) in enumerate(observed):
                pyro.sample(f"x{number}", fn(z, x), obs=obs(x))

    return model


def _factor(x):
    pyro.factor("penalty", torch.tensor(0.0))
    return _of((_near, _same))(x)


def _near(z, x):
    return dist.Normal(z, 1.0)


def _same(x):
    return x


def _after(z, x):
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], -1)
    return dist.Normal(z[:, None] + before, 1.0).to_event(1)


HALF = _of((_near, lambda x: x / 2))


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (_factor, (torch.zeros(3),), r"nothing can be drawn from a factor, got \['penalty'\]"),
        (_of((_near, _same), (_near, _same)), (torch.zeros(3),), "'x0' and 'x1' observe the same"),
        (HALF, (torch.zeros(3),), "arguments: .* the data of 'x0' are none of them, got None"),
        (_of((_after, _same)), (torch.zeros(3, 4),), "'x0' that does not depend on its own data"),
        (_of((_near, _same), plate=4), (torch.zeros(1),), r"shape \(4,\) at 'x0', .* got \(1,\)"),
        (VAE(torch.nn.Linear(2, 3), 2, likelihoods.Normal(1.0)), (None,), "got none for these"),
        (
            LinearRegression(2, weight=None, noise=1.0),
            (torch.zeros(3, 2), torch.zeros(3)),
            "model: expected distributions that can be drawn from",
        ),
    ],
)
def test_models_that_are_no_recipe(model, args, message):
    with pytest.raises(ValueError, match=message):
        simulate(model, *args)


def test_arguments_mend_what_can_be_mended():
    options = {"seed": 0, "arguments": lambda seen: (2 * seen["x0"],)}
    (x,), latents = simulate(HALF, torch.zeros(200), **options)
    assert x.shape == (200,) and set(latents) == {"z"}
    away = x / 2 - latents["z"]  # 200 draws of sd 1 around z
    assert abs(away.mean()) < 5 / 200**0.5 and abs(away.std() - 1) < 5 / 400**0.5
