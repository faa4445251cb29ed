"""Draws of the latents of each datum with their importance weights, and what follows from them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppvae._checks import expect
from ppvae.objectives.trace_terms import terms
from ppvae.programs.runs import Runs
from ppvae.programs.tracing import Args, with_discrete


def batches_of_draws(runs: Runs) -> list[Args]:
    """The arguments in minibatches, or whole, where some latent belongs to all the data."""
    local = terms(*runs.traces, runs.plate and runs.plate.name).is_local
    return runs.batches if local else [runs.args]


def weighted_runs(
    runs: Runs, args: Args, num_samples: int, *, density: bool = False
) -> Iterator[tuple[Any, Any, Tensor]]:
    """Runs of model and guide on a minibatch until there are so many draws.

    Args:
        runs: the pair.
        args: the minibatch.
        num_samples: number of draws.
        density: whether the weights are wanted for themselves.

    Raises:
        ValueError: they are, and the guide is a point, which has none.

    Yields:
        The trace of the model, the plate of draws (None for a single draw), and the log weights
        log p(x, z) - log q(z | x) in double precision, of shape `(draws, datum)`; `(draws, 1)`
        where some latent belongs to all the data. Draws of a point have equal weights.
    """
    pair, plate = runs.pair(args), runs.plate and runs.plate.name
    for count, draws in runs.draws(args, num_samples, pair):
        model_trace, guide_trace = runs.pair(args, draws)
        parts = terms(model_trace, guide_trace, plate)
        dense = bool(parts.log_guide) or not density
        expect(dense, "guide", "one with a density", "a point")
        weight = parts.log_weight if parts.log_guide else torch.zeros(())
        size = parts.plate.size if parts.is_local else 1
        shape = (count, size) if parts.is_local else (count,)
        model_trace, _ = with_discrete(runs.model, (model_trace, guide_trace), args, draws)
        yield model_trace, draws, weight.double().expand(shape).reshape(count, size)
