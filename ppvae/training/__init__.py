"""Training: moves the parameters of a model and its guide, and leaves all else as it was."""

from ppvae._process import apart
from ppvae.training.checkpoints import load_pair, save_pair
from ppvae.training.fitting import fit
from ppvae.training.replicates import fit_replicates
from ppvae.training.result import Fit
from ppvae.training.snapshots import Diverged, Snapshot
from ppvae.training.verdict import NarrowFamily, NotConverged

__all__ = [
    "Diverged",
    "Fit",
    "NarrowFamily",
    "NotConverged",
    "Snapshot",
    "apart",
    "fit",
    "fit_replicates",
    "load_pair",
    "save_pair",
]
