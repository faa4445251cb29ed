"""Guide families for amortized inference in Pyro: from the autoencoder to the full posterior."""

from ppvae import closed_form, data, families, likelihoods, nn, objectives, plots
from ppvae.comparison import compare_families
from ppvae.evaluation.amortization import gaps
from ppvae.evaluation.annealing import annealed_importance
from ppvae.evaluation.evaluation import evaluate
from ppvae.evaluation.report import reading, summary
from ppvae.evaluation.sbc import calibration
from ppvae.export.arviz import from_pyro_svi
from ppvae.export.chains import concat_chains
from ppvae.families.family import Family
from ppvae.guides.family_guide import FamilyGuide
from ppvae.models.vae import VAE
from ppvae.programs.simulation import simulate
from ppvae.staging.staged import NotStageable, stage
from ppvae.training.fitting import Fit, fit
from ppvae.training.replicates import fit_replicates

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "Family",
    "FamilyGuide",
    "Fit",
    "NotStageable",
    "annealed_importance",
    "calibration",
    "closed_form",
    "compare_families",
    "concat_chains",
    "data",
    "evaluate",
    "families",
    "fit",
    "fit_replicates",
    "from_pyro_svi",
    "gaps",
    "likelihoods",
    "nn",
    "objectives",
    "plots",
    "reading",
    "simulate",
    "stage",
    "summary",
]
