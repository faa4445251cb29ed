r"""One training loop for every model and every guide."""

from ppvae.training.fitting import Fit, fit
from ppvae.training.replicates import fit_replicates
from ppvae.training.snapshots import Diverged, Kept, restore, undone_by_errors

__all__ = ["Diverged", "Fit", "Kept", "fit", "fit_replicates", "restore", "undone_by_errors"]
