"""Data: from whatever the user has to finite tensors, and small data sets without a download."""

from ppvae.data.sets import NAMES, load, split
from ppvae.data.tables import from_anndata, to_frame

__all__ = ["NAMES", "from_anndata", "load", "split", "to_frame"]
