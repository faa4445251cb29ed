r"""Small data sets that need no download, and files of the user's."""

from ppvae.data.sets import NAMES, load, split

__all__ = ["NAMES", "load", "split"]
