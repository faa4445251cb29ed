"""Data: from whatever the user has to finite tensors, and small data sets without a download."""

from ppvae.data.sets import NAMES, load, split

__all__ = ["NAMES", "load", "split"]
