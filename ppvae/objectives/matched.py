"""The negative ELBO of global latents as a smooth deterministic function, its draws held fixed.

The draws are *moment-matched*: the standard normal numbers behind them have mean zero and identity
covariance over the draws, exactly. The average of any quadratic function is then its expectation,
so for a Gaussian family on a Gaussian model this is the ELBO itself; elsewhere it differs by
O(1/draws). Training minimises it with a quasi-Newton method, and `regression` reports it.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ppvae._scopes import random_state, unchecked
from ppvae.objectives.elbo import loss_of
from ppvae.objectives.trace_terms import terms
from ppvae.programs.matched_normals import MatchedNormals
from ppvae.programs.tracing import draws_plate, trace_pair


def average_loss(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: tuple[Any, ...],
    *,
    draws: int,
    seed: int,
    plate: str | None = None,
) -> Callable[[], Tensor]:
    """The negative ELBO in nats per datum as a function of the parameters, its draws held fixed.

    Args:
        model: a vectorized Pyro model.
        guide: its guide, with global latents.
        batch: all the data.
        draws: number of draws; above the number of latent coordinates, to be matched.
        seed: chooses them.
        plate: name of the data plate, see `data_plate`.
    """
    plate_of_draws = draws_plate(model, *batch, draws=draws)

    def loss() -> Tensor:
        with random_state(seed), MatchedNormals(draws), unchecked():
            pair = trace_pair(model, guide, *batch, draws=plate_of_draws)
            return loss_of(terms(*pair, plate), len(batch[0]))

    return loss
