"""A call of every public function with good arguments, which `test_fuzz` changes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pairs import data, linear
from torch import nn

import ppvae.data
from ppvae import (
    VAE,
    Block,
    Family,
    FamilyGuide,
    account,
    annealed_importance,
    calibration,
    choose_family,
    closed_form,
    compare_families,
    concat_chains,
    encode,
    evaluate,
    families,
    fit,
    fit_replicates,
    from_pyro_svi,
    gaps,
    generate,
    imputation_error,
    impute,
    interpolate,
    likelihoods,
    linear_probe,
    log_prob,
    loo,
    models,
    nan_masked,
    objectives,
    plots,
    predict,
    priors,
    reading,
    reconstruct,
    refine,
    regression,
    resample,
    simulate,
    stage,
    summary,
    to_netcdf,
    to_zarr,
    two_sample,
)
from ppvae import (
    nn as layers,
)
from ppvae.training import load_pair, save_pair

X = np.arange(12.0).reshape(4, 3) % 5
Y = np.array([1.0, 0.0, 2.0, 5.0])
ROW = np.array([1.0, 2.0, 0.5, 1.0])
FOLDER = TemporaryDirectory()  # of what is written, where relative paths begin, too


@dataclass(frozen=True)
class Call:
    """One function: how it is called, and a small good call.

    Args:
        function: takes all its arguments by keyword.
        good: makes the arguments of a good call, of which each will be replaced.
        trains: whether it may move weights.
        named: argument -> another name that messages may have for it.
        infinite: a pattern of results that some arguments make infinite or NaN, as documented.
    """

    function: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    trains: bool = False
    named: dict[str, str] = field(default_factory=dict)
    infinite: str = "nothing"


def programs(pair=linear):
    return dict(zip(("model", "guide"), pair(), strict=True))


def on_data(function):
    """The same function with the data, which stand behind model and guide, as `data`."""
    return lambda model, guide, data, **rest: function(model, guide, data, **rest)


def in_scope(function):
    """The same function in a param store of its own: in a plain call Pyro registers parameters."""

    def call(**given):
        with pyro.get_param_store().scope():
            return function(**given)

    return call


def markov():
    parts = nn.Linear(2, 3), priors.Learned(2, context=2), 2, likelihoods.Normal(0.5)
    return models.DeepMarkov(*parts)


def one_weight(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(w * X[:, 0], 1.0), obs=y)


def global_pair():
    model = one_weight
    return model, FamilyGuide(model, families.mean_scale)


def no_encoder():
    return one_weight, None


def fresh():
    model, guide = linear()
    return model, guide.encoder


def labelled():
    return VAE(nn.Linear(4, 3), 2, likelihoods.Normal(0.5), context=2)


def frozen_weights(X):
    pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))


@cache
def filled():
    x = torch.tensor(X)
    x[0, 0] = math.nan
    return impute(*linear(), x, num_samples=30)


def frozen_refit(model, guide, *args):
    """A guide that needs no training."""


def save(path, model, guide):
    save_pair(path, model, guide)


def load(path, model, guide):
    save_pair("saved.pt", *linear())
    load_pair(path, model, guide)


@cache
def found():
    return evaluate(*linear(), data(4), num_samples=8, progress=False)


@cache
def accounted():
    few = {"num_samples": 16, "num_steps": 2, "progress": False}
    return account(*linear(), data(4), families=["noise_only"], **few)


@cache
def ranked():
    return calibration(*linear(), data(4), num_samples=4, progress=False)


def tree(seed=0, count=3):
    return from_pyro_svi(*linear(), data(4), num_samples=count, seed=seed)


@cache
def exact():
    return regression.exact_posterior(X, Y, noise=1.0)


MEASURED = {"batch_size": 3, "vectorized": None, "seed": 0, "plate": None, "kwargs": None}
TRAINED = {
    "data": None, "num_epochs": 2, "batch_size": 2, "learning_rate": 0.01, "optimizer": None,
    "scheduler": None, "clip": 10.0, "objective": None, "callback": None, "checkpoint": None,
    "compile": False, "precision": None, "progress": False, "plate": None, "kwargs": None,
}  # fmt: skip
ROWS = {"X": torch.tensor(X), "y": torch.tensor(Y)}
IN_ARGS = {"data": "args"}

#: name -> call
CALLS: dict[str, Call] = {
    "fit": Call(
        fit,
        lambda: programs() | TRAINED | {
            "data": data(4), "seed": 0, "max_epochs": None, "validation": data(3),
            "patience": 2, "check_support": True, "size": None,
        },
        trains=True,
    ),
    "fit, global": Call(
        lambda X, y, **rest: fit(data=(X, y), **rest),
        lambda: programs(global_pair) | ROWS | {"num_epochs": 3, "seed": 0, "progress": False},
        trains=True,
        named={"X": "data", "y": "data"},
    ),
    "fit_replicates": Call(
        fit_replicates,
        lambda: {"pairs": [linear(), linear()]} | TRAINED | {"data": data(4), "seeds": [1, 2]},
        trains=True,
    ),
    "save_pair": Call(save, lambda: programs() | {"path": "pair.pt"}),
    "load_pair": Call(load, lambda: programs() | {"path": "saved.pt"}, trains=True),
    "evaluate": Call(
        on_data(evaluate),
        lambda: programs() | MEASURED | {"data": data(4), "num_samples": 8, "progress": False},
        named=IN_ARGS,
        infinite="/.*_se",  # of one datum
    ),
    "gaps": Call(
        on_data(gaps),
        lambda: programs() | MEASURED | {
            "data": data(4), "num_samples": 16, "num_steps": 2, "log_likelihood": None,
            "progress": False,
        },
        named=IN_ARGS,
    ),
    "refine": Call(
        on_data(refine),
        lambda: programs() | MEASURED | {
            "data": data(4), "num_samples": 16, "num_steps": 2, "progress": False,
        },
        named=IN_ARGS,
    ),
    "resample": Call(
        on_data(resample),
        lambda: programs() | MEASURED | {
            "data": data(4), "num_samples": 3, "num_candidates": 2, "num_temperatures": 2,
            "num_leapfrog": 1, "progress": False,
        },
        named=IN_ARGS,
        infinite="/khat",  # of few draws
    ),
    "annealed_importance": Call(
        on_data(annealed_importance),
        lambda: programs() | MEASURED | {
            "data": data(4), "num_temperatures": 3, "num_chains": 2, "num_leapfrog": 1,
            "start": "guide", "latents": None, "progress": False,
        },
        named=IN_ARGS,
        infinite="/acceptance",  # of one temperature
    ),
    "calibration": Call(
        on_data(calibration),
        lambda: programs() | MEASURED | {
            "data": data(4), "num_simulations": 3, "num_samples": 4, "levels": (0.5,),
            "refit": None, "arguments": None, "progress": False,
        },
        named=IN_ARGS,
    ),
    "calibration, global": Call(
        lambda X, y, model, guide, **rest: calibration(model, guide, X, y, **rest),
        lambda: programs(global_pair) | ROWS | {
            "num_simulations": 2, "num_samples": 4, "refit": frozen_refit, "progress": False
        },
        named={"X": "args", "y": "args"},
        infinite="/gap.*",
    ),
    "simulate": Call(
        lambda model, data, **rest: simulate(model, data, **rest),
        lambda: {
            "model": linear()[0], "data": data(4), "seed": 0, "arguments": None, "kwargs": None
        },
        named=IN_ARGS,
    ),
    "stage": Call(
        on_data(stage),
        lambda: programs() | {
            "data": data(4), "objective": None, "size": None, "plate": None, "kwargs": None
        },
        named=IN_ARGS,
    ),
    "from_pyro_svi": Call(
        on_data(from_pyro_svi),
        lambda: programs() | MEASURED | {
            "data": data(4), "num_samples": 3, "coords": None, "dims": None, "evaluation": None,
            "num_inner": 2, "pointwise": "element", "stack": None, "predictions": None,
            "calibration": None, "groups": ["posterior", "observed_data", "log_likelihood"],
            "path": None,
        },
        named=IN_ARGS | {"predictions": "args"},
        infinite="/+(observed_data|log_likelihood)/.*",  # of what is not observed
    ),
    "impute": Call(
        on_data(impute),
        lambda: programs() | MEASURED | {
            "data": data(4), "num_samples": 30, "num_imputations": 2, "level": 0.9, "site": None
        },
        named=IN_ARGS,
        infinite="/khat",  # of a few draws
    ),
    "nan_masked": Call(nan_masked, lambda: {"program": linear()[0]}),
    "encode": Call(
        on_data(encode),
        lambda: programs() | {"data": data(4), "site": None, "plate": None, "kwargs": None},
        named=IN_ARGS,
    ),
    "reconstruct": Call(
        on_data(reconstruct),
        lambda: programs() | MEASURED | {"data": data(4), "num_samples": 3, "site": None},
        named=IN_ARGS,
    ),
    "log_prob": Call(
        on_data(log_prob),
        lambda: programs() | MEASURED | {"data": data(4), "num_samples": 30},
        named=IN_ARGS,
        infinite="/khat",  # of a few draws
    ),
    "interpolate": Call(
        lambda model, guide, **rest: interpolate(model, guide, **rest),
        lambda: programs() | {"start": data(4), "end": data(4), "steps": 3},
        named={"start": "args", "end": "args"},
    ),
    "generate": Call(
        generate,
        lambda: {
            "model": labelled(), "num_samples": 4, "exposure": None, "seed": 0,
            "context": torch.eye(2, dtype=torch.float64)[[0, 1, 1, 0]],
        },
        named={"context": "args", "exposure": "args"},
    ),
    "predict": Call(
        lambda X, model, guide, **rest: predict(model, guide, X, **rest),
        lambda: {
            "model": regression.LinearRegression(3, noise=0.5), "guide": frozen_weights,
            "X": torch.tensor(X), "num_samples": 3, "vectorized": None, "seed": 0, "plate": None,
            "kwargs": None,
        },
        named={"X": "args"},
    ),
    "VAE, context": Call(
        lambda **given: VAE(nn.Linear(4, 3), 2, likelihoods.Normal(0.5), **given),
        lambda: {"context": 2},
    ),
    "two_sample": Call(
        lambda real, drawn, **rest: two_sample(real, drawn, **rest),
        lambda: {
            "real": X.repeat(3, 0) + np.eye(12, 3), "drawn": X.repeat(3, 0), "folds": 2, "seed": 0,
            "classifier": None,
        },
    ),
    "linear_probe": Call(
        linear_probe,
        lambda: {"codes": X, "labels": np.array([0.0, 1.0, 0.0, 1.0]), "folds": 2, "seed": 0},
    ),
    "imputation_error": Call(
        imputation_error,
        lambda: {"found": filled(), "truth": X},
        infinite="/.*",  # of what is not of the kind of a number
    ),
    "to_frame": Call(
        ppvae.data.to_frame, lambda: {"values": X, "like": pd.DataFrame(X, columns=list("abc"))},
        infinite="/.*",  # of what is missing
    ),
    "from_anndata": Call(
        lambda adata, key, layer: ppvae.data.from_anndata(adata, key, layer=layer),
        lambda: {
            "adata": SimpleNamespace(X=X, obs=pd.DataFrame({"k": Y}), layers={}), "key": "k",
            "layer": None,
        },
        named={"key": "keys"},
    ),
    # priors
    "Learned": Call(
        lambda **given: priors.Learned(**given)(torch.zeros(1, 2)),
        lambda: {"latent": 2, "family": "mean_scale", "context": 2, "network": None},
    ),
    "ARD": Call(priors.ARD, lambda: {"latent": 2}),
    "Mixture": Call(
        priors.Mixture, lambda: {"latent": 2, "components": 3, "full": False}, named={}
    ),
    "Mixture.of": Call(
        priors.Mixture.of, lambda: {"codes": X, "components": 2, "full": False, "seed": 0}
    ),
    "VampPrior": Call(priors.VampPrior, lambda: {"inputs": torch.tensor(X), "latent": 2}),
    "VampPrior.attach": Call(
        lambda encode: priors.VampPrior(torch.tensor(X), 2).attach(encode),
        lambda: {"encode": frozen_refit},
    ),
    "Poisson.of, exposure": Call(
        likelihoods.Poisson.of, lambda: {"data": X, "exposure": np.array([1.0, 2.0, 0.5, 1.0])}
    ),
    "account": Call(
        on_data(account),
        lambda: programs() | MEASURED | {
            "data": data(4), "families": ["noise_only", "mean_scale"], "num_samples": 16,
            "num_steps": 2, "log_likelihood": None, "progress": False,
        },
        named=IN_ARGS,
        infinite="/dataset/(running|khat|mean_se_data)",  # outside of the sum; of a few draws
    ),
    "account, global": Call(
        lambda X, y, model, guide, **rest: account(model, guide, X, y, **rest),
        lambda: programs(global_pair) | ROWS | {
            "families": ["mean_only"], "num_samples": 16, "progress": False
        },
        named={"X": "args", "y": "args"},
        infinite="/dataset/(running|khat|mean_se_data)",
    ),
    "choose_family": Call(
        choose_family,
        lambda: {
            "model": linear()[0], "data": data(4), "test": data(3), "encoder": nn.Identity(),
            "families": ["noise_only", "mean_only"], "num_seeds": 2, "seed": 0, "min_gain": 0.05,
            "level": 0.9, "num_samples": 4, "progress": False, "num_epochs": 1,
        },
        infinite="/dataset/.*",  # of the first family, which is no step
    ),
    "choose_family, global": Call(
        choose_family,
        lambda: {
            "model": one_weight, "data": (torch.tensor(X), torch.tensor(Y)), "encoder": None,
            "families": {"a": "mean_only", "b": {"w": "mean_scale"}}, "num_seeds": 2,
            "num_samples": 4, "progress": False, "num_epochs": 3,
        },
        infinite="/dataset/.*",
    ),
    "compare_families": Call(
        compare_families,
        lambda: {
            "build": fresh, "families": ["noise_only", "mean_only"], "train": data(4),
            "test": data(3), "num_seeds": 2, "seed": 0, "min_gain": 0.05, "level": 0.9,
            "num_samples": 4, "progress": False, "num_epochs": 1,
        },
        named={"train": "data"},
    ),
    "compare_families, global": Call(
        compare_families,
        lambda: {
            "build": no_encoder, "families": {"a": "mean_only", "b": {"w": "mean_scale"}},
            "train": (torch.tensor(X), torch.tensor(Y)), "num_seeds": 2, "num_samples": 4,
            "progress": False, "num_epochs": 3,
        },
        named={"train": "data"},
    ),
    "to_netcdf": Call(to_netcdf, lambda: {"tree": tree(), "path": "tree.nc"}),
    "to_zarr": Call(to_zarr, lambda: {"tree": tree(), "path": "tree.zarr"}),
    "loo": Call(loo, lambda: {"tree": tree(count=30), "var_name": None}),
    "concat_chains": Call(concat_chains, lambda: {"trees": [tree(0), tree(1)]}),
    "reading": Call(reading, lambda: {"found": found(), "beta": 1.0}),
    "summary": Call(summary, lambda: {"found": found()}),
    # modules and families
    "VAE": Call(
        VAE,
        lambda: {
            "decoder": nn.Linear(2, 3), "latent": 2, "likelihood": likelihoods.Normal(0.5),
            "prior": None,
        },
    ),
    "TwoLevelVAE": Call(
        models.TwoLevelVAE,
        lambda: {
            "decoder": nn.Linear(2, 3), "between": priors.Learned(2, context=1), "latent": (1, 2),
            "likelihood": likelihoods.Normal(0.5), "prior": None,
        },
    ),
    "DeepMarkov": Call(
        models.DeepMarkov,
        lambda: {
            "decoder": nn.Linear(2, 3), "transition": priors.Learned(2, context=2), "latent": 2,
            "likelihood": likelihoods.Normal(0.5), "prior": None,
        },
    ),
    "DeepMarkov, called": Call(
        in_scope(lambda **given: markov()(**given)),
        lambda: {"x": torch.zeros(2, 4, 3), "lengths": torch.tensor([4.0, 1.0]), "size": 1},
        infinite="",
    ),
    "HierarchicalRegression": Call(
        models.HierarchicalRegression,
        lambda: {
            "columns": 2, "groups": 3, "mu": 0.5, "tau": dist.HalfNormal(1.0), "noise": 1.0,
        },
    ),
    "GaussianMixture": Call(
        models.GaussianMixture,
        lambda: {
            "components": 2, "columns": 3, "covariance": "full", "weights": None,
            "means": dist.Normal(0.0, 1.0), "scales": None, "correlations": None,
        },
    ),
    "GaussianMixture.of": Call(
        models.GaussianMixture.of,
        lambda: {"x": X, "components": 2, "covariance": "diag", "seed": 0},
    ),
    "VAE.draw_prior": Call(linear()[0].draw_prior, lambda: {"size": 3}),
    "FamilyGuide": Call(
        lambda **given: FamilyGuide(**given).setup(data(4)),
        lambda: {
            "model": linear()[0], "family": "mean_scale", "encoder": nn.Identity(), "plate": None,
            "create_plates": None, "init_loc_fn": None,
        },
    ),
    "FamilyGuide.quantiles": Call(
        lambda quantiles: FamilyGuide(linear()[0], "mean_scale", nn.Identity()).quantiles(
            quantiles, data(4)
        ),
        lambda: {"quantiles": [0.1, 0.5]},
    ),
    "Block": Call(
        lambda **given: FamilyGuide(linear()[0], {"z": Block(**given)}).setup(data(4)),
        lambda: {
            "family": "mean_scale", "source": "shared", "plate": "data", "given": (),
            "prior": "location",
        },
    ),
    "FamilyGuide, by site": Call(
        lambda **given: FamilyGuide(linear()[0], **given).setup(data(4)),
        lambda: {"family": {"z": "full_rank"}, "encoder": {"z": nn.Identity()}},
    ),
    "Family": Call(
        lambda **given: Family(**given).head(3, torch.Size([2])),
        lambda: {"distribution": dist.Normal, "scale": 0.5},
    ),
    "Family, learned": Call(
        lambda **given: Family(dist.Normal, scale=families.Channel(**given)).head(
            3, torch.Size([2])
        ),
        lambda: {"constraint": None, "columns": None, "start": 0.5},
        named={"constraint": "scale", "columns": "scale", "start": "scale"},
    ),
    "Family, shared": Call(
        lambda **given: Family(dist.MultivariateNormal, scale_tril=families.Shared(**given)).head(
            None, torch.Size([2])
        ),
        lambda: {"constraint": None, "columns": None, "start": 0.5},
        named={"start": "scale_tril", "columns": "distribution"},
    ),
    "Family.head": Call(families.full_rank.head, lambda: {"features": 3, "shape": torch.Size([2])}),
    "Flow": Call(
        lambda **given: families.Flow(**given).head(3, torch.Size([2])),
        lambda: {"layers": 2, "hidden": 4, "bins": 3},
    ),
    "Banded": Call(
        lambda **given: families.Banded(**given).head(3, torch.Size([4])), lambda: {"bandwidth": 2}
    ),
    "as_family": Call(
        lambda value: families.as_family(value).head(3, torch.Size([2])),
        lambda: {"value": "flow"},
        named={"value": "family"},
    ),
    "Normal": Call(likelihoods.Normal, lambda: {"scale": 0.5, "learned": False}),
    "Normal, from data": Call(
        lambda data, **rest: likelihoods.Normal.of(data, learned=True, **rest),
        lambda: {"data": X, "scale": 0.5},
    ),
    "StudentT": Call(likelihoods.StudentT, lambda: {"df": 3.0, "scale": 0.5, "per_datum": False}),
    "Categorical": Call(likelihoods.Categorical, lambda: {"categories": 3}),
    "Categorical, from data": Call(
        likelihoods.Categorical.of, lambda: {"data": X, "categories": 5}
    ),
    "Ordinal": Call(likelihoods.Ordinal, lambda: {"categories": 3}),
    "NegativeBinomial": Call(
        likelihoods.NegativeBinomial, lambda: {"dispersion": 0.5, "learned": True}
    ),
    "NegativeBinomial, from data": Call(likelihoods.NegativeBinomial.of, lambda: {"data": X}),
    "Beta": Call(likelihoods.Beta, lambda: {"concentration": 2.0, "learned": True}),
    "ZeroInflated": Call(likelihoods.ZeroInflated, lambda: {"counts": likelihoods.Poisson()}),
    "Mixed": Call(
        likelihoods.Mixed,
        lambda: {"parts": {(0, 1): likelihoods.Normal(), 2: likelihoods.Poisson()}},
    ),
    "Mixed, from data": Call(
        likelihoods.Mixed.of, lambda: {"data": X, "parts": {(0, 1, 2): likelihoods.Poisson()}}
    ),
    "Normal, scales": Call(likelihoods.Normal, lambda: {"scale": torch.ones(3), "learned": True}),
    "mlp": Call(
        lambda inputs, hidden, **rest: layers.mlp(inputs, hidden, **rest),
        lambda: {"inputs": 3, "hidden": 4, "out": 2, "activation": nn.ReLU},
    ),
    "conv_encoder": Call(
        lambda shape, channels: layers.conv_encoder(shape, channels),
        lambda: {"shape": (1, 4, 4), "channels": 2},
    ),
    "conv_decoder": Call(
        lambda latent, shape, channels: layers.conv_decoder(latent, shape, channels),
        lambda: {"latent": 2, "shape": (1, 4, 4), "channels": 2},
    ),
    "Affine": Call(layers.Affine, lambda: {"loc": torch.zeros(3), "scale": 2.0}),
    "Concatenate": Call(
        layers.Concatenate, lambda: {"module": nn.Linear(3, 2), "labels": {1: 2}}
    ),
    "Pool": Call(
        lambda **given: layers.Pool(**given)(data(4), torch.tensor([0, 1, 1, 0])),
        lambda: {"module": nn.Linear(3, 2), "groups": 2, "labels": 1},
    ),
    "FillMissing": Call(
        layers.FillMissing,
        lambda: {"encoder": nn.Linear(6, 2), "fill": 0.5, "learned": False, "with_mask": True},
    ),
    "Standardize": Call(layers.Standardize, lambda: {"loc": torch.zeros(3), "scale": 2.0}),
    "Standardize.of": Call(layers.Standardize.of, lambda: {"data": data(4)}),
    # objectives
    "negative_elbo": Call(
        in_scope(on_data(objectives.negative_elbo)),
        lambda: programs() | {"data": data(4), "size": 8, "plate": None},
        named=IN_ARGS,
    ),
    "ELBO": Call(
        in_scope(
            lambda data, size, step, **given: objectives.ELBO(**given)(
                *linear(), data, size=size, step=step
            )
        ),
        lambda: {
            "beta": 2.0, "free_bits": 0.1, "kl": "sampled", "num_samples": 2, "data": data(4),
            "size": 8, "step": 1,
        },
        named=IN_ARGS,
    ),
    "IWAE": Call(
        in_scope(lambda data, **given: objectives.IWAE(**given)(*linear(), data)),
        lambda: {"num_samples": 3, "gradient": "pathwise", "data": data(4)},
        named=IN_ARGS,
    ),
    "warm_up": Call(
        lambda **given: objectives.warm_up(**given)(2),
        lambda: {"steps": 5, "start": 0.0, "end": 1.0},
    ),
    "terms": Call(
        in_scope(
            lambda data, model, guide, plate: objectives.terms(
                *objectives.trace_pair(model, guide, data), plate
            ).distortion
        ),
        lambda: programs() | {"data": data(4), "plate": None},
        named=IN_ARGS,
    ),
    # closed forms and regression
    "fixed_decoder": Call(
        closed_form.fixed_decoder,
        lambda: {
            "x": data(4), "weight": torch.ones(3, 2), "bias": torch.zeros(3), "noise": 0.5,
            "family": families.full_rank,
        },
    ),
    "learned_decoder": Call(
        closed_form.learned_decoder,
        lambda: {"x": data(6), "latent": 1, "family": families.mean_scale},
        infinite=".*",
    ),
    "closed_form.regression": Call(
        closed_form.regression,
        lambda: {
            "X": torch.tensor(X), "y": torch.tensor(Y), "noise": 0.5, "prior_scale": 1.0,
            "family": families.mean_scale,
        },
    ),
    "exact_posterior": Call(
        lambda **given: regression.exact_posterior(**given).mean,
        lambda: {
            "X": X, "y": Y, "weight": dist.Normal(0.0, 10.0), "noise": dist.HalfNormal(1.0),
            "scale": None, "intercept": False, "weights": ROW, "offset": ROW, "counts": ROW,
        },
        infinite="/.*",  # of four rows and three flat weights whose noise is not known
    ),
    "factorize": Call(
        regression.factorize,
        lambda: {
            "X": X, "y": Y, "intercept": False, "names": ["a", "b", "c"], "weights": ROW,
            "offset": ROW, "counts": ROW,
        },
    ),
    "ExactPosterior.predict": Call(
        lambda **given: exact().predict(**given).sd,
        lambda: {"X": X[:2], "weights": ROW[:2], "offset": ROW[:2]},
    ),
    "ExactPosterior.predict, noise": Call(
        lambda **given: exact().predict(X[:2], **given).sd, lambda: {"noise": ROW[:2]}
    ),
    "ExactPosterior.update": Call(
        lambda **given: exact().update(**given).mean,
        lambda: {"X": X[:2], "y": Y[:2], "weights": ROW[:2], "offset": ROW[:2], "counts": ROW[:2]},
    ),
    "ExactPosterior.cdf": Call(lambda values: exact().cdf(values), lambda: {"values": 0.3}),
    "Prediction.interval": Call(
        lambda **given: exact().predict(X).interval(**given), lambda: {"level": 0.9, "line": False}
    ),
    "Prediction.quantile": Call(lambda q: exact().predict(X).quantile(q), lambda: {"q": 0.3}),
    "Prediction.cdf": Call(lambda y: exact().predict(X).cdf(y), lambda: {"y": Y}),
    "Prediction.log_prob": Call(lambda y: exact().predict(X).log_prob(y), lambda: {"y": Y}),
    "Prediction.sample": Call(
        lambda **given: exact().predict(X).sample(**given),
        lambda: {"num_samples": 3, "seed": 0, "line": True},
    ),
    "regression.compare": Call(
        lambda posteriors: regression.compare(posteriors).to_numpy(),
        lambda: {"posteriors": {"one": exact()}},
    ),
    "ConjugateNormal": Call(
        regression.ConjugateNormal, lambda: {"loc": np.zeros(3), "scale": np.ones(3)}
    ),
    "ConjugateNormal, covariance": Call(
        regression.ConjugateNormal, lambda: {"loc": 0.0, "covariance": np.eye(3)}
    ),
    "g_prior": Call(regression.g_prior, lambda: {"X": X, "g": 4.0, "intercept": True}),
    "combine": Call(regression.combine, lambda: {"factors": [regression.factorize(X, Y)]}),
    "combine, rows": Call(
        lambda X, y: regression.combine([regression.factorize(X, y), regression.factorize(X, Y)]),
        lambda: {"X": X, "y": Y},
    ),
    "ExactPosterior.loo": Call(
        lambda **given: exact().loo(**given),
        lambda: {
            "X": X[:2], "y": Y[:2], "others": regression.factorize(X[2:], Y[2:]),
            "pointwise": True, "weights": np.ones(2), "offset": np.zeros(2),
        },
    ),
    "LeaveOneOut.combine": Call(
        regression.LeaveOneOut.combine, lambda: {"parts": [exact().loo()]}
    ),
    "quantile": Call(lambda q: exact().quantile(q), lambda: {"q": 0.3}),
    "sample": Call(
        lambda **given: exact().sample(**given), lambda: {"num_samples": 3, "seed": 0}
    ),
    "to_datatree": Call(
        lambda **given: exact().to_datatree(**given),
        lambda: {"num_samples": 3, "seed": 0, "features": ["a", "b", "c"]},
    ),
    "log_evidence_curve": Call(
        regression.log_evidence_curve,
        lambda: {
            "X": X, "y": Y, "scales": [0.5, 1.0], "weight": dist.Normal(0.0, 1.0), "noise": 1.0,
            "intercept": False,
        },
    ),
    "evidence_maximum": Call(
        lambda **given: regression.evidence_maximum(**given)[::2],
        lambda: {
            "X": X, "y": Y, "weight": dist.Normal(0.0, 1.0), "noise": 1.0,
            "maximize_noise": False, "intercept": False,
        },
    ),
    "predictive_scores": Call(
        regression.predictive_scores,
        lambda: {"X": X, "y": Y, "weight": np.ones((2, 3)), "noise": 1.0, "level": 0.9},
    ),
    "worth_of_bayes": Call(
        lambda **given: regression.worth_of_bayes(**given).gain,
        lambda: {
            "X": np.sin(np.arange(24.0)).reshape(12, 2), "y": np.cos(np.arange(12.0) ** 2),
            "test": (np.ones((2, 2)), np.ones(2)), "num_folds": 3, "level": 0.9, "guides": False,
            "seed": 0,
        },
    ),
    "Horseshoe": Call(regression.Horseshoe, lambda: {"scale": 1.0}),
    "LinearRegression": Call(
        regression.LinearRegression,
        lambda: {
            "columns": 3, "weight": dist.Normal(0.0, 1.0), "noise": 1.0, "likelihood": dist.Normal,
            "scale": 1.0, "intercept": True,
        },
    ),
    "LinearRegression.of": Call(
        regression.LinearRegression.of,
        lambda: {
            "X": X, "y": Y, "weight": dist.Normal(0.0, 1.0), "noise": dist.HalfNormal(1.0),
            "scale": "data", "intercept": True,
        },
    ),
    "GeneralizedLinear": Call(
        regression.GeneralizedLinear,
        lambda: {
            "columns": 3, "likelihood": likelihoods.StudentT(4.0), "weight": dist.Normal(0.0, 1.0),
            "noise": 1.0, "scale": 1.0, "intercept": True,
        },
    ),
    "GeneralizedLinear, classes": Call(
        lambda **given: regression.GeneralizedLinear(3, likelihoods.Categorical(3), **given),
        lambda: {"weight": dist.Normal(0.0, 1.0), "reference": 0},
    ),
    "GeneralizedLinear, counts": Call(
        lambda **given: regression.GeneralizedLinear(3, likelihoods.NegativeBinomial(), **given),
        lambda: {"dispersion": 1.0},
    ),
    "GeneralizedLinear.of": Call(
        regression.GeneralizedLinear.of,
        lambda: {
            "X": X, "y": Y, "likelihood": likelihoods.StudentT(4.0), "noise": dist.HalfNormal(1.0),
            "scale": "data",
        },
    ),
    "regression.objective": Call(
        regression.objective,
        lambda: programs(regression_pair) | {
            "X": torch.tensor(X), "y": torch.tensor(Y), "num_samples": 8, "seed": 0, "kwargs": None
        },
    ),
    # plots and data
    "plots.account": Call(plots.account, lambda: {"found": accounted()}),
    "plots.calibration": Call(plots.calibration, lambda: {"found": ranked(), "level": 0.9}),
    "plots.encodings": Call(
        lambda codes, **rest: plots.encodings({"a": codes}, **rest),
        lambda: {
            "codes": np.zeros((2, 3, 2)), "columns": 1, "images": np.ones((2, 4)),
            "rates": {"a": 1.0},
        },
        named={"codes": "draws"},
    ),
    "plots.encodings, draws": Call(plots.encodings, lambda: {"draws": {"a": np.zeros((2, 3, 2))}}),
    "plots.images": Call(
        plots.images, lambda: {"rows": {"a": np.zeros((2, 4))}, "title": "a title"}
    ),
    "plots.images, row": Call(
        lambda row: plots.images({"a": row}),
        lambda: {"row": np.zeros((2, 4))},
        named={"row": "rows"},
    ),
    "plots.interpolation": Call(
        lambda start, end, **rest: plots.interpolation({"a": (torch.sigmoid, start, end)}, **rest),
        lambda: {"start": torch.zeros(4), "end": torch.ones(4), "steps": 3, "title": "a title"},
        named={"start": "rows", "end": "rows"},
    ),
    "plots.interpolation, rows": Call(
        plots.interpolation,
        lambda: {"rows": {"a": (torch.sigmoid, torch.zeros(4), torch.ones(4))}},
    ),
    "plots.latents": Call(
        lambda codes, **rest: plots.latents({"a": codes}, **rest),
        lambda: {"codes": np.ones((4, 3)), "labels": [0, 1, 1, 2]},
    ),
    "plots.latents, codes": Call(
        plots.latents, lambda: {"codes": {"a": np.ones((4, 3))}, "labels": [0, 1, 1, 2]}
    ),
    "plots.losses": Call(plots.losses, lambda: {"fits": {"a": [3.0, 2.0, 1.0]}}),
    "plots.rate_distortion": Call(
        plots.rate_distortion, lambda: {"points": {"a": (1.0, 2.0), "b": (0.0, 3.0)}}
    ),
    "plots.rate_distortion_curves": Call(
        plots.rate_distortion_curves,
        lambda: {
            "curves": {"a": ([1.0, 2.0], [3.0, 2.0])}, "bounds": None, "title": "",
            "labels": {"a": ["u", "v"]},
        },
    ),
    "regression.plots.forest": Call(
        regression.plots.forest,
        lambda: {"rows": {"a": (np.zeros(2), -np.ones(2), np.ones(2))}, "labels": ["u", "v"]},
    ),
    "regression.plots.paths": Call(
        regression.plots.paths,
        lambda: {
            "ridge": ([1.0, 2.0], np.ones((2, 2))), "lasso": ([1.0, 2.0], np.ones((2, 2))),
            "evidence": [0.0, 1.0], "best": (1.0, 1.0), "labels": ["u", "v"],
        },
    ),
    "regression.plots.band": Call(
        regression.plots.band, lambda: {"means": np.ones((3, 4)), "noise": 1.0, "level": 0.9}
    ),
    "regression.plots.bands": Call(
        regression.plots.bands,
        lambda: {
            "grid": [0.0, 1.0], "curves": {"a": (np.zeros(2), -np.ones(2), np.ones(2))},
            "data": ([0.0, 1.0], [1.0, 0.0]), "label": "u",
        },
    ),
    "regression.plots.overconfidence": Call(
        regression.plots.overconfidence,
        lambda: {"posteriors": {"a": (np.zeros(2), np.eye(2))}, "labels": ("u", "v")},
    ),
    "load": Call(ppvae.data.load, lambda: {"name": "digits", "binary": True}),
    "split": Call(ppvae.data.split, lambda: {"x": data(6), "test": 0.5, "seed": 0}, infinite=".*"),
}  # fmt: skip


def regression_pair():
    model = regression.LinearRegression(3, noise=1.0)
    guide = FamilyGuide(model, families.mean_scale)
    guide.setup(torch.tensor(X), torch.tensor(Y))
    return model, guide


#: what takes too long
TRAINS = "fit", "fit, global", "compare_families", "compare_families, global", "choose_family"
LEFT_OUT = {(name, "num_epochs", "None") for name in (*TRAINS, "choose_family, global")} | {
    ("fit", "compile", "True"),
    ("fit_replicates", "compile", "True"),
}
