r"""Staging: the loss of a Pyro model and its guide as one graph of PyTorch operations."""

from ppvae.staging.staged import NotStageable, Staged, stage

__all__ = ["NotStageable", "Staged", "stage"]
