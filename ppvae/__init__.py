"""Guide families for amortized inference in Pyro: from the autoencoder to the full posterior."""

from ppvae import closed_form, data, families, likelihoods, nn, objectives, plots
from ppvae.annealing import annealed_importance
from ppvae.calibration import calibration
from ppvae.chains import concat_chains
from ppvae.compare import compare_families
from ppvae.convert import from_pyro_svi
from ppvae.evaluate import evaluate
from ppvae.families import Family
from ppvae.fit import Fit, fit
from ppvae.gaps import gaps
from ppvae.guides import FamilyGuide
from ppvae.replicates import fit_replicates
from ppvae.simulate import simulate
from ppvae.staging import NotStageable, stage
from ppvae.summary import reading, summary
from ppvae.vae import VAE

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
