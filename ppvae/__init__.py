"""Guide families for amortized inference in Pyro: from the autoencoder to the full posterior.

The names below are all that most programs need. Those that bring xarray, ArviZ or matplotlib with
them are imported when they are first used, so that `import ppvae` takes no longer than Pyro.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ppvae import closed_form, families, likelihoods, objectives, priors
from ppvae import data as data  # not in `__all__`: `from ppvae import *` must not replace
from ppvae import nn as nn  # what others call `data` and `nn`
from ppvae.families import Family
from ppvae.guides import Block, FamilyGuide, HeavyTails
from ppvae.models import VAE
from ppvae.programs.missing import nan_masked
from ppvae.programs.simulation import simulate
from ppvae.staging import NotStageable, stage
from ppvae.training import (
    Diverged,
    Fit,
    NarrowFamily,
    NotConverged,
    fit,
    fit_replicates,
    load_pair,
    save_pair,
)

if TYPE_CHECKING:
    from ppvae import models, plots, regression
    from ppvae.comparison import account, choose_family, compare_families
    from ppvae.evaluation import (
        annealed_importance,
        calibration,
        evaluate,
        gaps,
        imputation_error,
        linear_probe,
        reading,
        refine,
        resample,
        summary,
        two_sample,
    )
    from ppvae.export import concat_chains, from_pyro_svi, loo, to_netcdf, to_zarr
    from ppvae.predictive import (
        encode,
        generate,
        impute,
        interpolate,
        log_prob,
        predict,
        reconstruct,
    )

__version__ = "0.1.0"

__all__ = [
    "Block",
    "VAE",
    "Diverged",
    "Family",
    "FamilyGuide",
    "Fit",
    "HeavyTails",
    "NarrowFamily",
    "NotConverged",
    "NotStageable",
    "account",
    "annealed_importance",
    "calibration",
    "choose_family",
    "closed_form",
    "compare_families",
    "concat_chains",
    "encode",
    "evaluate",
    "families",
    "fit",
    "fit_replicates",
    "from_pyro_svi",
    "gaps",
    "generate",
    "imputation_error",
    "impute",
    "interpolate",
    "likelihoods",
    "linear_probe",
    "load_pair",
    "log_prob",
    "loo",
    "models",
    "nan_masked",
    "objectives",
    "plots",
    "predict",
    "priors",
    "reading",
    "refine",
    "reconstruct",
    "regression",
    "resample",
    "save_pair",
    "simulate",
    "stage",
    "summary",
    "to_netcdf",
    "to_zarr",
    "two_sample",
]

#: Where the names are that are imported when they are first used; some are modules.
_AT_FIRST_USE = {
    "comparison": ["account", "choose_family", "compare_families"],
    "evaluation": [
        "annealed_importance",
        "calibration",
        "evaluate",
        "gaps",
        "imputation_error",
        "linear_probe",
        "reading",
        "refine",
        "resample",
        "summary",
        "two_sample",
    ],
    "export": ["concat_chains", "from_pyro_svi", "loo", "to_netcdf", "to_zarr"],
    "models": ["models"],
    "plots": ["plots"],
    "predictive": [
        "encode",
        "generate",
        "impute",
        "interpolate",
        "log_prob",
        "predict",
        "reconstruct",
    ],
    "regression": ["regression"],
}


def __getattr__(name: str) -> Any:
    rooms = [room for room, names in _AT_FIRST_USE.items() if name in names]
    if not rooms:
        raise AttributeError(f"module 'ppvae' has no attribute {name!r}")
    module = import_module(f"ppvae.{rooms[0]}")
    globals()[name] = value = module if name == rooms[0] else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
